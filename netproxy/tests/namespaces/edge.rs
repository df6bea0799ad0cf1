//! A proxy in the edge's namespace, and what tests say to it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use netproxy::Proxy;
use netproxy::config::Config;
use netproxy::control::Client;

use crate::world;
use crate::world::{EDGE, GUEST, PROBE_PORT, SITES, World};

pub const LISTEN: &str = "10.1.0.1:5900";

pub const LEASE: Duration = Duration::from_secs(120);

pub fn configuration(control: &str, extra: &str, routed: bool) -> String {
    let mut text = format!(
        "version = 1\n[proxy]\ncontrol = {control:?}\nthreads = 2\n{extra}\n\
         [[guest]]\nname = \"desktop\"\naddress = {GUEST:?}\nsource = {EDGE:?}\nsite = \"a\"\n"
    );
    for (site, address) in SITES {
        let reach = if routed {
            format!("routed = true\nprobe_address = {address:?}")
        } else {
            format!("address = {address:?}")
        };
        text.push_str(&format!(
            "[guest.sites.{site}]\n{reach}\nprobe_port = {PROBE_PORT}\n"
        ));
    }
    text.push_str(&format!(
        "[[guest.service]]\nname = \"vnc\"\nlisten = [{LISTEN:?}]\nport = 5900\nsite_port = 15900\n"
    ));
    text
}

/// A proxy in the edge's namespace, and its control socket.
pub struct Edge {
    pub proxy: Option<Arc<Proxy>>,
    pub control: PathBuf,
    pub at: &'static str,
    routed: bool,
}

impl Edge {
    pub fn new(world: &World, extra: &str) -> Self {
        Self::with(world, extra, false)
    }

    /// `routed`: the guest is reached by its own address, and a move changes the route.
    pub fn with(world: &World, extra: &str, routed: bool) -> Self {
        let _ = env_logger::builder().is_test(true).try_init();
        let control = std::env::temp_dir()
            .join(format!("netproxy-{}-{}", std::process::id(), world.ns("x")))
            .join("control");
        let text = configuration(&control.display().to_string(), extra, routed);
        let proxy = world.in_namespace("edge", move || {
            Proxy::start(Config::parse(&text, "test").unwrap(), None).unwrap()
        });
        Self {
            proxy: Some(proxy),
            control,
            at: "a",
            routed,
        }
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.control).unwrap()
    }

    /// Moves the guest to the other site as `vmshadow migrate` does.
    pub fn migrate(&mut self, world: &World) -> netproxy::Tally {
        let to = if self.at == "a" { "b" } else { "a" };
        let mut control = self.client();
        let warmth = control.prepare("desktop", to).unwrap();
        assert!(warmth.warnings.is_empty(), "{warmth:?}");
        world.place(None);
        control.hold("desktop", LEASE).unwrap();
        if self.routed {
            world.route_guest(to);
        }
        let tally = control.retarget("desktop").unwrap();
        world.place(Some(to));
        let released = control.release("desktop", Duration::ZERO).unwrap();
        assert_eq!(tally.failed + released.failed, 0, "{tally:?} {released:?}");
        self.at = to;
        tally
    }

    pub fn metric(&self, name: &str) -> u64 {
        let text = self.proxy.as_ref().unwrap().metrics();
        let line = text
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_default();
        line.rsplit(' ')
            .next()
            .and_then(|n| n.parse::<f64>().ok())
            .unwrap_or(0.0) as u64
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        drop(self.proxy.take());
        if let Some(directory) = self.control.parent() {
            let _ = std::fs::remove_dir_all(directory);
        }
    }
}

pub fn listen() -> SocketAddr {
    LISTEN.parse().unwrap()
}

pub fn echoing(world: &World) -> TcpStream {
    many_echoing(world, 1).remove(0)
}

pub fn many_echoing(world: &World, count: usize) -> Vec<TcpStream> {
    world.in_namespace("client", move || {
        let connect = |_| {
            let mut stream = TcpStream::connect(listen()).unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(30)))
                .unwrap();
            stream.write_all(&0_u64.to_le_bytes()).unwrap();
            stream
        };
        (0..count).map(connect).collect()
    })
}

/// The same with many at once: the round trips overlap.
pub fn exchange_all(streams: &mut [TcpStream], text: &[u8]) {
    streams
        .iter_mut()
        .for_each(|stream| stream.write_all(text).unwrap());
    for stream in streams {
        hears(stream, text);
    }
}

/// Where the guest is reached, if nobody but the test serves there.
pub fn guest_listens(world: &World) -> TcpListener {
    world.in_namespace("guest", || TcpListener::bind(("0.0.0.0", 5900)).unwrap())
}

/// Connections that work, and the guest's ends of them, where nobody but the test serves.
pub fn both_ends(
    world: &World,
    listener: &TcpListener,
    count: usize,
) -> Vec<(TcpStream, TcpStream)> {
    let mut pairs: Vec<_> = (0..count)
        .map(|_| (echoing(world), listener.accept().unwrap().0))
        .collect();
    for (client, guest) in &mut pairs {
        guest.read_exact(&mut [0; 8]).unwrap();
        exchange_with(client, guest, b"before");
    }
    pairs
}

pub fn exchange(stream: &mut TcpStream, text: &[u8]) {
    stream.write_all(text).unwrap();
    hears(stream, text);
}

/// Connections that the guest's TCP has open.
pub fn established(world: &World) -> usize {
    let text = world.in_namespace("guest", || {
        world::run(
            "ss",
            &["-Htn", "state", "established", "sport", "=", ":5900"],
        )
    });
    text.lines().count()
}

pub fn wait_until(what: impl FnMut() -> bool) {
    let mut what = what;
    let limit = Instant::now() + Duration::from_secs(30);
    while !what() {
        assert!(Instant::now() < limit, "It did not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn hears(stream: &mut TcpStream, text: &[u8]) {
    let mut heard = vec![0; text.len()];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(heard, text);
}

pub fn exchange_with(one: &mut TcpStream, two: &mut TcpStream, text: &[u8]) {
    one.write_all(text).unwrap();
    hears(two, text);
    two.write_all(text).unwrap();
    hears(one, text);
}
