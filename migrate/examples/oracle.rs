//! Compares what we read of a suspended guest with what the stock saver reads of it:
//!
//! ```text
//! oracle save DOMID OURS.libxl      suspends the guest, and leaves it so
//! oracle stock DOMID STOCK.libxc    the stock saver, of the same suspended guest
//! oracle compare OURS.libxl STOCK.libxc
//! ```
//!
//! The guest's vif should be down and its disks idle: what dom0 writes into the guest's memory
//! between the two is a difference.

use std::env;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail, ensure};
use migrate::digest::DigestKey;
use migrate::guest::xen::pv::PvSource;
use migrate::guest::xen::stream::state::GuestState;
use migrate::guest::xen::stream::{Framing, Image, StreamPage, StreamWriter};
use migrate::guest::{Batch, Found, Moment, PageTable, Source};
use migrate::pages::{MAX_PAGES, PAGE_SIZE, PageSet};
use xen_sys::ctl::Ctl;

const USAGE: &str = "Usage: oracle save|stock DOMID FILE, or oracle compare OURS STOCK";

fn main() -> Result<()> {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [action, first, second] = &arguments[..] else {
        bail!(USAGE);
    };
    match action.as_str() {
        "save" => save(first, second),
        "stock" => {
            let file = File::create(second).with_context(|| format!("Can't create {second}"))?;
            xen_sys::stock::save(&Ctl::open()?, first.parse()?, file.as_fd())?;
            Ok(())
        }
        "compare" => compare(first, second),
        _ => bail!(USAGE),
    }
}

/// Writes the libxl stream of the guest as a move feeds it to the restore: read by the same code,
/// every page once.
fn save(domain: &str, path: &str) -> Result<()> {
    let mut guest = PvSource::open(domain.parse()?, &DigestKey::new([7; 32]), None)?;
    guest.suspend()?;
    let file = File::create(path).with_context(|| format!("Can't create {path}"))?;
    let data = guest.static_data()?;
    let mut stream = StreamWriter::begin(BufWriter::new(file), Framing::Libxl, &data)?;
    let pages = guest.facts().pages;
    let mut dirty = PageSet::new(pages);
    guest.next_dirty(&mut dirty, Moment::Last)?;
    ensure!(dirty.len() == pages, "The first look must take every page");
    stream.p2m_frames(pages - 1, guest.p2m_frames())?;
    let known = PageTable::new(pages);
    let mut deferred = PageSet::new(pages);
    let (mut batch, mut pfns, mut cursor) = (Batch::default(), Vec::new(), 0);
    while dirty.take_batch(&mut cursor, 1024, &mut pfns) > 0 {
        batch.clear();
        guest.read(&pfns, &known, Moment::Last, &mut batch, &mut deferred)?;
        pfns.clear();
        let records: Vec<StreamPage<'_>> = batch
            .entries
            .iter()
            .map(|entry| StreamPage {
                pfn: entry.pfn,
                page_type: entry.state.page_type,
                content: match entry.content {
                    Found::Nothing => None,
                    Found::Zero => Some(&[0; PAGE_SIZE]),
                    Found::Slot(slot) => batch.content(slot),
                },
            })
            .collect();
        stream.pages(&records)?;
    }
    ensure!(deferred.is_empty(), "{} pages unread", deferred.len());
    let mut file = stream.finish(&guest.final_state()?)?;
    file.flush().with_context(|| format!("Can't write {path}"))
}

fn compare(ours: &str, stock: &str) -> Result<()> {
    let read = |path: &str, framing| -> Result<Image> {
        let file = File::open(path).with_context(|| format!("Can't open {path}"))?;
        Image::read(BufReader::new(file), framing, MAX_PAGES).with_context(|| path.to_owned())
    };
    let (ours, stock) = (read(ours, Framing::Libxl)?, read(stock, Framing::Libxc)?);
    let differing = ours.differing_pages(&stock);
    for pfn in differing.iter().take(16) {
        eprintln!(
            "page {pfn:#x}: {} here, {} there",
            ours.page_type(*pfn),
            stock.page_type(*pfn)
        );
    }
    ensure!(differing.is_empty(), "{} pages differ", differing.len());
    ensure!(
        ours.static_data == stock.static_data,
        "The static data differ"
    );
    ensure!(
        (ours.max_pfn, &ours.p2m_frames) == (stock.max_pfn, &stock.p2m_frames),
        "The p2m frames differ"
    );
    let (GuestState::Pv(mine), GuestState::Pv(mut theirs)) = (ours.state.clone(), stock.state)
    else {
        bail!("Not the state of PV guests");
    };
    // The guest's clock goes on while it is suspended, and theirs was read later.
    ensure!(mine.tsc.nsec <= theirs.tsc.nsec, "Its clock went back");
    theirs.tsc.nsec = mine.tsc.nsec;
    ensure!(mine.tsc == theirs.tsc, "The TSC differs");
    ensure!(
        mine.shared_info == theirs.shared_info,
        "The shared info differs"
    );
    ensure!(mine.vcpus == theirs.vcpus, "The vCPUs differ");
    let tables = (0..ours.pages()).filter(|pfn| ours.page_type(*pfn).table_level().is_some());
    println!(
        "Equal: {} pages, {} page tables among them, {} vCPUs",
        ours.pages(),
        tables.count(),
        mine.vcpus.len()
    );
    Ok(())
}
