//! `vmshadow migrate`

use std::time::Duration;

use anyhow::anyhow;
use migrate::connections::{Connections, Untouched};
use migrate::directories::Directories;
use migrate::error::Error;
use migrate::guest::xen::checks::Allowed;
use migrate::guest::xen::host::Host;
use migrate::link::ssh::Remote;
use migrate::outgoing::{Moved, Request, find_domain, migrate};
use migrate::report::TrackerKind;
use migrate::rounds::{Limits, Share};
use migrate::shadow::ShadowPolicy;
use migrate::source::{OnTimeout, Plan};
use migrate::whereabouts::Left;
use migrate::wire::Purpose;

use crate::cli;
use crate::dry_run;
use crate::edge::{self, Departure, Edge, close_path_behind};
use crate::policy;
use crate::progress;
use crate::report_file::ReportFile;

/// Moves the guest, shows how it goes, and prints the report.
pub fn run(options: &cli::Migrate, directories: &Directories) -> anyhow::Result<()> {
    let mut remote = Remote::new(
        &options.remote.ssh,
        &options.host,
        &options.remote.remote_command,
    )?;
    remote.congestion = options.congestion.clone();
    let policy = policy::read()?;
    let request = Request {
        domain: options.domain.clone(),
        remote,
        plan: Plan {
            limits: Limits {
                downtime: Duration::from_millis(options.downtime),
                least_share: options
                    .throttle
                    .and_then(Share::new)
                    .unwrap_or(Share::WHOLE),
                ..Limits::default()
            },
            verify: options.verify,
            timeout: options.timeout.map(Duration::from_secs),
            on_timeout: match options.on_timeout {
                cli::OnTimeout::Fail => OnTimeout::Fail,
                cli::OnTimeout::Handover => OnTimeout::HandOver,
            },
            cores: options.cores,
            connections: options.connections.0,
        },
        allowed: Allowed {
            disks: options.no_disks,
        },
        tracker: options.tracker.map(|tracker| match tracker {
            cli::Tracker::LogDirty => TrackerKind::LogDirty,
            cli::Tracker::Scan => TrackerKind::Scan,
        }),
        rate: options.bandwidth,
        retry: Duration::from_secs(options.retry),
        purpose: Purpose::Move,
        shadows: ShadowPolicy {
            keep: policy.shadows.keep && !options.no_shadow,
            ..policy.shadows
        },
        groups: policy.groups,
        direct: !options.no_direct,
    };
    let report = options
        .report
        .as_deref()
        .map(ReportFile::open)
        .transpose()?;
    crate::require_xen()?;
    let edge = match options.no_edge {
        true => None,
        false => policy.edge.clone(),
    };
    let mut connections = connections(edge, &options.domain, directories)?;
    if options.dry_run {
        return dry_run::run(options, &request, report, connections.as_mut(), directories);
    }
    if let Some(warning) = crate::unit::warning() {
        tell!("Warning: {warning}");
    }
    let mut observer = progress::observer(options.json);
    let moved = migrate(
        directories,
        &request,
        observer.as_mut(),
        connections.as_mut(),
        &mut |settled| edge::follow(directories, settled),
        &crate::cancelled()?,
    );
    drop(observer);
    crate::output::finish_log();
    // What became of the guest matters more than a report that can't be written.
    if let Err(error) = publish(options, &moved, report) {
        tell!("Warning: {error:#}");
    }
    // The edge may take its time, or not answer.
    close_path(&moved, policy.edge.as_ref(), directories);
    let Moved {
        result,
        left,
        report,
    } = moved;
    // Journals know the guest by its name, whatever it was called here.
    let name = report.map_or(options.domain.clone(), |report| report.domain);
    result.map_err(|error| explain(error, left, &name, &options.host))
}

/// What keeps the guest's connections. The edge knows guests by their names.
fn connections(
    edge: Option<Edge>,
    domain: &str,
    directories: &Directories,
) -> anyhow::Result<Box<dyn Connections>> {
    let Some(edge) = edge else {
        return Ok(Box::new(Untouched));
    };
    let host = Host::open()?;
    let domid = find_domain(&host, domain)?;
    let (name, uuid) = (host.name(domid)?, host.uuid_text(&host.info(domid)?));
    Ok(Box::new(Departure::new(edge, &name, &uuid, directories)))
}

