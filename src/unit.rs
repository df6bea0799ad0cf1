//! The systemd unit that a command runs in, if it does.
//!
//! When a unit ends, systemd by default ends all that it has started, those among them that are to
//! outlive a move: the guardian, which goes on asking, and the keeper.

use std::fs;
use std::process::{Command, Stdio};

/// What to say where a move in this unit would lose its guardian and its keeper; nothing elsewhere.
pub fn warning() -> Option<String> {
    // systemd sets it for what it starts.
    std::env::var_os("INVOCATION_ID")?;
    let cgroup = fs::read_to_string("/proc/self/cgroup").ok()?;
    let unit = service(&cgroup)?;
    let output = Command::new("systemctl")
        .args(["show", "--property=KillMode", "--value", unit])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let mode = String::from_utf8_lossy(&output.stdout);
    ends_all(mode.trim()).then(|| {
        format!(
            "When {unit} ends, systemd ends what watches the guest as well: it needs KillMode=process, \
             see the guide"
        )
    })
}

/// The system's service that a process is in, by its file `cgroup` in /proc. A login has a scope of
/// its own.
fn service(cgroup: &str) -> Option<&str> {
    let path = cgroup
        .lines()
        .find_map(|line| line.strip_prefix("0::/system.slice/"))?;
    let unit = path.rsplit('/').next()?;
    unit.ends_with(".service").then_some(unit)
}

fn ends_all(kill_mode: &str) -> bool {
    matches!(kill_mode, "control-group" | "mixed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_service_of_the_system_is_one() {
        let path = "0::/system.slice/move-g1.service\n";
        assert_eq!(service(path), Some("move-g1.service"));
        let below = "1:name=x:/y\n0::/system.slice/system-move.slice/move@g1.service\n";
        assert_eq!(service(below), Some("move@g1.service"));
        for other in [
            "0::/user.slice/user-0.slice/session-3.scope\n",
            "0::/user.slice/user-0.slice/user@0.service/app.slice/x.service\n",
            "0::/system.slice/docker-1.scope\n",
            "0::/\n",
            "",
        ] {
            assert_eq!(service(other), None, "{other}");
        }
        assert!(ends_all("control-group") && !ends_all("process") && !ends_all(""));
    }
}
