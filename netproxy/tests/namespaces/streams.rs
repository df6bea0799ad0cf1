//! Streams of every kind whose guest moves at random moments: byte for byte the same.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::edge::{
    Edge, LEASE, both_ends, echoing, exchange, exchange_all, guest_listens, hears, listen,
    many_echoing, wait_until,
};
use crate::traffic::{Kind, Noise, Reads, Running, Sends, serve, start};
use crate::world::{SITES, World, run};

/// Starts a stream of each of the kinds.
pub fn one_of_each(world: &World, kinds: &[Kind]) -> Vec<Running> {
    kinds
        .iter()
        .map(|kind| start(world, listen(), *kind))
        .collect()
}

/// Moves the guest `times` at random moments while streams of the kinds run, and compares.
pub fn streams_survive(world: &World, edge: &mut Edge, kinds: &[Kind], times: usize, seed: u64) {
    let streams = one_of_each(world, kinds);
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

pub const FAST: Reads = Reads::Fast;

pub fn all_kinds() -> Vec<Kind> {
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
            hears(stream, text.as_bytes());
        }
        exchange_all(&mut streams, b"after");
    }
    assert_eq!(edge.metric("netproxy_retargets_total"), 4000);
    assert_eq!(edge.metric("netproxy_retarget_failures_total"), 0);
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

/// No permanent entry leads to the guest, and the first question for its address is lost, as is its
/// own for the gateway: the kernel asks again a second later.
#[test]
fn lost_questions_for_addresses_cost_only_time() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let mut edge = Edge::new(&world, "");
    let kinds = all_kinds();
    let streams: Vec<Running> = [kinds[0], kinds[3], kinds[4], kinds[5]]
        .iter()
        .map(|kind| start(&world, listen(), *kind))
        .collect();
    for (site, _) in SITES {
        world.forget_neighbours(site);
    }
    for round in 0..4 {
        let to = SITES[1 - round % 2].0;
        let mut control = edge.client();
        control.prepare("desktop", to).unwrap();
        world.place(None);
        control.hold("desktop", LEASE).unwrap();
        control.retarget("desktop").unwrap();
        for (place, device) in [("a", "lan0"), ("b", "lan0"), ("guest", "g0")] {
            world.ip(place, &format!("neigh flush dev {device} nud all"));
        }
        assert_eq!(
            control.release("desktop", Duration::ZERO).unwrap().failed,
            0
        );
        std::thread::sleep(Duration::from_millis(50));
        world.place(Some(to));
        edge.at = to;
        std::thread::sleep(Duration::from_millis(1500));
    }
    for stream in streams {
        assert!(stream.finish() > 0);
    }
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
    wait_until(|| world.rules("edge") == rules);
}

