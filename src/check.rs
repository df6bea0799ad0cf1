//! `vmshadow check`

use std::process::{Command, ExitCode, Stdio};

use migrate::directories::Directories;
use migrate::link::ssh::Remote;
use serde::Serialize;
use xen_sys::ctl::Ctl;

use crate::cli;
use crate::output;
use crate::policy;

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    ok: bool,
    found: String,
}

/// Looks at everything a move needs and prints it. Fails where something is missing.
pub fn run(options: &cli::Check) -> ExitCode {
    let mut findings = host_findings();
    let here = findings.iter().all(|finding| finding.ok);
    if let Some(host) = &options.host {
        findings.push(remote_finding(host, &options.remote));
    }
    let good = findings.iter().all(|finding| finding.ok);
    if options.json {
        match serde_json::to_string_pretty(&findings) {
            Ok(text) => say!("{text}"),
            Err(error) => tell!("vmshadow: {error}"),
        }
    } else {
        for finding in &findings {
            say!(
                "{:4} {:22} {}",
                if finding.ok { "ok" } else { "FAIL" },
                finding.what,
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
    findings.push(Finding {
        what: "privileges",
        ok: root,
        found: if root {
            "root".into()
        } else {
            "not root: run it as root".into()
        },
    });
    if let Some(problem) = xen_sys::host::probe().missing {
        findings.push(Finding {
            what: "Xen",
            ok: false,
            found: migrate::error::chain(&problem),
        });
    }
    if findings.iter().all(|finding| finding.ok) {
        findings.extend(hypervisor_findings());
    }
    let directories = Directories::default().create();
    findings.push(Finding {
        what: "directories",
        ok: directories.is_ok(),
        found: match directories {
            Ok(()) => Directories::default().state.display().to_string(),
            Err(error) => migrate::error::chain(&error),
        },
    });
    let policy = policy::read();
    findings.push(Finding {
        what: "configuration",
        ok: policy.is_ok(),
        found: match &policy {
            Ok(_) => policy::PATH.into(),
            Err(error) => format!("{error:#}"),
        },
    });
    let groups = policy.iter().flat_map(|policy| &policy.groups);
    findings.extend(groups.map(|group| {
        let opened = group.open();
        Finding {
            what: "trust group",
            ok: opened.is_ok(),
            found: match opened {
                Ok(_) => format!("{}: {}", group.name, group.guests.join(", ")),
                Err(error) => migrate::error::chain(&error),
            },
        }
    }));
    let ssh = Command::new("ssh").arg("-V").stdin(Stdio::null()).output();
    findings.push(Finding {
        what: "ssh",
        ok: ssh.is_ok(),
        found: match ssh {
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => format!("Can't start ssh: {error}"),
        },
    });
    findings
}

fn hypervisor_findings() -> Vec<Finding> {
    let failed = |what, error: xen_sys::Error| {
        vec![Finding {
            what,
            ok: false,
            found: migrate::error::chain(&error),
        }]
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
    vec![
        Finding {
            what: "hypervisor",
            ok: true,
            found: format!("Xen {}.{}{}", version.major, version.minor, version.extra),
        },
        Finding {
            what: "PV guests",
            ok: info.pv || info.hvm,
            found: if info.pv {
                tracking
            } else {
                "none can run here"
            }
            .into(),
        },
        Finding {
            what: "PVH guests",
            // They are no must: a nested host often runs PV guests only.
            ok: true,
            found: match (info.hvm, info.hap) {
                (true, true) => "log-dirty (hardware-assisted paging)",
                (true, false) => "no hardware-assisted paging",
                (false, _) => "none can run here",
            }
            .into(),
        },
        Finding {
            what: "free memory",
            ok: true,
            found: format!(
                "{} MiB",
                info.free_pages.saturating_sub(info.outstanding_pages) >> 8
            ),
        },
    ]
}

fn remote_finding(host: &str, options: &cli::RemoteOptions) -> Finding {
    let answer = Remote::new(&options.ssh, host, &options.remote_command)
        .and_then(|remote| remote.ask(&["check"]));
    Finding {
        what: "other host",
        ok: answer.is_ok(),
        found: match answer {
            Ok(_) => format!("{host} can move guests"),
            Err(error) => format!(
                "{} (run there: vmshadow check)",
                migrate::error::chain(&error)
            ),
        },
    }
}