/// A guest that has moved is not reached here any more.
fn close_path(moved: &Moved, edge: Option<&Edge>, directories: &Directories) {
    let (Ok(()), Some(report)) = (&moved.result, &moved.report) else {
        return;
    };
    // Where connections were kept, the edge has followed. Else the destination may see to that, also
    // where nothing was to be done here.
    let edge = edge.filter(|_| report.connections.is_none());
    let waits = || {
        tell!(
            "Waiting until the edge has {} elsewhere, for a minute or so: its path here stays until \
             then",
            report.domain
        );
    };
    if let Err(error) = close_path_behind(directories, edge, &report.domain, waits) {
        tell!(
            "Warning: The path to {} is still here: {error:#}",
            report.domain
        );
    }
}

fn publish(options: &cli::Migrate, moved: &Moved, file: Option<ReportFile>) -> anyhow::Result<()> {
    let Some(report) = &moved.report else {
        return Ok(());
    };
    let json = serde_json::to_string_pretty(report)?;
    // A terminal may stand still.
    let written = file.map_or(Ok(()), |mut file| file.write(&format!("{json}\n")));
    if options.json {
        say!("{json}");
    } else if moved.result.is_ok() {
        say!("{}", progress::summary(report).trim_end());
    }
    written
}

/// Adds where the guest is now, and what to do.
pub fn explain(error: Error, left: Option<Left>, domain: &str, host: &str) -> anyhow::Error {
    let resolve = format!("run: vmshadow resolve {domain}");
    let place = match (&error, left) {
        (Error::InDoubt { .. }, _) => format!(
            "{domain} is suspended here and may run at {host}: only {host} knows. \
             When it can be reached again, {resolve}"
        ),
        // There is no such guest, or it is in another worker's hands, who will tell.
        (_, None) => return anyhow!(error),
        (_, Some(left @ (Left::Suspended | Left::Unseen))) => {
            format!("{domain} was not moved and {left}; {resolve}")
        }
        (Error::Unsettled(_), Some(left)) => {
            format!("{domain} was not moved and {left}; {resolve}")
        }
        (_, Some(left)) => format!("{domain} was not moved and {left}"),
    };
    anyhow!(error).context(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(error: Error, left: Option<Left>) -> String {
        format!("{:#}", explain(error, left, "g1", "b"))
    }

    #[test]
    fn each_failure_tells_where_the_guest_is() {
        let cancelled = || Error::Cancelled;
        assert_eq!(
            message(cancelled(), Some(Left::Running)),
            "g1 was not moved and runs here: Cancelled"
        );
        assert!(message(cancelled(), Some(Left::Paused)).contains("is paused here"));
        assert!(message(cancelled(), Some(Left::Gone)).contains("is gone from this host"));
        for left in [Left::Suspended, Left::Unseen] {
            let message = message(cancelled(), Some(left));
            assert!(message.contains("vmshadow resolve g1"), "{message}");
            assert!(!message.contains("runs here"), "{message}");
        }
        // The guest did not suspend.
        let busy = || Error::Busy("The guest has not answered".into());
        assert_eq!(
            message(busy(), Some(Left::Running)),
            "g1 was not moved and runs here: The guest has not answered"
        );
        assert_eq!(message(busy(), None), "The guest has not answered");
        let unsettled = Error::Unsettled(Box::new(Error::Cancelled));
        let message_of_it = message(unsettled, Some(Left::Running));
        assert!(message_of_it.contains("runs here; run: vmshadow resolve g1"));
        // Whatever is seen here: the other host may have it.
        let doubt = || Error::InDoubt { peer: "b".into() };
        for left in [None, Some(Left::Suspended), Some(Left::Unseen)] {
            let message = message(doubt(), left);
            assert!(message.contains("only b knows"), "{message}");
        }
        assert_eq!(
            message(Error::Refused("No such guest".into()), None),
            "No such guest"
        );
    }
}
