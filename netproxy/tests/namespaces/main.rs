//! The proxy in network namespaces: connections that outlive the move of their guest.
//!
//! These tests need root, and fail without it.
#![allow(missing_docs, clippy::unwrap_used)]

mod detours;
mod traffic;
mod world;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use netproxy::Proxy;
use netproxy::config::Config;
use netproxy::control::{Client, Move};
use traffic::{Kind, Noise, Reads, Running, Sends, serve, start};
use world::{EDGE, GUEST, PROBE_PORT, SITES, World};

const LISTEN: &str = "10.1.0.1:5900";
const LEASE: Duration = Duration::from_secs(120);

fn configuration(control: &str, extra: &str, routed: bool) -> String {
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
struct Edge {
    proxy: Option<Arc<Proxy>>,
    control: PathBuf,
    at: &'static str,
    routed: bool,
}

impl Edge {
    fn new(world: &World, extra: &str) -> Self {
        Self::with(world, extra, false)
    }

    /// `routed`: the guest is reached by its own address, and a move changes the route.
    fn with(world: &World, extra: &str, routed: bool) -> Self {
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

    fn client(&self) -> Client {
        Client::connect(&self.control).unwrap()
    }

    /// Moves the guest to the other site as `vmshadow migrate` does.
    fn migrate(&mut self, world: &World) -> netproxy::Tally {
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

    fn metric(&self, name: &str) -> u64 {
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

fn listen() -> SocketAddr {
    LISTEN.parse().unwrap()
}

/// Moves the guest `times` at random moments while streams of the kinds run, and compares.
fn streams_survive(world: &World, edge: &mut Edge, kinds: &[Kind], times: usize, seed: u64) {
    let streams: Vec<Running> = kinds
        .iter()
        .map(|kind| start(world, listen(), *kind))
        .collect();
    let mut dice = Noise::new(seed);
    let begin = Instant::now();
    for round in 0..times {
        std::thread::sleep(Duration::from_millis(dice.below(60)));
        let tally = edge.migrate(world);
        assert_eq!(
            tally.connections + tally.waiting,
            kinds.len(),
            "round {round}"
        );
    }
    let carried: u64 = streams.into_iter().map(Running::finish).sum();
    println!(
        "{times} moves in {:.1} s, {} MB, fallbacks {}",
        begin.elapsed().as_secs_f64(),
        carried / 1_000_000,
        edge.metric("netproxy_retarget_fallbacks_total")
    );
    assert!(carried > 0);
}

const FAST: Reads = Reads::Fast;

fn all_kinds() -> Vec<Kind> {
    let messages = Sends::Messages(600);
    vec![
        // Small messages both ways, as VNC and ssh.
        Kind {
            client: (messages, FAST),
            guest: (messages, FAST),
        },
        // Bulk, each way and both.
        Kind {
            client: (Sends::Bulk, FAST),
            guest: (messages, FAST),
        },
        Kind {
            client: (messages, FAST),
            guest: (Sends::Bulk, FAST),
        },
        Kind {
            client: (Sends::Bulk, FAST),
            guest: (Sends::Bulk, FAST),
        },
        // Half-closed, each way, while data flows the other way.
        Kind {
            client: (Sends::Nothing, FAST),
            guest: (messages, FAST),
        },
        Kind {
            client: (messages, FAST),
            guest: (Sends::Nothing, FAST),
        },
        Kind {
            client: (Sends::Nothing, FAST),
            guest: (Sends::Bulk, FAST),
        },
        Kind {
            client: (Sends::Bulk, FAST),
            guest: (Sends::Nothing, FAST),
        },
        // Full buffers and zero windows.
        Kind {
            client: (Sends::Bulk, FAST),
            guest: (messages, Reads::Stalling),
        },
        Kind {
            client: (messages, Reads::Stalling),
            guest: (Sends::Bulk, FAST),
        },
    ]
}

#[test]
fn one_stream_survives_one_move() {
    let world = World::new(Duration::from_millis(10));
    serve(&world, 5900);
    let mut edge = Edge::new(&world, "");
    let kind = all_kinds()[0];
    streams_survive(&world, &mut edge, &[kind], 1, 1);
}

#[test]
fn every_kind_of_stream_survives_many_moves() {
    let world = World::new(Duration::from_millis(8));
    serve(&world, 5900);
    let mut edge = Edge::new(&world, "");
    streams_survive(&world, &mut edge, &all_kinds(), 100, 2);
}

/// A short mixed run under other TCP options.
fn options(settings: &[(&'static str, &'static str)], seed: u64) {
    let world = World::new(Duration::from_millis(6));
    for (key, value) in settings {
        world.sysctl("guest", key, value);
    }
    serve(&world, 5900);
    let mut edge = Edge::new(&world, "");
    let kinds = all_kinds();
    streams_survive(
        &world,
        &mut edge,
        &[kinds[0], kinds[3], kinds[5], kinds[6]],
        12,
        seed,
    );
}

#[test]
fn without_timestamps() {
    options(&[("tcp_timestamps", "0")], 11);
}

#[test]
fn without_window_scaling() {
    options(&[("tcp_window_scaling", "0")], 12);
}

#[test]
fn without_sack() {
    options(&[("tcp_sack", "0")], 13);
}

#[test]
fn without_any_option() {
    options(
        &[
            ("tcp_timestamps", "0"),
            ("tcp_window_scaling", "0"),
            ("tcp_sack", "0"),
        ],
        14,
    );
}

fn echoing(world: &World) -> TcpStream {
    many_echoing(world, 1).remove(0)
}

fn many_echoing(world: &World, count: usize) -> Vec<TcpStream> {
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
fn exchange_all(streams: &mut [TcpStream], text: &[u8]) {
    streams
        .iter_mut()
        .for_each(|stream| stream.write_all(text).unwrap());
    for stream in streams {
        let mut answer = vec![0; text.len()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, text);
    }
}

fn exchange(stream: &mut TcpStream, text: &[u8]) {
    stream.write_all(text).unwrap();
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer, text);
}

#[test]
fn a_thousand_connections_move_at_once() {
    let world = World::new(Duration::from_millis(10));
    serve(&world, 5900);
    let mut edge = Edge::new(&world, "");
    let mut streams: Vec<TcpStream> = many_echoing(&world, 1000);
    exchange_all(&mut streams, b"before");
    for round in 0..4_u32 {
        // Every other one has something under way.
        let text = format!("round {round}");
        for stream in streams.iter_mut().step_by(2) {
            stream.write_all(text.as_bytes()).unwrap();
        }
        assert_eq!(edge.migrate(&world).connections, 1000);
        for stream in streams.iter_mut().step_by(2) {
            let mut answer = vec![0; text.len()];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer, text.as_bytes());
        }
        exchange_all(&mut streams, b"after");
    }
    assert_eq!(edge.metric("netproxy_retargets_total"), 4000);
    assert_eq!(edge.metric("netproxy_retarget_failures_total"), 0);
}

#[test]
fn the_connection_is_at_the_other_site_and_nothing_goes_to_the_old_one() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let mut edge = Edge::new(&world, "");
    let mut stream = echoing(&world);
    exchange(&mut stream, b"here");
    let upstream = |edge: &Edge| {
        edge.client().list().unwrap().connections[0]
            .upstream
            .unwrap()
    };
    assert_eq!(upstream(&edge), "198.51.100.1:15900".parse().unwrap());
    edge.migrate(&world);
    assert_eq!(upstream(&edge), "203.0.113.1:15900".parse().unwrap());
    // The old site could as well be gone.
    world.wires[0].cut.store(true, Ordering::Relaxed);
    exchange(&mut stream, b"there");
    // New connections go there too.
    exchange(&mut echoing(&world), b"new");
    world.wires[0].cut.store(false, Ordering::Relaxed);
}

#[test]
fn a_cancelled_move_leaves_everything_as_it_was() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let rules = world.rules("edge");
    let streams: Vec<Running> = all_kinds()
        .into_iter()
        .map(|kind| start(&world, listen(), kind))
        .collect();
    let mut control = edge.client();
    for round in 0..12 {
        std::thread::sleep(Duration::from_millis(20));
        control.prepare("desktop", "b").unwrap();
        let steps = round % 3;
        if steps > 0 {
            world.place(None);
            control.hold("desktop", LEASE).unwrap();
        }
        if steps > 1 {
            assert_eq!(control.retarget("desktop").unwrap().failed, 0);
        }
        world.place(Some("a"));
        assert_eq!(control.cancel("desktop").unwrap().failed, 0);
    }
    let overview = control.list().unwrap();
    assert_eq!(overview.guests[0].site, "a");
    streams
        .into_iter()
        .map(Running::finish)
        .for_each(|carried| assert!(carried > 0));
    assert_eq!(world.rules("edge"), rules);
    assert_eq!(edge.metric("netproxy_retargets_total"), 0);
}

/// Not a test: the caller that [`a_caller_that_is_killed_gives_its_move_up`] kills.
#[test]
#[ignore = "a process for another test"]
fn be_a_caller() {
    let control = std::env::var("NETPROXY_TEST_CONTROL").unwrap();
    let steps: u32 = std::env::var("NETPROXY_TEST_STEPS")
        .unwrap()
        .parse()
        .unwrap();
    let mut client = Client::connect(std::path::Path::new(&control)).unwrap();
    client.prepare_tied("desktop", "b").unwrap();
    if steps > 0 {
        client.hold_tied("desktop", LEASE).unwrap();
    }
    if steps > 1 {
        client.retarget("desktop").unwrap();
    }
    println!("so far");
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn a_caller_that_is_killed_gives_its_move_up() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let rules = world.rules("edge");
    let streams: Vec<Running> = all_kinds()
        .into_iter()
        .map(|kind| start(&world, listen(), kind))
        .collect();
    wait_until(|| edge.client().list().unwrap().connections.len() == streams.len());
    for steps in 0..3 {
        if steps > 0 {
            world.place(None);
        }
        let mut caller = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "be_a_caller", "--ignored", "--nocapture"])
            .env("NETPROXY_TEST_CONTROL", &edge.control)
            .env("NETPROXY_TEST_STEPS", steps.to_string())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let said = std::io::BufReader::new(caller.stdout.take().unwrap());
        let mut lines = std::io::BufRead::lines(said);
        assert!(lines.any(|line| line.unwrap().contains("so far")));
        let phase = || edge.client().list().unwrap().guests[0].phase.clone();
        assert_eq!(phase().destination(), Some("b"));
        caller.kill().unwrap();
        caller.wait().unwrap();
        wait_until(|| phase().destination().is_none());
        world.place(Some("a"));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(edge.client().list().unwrap().guests[0].site, "a");
    for stream in streams {
        assert!(stream.finish() > 0);
    }
    assert_eq!(edge.metric("netproxy_leases_ended_total"), 3);
    assert_eq!(edge.metric("netproxy_retargets_total"), 0);
    assert_eq!(world.rules("edge"), rules);
}

/// Whether the caller's host is cut off, so that its connection stays open, or it just forgets.
#[test]
fn a_hold_whose_time_is_over_is_given_up() {
    let short = Duration::from_millis(200);
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut stream = echoing(&world);
    exchange(&mut stream, b"before");
    let mut control = edge.client();
    for tied in [false, true] {
        if tied {
            control.prepare_tied("desktop", "b").unwrap();
            control.hold_tied("desktop", short).unwrap();
        } else {
            control.prepare("desktop", "b").unwrap();
            control.hold("desktop", short).unwrap();
        }
        control.renew("desktop", LEASE).unwrap();
        std::thread::sleep(short * 2);
        // Renewed in time, it is held still.
        assert_eq!(control.retarget("desktop").unwrap().connections, 1);
        control.renew("desktop", short).unwrap();
        let settled = |site: &str| {
            let guest = edge.client().list().unwrap().guests.remove(0);
            guest.phase.destination().is_none() && guest.site == site
        };
        wait_until(|| settled("a"));
        exchange(&mut stream, b"as ever");
        for late in [
            control.renew("desktop", LEASE).unwrap_err(),
            control.release("desktop", Duration::ZERO).unwrap_err(),
        ] {
            assert!(matches!(late, netproxy::Error::Refused(_)), "{late}");
        }
    }
    assert_eq!(edge.metric("netproxy_leases_ended_total"), 2);
}

/// The caller dies after the guest has started at the new site: it is there that it answers.
#[test]
fn a_guest_that_answers_at_the_new_site_is_not_sent_back() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut stream = echoing(&world);
    exchange(&mut stream, b"before");
    let mut caller = edge.client();
    caller.prepare_tied("desktop", "b").unwrap();
    world.place(None);
    caller.hold_tied("desktop", LEASE).unwrap();
    stream.write_all(b"under way").unwrap();
    caller.retarget("desktop").unwrap();
    world.place(Some("b"));
    drop(caller);
    let mut answer = [0; 9];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"under way");
    wait_until(|| edge.client().list().unwrap().guests[0].site == "b");
    exchange(&mut echoing(&world), b"new");
}

