//! How long streams stall at a re-target, in network namespaces: from the moment when the guest
//! can be reached at the new site to the first byte of its answer, and to the last pending byte.
//! Where nothing is pending, each client asks something at that moment, one after the other, and a
//! stream's time runs from its own question.
//!
//! `cargo bench -p netproxy --bench stall [-- MOVES [RTT CONNECTIONS]]`, as root. Clients, edge,
//! sites and guest share this machine's cores, and a thousand answers take their time without any
//! move. So each row is measured twice: at moves, and as an ordinary exchange over the same
//! connections. `random [MOVES [RTT]]` does only the moves at random moments that come last.
#![allow(missing_docs, dead_code, clippy::unwrap_used)]

mod median;
#[path = "../tests/namespaces/world.rs"]
mod world;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use median::median;
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

/// The guest's server: one thread, so that a thousand answers cost this machine little.
fn serve(world: &World) {
    let listener = world.in_namespace("guest", || {
        let listener = std::net::TcpListener::bind("0.0.0.0:5900").unwrap();
        socket2::SockRef::from(&listener).listen(4096).unwrap();
        listener.set_nonblocking(true).unwrap();
        mio::net::TcpListener::from_std(listener)
    });
    std::thread::spawn(move || echo_all(listener));
}

/// What one connection has to be echoed still, and how many of its bytes are not to be.
struct Echoed {
    stream: mio::net::TcpStream,
    skip: usize,
    left: Vec<u8>,
}

