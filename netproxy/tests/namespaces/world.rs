//! A small world of network namespaces: a client, the edge, two sites, and a guest that can be
//! at one or the other.
//!
//! ```text
//! client ──veth── edge ══TUN relay, delay══ a ──veth──┐
//! 10.1.0.2        192.0.2.1   198.51.100.1            lan (a hub) ── guest 10.7.0.5
//!                      ╚════TUN relay, delay══ b ─veth┘
//!                                203.0.113.1
//! ```
//!
//! The sites have the same gateway address and MAC towards the guest. The guest "is" where the
//! hub's port is open. The relay is a pair of TUN devices and two threads, for kernels without
//! netem.

use std::fs::File;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netproxy::site::{Forward, Neighbour, Translation};

const PREFIX: &str = "npx";
pub const SITES: [(&str, &str); 2] = [("a", "198.51.100.1"), ("b", "203.0.113.1")];
pub const EDGE: &str = "192.0.2.1";
pub const GUEST: &str = "10.7.0.5";
/// The port of the sites that accepts connections, as ssh would.
pub const PROBE_PORT: u16 = 7;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn ip(line: &str) {
    run("ip", &line.split(' ').collect::<Vec<_>>());
}

/// These tests can't do anything without privileges, and say so instead of passing.
fn require_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "The tests in network namespaces need root (CAP_SYS_ADMIN and CAP_NET_ADMIN): run them \
         as root, or leave them out with `cargo test --lib`"
    );
}

