//! A dry run counts what the destination has already.

use migrate::group::Group;
use migrate::guest::replay::{
    Call, Crossing, Foretold, Guest, Memory, Shape, cross, foretell, pair,
};

use crate::scene::{Place, Scene, at_call, leave_shadow, pool};

/// Bytes a second.
const RATE: u64 = 5_000_000;

fn scene() -> Scene {
    Scene::with(Guest::idle("g1", Memory::of(pool().to_vec())))
}

fn told(scene: &Scene) -> Foretold {
    let (near, far, _cut) = pair(Shape::default());
    let told = foretell(&scene.near, &scene.far, (near, far), RATE).unwrap();
    // Nothing has happened.
    assert!(scene.near.runs() && !scene.far.has_any());
    told
}

fn bytes(told: &Foretold) -> u64 {
    told.predicted.unwrap().bytes
}

#[test]
fn what_the_guest_left_there_is_counted() {
    let scene = scene();
    let first = told(&scene);
    assert_eq!((first.recalled, first.memory.same), (0, 0));
    let crossed = scene.moves(Crossing::default()).report.unwrap();
    let right = bytes(&first) / 2..bytes(&first) * 2;
    assert!(
        right.contains(&crossed.wire_bytes),
        "{first:?}, {crossed:?}"
    );

    let back = scene.turned();
    let second = told(&back);
    assert_eq!(second.recalled, pool().len() as u64);
    assert!(
        second.memory.same > second.memory.sampled * 9 / 10,
        "{second:?}"
    );
    assert!(bytes(&second) < bytes(&first) / 10, "{second:?}");
    // Its shadow is there still.
    let crossed = back.moves(Crossing::default()).report.unwrap();
    assert_eq!(crossed.recalled, second.recalled);
}

/// Of a guest that has never moved, and whatever the source keeps of those that leave.
#[test]
fn what_arrived_of_a_first_move_that_broke_is_counted() {
    for keep in [true, false] {
        let scene = scene();
        let (near, far, cut) = pair(Shape::default());
        let crossing = Crossing {
            keep,
            at_destination: at_call(Call::Complete, 1, move || cut.cut()),
            ..Crossing::default()
        };
        let crossed = cross(&scene.near, &scene.far, (near, far), crossing).unwrap();
        assert_eq!(scene.settled(&crossed), Place::Source);
        let again = told(&scene);
        assert_eq!(again.recalled, pool().len() as u64);
        let crossed = scene.moves(Crossing::default()).report.unwrap();
        assert_eq!(crossed.recalled, again.recalled);
    }
}

#[test]
fn what_others_left_there_is_counted() {
    let scene = scene();
    let alone = told(&scene);
    let group = || Group::new("acme", &["g*".into()], &[1; 32]);
    leave_shadow(
        &scene.far,
        "g2",
        "5eed5eed-0000-4000-8000-000000000002",
        &Memory::of(pool().iter().rev().cloned().collect()),
    );
    scene.near.join(group());
    scene.far.join(group());
    let shared = told(&scene);
    assert!(shared.shareable > 0, "{shared:?}");
    assert!(bytes(&shared) < bytes(&alone) / 2, "{shared:?}, {alone:?}");
}
