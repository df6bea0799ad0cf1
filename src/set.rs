//! `vmshadow set`

use migrate::control::{self, Bandwidth, Change};
use migrate::directories::Directories;

use crate::cli::{self, Setting};
use crate::status;

/// Changes the limits of the guest's move.
pub fn run(options: &cli::Set, directories: &Directories) -> anyhow::Result<()> {
    let mut change = Change::default();
    for setting in &options.settings {
        match setting {
            Setting::Bandwidth(rate) => change.bandwidth = Some(Bandwidth::of_bytes(*rate)),
            Setting::Downtime(time) => change.downtime_ms = Some(*time),
        }
    }
    // Where both ends of it are here, a limit is the source's affair.
    let mut moves = control::find(directories, &options.domain)?;
    moves.sort_by_key(|at| (at.status.waiting, at.status.role as u8));
    let holds = moves.swap_remove(0).client.set(change)?;
    if options.json {
        say!("{}", serde_json::to_string_pretty(&holds)?);
        return Ok(());
    }
    let mut limits = Vec::new();
    if let Some(bandwidth) = holds.bandwidth {
        limits.push(format!("bandwidth {}", status::bandwidth(bandwidth)));
    }
    if let Some(downtime) = holds.downtime_ms {
        limits.push(format!("downtime {downtime} ms"));
    }
    say!("{}: {}", options.domain, limits.join(", "));
    Ok(())
}
