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
use migrate::guest::xen::host::Host;
use migrate::guest::xen::stream::state::{GuestState, TscInfo};
use migrate::guest::xen::stream::{Framing, Image, StreamPage, StreamWriter};
use migrate::guest::{self, Batch, Found, Kind, Moment, PageTable};
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
    let key = DigestKey::new([7; 32]);
    let mut guest = guest::xen::open(&Host::open()?, domain.parse()?, &key, None, 1)?;
    guest.suspend()?;
    let file = File::create(path).with_context(|| format!("Can't create {path}"))?;
    let data = guest.static_data()?;
    let mut stream = StreamWriter::begin(BufWriter::new(file), Framing::Libxl, &data)?;
    let pages = guest.facts().pages;
    let mut dirty = PageSet::new(pages);
    guest.next_dirty(&mut dirty, Moment::Last)?;
    ensure!(
        dirty == guest.everything(),
        "The first look must take every page"
    );
    if guest.facts().kind == Kind::Pv {
        stream.p2m_frames(pages - 1, guest.p2m_frames())?;
    }
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
    let what = compare_states(ours.state.clone(), stock.state)?;
    let tables = (0..ours.pages()).filter(|pfn| ours.page_type(*pfn).table_level().is_some());
    println!(
        "Equal: {} pages, {} page tables among them, {what}",
        ours.pages(),
        tables.count(),
    );
    Ok(())
}

/// Compares what guests are besides their memory, and says what that is.
fn compare_states(ours: GuestState, stock: GuestState) -> Result<String> {
    // The guest's clock goes on while it is suspended, and theirs was read later.
    let clocks = |mine: TscInfo, mut theirs: TscInfo| {
        ensure!(mine.nsec <= theirs.nsec, "Its clock went back");
        theirs.nsec = mine.nsec;
        ensure!(mine == theirs, "The TSC differs");
        Ok(())
    };
    match (ours, stock) {
        (GuestState::Pv(mine), GuestState::Pv(theirs)) => {
            clocks(mine.tsc, theirs.tsc)?;
            ensure!(
                mine.shared_info == theirs.shared_info,
                "The shared info differs"
            );
            ensure!(mine.vcpus == theirs.vcpus, "The vCPUs differ");
            Ok(format!("{} vCPUs", mine.vcpus.len()))
        }
        (GuestState::Hvm(mine), GuestState::Hvm(theirs)) => {
            clocks(mine.tsc, theirs.tsc)?;
            ensure!(mine.params == theirs.params, "The parameters differ");
            let (mine, theirs) = (records(&mine.context)?, records(&theirs.context)?);
            ensure!(mine.len() == theirs.len(), "The virtual hardware differs");
            for (mine, theirs) in mine.iter().zip(&theirs) {
                ensure!(
                    (mine.kind, mine.instance) == (theirs.kind, theirs.instance),
                    "The virtual hardware differs"
                );
                ensure!(
                    mine.kind == CPU_RECORD && mine.body.len() == theirs.body.len()
                        || mine.body == theirs.body,
                    "The virtual hardware's record {} of {} differs",
                    mine.kind,
                    mine.instance
                );
            }
            let vcpus = mine.iter().filter(|record| record.kind == CPU_RECORD);
            Ok(format!("{} vCPUs", vcpus.count()))
        }
        _ => bail!("Not the state of guests of one kind"),
    }
}

/// The record of a vCPU's registers in the state of virtual hardware (HVM_SAVE_CODE in Xen's
/// hvm/save.h). The guest's clock is among them, which goes on.
const CPU_RECORD: u16 = 2;

/// A record of the state of virtual hardware.
struct Record<'a> {
    kind: u16,
    instance: u16,
    body: &'a [u8],
}

/// Takes the state of virtual hardware apart: a kind, an instance and a length before each record.
fn records(mut context: &[u8]) -> Result<Vec<Record<'_>>> {
    let mut records = Vec::new();
    while let Some((head, rest)) = context.split_first_chunk::<8>() {
        let [k0, k1, i0, i1, length @ ..] = *head;
        let length = u32::from_le_bytes(length) as usize;
        let (body, rest) = rest
            .split_at_checked(length)
            .context("The state of the virtual hardware is cut short")?;
        records.push(Record {
            kind: u16::from_le_bytes([k0, k1]),
            instance: u16::from_le_bytes([i0, i1]),
            body,
        });
        context = rest;
    }
    Ok(records)
}
