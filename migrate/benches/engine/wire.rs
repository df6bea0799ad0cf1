//! How full a link is: the first round's time against its bytes over the link's rate.

use std::time::Duration;

use migrate::guest::replay::{Crossing, Guest, Restored, Shape, Site, cross, pair};
use migrate::link::Link;
use migrate::report::Round;

use crate::subject::{Subject, generated};
use crate::{Result, io};

pub fn run() -> Result<()> {
    println!("\n## Links: the first round of a guest, half of it zero\n");
    println!("| MiB | Mbit/s | RTT, ms | MB | s | over bytes / rate |");
    println!("|---|---|---|---|---|---|");
    // Each takes some seconds: in less, the round trip that ends it would be what is measured.
    for (mbit, mib) in [(10, 32), (50, 128), (100, 256), (1000, 4096)] {
        let subject = generated(mib, 0);
        for rtt in [10, 40, 200] {
            row(&subject, mbit, rtt)?;
        }
    }
    Ok(())
}

fn row(subject: &Subject, mbit: u64, rtt: u64) -> Result<()> {
    let rate = mbit * 125_000;
    let (here, there, _cut) = pair(Shape {
        rate: Some(rate),
        latency: Duration::from_micros(rtt * 500),
        cut_after: None,
    });
    let round = first_round(subject, (here, there), Default::default())?;
    println!(
        "| {} | {mbit} | {rtt} | {} |",
        subject.mib(),
        beside_ideal(&round, rate)
    );
    Ok(())
}

/// Moves the subject over a link, with more connections for pages in `data`: the first round.
pub fn first_round(
    subject: &Subject,
    link: (Link, Link),
    data: (Vec<Link>, Vec<Link>),
) -> Result<Round> {
    let root = tempfile::tempdir()?;
    let near = Site::new(&root.path().join("near"))?;
    let far = Site::new(&root.path().join("far"))?;
    near.start(Guest::idle("subject", subject.memory.clone()));
    let crossing = Crossing {
        restored: Restored::Dropped,
        data,
        ..Crossing::default()
    };
    let report = cross(&near, &far, link, crossing)?
        .report
        .ok_or_else(|| io::Error::other("No report"))?;
    let first = report.rounds.first().copied();
    Ok(first.ok_or_else(|| io::Error::other(report.outcome))?)
}

/// Columns: MB, seconds, and how much longer it took than its bytes at `rate` bytes a second.
pub fn beside_ideal(round: &Round, rate: u64) -> String {
    let took = round.took.as_secs_f64();
    let ideal = round.wire_bytes as f64 / rate as f64;
    format!(
        "{:.1} | {took:.2} | {:+.1} %",
        round.wire_bytes as f64 / 1e6,
        (took / ideal - 1.0) * 100.0
    )
}
