//! How full a real TCP connection gets, with packets lost and without: the first round's time against
//! its bytes over the link's rate.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use migrate::link::Link;
use rustix::net::sockopt::set_tcp_congestion;
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
        for (connections, times) in [(1, 2), (4, 4)] {
            let subject = generated(mib * times, 0);
            row(&subject, mbit, 200, 0, cubic.shared(connections))?;
            row(&subject, mbit, 200, LOST, bbr.shared(connections))?;
        }
    }
    // More than the kernel lets one connection have on its way. Two cores are both hosts and the wire
    // here: with something to compress it would be these that are measured.
    for (rtt, mib, connections) in [(10, 2048, 1), (40, 2048, 4), (200, 4096, 16)] {
        let subject = incompressible(mib);
        row(&subject, FAST, rtt, 0, cubic.shared(connections))?;
        row(&subject, FAST, rtt, LOST, bbr.shared(connections))?;
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

    const fn shared(self, connections: usize) -> Way {
        Way {
            connections,
            ..self
        }
    }
}

fn row(subject: &Subject, mbit: u64, rtt: u64, lost: u32, way: Way) -> Result<()> {
    let rate = mbit * 125_000;
    let hosts = hosts(mbit, rtt, lost);
    let (here, there) = connect(&hosts, way.congestion)?;
    let mut data = (Vec::new(), Vec::new());
    if way.connections > 1 {
        for _ in 0..way.connections {
            let (here, there) = connect(&hosts, way.congestion)?;
            data.0.push(link(here)?);
            data.1.push(link(there)?);
        }
    }
    let round = first_round(subject, (link(here)?, link(there)?), data)?;
    println!(
        "| {} | {mbit} | {rtt} | {} % | {} {} | {} |",
        subject.mib(),
        f64::from(lost) / 10.0,
        way.connections,
        way.congestion,
        beside_ideal(&round, rate)
    );
    Ok(())
}

/// Two hosts, and a wire between them.
pub fn hosts(mbit: u64, rtt: u64, lost: u32) -> Hosts {
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
    }
    hosts
}

fn link(stream: TcpStream) -> Result<Link> {
    stream.set_nodelay(true)?;
    Ok(Link::new(stream.try_clone()?, stream))
}

/// A connection between the hosts: both ends, each by that congestion control.
fn connect(hosts: &Hosts, congestion: &str) -> Result<(TcpStream, TcpStream)> {
    let listener = hosts.inside("far", || TcpListener::bind((FAR, 7000)))?;
    let here = hosts.inside("near", || TcpStream::connect((FAR, 7000)))?;
    let (there, _) = listener.accept()?;
    for stream in [&here, &there] {
        set_tcp_congestion(stream, congestion)?;
    }
    Ok((here, there))
}