/// Between preparing and releasing the way to its address changes: nothing goes the old one.
#[test]
fn a_guest_that_is_routed_is_followed_to_its_new_way() {
    let world = World::new(Duration::from_millis(6));
    serve(&world, 5900);
    world.remove_translations();
    world.route_guest("a");
    let edge = Edge::with(&world, "", true);
    let mut stream = echoing(&world);
    exchange(&mut stream, b"before");
    let mut control = edge.client();
    control.prepare("desktop", "b").unwrap();
    world.place(None);
    control.hold("desktop", LEASE).unwrap();
    world.route_guest("b");
    control.retarget("desktop").unwrap();
    world.place(Some("b"));
    std::thread::sleep(Duration::from_millis(50));
    let old_way = || world.wires[0].passed.load(Ordering::Relaxed);
    let before = old_way();
    control.release("desktop", Duration::ZERO).unwrap();
    exchange(&mut stream, b"after");
    assert_eq!(old_way(), before);
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

/// The largest receive buffer towards the guest, in bytes.
fn largest_receive_buffer(world: &World) -> u64 {
    let edge = world.ns("edge");
    let filter = "dport = :15900";
    let said = run("ip", &["netns", "exec", &edge, "ss", "-tmnH", filter]);
    // skmem:(r0,rb131072,t0,...)
    let sizes = said
        .split([',', '('])
        .filter_map(|part| part.strip_prefix("rb"));
    sizes.map(|size| size.parse().unwrap()).max().unwrap()
}

/// What a guest was offered has room in a socket that is made anew. If that made the room larger,
/// and the room what it is offered next, some moves later one connection would have it all.
#[test]
fn no_buffer_grows_with_each_move() {
    const LARGEST: u64 = 1 << 20;
    let world = World::new(Duration::from_millis(6));
    world.sysctl("edge", "tcp_rmem", "4096 131072 1048576");
    serve(&world, 5900);
    let mut edge = Edge::new(&world, "");
    let kind = Kind {
        client: (Sends::Nothing, FAST),
        guest: (Sends::Bulk, FAST),
    };
    let stream = start(&world, listen(), kind);
    for _ in 0..12 {
        stream.goes_on();
        std::thread::sleep(Duration::from_millis(150));
        assert_eq!(edge.migrate(&world).connections, 1);
        let largest = largest_receive_buffer(&world);
        assert!(largest <= LARGEST, "{largest}");
    }
    assert!(stream.finish() > 0);
}

/// What a client has not read is taken out of the old socket once, and its client has it while the
/// guest is held. A move that is given up offers the guest no more for it.
#[test]
fn what_a_client_has_not_read_is_taken_along_once() {
    let world = World::new(Duration::from_millis(2));
    world.sysctl("edge", "tcp_rmem", "4096 131072 1048576");
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    // Everything comes back, until nothing has room for it any more.
    let mut stream = echoing(&world);
    stream.set_nonblocking(true).unwrap();
    let text: Vec<u8> = (0..1 << 20).map(|at: u32| (at % 251) as u8).collect();
    let (mut written, mut full) = (0, 0);
    while full < 100 {
        match stream.write(&text[written % text.len()..]) {
            Ok(length) => (written, full) = (written + length, 0),
            Err(_) => full += 1,
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut control = edge.client();
    let held =
        |control: &mut netproxy::control::Client| control.list().unwrap().connections[0].held;
    let before = held(&mut control);
    let mut after = Vec::new();
    for _ in 0..8 {
        control.prepare("desktop", "b").unwrap();
        world.place(None);
        control.hold("desktop", LEASE).unwrap();
        assert_eq!(control.retarget("desktop").unwrap().failed, 0);
        after.push(held(&mut control) - before);
        world.place(Some("a"));
        assert_eq!(control.cancel("desktop").unwrap().failed, 0);
        std::thread::sleep(Duration::from_millis(100));
    }
    // All of one receive buffer, at once, and of no second one.
    assert!(after[0] > 200_000, "{after:?}");
    assert!(after.iter().all(|more| *more < 2 << 20), "{after:?}");

    stream.set_nonblocking(false).unwrap();
    let (mut read, mut buffer) = (0, vec![0; 65_536]);
    while read < written {
        let length = stream.read(&mut buffer).unwrap();
        assert!(length > 0);
        for byte in &buffer[..length] {
            assert_eq!(*byte, text[read % text.len()], "byte {read} of {written}");
            read += 1;
        }
    }
}

#[test]
fn what_is_behind_an_urgent_byte_is_taken_along() {
    let world = World::new(Duration::from_millis(2));
    // The guest's bytes wait in the edge's socket, and nowhere else.
    world.sysctl("client", "tcp_rmem", "4096 8192 8192");
    world.sysctl("edge", "tcp_wmem", "4096 8192 8192");
    world.sysctl("edge", "tcp_rmem", "4096 2097152 4194304");
    let listener = guest_listens(&world);
    let mut edge = Edge::new(&world, "[limits]\nbuffer = \"64KiB\"");
    let mut pairs = both_ends(&world, &listener, 1);
    let (client, guest) = &mut pairs[0];
    let text: Vec<u8> = (0..600_000_u32).map(|at| (at % 251) as u8).collect();
    let (before, behind) = text.split_at(400_000);
    guest.write_all(before).unwrap();
    socket2::SockRef::from(&*guest)
        .send_out_of_band(b"!")
        .unwrap();
    guest.write_all(behind).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    edge.migrate(&world);
    let mut heard = vec![0; text.len()];
    client.read_exact(&mut heard).unwrap();
    assert!(heard == text);
}
