//! Bytes of the first round and of the whole move, by the same guests.

use std::time::Duration;

use migrate::costs::Earlier;
use migrate::guest::replay::{Clock, Crossing, Guest, Shape, Site, cross, pair};
use migrate::rounds::Limits;

use crate::others::{Taken, Way, simulate};
use crate::qemu::{self, Mode};
use crate::subject::{self, Subject};
use crate::{Result, io};

/// 100 Mbit/s.
pub const RATE: u64 = 12_500_000;

/// Half of a round trip of 40 ms.
pub const LATENCY: Duration = Duration::from_millis(20);

pub fn run() -> Result<()> {
    println!("\n## Bytes: 100 Mbit/s, 40 ms RTT\n");
    println!("| guest | by | first round, MB | whole move, MB | rounds | s |");
    println!("|---|---|---|---|---|---|");
    for subject in subject::all(subject::generated(128, 60))? {
        let name = format!("{} ({} MiB)", subject.name, subject.mib());
        let row = |by: &str, taken: &Taken| {
            println!(
                "| {name} | {by} | {:.1} | {:.1} | {} | {:.1} |",
                taken.first as f64 / 1e6,
                taken.whole as f64 / 1e6,
                taken.rounds,
                taken.seconds
            );
        };
        let limits = Limits::default();
        row("VMShadow", &ours(&subject, Earlier::default())?);
        let known = Earlier {
            link: Some(RATE as f64),
            ..Earlier::default()
        };
        row(
            "VMShadow, over a link that it knows",
            &ours(&subject, known)?,
        );
        let others = [
            ("raw pages", Way::Raw),
            ("LZ4 of each page", Way::lz4()),
            ("zstd -3 of the stream", Way::zstd(3)),
        ];
        for (by, way) in others {
            row(by, &simulate(&subject, way, RATE, &limits));
        }
        for mode in [Mode::Xbzrle, Mode::MultifdZstd] {
            match qemu::migrate(&subject, mode, Some(RATE), true)? {
                Some(moved) => row(mode.name(), &moved.taken),
                None => println!("| {name} | {} | QEMU is not installed | | | |", mode.name()),
            }
        }
    }
    Ok(())
}

fn ours(subject: &Subject, earlier: Earlier) -> Result<Taken> {
    let root = tempfile::tempdir()?;
    let near = Site::new(&root.path().join("near"))?;
    let far = Site::new(&root.path().join("far"))?;
    let mut guest = Guest::idle("subject", subject.memory.clone());
    guest.live(subject.history.clone(), Clock::Time);
    near.start(guest);
    let (here, there, _cut) = pair(Shape {
        rate: Some(RATE),
        latency: LATENCY,
        cut_after: None,
    });
    let crossing = Crossing {
        earlier,
        ..Crossing::default()
    };
    let crossed = cross(&near, &far, (here, there), crossing)?;
    let report = crossed
        .report
        .ok_or_else(|| io::Error::other("No report"))?;
    if !crossed.source.is_ok() {
        return Err(io::Error::other(report.outcome).into());
    }
    Ok(Taken {
        first: report.rounds.first().map_or(0, |round| round.wire_bytes),
        whole: report.wire_bytes,
        rounds: report.rounds.len(),
        seconds: report.took.as_secs_f64(),
    })
}
