//! How full a real TCP connection gets, with packets lost and without: the first round's time against
//! its bytes over the link's rate.
//!
//! ```text
//!   source -- TCP -- near0 (TUN) == queue, rate, loss, delay == far0 (TUN) -- TCP -- destination
//! ```
//!
//! The ends are in network namespaces of their own. The wire between them is two threads for each
//! direction, for kernels without netem.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use migrate::guest::replay::generated::Random;
use migrate::link::Link;
use nix::sched::{CloneFlags, setns};
use rustix::net::sockopt::set_tcp_congestion;
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::subject::{Subject, generated};
use crate::wire::{beside_ideal, first_round};
use crate::{Result, io};

/// How long a packet may wait for the wire before it is lost: a router's queue.
const QUEUE: Duration = Duration::from_millis(200);

/// Packets lost of a thousand, where some are.
const LOST: u64 = 5;

/// Of the namespaces' names.
const PREFIX: &str = "vmsbench";

const ADDRESSES: [&str; 2] = ["10.99.0.1", "10.99.0.2"];

pub fn run() -> Result<()> {
    println!("\n## Links: the first round over real TCP connections\n");
    println!("| MiB | Mbit/s | RTT, ms | lost | by | MB | s | over bytes / rate |");
    println!("|---|---|---|---|---|---|---|---|");
    let (cubic, bbr) = (Way::one("cubic"), Way::one("bbr"));
    for (mbit, mib) in [(10, 64), (50, 256), (100, 512)] {
        let subject = generated(mib, 0);
        for rtt in [10, 40] {
            row(&subject, mbit, rtt, 0, cubic)?;
            row(&subject, mbit, rtt, LOST, bbr)?;
            // With more to send it takes minutes.
            if mbit == 10 {
                row(&subject, mbit, rtt, LOST, cubic)?;
            }
        }
        // Until a connection is as fast as such a link, seconds pass: more is sent.
        let subject = generated(mib * 2, 0);
        for connections in [1, 4] {
            for (lost, way) in [(0, cubic), (LOST, bbr)] {
                row(&subject, mbit, 200, lost, Way { connections, ..way })?;
            }
        }
    }
    Ok(())
}

/// How pages cross.
#[derive(Clone, Copy)]
struct Way {
    congestion: &'static str,
    /// For pages. Where there is more than one, another one carries all else.
    connections: usize,
}

impl Way {
    const fn one(congestion: &'static str) -> Way {
        Way {
            congestion,
            connections: 1,
        }
    }
}

fn row(subject: &Subject, mbit: u64, rtt: u64, lost: u64, way: Way) -> Result<()> {
    let rate = mbit * 125_000;
    let wire = Wire {
        rate,
        latency: Duration::from_micros(rtt * 500),
        lost,
    };
    let world = World::new(wire)?;
    let (here, there) = world.connect(way.congestion)?;
    let mut data = (Vec::new(), Vec::new());
    if way.connections > 1 {
        for _ in 0..way.connections {
            let (here, there) = world.connect(way.congestion)?;
            data.0.push(link(here)?);
            data.1.push(link(there)?);
        }
    }
    let round = first_round(subject, (link(here)?, link(there)?), data)?;
    println!(
        "| {} | {mbit} | {rtt} | {} % | {} {} | {} |",
        subject.mib(),
        lost as f64 / 10.0,
        way.connections,
        way.congestion,
        beside_ideal(&round, rate)
    );
    Ok(())
}

fn link(stream: TcpStream) -> Result<Link> {
    stream.set_nodelay(true)?;
    Ok(Link {
        reader: Box::new(stream.try_clone()?),
        writer: Box::new(stream),
    })
}

/// One direction.
#[derive(Clone, Copy)]
struct Wire {
    /// Bytes of packets a second.
    rate: u64,
    latency: Duration,
    /// Packets lost of a thousand.
    lost: u64,
}

