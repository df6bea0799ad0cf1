//! What the two processes need, by the guest's size.

use crate::Result;
use crate::processes;

pub fn run() -> Result<()> {
    println!("\n## Memory of the two processes: of their own, beyond the guest itself\n");
    println!("| guest, MiB | source, MiB | a page, B | destination, MiB | a page, B |");
    println!("|---|---|---|---|---|");
    for mib in [128_u64, 512, 1024, 2048, 4096] {
        let (source, destination) = processes::run(&format!("made {mib}"), 0, true)?;
        let each = |kib: u64| (kib << 10) as f64 / (mib << 8) as f64;
        let (near, far) = (source.anonymous_kib, destination.anonymous_kib);
        println!(
            "| {mib} | {:.1} | {:.1} | {:.1} | {:.1} |",
            near as f64 / 1024.0,
            each(near),
            far as f64 / 1024.0,
            each(far)
        );
    }
    Ok(())
}
