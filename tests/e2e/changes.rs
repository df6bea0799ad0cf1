//! Guests that change while they move: a correct move, or a clear error with the guest at the
//! source.

use std::thread;
use std::time::{Duration, Instant};

use testbed::{Guest, Hypervisor, Kind, Options, SiteName, Testbed};

use crate::scene::{hold_at, move_guest, nothing_left, settled, sites, with};

fn growing_guest() -> Guest {
    Guest {
        memory_mib: 112,
        maximum_mib: 144,
        vcpus: 2,
        run: vec!["rewrite 2 4".into(), "random 4".into()],
        ..Guest::new("g1", 101)
    }
}

/// Sets the guest's balloon at `site` and waits until it has that size.
fn balloon(testbed: &Testbed, site: SiteName, mib: u32) {
    let site = testbed.site(site);
    site.run(&format!("xl mem-set g1 {mib}")).unwrap();
    let deadline = Instant::now() + Duration::from_secs(180);
    loop {
        let listed = site.run("xl list g1 | awk 'NR == 2 { print $3 }'").unwrap();
        if listed.trim() == mib.to_string() {
            return;
        }
        assert!(Instant::now() < deadline, "It has {listed} MiB");
        thread::sleep(Duration::from_millis(200));
    }
}

/// Memory that comes and goes between two rounds.
fn ballooned_on_the_way(options: Options, kind: Kind, tracker: &str, sizes: &[u32]) {
    let testbed = sites(options);
    let guest = match kind {
        // Emulated, what it does is so slow that it leaves dom0 little of the processor.
        Kind::Pvh => Guest {
            kind,
            vcpus: 1,
            run: vec!["rewrite 1 1".into(), "random 4".into()],
            ..growing_guest()
        },
        _ => growing_guest(),
    };
    testbed.start_guest(SiteName::A, &guest).unwrap();
    let listed = testbed.site(SiteName::A).run("vmshadow list").unwrap();
    assert!(listed.contains(tracker), "{listed}");
    let mut at = SiteName::A;
    for &mib in sizes {
        let (moved, said) = hold_at(&testbed, at, at, "recopying", |_| {
            balloon(&testbed, at, mib);
        });
        assert!(moved, "ballooned to {mib} MiB: {said}");
        at = at.other();
        let place = settled(&testbed, &guest, &format!("ballooned to {mib} MiB"));
        assert_eq!(place, at);
    }
}

#[test]
fn ballooned_on_the_way_with_log_dirty() {
    ballooned_on_the_way(with(Hypervisor::Release), Kind::Pv, "log-dirty", &[88]);
}

#[test]
#[ignore = "minutes: make test-full"]
fn ballooned_up_and_down_with_log_dirty() {
    ballooned_on_the_way(with(Hypervisor::Release), Kind::Pv, "log-dirty", &[88, 136]);
}

#[test]
#[ignore = "minutes: make test-full"]
fn ballooned_on_the_way_with_scan() {
    ballooned_on_the_way(with(Hypervisor::Security), Kind::Pv, "scan", &[88, 136]);
}

/// A PVH guest that began with less memory than it may have. There is log-dirty for it where there
/// is none for PV guests.
#[test]
#[ignore = "minutes: make test-full"]
fn a_pvh_guest_ballooned_on_the_way_without_shadow_paging() {
    ballooned_on_the_way(
        with(Hypervisor::Security),
        Kind::Pvh,
        "log-dirty",
        // With less, its kernel finds no room for its network's rings when it goes on, whoever moves
        // it.
        &[100, 136],
    );
}

#[test]
#[ignore = "minutes: make test-full"]
fn a_device_or_a_vcpu_that_comes_or_goes_on_the_way() {
    let testbed = sites(with(Hypervisor::Release));
    let guest = growing_guest();
    testbed.start_guest(SiteName::A, &guest).unwrap();
    for (point, change, undo, word) in [
        (
            "copying",
            "xl network-attach g1 bridge=xenbr0 mac=00:16:3e:4d:00:77",
            "xl network-detach g1 00:16:3e:4d:00:77",
            "nics changed",
        ),
        (
            "copying",
            "xl vcpu-set g1 1",
            "xl vcpu-set --ignore-host g1 2",
            "changed",
        ),
        (
            "suspending",
            "xl network-attach g1 bridge=xenbr0 mac=00:16:3e:4d:00:77",
            "xl network-detach g1 00:16:3e:4d:00:77",
            "nics changed",
        ),
    ] {
        let site = testbed.site(SiteName::A);
        let (moved, said) = hold_at(&testbed, SiteName::A, SiteName::A, point, |_| {
            site.run(change).unwrap();
            // The guest answers in its own time.
            thread::sleep(Duration::from_secs(3));
        });
        assert!(!moved && said.contains(word), "{change}: {said}");
        assert_eq!(settled(&testbed, &guest, change), SiteName::A);
        site.run(undo).unwrap();
        thread::sleep(Duration::from_secs(3));
    }
    move_guest(&testbed, SiteName::A, "");
    assert_eq!(settled(&testbed, &guest, "the move"), SiteName::B);
}

/// The guest ends, or its operator ends it, in the middle: no move, and nothing is left.
fn ends_on_the_way(ends: &[(&str, &str)]) {
    let testbed = sites(with(Hypervisor::Release));
    let guest = growing_guest();
    for (point, end) in ends {
        testbed.start_guest(SiteName::A, &guest).unwrap();
        let (moved, said) = hold_at(&testbed, SiteName::A, SiteName::A, point, |_| {
            testbed.site(SiteName::A).run(end).unwrap();
        });
        assert!(!moved, "{end} at {point}: {said}");
        testbed.stop_guest("g1").unwrap();
        nothing_left(&testbed, &format!("{end} at {point}"));
    }
}

#[test]
fn a_guest_that_ends_on_the_way() {
    ends_on_the_way(&[
        ("recopying", "xl shutdown -w g1"),
        ("suspending", "xl destroy g1"),
    ]);
}

#[test]
#[ignore = "minutes: make test-full"]
fn a_guest_that_ends_while_it_is_read() {
    ends_on_the_way(&[("copying", "xl destroy g1")]);
}
