//! `vmshadow status`

use std::time::Duration;

use indicatif::{HumanBytes, HumanDuration};
use migrate::control::{self, Bandwidth, Status};
use migrate::directories::Directories;
use migrate::handover::journal::Role;

use crate::cli;
use crate::output::tell_all_but_last;

/// Prints the moves that are at work here.
pub fn run(options: &cli::Status, directories: &Directories) -> anyhow::Result<()> {
    let (moves, silent) = match &options.domain {
        Some(domain) => (control::find(directories, domain)?, Vec::new()),
        None => {
            let found = control::moves(directories)?;
            (found.moves, found.silent)
        }
    };
    let moves: Vec<Status> = moves.into_iter().map(|at| at.status).collect();
    if options.json {
        say!("{}", serde_json::to_string_pretty(&moves)?);
    } else if moves.is_empty() && silent.is_empty() {
        say!("No move is at work on this host");
    } else {
        for status in &moves {
            say!("{}", describe(status));
        }
    }
    // What can't be asked may be a move as well.
    tell_all_but_last(silent.into_iter().map(anyhow::Error::from))
}

/// A limit of what is sent, for people.
pub fn bandwidth(limit: Bandwidth) -> String {
    match limit {
        Bandwidth::Limit(bits) => format!("{} Mbit/s", bits as f64 / 1e6),
        Bandwidth::None(_) => "unlimited".into(),
    }
}

/// A move in a few lines.
fn describe(status: &Status) -> String {
    let leaves = status.role == Role::Source;
    let mut text = format!(
        "{} {} {}: {}{}, {:.0} s so far\n",
        status.domain,
        if leaves { "to" } else { "from" },
        status.peer,
        status.phase,
        if status.cancelling {
            ", being given up"
        } else if status.committed {
            ", committed"
        } else {
            ""
        },
        status.seconds,
    );
    let mut figures = Vec::new();
    if status.round > 0 {
        figures.push(if leaves {
            format!(
                "round {}, {} of {} pages",
                status.round, status.pages_done, status.pages
            )
        } else {
            format!("round {}, {} pages", status.round, status.pages_done)
        });
    }
    figures.push(format!(
        "{} {} of {} of memory",
        HumanBytes(status.wire_bytes),
        if leaves { "sent" } else { "received" },
        HumanBytes(status.guest_bytes)
    ));
    if let Some(rate) = status.rate {
        figures.push(format!("{}/s", HumanBytes(rate as u64)));
    }
    text.push_str(&format!("  {}\n", figures.join(", ")));
    if !leaves {
        text.truncate(text.trim_end().len());
        return text;
    }
    let mut ahead = Vec::new();
    if let Some(remaining) = status.remaining_bytes {
        ahead.push(format!("{} to look at", HumanBytes(remaining)));
    }
    if let Some(dirty) = status.dirty_rate {
        ahead.push(format!("{}/s change", HumanBytes(dirty as u64)));
    }
    if let Some(eta) = status.eta_seconds {
        let eta = Duration::try_from_secs_f64(eta).unwrap_or_default();
        ahead.push(format!("{} left", HumanDuration(eta)));
    }
    if let Some(downtime) = status.predicted_downtime {
        ahead.push(format!("silence of {downtime:.2} s predicted"));
    }
    if !ahead.is_empty() {
        text.push_str(&format!("  {}\n", ahead.join(", ")));
    }
    text.push_str(&format!(
        "  limits: bandwidth {}, downtime {} ms",
        bandwidth(status.bandwidth),
        status.downtime_ms
    ));
    text
}
