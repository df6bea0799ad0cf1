//! What another guest of a trust group left at the destination does not cross again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use migrate::Error;
use migrate::group::{Group, Library, WITNESS_SIZE, Witness};
use migrate::guest::replay::{Call, Clock, Crossing, Guest, Memory, Shape, Site, cross, pair};
use migrate::pages::{PAGE_SIZE, PageType};
use migrate::report::Report;
use migrate::shadow::{ShadowPolicy, Shadows};

use crate::scene::{Place, Scene, at_call, busy, history, leave_shadow, pool};

fn group(key: u8) -> Group {
    Group::new("acme", &["g*".into()], &[key; 32])
}

/// The shadow of `g2` is at the destination, with most of what `g1` has, at other pfns.
fn scene() -> Scene {
    let scene = Scene::with(busy(71));
    let contents = pool().iter().rev().skip(40).cloned();
    let memory = Memory::of(contents.collect());
    leave_shadow(
        &scene.far,
        "g2",
        "5eed5eed-0000-4000-8000-000000000002",
        &memory,
    );
    scene
}

fn shared(report: &Report) -> u64 {
    report.rounds.iter().map(|round| round.shared).sum()
}

fn moves(scene: &Scene) -> Report {
    scene.moves(Crossing::default()).report.unwrap()
}

#[test]
fn what_is_there_of_others_does_not_cross() {
    let alone = moves(&scene());
    assert_eq!((alone.shareable, shared(&alone)), (0, 0));

    let scene = scene();
    scene.near.join(group(1));
    scene.far.join(group(1));
    let report = moves(&scene);
    assert_eq!(report.shareable, pool().len() as u64 - 40, "{report:?}");
    assert!(shared(&report) > 100, "{report:?}");
    assert!(report.wire_bytes < alone.wire_bytes / 2, "{report:?}");
    // The shadow is as it was: the next guest is built from it as well.
    let back = scene.turned();
    back.moves(Crossing::default());
}

#[test]
fn without_the_same_key_nothing_is_shared() {
    for (near, far) in [(Some(1), Some(2)), (None, Some(1)), (Some(1), None)] {
        let scene = scene();
        near.into_iter().for_each(|key| scene.near.join(group(key)));
        far.into_iter().for_each(|key| scene.far.join(group(key)));
        let report = moves(&scene);
        assert_eq!(
            (report.shareable, shared(&report)),
            (0, 0),
            "{near:?} {far:?}"
        );
    }
    // Nor with guests that the group doesn't name.
    let scene = scene();
    scene.near.join(group(1));
    scene
        .far
        .join(Group::new("acme", &["web-*".into()], &[1; 32]));
    assert_eq!(moves(&scene).shareable, 0);
    // Nor where the operator wants no shadows used.
    let directories = &scene.far.directories;
    let there = |keep| {
        let policy = ShadowPolicy {
            keep,
            ..ShadowPolicy::default()
        };
        Library::is_there(&Shadows::new(directories, policy), &group(1), "another").unwrap()
    };
    assert!(there(true) && !there(false));
}

/// Names are told, and then a content is no longer what its name says: the move ends, and the guest
/// stays. The next attempt asks for the names again.
#[test]
fn a_shadow_that_is_not_what_its_names_say_is_not_built_upon() {
    let scene = scene();
    scene.near.join(group(1));
    scene.far.join(group(1));
    let memory = shadow_memory(&scene.far);
    let spoilt = Arc::new(AtomicBool::new(false));
    let done = Arc::clone(&spoilt);
    let crossing = Crossing {
        at_source: at_call(Call::Begin, 1, move || {
            let length = std::fs::metadata(&memory).unwrap().len();
            // In place, as nobody does.
            let file = std::fs::OpenOptions::new()
                .write(true)
                .open(&memory)
                .unwrap();
            for page in 0..length / PAGE_SIZE as u64 {
                std::os::unix::fs::FileExt::write_at(&file, b"other", page * PAGE_SIZE as u64)
                    .unwrap();
            }
            done.store(true, Ordering::Relaxed);
        }),
        ..Crossing::default()
    };
    let crossed = scene.cross(crossing);
    assert!(spoilt.load(Ordering::Relaxed));
    let error = crossed.destination.error().unwrap();
    assert!(
        matches!(error, Error::Protocol { what, .. } if what.contains("library")),
        "{error:?}"
    );
    assert_eq!(scene.settled(&crossed), Place::Source);
    moves(&scene);
}