/// Two namespaces and the wire between them. Gone when dropped.
struct World {
    names: [String; 2],
}

impl World {
    fn new(wire: Wire) -> Result<World> {
        remove_stale();
        let names = ["near", "far"].map(|end| format!("{PREFIX}{}-{end}", std::process::id()));
        let world = World { names };
        let mut devices = Vec::new();
        for (name, address) in world.names.iter().zip(ADDRESSES) {
            ip(&format!("netns add {name}"))?;
            let device = in_namespace(name, || {
                let builder = DeviceBuilder::new().name("wire0").mtu(1500);
                builder.build_sync()
            })??;
            ip(&format!("-n {name} address add {address}/24 dev wire0"))?;
            ip(&format!("-n {name} link set wire0 txqueuelen 10000 up"))?;
            devices.push(Arc::new(device));
        }
        if let [near, far] = devices.as_slice() {
            carry(near, far, wire);
            carry(far, near, wire);
        }
        Ok(world)
    }

    /// A connection through it: both ends, each by that congestion control.
    fn connect(&self, congestion: &str) -> Result<(TcpStream, TcpStream)> {
        let [near, far] = &self.names;
        let listener = in_namespace(far, || TcpListener::bind((ADDRESSES[1], 7000)))??;
        let here = in_namespace(near, || TcpStream::connect((ADDRESSES[1], 7000)))??;
        let (there, _) = listener.accept()?;
        for stream in [&here, &there] {
            set_tcp_congestion(stream, congestion)?;
        }
        Ok((here, there))
    }
}

/// Removes the namespaces of runs that were killed.
fn remove_stale() {
    let names = std::fs::read_dir("/run/netns").into_iter().flatten();
    let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    for name in names {
        let ended = name.strip_prefix(PREFIX).is_some_and(|rest| {
            let id = rest.split('-').next().unwrap_or_default();
            !Path::new("/proc").join(id).exists()
        });
        if ended && let Err(error) = ip(&format!("netns del {name}")) {
            eprintln!("{error}");
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for name in &self.names {
            // What ends with an error leaves it to the next run to say so.
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

fn ip(line: &str) -> Result<()> {
    let output = Command::new("ip").args(line.split(' ')).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("ip {line}: {said}")).into());
    }
    Ok(())
}

/// Does something inside a namespace. What it opens stays there.
fn in_namespace<T: Send>(name: &str, what: impl FnOnce() -> T + Send) -> Result<T> {
    let file = File::open(format!("/run/netns/{name}"))?;
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(file, CloneFlags::CLONE_NEWNET)?;
            Ok::<_, nix::Error>(what())
        });
        let done = inside
            .join()
            .map_err(|_| io::Error::other("A thread ended by a panic"))?;
        Ok(done?)
    })
}

/// Carries packets one way, until the devices are gone.
fn carry(from: &Arc<SyncDevice>, to: &Arc<SyncDevice>, wire: Wire) {
    let (from, to) = (Arc::clone(from), Arc::clone(to));
    let (sender, packets) = channel::<(Instant, Vec<u8>)>();
    let mut dice = Random::new(7);
    thread::spawn(move || {
        let mut packet = vec![0; 2048];
        let mut free = Instant::now();
        while let Ok(length) = from.recv(&mut packet) {
            let now = Instant::now();
            // It is lost behind the queue, as on a line.
            let waits = free.saturating_duration_since(now);
            if waits > QUEUE {
                continue;
            }
            free = free.max(now) + Duration::from_secs_f64(length as f64 / wire.rate as f64);
            if dice.next() % 1000 < wire.lost {
                continue;
            }
            let arrives = free + wire.latency;
            if sender.send((arrives, packet[..length].to_vec())).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        while let Ok((arrives, packet)) = packets.recv() {
            thread::sleep(arrives.saturating_duration_since(Instant::now()));
            // What a device has no room for is lost.
            let _ = to.send(&packet);
        }
    });
}
