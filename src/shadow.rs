//! `vmshadow shadow`

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::HumanBytes;
use migrate::connections::Untouched;
use migrate::directories::Directories;
use migrate::guest::xen::checks::Allowed;
use migrate::link::ssh::Remote;
use migrate::outgoing::{Moved, Request, migrate};
use migrate::report::Report;
use migrate::retry;
use migrate::source::Plan;
use migrate::wire::Purpose;

use crate::cli;
use crate::edge;
use crate::policy;
use crate::progress;

/// How often a pause looks whether it was cancelled.
const TICK: Duration = Duration::from_millis(100);

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
    };
    crate::require_xen()?;
    let cancel = crate::cancelled()?;
    loop {
        let mut observer = progress::observer(options.json);
        let Moved {
            report,
            result,
            left,
        } = migrate(
            directories,
            &request,
            observer.as_mut(),
            &mut Untouched,
            &mut |settled| edge::follow(directories, settled),
            &cancel,
        );
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
        let Some(every) = options.every else {
            return Ok(());
        };
        if pause(Duration::from_secs(every), &cancel) {
            return Ok(());
        }
    }
}

/// Waits; whether it was cancelled meanwhile.
fn pause(length: Duration, cancel: &AtomicBool) -> bool {
    let until = Instant::now() + length;
    while Instant::now() < until {
        if cancel.load(Ordering::Relaxed) {
            return true;
        }
        thread::sleep(TICK);
    }
    false
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
