//! `vmshadow check`

use std::borrow::Cow;
use std::process::{Command, ExitCode, Stdio};

use migrate::directories::Directories;
use migrate::link::ssh::Remote;
use migrate::wire::Text;
use serde::{Deserialize, Serialize};
use xen_sys::ctl::Ctl;

use crate::cli;
use crate::output;
use crate::policy;

/// One thing that was looked at.
#[derive(Debug, Serialize, Deserialize)]
struct Finding {
    /// The other host that was looked at; none where it was this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host: Option<String>,
    what: Cow<'static, str>,
    ok: bool,
    found: String,
}

impl Finding {
    fn new(what: &'static str, ok: bool, found: impl Into<String>) -> Self {
        Finding {
            host: None,
            what: what.into(),
            ok,
            found: found.into(),
        }
    }
}

/// Looks at everything a move needs and prints it. Fails where something is missing.
pub fn run(options: &cli::Check) -> ExitCode {
    let mut findings = host_findings();
    let here = findings.iter().all(|finding| finding.ok);
    if let Some(host) = &options.host {
        findings.extend(remote_findings(host, &options.remote));
    }
    let good = findings.iter().all(|finding| finding.ok);
    if options.json {
        match serde_json::to_string_pretty(&findings) {
            Ok(text) => say!("{text}"),
            Err(error) => tell!("vmshadow: {error}"),
        }
    } else {
        for finding in &findings {
            let what = match &finding.host {
                Some(host) => format!("{host}: {}", finding.what),
                None => finding.what.to_string(),
            };
            say!(
                "{:4} {what:22} {}",
                if finding.ok { "ok" } else { "FAIL" },
                finding.found
            );
        }
        say!(
            "{}",
            match (here, good) {
                (true, true) => "This host can move guests",
                (true, false) => "This host can move guests, but not to that one",
                (false, _) => "This host can't move guests",
            }
        );
    }
    if good && !output::incomplete() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    }
}

fn host_findings() -> Vec<Finding> {
    let mut findings = Vec::new();
    let root = nix::unistd::geteuid().is_root();
    let user = match root {
        true => "root",
        false => "not root: run it as root",
    };
    findings.push(Finding::new("privileges", root, user));
    if let Some(problem) = xen_sys::host::probe().missing {
        let found = migrate::error::chain(&problem);
        findings.push(Finding::new("Xen", false, found));
    }
    if findings.iter().all(|finding| finding.ok) {
        findings.extend(hypervisor_findings());
    }
    let directories = Directories::default().create();
    findings.push(Finding::new(
        "directories",
        directories.is_ok(),
        match directories {
            Ok(()) => Directories::default().state.display().to_string(),
            Err(error) => migrate::error::chain(&error),
        },
    ));
    let policy = policy::read();
    findings.push(Finding::new(
        "configuration",
        policy.is_ok(),
        match &policy {
            Ok(_) => policy::PATH.into(),
            Err(error) => format!("{error:#}"),
        },
    ));
    let groups = policy.iter().flat_map(|policy| &policy.groups);
    findings.extend(groups.map(|group| {
        let opened = group.open();
        Finding::new(
            "trust group",
            opened.is_ok(),
            match opened {
                Ok(_) => format!("{}: {}", group.name, group.guests.join(", ")),
                Err(error) => migrate::error::chain(&error),
            },
        )
    }));
    let ssh = Command::new("ssh").arg("-V").stdin(Stdio::null()).output();
    findings.push(Finding::new(
        "ssh",
        ssh.is_ok(),
        match ssh {
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => format!("Can't start ssh: {error}"),
        },
    ));
    findings
}

fn hypervisor_findings() -> Vec<Finding> {
    let failed = |what, error: xen_sys::Error| {
        vec![Finding::new(what, false, migrate::error::chain(&error))]
    };
    let ctl = match Ctl::open() {
        Ok(ctl) => ctl,
        Err(error) => return failed("hypervisor", error),
    };
    let version = match ctl.version() {
        Ok(version) => version,
        Err(error) => return failed("hypervisor", error),
    };
    let info = match ctl.physical_info() {
        Ok(info) => info,
        Err(error) => return failed("hypervisor", error),
    };
    let tracking = if info.shadow {
        "log-dirty (the hypervisor has shadow paging)"
    } else {
        "scan (the hypervisor has no shadow paging: every page is digested each round)"
    };
    let version = format!("Xen {}.{}{}", version.major, version.minor, version.extra);
    let pvh = match (info.hvm, info.hap) {
        (true, true) => "log-dirty (hardware-assisted paging)",
        (true, false) => "no hardware-assisted paging",
        (false, _) => "none can run here",
    };
    let free = info.free_pages.saturating_sub(info.outstanding_pages) >> 8;
    vec![
        Finding::new("hypervisor", true, version),
        Finding::new(
            "PV guests",
            info.pv || info.hvm,
            match info.pv {
                true => tracking,
                false => "none can run here",
            },
        ),
        // They are no must: a nested host often runs PV guests only.
        Finding::new("PVH guests", true, pvh),
        Finding::new("free memory", true, format!("{free} MiB")),
    ]
}

/// What the other host finds of itself. It answers also where something is missing there.
fn remote_findings(host: &str, options: &cli::RemoteOptions) -> Vec<Finding> {
    let answer = Remote::new(&options.ssh, host, &options.remote_command)
        .and_then(|remote| remote.ask_what_may_fail(&["check", "--json"]));
    let failed = |why: String| {
        let found = format!("{why} (run there: vmshadow check)");
        vec![Finding::new("other host", false, found)]
    };
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => return failed(migrate::error::chain(&error)),
    };
    let findings = match serde_json::from_str::<Vec<Finding>>(&answer) {
        Ok(findings) if !findings.is_empty() => findings,
        _ => {
            let begin = answer.lines().next().unwrap_or_default();
            let begin = Text::new(begin);
            return failed(format!("{host} gives no answer that can be read: {begin}"));
        }
    };
    let ready = findings.iter().all(|finding| finding.ok);
    let found = match ready {
        true => format!("{host} can move guests"),
        false => format!("{host} can't move guests yet"),
    };
    let mut all = vec![Finding::new("other host", ready, found)];
    // The other host's words: made fit to be shown.
    all.extend(findings.into_iter().map(|finding| Finding {
        host: Some(host.to_owned()),
        what: Text::new(&finding.what).to_string().into(),
        ok: finding.ok,
        found: Text::new(&finding.found).to_string(),
    }));
    all
}
