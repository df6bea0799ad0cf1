//! `vmshadow migrate --dry-run`

use anyhow::bail;
use indicatif::HumanBytes;
use migrate::connections::Connections;
use migrate::directories::Directories;
use migrate::dry_run::{DryRun, dry_run};
use migrate::outgoing::Request;
use migrate::pages::PAGE_SIZE;

use crate::cli;
use crate::report_file::ReportFile;

/// Says what the move would take, and whether the other host would take the guest.
pub fn run(
    options: &cli::Migrate,
    request: &Request,
    report: Option<ReportFile>,
    connections: &mut dyn Connections,
    directories: &Directories,
) -> anyhow::Result<()> {
    let found = dry_run(directories, request, connections, crate::cancelled()?)?;
    let json = serde_json::to_string_pretty(&found)?;
    if options.json {
        say!("{json}");
    } else {
        say!("{}", describe(&found).trim_end());
    }
    if let Some(mut file) = report {
        file.write(&format!("{json}\n"))?;
    }
    match &found.refused {
        None => Ok(()),
        Some(reason) => bail!("{} would refuse: {reason}", found.destination),
    }
}

fn describe(found: &DryRun) -> String {
    let mut text = String::new();
    for warning in &found.warnings {
        text.push_str(&format!("Warning: {warning}\n"));
    }
    if let Some(predicted) = &found.predicted {
        text.push_str(&format!(
            "{} to {} would take {:.0} s, {} on the wire, and be silent for {:.1} s\n",
            found.domain,
            found.destination,
            predicted.seconds,
            HumanBytes(predicted.bytes),
            predicted.downtime,
        ));
    }
    let memory = &found.memory;
    let page = PAGE_SIZE as f64;
    let sampled = memory.sampled.max(1) as f64;
    let rest = memory.sampled.saturating_sub(memory.empty + memory.same);
    text.push_str(&format!(
        "  memory: {}, {:.0} % of it read: {:.0} % empty, {}the rest comes to {:.2} of its size\n",
        HumanBytes(found.guest_bytes),
        100.0 * (memory.sampled as f64 / memory.pages.max(1) as f64).min(1.0),
        100.0 * memory.empty as f64 / sampled,
        match memory.same {
            0 => String::new(),
            same => format!(
                "{:.0} % as {} has it, ",
                100.0 * same as f64 / sampled,
                found.destination
            ),
        },
        memory.bytes as f64 / (rest.max(1) as f64 * page),
    ));
    if found.shareable > 0 {
        text.push_str(&format!(
            "  {} contents of its trust group are shared there\n",
            found.shareable
        ));
    }
    text.push_str(&format!(
        "  changes: {}/s, {} of them in every second\n",
        HumanBytes((memory.dirty * page) as u64),
        HumanBytes((memory.hot * page) as u64),
    ));
    text.push_str(&format!(
        "  link: {:.0} ms there and back, {:.1} Mbit/s, {}\n",
        found.link.rtt_ms,
        found.link.mbit,
        match found.link.probed_bytes {
            Some(bytes) => format!("measured with {}", HumanBytes(bytes)),
            None => "as was given: it may be slower".into(),
        }
    ));
    text.push_str(&format!(
        "  besides, {:.1} s of silence whatever is left to send, {}\n",
        found.fixed.total().as_secs_f64(),
        if found.fixed_seen {
            "as in earlier moves from here"
        } else {
            "assumed: no guest was moved from here yet"
        }
    ));
    text
}