/// As `vmshadow` does it, and from another host: through a program that leads to the socket.
#[test]
fn a_move_is_driven_from_another_host() {
    let within = Duration::from_secs(20);
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut stream = echoing(&world);
    exchange(&mut stream, b"before");
    let connect = || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_netproxy"));
        Client::through(command.arg("attach").arg(&edge.control)).unwrap()
    };
    // The edge knows what its sites have to translate.
    let translation = connect().reach("desktop", "b").unwrap().translation;
    assert_eq!(translation, Some(world::translation(SITES[1].1)));
    let at = || {
        let guest = edge.client().list().unwrap().guests.remove(0);
        (guest.site, guest.phase.destination().is_some())
    };
    let (mut there, warmth) = Move::prepare(connect(), "desktop", "b", within).unwrap();
    assert!(warmth.warnings.is_empty(), "{warmth:?}");
    assert_eq!((there.guest(), there.site()), ("desktop", "b"));
    world.place(None);
    stream.write_all(b"under way").unwrap();
    there.hold(within).unwrap();
    assert_eq!(there.retarget(within).unwrap().connections, 1);
    world.place(Some("b"));
    assert_eq!(there.release(Duration::ZERO, within).unwrap().failed, 0);
    let mut answer = [0; 9];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"under way");
    assert_eq!(at(), ("b".into(), false));
    // Back on purpose, and by being dropped.
    for purpose in [true, false] {
        let (mut given_up, _) = Move::prepare(connect(), "desktop", "a", within).unwrap();
        given_up.hold(within).unwrap();
        if purpose {
            given_up.back(within).unwrap();
        } else {
            drop(given_up);
            wait_until(|| at() == ("b".into(), false));
        }
        exchange(&mut stream, b"as ever");
    }
    // Nobody is there.
    let mut nothing = std::process::Command::new("true");
    let error = Move::prepare(
        Client::through(&mut nothing).unwrap(),
        "desktop",
        "a",
        within,
    );
    assert!(
        matches!(error, Err(netproxy::Error::Protocol(_))),
        "{error:?}"
    );
}

