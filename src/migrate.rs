//! `vmshadow migrate`

use std::fs;
use std::time::Duration;

use anyhow::{Context, anyhow};
use migrate::directories::Directories;
use migrate::error::Error;
use migrate::guest::xen::checks::Allowed;
use migrate::link::ssh::Remote;
use migrate::outgoing::{Request, migrate};
use migrate::report::{Report, TrackerKind};
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
    let mut observer = progress::observer(options.json);
    let moved = migrate(
        directories,
        &request,
        observer.as_mut(),
        crate::cancelled()?,
    );
    drop(observer);
    if let Some(report) = &moved.report {
        publish(options, report)?;
    }
    moved
        .result
        .map_err(|error| explain(error, &options.domain, &options.host))
}

fn publish(options: &cli::Migrate, report: &Report) -> anyhow::Result<()> {
    let json = serde_json::to_string_pretty(report)?;
    if let Some(path) = &options.report {
        fs::write(path, format!("{json}\n"))
            .with_context(|| format!("Can't write {}", path.display()))?;
    }
    if options.json {
        println!("{json}");
    } else if report.outcome == "moved" {
        print!("{}", progress::summary(report));
    }
    Ok(())
}

/// Adds where the guest is now, and what to do.
fn explain(error: Error, domain: &str, host: &str) -> anyhow::Error {
    let place = match &error {
        Error::InDoubt { .. } => format!(
            "{domain} is suspended here and may run at {host}: only {host} knows. \
             When it can be reached again, run: vmshadow resolve {domain}"
        ),
        Error::Unsettled(_) => {
            format!(
                "{domain} was not moved and may be suspended here; run: vmshadow resolve {domain}"
            )
        }
        // Nothing was touched, or nothing was found.
        Error::Refused(_) | Error::Busy(_) => return anyhow!(error),
        _ => format!("{domain} was not moved and runs here"),
    };
    anyhow!(error).context(place)
}
