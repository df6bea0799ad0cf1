//! Moves that nothing disturbs.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use migrate::guest::replay::generated::Random;
use migrate::guest::replay::{Call, Clock, Crossing, Guest, Memory, Shape, cross, pair};
use migrate::report::{Observer, Progress, TrackerKind};
use migrate::rounds::{Limits, Stop};
use migrate::source::{OnTimeout, Plan};

use crate::scene::{PAGES, Place, Scene, at_call, busy, connections, history, pool};

#[test]
fn a_guest_that_writes_all_the_time_arrives_as_it_left() {
    for (seed, tracker, verify) in [
        (1, TrackerKind::LogDirty, false),
        (2, TrackerKind::LogDirty, true),
        (3, TrackerKind::Scan, true),
    ] {
        let scene = Scene::with(busy(seed));
        let crossed = scene.moves(Crossing {
            tracker,
            plan: Plan {
                verify,
                // A fast link's downtime would be short enough at once.
                limits: Limits {
                    downtime: Duration::ZERO,
                    ..Limits::default()
                },
                ..Plan::default()
            },
            ..Crossing::default()
        });
        let report = crossed.report.unwrap();
        assert_eq!(report.verified, verify);
        assert_eq!(report.tracker, Some(tracker));
        assert!(report.rounds.len() > 2, "{report:?}");
        let all = |count: fn(&migrate::report::Round) -> u64| -> u64 {
            report.rounds.iter().map(count).sum()
        };
        // What the guest does makes use of each way that a page can go.
        assert!(all(|round| round.zero) > 0);
        assert!(all(|round| round.reference) > 0);
        assert!(all(|round| round.delta) > 0);
        assert!(all(|round| round.retyped) > 0);
        assert!(all(|round| round.no_data) > 0);
        assert!(all(|round| round.raw) > 0);
        assert!(all(|round| round.deferred) > 0);
        // Nearly all that crosses is pages, those of the last round among them.
        assert!(all(|round| round.wire_bytes) > report.wire_bytes / 10 * 9);
        let last = report.rounds.last().unwrap();
        assert!(last.wire_bytes > last.raw * 8, "{report:?}");
        assert_eq!(
            all(|round| round.compressed.all()),
            all(|round| round.raw + round.delta)
        );
        assert!(report.memory.source_bytes > 0 && report.memory.destination_bytes > 0);
        assert!(scene.far.arrived_state().is_some());
        assert_eq!((scene.near.keepers(), scene.far.keepers()), (0, 1));
    }
}

/// Without a log, some of the pages tell that nothing has changed: no second round looks at all of
/// them before the last one does.
#[test]
fn a_scan_of_an_idle_guest_is_one_round_and_the_last() {
    let idle = Guest::idle("g1", Memory::of(pool().to_vec()));
    let scene = Scene::with(idle);
    let crossed = scene.moves(Crossing {
        tracker: TrackerKind::Scan,
        ..Crossing::default()
    });
    let report = crossed.report.unwrap();
    assert_eq!(report.rounds.len(), 2, "{report:?}");
    assert_eq!(report.stop, Some(Stop::FewPages));
    assert_eq!(report.rounds[1].sent(), 0, "{report:?}");
    assert!(report.predicted.after_first_round.is_some());
}

#[test]
fn with_its_log_read_all_the_time_a_guest_arrives_as_it_left() {
    let scene = Scene::new();
    let mut random = Random::new(6);
    let mut guest = busy(6);
    // Steps enough for each look at the log to find the working set written again.
    guest.live(history(&mut random, 200, 60), Clock::Calls);
    scene.near.start(guest);
    let crossed = scene.moves(Crossing {
        plan: Plan {
            limits: Limits {
                downtime: Duration::from_nanos(1),
                looking: Duration::ZERO,
                ..Limits::default()
            },
            ..Plan::default()
        },
        ..Crossing::default()
    });
    let report = crossed.report.unwrap();
    assert!(report.predicted.after_first_round.is_some(), "{report:?}");
}

#[test]
fn pages_that_go_by_several_connections_arrive_as_they_left() {
    // The last ones are not all opened at once.
    for (count, cores) in [(2, 1), (4, 3), (20, 2)] {
        let there = Scene::with(busy(40 + count));
        let crossing = || Crossing {
            plan: Plan {
                verify: true,
                cores: NonZeroUsize::new(cores),
                limits: Limits {
                    downtime: Duration::ZERO,
                    ..Limits::default()
                },
                ..Plan::default()
            },
            data: connections(count as usize).0,
            ..Crossing::default()
        };
        let report = there.moves(crossing()).report.unwrap();
        assert_eq!(u64::from(report.link.connections), count);
        let all: u64 = report.rounds.iter().map(|round| round.wire_bytes).sum();
        assert!(all > report.wire_bytes / 10 * 9, "{report:?}");
        // And back, with shadows at both ends.
        let report = there.turned().moves(crossing()).report.unwrap();
        assert!(report.recalled > PAGES / 2, "{report:?}");
    }
}