/// Namespaces of test runs that were killed.
fn remove_stale() {
    let Ok(names) = std::fs::read_dir("/run/netns") else {
        return;
    };
    for name in names
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
    {
        let Some(rest) = name.strip_prefix(PREFIX) else {
            continue;
        };
        let pid = rest.split('-').next().unwrap_or_default();
        let own = std::process::id().to_string() == pid;
        if !own && !std::path::Path::new(&format!("/proc/{pid}")).exists() {
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
}

/// Prints all that the kernel knows of the connections, when something went wrong with one.
pub fn show_sockets() {
    for place in ["client", "edge", "guest"] {
        let suffix = format!("-{place}");
        let own = format!("{PREFIX}{}-", std::process::id());
        let names = std::fs::read_dir("/run/netns").into_iter().flatten();
        for name in names.flatten().map(|entry| entry.file_name()) {
            let name = name.to_string_lossy().into_owned();
            if name.starts_with(&own) && name.ends_with(&suffix) {
                let all = ["netns", "exec", &name, "ss", "-tanoeim"];
                eprintln!("{place}:\n{}", run("ip", &all));
            }
        }
    }
}

pub fn translation(site: &str) -> Translation {
    Translation {
        guest: "desktop".into(),
        site_address: site.parse().unwrap(),
        guest_address: GUEST.parse().unwrap(),
        edges: vec![EDGE.parse().unwrap()],
        forwards: vec![Forward {
            site_port: 15900,
            guest_port: 5900,
        }],
    }
}

fn neighbour() -> Neighbour {
    Neighbour {
        address: GUEST.parse().unwrap(),
        mac: [2, 0, 0, 0, 0, 5],
        device: "lan0".into(),
    }
}

/// A connection between edge and site, with delay, and faults when asked for.
#[derive(Default)]
pub struct Wire {
    pub delay_us: AtomicU64,
    pub cut: AtomicBool,
    /// Packets lost of a thousand.
    pub loss: AtomicU32,
    pub passed: AtomicU64,
}

/// Calls `take` with each packet that a device sends, until the device is gone.
///
/// While packets come, this thread polls. To be woken for each of them would cost the sender as much
/// as the packet does, and on a real link a sender wakes nobody.
fn each_packet(device: &tun_rs::SyncDevice, mut take: impl FnMut(&[u8])) {
    const LOOK: Duration = Duration::from_micros(100);
    const QUIET: Duration = Duration::from_millis(20);
    let mut buffer = vec![0; 65_536];
    // After a silence the first packet wakes this thread.
    while device.set_nonblocking(false).is_ok()
        && let Ok(length) = device.recv(&mut buffer)
        && device.set_nonblocking(true).is_ok()
    {
        take(&buffer[..length]);
        let mut last = Instant::now();
        while last.elapsed() < QUIET {
            match device.recv(&mut buffer) {
                Ok(length) => {
                    take(&buffer[..length]);
                    last = Instant::now();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(LOOK),
                Err(_) => return,
            }
        }
    }
}

pub struct World {
    names: Vec<String>,
    tag: String,
    pub wires: [Arc<Wire>; 2],
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    _turn: MutexGuard<'static, ()>,
}

impl World {
    pub fn new(rtt: Duration) -> Self {
        require_root();
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        remove_stale();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let tag = format!(
            "{PREFIX}{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let mut world = Self {
            names: Vec::new(),
            tag,
            wires: [Arc::default(), Arc::default()],
            stop: Arc::default(),
            threads: Vec::new(),
            _turn: turn,
        };
        for name in ["client", "edge", "a", "b", "lan", "guest"] {
            let name = world.ns(name);
            ip(&format!("netns add {name}"));
            world.names.push(name.clone());
            ip(&format!("-n {name} link set lo up"));
        }
        world.veth("client", "c0", "edge", "e0");
        world.ip("client", "address add 10.1.0.2/24 dev c0");
        world.ip("client", "-6 address add fd00:1::2/64 dev c0 nodad");
        world.ip("edge", "address add 10.1.0.1/24 dev e0");
        world.ip("edge", "-6 address add fd00:1::1/64 dev e0 nodad");
        world.ip("edge", &format!("address add {EDGE}/32 dev lo"));
        world.ip("lan", "link add hub type bridge ageing_time 0");
        world.ip("lan", "link set hub up");
        for (index, (site, address)) in SITES.iter().enumerate() {
            let wire = Arc::clone(&world.wires[index]);
            wire.delay_us.store(
                u64::try_from(rtt.as_micros() / 2).unwrap(),
                Ordering::Relaxed,
            );
            world.relay(site, wire);
            let (edge_device, net) = (format!("to-{site}"), index + 1);
            world.ip(
                "edge",
                &format!("address add 10.2.{net}.1/24 dev {edge_device}"),
            );
            // A thousand connections at once fill the queue that a TUN device has by default.
            world.ip(
                "edge",
                &format!("link set {edge_device} txqueuelen 10000 up"),
            );
            world.ip(site, &format!("address add 10.2.{net}.2/24 dev up0"));
            world.ip(site, "link set up0 txqueuelen 10000 up");
            world.ip(site, &format!("address add {address}/32 dev lo"));
            world.ip(site, &format!("route add {EDGE}/32 via 10.2.{net}.1"));
            world.ip(
                "edge",
                &format!("route add {address}/32 via 10.2.{net}.2 src {EDGE}"),
            );
            world.veth(site, "lan0", "lan", &format!("port-{site}"));
            world.ip(site, "link set lan0 down");
            world.ip(site, "link set lan0 address 02:00:00:00:00:01");
            world.ip(site, "link set lan0 up");
            world.ip(site, "address add 10.7.0.1/24 dev lan0");
            world.in_namespace(site, move || {
                std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            });
            world.in_namespace(site, move || {
                let translation = translation(address);
                translation.apply().unwrap();
                assert!(translation.is_applied());
                neighbour().apply().unwrap();
            });
            world.accept_probes(site, address);
        }
        world.veth("guest", "g0", "lan", "port-guest");
        world.ip("lan", "link set port-guest master hub");
        world.ip("guest", "link set g0 down");
        world.ip("guest", "link set g0 address 02:00:00:00:00:05");
        world.ip("guest", "link set g0 up");
        world.ip("guest", &format!("address add {GUEST}/24 dev g0"));
        world.ip("guest", "route add default via 10.7.0.1");
        world.ip(
            "guest",
            "neigh replace 10.7.0.1 lladdr 02:00:00:00:00:01 dev g0 nud permanent",
        );
        world.place(Some("a"));
        world
    }

    pub fn ns(&self, name: &str) -> String {
        format!("{}-{name}", self.tag)
    }

    pub fn ip(&self, name: &str, line: &str) {
        ip(&format!("-n {} {line}", self.ns(name)));
    }

    fn veth(&self, one: &str, one_device: &str, two: &str, two_device: &str) {
        self.ip(
            one,
            &format!(
                "link add {one_device} type veth peer name {two_device} netns {}",
                self.ns(two)
            ),
        );
        self.ip(one, &format!("link set {one_device} up"));
        self.ip(two, &format!("link set {two_device} up"));
    }

    /// Runs something on a thread inside a namespace. What it spawns is inside too.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        what: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let path = format!("/run/netns/{}", self.ns(name));
        std::thread::Builder::new()
            .stack_size(256 * 1024)
            .spawn(move || {
                let file = File::open(path).unwrap();
                nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                what()
            })
            .unwrap()
    }

    pub fn in_namespace<T: Send + 'static>(
        &self,
        name: &str,
        what: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        self.spawn(name, what).join().unwrap()
    }

    /// Sets a sysctl of a namespace: a path below /proc/sys/net/ipv4.
    pub fn sysctl(&self, name: &str, key: &'static str, value: &'static str) {
        self.in_namespace(name, move || {
            std::fs::write(format!("/proc/sys/net/ipv4/{key}"), value).unwrap();
        });
    }

    fn tun(&self, name: &str, device: String) -> Arc<tun_rs::SyncDevice> {
        Arc::new(self.in_namespace(name, move || {
            tun_rs::DeviceBuilder::new()
                .name(device)
                .mtu(1500)
                .build_sync()
                .unwrap()
        }))
    }

    fn relay(&mut self, site: &str, wire: Arc<Wire>) {
        let near = self.tun("edge", format!("to-{site}"));
        let far = self.tun(site, "up0".into());
        for (from, to) in [(&near, &far), (&far, &near)] {
            let (from, to, wire) = (Arc::clone(from), Arc::clone(to), Arc::clone(&wire));
            let (sender, receiver) = std::sync::mpsc::sync_channel::<(Instant, Vec<u8>)>(20_000);
            let delay = Arc::clone(&wire);
            // Ends when the device goes with its namespace.
            self.threads.push(std::thread::spawn(move || {
                let mut dice: u32 = 12345;
                each_packet(&from, |packet| {
                    dice = dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let lost = (dice >> 16) % 1000 < delay.loss.load(Ordering::Relaxed);
                    if lost || delay.cut.load(Ordering::Relaxed) {
                        return;
                    }
                    let wait = Duration::from_micros(delay.delay_us.load(Ordering::Relaxed));
                    // A full queue loses packets, as any link does.
                    let _ = sender.try_send((Instant::now() + wait, packet.to_vec()));
                });
            }));
            self.threads.push(std::thread::spawn(move || {
                while let Ok((due, packet)) = receiver.recv() {
                    let wait = due.saturating_duration_since(Instant::now());
                    if !wait.is_zero() {
                        std::thread::sleep(wait);
                    }
                    if to.send(&packet).is_ok() {
                        wire.passed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }));
        }
    }

    fn accept_probes(&mut self, site: &str, address: &str) {
        let address: IpAddr = address.parse().unwrap();
        let stop = Arc::clone(&self.stop);
        let listener = self.in_namespace(site, move || {
            std::net::TcpListener::bind((address, PROBE_PORT)).unwrap()
        });
        listener.set_nonblocking(true).unwrap();
        self.threads.push(std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let _ = listener.accept();
                std::thread::sleep(Duration::from_millis(5));
            }
        }));
    }

    /// Puts the guest at a site, or between them.
    pub fn place(&self, site: Option<&str>) {
        for (name, _) in SITES {
            if site != Some(name) {
                self.port(name, false);
            }
        }
        if let Some(site) = site {
            self.port(site, true);
        }
    }

    /// Guest and site have to ask for each other's MAC address from now on.
    pub fn forget_neighbours(&self, site: &str) {
        self.in_namespace(site, || neighbour().remove().unwrap());
        self.ip("guest", "neigh flush dev g0 nud all");
    }

    /// Leaves the guest to its own address.
    pub fn remove_translations(&self) {
        for (site, address) in SITES {
            self.in_namespace(site, move || {
                translation(address).remove().unwrap();
                assert!(!translation(address).is_applied());
            });
        }
    }

    /// Routes the guest's own address to a site, as an overlay does.
    pub fn route_guest(&self, site: &str) {
        let net = SITES.iter().position(|(name, _)| *name == site).unwrap() + 1;
        self.ip(
            "edge",
            &format!("route replace {GUEST}/32 via 10.2.{net}.2 src {EDGE}"),
        );
    }

    fn port(&self, site: &str, open: bool) {
        // Not by the port's state: the kernel sets that too, when a carrier comes up.
        let master = if open { "master hub" } else { "nomaster" };
        self.ip("lan", &format!("link set port-{site} {master}"));
    }

    /// The rules and routing rules in a namespace, for comparison.
    pub fn rules(&self, name: &str) -> String {
        self.in_namespace(name, || {
            format!(
                "{}{}{}",
                run("nft", &["list", "ruleset"]),
                run("ip", &["rule"]),
                run("ip", &["-6", "rule"])
            )
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}
