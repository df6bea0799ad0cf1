//! Guests that move.

use std::thread;
use std::time::{Duration, Instant};

use testbed::{Guest, Hypervisor, Options, SiteName, Testbed};

use crate::scene::{alive, full, move_guest, settled, sites, with};

/// There and back while a client watches: its connection lives, the counter never repeats, memory
/// is right, and after the last arrival a reboot from inside brings the guest up again.
fn there_and_back(testbed: &Testbed, guest: &Guest, trips: u32, tracker: &str) {
    testbed.start_guest(SiteName::A, guest).unwrap();
    let before = testbed.status(SiteName::A, guest).unwrap();
    let watch = testbed.watch(SiteName::A, guest).unwrap();
    for trip in 1..=trips {
        for from in [SiteName::A, SiteName::B] {
            let report = move_guest(testbed, from, "--json");
            assert!(
                report.contains(&format!("\"tracker\": \"{tracker}\"")),
                "{report}"
            );
            assert!(report.contains("\"verified\": true"), "{report}");
            let at = settled(testbed, guest, &format!("trip {trip} from {from:?}"));
            assert_eq!(at, from.other());
        }
    }
    thread::sleep(Duration::from_secs(2));
    let seen = watch.finish().unwrap();
    seen.intact().unwrap();
    assert!(seen.ping.received > 0);
    let after = testbed.status(SiteName::A, guest).unwrap();
    assert_eq!(after.boot_id, before.boot_id);
    assert!(after.counter > before.counter);

    move_guest(testbed, SiteName::A, "");
    testbed.ask(SiteName::A, guest, "reboot").unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        thread::sleep(Duration::from_secs(1));
        match testbed.status(SiteName::A, guest) {
            Ok(status) if status.boot_id != before.boot_id => break,
            other => assert!(Instant::now() < deadline, "Not up again: {other:?}"),
        }
    }
    assert_eq!(testbed.where_is("g1").unwrap(), [SiteName::B]);
    alive(testbed, guest, "reboot");
}

#[test]
fn with_log_dirty_there_and_back() {
    let testbed = sites(with(Hypervisor::Release));
    let guest = Guest {
        run: vec!["rewrite 4 4".into(), "random 8".into(), "text 8".into()],
        ..Guest::new("g1", 101)
    };
    there_and_back(&testbed, &guest, if full() { 5 } else { 2 }, "log-dirty");
}

#[test]
fn without_shadow_paging_there_and_back_where_stock_fails() {
    let options = Options {
        cpus: 2,
        dom0_vcpus: 2,
        ..with(Hypervisor::Security)
    };
    let testbed = sites(options);
    let guest = Guest {
        vcpus: 2,
        memory_mib: 192,
        run: vec!["rewrite 4 4".into(), "random 8".into()],
        ..Guest::new("g1", 101)
    };
    there_and_back(&testbed, &guest, if full() { 5 } else { 1 }, "scan");
    let stock = testbed
        .site(SiteName::B)
        .output("xl migrate g1 10.77.0.11")
        .unwrap();
    assert!(
        !stock.status.success(),
        "Stock tools move PV guests again: say so in the README"
    );
}

#[test]
fn a_guest_larger_than_dom0() {
    let options = Options {
        dom0_memory_mib: 384,
        ..with(Hypervisor::Release)
    };
    let testbed = sites(options);
    let guest = Guest {
        memory_mib: 512,
        run: vec!["random 16".into()],
        ..Guest::new("g1", 101)
    };
    testbed.start_guest(SiteName::A, &guest).unwrap();
    move_guest(&testbed, SiteName::A, "");
    assert_eq!(settled(&testbed, &guest, "the move"), SiteName::B);
}
