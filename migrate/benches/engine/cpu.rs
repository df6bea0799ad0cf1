//! CPU seconds a GB of guest memory: ours, QEMU's, and those of `zstd -1`.

use std::time::Duration;

use migrate::pages::PAGE_SIZE;
use nix::time::{ClockId, clock_gettime};

use crate::Result;
use crate::bytes::RATE;
use crate::others::Way;
use crate::processes;
use crate::qemu::{self, Mode};
use crate::subject;

pub fn run() -> Result<()> {
    println!("\n## CPU seconds for each GB of guest memory, at the source\n");
    println!("| guest | by | CPU s/GB | s | MB |");
    println!("|---|---|---|---|---|");
    for subject in subject::all()? {
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
        let argument = path.unwrap_or_else(|| "bytes 128".into());
        for (by, rate, keep) in [
            ("VMShadow, no limit", 0, false),
            ("with a shadow kept", 0, true),
            ("VMShadow, 100 Mbit/s", RATE, false),
        ] {
            let (source, destination) = processes::run(&argument, rate, keep)?;
            row(by, source.cpu, source.seconds, source.wire_bytes);
            if rate == 0 && !keep {
                row("its destination", destination.cpu, destination.seconds, 0);
            }
        }
        let bytes = subject.bytes();
        for level in [1, 3] {
            let mut way = Way::zstd(level);
            let before = thread_cpu()?;
            let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
            let written: u64 = pages.iter().map(|page| way.page(page)).sum();
            let written = written + way.flush();
            let took = (thread_cpu()? - before).as_secs_f64();
            row(&format!("zstd -{level} of the stream"), took, took, written);
        }
        for mode in [Mode::Plain, Mode::MultifdZstd] {
            if let Some(moved) = qemu::migrate(&subject, mode, None, false)? {
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
