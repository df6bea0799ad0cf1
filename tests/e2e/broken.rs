//! Moves that are broken on purpose, in every phase.
//!
//! A worker stops at a hold point (`VMSHADOW_HOLD`); there it is killed, or the link cut. In the
//! end exactly one guest runs, intact, nothing is left at either site, and the same command then
//! succeeds.

use std::thread;
use std::time::{Duration, Instant};

use testbed::{Guest, Hypervisor, Kind, SiteName, Testbed};

use crate::scene::{
    go_on, hold_at, move_guest, said, settled, sites, sites_with_small_guest, small_guest,
    wait_until, with,
};

/// Where the source can be stopped, in the order of a move.
const SOURCE: [&str; 11] = [
    "connecting",
    "offering",
    "copying",
    "recopying",
    "suspending",
    "suspended",
    "last-round",
    "final-sent",
    "ready",
    "committed",
    "acknowledged",
];

/// Where the destination can be stopped, in the order of a move.
const DESTINATION: [&str; 9] = [
    "accepting",
    "receiving",
    "restoring",
    "restored",
    "ready",
    "commit-received",
    "owner",
    "unpaused",
    "running",
];

fn kill_everywhere(testbed: &Testbed, guest: &Guest, destination: bool, points: &[&str]) {
    let mut at = SiteName::A;
    for point in points {
        let side = if destination { at.other() } else { at };
        hold_at(testbed, at, side, point, |worker| {
            testbed
                .site(side)
                .run(&format!("kill -9 {worker}"))
                .unwrap();
        });
        at = settled(testbed, guest, &format!("killed at {point}"));
    }
    // The same command then succeeds.
    move_guest(testbed, at, "");
    settled(testbed, guest, "the move after all that");
}

/// The source is killed at these points, and the same command then succeeds.
fn source_killed_at(points: &[&str]) {
    let (testbed, guest) = sites_with_small_guest();
    kill_everywhere(&testbed, &guest, false, points);
}

/// The same with the destination.
fn destination_killed_at(points: &[&str]) {
    let (testbed, guest) = sites_with_small_guest();
    kill_everywhere(&testbed, &guest, true, points);
}

/// With the guest suspended, and in doubt.
#[test]
fn the_source_killed() {
    source_killed_at(&["final-sent", "committed"]);
}

#[test]
#[ignore = "minutes: make test-full"]
fn the_source_killed_at_every_point() {
    source_killed_at(&SOURCE);
}

/// With the guest restored, and in doubt.
#[test]
fn the_destination_killed() {
    destination_killed_at(&["restored", "commit-received"]);
}

#[test]
#[ignore = "minutes: make test-full"]
fn the_destination_killed_at_every_point() {
    destination_killed_at(&DESTINATION);
}

/// A PVH guest that was suspended goes on here; one that is committed is found.
#[test]
#[ignore = "minutes: make test-full"]
fn a_pvh_guest_whose_workers_are_killed() {
    let testbed = sites(with(Hypervisor::Release));
    let guest = Guest {
        kind: Kind::Pvh,
        memory_mib: 128,
        ..small_guest()
    };
    testbed.start_guest(SiteName::A, &guest).unwrap();
    kill_everywhere(&testbed, &guest, false, &["suspended", "committed"]);
    let at = testbed.where_is("g1").unwrap();
    hold_at(&testbed, at[0], at[0].other(), "restored", |worker| {
        let there = testbed.site(at[0].other());
        there.run(&format!("kill -9 {worker}")).unwrap();
    });
    assert_eq!(settled(&testbed, &guest, "killed at restored"), at[0]);
}

#[test]
#[ignore = "minutes: make test-full"]
fn without_shadow_paging_killed_after_the_suspend() {
    let testbed = sites(with(Hypervisor::Security));
    let guest = small_guest();
    testbed.start_guest(SiteName::A, &guest).unwrap();
    kill_everywhere(&testbed, &guest, false, &["suspended", "committed"]);
}

/// The link is cut at each point, and mended once the workers are gone: either side sees by itself
/// that nothing comes any more. After the commit the source goes on asking, and is answered then.
fn cut_at(points: &[&str]) {
    let (testbed, guest) = sites_with_small_guest();
    let mut at = SiteName::A;
    for point in points {
        hold_at(&testbed, at, at, point, |_| {
            testbed.cut_link().unwrap();
            go_on(&testbed, at);
            let deadline = Instant::now() + Duration::from_secs(30);
            while Instant::now() < deadline && works(&testbed) {
                thread::sleep(Duration::from_millis(500));
            }
            testbed.mend_link().unwrap();
        });
        at = settled(&testbed, &guest, &format!("link cut at {point}"));
    }
    move_guest(&testbed, at, "");
    settled(&testbed, &guest, "the move after all that");
}

