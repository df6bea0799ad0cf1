//! A move that is watched, steered and given up from another terminal.

use serde_json::Value;
use testbed::{Guest, Hypervisor, Link, SiteName, Testbed};

use crate::scene::{
    hold_at, migrate, report_of, said, settled, sites, sites_with_small_guest, small_guest,
    wait_until, with,
};

/// Where the source can be stopped while its move can still be given up, in the order of a move.
const SOURCE: [&str; 9] = [
    "connecting",
    "offering",
    "copying",
    "recopying",
    "suspending",
    "suspended",
    "last-round",
    "final-sent",
    "ready",
];

/// The same at the destination. While it owns nothing the source gets the guest back, whatever
/// that has committed to.
const DESTINATION: [&str; 6] = [
    "accepting",
    "receiving",
    "restoring",
    "restored",
    "ready",
    "commit-received",
];

/// The moves at work at a site.
fn status(testbed: &Testbed, at: SiteName) -> Vec<Value> {
    let json = testbed.site(at).run("vmshadow status --json").unwrap();
    serde_json::from_str(&json).unwrap()
}

fn one_status(testbed: &Testbed, at: SiteName) -> Value {
    let mut moves = status(testbed, at);
    assert_eq!(moves.len(), 1, "{moves:?}");
    moves.remove(0)
}

/// Cancels at `side` while a worker of `g1`, which leaves from A, stands at each point.
fn cancelled_at(testbed: &Testbed, guest: &Guest, side: SiteName, points: &[&str]) {
    let site = testbed.site(side);
    for point in points {
        site.run("rm -f /tmp/cancel-*").unwrap();
        let (moved, told) = hold_at(testbed, SiteName::A, side, point, |worker| {
            let before = one_status(testbed, side);
            assert_eq!(before["domain"], "g1", "{point}: {before}");
            assert_eq!(before["pid"].to_string(), worker, "{point}: {before}");
            assert_eq!(before["cancelling"], false, "{point}: {before}");
            // It is answered when the move has ended, and that stands still.
            site.run(
                "setsid sh -c 'vmshadow cancel g1 > /tmp/cancel-said 2>&1; \
                 echo $? > /tmp/cancel-status' > /dev/null 2>&1 < /dev/null &",
            )
            .unwrap();
            wait_until("the worker knows", || {
                one_status(testbed, side)["cancelling"] == true
            });
            assert!(site.run("cat /tmp/cancel-status").is_err(), "{point}");
        });
        assert!(!moved, "{point}: {told}");
        wait_until("the cancel is answered", || {
            site.run("cat /tmp/cancel-status").is_ok()
        });
        let answer = site.run("cat /tmp/cancel-status /tmp/cancel-said").unwrap();
        assert!(answer.starts_with('0'), "{point}: {answer}; {told}");
        assert!(answer.contains("Cancelled"), "{point}: {answer}");
        let after = format!("cancelled at {point}");
        assert_eq!(settled(testbed, guest, &after), SiteName::A, "{after}");
        assert!(status(testbed, side).is_empty());
    }
}

/// Once committed, a cancel is refused at once, and the move goes on.
fn refused_once_committed(testbed: &Testbed, guest: &Guest) {
    let (moved, told) = hold_at(testbed, SiteName::A, SiteName::A, "committed", |_| {
        assert_eq!(one_status(testbed, SiteName::A)["committed"], true);
        let refused = testbed
            .site(SiteName::A)
            .output("vmshadow cancel g1")
            .unwrap();
        assert!(!refused.status.success());
        assert!(said(&refused).contains("too late"), "{}", said(&refused));
    });
    assert!(moved, "{told}");
    assert_eq!(settled(testbed, guest, "too late"), SiteName::B);
}

/// A move that would take for ever at the rate it was given goes on once that is lifted.
fn limits_are_changed_on_the_way(testbed: &Testbed, guest: &Guest, from: SiteName) {
    let site = testbed.site(from);
    let command = migrate(from, "--bandwidth 256k --downtime 1");
    let mut child = site
        .command(&format!("{command} > /tmp/vmshadow-out 2>&1"))
        .spawn()
        .unwrap();
    wait_until("pages cross", || {
        let moves = status(testbed, from);
        moves.iter().any(|status| status["rate"].is_number())
    });
    let shown = site.run("vmshadow status g1").unwrap();
    assert!(shown.contains("bandwidth 0.256 Mbit/s"), "{shown}");
    // From the other end too.
    let arriving = one_status(testbed, from.other());
    assert_eq!(arriving["role"], "destination", "{arriving}");
    let set = site
        .run("vmshadow set g1 bandwidth=none downtime=2000")
        .unwrap();
    assert!(set.contains("unlimited") && set.contains("2000"), "{set}");
    let now = one_status(testbed, from);
    assert_eq!(now["bandwidth"], "none", "{now}");
    assert_eq!(now["downtime_ms"], 2000, "{now}");
    assert!(
        child.wait().unwrap().success(),
        "{}",
        site.run("cat /tmp/vmshadow-out").unwrap_or_default()
    );
    assert_eq!(settled(testbed, guest, "limits changed"), from.other());
    let none = site.output("vmshadow cancel g1").unwrap();
    assert!(said(&none).contains("No move of g1"), "{}", said(&none));
}