fn echo_all(mut listener: mio::net::TcpListener) {
    const NEW: Token = Token(usize::MAX);
    let both = Interest::READABLE | Interest::WRITABLE;
    let mut poll = Poll::new().unwrap();
    let mut events = Events::with_capacity(1024);
    let mut clients: Vec<Echoed> = Vec::new();
    let mut buffer = vec![0; 65_536];
    poll.registry()
        .register(&mut listener, NEW, Interest::READABLE)
        .unwrap();
    loop {
        poll.poll(&mut events, None).unwrap();
        for event in &events {
            if event.token() == NEW {
                while let Ok((mut stream, _)) = listener.accept() {
                    stream.set_nodelay(true).unwrap();
                    let token = Token(clients.len());
                    poll.registry().register(&mut stream, token, both).unwrap();
                    let (skip, left) = (8, Vec::new());
                    clients.push(Echoed { stream, skip, left });
                }
                continue;
            }
            let client = &mut clients[event.token().0];
            while let Ok(length @ 1..) = client.stream.read(&mut buffer) {
                let skip = client.skip.min(length);
                client.skip -= skip;
                client.left.extend_from_slice(&buffer[skip..length]);
            }
            while !client.left.is_empty()
                && let Ok(written) = client.stream.write(&client.left)
            {
                client.left.drain(..written);
            }
        }
    }
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

/// Sends over each stream, one after the other. Returns when.
fn send(streams: &mut [TcpStream], length: usize) -> Vec<Instant> {
    let data = vec![7; length];
    let send = |stream: &mut TcpStream| {
        let now = Instant::now();
        stream.write_all(&data).unwrap();
        now
    };
    streams.iter_mut().map(send).collect()
}

/// Reads the answers as they come. Returns how long after its start each stream's first byte came,
/// and after the earliest of them the last byte of all, in milliseconds.
fn answers(streams: &[TcpStream], length: usize, starts: &[Instant]) -> (Vec<f64>, f64) {
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
        let now = Instant::now();
        for event in &events {
            let at = event.token().0;
            loop {
                match (&streams[at]).read(&mut buffer) {
                    Ok(0) => panic!("A stream has ended"),
                    Ok(length) => {
                        if first[at].is_nan() {
                            first[at] = (now - starts[at]).as_secs_f64() * 1e3;
                        }
                        left[at] -= length;
                        if left[at] == 0 {
                            open -= 1;
                            break;
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }
    let last = starts.iter().min().unwrap().elapsed().as_secs_f64() * 1e3;
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
        self.median.push(median(&first));
        self.slowest.push(first[first.len() - 1]);
        self.all.push(last);
    }

    /// The median of the runs, and the worst of them.
    fn show(&self) -> String {
        let of = |figures: &[f64]| {
            let worst = figures.iter().copied().fold(f64::NAN, f64::max);
            format!("{:.1} ({worst:.1})", median(figures))
        };
        format!(
            "{:.1} | {} | {}",
            median(&self.median),
            of(&self.slowest),
            of(&self.all)
        )
    }
}

/// A proxy at the edge of a world, for one guest.
struct Edge {
    directory: std::path::PathBuf,
    control: std::path::PathBuf,
    _proxy: Arc<Proxy>,
}

impl Edge {
    fn start(world: &World) -> Self {
        let directory = std::env::temp_dir().join(format!("netproxy-{}", world.ns("stall")));
        let control = directory.join("control");
        let config = configuration(&control.display().to_string());
        let proxy = world.in_namespace("edge", move || Proxy::start(config, None).unwrap());
        Self {
            directory,
            control,
            _proxy: proxy,
        }
    }

    fn prepare(&self, site: &str) -> Move {
        let client = Client::connect(&self.control).unwrap();
        let (go, warmth) = Move::prepare(client, "desktop", site, WITHIN).unwrap();
        assert!(warmth.warnings.is_empty(), "{warmth:?}");
        go
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Moves at random moments of a stream of messages that are echoed: how long after the guest can
/// be reached the first byte of it comes, beyond a round trip.
fn random_moves(moves: u64, rtt: u64) {
    let world = World::new(Duration::from_millis(rtt));
    serve(&world);
    let edge = Edge::start(&world);
    let mut stream = connect(&world, 1).pop().unwrap();
    stream.set_nonblocking(false).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let writing = std::thread::spawn(move || {
        let mut dice = Dice(7);
        while !stopped.load(Ordering::Relaxed) {
            let length = 1 + dice.below(2000) as usize;
            writer.write_all(&vec![1; length]).unwrap();
            std::thread::sleep(Duration::from_micros(dice.below(4000)));
        }
        // The guest's server never ends a stream: this ends the one who reads, too.
        writer.shutdown(std::net::Shutdown::Both).unwrap();
    });
    let (sender, arrivals) = std::sync::mpsc::channel();
    let reading = std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok(1..) = stream.read(&mut buffer) {
            sender.send(Instant::now()).unwrap();
        }
    });
    let mut dice = Dice(11);
    let mut stalls = Vec::new();
    for number in 0..moves {
        let site = SITES[usize::from(number % 2 == 0)].0;
        let mut go = edge.prepare(site);
        std::thread::sleep(Duration::from_micros(dice.below(20_000)));
        world.place(None);
        go.hold(WITHIN).unwrap();
        go.retarget(WITHIN).unwrap();
        std::thread::sleep(Duration::from_micros(dice.below(20_000)));
        // What came before does not count.
        while arrivals.try_recv().is_ok() {}
        world.place(Some(site));
        let start = Instant::now();
        go.release(Duration::ZERO, WITHIN).unwrap();
        let first = arrivals.recv_timeout(WITHIN).expect("The stream is stuck");
        stalls.push((first - start).as_secs_f64() * 1e3 - rtt as f64);
    }
    stop.store(true, Ordering::Relaxed);
    writing.join().unwrap();
    reading.join().unwrap();
    stalls.sort_by(f64::total_cmp);
    let at = |share: usize| stalls[(stalls.len() - 1) * share / 1000];
    println!(
        "\n{moves} moves at random moments of a stream of messages, at {rtt} ms of RTT: its first \
         byte came a round trip and {:.1} ms (median), {:.1} ms (99 %), {:.1} ms (the worst) after \
         the guest could be reached.",
        at(500),
        at(990),
        at(1000)
    );
}

/// xorshift64*.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % limit
    }
}

/// Milliseconds that the proxy's event loops have run, and all of this process: clients, wires and
/// guest are in it too. The kernel's work for a packet counts for whoever caused it.
fn processor_time() -> (f64, f64) {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike;
    let mut proxy = 0.0;
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name)).ok();
        // A thread may end meanwhile.
        if let (Some(name), Some(times)) = (read("comm"), read("schedstat"))
            && name.starts_with("proxy-")
        {
            let nanoseconds: f64 = times.split(' ').next().unwrap().parse().unwrap();
            proxy += nanoseconds / 1e6;
        }
    }
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let all = usage.user_time() + usage.system_time();
    (proxy, all.num_microseconds() as f64 / 1e3)
}

