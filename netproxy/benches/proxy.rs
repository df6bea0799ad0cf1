//! The proxy beside HAProxy and a direct connection, in network namespaces, in one run.
//!
//! ```text
//! client 10.3.1.2 ──veth── 10.3.1.1 edge 10.3.2.1 ──veth── 10.3.2.2 server
//! ```
//!
//! `cargo bench -p netproxy --bench proxy [-- SECONDS [PART] [NAME]]` as root, PART being
//! `throughput` or `latency`, and NAME one of the peers. Each of them runs on the edge; a direct
//! connection is routed over it. HAProxy is left out, with a word, where it is not installed. CPU
//! is that of the peer's process alone, and that of the whole machine, which carries the client
//! and the server too.
#![allow(missing_docs, clippy::unwrap_used)]

mod median;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use median::median;

/// How often each figure is measured.
const ROUNDS: usize = 5;

fn namespace(name: &str) -> String {
    format!("npb{}-{name}", std::process::id())
}

fn ip(line: &str) {
    let output = Command::new("ip").args(line.split(' ')).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {line}: {said}");
}

/// The namespaces of this run.
struct Network;

impl Network {
    fn new() -> Self {
        let network = Self;
        for name in ["client", "edge", "server"] {
            ip(&format!("netns add {}", namespace(name)));
            ip(&format!("-n {} link set lo up", namespace(name)));
        }
        let edge = namespace("edge");
        for (end, net) in [("client", 1), ("server", 2)] {
            let other = namespace(end);
            ip(&format!(
                "-n {other} link add up0 type veth peer name {end} netns {edge}"
            ));
            ip(&format!("-n {other} address add 10.3.{net}.2/24 dev up0"));
            ip(&format!("-n {edge} address add 10.3.{net}.1/24 dev {end}"));
            ip(&format!("-n {other} link set up0 up"));
            ip(&format!("-n {edge} link set {end} up"));
            ip(&format!("-n {other} route add default via 10.3.{net}.1"));
        }
        inside("edge", || {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        });
        for name in ["client", "edge", "server"] {
            inside(name, || {
                let set = |key: &str, value: &str| {
                    std::fs::write(format!("/proc/sys/net/ipv4/{key}"), value).unwrap();
                };
                set("ip_local_port_range", "10000 65000");
                // What Linux has by default: all three share one host's memory for TCP.
                set("tcp_rmem", "4096 131072 6291456");
                set("tcp_wmem", "4096 16384 4194304");
            });
        }
        network
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in ["client", "edge", "server"] {
            let _ = Command::new("ip")
                .args(["netns", "del", &namespace(name)])
                .status();
        }
    }
}

/// This thread goes into a namespace, and with it all that it starts from then on.
fn enter(name: &str) {
    let file = std::fs::File::open(format!("/run/netns/{}", namespace(name))).unwrap();
    nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
}

fn inside<T: Send>(name: &str, what: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            enter(name);
            what()
        });
        inside.join().unwrap()
    })
}

/// A command that runs on the edge.
fn on_edge(program: &str) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &namespace("edge"), program]);
    command
}

/// Seconds that all processors were busy, with whatever.
fn machine() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap();
    let fields = text.lines().next().unwrap().split_whitespace().skip(1);
    let ticks: Vec<f64> = fields.map(|field| field.parse().unwrap()).collect();
    // All but idle, waiting for disks, and what the host took.
    (ticks.iter().take(7).sum::<f64>() - ticks[3] - ticks[4]) / 100.0
}

/// The server behind every proxy: the first byte says what a connection is for.
fn serve() -> SocketAddr {
    let listener = inside("server", || TcpListener::bind("10.3.2.2:0").unwrap());
    socket2::SockRef::from(&listener).listen(4096).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { continue };
            let thread = std::thread::Builder::new().stack_size(64 * 1024);
            let _ = thread.spawn(move || attend(stream));
        }
    });
    address
}