/// A move that is only foretold leaves everything as it was.
fn foretold(testbed: &Testbed, guest: &Guest, from: SiteName) {
    let site = testbed.site(from);
    let address = from.other().address();
    let dry_run = format!("vmshadow migrate g1 {address} --dry-run --json");
    let journals = || {
        let count = "ls /var/lib/vmshadow/moves | grep -c journal || true";
        testbed
            .sites()
            .each_ref()
            .map(|site| site.run(count).unwrap())
    };
    let before = journals();
    let told: Value = serde_json::from_str(&site.run(&dry_run).unwrap()).unwrap();
    assert_eq!(journals(), before);
    assert!(told["refused"].is_null(), "{told}");
    assert_eq!(told["guest"], "source", "{told}");
    assert!(told["link"]["probed_bytes"].is_number(), "{told}");
    let predicted = &told["predicted"];
    for field in ["seconds", "bytes", "downtime"] {
        assert!(predicted[field].as_f64().unwrap() > 0.0, "{told}");
    }
    assert!(told["memory"]["hot"].as_f64().unwrap() > 0.0, "{told}");
    // The other site has it as it left there, its random data too.
    assert!(told["recalled"].as_u64().unwrap() > 0, "{told}");
    let memory = |field: &str| told["memory"][field].as_u64().unwrap();
    assert!(memory("same") > memory("sampled") / 4, "{told}");
    assert_eq!(settled(testbed, guest, "a dry run"), from);
    // What the other site says of a guest that it would not take.
    let other = testbed.site(from.other());
    other.run("mv /etc/vmshadow/vmshadow.toml /root/").unwrap();
    let refused = site.output(&dry_run).unwrap();
    other.run("mv /root/vmshadow.toml /etc/vmshadow/").unwrap();
    assert!(!refused.status.success());
    assert!(
        said(&refused).contains("would refuse"),
        "{}",
        said(&refused)
    );
}

#[test]
fn a_move_is_steered_and_given_up() {
    let (testbed, guest) = sites_with_small_guest();
    cancelled_at(&testbed, &guest, SiteName::A, &["suspended"]);
    cancelled_at(&testbed, &guest, SiteName::B, &["receiving"]);
    refused_once_committed(&testbed, &guest);
    limits_are_changed_on_the_way(&testbed, &guest, SiteName::B);
    foretold(&testbed, &guest, SiteName::A);
}

#[test]
#[ignore = "minutes: make test-full"]
fn a_move_is_given_up_at_every_point() {
    let (testbed, guest) = sites_with_small_guest();
    cancelled_at(&testbed, &guest, SiteName::A, &SOURCE);
    cancelled_at(&testbed, &guest, SiteName::B, &DESTINATION);
    refused_once_committed(&testbed, &guest);
}

/// The cap of the guest's processor time, as stock tools see it.
fn cap(testbed: &Testbed, at: SiteName) -> String {
    let text = "xl sched-credit2 -d g1 | awk '$1 == \"g1\" { print $4 }'";
    testbed.site(at).run(text).unwrap().trim().to_owned()
}

