//! Another tool has its hands on the guest: it reads the log as well, as `xl save` does, or a stock
//! migration that breaks off; or it lets the suspended guest go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use migrate::Error;
use migrate::error::chain;
use migrate::guest::replay::{Call, Crossing, Shape, Site, Watch, cross, pair};
use migrate::handover::journal::{self, Phase};
use migrate::rounds::{Limits, Stop};
use migrate::source::Plan;

use crate::scene::{Place, Scene, at_call, busy};

/// The log is lost before it is read for the nth time, where `lost` says so of n.
fn loses(site: &Arc<Site>, lost: impl Fn(u32) -> bool + Send + Sync + 'static) -> Arc<Watch> {
    let site = Arc::clone(site);
    let seen = AtomicU32::new(0);
    Arc::new(move |call| {
        if call == Call::NextDirty && lost(seen.fetch_add(1, Ordering::Relaxed)) {
            site.with_guest(|guest| {
                guest.lose_log();
                Ok(())
            })?;
        }
        Ok(())
    })
}

#[test]
fn what_was_in_it_crosses_all_the_same() {
    for seed in 0..24 {
        let scene = Scene::with(busy(700 + seed));
        // At one look or the other, the last one among them.
        let watch = loses(&scene.near, move |look| {
            (look ^ seed as u32).is_multiple_of(3)
        });
        scene.moves(Crossing {
            at_source: watch,
            ..Crossing::default()
        });
    }
}

#[test]
fn rounds_end_where_it_is_lost_each_time() {
    for rounds in [1, 5] {
        let scene = Scene::with(busy(750));
        let limits = Limits {
            rounds,
            ..Limits::default()
        };
        let report = scene.moves(Crossing {
            at_source: loses(&scene.near, |_| true),
            plan: Plan {
                limits,
                ..Plan::default()
            },
            ..Crossing::default()
        });
        let report = report.report.unwrap();
        assert_eq!(report.stop, Some(Stop::Rounds));
        assert_eq!(report.rounds.len(), rounds as usize + 1, "{report:#?}");
    }
}

#[test]
fn one_that_was_let_go_on_is_not_handed_over() {
    for call in [Call::Complete, Call::Completed] {
        let scene = Scene::with(busy(760));
        let near = Arc::clone(&scene.near);
        let crossed = scene.cross(Crossing {
            at_destination: at_call(call, 1, move || {
                near.with_guest(|guest| {
                    guest.resume();
                    Ok(())
                })
                .unwrap();
            }),
            ..Crossing::default()
        });
        assert_eq!(scene.settled(&crossed), Place::Source);
        let error = crossed.source.error().map(|error| chain(error));
        assert!(error.is_some_and(|text| text.contains("Another tool")));
        // `xl`'s monitor has ended with the suspend, whoever let the guest go on.
        assert_eq!(scene.near.keepers(), 1);
    }
}

/// Its suspend has come and gone: whoever settles the move does not wait for it, but starts the keeper.
#[test]
fn one_that_was_let_go_on_and_has_no_keeper_yet_is_given_one() {
    let scene = Scene::with(busy(761));
    let near = Arc::clone(&scene.near);
    let crossed = scene.cross(Crossing {
        at_destination: at_call(Call::Complete, 1, move || {
            near.with_guest(|guest| {
                guest.resume();
                Ok(())
            })
            .unwrap();
        }),
        at_source: Arc::new(|call| match call {
            Call::Keep => Err(Error::Refused("It can't be done".into())),
            _ => Ok(()),
        }),
        ..Crossing::default()
    });
    assert_eq!(scene.settled(&crossed), Place::Source);
    assert_eq!(crossed.source_journal.phase, Phase::Resuming);
    assert_eq!(scene.near.keepers(), 1);
}

/// What it has done since is nowhere else: its operator chooses between the two.
#[test]
fn one_that_was_let_go_on_after_the_commit_is_not_destroyed() {
    let scene = Scene::with(busy(770));
    let near = Arc::clone(&scene.near);
    let crossing = Crossing {
        // The first thing that is done here once the guest runs there.
        at_source: at_call(Call::EndTracking, 1, move || {
            near.with_guest(|guest| {
                guest.resume();
                Ok(())
            })
            .unwrap();
        }),
        ..Crossing::default()
    };
    let (near, far, _cut) = pair(Shape::default());
    // Nor does whoever settles the move destroy it.
    let error = cross(&scene.near, &scene.far, (near, far), crossing).unwrap_err();
    assert!(chain(&error).contains("another tool"), "{error}");
    assert!(scene.near.runs() && scene.far.runs());
    let journals = journal::list(&scene.near.directories).unwrap();
    assert_eq!(journals.entries[0].phase, Phase::Committed);
    assert_eq!(journals.entries[0].outcome, None);
}
