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
//! hub's port is open. The relays are those of `wires`.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use netproxy::site::{Forward, Neighbour, Translation};
pub use wires::run;
use wires::{Hosts, PREFIX, Wire};

pub const SITES: [(&str, &str); 2] = [("a", "198.51.100.1"), ("b", "203.0.113.1")];
pub const EDGE: &str = "192.0.2.1";
pub const GUEST: &str = "10.7.0.5";
/// The port of the sites that accepts connections, as ssh would.
pub const PROBE_PORT: u16 = 7;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

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

pub struct World {
    hosts: Hosts,
    pub wires: [Arc<Wire>; 2],
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    _turn: MutexGuard<'static, ()>,
}

impl World {
    pub fn new(rtt: Duration) -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let mut world = Self {
            hosts: Hosts::new(&["client", "edge", "a", "b", "lan", "guest"]),
            wires: [Arc::default(), Arc::default()],
            stop: Arc::default(),
            threads: Vec::new(),
            _turn: turn,
        };
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
            let (edge_device, net) = (format!("to-{site}"), index + 1);
            world
                .hosts
                .connect(("edge", &edge_device), (site, "up0"), &wire);
            world.ip(
                "edge",
                &format!("address add 10.2.{net}.1/24 dev {edge_device}"),
            );
            world.ip(site, &format!("address add 10.2.{net}.2/24 dev up0"));
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
        self.hosts.namespace(name)
    }

    pub fn ip(&self, name: &str, line: &str) {
        self.hosts.ip(name, line);
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
        self.hosts.spawn(name, what)
    }

    pub fn in_namespace<T: Send + 'static>(
        &self,
        name: &str,
        what: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        self.hosts.inside(name, what)
    }

    /// Sets a sysctl of a namespace: a path below /proc/sys/net/ipv4.
    pub fn sysctl(&self, name: &str, key: &'static str, value: &'static str) {
        self.in_namespace(name, move || {
            std::fs::write(format!("/proc/sys/net/ipv4/{key}"), value).unwrap();
        });
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
    }
}
