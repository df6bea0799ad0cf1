//! `vmshadow migrate`

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};
use migrate::directories::Directories;
use migrate::error::Error;
use migrate::guest::xen::checks::Allowed;
use migrate::link::ssh::Remote;
use migrate::outgoing::{Left, Moved, Request, migrate};
use migrate::report::TrackerKind;
use migrate::rounds::Limits;
use migrate::source::Plan;

use crate::cli;
use crate::progress;

/// Moves the guest, shows how it goes, and prints the report.
pub fn run(options: &cli::Migrate, directories: &Directories) -> anyhow::Result<()> {
    let remote = Remote::new(
        &options.remote.ssh,
        &options.host,
        &options.remote.remote_command,
    )?;
    let request = Request {
        domain: options.domain.clone(),
        remote,
        plan: Plan {
            limits: Limits {
                downtime: Duration::from_millis(options.downtime),
                ..Limits::default()
            },
            verify: options.verify,
            timeout: options.timeout.map(Duration::from_secs),
        },
        allowed: Allowed {
            disks: options.no_disks,
        },
        tracker: options.tracker.map(|tracker| match tracker {
            cli::Tracker::LogDirty => TrackerKind::LogDirty,
            cli::Tracker::Scan => TrackerKind::Scan,
        }),
        rate: options.bandwidth,
    };
    let report = options.report.as_deref().map(open_report).transpose()?;
    let mut observer = progress::observer(options.json);
    let moved = migrate(
        directories,
        &request,
        observer.as_mut(),
        crate::cancelled()?,
    );
    drop(observer);
    // What became of the guest matters more than a report that can't be written.
    if let Err(error) = publish(options, &moved, report) {
        tell!("Warning: {error:#}");
    }
    let Moved { result, left, .. } = moved;
    result.map_err(|error| explain(error, left, &options.domain, &options.host))
}

/// Before the move, so that a path that can't be written stops it.
fn open_report(path: &Path) -> anyhow::Result<File> {
    File::create(path).with_context(|| format!("Can't write {}", path.display()))
}

fn publish(options: &cli::Migrate, moved: &Moved, file: Option<File>) -> anyhow::Result<()> {
    let Some(report) = &moved.report else {
        return Ok(());
    };
    let json = serde_json::to_string_pretty(report)?;
    if options.json {
        say!("{json}");
    } else if moved.result.is_ok() {
        say!("{}", progress::summary(report).trim_end());
    }
    if let Some(mut file) = file {
        writeln!(file, "{json}").context("Can't write the report")?;
    }
    Ok(())
}

/// Adds where the guest is now, and what to do.
fn explain(error: Error, left: Option<Left>, domain: &str, host: &str) -> anyhow::Error {
    let resolve = format!("run: vmshadow resolve {domain}");
    let place = match (&error, left) {
        (Error::InDoubt { .. }, _) => format!(
            "{domain} is suspended here and may run at {host}: only {host} knows. \
             When it can be reached again, {resolve}"
        ),
        // It never came to a move.
        (_, None) => return anyhow!(error),
        (_, Some(Left::Suspended)) => {
            format!("{domain} was not moved and is suspended here; {resolve}")
        }
        (Error::Unsettled(_), Some(left)) => {
            format!("{domain} was not moved and {left}; {resolve}")
        }
        (_, Some(left)) => format!("{domain} was not moved and {left}"),
    };
    anyhow!(error).context(place)
}
