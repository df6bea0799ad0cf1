//! How full a link is: the first round's time against its bytes over the link's rate.

use std::sync::Arc;
use std::time::Duration;

use migrate::guest::replay::{
    Content, Crossing, Guest, Memory, Restored, Shape, Site, cross, pair,
};

use crate::subject::{Subject, generated};
use crate::{Result, io};

pub fn run() -> Result<()> {
    println!("\n## Links: the first round of a guest, half of it zero\n");
    println!("| MiB | Mbit/s | RTT, ms | MB | s | over bytes / rate |");
    println!("|---|---|---|---|---|---|");
    // Each takes some seconds: in less, the round trip that ends it would be what is measured.
    for (mbit, mib) in [(10, 32), (50, 128), (100, 256), (1000, 2048)] {
        let subject = generated(mib, 0);
        for rtt in [10, 40, 200] {
            row(&subject, mbit, rtt)?;
        }
    }
    Ok(())
}

fn row(subject: &Subject, mbit: u64, rtt: u64) -> Result<()> {
    let contents = (0..subject.memory.pages()).map(|pfn| match subject.memory.page(pfn) {
        Some((_, Content::Bytes(page))) => Content::Bytes(Arc::clone(page)),
        _ => Content::Zero,
    });
    let root = tempfile::tempdir()?;
    let near = Site::new(&root.path().join("near"))?;
    let far = Site::new(&root.path().join("far"))?;
    near.start(Guest::idle("subject", Memory::of(contents.collect())));
    let rate = mbit * 125_000;
    let (here, there, _cut) = pair(Shape {
        rate: Some(rate),
        latency: Duration::from_micros(rtt * 500),
        cut_after: None,
    });
    let crossing = Crossing {
        restored: Restored::Dropped,
        ..Crossing::default()
    };
    let crossed = cross(&near, &far, (here, there), crossing)?;
    let report = crossed
        .report
        .ok_or_else(|| io::Error::other("No report"))?;
    let first = report
        .rounds
        .first()
        .ok_or_else(|| io::Error::other(report.outcome.clone()))?;
    let ideal = first.wire_bytes as f64 / rate as f64;
    let took = first.took.as_secs_f64();
    println!(
        "| {} | {mbit} | {rtt} | {:.1} | {took:.2} | {:+.1} % |",
        subject.mib(),
        first.wire_bytes as f64 / 1e6,
        (took / ideal - 1.0) * 100.0
    );
    Ok(())
}
