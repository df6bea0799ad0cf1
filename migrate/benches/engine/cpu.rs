//! CPU seconds a GB of guest memory: ours, QEMU's, and those of `zstd -1`.

use std::time::Duration;

use migrate::pages::PAGE_SIZE;
use nix::time::{ClockId, clock_gettime};

use crate::Result;
use crate::bytes::RATE;
use crate::others::Way;
use crate::processes::{self, Needed};
use crate::qemu::{self, Mode};
use crate::subject::{self, generated};

/// MiB of the guest that is generated: as large as guests are, so that what an end needs once, and
/// until it knows the link, is not most of it.
const SIZE: u64 = 1024;

/// How often each is measured; the median counts.
const TIMES: usize = 5;

pub fn run() -> Result<()> {
    println!("\n## CPU seconds for each GB of guest memory, at the source\n");
    println!("| guest | by | CPU s/GB | s | MB |");
    println!("|---|---|---|---|---|");
    for subject in subject::all(generated(SIZE, 0))? {
        let gigabytes = subject.memory.populated() as f64 * PAGE_SIZE as f64 / 1e9;
        let name = format!("{} ({} MiB)", subject.name, subject.mib());
        let row = |by: &str, cpu: f64, seconds: f64, bytes: u64| {
            println!(
                "| {name} | {by} | {:.2} | {seconds:.2} | {:.1} |",
                cpu / gigabytes,
                bytes as f64 / 1e6
            );
        };
        let path = subject.path.as_ref().map(|path| path.display().to_string());
        let argument = path.unwrap_or_else(|| format!("bytes {SIZE}"));
        for (by, rate, keep) in [
            ("VMShadow, no limit", 0, false),
            ("with a shadow kept", 0, true),
            ("VMShadow, 100 Mbit/s", RATE, false),
        ] {
            // What a rate makes of it waits for the rate, and wavers little.
            let times = if rate == 0 { TIMES } else { 1 };
            let (source, destination) = median(
                times,
                |(source, _): &(Needed, Needed)| source.cpu,
                || processes::run(&argument, rate, keep),
            )?;
            row(by, source.cpu, source.seconds, source.wire_bytes);
            if rate == 0 && !keep {
                row("its destination", destination.cpu, destination.seconds, 0);
            }
        }
        let bytes = subject.bytes();
        for level in [1, 3] {
            let (took, written) = median(
                TIMES,
                |(took, _)| *took,
                || {
                    let mut way = Way::zstd(level);
                    let before = thread_cpu()?;
                    let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
                    let written: u64 = pages.iter().map(|page| way.page(page)).sum();
                    let written = written + way.flush();
                    Ok(((thread_cpu()? - before).as_secs_f64(), written))
                },
            )?;
            row(&format!("zstd -{level} of the stream"), took, took, written);
        }
        drop(bytes);
        for mode in [Mode::Plain, Mode::MultifdZstd] {
            let cpu = |moved: &Option<qemu::Moved>| moved.as_ref().map_or(0.0, |moved| moved.cpu);
            let moved = median(TIMES, cpu, || qemu::migrate(&subject, mode, None, false))?;
            if let Some(moved) = moved {
                row(
                    mode.name(),
                    moved.cpu,
                    moved.taken.seconds,
                    moved.taken.whole,
                );
            }
        }
    }
    Ok(())
}

fn thread_cpu() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// What is done `times` times, by what `key` says of it.
fn median<T>(
    times: usize,
    key: impl Fn(&T) -> f64,
    mut act: impl FnMut() -> Result<T>,
) -> Result<T> {
    let mut all = (0..times).map(|_| act()).collect::<Result<Vec<T>>>()?;
    all.sort_by(|one, other| key(one).total_cmp(&key(other)));
    Ok(all.swap_remove(all.len() / 2))
}
