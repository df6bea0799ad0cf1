//! Whoever moves a guest: dies, is cut off, comes too late, or calls from another host.

use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use netproxy::control::{Client, Move};

use crate::edge::{
    Edge, LEASE, both_ends, echoing, exchange, exchange_with, guest_listens, hears, wait_until,
};
use crate::streams::{all_kinds, one_of_each};
use crate::traffic::serve;
use crate::world;
use crate::world::{SITES, World};

/// How long a step may take.
const WITHIN: Duration = Duration::from_secs(20);

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
    let streams = one_of_each(&world, &all_kinds());
    wait_until(|| edge.client().list().unwrap().connections.len() == streams.len());
    for steps in 0..3 {
        if steps > 0 {
            world.place(None);
        }
        let mut caller = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "callers::be_a_caller",
                "--ignored",
                "--nocapture",
            ])
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
        // What is only prepared holds nothing that could go back.
        let cancelled = || edge.metric("netproxy_retargets_cancelled_total");
        match steps {
            0 => assert_eq!(cancelled(), 0),
            _ => wait_until(|| cancelled() == steps as u64 * streams.len() as u64),
        }
    }
    assert_eq!(edge.client().list().unwrap().guests[0].site, "a");
    for stream in streams {
        assert!(stream.finish() > 0);
    }
    assert_eq!(edge.metric("netproxy_leases_ended_total"), 3);
    assert_eq!(edge.metric("netproxy_retargets_total"), 0);
    wait_until(|| world.rules("edge") == rules);
}

/// Whether the caller's host is cut off, so that its connection stays open, or it just forgets.
#[test]
fn a_hold_whose_time_is_over_is_given_up() {
    let short = Duration::from_secs(1);
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

/// Where the guest did not come to, and nothing translates any more, the site's host answers for
/// itself, with resets: they are not the guest's.
#[test]
fn a_site_that_refuses_sends_the_guest_back() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut streams: Vec<_> = (0..3).map(|_| echoing(&world)).collect();
    for stream in &mut streams {
        exchange(stream, b"before");
    }
    let (_, address) = SITES[1];
    world.in_namespace("b", move || world::translation(address).remove().unwrap());
    let mut control = edge.client();
    control.prepare("desktop", "b").unwrap();
    control.hold("desktop", LEASE).unwrap();
    assert_eq!(control.retarget("desktop").unwrap().connections, 3);
    control
        .renew("desktop", Duration::from_millis(200))
        .unwrap();
    wait_until(|| {
        let guest = edge.client().list().unwrap().guests.remove(0);
        guest.phase.destination().is_none()
    });
    for stream in &mut streams {
        exchange(stream, b"as ever");
    }
    assert_eq!(edge.client().list().unwrap().guests[0].site, "a");
}

/// Who has taken a move's steps up to its release, with something of the client's under way.
fn retargeted(world: &World, edge: &Edge, stream: &mut TcpStream) -> Client {
    let mut caller = edge.client();
    caller.prepare_tied("desktop", "b").unwrap();
    world.place(None);
    caller.hold_tied("desktop", LEASE).unwrap();
    stream.write_all(b"under way").unwrap();
    caller.retarget("desktop").unwrap();
    caller
}

/// The caller dies after the guest has started at the new site: it is there that it answers.
#[test]
fn a_guest_that_answers_at_the_new_site_is_not_sent_back() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut stream = echoing(&world);
    exchange(&mut stream, b"before");
    let caller = retargeted(&world, &edge, &mut stream);
    world.place(Some("b"));
    drop(caller);
    hears(&mut stream, b"under way");
    wait_until(|| edge.client().list().unwrap().guests[0].site == "b");
    exchange(&mut echoing(&world), b"new");
}

/// A routed guest has one address at both sites, so that it answers says nothing of where it is. The
/// caller dies before it is settled; then the guest stays, or comes to the new site all the same.
#[test]
fn a_routed_guest_is_where_it_was_until_somebody_has_it() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    world.remove_translations();
    world.route_guest("a");
    let edge = Edge::with(&world, "", true);
    let mut stream = echoing(&world);
    exchange(&mut stream, b"before");
    let at = || {
        let guest = edge.client().list().unwrap().guests.remove(0);
        (guest.site, guest.phase.destination().is_some())
    };
    for runs_at in ["a", "b"] {
        let caller = retargeted(&world, &edge, &mut stream);
        world.route_guest(runs_at);
        world.place(Some(runs_at));
        drop(caller);
        hears(&mut stream, b"under way");
        wait_until(|| !at().1);
        assert_eq!(at().0, "a");
        exchange(&mut stream, b"as ever");
        edge.client().arrived("desktop", runs_at).unwrap();
        assert_eq!(at(), (runs_at.to_owned(), false));
        exchange(&mut stream, b"after");
    }
}

