//! Looking at memory that has not changed, beside copying it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use migrate::digest::{DigestKey, Digester};
use migrate::guest::replay::{Content, Guest, Memory, ReplaySource, Site};
use migrate::guest::{Batch, Moment, PageTable, Source};
use migrate::pages::{PAGE_SIZE, PageSet};
use migrate::report::TrackerKind;

use crate::Result;
use crate::subject::generated;

/// Pages of a buffer that is used again and again.
const BUFFER: usize = 1024;

/// Each is measured so often; the fastest counts.
const ATTEMPTS: u32 = 5;

pub fn run() -> Result<()> {
    let subject = generated(512, 0);
    // Without zero pages: each is of other bytes.
    let contents = (0..subject.memory.pages()).filter_map(|pfn| match subject.memory.page(pfn) {
        Some((_, Content::Bytes(page))) => Some(Content::Bytes(Arc::new(**page))),
        _ => None,
    });
    let memory = Memory::of(contents.collect());
    let pages = memory.pages();
    let bytes = pages as f64 * PAGE_SIZE as f64;
    let root = tempfile::tempdir()?;
    let site = Site::new(root.path())?;
    site.start(Guest::idle("subject", memory.clone()));
    let key = DigestKey::new([1; 32]);
    let digester = Digester::new(&key);
    let mut known = PageTable::new(pages);
    let mut batch = Batch::default();
    let mut deferred = PageSet::new(pages);
    let everything: Vec<u64> = (0..pages).collect();
    let opened =
        |cores| ReplaySource::open(&site, &key, TrackerKind::Scan, cores, Arc::new(|_| Ok(())));
    let mut source = opened(1)?;
    for pfns in everything.chunks(1024) {
        batch.clear();
        source.read(pfns, &known, Moment::Live, &mut batch, &mut deferred)?;
        for entry in &batch.entries {
            known.set(entry.pfn, entry.state);
        }
    }
    let mut looks = Vec::new();
    let cores = thread::available_parallelism()?.get();
    for cores in [1, cores] {
        let mut source = opened(cores)?;
        let look = fastest(|| {
            let mut unchanged = 0;
            for pfns in everything.chunks(1024) {
                batch.clear();
                source.read(pfns, &known, Moment::Live, &mut batch, &mut deferred)?;
                unchanged += batch.unchanged;
            }
            assert_eq!(unchanged, pages);
            Ok(())
        })?;
        looks.push((cores, look));
    }
    let mut copy = vec![0; pages as usize * PAGE_SIZE];
    let copying = fastest(|| {
        let (places, _) = copy.as_chunks_mut::<PAGE_SIZE>();
        for (place, pfn) in places.iter_mut().zip(0..) {
            if let Some((_, content)) = memory.page(pfn) {
                content.look(|page| place.copy_from_slice(page));
            }
        }
        std::hint::black_box(&copy);
        Ok(())
    })?;
    let mut again = vec![0; BUFFER * PAGE_SIZE];
    let into_buffer = fastest(|| {
        let (places, _) = again.as_chunks_mut::<PAGE_SIZE>();
        for pfn in 0..pages {
            let place = &mut places[pfn as usize % BUFFER];
            if let Some((_, content)) = memory.page(pfn) {
                content.look(|page| place.copy_from_slice(page));
            }
        }
        std::hint::black_box(&again);
        Ok(())
    })?;
    let hashing = fastest(|| {
        std::hint::black_box(known.digest(&digester));
        Ok(())
    })?;
    let rate = |took: Duration| bytes / took.as_secs_f64() / 1e9;
    println!("\n## Memory that has not changed, {} MiB\n", pages >> 8);
    println!("| | GB/s | of memcpy |");
    println!("|---|---|---|");
    println!("| memcpy of each page | {:.2} | 1 |", rate(copying));
    println!(
        "| memcpy of each page into a buffer of 4 MiB | {:.2} | {:.2} |",
        rate(into_buffer),
        rate(into_buffer) / rate(copying)
    );
    for (cores, look) in looks {
        println!(
            "| read, digest, compare: unchanged; on {cores} cores | {:.2} | {:.2} |",
            rate(look),
            rate(look) / rate(copying)
        );
    }
    println!("\nThe digest of the whole memory, from its pages': {hashing:.1?}");
    Ok(())
}

fn fastest(mut act: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut fastest = Duration::MAX;
    for _ in 0..ATTEMPTS {
        let start = Instant::now();
        act()?;
        fastest = fastest.min(start.elapsed());
    }
    Ok(fastest)
}
