//! How long streams stall at a re-target, in network namespaces: from the moment when the guest
//! can be reached at the new site to the first byte of its answer, and to the last pending byte.
//!
//! `cargo bench -p netproxy --bench stall [-- MOVES]`, as root. Clients, edge, sites and guest
//! share this machine's cores, and a thousand answers take their time without any move. So each
//! row is measured twice: at moves, and as an ordinary exchange over the same connections.
#![allow(missing_docs, dead_code, clippy::unwrap_used)]

#[path = "../tests/namespaces/traffic.rs"]
mod traffic;
#[path = "../tests/namespaces/world.rs"]
mod world;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use mio::{Events, Interest, Poll, Token};
use netproxy::Proxy;
use netproxy::config::Config;
use netproxy::control::{Client, Move};
use world::{EDGE, GUEST, PROBE_PORT, SITES, World};

const LISTEN: &str = "10.1.0.1:5900";
const WITHIN: Duration = Duration::from_secs(30);

fn configuration(control: &str) -> Config {
    let mut text = format!(
        "version = 1\n[proxy]\ncontrol = {control:?}\n[[guest]]\nname = \"desktop\"\n\
         address = {GUEST:?}\nsource = {EDGE:?}\nsite = \"a\"\n"
    );
    for (site, address) in SITES {
        text.push_str(&format!(
            "[guest.sites.{site}]\naddress = {address:?}\nprobe_port = {PROBE_PORT}\n"
        ));
    }
    text.push_str(&format!(
        "[[guest.service]]\nname = \"vnc\"\nlisten = [{LISTEN:?}]\nport = 5900\nsite_port = 15900\n"
    ));
    Config::parse(&text, "bench").unwrap()
}

fn connect(world: &World, count: usize) -> Vec<TcpStream> {
    world.in_namespace("client", move || {
        let connect = |_| {
            let mut stream = TcpStream::connect(LISTEN).unwrap();
            stream.set_nodelay(true).unwrap();
            // The number that asks for an echo.
            stream.write_all(&0_u64.to_le_bytes()).unwrap();
            stream.set_nonblocking(true).unwrap();
            stream
        };
        (0..count).map(connect).collect()
    })
}

fn send(streams: &mut [TcpStream], length: usize) {
    let data = vec![7; length];
    for stream in streams {
        stream.write_all(&data).unwrap();
    }
}

