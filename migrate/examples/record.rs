//! Records a running PV guest's memory over time, for guests that are replayed: in dom0,
//! `record DOMAIN SECONDS NAME > FILE`.
//!
//! Once a second it looks what has changed, as a move does before the suspend. The guest runs on.

use std::io::{BufWriter, stdout};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use migrate::digest::DigestKey;
use migrate::guest::replay::Recorder;
use migrate::guest::xen::host::Host;
use migrate::guest::xen::pv::PvSource;
use migrate::guest::{Batch, Moment, PageTable, Source};
use migrate::outgoing::find_domain;
use migrate::pages::PageSet;

/// Pages read at once: what the hypervisor takes.
const BATCH: usize = 1024;

/// Passes until what is recorded is the memory of one moment, near enough.
const SETTLING: u32 = 3;

/// How often it is looked.
const STEP: Duration = Duration::from_secs(1);

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [domain, seconds, name] = &arguments[..] else {
        bail!("Usage: record DOMAIN SECONDS NAME > FILE");
    };
    let seconds: u64 = seconds.parse().context("Not a number of seconds")?;
    let domid = find_domain(&Host::open()?, domain)?;
    let mut guest = PvSource::open(domid, &DigestKey::new([0; 32]), None, 1)?;
    let tracker = guest.begin()?;
    let recorded = record(&mut guest, Duration::from_secs(seconds), name);
    guest.end_tracking()?;
    let (steps, pages) = recorded?;
    eprintln!("{name}: {steps} steps, {pages} pages, by {tracker}");
    Ok(())
}

fn record(guest: &mut PvSource, long: Duration, name: &str) -> anyhow::Result<(u32, u64)> {
    let pages = guest.facts().pages;
    let mut recorder = Recorder::begin(BufWriter::new(stdout().lock()), pages, name)?;
    let mut known = PageTable::new(pages);
    let mut dirty = PageSet::new(pages);
    let mut written = 0;
    let mut batch = Batch::default();
    let mut pfns = Vec::with_capacity(BATCH);
    let mut pass = |at: Duration| -> anyhow::Result<()> {
        guest.next_dirty(&mut dirty, Moment::Live)?;
        let mut deferred = PageSet::new(pages);
        let mut cursor = 0;
        while dirty.take_batch(&mut cursor, BATCH, &mut pfns) > 0 {
            batch.clear();
            guest.read(&pfns, &known, Moment::Live, &mut batch, &mut deferred)?;
            pfns.clear();
            recorder.add(at, &batch)?;
            written += batch.entries.len() as u64;
            for entry in &batch.entries {
                known.set(entry.pfn, entry.state);
            }
        }
        // What could not be read goes into the next step.
        dirty = deferred;
        Ok(())
    };
    // The first pass takes long. What it missed meanwhile belongs to it, and time begins then.
    for _ in 0..SETTLING {
        pass(Duration::ZERO)?;
    }
    let mut steps = 1;
    let started = Instant::now();
    let mut at = Duration::ZERO;
    while at < long {
        sleep(STEP.saturating_sub(started.elapsed().saturating_sub(at)));
        at = started.elapsed();
        pass(at)?;
        steps += 1;
    }
    recorder.end()?;
    Ok((steps, written))
}
