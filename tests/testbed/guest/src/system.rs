//! What init does: file systems, modules, the network, and the way out.

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot as kernel_reboot};
use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::path::Path;
use std::process::{self, Command};
use testbed_guest::{SSH_PORT, VNC_PORT};

/// The fonts that the VNC server can't do without.
const FONTS: &str = "/usr/share/fonts/testbed";

/// The part of the kernel's command line that is ours.
pub struct Settings {
    pub name: String,
    /// Address and prefix length of eth0.
    pub address: String,
    /// Where everything else is reached through; empty if nothing is.
    pub gateway: String,
    /// Commands to run at boot.
    pub run: Vec<String>,
}

impl Settings {
    /// Reads /proc/cmdline.
    pub fn read() -> Result<Self, String> {
        Ok(Self::parse(&read_line("/proc/cmdline")?))
    }

    fn parse(line: &str) -> Self {
        let setting = |name: &str| {
            line.split_whitespace()
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
                .unwrap_or_default()
        };
        Self {
            name: setting("testbed.name").to_owned(),
            address: setting("testbed.address").to_owned(),
            gateway: setting("testbed.gateway").to_owned(),
            run: setting("testbed.run")
                .split(';')
                .filter(|command| !command.is_empty())
                .map(|command| command.replace(',', " "))
                .collect(),
        }
    }
}

/// The first line of a file.
pub fn read_line(path: &str) -> Result<String, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// Mounts what a program expects to find.
pub fn mount_all() -> Result<(), String> {
    for (kind, target) in [
        ("devtmpfs", "/dev"),
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("tmpfs", "/tmp"),
    ] {
        fs::create_dir_all(target).map_err(|error| format!("{target}: {error}"))?;
        mount(
            Some(kind),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )
        .map_err(|error| format!("Can't mount {target}: {error}"))?;
    }
    Ok(())
}

/// Loads the modules of /modules in the order of /modules/order. One that the
/// machine has no use for says so and is left out.
pub fn load_modules() {
    let order = fs::read_to_string("/modules/order").unwrap_or_default();
    for module in order.lines() {
        let file = match fs::File::open(Path::new("/modules").join(module)) {
            Ok(file) => file,
            Err(error) => {
                println!("testbed: {module}: {error}");
                continue;
            }
        };
        if let Err(error) = finit_module(file, &CString::default(), ModuleInitFlags::empty()) {
            println!("testbed: {module}: {error}");
        }
    }
}

/// Gives eth0 its address, once it is there.
pub fn configure_network(settings: &Settings) -> Result<(), String> {
    run("ip link set lo up")?;
    if settings.address.is_empty() {
        return Ok(());
    }
    for _ in 0..200 {
        if Path::new("/sys/class/net/eth0").exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    run(&format!("ip address add {} dev eth0", settings.address))?;
    run("ip link set eth0 up")?;
    match settings.gateway.as_str() {
        "" => Ok(()),
        gateway => run(&format!("ip route add default via {gateway}")),
    }
}

/// Runs a busybox command.
pub fn run(command: &str) -> Result<(), String> {
    let status = Command::new("/bin/busybox")
        .args(command.split_whitespace())
        .status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{command}: {status}")),
        Err(error) => Err(format!("{command}: {error}")),
    }
}

/// Starts the servers of a desktop: VNC and ssh.
pub fn start_desktop() -> Result<(), String> {
    let (vnc, ssh) = (VNC_PORT, SSH_PORT);
    let screen = format!("-geometry 640x480 -depth 24 -fp {FONTS} -ac -rfbport {vnc}");
    serve(&format!("/usr/bin/Xtightvnc :0 {screen}"))?;
    // -R: makes its host key when it is first asked for.
    serve(&format!("/usr/sbin/dropbear -F -E -R -p {ssh}"))
}

/// Starts a program that goes on, and says when it ends.
fn serve(command: &str) -> Result<(), String> {
    let mut words = command.split_whitespace();
    let program = words.next().unwrap_or_default().to_owned();
    let mut child = Command::new(&program)
        .args(words)
        .env("PATH", "/usr/bin:/bin")
        .spawn()
        .map_err(|error| format!("{program}: {error}"))?;
    crate::spawn("server", move || {
        println!("testbed: {program} ended: {:?}", child.wait());
    })
}

/// Brings every vCPU online that the toolstack has given.
pub fn online_vcpus() -> Result<(), String> {
    let path = "/sys/devices/system/cpu";
    let entries = fs::read_dir(path).map_err(|error| format!("{path}: {error}"))?;
    for entry in entries.flatten() {
        let online = entry.path().join("online");
        if fs::read_to_string(&online).is_ok_and(|state| state.trim() == "0") {
            fs::write(&online, "1").map_err(|error| format!("{}: {error}", online.display()))?;
        }
    }
    Ok(())
}

/// Asks the balloon driver for this much memory.
pub fn balloon(mib: u64) -> Result<(), String> {
    let path = "/sys/devices/system/xen_memory/xen_memory0/target_kb";
    fs::write(path, (mib * 1024).to_string()).map_err(|error| format!("{path}: {error}"))
}

/// Crashes the kernel.
pub fn crash() -> Result<(), String> {
    let path = "/proc/sysrq-trigger";
    fs::write(path, "c").map_err(|error| format!("{path}: {error}"))
}

/// Restarts the guest.
pub fn reboot() -> ! {
    leave(RebootMode::RB_AUTOBOOT)
}

/// Ends the guest.
pub fn power_off() -> ! {
    leave(RebootMode::RB_POWER_OFF)
}

fn leave(mode: RebootMode) -> ! {
    nix::unistd::sync();
    let left: nix::Result<Infallible> = kernel_reboot(mode);
    eprintln!("testbed: {left:?}");
    process::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_holds_settings_and_commands() {
        let line = "root=x testbed.name=g1 testbed.address=10.77.0.101/24 \
                    testbed.run=rewrite,8;random,40 console=hvc0";
        let settings = Settings::parse(line);
        assert_eq!(settings.name, "g1");
        assert_eq!(settings.address, "10.77.0.101/24");
        assert_eq!(settings.gateway, "");
        assert_eq!(settings.run, ["rewrite 8", "random 40"]);
        assert!(Settings::parse("quiet").run.is_empty());
    }
}
