//! How full a real link gets by connections that go from worker to worker, with packets lost and
//! without: the first round's time against its bytes over the link's rate.
//!
//! ```text
//!   near                                              far
//!     the source -- TCP: all but pages ================ the destination
//!                -- TCP, TLS: pages, as many as auto == the door of a move
//! ```

use std::fs;
use std::mem;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use migrate::directories::Directories;
use migrate::link::direct::{self, Direct, DirectPolicy, Ends, Identity};
use migrate::link::door::Door;
use migrate::link::{Link, direct_connections_for, direct_window_for};
use migrate::wire::{DirectOffer, MoveId};
use wires::{Hosts, Wire};

use crate::Result;
use crate::subject::{Subject, generated, incompressible};
use crate::wire::{beside_ideal, first_round};

/// Packets lost of a thousand, where some are.
pub const LOST: u32 = 5;

/// At so many Mbit/s packets are jumbo frames: a hundred thousand others a second are more than these
/// wires, which are threads of this machine, carry beside the engine.
const FAST: u64 = 1000;
const JUMBO: u32 = 9000;

const NEAR: &str = "10.99.0.1";
pub const FAR: &str = "10.99.0.2";

/// What Linux gives a connection to receive in by itself, whatever this machine's is: 6 MiB at the
/// most, half of it for bytes.
const RECEIVED_IN: &str = "4096 131072 6291456";

/// How long a connection may take to be there.
const PATIENCE: Duration = Duration::from_secs(30);

pub fn run() -> Result<()> {
    println!("\n## Links: the first round over real TCP connections\n");
    println!("| MiB | Mbit/s | RTT, ms | lost | by | MB | s | over bytes / rate |");
    println!("|---|---|---|---|---|---|---|---|");
    for (mbit, mib) in [(10, 64), (50, 256), (100, 512)] {
        // Until connections are as fast as a long link, seconds pass: more is sent.
        for (rtt, times) in [(10, 1), (40, 1), (200, 4)] {
            let subject = generated(mib * times, 0);
            row(&subject, mbit, rtt, 0, "cubic")?;
            row(&subject, mbit, rtt, LOST, "bbr")?;
            // With more to send it takes minutes.
            if mbit == 10 && rtt < 200 {
                row(&subject, mbit, rtt, LOST, "cubic")?;
            }
        }
    }
    // Two cores are both hosts and the wire here: with something to compress it would be these that
    // are measured.
    for (rtt, mib) in [(10, 2048), (40, 2048), (200, 4096)] {
        let subject = incompressible(mib);
        row(&subject, FAST, rtt, 0, "cubic")?;
        row(&subject, FAST, rtt, LOST, "bbr")?;
    }
    Ok(())
}

fn row(subject: &Subject, mbit: u64, rtt: u64, lost: u32, congestion: &'static str) -> Result<()> {
    let hosts = hosts(mbit, rtt, lost)?;
    let first = connect(&hosts)?;
    let root = tempfile::tempdir()?;
    let mut directly = connect_directly(&hosts, root.path(), rtt, congestion)?;
    let data = mem::take(&mut directly.links);
    let count = data.0.len();
    let round = first_round(subject, first, data)?;
    println!(
        "| {} | {mbit} | {rtt} | {} % | {count} {congestion} | {} |",
        subject.mib(),
        f64::from(lost) / 10.0,
        beside_ideal(&round, mbit * 125_000)
    );
    Ok(())
}

/// Two hosts, and a wire between them.
pub fn hosts(mbit: u64, rtt: u64, lost: u32) -> Result<Hosts> {
    let wire = Wire {
        rate: (mbit * 125_000).into(),
        delay_us: (rtt * 500).into(),
        loss: lost.into(),
        ..Wire::default()
    };
    let hosts = Hosts::new(&["near", "far"]);
    hosts.connect(("near", "wire0"), ("far", "wire0"), &Arc::new(wire));
    for (host, address) in [("near", NEAR), ("far", FAR)] {
        hosts.ip(host, &format!("address add {address}/24 dev wire0"));
        if mbit == FAST {
            hosts.ip(host, &format!("link set wire0 mtu {JUMBO}"));
        }
        hosts.inside(host, || {
            fs::write("/proc/sys/net/ipv4/tcp_rmem", RECEIVED_IN)
        })?;
    }
    Ok(hosts)
}

/// What carries all but pages: both ends.
fn connect(hosts: &Hosts) -> Result<(Link, Link)> {
    let link = |stream: TcpStream| -> Result<Link> {
        stream.set_nodelay(true)?;
        Ok(Link::new(stream.try_clone()?, stream))
    };
    let listener = hosts.inside("far", || TcpListener::bind((FAR, 7000)))?;
    let here = hosts.inside("near", || TcpStream::connect((FAR, 7000)))?;
    let (there, _) = listener.accept()?;
    Ok((link(here)?, link(there)?))
}

/// Direct connections, and what they end with.
struct Directly {
    /// The source's ends, and the destination's.
    links: (Vec<Link>, Vec<Link>),
    _kept: Vec<Direct>,
    _door: Door,
}

/// As many direct connections as a move takes by itself.
fn connect_directly(
    hosts: &Hosts,
    root: &Path,
    rtt: u64,
    congestion: &'static str,
) -> Result<Directly> {
    let round_trip = Duration::from_millis(rtt);
    let count = direct_connections_for(None, round_trip);
    let window = direct_window_for(None, round_trip, count);
    let identity = Identity::new()?;
    let key = identity.public();
    let offered = DirectOffer {
        key,
        connections: count as u32,
        window,
    };
    let ends = Ends {
        from: NEAR.parse()?,
        to: FAR.parse()?,
    };
    let move_id = MoveId::from_random([7; 16]);
    let (mut door, come) = Door::open(&Directories::under(root), move_id)?;
    let (door, listening) = hosts.inside("far", move || {
        let listening = door.listen(&DirectPolicy::default(), ends, &offered);
        (door, listening)
    });
    let listening = listening?;
    let near = hosts.inside("near", move || {
        let congestion = Some(congestion);
        direct::connect(&identity, ends, &listening, count, window, congestion)
    });
    let near = near
        .into_iter()
        .collect::<migrate::error::Result<Vec<_>>>()?;
    let (near, kept): (Vec<_>, Vec<_>) = near.into_iter().unzip();
    let far = (0..near.len()).map(|_| Ok(come.recv_timeout(PATIENCE)?));
    let far = far.collect::<Result<_>>()?;
    Ok(Directly {
        links: (near, far),
        _kept: kept,
        _door: door,
    })
}