fn attend(mut stream: TcpStream) {
    let mut first = [0];
    if stream.read_exact(&mut first).is_err() {
        return;
    }
    let _ = stream.set_nodelay(true);
    match first[0] {
        b'e' => {
            let mut buffer = vec![0; 16_384];
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..length]).is_err() {
                    return;
                }
            }
        }
        b's' => {
            let mut buffer = vec![0; 1 << 18];
            while let Ok(1..) = stream.read(&mut buffer) {}
        }
        // Answers once, and ends.
        _ => drop(stream.write_all(b"y")),
    }
}

struct Proxy {
    name: &'static str,
    address: SocketAddr,
    child: Option<Child>,
}

impl Proxy {
    /// Seconds of CPU used so far.
    fn cpu(&self) -> f64 {
        let Some(child) = &self.child else { return 0.0 };
        let text = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let fields: Vec<&str> = text
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        let ticks = |at: usize| fields[at].parse::<f64>().unwrap();
        (ticks(11) + ticks(12)) / 100.0
    }

    /// Memory in use by it alone, in KiB.
    fn memory(&self) -> u64 {
        let Some(child) = &self.child else { return 0 };
        let text = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let line = text.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn free_port() -> SocketAddr {
    inside("edge", || {
        let listener = TcpListener::bind("10.3.1.1:0").unwrap();
        listener.local_addr().unwrap()
    })
}

fn ours(directory: &Path, name: &'static str, server: SocketAddr, pipes: u32) -> Proxy {
    let address = free_port();
    let file = directory.join(format!("{name}.toml"));
    let control = directory.join(format!("{name}.control"));
    let text = format!(
        "version = 1\n[proxy]\ncontrol = {control:?}\npipes = {pipes}\n\
         [limits]\nconnections = 30000\nconnections_per_client = 30000\n\
         [[guest]]\nname = \"g\"\naddress = \"10.3.2.2\"\nsite = \"a\"\n\
         [guest.sites.a]\nrouted = true\n\
         [[guest.service]]\nname = \"s\"\nlisten = [\"{address}\"]\nport = {}\n",
        server.port()
    );
    std::fs::write(&file, text).unwrap();
    let mut child = on_edge(env!("CARGO_BIN_EXE_netproxy"))
        .arg(&file)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "ready"));
    Proxy {
        name,
        address,
        child: Some(child),
    }
}

fn haproxy(
    directory: &Path,
    name: &'static str,
    server: SocketAddr,
    splice: bool,
) -> Option<Proxy> {
    let address = free_port();
    let file = directory.join(format!("{name}.cfg"));
    // It reckons with two descriptors for each.
    let files = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (files, _) = nix::sys::resource::getrlimit(files).unwrap();
    let most = (files.saturating_sub(300) / 2).min(12_000);
    let options = if splice {
        " option splice-request\n option splice-response\n"
    } else {
        ""
    };
    let text = format!(
        "global\n nbthread 2\n maxconn {most}\n maxpipes 64\n{}defaults\n mode tcp\n timeout connect 5s\n \
         timeout client 1h\n timeout server 1h\n{options}listen l\n bind {address}\n \
         server s {server}\n",
        if splice { "" } else { " nosplice\n" }
    );
    std::fs::write(&file, text).unwrap();
    if Command::new("haproxy").arg("-v").output().is_err() {
        println!("haproxy is not installed: {name} is left out");
        return None;
    }
    let child = on_edge("haproxy")
        .args(["-db", "-f"])
        .arg(&file)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let limit = Instant::now() + Duration::from_secs(5);
    while TcpStream::connect(address).is_err() {
        assert!(Instant::now() < limit, "haproxy does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    Some(Proxy {
        name,
        address,
        child: Some(child),
    })
}

/// Gbit/s, and CPU seconds per Gbit: of the proxy, and of the machine.
fn throughput(proxy: &Proxy, connections: usize, time: Duration) -> (f64, f64, f64) {
    let stop = Arc::new(AtomicBool::new(false));
    let sent = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..connections)
        .map(|_| {
            let (stop, sent, address) = (Arc::clone(&stop), Arc::clone(&sent), proxy.address);
            let thread = std::thread::Builder::new().stack_size(64 * 1024);
            let work = move || {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.write_all(b"s").unwrap();
                let data = vec![0; 1 << 18];
                while !stop.load(Ordering::Relaxed) {
                    let written = stream.write(&data).unwrap();
                    sent.fetch_add(written as u64, Ordering::Relaxed);
                }
            };
            thread.spawn(work).unwrap()
        })
        .collect();
    std::thread::sleep(Duration::from_millis(500));
    let (cpu, all) = (proxy.cpu(), machine());
    let (before, start) = (sent.load(Ordering::Relaxed), Instant::now());
    std::thread::sleep(time);
    let gbit = (sent.load(Ordering::Relaxed) - before) as f64 * 8.0 / 1e9;
    let result = (
        gbit / start.elapsed().as_secs_f64(),
        (proxy.cpu() - cpu) / gbit,
        (machine() - all) / gbit,
    );
    stop.store(true, Ordering::Relaxed);
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    result
}

