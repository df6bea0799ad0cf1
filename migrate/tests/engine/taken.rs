//! Logs that another tool reads as well: `xl save`, or a stock migration that breaks off.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use migrate::guest::replay::{Call, Crossing, Site, Watch};
use migrate::rounds::{Limits, Stop};
use migrate::source::Plan;

use crate::scene::{Scene, busy};

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
