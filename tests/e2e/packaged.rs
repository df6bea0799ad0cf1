//! The packages on a host that systemd runs.
//!
//! ```text
//!  this machine
//!  +------------------------------------------------------+
//!  | namespaces of their own: processes, files, network   |
//!  |   systemd, as the first process                      |
//!  |     netproxy.service <-- package, installed twice    |
//!  |       ^           |                                  |
//!  |    clients     a server                              |
//!  +------------------------------------------------------+
//! ```
//!
//! Files are this machine's, with a layer above that is gone afterwards. The testbed's sites have no
//! systemd, which an edge has.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};

/// Makes the layer, and becomes systemd.
const BOOT: &str = r#"
set -e
layer=$1/layer root=$1/root
mkdir "$layer" "$root"
mount --make-rprivate /
mount -t tmpfs layer "$layer"
mkdir "$layer/upper" "$layer/work"
mount -t overlay root -o "lowerdir=/,upperdir=$layer/upper,workdir=$layer/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount --rbind /dev "$root/dev"
for directory in run tmp; do mount -t tmpfs "$directory" "$root/$directory"; done
cp "$2" "$root/run/package.deb"
# No services of this machine.
rm -rf "$root"/etc/systemd/system/*.wants
mkdir "$root/old"
cd "$root"
pivot_root . old
umount -l old
export container=test
exec /lib/systemd/systemd --system --unit=basic.target --show-status=0
"#;

const CONFIGURATION: &str = r#"version = 1
[proxy]
control = "/run/netproxy/netproxy.sock"
state = "/var/lib/netproxy/netproxy.json"
[[guest]]
name = "desktop"
address = "127.0.0.2"
source = "127.0.0.1"
site = "here"
[guest.sites.here]
address = "127.0.0.2"
probe_port = 7000
[[guest.service]]
name = "echo"
listen = ["127.0.0.1:5900"]
port = 7000
site_port = 7000
allow = ["127.0.0.0/8"]
"#;

const INSTALL: &str = "dpkg --install --force-depends /run/package.deb";

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// A host in namespaces. It ends, with all that runs there, when this is dropped.
struct Host {
    unshare: Child,
    /// systemd's process id, out here.
    first: u32,
    _files: tempfile::TempDir,
}

impl Drop for Host {
    fn drop(&mut self) {
        // With it goes the first process, and with that all others.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

impl Host {
    fn start(package: &Path) -> Host {
        let files = tempfile::tempdir().unwrap();
        // Ends with this test, however that ends.
        let unshare = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare"])
            .args(["--pid", "--mount", "--net", "--uts", "--ipc", "--cgroup"])
            .args(["--fork", "--kill-child", "--", "sh", "-c", BOOT, "sh"])
            .args([files.path(), package])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let mut host = Host {
            unshare,
            first: 0,
            _files: files,
        };
        host.wait("started systemd", |host| {
            let ended = host.unshare.try_wait().unwrap();
            assert!(ended.is_none(), "No systemd in namespaces here: {ended:?}");
            let child = fs::read_to_string(&children).unwrap_or_default();
            host.first = child.trim().parse().unwrap_or(0);
            host.first > 0 && host.run("systemctl is-system-running").status.success()
        });
        host
    }

    fn wait(&mut self, what: &str, mut done: impl FnMut(&mut Host) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < deadline, "It has not {what}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn run(&self, command: &str) -> Output {
        let first = self.first.to_string();
        Command::new("nsenter")
            .args(["--target", &first, "--all", "--", "sh", "-c", command])
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// What the command says; it has to work.
    fn told(&self, command: &str) -> String {
        let output = self.run(command);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {text}{errors}");
        text
    }

    /// Does something in its network.
    fn within<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let network = File::open(format!("/proc/{}/ns/net", self.first)).unwrap();
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                setns(network, CloneFlags::CLONE_NEWNET).unwrap();
                act()
            });
            inside.join().unwrap()
        })
    }
}

/// Gives back what comes, over each connection.
fn echo(listener: &TcpListener) {
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        thread::spawn(move || {
            let mut from = stream.try_clone().unwrap();
            // Until the client ends.
            let _ = std::io::copy(&mut from, &mut stream);
        });
    }
}

/// Each client says something, and hears it.
fn all_are_answered(clients: &mut [TcpStream], when: &str) {
    for (number, client) in clients.iter_mut().enumerate() {
        let said = format!("{number}, {when}");
        client.write_all(said.as_bytes()).unwrap();
        let mut heard = vec![0; said.len()];
        client
            .read_exact(&mut heard)
            .unwrap_or_else(|error| panic!("Client {said}: {error}"));
        assert_eq!(String::from_utf8_lossy(&heard), said);
    }
}

/// The package vmshadow.
fn package() -> PathBuf {
    PathBuf::from(std::env::var_os("VMSHADOW_DEB").expect("see `make test`"))
}

#[test]
fn connections_outlive_an_upgrade_of_the_package_under_systemd() {
    let host = Host::start(&testbed::proxy_package(&package()).unwrap());

    // Without a configuration it waits for one.
    host.told(INSTALL);
    host.told("systemd-analyze verify netproxy.service");
    assert!(!host.run("systemctl is-active netproxy").status.success());
    host.told(&format!(
        "mkdir --parents /etc/netproxy && cat > /etc/netproxy/netproxy.toml <<'.'\n{CONFIGURATION}.\n\
         systemctl start netproxy"
    ));
    let connect = || {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match TcpStream::connect("127.0.0.1:5900") {
                Ok(client) => break client,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            thread::sleep(Duration::from_millis(50));
        }
    };
    let mut clients = host.within(|| {
        let listener = TcpListener::bind("127.0.0.2:7000").unwrap();
        thread::spawn(move || echo(&listener));
        let clients: Vec<TcpStream> = (0..20).map(|_| connect()).collect();
        for client in &clients {
            client.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        clients
    });
    all_are_answered(&mut clients, "before");

    let look = "systemctl show --property MainPID,NRestarts,ActiveState netproxy";
    let before = host.told(look);
    assert!(before.contains("ActiveState=active"), "{before}");
    host.told(INSTALL);
    // The new file's program, in the same process.
    let deadline = Instant::now() + PATIENCE;
    let program = "readlink /proc/$(systemctl show --property MainPID --value netproxy)/exe";
    while host.told(program).trim() != "/usr/bin/netproxy" {
        assert!(Instant::now() < deadline, "The old program is still there");
        thread::sleep(Duration::from_millis(100));
    }
    all_are_answered(&mut clients, "after the upgrade");
    assert_eq!(host.told(look), before);

    host.told("systemctl reload netproxy");
    clients.push(host.within(connect));
    all_are_answered(&mut clients, "and read its configuration again");
    assert_eq!(host.told(look), before);

    host.told("dpkg --remove netproxy");
    let said = host.run("ls /run/netproxy; pidof netproxy");
    assert!(!said.status.success(), "It is still there: {said:?}");
}

/// Here nothing is to settle, as this is no Xen host: it does not fail for that.
#[test]
fn open_moves_are_settled_at_the_next_boot_of_a_xen_host() {
    let host = Host::start(&package());
    host.told(INSTALL);
    host.told("systemd-analyze verify vmshadow-settle.service");
    let enabled = host.told("systemctl is-enabled vmshadow-settle");
    assert_eq!(enabled.trim(), "enabled");
    let property = |name: &str| {
        let command = format!("systemctl show --value --property {name} vmshadow-settle");
        host.told(&command).trim().to_owned()
    };
    assert!(property("Before").contains("xendomains.service"));
    let journal = "/var/lib/vmshadow/moves/x.journal";
    host.told(&format!(
        "mkdir --parents $(dirname {journal}) && echo '{{\"record\":\"begin\"}}' > {journal} &&
         systemctl start vmshadow-settle"
    ));
    assert_eq!(property("ConditionResult"), "no");
    assert_eq!(property("ActiveState"), "inactive");
    // An operator's choice outlives an upgrade.
    host.told("systemctl disable vmshadow-settle");
    host.told(INSTALL);
    assert_eq!(property("UnitFileState"), "disabled");
    // Whose guest it is has to be known before the record of it may go.
    let refused = host.run("dpkg --purge vmshadow");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && said.contains("still open"),
        "{said}"
    );
    host.told(&format!("echo '{{\"record\":\"end\"}}' >> {journal}"));
    host.told(
        "dpkg --purge vmshadow && ! test -e /var/lib/vmshadow && ! test -e /var/log/vmshadow",
    );
}