/// Round trips of one connection, p50 and p99 in microseconds, and the proxy's CPU for one.
fn latency(proxy: &Proxy, size: usize, time: Duration) -> (f64, f64, f64) {
    let mut stream = TcpStream::connect(proxy.address).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.write_all(b"e").unwrap();
    let (data, mut answer) = (vec![1; size], vec![0; size]);
    let mut times = Vec::new();
    let (cpu, begin) = (proxy.cpu(), Instant::now());
    while begin.elapsed() < time {
        let start = Instant::now();
        stream.write_all(&data).unwrap();
        stream.read_exact(&mut answer).unwrap();
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    let used = (proxy.cpu() - cpu) * 1e6 / times.len() as f64;
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[times.len() * 99 / 100], used)
}

/// Connections a second, one after the other, each with one question and answer.
fn connects(proxy: &Proxy, time: Duration) -> f64 {
    let begin = Instant::now();
    let mut count = 0.0;
    while begin.elapsed() < time {
        let mut stream = TcpStream::connect(proxy.address).unwrap();
        stream.write_all(b"q").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        // No TIME_WAIT on this side.
        socket2::SockRef::from(&stream)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        count += 1.0;
    }
    count / begin.elapsed().as_secs_f64()
}

/// KiB of the proxy's own memory for each of many idle connections.
fn idle_memory(proxy: &Proxy, connections: usize) -> f64 {
    let before = proxy.memory();
    let mut streams: Vec<TcpStream> = Vec::new();
    for _ in 0..connections {
        let mut stream = TcpStream::connect(proxy.address).unwrap();
        stream.write_all(b"e.").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        streams.push(stream);
    }
    let after = proxy.memory();
    (after as f64 - before as f64) / connections as f64
}

/// As a cell of a table, empty where there is nothing to tell.
fn cell(figure: f64, digits: usize) -> String {
    if figure == 0.0 {
        String::new()
    } else {
        format!("{figure:.digits$}")
    }
}

const PEERS: [&str; 5] = [
    "direct",
    "netproxy",
    "netproxy, copying",
    "haproxy, splice",
    "haproxy",
];

