//! Hosts on this machine and the wires between them, for tests and benchmarks. They need root.
//!
//! ```text
//!   host (network namespace)                                      host
//!     TUN device ──▶ queue, rate ──▶ loss, cut ──▶ delay ──▶ TUN device      and back
//! ```
//!
//! A wire is a pair of TUN devices and two threads for each direction, for kernels without netem.
//! What goes wrong here is a panic: no test can go on without its hosts.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use tun_rs::{DeviceBuilder, SyncDevice};

/// Of the namespaces' names.
pub const PREFIX: &str = "npx";

/// How long a packet may wait for a wire with a rate before it is lost: a router's queue.
const QUEUE: Duration = Duration::from_millis(200);

/// The most packets on their way in one direction.
const ON_THE_WAY: usize = 20_000;

/// Runs a program, and returns what it printed.
///
/// # Panics
/// When it fails.
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

/// Removes the namespaces of runs that were killed.
fn remove_stale() {
    let names = std::fs::read_dir("/run/netns").into_iter().flatten();
    for name in names.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
        let ended = name.strip_prefix(PREFIX).is_some_and(|rest| {
            let id = rest.split('-').next().unwrap_or_default();
            !Path::new("/proc").join(id).exists()
        });
        if ended {
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
}

/// Some hosts: network namespaces, which are gone when this is dropped.
#[derive(Debug)]
pub struct Hosts {
    tag: String,
    names: Vec<String>,
}

impl Hosts {
    /// Hosts of these names.
    ///
    /// # Panics
    /// Without root, and when one can't be made.
    #[must_use]
    pub fn new(names: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        assert!(
            nix::unistd::geteuid().is_root(),
            "What uses network namespaces needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN): run it as \
             root, or leave it out with `cargo test --lib`"
        );
        remove_stale();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let mut hosts = Hosts {
            tag: format!("{PREFIX}{}-{count}", std::process::id()),
            names: Vec::new(),
        };
        for name in names {
            let namespace = hosts.namespace(name);
            ip(&format!("netns add {namespace}"));
            hosts.names.push(namespace);
            hosts.ip(name, "link set lo up");
        }
        hosts
    }

    /// The namespace of a host.
    #[must_use]
    pub fn namespace(&self, name: &str) -> String {
        format!("{}-{name}", self.tag)
    }

    /// Runs `ip` for a host.
    ///
    /// # Panics
    /// When it fails.
    pub fn ip(&self, name: &str, line: &str) {
        ip(&format!("-n {} {line}", self.namespace(name)));
    }

    /// Runs something on a thread inside a host. What it opens and spawns is inside too.
    ///
    /// # Panics
    /// When there is no such host.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        what: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let path = format!("/run/netns/{}", self.namespace(name));
        std::thread::Builder::new()
            .stack_size(256 * 1024)
            .spawn(move || {
                let file = File::open(path).unwrap();
                setns(file, CloneFlags::CLONE_NEWNET).unwrap();
                what()
            })
            .unwrap()
    }

    /// Does something inside a host, and returns what came of it.
    ///
    /// # Panics
    /// When that does.
    pub fn inside<T: Send + 'static>(
        &self,
        name: &str,
        what: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        self.spawn(name, what).join().unwrap()
    }

    /// Lays a wire between the devices of two hosts, which it makes, and brings up. Its threads end
    /// when the hosts are gone.
    ///
    /// # Panics
    /// When a device can't be made.
    pub fn connect(&self, one: (&str, &str), two: (&str, &str), wire: &Arc<Wire>) {
        let device = |(host, name): (&str, &str)| {
            let device = name.to_owned();
            let builder = move || DeviceBuilder::new().name(device).mtu(1500).build_sync();
            let device = Arc::new(self.inside(host, builder).unwrap());
            // A thousand connections at once fill the queue that a TUN device has by default.
            self.ip(host, &format!("link set {name} txqueuelen 10000 up"));
            device
        };
        let (one, two) = (device(one), device(two));
        carry(&one, &two, wire);
        carry(&two, &one, wire);
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

/// What a wire is like, each way. It may change while packets cross. The default has no limits.
#[derive(Debug, Default)]
pub struct Wire {
    /// Microseconds from one end to the other.
    pub delay_us: AtomicU64,
    /// Bytes of packets a second; 0: no limit.
    pub rate: AtomicU64,
    /// Whether everything is lost.
    pub cut: AtomicBool,
    /// Packets lost of a thousand.
    pub loss: AtomicU32,
    /// Packets that arrived, both ways.
    pub passed: AtomicU64,
}

impl Wire {
    /// How long a packet of so many bytes is on a wire that is free, or will be.
    fn takes(&self, bytes: usize) -> Option<Duration> {
        let rate = self.rate.load(Ordering::Relaxed);
        (rate > 0).then(|| Duration::from_secs_f64(bytes as f64 / rate as f64))
    }
}

/// Carries packets one way.
fn carry(from: &Arc<SyncDevice>, to: &Arc<SyncDevice>, wire: &Arc<Wire>) {
    let (from, to) = (Arc::clone(from), Arc::clone(to));
    let (sender, packets) = sync_channel::<(Instant, Vec<u8>)>(ON_THE_WAY);
    let (near, far) = (Arc::clone(wire), Arc::clone(wire));
    std::thread::spawn(move || {
        let mut dice: u32 = 12345;
        let mut free = Instant::now();
        each_packet(&from, |packet| {
            let mut sent = Instant::now();
            if let Some(takes) = near.takes(packet.len()) {
                if free.saturating_duration_since(sent) > QUEUE {
                    return;
                }
                free = free.max(sent) + takes;
                sent = free;
            }
            dice = dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let lost = (dice >> 16) % 1000 < near.loss.load(Ordering::Relaxed);
            if lost || near.cut.load(Ordering::Relaxed) {
                return;
            }
            let delay = Duration::from_micros(near.delay_us.load(Ordering::Relaxed));
            // More than a wire holds is lost.
            let _ = sender.try_send((sent + delay, packet.to_vec()));
        });
    });
    std::thread::spawn(move || {
        while let Ok((arrives, packet)) = packets.recv() {
            let wait = arrives.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                std::thread::sleep(wait);
            }
            if to.send(&packet).is_ok() {
                far.passed.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
}

/// Calls `take` with each packet that a device sends, until the device is gone.
///
/// While packets come, this thread polls. To be woken for each of them would cost the sender as much
/// as the packet does, and on a real link a sender wakes nobody.
fn each_packet(device: &SyncDevice, mut take: impl FnMut(&[u8])) {
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
