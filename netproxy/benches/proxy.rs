//! The proxy beside HAProxy and a direct connection, on the loopback interface, in one run.
//!
//! `cargo bench -p netproxy --bench proxy [-- SECONDS [NAME]]`, NAME being one of the peers. HAProxy is left out, with a word, where
//! it is not installed. CPU is that of the proxy's process alone.
#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The server behind every proxy: the first byte says what a connection is for.
fn serve() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
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
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
}

fn ours(directory: &Path, name: &'static str, server: SocketAddr, pipes: u32) -> Proxy {
    let address = free_port();
    let file = directory.join(format!("{name}.toml"));
    let control = directory.join(format!("{name}.control"));
    let text = format!(
        "version = 1\n[proxy]\ncontrol = {control:?}\npipes = {pipes}\n\
         [limits]\nconnections = 30000\nconnections_per_client = 30000\n\
         [[guest]]\nname = \"g\"\naddress = \"127.0.0.1\"\nsite = \"a\"\n\
         [guest.sites.a]\nrouted = true\n\
         [[guest.service]]\nname = \"s\"\nlisten = [\"{address}\"]\nport = {}\n",
        server.port()
    );
    std::fs::write(&file, text).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_netproxy"))
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
    let options = if splice {
        " option splice-request\n option splice-response\n"
    } else {
        ""
    };
    let text = format!(
        "global\n nbthread 2\n maxconn 4000\n{}defaults\n mode tcp\n timeout connect 5s\n \
         timeout client 1h\n timeout server 1h\n{options}listen l\n bind {address}\n \
         server s {server}\n",
        if splice { "" } else { " nosplice\n" }
    );
    std::fs::write(&file, text).unwrap();
    let spawned = Command::new("haproxy")
        .args(["-db", "-f"])
        .arg(&file)
        .stderr(Stdio::null())
        .spawn();
    let Ok(child) = spawned else {
        println!("haproxy is not installed: {name} is left out");
        return None;
    };
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

/// Gbit/s, and CPU seconds of the proxy per Gbit.
fn throughput(proxy: &Proxy, connections: usize, time: Duration) -> (f64, f64) {
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
    let (cpu, before, start) = (proxy.cpu(), sent.load(Ordering::Relaxed), Instant::now());
    std::thread::sleep(time);
    let gbit = (sent.load(Ordering::Relaxed) - before) as f64 * 8.0 / 1e9;
    let result = (
        gbit / start.elapsed().as_secs_f64(),
        (proxy.cpu() - cpu) / gbit,
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

fn main() {
    let seconds = std::env::args()
        .skip(1)
        .find_map(|word| word.parse().ok())
        .unwrap_or(3);
    let time = Duration::from_secs(seconds);
    let wanted = [
        "direct",
        "netproxy",
        "netproxy, copying",
        "haproxy, splice",
        "haproxy",
    ];
    let asked: Vec<String> = std::env::args().skip(1).collect();
    let only = wanted
        .into_iter()
        .find(|name| asked.iter().any(|word| word == name));
    let directory: PathBuf =
        std::env::temp_dir().join(format!("netproxy-bench-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let server = serve();
    let start: [&dyn Fn() -> Option<Proxy>; 5] = [
        &|| {
            Some(Proxy {
                name: "direct",
                address: server,
                child: None,
            })
        },
        &|| Some(ours(&directory, "netproxy", server, 64)),
        &|| Some(ours(&directory, "netproxy, copying", server, 0)),
        &|| haproxy(&directory, "haproxy, splice", server, true),
        &|| haproxy(&directory, "haproxy", server, false),
    ];
    println!("{seconds} s each; Gbit/s and CPU seconds of the proxy per Gbit:");
    println!("{:18} {:>15} {:>15} {:>15}", "connections", 1, 16, 256);
    for start in start {
        let Some(proxy) = start() else { continue };
        if only.is_some_and(|name| name != proxy.name) {
            continue;
        }
        print!("{:18}", proxy.name);
        for connections in [1, 16, 256] {
            let (rate, cpu) = throughput(&proxy, connections, time);
            print!(" {rate:7.2} {cpu:7.4}");
        }
        println!();
    }
    println!("\nRound trip in µs (p50, p99, the proxy's CPU), connections/s, KiB an idle one:");
    println!("{:18} {:>21} {:>21} {:>21}", "bytes", 64, 1024, 16_384);
    for start in start {
        let Some(proxy) = start() else { continue };
        if only.is_some_and(|name| name != proxy.name) {
            continue;
        }
        print!("{:18}", proxy.name);
        for size in [64, 1024, 16_384] {
            let (p50, p99, cpu) = latency(&proxy, size, time);
            print!(" {p50:6.1} {p99:7.1} {cpu:6.1}");
        }
        println!(
            " {:7.0} {:5.1}",
            connects(&proxy, time),
            idle_memory(&proxy, 400)
        );
    }
    std::fs::remove_dir_all(&directory).unwrap();
}