fn main() {
    let numbers: Vec<u64> = std::env::args()
        .filter_map(|word| word.parse().ok())
        .collect();
    let moves = numbers.first().copied().unwrap_or(5);
    let chosen = |at: usize, all: [u64; 3]| match numbers.get(at) {
        Some(number) => vec![*number],
        None => all.to_vec(),
    };
    if std::env::args().any(|word| word == "random") {
        return random_moves(moves, numbers.get(1).copied().unwrap_or(10));
    }
    println!(
        "{moves} moves each, in ms: median of the streams' first bytes | the slowest stream's | \
         all pending bytes; the worst move in brackets. Then how long the re-target itself took, with the \
         guest silent, and the release; the \
         time that processors worked until all bytes had come, for the proxy and for everything \
         here; and the same exchange without a move.\n"
    );
    println!(
        "| RTT | connections | pending | at a move | | | retarget | release | CPU: proxy | all | without \
         | | |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|---|");
    for rtt in chosen(1, [10, 40, 200]) {
        for count in chosen(2, [1, 100, 1000]) {
            let count = usize::try_from(count).unwrap();
            let world = World::new(Duration::from_millis(rtt));
            serve(&world);
            let edge = Edge::start(&world);
            let mut streams = connect(&world, count);
            let starts = send(&mut streams, 1);
            answers(&streams, 1, &starts);
            let sizes = [(0, "idle"), (10, "10 B"), (16_384, "16 KiB")];
            let mut at = 0;
            for (size, name) in sizes {
                // An idle stream is asked something when the guest can be reached.
                let length = if size == 0 { 10 } else { size };
                let (mut with, mut without) = (Row::default(), Row::default());
                let (mut retargets, mut releases) = (Vec::new(), Vec::new());
                let (mut own, mut total) = (Vec::new(), Vec::new());
                for _ in 0..moves {
                    let mut starts = send(&mut streams, length);
                    if size > 0 {
                        let first = starts[0];
                        starts.fill(first);
                    }
                    without.add(answers(&streams, length, &starts));
                    std::thread::sleep(Duration::from_millis(300));
                    at = 1 - at;
                    let site = SITES[at].0;
                    let mut go = edge.prepare(site);
                    // On its way to the guest, and lost: what the guest itself has lost is its
                    // own to repeat.
                    world.place(None);
                    send(&mut streams, size);
                    std::thread::sleep(Duration::from_millis(20));
                    go.hold(WITHIN).unwrap();
                    let asked = Instant::now();
                    assert_eq!(go.retarget(WITHIN).unwrap().connections, count);
                    retargets.push(asked.elapsed().as_secs_f64() * 1e3);
                    // The guest's last delta, commit, unpause.
                    std::thread::sleep(Duration::from_millis(20));
                    world.place(Some(site));
                    let before = processor_time();
                    let start = Instant::now();
                    let (reading, release) = std::thread::scope(|scope| {
                        let reading = scope.spawn(|| {
                            let starts = match size {
                                0 => send(&mut streams, length),
                                _ => vec![start; count],
                            };
                            answers(&streams, length, &starts)
                        });
                        let asked = Instant::now();
                        go.release(Duration::ZERO, WITHIN).unwrap();
                        let release = asked.elapsed();
                        (reading.join().unwrap(), release)
                    });
                    let after = processor_time();
                    own.push(after.0 - before.0);
                    total.push(after.1 - before.1);
                    with.add(reading);
                    releases.push(release.as_secs_f64() * 1e3);
                }
                println!(
                    "| {rtt} | {count} | {name} | {} | {:.1} | {:.1} | {:.1} | {:.1} | {} |",
                    with.show(),
                    median(&retargets),
                    median(&releases),
                    median(&own),
                    median(&total),
                    without.show()
                );
            }
        }
    }
    if numbers.len() < 2 {
        random_moves(1000, 10);
    }
}