fn start(name: &'static str, directory: &Path, server: SocketAddr) -> Option<Proxy> {
    match name {
        "netproxy" => Some(ours(directory, name, server, 64)),
        "netproxy, copying" => Some(ours(directory, name, server, 0)),
        "haproxy, splice" => haproxy(directory, name, server, true),
        "haproxy" => haproxy(directory, name, server, false),
        _ => Some(Proxy {
            name,
            address: server,
            child: None,
        }),
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let seconds = words.iter().find_map(|word| word.parse().ok()).unwrap_or(2);
    let time = Duration::from_secs(seconds);
    let only = PEERS
        .iter()
        .find(|name| words.iter().any(|word| word == *name));
    let peers: Vec<&'static str> = match only {
        Some(name) => vec![name],
        None => PEERS.to_vec(),
    };
    let files = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, most) = nix::sys::resource::getrlimit(files).unwrap();
    // Two for each connection, here as in the proxies, and some for other things.
    let wanted = most.max(65_536);
    let limit = match nix::sys::resource::setrlimit(files, wanted, wanted) {
        Ok(()) => wanted,
        Err(_) => most,
    };
    nix::sys::resource::setrlimit(files, limit, limit).unwrap();
    let idle = usize::try_from(limit.saturating_sub(400) / 2)
        .unwrap()
        .min(10_000);
    let directory: PathBuf =
        std::env::temp_dir().join(format!("netproxy-bench-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let _network = Network::new();
    let server = serve();
    enter("client");
    let part = |name: &str| {
        let other = ["throughput", "latency"]
            .iter()
            .find(|other| **other != name);
        words.iter().all(|word| Some(&word.as_str()) != other)
    };
    if part("throughput") {
        throughputs(&peers, &directory, server, time);
    }
    if part("latency") {
        latencies(&peers, &directory, server, time, idle);
    }
    std::fs::remove_dir_all(&directory).unwrap();
}

/// What each round of a peer measured: rows of figures, all of one length.
type Rounds = Vec<Vec<f64>>;

/// Each figure's median over the rounds. Who runs on which processor is decided anew in each.
fn medians(rounds: &Rounds) -> Vec<f64> {
    let figures = rounds.first().map_or(0, Vec::len);
    (0..figures)
        .map(|at| {
            let figures: Vec<f64> = rounds.iter().map(|round| round[at]).collect();
            median(&figures)
        })
        .collect()
}

/// Measures the peers one after the other, `ROUNDS` times, all of them running: each with the
/// medians of its figures.
fn by_turns(proxies: &[Proxy], measure: impl Fn(&Proxy) -> Vec<f64>) -> Vec<(&Proxy, Vec<f64>)> {
    let mut rounds: Vec<Rounds> = vec![Rounds::new(); proxies.len()];
    for _ in 0..ROUNDS {
        for (proxy, rounds) in proxies.iter().zip(&mut rounds) {
            rounds.push(measure(proxy));
        }
    }
    let medians = rounds.iter().map(medians);
    proxies.iter().zip(medians).collect()
}

fn throughputs(peers: &[&'static str], directory: &Path, server: SocketAddr, time: Duration) {
    println!(
        "The median of {ROUNDS} times {} s. Throughput in Gbit/s; CPU seconds per Gbit of the \
         proxy, and of the whole machine.\n",
        time.as_secs()
    );
    let start = |name: &&'static str| start(name, directory, server);
    let proxies: Vec<Proxy> = peers.iter().filter_map(start).collect();
    let measured = by_turns(&proxies, |proxy| {
        [1, 16, 256]
            .into_iter()
            .flat_map(|connections| {
                let (rate, cpu, all) = throughput(proxy, connections, time);
                [rate, cpu, all]
            })
            .collect()
    });
    println!("| connections | 1 | | | 16 | | | 256 | | |");
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for (proxy, figures) in measured {
        print!("| {} |", proxy.name);
        for figures in figures.chunks(3) {
            let (rate, cpu, all) = (figures[0], cell(figures[1], 3), figures[2]);
            print!(" {rate:.2} | {cpu} | {all:.3} |");
        }
        println!();
    }
}

fn latencies(
    peers: &[&'static str],
    directory: &Path,
    server: SocketAddr,
    time: Duration,
    idle: usize,
) {
    println!(
        "\nThe median of {ROUNDS} times {} s. Round trips in µs: p50, p99, and the proxy's CPU for \
         one. New connections a second, one after the other. KiB of the proxy's memory for each of \
         {idle} idle connections, once.\n",
        time.as_secs()
    );
    let start = |name: &&'static str| start(name, directory, server);
    let proxies: Vec<Proxy> = peers.iter().filter_map(start).collect();
    let measured = by_turns(&proxies, |proxy| {
        let mut figures = Vec::new();
        for size in [64, 1024, 16_384] {
            let (p50, p99, cpu) = latency(proxy, size, time);
            figures.extend([p50, p99, cpu]);
        }
        figures.push(connects(proxy, time));
        figures
    });
    println!("| bytes | 64 | | | 1,024 | | | 16,384 | | | new/s | KiB |");
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for (proxy, figures) in measured {
        let (trips, connects) = figures.split_at(9);
        print!("| {} |", proxy.name);
        for figures in trips.chunks(3) {
            let (p50, p99, cpu) = (figures[0], figures[1], cell(figures[2], 1));
            print!(" {p50:.0} | {p99:.0} | {cpu} |");
        }
        let memory = cell(idle_memory(proxy, idle), 1);
        println!(" {:.0} | {memory} |", connects[0]);
    }
}