#[test]
fn an_answer_that_comes_too_late_is_nobodys() {
    let world = World::new(Duration::from_millis(200));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut stream = echoing(&world);
    exchange(&mut stream, b"before");
    let within = Duration::from_secs(20);
    let (mut moving, _) = Move::prepare(edge.client(), "desktop", "b", within).unwrap();
    world.place(None);
    // The freeze waits until all that the guest had sent is in.
    let error = moving.hold(Duration::from_millis(10)).unwrap_err();
    assert!(matches!(error, netproxy::Error::Timeout), "{error}");
    let error = moving.retarget(within).unwrap_err();
    assert!(matches!(error, netproxy::Error::Protocol(_)), "{error}");
    drop(moving);
    wait_until(|| {
        edge.client().list().unwrap().guests[0]
            .phase
            .destination()
            .is_none()
    });
    world.place(Some("a"));
    exchange(&mut stream, b"as ever");
}

/// Whoever moved the guest died, or the proxy was told nothing: it is put right later, from any
/// phase, and more than once does no harm.
#[test]
fn a_guest_that_arrived_is_followed() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut stream = echoing(&world);
    exchange(&mut stream, b"before");
    let mut control = edge.client();
    for (round, (to, other)) in [("b", "a"), ("a", "b"), ("b", "a"), ("a", "b")]
        .into_iter()
        .enumerate()
    {
        if round > 0 {
            // A move to where it goes, or to where it does not.
            control
                .prepare("desktop", if round == 2 { other } else { to })
                .unwrap();
        }
        world.place(None);
        stream.write_all(b"under way").unwrap();
        if round > 1 {
            control.hold("desktop", LEASE).unwrap();
        }
        if round > 2 {
            control.retarget("desktop").unwrap();
        }
        world.place(Some(to));
        control.arrived("desktop", to).unwrap();
        control.arrived("desktop", to).unwrap();
        let mut answer = [0; 9];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"under way");
        let guest = control.list().unwrap().guests.remove(0);
        assert_eq!((guest.site.as_str(), guest.phase.destination()), (to, None));
    }
    for (guest, site) in [("nobody", "a"), ("desktop", "nowhere")] {
        let error = control.arrived(guest, site).unwrap_err();
        assert!(matches!(error, netproxy::Error::Refused(_)), "{error}");
    }
}

