//! Moves that fail: whatever breaks, one guest runs, and a new move succeeds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use migrate::Error;
use migrate::guest::Moment;
use migrate::guest::replay::{Call, Crossing, End, Shape, Watch, cross, die, pair};
use migrate::handover::journal::Phase;

use crate::scene::{Place, Scene, at_call, busy, connections};

/// Calls at the source, in the order in which they come first.
const AT_SOURCE: [Call; 7] = [
    Call::Begin,
    Call::NextDirty,
    Call::Read(Moment::Live),
    Call::Suspend,
    Call::Read(Moment::Last),
    Call::FinalState,
    Call::EndTracking,
];

/// The same at the destination.
const AT_DESTINATION: [Call; 10] = [
    Call::Start,
    Call::BeginRound,
    Call::Changed,
    Call::EndRound,
    Call::Behind,
    Call::Complete,
    Call::Completed,
    Call::Confirm,
    Call::TakeOver,
    Call::Keep,
];

/// From here on the guest is the destination's.
fn committed(call: Call) -> bool {
    matches!(
        call,
        Call::EndTracking | Call::Destroy | Call::Confirm | Call::TakeOver | Call::Keep
    )
}

/// A move in which `act` is done at a call at one of the sites.
fn crossing(call: Call, act: impl Fn() + Send + Sync + 'static) -> Crossing {
    let watch = at_call(call, 1, act);
    let mut crossing = Crossing::default();
    if AT_DESTINATION.contains(&call) {
        crossing.at_destination = watch;
    } else {
        crossing.at_source = watch;
    }
    crossing
}

/// After a move that failed the guest runs at the source, and moves.
fn then_moves(scene: &Scene) {
    scene.moves(Crossing::default());
}

#[test]
fn the_link_is_cut_at_each_call() {
    for call in AT_SOURCE.into_iter().chain(AT_DESTINATION) {
        let scene = Scene::with(busy(10));
        let (near, far, cut) = pair(Shape::default());
        let crossing = crossing(call, move || cut.cut());
        let crossed = cross(&scene.near, &scene.far, (near, far), crossing).unwrap();
        let place = scene.settled(&crossed);
        // A commit that has arrived counts, whether the source hears of it or not.
        let expected = if committed(call) {
            Place::Destination
        } else {
            Place::Source
        };
        assert_eq!(place, expected, "{call:?}: {crossed:?}");
        if place == Place::Source {
            assert!(
                matches!(crossed.source.error(), Some(Error::LinkLost { .. })),
                "{call:?}: {crossed:?}"
            );
            then_moves(&scene);
        } else {
            assert!(crossed.source.is_ok(), "{call:?}: {crossed:?}");
        }
    }
}

#[test]
fn the_link_is_cut_after_each_share_of_the_bytes() {
    let whole = Scene::with(busy(11)).moves(Crossing::default());
    let bytes = whole.report.unwrap().wire_bytes;
    let shares = (0..12).map(|share| bytes * share / 12);
    // The last bytes are few and decide most.
    let ends = (0..24).map(|at| bytes.saturating_sub(at * 11));
    for cut_after in shares.chain(ends) {
        let scene = Scene::with(busy(11));
        let (near, far, _cut) = pair(Shape {
            cut_after: Some(cut_after.max(1)),
            ..Shape::default()
        });
        let crossed = cross(&scene.near, &scene.far, (near, far), Crossing::default()).unwrap();
        if scene.settled(&crossed) == Place::Source {
            then_moves(&scene);
        }
    }
}

#[test]
fn either_worker_is_killed_at_each_call() {
    for call in AT_SOURCE.into_iter().chain(AT_DESTINATION) {
        let scene = Scene::with(busy(12));
        let crossed = scene.cross(crossing(call, || die()));
        let place = scene.settled(&crossed);
        // A destination that dies before it has recorded that the guest is its own gives it back.
        let expected = if committed(call) && call != Call::Confirm {
            Place::Destination
        } else {
            Place::Source
        };
        assert_eq!(place, expected, "{call:?}: {crossed:?}");
        if place == Place::Source {
            then_moves(&scene);
        }
    }
}

#[test]
fn what_is_asked_of_a_guest_fails() {
    for call in AT_SOURCE.into_iter().chain(AT_DESTINATION) {
        let scene = Scene::with(busy(13));
        let failing: Arc<Watch> = Arc::new(move |this| {
            if this == call {
                return Err(Error::Refused(format!("{call:?} fails")));
            }
            Ok(())
        });
        let mut crossing = Crossing::default();
        if AT_DESTINATION.contains(&call) {
            crossing.at_destination = failing;
        } else {
            crossing.at_source = failing;
        }
        let crossed = scene.cross(crossing);
        if scene.settled(&crossed) == Place::Source {
            then_moves(&scene);
        }
    }
}

