//! A guest of zeros, with a kernel other than Linux: it describes its p2m by the tree form.

use std::thread;
use std::time::{Duration, Instant};

use testbed::{Guest, Hypervisor, Kind, SiteName, Testbed};

use crate::scene::{migrate, report_of, said, settled, sites, with};

/// Waits until the guest has been resumed so often since its boot.
fn wait_until_resumed(testbed: &Testbed, guest: &Guest, times: u32) {
    let deadline = Instant::now() + Duration::from_secs(180);
    loop {
        let resumed = testbed.resumed(guest);
        if resumed.as_ref().is_ok_and(|resumed| *resumed == times) {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "Resumed {resumed:?} times, not {times}"
        );
        thread::sleep(Duration::from_millis(500));
    }
}

#[test]
fn an_empty_guest_goes_by_each_tracker_and_by_stock_tools() {
    goes_by(&[("log-dirty", SiteName::A), ("scan", SiteName::B)]);
}

#[test]
#[ignore = "minutes: make test-full"]
fn an_empty_guest_goes_there_and_back_with_each_tracker() {
    goes_by(&[
        ("log-dirty", SiteName::A),
        ("log-dirty", SiteName::B),
        ("scan", SiteName::A),
        ("scan", SiteName::B),
    ]);
}

/// Moves with these trackers from these sites, there and back; then by the stock tools, a suspend
/// that is cancelled, and a reboot, which the guest must come out of as from ours.
fn goes_by(moves: &[(&str, SiteName)]) {
    let guest = Guest {
        kind: Kind::Empty,
        memory_mib: 64,
        ..Guest::new("g1", 101)
    };
    let testbed = sites(with(Hypervisor::Release));
    testbed.start_guest(SiteName::A, &guest).unwrap();
    let mut resumed = 0;
    for &(tracker, from) in moves {
        let report = report_of(&testbed, from, &format!("--tracker {tracker}"));
        assert_eq!(report["tracker"], tracker, "{report}");
        assert_eq!(report["verified"], true, "{report}");
        let first = &report["rounds"][0];
        let count = |class: &str| first[class].as_u64().unwrap();
        // All but the image, the p2m of 64 pages, page tables and rings. A site that has a
        // shadow of it has its zeros.
        assert!(
            count("zero") + count("same") + 256 > count("pages"),
            "{report}"
        );
        let at = settled(&testbed, &guest, &format!("{tracker} from {from:?}"));
        assert_eq!(at, from.other());
        resumed += 1;
        wait_until_resumed(&testbed, &guest, resumed);
    }
    let site = testbed.site(SiteName::A);
    site.run("xl migrate g1 10.77.0.12").unwrap();
    wait_until_resumed(&testbed, &guest, resumed + 1);
    let site = testbed.site(SiteName::B);
    site.run("xl save -c g1 /var/tmp/g1.save && rm /var/tmp/g1.save")
        .unwrap();
    wait_until_resumed(&testbed, &guest, resumed + 2);
    let moved = site.output(&migrate(SiteName::B, "")).unwrap();
    assert!(moved.status.success(), "{}", said(&moved));
    wait_until_resumed(&testbed, &guest, resumed + 3);
    testbed.site(SiteName::A).run("xl reboot g1").unwrap();
    wait_until_resumed(&testbed, &guest, 0);
    assert_eq!(testbed.where_is("g1").unwrap(), [SiteName::A]);
}