#[test]
fn steps_out_of_order_change_nothing() {
    let world = World::new(Duration::from_millis(1));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut stream = echoing(&world);
    let mut control = edge.client();
    for refused in [
        control.hold("desktop", LEASE).unwrap_err(),
        control.retarget("desktop").unwrap_err(),
        control.release("desktop", Duration::ZERO).unwrap_err(),
        control.cancel("desktop").unwrap_err(),
        control.prepare("desktop", "nowhere").unwrap_err(),
        control.prepare("nobody", "b").unwrap_err(),
    ] {
        assert!(matches!(refused, netproxy::Error::Refused(_)), "{refused}");
    }
    control.prepare("desktop", "b").unwrap();
    control.hold("desktop", LEASE).unwrap();
    assert!(control.release("desktop", Duration::ZERO).is_err());
    assert!(control.prepare("desktop", "b").is_err());
    control.cancel("desktop").unwrap();
    exchange(&mut stream, b"as ever");
}

#[test]
fn clients_who_come_or_go_during_a_move() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut stays = echoing(&world);
    let mut ends = echoing(&world);
    let mut leaves = echoing(&world);
    let resets = echoing(&world);
    for stream in [&mut stays, &mut ends, &mut leaves] {
        exchange(stream, b"before");
    }
    let mut control = edge.client();
    control.prepare("desktop", "b").unwrap();
    world.place(None);
    control.hold("desktop", LEASE).unwrap();
    let mut early = echoing(&world);
    early.write_all(b"early").unwrap();
    stays.write_all(b"while held").unwrap();
    ends.write_all(b"last words").unwrap();
    ends.shutdown(std::net::Shutdown::Write).unwrap();
    drop(leaves);
    control.retarget("desktop").unwrap();
    socket2::SockRef::from(&resets)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(resets);
    let mut late = echoing(&world);
    late.write_all(b"late").unwrap();
    // The proxy hears of all that.
    std::thread::sleep(Duration::from_millis(50));
    world.place(Some("b"));
    let tally = control.release("desktop", Duration::ZERO).unwrap();
    assert_eq!((tally.connections, tally.waiting, tally.failed), (4, 2, 0));
    let expect = |stream: &mut TcpStream, text: &[u8]| {
        let mut answer = vec![0; text.len()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, text);
    };
    expect(&mut stays, b"while held");
    expect(&mut early, b"early");
    expect(&mut late, b"late");
    let mut rest = Vec::new();
    ends.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"last words");
    exchange(&mut stays, b"after");
    // Those who left are gone at both ends.
    wait_until(|| control.list().unwrap().connections.len() == 3);
    wait_until(|| established(&world) == 3);
}

/// Connections that the guest's TCP has open.
fn established(world: &World) -> usize {
    let text = world.in_namespace("guest", || {
        world::run(
            "ss",
            &["-Htn", "state", "established", "sport", "=", ":5900"],
        )
    });
    text.lines().count()
}

/// As [`wait_until`], without a pause: for what is only there for a moment.
fn wait_until_soon(mut what: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(30);
    while !what() {
        assert!(Instant::now() < limit, "It did not happen");
    }
}