#[test]
fn a_move_is_cancelled_at_each_call() {
    for call in AT_SOURCE.into_iter().chain(AT_DESTINATION) {
        let scene = Scene::with(busy(14));
        let cancel = Arc::<AtomicBool>::default();
        let flag = Arc::clone(&cancel);
        let crossing = Crossing {
            cancel,
            ..crossing(call, move || flag.store(true, Ordering::Relaxed))
        };
        let crossed = scene.cross(crossing);
        let place = scene.settled(&crossed);
        if committed(call) {
            // It is too late.
            assert_eq!(place, Place::Destination, "{call:?}: {crossed:?}");
        }
        match crossed.source.error() {
            None => assert_eq!(place, Place::Destination, "{call:?}"),
            Some(Error::Cancelled) => {
                assert_eq!(place, Place::Source, "{call:?}");
                then_moves(&scene);
            }
            Some(other) => panic!("{call:?}: {other}"),
        }
    }
}

#[test]
fn a_destination_that_has_the_guest_refuses() {
    let scene = Scene::with(busy(15));
    scene.far.start(busy(16));
    let crossed = scene.cross(Crossing::default());
    assert!(
        matches!(crossed.source.error(), Some(Error::RefusedByPeer { .. })),
        "{crossed:?}"
    );
    assert!(crossed.destination_journal.is_none());
    assert!(scene.near.runs() && scene.far.runs());
}

#[test]
fn with_several_connections_whatever_breaks_one_guest_runs() {
    /// What happens at a call.
    #[derive(Debug, Clone, Copy)]
    enum Deed {
        CutFirst,
        CutOther,
        Kill,
        Cancel,
    }
    let calls = [
        Call::Begin,
        Call::Read(Moment::Live),
        Call::EndRound,
        Call::Suspend,
        Call::Read(Moment::Last),
        Call::Complete,
        Call::TakeOver,
    ];
    for call in calls {
        for deed in [Deed::CutFirst, Deed::CutOther, Deed::Kill, Deed::Cancel] {
            let scene = Scene::with(busy(17));
            let (near, far, first) = pair(Shape::default());
            let (data, others) = connections(3);
            let cancel = Arc::<AtomicBool>::default();
            let flag = Arc::clone(&cancel);
            let act = move || match deed {
                Deed::CutFirst => first.cut(),
                Deed::CutOther => others[1].cut(),
                Deed::Kill => die(),
                Deed::Cancel => flag.store(true, Ordering::Relaxed),
            };
            let crossing = Crossing {
                cancel,
                data,
                ..crossing(call, act)
            };
            let crossed = cross(&scene.near, &scene.far, (near, far), crossing).unwrap();
            let place = scene.settled(&crossed);
            if committed(call) {
                assert_eq!(place, Place::Destination, "{call:?}, {deed:?}: {crossed:?}");
            }
            if place == Place::Source {
                let (data, _cuts) = connections(2);
                scene.moves(Crossing {
                    data,
                    ..Crossing::default()
                });
            }
        }
    }
}

/// For want of a process, say. The guest must not run on without one.
#[test]
fn a_keeper_that_can_not_be_started_is_tried_again() {
    let scene = Scene::with(busy(60));
    let failing = |call: Call| -> Arc<Watch> {
        let first = AtomicBool::new(true);
        Arc::new(
            move |this| match this == call && first.swap(false, Ordering::Relaxed) {
                true => Err(Error::Refused("It can't be done".into())),
                false => Ok(()),
            },
        )
    };
    let crossed = scene.cross(Crossing {
        at_source: failing(Call::Keep),
        at_destination: failing(Call::Complete),
        ..Crossing::default()
    });
    assert_eq!(scene.settled(&crossed), Place::Source);
    let error = crossed.source.error();
    assert!(matches!(error, Some(Error::PeerFailed { .. })), "{error:?}");
    assert_eq!(scene.near.keepers(), 1);
}

/// Whoever settles the move knows then that the guest was suspended, and does not wait for it.
#[test]
fn a_worker_is_killed_before_or_after_it_has_resumed_the_guest() {
    // The keeper is tried again once the guest runs.
    for (call, nth) in [(Call::Keep, 1), (Call::Resume, 1), (Call::Keep, 2)] {
        let scene = Scene::with(busy(61));
        let seen = AtomicUsize::new(0);
        let at_source: Arc<Watch> = Arc::new(move |this| {
            if this == call && seen.fetch_add(1, Ordering::Relaxed) + 1 == nth {
                die();
            }
            match this {
                Call::Keep => Err(Error::Refused("It can't be done".into())),
                _ => Ok(()),
            }
        });
        let at_destination: Arc<Watch> = Arc::new(|this| match this {
            Call::Complete => Err(Error::Refused("It can't be done".into())),
            _ => Ok(()),
        });
        let crossed = scene.cross(Crossing {
            at_source,
            at_destination,
            ..Crossing::default()
        });
        let at = format!("{call:?} {nth}");
        assert_eq!(scene.settled(&crossed), Place::Source, "{at}");
        assert!(matches!(crossed.source, End::Killed), "{at}: {crossed:?}");
        assert_eq!(crossed.source_journal.phase, Phase::Resuming, "{at}");
        assert_eq!(scene.near.keepers(), 1, "{at}");
        then_moves(&scene);
    }
}
