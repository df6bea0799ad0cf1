//! Clients and guests that vanish, in the middle of a move and without one.

use std::io::{Read, Write};
use std::time::Duration;

use crate::edge::{Edge, LEASE, echoing, established, exchange, wait_until};
use crate::traffic::serve;
use crate::world;
use crate::world::World;

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