/// Names are told to whoever had somebody prove the key: what they are of is not.
#[test]
fn nothing_is_given_out_to_who_does_not_know_it() {
    let scene = scene();
    let shadows = crate::scene::shadows(&scene.far);
    let library = Library::open(&shadows, &group(1), "another").unwrap();
    let group = group(1);
    let mut page = [0; PAGE_SIZE];
    let mut given = 0;
    for content in pool() {
        let (name, witness) = content.look(|page| group.names().witnessed(page));
        let Some(place) = library.names().position(|known| known == name) else {
            continue;
        };
        let place = place as u64;
        assert!(library.read(place, witness, &mut page));
        assert_eq!(group.names().of(&page), name);
        // All that the names tell.
        let (first, second) = name.0.split_at(WITNESS_SIZE);
        for half in [first, second] {
            let guess = Witness(half.try_into().unwrap());
            assert!(!library.read(place, guess, &mut page));
        }
        given += 1;
    }
    assert_eq!(given, library.len());
}

/// What arrived of a copy that broke is little; the rest is built from what others left, again.
#[test]
fn an_attempt_after_one_that_broke_shares_too() {
    let scene = scene();
    scene.near.join(group(1));
    scene.far.join(group(1));
    let shape = Shape {
        cut_after: Some(30_000),
        ..Shape::default()
    };
    let (near, far, _cut) = pair(shape);
    let crossed = cross(&scene.near, &scene.far, (near, far), Crossing::default()).unwrap();
    assert_eq!(scene.settled(&crossed), Place::Source);
    let report = moves(&scene);
    assert!(report.shareable > 0 && shared(&report) > 0, "{report:?}");
    // Once it has been there that is enough.
    scene.turned().moves(Crossing::default());
    leave_shadow(
        &scene.far,
        "g3",
        "5eed5eed-0000-4000-8000-000000000003",
        &Memory::of(pool().to_vec()),
    );
    let again = moves(&scene);
    assert!(again.recalled > 0, "{again:?}");
    assert_eq!(again.shareable, 0, "{again:?}");
}

/// A guest whose shadow is read for another one comes back meanwhile: without it.
#[test]
fn a_shadow_that_is_read_is_not_written_into() {
    let scene = scene();
    let shadows = crate::scene::shadows(&scene.far);
    let uuid = "5eed5eed-0000-4000-8000-000000000002";
    let lent = shadows.lend(uuid).unwrap().unwrap();
    let pages = pool().len() as u64 - 40;
    assert_eq!(lent.with_content(PageType::Normal).count() as u64, pages);
    let key = shadows.key(uuid).unwrap();
    let to = scene.far.directories.incoming().join("x.memory");
    let recalled = shadows.recall(uuid, pages, &[], &key, &to).unwrap();
    assert!(recalled.is_none() && !to.exists());
    // It stays as it is, for whoever comes later.
    assert_eq!(
        lent.memory.metadata().unwrap().len(),
        pages * PAGE_SIZE as u64
    );
    assert!(shadows.lend(uuid).unwrap().is_some());
    drop(lent);

    // Taken up first, it is not lent.
    leave_shadow(&scene.far, "g2", uuid, &Memory::of(vec![pool()[0].clone()]));
    let key = shadows.key(uuid).unwrap();
    assert!(shadows.recall(uuid, 1, &[], &key, &to).unwrap().is_some());
    assert!(shadows.lend(uuid).unwrap().is_none());
}

/// Holes, types and a working set: all of it over the library.
#[test]
fn a_guest_that_works_meanwhile_arrives_as_it_left() {
    for seed in 0..4 {
        let scene = scene();
        scene.near.join(group(1));
        scene.far.join(group(1));
        let mut random = migrate::guest::replay::generated::Random::new(seed);
        scene
            .near
            .with_guest(|guest: &mut Guest| {
                guest.live(history(&mut random, 30, 100), Clock::Calls);
                Ok(())
            })
            .unwrap();
        assert!(shared(&moves(&scene)) > 0);
    }
}

fn shadow_memory(site: &Site) -> std::path::PathBuf {
    site.directories
        .shadows()
        .join("5eed5eed-0000-4000-8000-000000000002.memory")
}
