//! Guests that are slowed down: they get their processor time back, whatever becomes of the move.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use migrate::Error;
use migrate::guest::Moment;
use migrate::guest::replay::generated::Random;
use migrate::guest::replay::{Call, Clock, Crossing, End, Guest, Watch, die};
use migrate::rounds::{Limits, Share, Stop};
use migrate::source::Plan;

use crate::scene::{Place, Scene, at_call, busy, history};

/// The cap that the guest has from its operator.
const CAP: u32 = 60;

/// Never quiet.
fn restless(seed: u64) -> Guest {
    let mut guest = busy(seed);
    guest.live(history(&mut Random::new(seed), 400, 500), Clock::Calls);
    guest.set_cpu_cap(CAP);
    guest
}

fn least() -> Share {
    Share::new(5).unwrap()
}

/// As short a silence as can be, for which the guest may be slowed down to a twentieth.
fn slowing() -> Crossing {
    Crossing {
        plan: Plan {
            limits: Limits {
                downtime: Duration::ZERO,
                least_share: least(),
                ..Limits::default()
            },
            ..Plan::default()
        },
        ..Crossing::default()
    }
}

fn cap_at_source(scene: &Scene) -> u32 {
    scene.near.with_guest(|guest| Ok(guest.cpu_cap())).unwrap()
}

#[test]
fn a_restless_guest_is_slowed_down() {
    let scene = Scene::with(restless(30));
    let report = scene.moves(slowing()).report.unwrap();
    let slowed = report.slowed_down.unwrap_or_else(|| panic!("{report:#?}"));
    assert!(
        slowed.share < Share::WHOLE && slowed.share >= least(),
        "{report:#?}"
    );
    // In the end it hardly writes, or is as slow as it may be.
    let stopped = match report.stop {
        Some(Stop::FewPages) => true,
        Some(Stop::NoProgress) => slowed.share == least(),
        _ => false,
    };
    assert!(stopped, "{report:#?}");

    // Unasked it is not.
    let scene = Scene::with(restless(30));
    let mut unasked = slowing();
    unasked.plan.limits.least_share = Share::WHOLE;
    let report = scene.moves(unasked).report.unwrap();
    assert_eq!(report.slowed_down, None);
}

#[test]
fn one_that_would_be_silent_for_too_long_is_never_suspended() {
    let scene = Scene::with(restless(33));
    let mut hopeless = slowing();
    // Less than any handover takes.
    hopeless.plan.limits.silent = Duration::from_millis(1);
    hopeless.at_source = at_call(Call::Suspend, 1, || panic!("It was asked to suspend"));
    let crossed = scene.cross(hopeless);
    match &crossed.source {
        End::Returned(Err(Error::TooSilent(why))) => {
            assert!(why.contains("the handover alone takes"), "{why}");
            assert!(!why.contains("--throttle"), "{why}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(scene.settled(&crossed), Place::Source);
    assert_eq!(cap_at_source(&scene), CAP);
}

#[test]
fn whatever_fails_it_has_its_time_back() {
    let calls = [
        (Call::CpuCap, 1),
        (Call::SetCpuCap, 1),
        (Call::SetCpuCap, 2),
        (Call::NextDirty, 5),
        (Call::Suspend, 1),
        (Call::Read(Moment::Last), 1),
        (Call::FinalState, 1),
    ];
    for (call, nth) in calls {
        let scene = Scene::with(restless(31));
        let crossing = Crossing {
            at_source: at_call(call, nth, || die()),
            ..slowing()
        };
        let crossed = scene.cross(crossing);
        assert_eq!(scene.settled(&crossed), Place::Source, "killed at {call:?}");
        assert_eq!(cap_at_source(&scene), CAP, "killed at {call:?} {nth}");

        let scene = Scene::with(restless(32));
        let seen = AtomicUsize::new(0);
        let failing: Arc<Watch> = Arc::new(move |this| {
            let times = || seen.fetch_add(1, Ordering::Relaxed) + 1;
            if this == call && times() == nth {
                return Err(Error::Refused(format!("{call:?} fails")));
            }
            Ok(())
        });
        let crossing = Crossing {
            at_source: failing,
            ..slowing()
        };
        let crossed = scene.cross(crossing);
        // That it can't be slowed down does not stop a move.
        let moves = matches!(call, Call::CpuCap | Call::SetCpuCap);
        let place = scene.settled(&crossed);
        assert_eq!(place == Place::Destination, moves, "{call:?}: {crossed:?}");
        if place == Place::Source {
            assert_eq!(cap_at_source(&scene), CAP, "{call:?} {nth} fails");
            scene.moves(slowing());
        }
    }
}

/// A suspend that is late because the guest has hardly any time is waited for once it has it.
#[test]
fn it_has_its_time_back_before_its_suspend_is_waited_for() {
    let scene = Scene::with(restless(33));
    let calls = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&calls);
    let failing: Arc<Watch> = Arc::new(move |this| {
        noted.lock().unwrap().push(this);
        match this {
            Call::Suspend => Err(Error::Refused("It does not suspend".into())),
            _ => Ok(()),
        }
    });
    let crossing = Crossing {
        at_source: failing,
        ..slowing()
    };
    let crossed = scene.cross(crossing);
    assert_eq!(scene.settled(&crossed), Place::Source);
    let calls = calls.lock().unwrap();
    let last = |wanted: Call| calls.iter().rposition(|call| *call == wanted);
    let first = calls.iter().position(|call| *call == Call::EndSuspend);
    assert!(first.is_some(), "{calls:?}");
    assert!(last(Call::SetCpuCap) < first, "{calls:?}");
}