/// A guest that may be slowed down has its processor time back when its move was given up, when
/// its worker was killed, and when it has arrived.
#[test]
#[ignore = "minutes: make test-full"]
fn a_guest_that_is_slowed_down() {
    let testbed = sites(with(Hypervisor::Release));
    let guest = Guest {
        run: vec!["rewrite 6 8".into()],
        ..small_guest()
    };
    testbed.start_guest(SiteName::A, &guest).unwrap();
    let site = testbed.site(SiteName::A);
    site.run("xl sched-credit2 -d g1 -c 90").unwrap();
    let slowed_down = |from: SiteName, then: &dyn Fn()| {
        let options = "--throttle 20 --downtime 0 --bandwidth 15M --retry 0";
        let (site, command) = (testbed.site(from), migrate(from, options));
        let mut child = site
            .command(&format!("{command} > /tmp/vmshadow-out 2>&1"))
            .spawn()
            .unwrap();
        let said = || site.run("cat /tmp/vmshadow-out").unwrap_or_default();
        wait_until("it is slowed down", || {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none(), "{}", said());
            said().contains("slowed down to")
        });
        then();
        (child.wait().unwrap().success(), said())
    };
    for end in ["vmshadow cancel g1", "kill -9 $(pgrep -x vmshadow)", ""] {
        let (moved, said) = slowed_down(SiteName::A, &|| {
            if !end.is_empty() {
                assert_ne!(cap(&testbed, SiteName::A), "90");
                site.run(end).unwrap();
            }
        });
        let at = settled(&testbed, &guest, end);
        assert_eq!(moved, end.is_empty(), "{said}");
        assert_eq!(at == SiteName::B, moved);
        assert_eq!(cap(&testbed, at), "90", "{end}");
    }

    // Started again, it has what its configuration said when it stopped.
    let before = testbed.status(SiteName::B, &guest).unwrap();
    let (moved, said) = slowed_down(SiteName::B, &|| {
        testbed.ask(SiteName::B, &guest, "reboot").unwrap();
    });
    assert!(!moved, "{said}");
    wait_until("it is up again", || {
        let status = testbed.status(SiteName::B, &guest);
        status.is_ok_and(|status| status.boot_id != before.boot_id)
    });
    assert_eq!(testbed.where_is("g1").unwrap(), [SiteName::B]);
    assert_eq!(cap(&testbed, SiteName::B), "90");
}

/// A site that is far away is reached by several connections, whatever cores dom0 has. Where packets
/// are lost all the time pages cross by what fills such a link, though the host's own congestion
/// control does not.
#[test]
fn a_long_link_that_loses_packets() {
    let (testbed, guest) = sites_with_small_guest();
    for site in testbed.sites() {
        site.run("vmshadow shadows --drop-all").unwrap();
        let own = site.run("sysctl -n net.ipv4.tcp_congestion_control");
        assert_eq!(own.unwrap().trim(), "cubic");
    }
    testbed
        .set_link(&Link {
            rtt_ms: 120.0,
            mbit: Some(20.0),
            loss_percent: 2.0,
        })
        .unwrap();
    let report = report_of(&testbed, SiteName::A, "");
    assert_eq!(report["link"]["congestion"], "bbr", "{report}");
    assert_eq!(report["link"]["direct"], true, "{report}");
    assert!(
        report["link"]["connections"].as_u64() >= Some(4),
        "{report}"
    );
    testbed.set_link(&Link::default()).unwrap();
    assert_eq!(settled(&testbed, &guest, "lost packets"), SiteName::B);
}

/// A shadow that is renewed is one move: what is set in a pause holds for the next time, and a cancel
/// in a pause ends it.
#[test]
#[ignore = "minutes: make test-full"]
fn a_shadow_that_is_renewed() {
    let (testbed, guest) = sites_with_small_guest();
    let site = testbed.site(SiteName::A);
    let to = SiteName::B.address();
    site.run(&format!(
        "rm -f /tmp/renewing-*; setsid sh -c 'vmshadow shadow g1 {to} --every 10 --json \
         > /tmp/renewing-said 2>&1; echo $? > /tmp/renewing-status' > /dev/null 2>&1 < /dev/null &"
    ))
    .unwrap();
    let waits = || {
        let now = status(&testbed, SiteName::A);
        now.first().filter(|it| it["waiting"] == true).cloned()
    };
    wait_until("it was sent once", || waits().is_some());
    let before = waits().unwrap();
    site.run("vmshadow set g1 bandwidth=20M").unwrap();
    wait_until("it is sent again", || {
        one_status(&testbed, SiteName::A)["move_id"] != before["move_id"]
    });
    let next = one_status(&testbed, SiteName::A);
    assert_eq!(next["bandwidth"], 20_000_000, "{next}");
    wait_until("it was sent twice", || waits().is_some());
    let cancelled = site.run("vmshadow cancel g1 --json").unwrap();
    let cancelled: Value = serde_json::from_str(&cancelled).unwrap();
    assert_eq!(cancelled["guest"], "source", "{cancelled}");
    wait_until("it has ended", || {
        site.run("cat /tmp/renewing-status").is_ok()
    });
    let ended = site.run("cat /tmp/renewing-status").unwrap();
    assert_eq!(ended.trim(), "0");
    assert!(status(&testbed, SiteName::A).is_empty());
    assert_eq!(settled(&testbed, &guest, "a renewed shadow"), SiteName::A);
    let other = testbed.site(SiteName::B);
    other.run("vmshadow shadows --drop-all").unwrap();
}
