//! Moves that are broken on purpose, in every phase.
//!
//! A worker stops at a hold point (`VMSHADOW_HOLD`); there it is killed, or the link cut. In the
//! end exactly one guest runs, intact, nothing is left at either site, and the same command then
//! succeeds.

use std::thread;
use std::time::{Duration, Instant};

use testbed::{Guest, Hypervisor, SiteName, Testbed};

use crate::scene::{migrate, move_guest, said, settled, sites, small_guest, with};

/// Where the source can be stopped, in the order of a move.
const SOURCE: [&str; 10] = [
    "connecting",
    "offering",
    "copying",
    "suspending",
    "suspended",
    "last-round",
    "final-sent",
    "ready",
    "committed",
    "acknowledged",
];

/// Where the destination can be stopped, in the order of a move.
const DESTINATION: [&str; 7] = [
    "accepting",
    "receiving",
    "restoring",
    "restored",
    "ready",
    "commit-received",
    "owner",
];

const HELD: &str = "/tmp/vmshadow-held";

/// Starts a move of g1 from `from` whose worker at `side` stops at `point`; runs `then` there.
fn break_at(
    testbed: &Testbed,
    from: SiteName,
    side: SiteName,
    point: &str,
    then: impl FnOnce(&str),
) {
    let hold = format!("VMSHADOW_HOLD={point}:{HELD}");
    let command = if side == from {
        format!("env {hold} {}", migrate(from, ""))
    } else {
        migrate(from, &format!("--remote-command 'env {hold} vmshadow'"))
    };
    let site = testbed.site(from);
    let mut child = site
        .command(&format!("{command} > /tmp/vmshadow-out 2>&1"))
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    let worker = loop {
        let worker = testbed
            .site(side)
            .run(&format!("cat {HELD} 2>/dev/null || true"))
            .unwrap();
        if !worker.trim().is_empty() {
            break worker.trim().to_owned();
        }
        let said = || site.run("cat /tmp/vmshadow-out").unwrap_or_default();
        assert!(
            Instant::now() < deadline,
            "Never came to {point}: {}",
            said()
        );
        assert!(
            child.try_wait().unwrap().is_none(),
            "Ended before {point}: {}",
            said()
        );
        thread::sleep(Duration::from_millis(200));
    };
    then(&worker);
    // Its own word counts for nothing: what counts is what is found afterwards.
    child.wait().unwrap();
}

fn kill_everywhere(testbed: &Testbed, guest: &Guest, destination: bool, points: &[&str]) {
    let mut at = SiteName::A;
    for point in points {
        let side = if destination { at.other() } else { at };
        break_at(testbed, at, side, point, |worker| {
            testbed
                .site(side)
                .run(&format!("kill -9 {worker}; rm -f {HELD}"))
                .unwrap();
        });
        at = settled(testbed, guest, &format!("killed at {point}"));
    }
    // The same command then succeeds.
    move_guest(testbed, at, "");
    settled(testbed, guest, "the move after all that");
}

#[test]
fn the_source_killed_in_every_phase() {
    let testbed = sites(with(Hypervisor::Release));
    let guest = small_guest();
    testbed.start_guest(SiteName::A, &guest).unwrap();
    kill_everywhere(&testbed, &guest, false, &SOURCE);
}

#[test]
fn the_destination_killed_in_every_phase() {
    let testbed = sites(with(Hypervisor::Release));
    let guest = small_guest();
    testbed.start_guest(SiteName::A, &guest).unwrap();
    kill_everywhere(&testbed, &guest, true, &DESTINATION);
}

#[test]
fn without_shadow_paging_killed_after_the_suspend() {
    let testbed = sites(with(Hypervisor::Security));
    let guest = small_guest();
    testbed.start_guest(SiteName::A, &guest).unwrap();
    kill_everywhere(&testbed, &guest, false, &["suspended", "committed"]);
}

#[test]
fn the_link_cut() {
    let testbed = sites(with(Hypervisor::Release));
    let guest = small_guest();
    testbed.start_guest(SiteName::A, &guest).unwrap();
    let mut at = SiteName::A;
    for point in ["copying", "suspended", "committed"] {
        break_at(&testbed, at, at, point, |_| {
            testbed.cut_link().unwrap();
            testbed.site(at).run(&format!("rm -f {HELD}")).unwrap();
            // Longer than either side waits for a sign of life.
            thread::sleep(Duration::from_secs(30));
            testbed.mend_link().unwrap();
        });
        let place = settled(&testbed, &guest, &format!("link cut at {point}"));
        if place != at {
            at = place;
        }
    }
    move_guest(&testbed, at, "");
    settled(&testbed, &guest, "the move after all that");
}

#[test]
fn worker_and_guardian_killed_together() {
    let testbed = sites(with(Hypervisor::Release));
    let guest = small_guest();
    testbed.start_guest(SiteName::A, &guest).unwrap();
    for point in ["suspended", "committed"] {
        break_at(&testbed, SiteName::A, SiteName::A, point, |worker| {
            let script = format!(
                "for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2>/dev/null)\" != vmshadow-guard ] || \
                 kill -9 ${{p#/proc/}}; done; kill -9 {worker}; rm -f {HELD}"
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