fn wait_until(what: impl FnMut() -> bool) {
    let mut what = what;
    let limit = Instant::now() + Duration::from_secs(30);
    while !what() {
        assert!(Instant::now() < limit, "It did not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn lost_packets_at_the_release() {
    let world = World::new(Duration::from_millis(6));
    serve(&world, 5900);
    let mut edge = Edge::new(&world, "");
    let kinds = all_kinds();
    let streams: Vec<Running> = [kinds[0], kinds[3], kinds[4]]
        .iter()
        .map(|kind| start(&world, listen(), *kind))
        .collect();
    for wire in &world.wires {
        wire.loss.store(20, Ordering::Relaxed);
    }
    for round in 0..10 {
        let to = 1 - round % 2;
        let mut control = edge.client();
        control.prepare("desktop", SITES[to].0).unwrap();
        world.place(None);
        control.hold("desktop", LEASE).unwrap();
        control.retarget("desktop").unwrap();
        // Nothing of what is sent at first arrives, the probe least of all.
        world.wires[to].cut.store(true, Ordering::Relaxed);
        world.place(Some(SITES[to].0));
        let tally = control.release("desktop", Duration::ZERO).unwrap();
        assert_eq!(tally.failed, 0);
        edge.at = SITES[to].0;
        std::thread::sleep(Duration::from_millis(30));
        world.wires[to].cut.store(false, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(100));
    }
    streams
        .into_iter()
        .map(Running::finish)
        .for_each(|carried| assert!(carried > 0));
}

/// Segments of the guest that are queued at the old site for many seconds come to the edge when
/// the connection has long been at the new one. A reset in answer to them would be queued as
/// long, and find the guest back at the old site, with the very sequence number that it expects:
/// its client has ended, and sends nothing more.
#[test]
fn segments_that_come_very_late_are_not_answered_with_a_reset() {
    const QUEUE: Duration = Duration::from_secs(8);
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let mut edge = Edge::new(&world, "");
    let kind = Kind {
        client: (Sends::Nothing, FAST),
        guest: (Sends::Messages(600), FAST),
    };
    let stream = start(&world, listen(), kind);
    std::thread::sleep(Duration::from_millis(200));
    let usual = world.wires[0].delay_us.load(Ordering::Relaxed);
    let long = u64::try_from(QUEUE.as_micros()).unwrap();
    world.wires[0].delay_us.store(long, Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(200));
    edge.migrate(&world);
    // What was under way arrives meanwhile, and its answers are queued.
    std::thread::sleep(QUEUE + Duration::from_millis(500));
    world.wires[0].delay_us.store(usual, Ordering::Relaxed);
    let mut control = edge.client();
    // The queue delays the probe too.
    control.prepare("desktop", "a").unwrap();
    world.place(None);
    control.hold("desktop", LEASE).unwrap();
    control.retarget("desktop").unwrap();
    world.place(Some("a"));
    control.release("desktop", Duration::ZERO).unwrap();
    std::thread::sleep(QUEUE / 2);
    assert!(stream.finish() > 0);
}

#[test]
fn a_canary_finds_out_when_the_guest_can_be_reached() {
    let world = World::new(Duration::from_millis(6));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut streams: Vec<TcpStream> = many_echoing(&world, 20);
    exchange_all(&mut streams, b"before");
    let mut control = edge.client();
    control.prepare("desktop", "b").unwrap();
    world.place(None);
    control.hold("desktop", LEASE).unwrap();
    streams
        .iter_mut()
        .for_each(|stream| stream.write_all(b"held").unwrap());
    control.retarget("desktop").unwrap();
    let mut releasing = edge.client();
    let release = std::thread::spawn(move || {
        releasing
            .release("desktop", Duration::from_secs(20))
            .unwrap()
    });
    std::thread::sleep(Duration::from_millis(300));
    assert!(!release.is_finished(), "Nobody has answered yet");
    world.place(Some("b"));
    assert_eq!(release.join().unwrap().connections, 20);
    for stream in &mut streams {
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"held");
    }
}

/// Runs the program in the edge's namespace; returns when it is ready.
fn start_program(world: &World, file: &std::path::Path) -> std::process::Child {
    let file = file.to_owned();
    let mut child = world.in_namespace("edge", move || {
        std::process::Command::new(env!("CARGO_BIN_EXE_netproxy"))
            .arg(file)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    });
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while line != "ready\n" {
        line.clear();
        let read = std::io::BufRead::read_line(&mut lines, &mut line).unwrap();
        assert!(read > 0, "The program ended before it was ready");
    }
    child
}

#[test]
fn an_ordinary_user_with_one_capability_is_enough() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let directory = std::env::temp_dir().join(format!("netproxy-user-{}", world.ns("x")));
    std::fs::create_dir_all(&directory).unwrap();
    std::os::unix::fs::chown(&directory, Some(65534), Some(65534)).unwrap();
    let control = directory.join("control");
    let file = directory.join("proxy.toml");
    std::fs::write(
        &file,
        configuration(&control.display().to_string(), "", false),
    )
    .unwrap();
    // The program itself must be reachable for that user.
    let program = directory.join("netproxy");
    std::fs::copy(env!("CARGO_BIN_EXE_netproxy"), &program).unwrap();
    let words = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let capability = [
        "--inh-caps=+net_admin",
        "--ambient-caps=+net_admin",
        "--bounding-set=-all,+net_admin",
    ];
    let (path, binary) = (file.clone(), program.clone());
    let mut child = world.in_namespace("edge", move || {
        std::process::Command::new(words[0])
            .args(&words[1..])
            .args(capability)
            .arg(binary)
            .arg(path)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap()
    });
    wait_until(|| Client::connect(&control).is_ok());
    let mut stream = echoing(&world);
    exchange(&mut stream, b"before");
    let mut client = Client::connect(&control).unwrap();
    // There and back: the way back needs a rule too.
    for to in ["b", "a"] {
        let warmth = client.prepare("desktop", to).unwrap();
        assert!(warmth.warnings.is_empty(), "{warmth:?}");
        world.place(None);
        stream.write_all(b"under way").unwrap();
        client.hold("desktop", LEASE).unwrap();
        assert_eq!(client.retarget("desktop").unwrap().connections, 1);
        world.place(Some(to));
        assert_eq!(
            client
                .release("desktop", Duration::ZERO)
                .unwrap()
                .connections,
            1
        );
        let mut answer = [0; 9];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"under way");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn an_end_that_is_lost_on_the_way_is_told_again() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut silent = echoing(&world);
    let mut speaking = echoing(&world);
    for stream in [&mut silent, &mut speaking] {
        exchange(stream, b"before");
    }
    let mut control = edge.client();
    world.place(None);
    // Unacknowledged: FIN_WAIT1, with and without data before it.
    silent.shutdown(std::net::Shutdown::Write).unwrap();
    speaking.write_all(b"last words").unwrap();
    speaking.shutdown(std::net::Shutdown::Write).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    for to in ["b", "a"] {
        control.prepare("desktop", to).unwrap();
        control.hold("desktop", LEASE).unwrap();
        assert_eq!(control.retarget("desktop").unwrap().failed, 0);
        // Only the last time the guest is there again.
        if to == "a" {
            world.place(Some(to));
        }
        assert_eq!(
            control.release("desktop", Duration::ZERO).unwrap().failed,
            0
        );
    }
    let mut rest = Vec::new();
    silent.read_to_end(&mut rest).unwrap();
    speaking.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"last words");
    wait_until(|| control.list().unwrap().connections.is_empty());
    wait_until(|| established(&world) == 0);
}

#[test]
fn killed_in_the_middle_nothing_is_left_behind() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let directory = std::env::temp_dir().join(format!("netproxy-kill-{}", world.ns("x")));
    std::fs::create_dir_all(&directory).unwrap();
    let control = directory.join("control");
    let file = directory.join("proxy.toml");
    std::fs::write(
        &file,
        configuration(&control.display().to_string(), "", false),
    )
    .unwrap();
    let rules = world.rules("edge");
    for steps in 0..4 {
        world.place(Some("a"));
        let mut child = start_program(&world, &file);
        let mut stream = echoing(&world);
        exchange(&mut stream, b"before");
        let mut client = Client::connect(&control).unwrap();
        let warmth = client.prepare("desktop", "b").unwrap();
        assert!(warmth.window, "{warmth:?}");
        assert_ne!(world.rules("edge"), rules, "A move has a routing rule");
        if steps > 0 {
            world.place(None);
            client.hold("desktop", LEASE).unwrap();
        }
        if steps > 1 {
            client.retarget("desktop").unwrap();
        }
        if steps > 2 {
            world.place(Some("b"));
            client.release("desktop", Duration::ZERO).unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        wait_until(|| world.rules("edge") == rules);
        let table = world.in_namespace("edge", || {
            world::run("ip", &["route", "show", "table", "all"])
        });
        assert!(!table.contains("initcwnd"), "{table}");
    }
    std::fs::remove_dir_all(&directory).unwrap();
}