/// In doubt. Before that a lost link is tried again: see `shadows`.
#[test]
fn the_link_cut() {
    cut_at(&["committed"]);
}

/// From the first point on where there is a link to cut.
#[test]
#[ignore = "minutes: make test-full"]
fn the_link_cut_at_every_point() {
    cut_at(&SOURCE[1..]);
}

/// The link is away for 5 seconds at each point: what waits for it goes on, and the guest moves.
fn cut_for_a_moment_at(points: &[&str]) {
    let (testbed, guest) = sites_with_small_guest();
    let mut at = SiteName::A;
    for point in points {
        let (moved, told) = hold_at(&testbed, at, at, point, |_| {
            testbed.cut_link().unwrap();
            go_on(&testbed, at);
            thread::sleep(Duration::from_secs(5));
            testbed.mend_link().unwrap();
        });
        assert!(moved, "{point}: {told}");
        let after = format!("link cut for a moment at {point}");
        at = at.other();
        assert_eq!(settled(&testbed, &guest, &after), at, "{after}");
    }
}

#[test]
#[ignore = "minutes: make test-full"]
fn the_link_cut_for_a_moment_at_every_point() {
    cut_for_a_moment_at(&SOURCE[1..]);
}

/// Whether there is a worker at either site.
fn works(testbed: &Testbed) -> bool {
    testbed.sites().iter().any(|site| {
        let workers = site.run("grep -x vmshadow /proc/[0-9]*/comm || true");
        !workers.unwrap().is_empty()
    })
}

#[test]
fn worker_and_guardian_killed_together() {
    let (testbed, guest) = sites_with_small_guest();
    for point in ["suspended", "committed"] {
        hold_at(&testbed, SiteName::A, SiteName::A, point, |worker| {
            let script = format!(
                "for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2>/dev/null)\" != vmshadow-guard ] || \
                 kill -9 ${{p#/proc/}}; done; kill -9 {worker}"
            );
            testbed.site(SiteName::A).run(&script).unwrap();
        });
        let resolved = testbed
            .site(SiteName::A)
            .output("vmshadow resolve g1")
            .unwrap();
        assert!(resolved.status.success(), "{point}: {}", said(&resolved));
        assert_eq!(
            settled(&testbed, &guest, &format!("both killed at {point}")),
            SiteName::A
        );
    }
}

/// After the commit with a lost link neither side guesses: no guest runs, and the command and
/// `resolve` say so. Once the link is back `resolve` settles it.
fn lost_link_after_the_commit(side: SiteName, point: &str) {
    let (testbed, guest) = sites_with_small_guest();
    let here = testbed.site(SiteName::A);
    let resolve = || here.output("vmshadow resolve g1").unwrap();
    let (moved, told) = hold_at(&testbed, SiteName::A, side, point, |_| {
        testbed.cut_link().unwrap();
        go_on(&testbed, side);
        // The source goes on asking for a while, and the destination for a sign of life.
        wait_until("the workers give up", || !works(&testbed));
    });
    assert!(
        !moved && told.contains("only 10.77.0.12 knows"),
        "{point}: {told}"
    );
    // The guardian goes on asking; without it only an operator settles it.
    here.run(
        "for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2>/dev/null)\" != vmshadow-guard ] || \
         kill -9 ${p#/proc/}; done",
    )
    .unwrap();
    let state = here.run("xl list g1 | awk 'NR == 2 { print $5 }'").unwrap();
    assert!(state.contains('s'), "{point}: g1 is {state} at the source");
    let refused = resolve();
    assert!(!refused.status.success(), "{point}: {}", said(&refused));
    testbed.mend_link().unwrap();
    let resolved = resolve();
    assert!(resolved.status.success(), "{point}: {}", said(&resolved));
    settled(&testbed, &guest, &format!("resolved after {point}"));
}

#[test]
#[ignore = "minutes: make test-full"]
fn a_lost_link_after_the_commit() {
    lost_link_after_the_commit(SiteName::A, "committed");
}

#[test]
#[ignore = "minutes: make test-full"]
fn a_lost_link_once_the_destination_has_the_guest() {
    lost_link_after_the_commit(SiteName::B, "owner");
}