/// As `vmshadow` does it, and from another host: through a program that leads to the socket.
#[test]
fn a_move_is_driven_from_another_host() {
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
    let (mut there, warmth) = Move::prepare(connect(), "desktop", "b", WITHIN).unwrap();
    assert!(warmth.warnings.is_empty(), "{warmth:?}");
    assert_eq!((there.guest(), there.site()), ("desktop", "b"));
    world.place(None);
    stream.write_all(b"under way").unwrap();
    there.hold(WITHIN).unwrap();
    assert_eq!(there.retarget(WITHIN).unwrap().connections, 1);
    world.place(Some("b"));
    assert_eq!(there.release(Duration::ZERO, WITHIN).unwrap().failed, 0);
    hears(&mut stream, b"under way");
    assert_eq!(at(), ("b".into(), false));
    // Back on purpose, and by being dropped.
    for purpose in [true, false] {
        let (mut given_up, _) = Move::prepare(connect(), "desktop", "a", WITHIN).unwrap();
        given_up.hold(WITHIN).unwrap();
        if purpose {
            given_up.back(WITHIN).unwrap();
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
        WITHIN,
    );
    assert!(
        matches!(error, Err(netproxy::Error::Protocol(_))),
        "{error:?}"
    );
}

/// A client's connection that works, and the move that is prepared for it; its guest has just left.
fn leaving(world: &World, edge: &Edge) -> (TcpStream, Move) {
    let mut stream = echoing(world);
    exchange(&mut stream, b"before");
    let (moving, _) = Move::prepare(edge.client(), "desktop", "b", WITHIN).unwrap();
    world.place(None);
    (stream, moving)
}

#[test]
fn an_answer_that_comes_too_late_is_nobodys() {
    let world = World::new(Duration::from_millis(200));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let (mut stream, mut moving) = leaving(&world, &edge);
    // The freeze waits until all that the guest had sent is in.
    let error = moving.hold(Duration::from_millis(10)).unwrap_err();
    assert!(matches!(error, netproxy::Error::Timeout), "{error}");
    let error = moving.retarget(WITHIN).unwrap_err();
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
        hears(&mut stream, b"under way");
        let guest = control.list().unwrap().guests.remove(0);
        assert_eq!((guest.site.as_str(), guest.phase.destination()), (to, None));
    }
    for (guest, site) in [("nobody", "a"), ("desktop", "nowhere")] {
        let error = control.arrived(guest, site).unwrap_err();
        assert!(matches!(error, netproxy::Error::Refused(_)), "{error}");
    }
}

/// It goes on from where it is: its connections don't go back to be made anew once more.
#[test]
fn a_held_guest_that_arrived_is_not_taken_back_first() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let (mut stream, mut moving) = leaving(&world, &edge);
    moving.hold(WITHIN).unwrap();
    stream.write_all(b"under way").unwrap();
    world.place(Some("b"));
    let tally = edge.client().arrived("desktop", "b").unwrap();
    assert_eq!((tally.connections, tally.failed), (1, 0));
    hears(&mut stream, b"under way");
    // Whoever held it comes too late, and its end ends nothing.
    assert!(moving.retarget(WITHIN).is_err());
    drop(moving);
    exchange(&mut stream, b"after");
    assert_eq!(edge.client().list().unwrap().guests[0].site, "b");
    assert_eq!(edge.metric("netproxy_retargets_total"), 1);
    assert_eq!(edge.metric("netproxy_retargets_cancelled_total"), 0);
}

/// The move was given up, and the guest comes to the new site all the same. What it says there
/// before the proxy is told of it is lost, and no more than that.
#[test]
fn a_guest_that_comes_after_its_move_was_given_up_is_followed() {
    let world = World::new(Duration::from_millis(4));
    let listener = guest_listens(&world);
    let edge = Edge::new(&world, "");
    let mut pairs = both_ends(&world, &listener, 5);
    let mut control = edge.client();
    for to in ["b", "a", "b"] {
        control.prepare("desktop", to).unwrap();
        world.place(None);
        control.hold("desktop", LEASE).unwrap();
        assert_eq!(control.retarget("desktop").unwrap().failed, 0);
        assert_eq!(control.cancel("desktop").unwrap().failed, 0);
        world.place(Some(to));
        for (_, guest) in &mut pairs {
            guest.write_all(b"first").unwrap();
        }
        // Time for an answer, were there any.
        std::thread::sleep(Duration::from_millis(100));
        let tally = control.arrived("desktop", to).unwrap();
        assert_eq!((tally.connections, tally.failed), (pairs.len(), 0));
        for (client, guest) in &mut pairs {
            hears(client, b"first");
            exchange_with(client, guest, b"after");
        }
    }
}

/// Whoever prepares a move last goes on with it: another one, who would go on towards another
/// site, is refused.
#[test]
fn a_move_is_its_callers() {
    let world = World::new(Duration::from_millis(6));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut stream = echoing(&world);
    exchange(&mut stream, b"before");
    let (mut first, _) = Move::prepare(edge.client(), "desktop", "a", WITHIN).unwrap();
    let (mut second, _) = Move::prepare(edge.client(), "desktop", "b", WITHIN).unwrap();
    // One that is tied to nobody takes nobody's place.
    let refused = edge.client().prepare("desktop", "a").unwrap_err();
    assert!(refused.to_string().contains("another caller"), "{refused}");
    let library = edge.proxy.as_ref().unwrap().prepare("desktop", "a");
    assert!(matches!(library, Err(netproxy::Error::Another(_))));
    world.place(None);
    let refused = first.hold(WITHIN).unwrap_err().to_string();
    assert!(refused.contains("another caller"), "{refused}");
    second.hold(WITHIN).unwrap();
    let mut stranger = edge.client();
    for refused in [
        first.retarget(WITHIN).unwrap_err(),
        stranger.retarget("desktop").unwrap_err(),
        stranger.release("desktop", Duration::ZERO).unwrap_err(),
        stranger.renew("desktop", WITHIN).unwrap_err(),
    ] {
        assert!(refused.to_string().contains("another caller"), "{refused}");
    }
    second.renew(WITHIN).unwrap();
    // One who gives up what is no longer its own ends nothing.
    drop(first);
    assert_eq!(second.retarget(WITHIN).unwrap().connections, 1);
    world.place(Some("b"));
    assert_eq!(second.release(Duration::ZERO, WITHIN).unwrap().failed, 0);
    exchange(&mut stream, b"after");
    assert_eq!(edge.client().list().unwrap().guests[0].site, "b");
}