/// Another program takes over between the moves, when some connections are not proved yet and old
/// sockets are kept still; during a move it may not.
#[test]
fn upgrades_between_moves() {
    let world = World::new(Duration::from_millis(8));
    serve(&world, 5900);
    let directory = std::env::temp_dir().join(format!("netproxy-upgrade-{}", world.ns("x")));
    std::fs::create_dir_all(&directory).unwrap();
    let control = directory.join("control");
    let file = directory.join("proxy.toml");
    let text = configuration(&control.display().to_string(), "", false);
    std::fs::write(&file, text).unwrap();
    let rules = world.rules("edge");
    let mut child = start_program(&world, &file);
    let streams: Vec<Running> = all_kinds()
        .into_iter()
        .map(|kind| start(&world, listen(), kind))
        .collect();
    let connect = || Client::connect(&control).unwrap();
    wait_until(|| connect().list().unwrap().connections.len() == streams.len());
    for round in 0..12 {
        let to = if round % 2 == 0 { "b" } else { "a" };
        let mut client = connect();
        client.prepare("desktop", to).unwrap();
        world.place(None);
        client.hold("desktop", LEASE).unwrap();
        let refused = client.upgrade().unwrap_err().to_string();
        assert!(refused.contains("desktop"), "{refused}");
        assert_eq!(client.retarget("desktop").unwrap().failed, 0);
        world.place(Some(to));
        let released = client.release("desktop", Duration::ZERO).unwrap();
        assert_eq!(released.failed, 0);
        client.upgrade().unwrap();
        assert_eq!(connect().list().unwrap().guests[0].site, to);
        std::thread::sleep(Duration::from_millis(40));
    }
    for stream in streams {
        assert!(stream.finish() > 0);
    }
    assert_eq!(world.rules("edge"), rules);
    child.kill().unwrap();
    child.wait().unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
}

/// On the way back soon after, sockets with the same addresses have to go first, and a rule stands
/// in for them. The program is killed while that rule is there.
#[test]
fn killed_while_sockets_are_replaced_nothing_is_left_behind() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let directory = std::env::temp_dir().join(format!("netproxy-kill-{}", world.ns("x")));
    std::fs::create_dir_all(&directory).unwrap();
    let write = |name: &str, text: &dyn Fn(&str) -> String| {
        let control = directory.join(format!("{name}.control"));
        let file = directory.join(format!("{name}.toml"));
        std::fs::write(&file, text(&control.display().to_string())).unwrap();
        (file, control)
    };
    // Another proxy on the same edge, with another guest, who lives with the client.
    let (other, _) = write("other", &|control| {
        format!(
            "version = 1\n[proxy]\ncontrol = {control:?}\nmark = 7\ntable = 7\n[[guest]]\n\
             name = \"other\"\naddress = \"10.1.0.2\"\nsite = \"a\"\n[guest.sites.a]\n\
             routed = true\n[[guest.service]]\nname = \"echo\"\n\
             listen = [\"10.1.0.1:5901\"]\nport = 7000\n"
        )
    });
    let listener = world.in_namespace("client", || {
        std::net::TcpListener::bind("10.1.0.2:7000").unwrap()
    });
    let mut bystander = start_program(&world, &other);
    let mut outer = world.in_namespace("client", || TcpStream::connect("10.1.0.1:5901").unwrap());
    let (mut inner, _) = listener.accept().unwrap();
    exchange_with(&mut outer, &mut inner, b"before");

    let (file, control) = write("proxy", &|control| configuration(control, "", false));
    let rules = world.rules("edge");
    for _ in 0..3 {
        world.place(Some("a"));
        let mut child = start_program(&world, &file);
        let mut streams = many_echoing(&world, 300);
        exchange_all(&mut streams, b"before");
        let mut client = Client::connect(&control).unwrap();
        client.prepare("desktop", "b").unwrap();
        world.place(None);
        client.hold("desktop", LEASE).unwrap();
        client.retarget("desktop").unwrap();
        world.place(Some("b"));
        client.release("desktop", Duration::ZERO).unwrap();
        exchange_all(&mut streams, b"there");
        client.prepare("desktop", "a").unwrap();
        world.place(None);
        client.hold("desktop", LEASE).unwrap();
        let replacing = std::thread::spawn(move || client.retarget("desktop"));
        wait_until_soon(|| world.rules("edge").contains("table inet netproxy_"));
        child.kill().unwrap();
        child.wait().unwrap();
        let _ = replacing.join().unwrap();
        wait_until(|| world.rules("edge") == rules);
        exchange_with(&mut outer, &mut inner, b"still there");
    }
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn a_guest_that_is_routed_keeps_its_address() {
    let world = World::new(Duration::from_millis(6));
    serve(&world, 5900);
    world.remove_translations();
    world.route_guest("a");
    let mut edge = Edge::with(&world, "", true);
    let rules = world.rules("edge");
    let kinds = all_kinds();
    streams_survive(
        &world,
        &mut edge,
        &[kinds[0], kinds[3], kinds[4], kinds[5]],
        30,
        21,
    );
    assert_eq!(world.rules("edge"), rules);
}

