//! `vmshadow shadow`

use std::num::NonZeroUsize;
use std::time::Duration;

use indicatif::HumanBytes;
use migrate::directories::Directories;
use migrate::guest::xen::checks::Allowed;
use migrate::link::ssh::Remote;
use migrate::outgoing::renewal::Renewal;
use migrate::outgoing::{Moved, Request};
use migrate::report::Report;
use migrate::retry;
use migrate::source::Plan;
use migrate::wire::Purpose;

use crate::cli;
use crate::edge;
use crate::policy;
use crate::progress;

/// Sends the guest's memory to where it may go later; once, or again and again.
pub fn run(options: &cli::Shadow, directories: &Directories) -> anyhow::Result<()> {
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
            connections: NonZeroUsize::new(1),
            ..Plan::default()
        },
        allowed: Allowed {
            disks: options.no_disks,
        },
        tracker: None,
        rate: options.bandwidth,
        retry: retry::AWAY,
        purpose: Purpose::Shadow,
        shadows: policy.shadows,
        groups: policy.groups,
        // It goes by one connection.
        direct: false,
    };
    crate::require_xen()?;
    let cancel = crate::cancelled()?;
    let every = options.every.map(Duration::from_secs);
    let mut renewal = Renewal::new(directories, &request, every, &cancel);
    loop {
        let mut observer = progress::observer(options.json);
        let Moved {
            report,
            result,
            left,
        } = renewal.pass(observer.as_mut(), &mut |settled| {
            edge::follow(directories, settled);
        });
        drop(observer);
        if let (Some(report), true) = (&report, options.json) {
            say!("{}", serde_json::to_string_pretty(report)?);
        }
        if let Err(error) = result {
            // That is how one that goes on is meant to end.
            if matches!(error, migrate::Error::Cancelled) && options.every.is_some() {
                return Ok(());
            }
            let name = report.map_or(options.domain.clone(), |report| report.domain);
            return Err(crate::migrate::explain(error, left, &name, &options.host));
        }
        if let (Some(report), false) = (&report, options.json) {
            say!("{}", summary(report));
        }
        if !renewal.wait() {
            return Ok(());
        }
    }
}

fn summary(report: &Report) -> String {
    format!(
        "{} has a shadow of {} after {:.1} s: {} of memory, {} on the wire",
        report.destination,
        report.domain,
        report.took.as_secs_f64(),
        HumanBytes(report.guest_bytes),
        HumanBytes(report.wire_bytes),
    )
}
