//! The steps of a move, in order and out of it, and what each leaves behind.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use netproxy::Proxy;
use netproxy::config::Config;
use netproxy::control::Client;
use netproxy::retarget::phase::Phase;

use crate::edge::{
    Edge, LEASE, both_ends, configuration, echoing, established, exchange, exchange_all,
    exchange_with, guest_listens, hears, listen, many_echoing, wait_until,
};
use crate::streams::{all_kinds, one_of_each};
use crate::traffic::{Running, serve, start};
use crate::world;
use crate::world::{EDGE, GUEST, PROBE_PORT, SITES, World};

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
    let streams = one_of_each(&world, &all_kinds());
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
    wait_until(|| world.rules("edge") == rules);
    assert_eq!(edge.metric("netproxy_retargets_total"), 0);
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
    wait_until(|| control.list().unwrap().connections.len() == 6);
    world.place(Some("b"));
    let tally = control.release("desktop", Duration::ZERO).unwrap();
    assert_eq!((tally.connections, tally.waiting, tally.failed), (4, 2, 0));
    hears(&mut stays, b"while held");
    hears(&mut early, b"early");
    hears(&mut late, b"late");
    let mut rest = Vec::new();
    ends.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"last words");
    exchange(&mut stays, b"after");
    // Those who left are gone at both ends.
    wait_until(|| control.list().unwrap().connections.len() == 3);
    wait_until(|| established(&world) == 3);
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
    // A list does not wait for it, and does not show the guest as if nobody moved it.
    let guest = control.list().unwrap().guests.remove(0);
    let phase = Phase::Retargeted { to: "b".into() };
    assert_eq!(guest.phase, phase);
    world.place(Some("b"));
    assert_eq!(release.join().unwrap().connections, 20);
    for stream in &mut streams {
        hears(stream, b"held");
    }
}

#[test]
fn what_a_move_has_written_again_counts_once() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut stream = echoing(&world);
    let mut control = edge.client();
    let mut sent = 8;
    for to in ["b", "a", "b"] {
        exchange(&mut stream, b"before");
        control.prepare("desktop", to).unwrap();
        world.place(None);
        // Under way at the hold: the guest gets it by the new socket.
        stream.write_all(&[7; 10_000]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        control.hold("desktop", LEASE).unwrap();
        control.retarget("desktop").unwrap();
        world.place(Some(to));
        control.release("desktop", Duration::ZERO).unwrap();
        let mut answer = vec![0; 10_000];
        stream.read_exact(&mut answer).unwrap();
        sent += 10_006;
    }
    assert_eq!(control.list().unwrap().connections[0].to_guest, sent);
    assert_eq!(edge.metric("netproxy_to_guest_bytes_total"), sent);
}

/// Longer than the threads have for a step that waits for nobody.
#[test]
#[ignore = "minutes: make test-full"]
fn a_release_waits_for_as_long_as_it_is_asked_to() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut stream = echoing(&world);
    exchange(&mut stream, b"before");
    let mut control = edge.client();
    control.set_patience(Duration::from_secs(120)).unwrap();
    control.prepare("desktop", "b").unwrap();
    world.place(None);
    control.hold("desktop", LEASE).unwrap();
    control.retarget("desktop").unwrap();
    let release = std::thread::spawn(move || control.release("desktop", Duration::from_secs(90)));
    std::thread::sleep(Duration::from_secs(63));
    assert!(!release.is_finished(), "Nobody has answered yet");
    world.place(Some("b"));
    assert_eq!(release.join().unwrap().unwrap().connections, 1);
    exchange(&mut stream, b"after");
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