#[test]
fn one_that_can_not_be_moved_is_closed_alone() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "[limits]\ncarry = \"64KiB\"");
    let mut light = echoing(&world);
    let mut heavy = echoing(&world);
    exchange(&mut light, b"before");
    exchange(&mut heavy, b"before");
    let mut control = edge.client();
    control.prepare("desktop", "b").unwrap();
    world.place(None);
    control.hold("desktop", LEASE).unwrap();
    heavy.write_all(&[1; 200_000]).unwrap();
    wait_until(|| {
        control
            .list()
            .unwrap()
            .connections
            .iter()
            .any(|c| c.held > 100_000)
    });
    let tally = control.retarget("desktop").unwrap();
    assert_eq!((tally.connections, tally.failed), (1, 1));
    world.place(Some("b"));
    let tally = control.release("desktop", Duration::ZERO).unwrap();
    assert_eq!((tally.connections, tally.failed), (1, 1));
    exchange(&mut light, b"after");
    let error = heavy.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(edge.metric("netproxy_retarget_failures_total"), 1);
}

#[test]
fn a_guest_that_gives_up_during_a_move_is_seen_to() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let mut edge = Edge::new(&world, "");
    let mut stream = echoing(&world);
    exchange(&mut stream, b"before");
    let mut control = edge.client();
    control.prepare("desktop", "b").unwrap();
    world.place(None);
    control.hold("desktop", LEASE).unwrap();
    // The guest's end is gone, and nobody hears of it.
    world.in_namespace("guest", || world::run("ss", &["-K", "sport", "=", ":5900"]));
    control.retarget("desktop").unwrap();
    world.place(Some("b"));
    control.release("desktop", Duration::ZERO).unwrap();
    edge.at = "b";
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    // The next one is served, and moved.
    let mut next = echoing(&world);
    exchange(&mut next, b"next");
    edge.migrate(&world);
    exchange(&mut next, b"moved");
}

/// Two guests are under way at once, each at its own step; a third that stays notices nothing.
#[test]
fn several_guests_move_at_once() {
    const OTHER: &str = "10.1.0.1:5901";
    let world = World::new(Duration::from_millis(6));
    serve(&world, 5900);
    serve(&world, 5901);
    let control = std::env::temp_dir()
        .join(format!("netproxy-{}", world.ns("several")))
        .join("control");
    let mut text = configuration(&control.display().to_string(), "", false);
    let mut guest = |name: &str, address: &str, sites: &str, service: &str| {
        text.push_str(&format!(
            "[[guest]]\nname = {name:?}\naddress = {address:?}\nsite = \"a\"\n{sites}\
             [[guest.service]]\nname = \"x\"\n{service}\n"
        ));
    };
    let sites: String = SITES
        .iter()
        .map(|(site, address)| {
            format!("[guest.sites.{site}]\naddress = {address:?}\nprobe_port = {PROBE_PORT}\n")
        })
        .collect();
    guest(
        "other",
        GUEST,
        &format!("source = {EDGE:?}\n{sites}"),
        &format!("listen = [{OTHER:?}]\nport = 5901\nsite_port = 15901"),
    );
    guest(
        "still",
        "10.1.0.2",
        "[guest.sites.a]\nrouted = true\n",
        "listen = [\"10.1.0.1:5902\"]\nport = 7000",
    );
    for (site, address) in SITES {
        world.in_namespace(site, move || {
            let mut translation = world::translation(address);
            translation.guest = "other".into();
            translation.forwards[0].site_port = 15901;
            translation.forwards[0].guest_port = 5901;
            translation.apply().unwrap();
        });
    }
    let listener = world.in_namespace("client", || {
        std::net::TcpListener::bind("10.1.0.2:7000").unwrap()
    });
    let config = Config::parse(&text, "test").unwrap();
    let proxy = world.in_namespace("edge", move || Proxy::start(config, None).unwrap());
    let mut outer = world.in_namespace("client", || TcpStream::connect("10.1.0.1:5902").unwrap());
    let (mut inner, _) = listener.accept().unwrap();
    let kinds = all_kinds();
    let streams: Vec<Running> = [listen(), OTHER.parse().unwrap()]
        .iter()
        .flat_map(|to| [0, 3, 4].map(|kind| start(&world, *to, kinds[kind])))
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    let mut client = Client::connect(&control).unwrap();
    for round in 0..6 {
        let to = SITES[1 - round % 2].0;
        for guest in ["desktop", "other"] {
            client.prepare(guest, to).unwrap();
        }
        world.place(None);
        client.hold("desktop", LEASE).unwrap();
        exchange_with(&mut outer, &mut inner, b"one is held");
        client.hold("other", LEASE).unwrap();
        for guest in ["other", "desktop"] {
            let tally = client.retarget(guest).unwrap();
            assert_eq!((tally.connections, tally.failed), (3, 0), "{guest}");
        }
        let states: Vec<String> = client
            .list()
            .unwrap()
            .connections
            .into_iter()
            .filter(|connection| connection.guest == "still")
            .map(|connection| connection.state)
            .collect();
        assert_eq!(states, ["open"]);
        world.place(Some(to));
        assert_eq!(client.release("other", Duration::ZERO).unwrap().failed, 0);
        exchange_with(&mut outer, &mut inner, b"one is released");
        // The other one's turn may be much later.
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(client.release("desktop", Duration::ZERO).unwrap().failed, 0);
        std::thread::sleep(Duration::from_millis(100));
    }
    for stream in streams {
        assert!(stream.finish() > 0);
    }
    exchange_with(&mut outer, &mut inner, b"all the same");
    drop(proxy);
    std::fs::remove_dir_all(control.parent().unwrap()).unwrap();
}

/// After three seconds nobody waits for an answer any more.
const IMPATIENT: &str =
    "[limits]\nkeepalive = \"1s\"\nkeepalive_interval = \"1s\"\nkeepalive_probes = 2";

