//! A thousand moves at random moments, with whatever can go wrong in them.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use netproxy::control::Client;

use crate::edge::{Edge, LEASE, wait_until};
use crate::streams::{all_kinds, one_of_each};
use crate::traffic::{Noise, Running, serve};
use crate::world::{SITES, World};

/// After so many moves every stream is seen to go on.
const BREATH: u64 = 20;

/// What one round was to be, and became.
#[derive(Debug, Default)]
struct Tale {
    moves: u64,
    cancelled: u64,
    late: u64,
    lossy: u64,
}

/// Takes the guest to the other site, or gives that up on the way. Returns whether it is there.
fn one_move(
    world: &World,
    control: &mut Client,
    sites: (&str, &str),
    dice: &mut Noise,
    tale: &mut Tale,
) -> bool {
    let (from, to) = sites;
    let lossy = dice.below(8) == 0;
    tale.lossy += u64::from(lossy);
    for wire in &world.wires {
        wire.loss
            .store(if lossy { 10 } else { 0 }, Ordering::Relaxed);
        wire.delay_us
            .store(500 + dice.below(6000), Ordering::Relaxed);
    }
    // Of ten moves, three are given up: before the hold, before and after the new sockets are made.
    let given_up = dice.below(10);
    control.prepare("desktop", to).unwrap();
    if given_up > 0 {
        world.place(None);
        control.hold("desktop", LEASE).unwrap();
    }
    if given_up > 1 {
        assert_eq!(control.retarget("desktop").unwrap().failed, 0);
    }
    std::thread::sleep(Duration::from_millis(dice.below(30)));
    if given_up < 3 {
        world.place(Some(from));
        assert_eq!(control.cancel("desktop").unwrap().failed, 0);
        tale.cancelled += 1;
        return false;
    }
    let late = dice.below(8) == 0;
    if !late {
        world.place(Some(to));
    }
    let released = control.release("desktop", Duration::ZERO).unwrap();
    assert_eq!(released.failed, 0);
    if late {
        // Its interface was not connected yet: the first to be sent is lost.
        std::thread::sleep(Duration::from_millis(dice.below(60)));
        world.place(Some(to));
        tale.late += 1;
    }
    tale.moves += 1;
    true
}

/// Every kind of stream, byte for byte the same after all of it.
#[test]
#[ignore = "minutes: make test-full"]
fn a_thousand_random_moves() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let rules = world.rules("edge");
    let streams = one_of_each(&world, &all_kinds());
    let mut control = edge.client();
    let (mut dice, mut tale) = (Noise::new(41), Tale::default());
    let (mut at, begin) = (0, Instant::now());
    while tale.moves < 1000 {
        std::thread::sleep(Duration::from_millis(dice.below(60)));
        let sites = (SITES[at].0, SITES[1 - at].0);
        if one_move(&world, &mut control, sites, &mut dice, &mut tale) {
            at = 1 - at;
            if tale.moves % BREATH == 0 {
                streams.iter().for_each(Running::goes_on);
            }
        }
        let guest = control.list().unwrap().guests.remove(0);
        assert_eq!(
            (guest.site.as_str(), guest.phase.destination()),
            (SITES[at].0, None)
        );
    }
    for wire in &world.wires {
        wire.loss.store(0, Ordering::Relaxed);
    }
    let carried: u64 = streams.into_iter().map(Running::finish).sum();
    println!(
        "{tale:?} in {:.0} s, {} MB",
        begin.elapsed().as_secs_f64(),
        carried / 1_000_000
    );
    assert!(carried > 0);
    assert_eq!(edge.metric("netproxy_retarget_failures_total"), 0);
    wait_until(|| world.rules("edge") == rules);
}