/// All has been said, and the guest's last acknowledgement comes just before the freeze: there is
/// nothing left to be moved, and nothing has failed.
#[test]
fn a_connection_that_ends_while_its_guest_is_held() {
    // So the grace is long; what comes in it comes sooner.
    let world = World::new(Duration::from_millis(400));
    let listener = guest_listens(&world);
    let edge = Edge::new(&world, "grace = \"2s\"");
    let mut pairs = both_ends(&world, &listener, 2);
    let (mut ends, guest) = pairs.remove(0);
    let (mut stays, mut inner) = pairs.remove(0);
    let mut control = edge.client();
    control.prepare("desktop", "b").unwrap();
    guest.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(ends.read(&mut [0]).unwrap(), 0);
    world.wires[0].delay_us.store(60_000, Ordering::Relaxed);
    ends.shutdown(std::net::Shutdown::Write).unwrap();
    let mut lists = edge.client();
    let mut closing = || {
        let all = lists.list().unwrap().connections;
        all.len() < 2 || all.iter().any(|connection| connection.state == "closing")
    };
    while !closing() {}
    control.hold("desktop", LEASE).unwrap();
    world.place(None);
    let tally = control.retarget("desktop").unwrap();
    assert_eq!((tally.connections, tally.failed), (1, 0));
    world.place(Some("b"));
    let tally = control.release("desktop", Duration::ZERO).unwrap();
    assert_eq!((tally.connections, tally.failed), (1, 0));
    exchange_with(&mut stays, &mut inner, b"after");
    assert_eq!(control.list().unwrap().connections.len(), 1);
    assert_eq!(edge.metric("netproxy_retarget_failures_total"), 0);
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

/// A move that is given up: who has gone by itself has not failed, and nobody stalled.
#[test]
fn a_client_that_resets_while_its_guest_is_held() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut stays = echoing(&world);
    let mut resets = echoing(&world);
    for stream in [&mut stays, &mut resets] {
        exchange(stream, b"before");
    }
    let mut control = edge.client();
    control.prepare("desktop", "b").unwrap();
    world.place(None);
    control.hold("desktop", LEASE).unwrap();
    socket2::SockRef::from(&resets)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(resets);
    // The proxy hears of it.
    std::thread::sleep(Duration::from_millis(50));
    world.place(Some("a"));
    assert_eq!(control.cancel("desktop").unwrap().failed, 0);
    exchange(&mut stays, b"as ever");
    wait_until(|| control.list().unwrap().connections.len() == 1);
    wait_until(|| established(&world) == 1);
    assert_eq!(edge.metric("netproxy_retarget_failures_total"), 0);
    assert_eq!(edge.metric("netproxy_stall_seconds_count"), 0);
}

/// It closes with something unread, which is a reset. What it had said before reaches the guest
/// when that can be told, wherever it is.
#[test]
fn last_words_of_a_client_that_resets_while_its_guest_is_held() {
    let world = World::new(Duration::from_millis(4));
    let listener = guest_listens(&world);
    let edge = Edge::new(&world, "");
    let mut control = edge.client();
    for goes in [true, false] {
        let at = control.list().unwrap().guests[0].site.clone();
        let (mut client, mut guest) = both_ends(&world, &listener, 1).remove(0);
        guest.write_all(b"unread").unwrap();
        wait_until(|| client.peek(&mut [0; 6]).unwrap() == 6);
        let to = if at == "a" { "b" } else { "a" };
        control.prepare("desktop", to).unwrap();
        world.place(None);
        control.hold("desktop", LEASE).unwrap();
        client.write_all(b"last words").unwrap();
        drop(client);
        // The proxy hears of it.
        std::thread::sleep(Duration::from_millis(50));
        control.retarget("desktop").unwrap();
        if goes {
            world.place(Some(to));
            control.release("desktop", Duration::ZERO).unwrap();
        } else {
            world.place(Some(&at));
            control.cancel("desktop").unwrap();
        }
        hears(&mut guest, b"last words");
        let error = guest.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        wait_until(|| control.list().unwrap().connections.is_empty());
    }
    assert_eq!(edge.metric("netproxy_retarget_failures_total"), 0);
}

/// The guest is out of reach for longer than last words may take. Their time begins again when it
/// can be told.
#[test]
fn last_words_have_their_time_after_the_move() {
    let world = World::new(Duration::from_millis(4));
    let listener = guest_listens(&world);
    let edge = Edge::new(&world, "[limits]\nlinger = \"1s\"");
    let (mut client, mut guest) = both_ends(&world, &listener, 1).remove(0);
    let mut control = edge.client();
    control.prepare("desktop", "b").unwrap();
    world.place(None);
    let words = vec![7; 200_000];
    client.write_all(&words).unwrap();
    let to_guest = || {
        let connection = edge.client().list().unwrap().connections.remove(0);
        connection.to_guest + connection.held
    };
    wait_until(|| to_guest() >= words.len() as u64);
    socket2::SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(client);
    wait_until(|| control.list().unwrap().connections[0].state == "closing");
    control.hold("desktop", LEASE).unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(control.retarget("desktop").unwrap().connections, 1);
    world.place(Some("b"));
    assert_eq!(
        control.release("desktop", Duration::ZERO).unwrap().failed,
        0
    );
    let mut heard = vec![0; words.len()];
    guest.read_exact(&mut heard).unwrap();
    assert!(heard == words);
    let error = guest.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    wait_until(|| control.list().unwrap().connections.is_empty());
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
    // As a program has one that is just being started.
    let _copy = old.try_clone().unwrap();
    repair::vacate(&old).unwrap();
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