#[test]
fn a_connection_that_does_not_come_is_done_without() {
    let scene = Scene::with(busy(45));
    let (data, cuts) = connections(3);
    cuts[0].cut();
    cuts[2].cut();
    let crossing = Crossing {
        data,
        ..Crossing::default()
    };
    let report = scene.moves(crossing).report.unwrap();
    assert_eq!(report.link.connections, 1);
    // With none of them all goes by the first one.
    let (data, cuts) = connections(2);
    cuts.iter().for_each(migrate::guest::replay::Cut::cut);
    let back = Crossing {
        data,
        ..Crossing::default()
    };
    let report = scene.turned().moves(back).report.unwrap();
    assert_eq!(report.link.connections, 1);
}

#[test]
fn where_the_other_site_is_not_reached_directly_pages_go_by_ssh() {
    for (directly, connections_left, direct) in [(3, 3, true), (1, 1, true), (0, 3, false)] {
        let said = Arc::<Mutex<Vec<String>>>::default();
        let crossing = Crossing {
            data: connections(3).0,
            directly: Some(directly),
            observer: Box::new(Warnings(Arc::clone(&said))),
            ..Crossing::default()
        };
        let report = Scene::with(busy(46)).moves(crossing).report.unwrap();
        assert_eq!(report.link.connections, connections_left, "{report:?}");
        assert_eq!(report.link.direct, direct);
        let said = said.lock().unwrap();
        let by_ssh =
            "Pages go by ssh, as destination can't be reached directly: There is a firewall";
        let each = "A connection for pages can't be made: There is a firewall";
        let expected = match directly {
            3 => vec![],
            1 => vec![each, each],
            _ => vec![by_ssh],
        };
        assert_eq!(*said, expected);
    }
}

struct Warnings(Arc<Mutex<Vec<String>>>);

impl Observer for Warnings {
    fn notice(&mut self, progress: Progress) {
        if let Progress::Warning(warning) = progress {
            self.0.lock().unwrap().push(warning);
        }
    }
}

#[test]
fn connections_that_are_turned_away_are_opened_by_ssh() {
    let (data, cuts) = connections(4);
    // The first two that are opened.
    for cut in &cuts[2..] {
        cut.cut();
    }
    let crossing = Crossing {
        plan: Plan {
            connections: NonZeroUsize::new(2),
            ..Plan::default()
        },
        data,
        directly: Some(2),
        ..Crossing::default()
    };
    let report = Scene::with(busy(47)).moves(crossing).report.unwrap();
    assert_eq!((report.link.connections, report.link.direct), (2, false));
}

/// The restore gets less than arrives: it would go on with that in the guest's silence.
#[test]
fn a_guest_is_not_suspended_before_the_restore_has_caught_up() {
    let over = Some(Duration::ZERO);
    for (behind, timeout, waits) in [
        (0, None, true),
        (PAGES, None, false),
        // Also where its time is up.
        (0, over, true),
        (PAGES, over, false),
    ] {
        let scene = Scene::with(busy(8));
        let asked = Arc::new(AtomicUsize::new(0));
        let at_suspend = Arc::new(AtomicUsize::new(0));
        let (count, seen) = (Arc::clone(&asked), Arc::clone(&at_suspend));
        let crossing = Crossing {
            at_destination: Arc::new(move |call| {
                if call == Call::Behind {
                    count.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            }),
            at_source: at_call(Call::Suspend, 1, move || {
                seen.store(asked.load(Ordering::Relaxed), Ordering::Relaxed);
            }),
            plan: Plan {
                limits: Limits {
                    behind,
                    rounds: 1,
                    ..Limits::default()
                },
                timeout,
                on_timeout: OnTimeout::HandOver,
                ..Plan::default()
            },
            ..Crossing::default()
        };
        let report = scene.moves(crossing).report.unwrap();
        assert_eq!(report.rounds.len(), 2);
        // Once for the round's end; then until there is nothing.
        let at_suspend = at_suspend.load(Ordering::Relaxed);
        assert_eq!(at_suspend > 1, waits, "{at_suspend}");
    }
}

#[test]
fn there_and_back() {
    let there = Scene::with(busy(4));
    there.moves(Crossing::default());
    there
        .far
        .with_guest(|guest| {
            guest.live(history(&mut Random::new(5), 8, 40), Clock::Calls);
            Ok(())
        })
        .unwrap();
    let back = there.turned();
    let crossed = back.moves(Crossing::default());
    assert_eq!(back.settled(&crossed), Place::Destination);
    // Its old site had nearly all of it.
    let report = crossed.report.unwrap();
    assert!(report.recalled > PAGES / 2, "{report:?}");
    assert!(report.rounds[0].same > PAGES / 2, "{report:?}");
}

#[test]
fn a_move_that_broke_goes_on_from_what_arrived() {
    let scene = Scene::with(busy(6));
    let cut = pair(Shape::default());
    let (near, far, cut) = cut;
    let crossing = Crossing {
        at_source: at_call(Call::Suspend, 1, move || cut.cut()),
        ..Crossing::default()
    };
    let broken = cross(&scene.near, &scene.far, (near, far), crossing).unwrap();
    assert_eq!(scene.settled(&broken), Place::Source);
    let first = broken.report.unwrap();
    let crossed = scene.moves(Crossing::default());
    let report = crossed.report.unwrap();
    assert!(report.recalled > PAGES / 2, "{report:?}");
    assert!(
        report.wire_bytes < first.wire_bytes,
        "{report:?} after {first:?}"
    );
}