/// Reads the answers as they come. Returns when each stream's first byte came, and the last byte
/// of all, in milliseconds from `start`.
fn answers(streams: &[TcpStream], length: usize, start: Instant) -> (Vec<f64>, f64) {
    use std::os::fd::AsRawFd;
    let mut poll = Poll::new().unwrap();
    for (at, stream) in streams.iter().enumerate() {
        let fd = stream.as_raw_fd();
        let mut source = mio::unix::SourceFd(&fd);
        poll.registry()
            .register(&mut source, Token(at), Interest::READABLE)
            .unwrap();
    }
    let mut events = Events::with_capacity(1024);
    let mut left = vec![length; streams.len()];
    let mut first = vec![f64::NAN; streams.len()];
    let mut open = streams.len();
    let mut buffer = vec![0; 65_536];
    while open > 0 {
        poll.poll(&mut events, Some(WITHIN)).unwrap();
        assert!(!events.is_empty(), "{open} streams are stuck");
        let now = start.elapsed().as_secs_f64() * 1e3;
        for event in &events {
            let at = event.token().0;
            loop {
                match (&streams[at]).read(&mut buffer) {
                    Ok(0) => panic!("A stream has ended"),
                    Ok(length) => {
                        if first[at].is_nan() {
                            first[at] = now;
                        }
                        left[at] -= length;
                        if left[at] == 0 {
                            open -= 1;
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }
    let last = start.elapsed().as_secs_f64() * 1e3;
    for stream in streams {
        let fd = stream.as_raw_fd();
        let _ = poll.registry().deregister(&mut mio::unix::SourceFd(&fd));
    }
    first.sort_by(f64::total_cmp);
    (first, last)
}

/// Median of the streams' first bytes, the slowest of them, and all bytes.
#[derive(Default, Clone)]
struct Row {
    median: Vec<f64>,
    slowest: Vec<f64>,
    all: Vec<f64>,
}

impl Row {
    fn add(&mut self, (first, last): (Vec<f64>, f64)) {
        self.median.push(first[first.len() / 2]);
        self.slowest.push(first[first.len() - 1]);
        self.all.push(last);
    }

    /// The median of the runs, and the worst of them.
    fn show(&self) -> String {
        let of = |figures: &[f64]| {
            let mut figures = figures.to_vec();
            figures.sort_by(f64::total_cmp);
            (figures[figures.len() / 2], figures[figures.len() - 1])
        };
        let (median, slowest, all) = (of(&self.median), of(&self.slowest), of(&self.all));
        format!(
            "{:.1} | {:.1} ({:.1}) | {:.1} ({:.1})",
            median.0, slowest.0, slowest.1, all.0, all.1
        )
    }
}

fn main() {
    let mut words = std::env::args().skip(1);
    let moves: usize = words.find_map(|word| word.parse().ok()).unwrap_or(5);
    println!(
        "{moves} moves each, in ms: median of the streams' first bytes | the slowest stream's | \
         all pending bytes; the worst move in brackets. Then the release itself, which is the \
         proxy's own part, and the same exchange without a move.\n"
    );
    println!("| RTT | connections | pending | at a move | | | release | without | | |");
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for rtt in [10, 40, 200] {
        for count in [1, 100, 1000] {
            let world = World::new(Duration::from_millis(rtt));
            traffic::serve(&world, 5900);
            let directory = std::env::temp_dir().join(format!("netproxy-{}", world.ns("stall")));
            let control = directory.join("control");
            let config = configuration(&control.display().to_string());
            let proxy = world.in_namespace("edge", move || Proxy::start(config, None).unwrap());
            let mut streams = connect(&world, count);
            let mut exchange = |length| {
                let start = Instant::now();
                send(&mut streams, length);
                answers(&streams, length, start)
            };
            exchange(1);
            let sizes = [(0, "idle"), (10, "10 B"), (16_384, "16 KiB")];
            let mut at = 0;
            for (size, name) in sizes {
                // An idle stream is asked something when the guest can be reached.
                let length = if size == 0 { 10 } else { size };
                let (mut with, mut without) = (Row::default(), Row::default());
                let mut releases = Vec::new();
                for _ in 0..moves {
                    let start = Instant::now();
                    send(&mut streams, length);
                    without.add(answers(&streams, length, start));
                    std::thread::sleep(Duration::from_millis(300));
                    at = 1 - at;
                    let site = SITES[at].0;
                    let client = Client::connect(&control).unwrap();
                    let (mut go, warmth) = Move::prepare(client, "desktop", site, WITHIN).unwrap();
                    assert!(warmth.warnings.is_empty(), "{warmth:?}");
                    // On its way to the guest, and lost: what the guest itself has lost is its
                    // own to repeat.
                    world.place(None);
                    send(&mut streams, size);
                    std::thread::sleep(Duration::from_millis(20));
                    go.hold(WITHIN).unwrap();
                    assert_eq!(go.retarget(WITHIN).unwrap().connections, count);
                    // The guest's last delta, commit, unpause.
                    std::thread::sleep(Duration::from_millis(20));
                    world.place(Some(site));
                    let start = Instant::now();
                    if size == 0 {
                        send(&mut streams, length);
                    }
                    let (reading, release) = std::thread::scope(|scope| {
                        let reading = scope.spawn(|| answers(&streams, length, start));
                        let asked = Instant::now();
                        go.release(Duration::ZERO, WITHIN).unwrap();
                        let release = asked.elapsed();
                        (reading.join().unwrap(), release)
                    });
                    with.add(reading);
                    releases.push(release.as_secs_f64() * 1e3);
                }
                releases.sort_by(f64::total_cmp);
                println!(
                    "| {rtt} | {count} | {name} | {} | {:.1} | {} |",
                    with.show(),
                    releases[releases.len() / 2],
                    without.show()
                );
            }
            drop(streams);
            drop(proxy);
            let _ = std::fs::remove_dir_all(&directory);
        }
    }
}