/// Neither an end nor a reset comes from a client whose line is cut during a move of its guest.
/// Whether something is on its way to it or not, it is given up, and the guest is told.
#[test]
fn a_client_that_vanishes_during_a_move_is_given_up() {
    for on_its_way in [false, true] {
        let world = World::new(Duration::from_millis(4));
        serve(&world, 5900);
        let edge = Edge::new(&world, IMPATIENT);
        let mut stream = echoing(&world);
        exchange(&mut stream, b"before");
        let mut control = edge.client();
        control.prepare("desktop", "b").unwrap();
        world.place(None);
        control.hold("desktop", LEASE).unwrap();
        if on_its_way {
            stream.write_all(b"an answer will come").unwrap();
            wait_until(|| control.list().unwrap().connections[0].held > 0);
        }
        world.ip("client", "link set c0 down");
        control.retarget("desktop").unwrap();
        if !on_its_way {
            // Given up while the guest can't be told.
            std::thread::sleep(Duration::from_secs(5));
        }
        assert_eq!(control.list().unwrap().connections.len(), 1);
        world.place(Some("b"));
        control.release("desktop", Duration::ZERO).unwrap();
        wait_until(|| control.list().unwrap().connections.is_empty());
        wait_until(|| established(&world) == 0);
    }
}

/// A guest that takes longer than keep-alive would wait for it is not taken for dead while it
/// moves; one that never comes is, and its client is told.
#[test]
fn a_guest_that_vanishes_during_a_move_is_given_up() {
    for comes in [true, false] {
        let world = World::new(Duration::from_millis(4));
        serve(&world, 5900);
        let edge = Edge::new(&world, IMPATIENT);
        let mut stream = echoing(&world);
        exchange(&mut stream, b"before");
        let mut control = edge.client();
        control.prepare("desktop", "b").unwrap();
        world.place(None);
        control.hold("desktop", LEASE).unwrap();
        control.retarget("desktop").unwrap();
        std::thread::sleep(Duration::from_secs(5));
        if comes {
            world.place(Some("b"));
        }
        control.release("desktop", Duration::ZERO).unwrap();
        if comes {
            exchange(&mut stream, b"after");
        } else {
            wait_until(|| control.list().unwrap().connections.is_empty());
            let error = stream.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
    }
}

/// Without any move. One that answers, and only does not read, may do so for longer.
#[test]
fn a_client_that_vanishes_does_not_hold_the_guest_for_ever() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, IMPATIENT);
    let mut slow = echoing(&world);
    slow.set_nonblocking(true).unwrap();
    let mut asked = 0;
    // Until every buffer on the way is full, there and back.
    wait_until(|| {
        let before = asked;
        while let Ok(length) = slow.write(&[1; 65_536]) {
            asked += length;
        }
        asked > 0 && asked == before
    });
    std::thread::sleep(Duration::from_secs(8));
    slow.set_nonblocking(false).unwrap();
    let mut answer = vec![0; asked];
    slow.read_exact(&mut answer).unwrap();
    exchange(&mut slow, b"still here");
    assert_eq!(established(&world), 1);
    world.ip("client", "link set c0 down");
    wait_until(|| edge.client().list().unwrap().connections.is_empty());
    wait_until(|| established(&world) == 0);
}

#[test]
fn a_smaller_path_mtu_at_the_new_site() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    world.ip("edge", "link set to-b mtu 1280");
    world.ip("b", "link set up0 mtu 1280");
    let mut edge = Edge::new(&world, "");
    let kinds = all_kinds();
    streams_survive(&world, &mut edge, &[kinds[0], kinds[1], kinds[2]], 4, 31);
    // One that was opened there goes on where the path is wider.
    let mut stream = echoing(&world);
    exchange(&mut stream, &[1; 10_000]);
    edge.migrate(&world);
    exchange(&mut stream, &[2; 10_000]);
}

/// The parts by themselves: one socket, IPv6, data in both queues.
#[test]
fn one_socket_is_made_anew_over_ipv6() {
    use netproxy::repair::{self, RestoreOptions};
    let world = World::new(Duration::ZERO);
    let listener = world.in_namespace("edge", || {
        std::net::TcpListener::bind("[fd00:1::1]:7000").unwrap()
    });
    let mut old = world.in_namespace("client", || TcpStream::connect("[fd00:1::1]:7000").unwrap());
    let (mut peer, _) = listener.accept().unwrap();
    exchange_with(&mut old, &mut peer, b"before");
    peer.write_all(b"unread").unwrap();
    wait_until(|| old.peek(&mut [0; 6]).unwrap() == 6);
    world.ip("edge", "link set e0 down");
    old.write_all(b"unacknowledged").unwrap();
    repair::freeze(&old).unwrap();
    let snapshot = repair::dump(&old).unwrap();
    assert_eq!(snapshot.receive, b"unread");
    assert_eq!(snapshot.send, b"unacknowledged");
    let clock = repair::clock(&old).unwrap();
    let remote = snapshot.remote;
    drop(old);
    let options = RestoreOptions {
        remote,
        mark: None,
        waiting: 0,
    };
    let state = snapshot.clone();
    let socket = world.in_namespace("client", move || {
        repair::restore(&state, options, clock).unwrap()
    });
    world.ip("edge", "link set e0 up");
    world.ip("edge", "-6 address replace fd00:1::1/64 dev e0 nodad");
    let mut new: TcpStream = socket.into();
    new.set_nonblocking(false).unwrap();
    repair::kick(&new).unwrap();
    new.write_all(&snapshot.send).unwrap();
    let mut got = [0; 14];
    peer.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"unacknowledged");
    exchange_with(&mut new, &mut peer, b"after");
    // Closed in repair mode, the peer sees nothing.
    repair::silence(&new).unwrap();
    drop(new);
    peer.set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let error = peer.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
}

fn exchange_with(one: &mut TcpStream, two: &mut TcpStream, text: &[u8]) {
    let mut got = vec![0; text.len()];
    one.write_all(text).unwrap();
    two.read_exact(&mut got).unwrap();
    assert_eq!(got, text);
    two.write_all(text).unwrap();
    one.read_exact(&mut got).unwrap();
    assert_eq!(got, text);
}
