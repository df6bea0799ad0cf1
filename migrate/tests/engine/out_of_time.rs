//! Moves whose time is over before they come to their commit: they are given up, whatever they wait
//! for.

use std::thread;
use std::time::Duration;

use migrate::Error;
use migrate::guest::replay::{Call, Crossing, End, Shape, cross, leave, pair};
use migrate::handover::journal::{Outcome, Phase};
use migrate::handover::recovery::Owner;
use migrate::link::Link;
use migrate::report::{Observer, Progress};
use migrate::source::Plan;
use migrate::wire::Tag;

use crate::lying::{meddled, untouched};
use crate::scene::{Place, Scene, at_call, busy, connections};

fn within(timeout: Duration) -> Crossing {
    Crossing {
        plan: Plan {
            timeout: Some(timeout),
            ..Plan::default()
        },
        ..Crossing::default()
    }
}

/// Time enough to come to where the destination falls silent.
const SHORT: Duration = Duration::from_millis(700);

/// A link by which the source hears nothing any more once such a message was to come.
fn silent_from(silent: Tag) -> (Link, Link) {
    let mut over = false;
    meddled(untouched, move |tag, _| {
        over |= tag == silent;
        over.then(Vec::new)
    })
}

struct Told<F>(F);

impl<F: FnMut(Progress) + Send> Observer for Told<F> {
    fn notice(&mut self, progress: Progress) {
        (self.0)(progress);
    }
}

fn told(what: impl FnMut(Progress) + Send + 'static) -> Box<dyn Observer> {
    Box::new(Told(what))
}

fn timed_out(end: &End) -> bool {
    matches!(end.error(), Some(Error::TimedOut(_)))
}

#[test]
fn a_destination_that_never_greets() {
    let scene = Scene::with(busy(80));
    let (near, _mute, _) = pair(Shape::default());
    let mut ask = |_: &_| Ok(Owner::Unknown);
    let left = leave(&scene.near, near, &mut within(SHORT), &mut ask).unwrap();
    assert!(timed_out(&left.end), "{left:?}");
    assert_eq!(left.journal.outcome, Some(Outcome::Aborted));
    assert!(scene.near.runs());
}

#[test]
fn a_destination_that_falls_silent() {
    for silent in [
        Tag::DestinationPong,
        Tag::Accept,
        Tag::Inventory,
        Tag::RoundAck,
        Tag::Ready,
    ] {
        let scene = Scene::with(busy(81));
        if silent == Tag::Inventory {
            // Then something of the guest is there.
            let (near, far, cut) = pair(Shape::default());
            let broken = Crossing {
                at_source: at_call(Call::Suspend, 1, move || cut.cut()),
                ..Crossing::default()
            };
            let crossed = cross(&scene.near, &scene.far, (near, far), broken).unwrap();
            assert_eq!(scene.settled(&crossed), Place::Source);
        }
        let link = silent_from(silent);
        // One that is suspended has to be so before its time is nearly over.
        let time = match silent {
            Tag::Ready => SHORT * 5,
            _ => SHORT,
        };
        let crossed = cross(&scene.near, &scene.far, link, within(time)).unwrap();
        assert!(timed_out(&crossed.source), "{silent:?}: {crossed:?}");
        let phase = crossed.source_journal.phase;
        let suspended = phase == Phase::Resuming;
        assert_eq!(suspended, silent == Tag::Ready, "{silent:?}: {phase:?}");
        assert_eq!(scene.settled(&crossed), Place::Source, "{silent:?}");
        scene.moves(Crossing::default());
    }
}

/// A guest that would be silent for 18 s, with so much time for its move. It is not suspended.
fn refused_for_silence(timeout: Duration, observer: Box<dyn Observer>) {
    let scene = Scene::with(busy(84));
    let mut crossing = within(timeout);
    crossing.earlier.fixed.suspend = 18.0;
    // As long as it may be silent, it would not be refused.
    crossing.plan.limits.downtime = Duration::from_secs(200);
    crossing.at_source = at_call(Call::Suspend, 1, || panic!("It was asked to suspend"));
    crossing.observer = observer;
    let crossed = scene.cross(crossing);
    match crossed.source.error() {
        Some(Error::TooSilent(why)) => assert!(why.ends_with("--timeout allows that"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(scene.settled(&crossed), Place::Source);
}

/// Nothing is gained by a silence that is to end in vain.
#[test]
fn a_handover_that_would_take_too_long() {
    refused_for_silence(Duration::from_secs(10), told(drop));
}

/// What is to be done before the suspend takes its time, too.
#[test]
fn a_handover_that_is_held_up_until_it_would_take_too_long() {
    let hold_up = |progress: Progress| {
        if let Progress::Phase("suspending") = progress {
            thread::sleep(Duration::from_secs(4));
        }
    };
    refused_for_silence(Duration::from_secs(21), told(hold_up));
}

/// They are not waited for longer than the move has.
#[test]
fn connections_for_pages_that_are_never_answered() {
    let scene = Scene::with(busy(82));
    let ((near, _mute), _) = connections(2);
    let (first, other, _) = pair(Shape::default());
    let crossing = Crossing {
        data: (near, Vec::new()),
        // Nothing is amiss that the move could go on without.
        observer: told(|progress| {
            if let Progress::Warning(what) = progress {
                panic!("{what}");
            }
        }),
        ..within(SHORT)
    };
    let crossed = cross(&scene.near, &scene.far, (first, other), crossing).unwrap();
    assert!(timed_out(&crossed.source), "{crossed:?}");
    assert_eq!(scene.settled(&crossed), Place::Source);
}

#[test]
fn after_the_commit_there_is_time() {
    let scene = Scene::with(busy(83));
    let timeout = Duration::from_secs(4);
    let crossing = Crossing {
        at_destination: at_call(Call::TakeOver, 1, move || thread::sleep(timeout)),
        // Nothing is in doubt.
        at_source: at_call(Call::Ask, 1, || panic!("The destination was asked")),
        ..within(timeout)
    };
    scene.moves(crossing);
}
