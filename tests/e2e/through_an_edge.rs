//! Guests behind an edge: their sites have networks of their own, and a move changes the address
//! behind which they are reached.
//!
//! The last in the order of names: what these tests make of their sites no other test can use.

use std::thread;
use std::time::Duration;

use serde_json::Value;
use testbed::{Edge, Guest, Hypervisor, SERVER, SiteName, Testbed};

use crate::scene::{
    alive, hold_at, report_of, said, settled, sites_to_change, small_guest, wait_until, with,
};

/// Two sites, the edge, and a guest behind it at site a.
fn behind_an_edge() -> (Testbed, Guest, Edge) {
    let testbed = sites_to_change(with(Hypervisor::Release));
    let guest = Guest {
        behind_edge: true,
        ..small_guest()
    };
    let edge = Edge::set_up(&testbed, &[&guest]).unwrap();
    testbed.start_guest(SiteName::A, &guest).unwrap();
    (testbed, guest, edge)
}

/// The tables and neighbour entries for guests at a site.
fn paths(testbed: &Testbed, site: SiteName) -> String {
    testbed
        .site(site)
        .run(
            "nft list tables | grep -v -e 'ip nat' -e outgoing; \
             ip neighbour show nud permanent dev xenbr1; ls /run/vmshadow/paths 2>/dev/null || true",
        )
        .unwrap()
}

fn only_path_is_at(testbed: &Testbed, site: SiteName) {
    let here = paths(testbed, site);
    assert!(here.contains("g1") && here.contains("10.7.0.101"), "{here}");
    assert_eq!(paths(testbed, site.other()).trim(), "");
}

/// Begins a connection of the guest's own to a server on the WAN: as whom it is seen there.
fn call(testbed: &Testbed, guest: &Guest) -> String {
    let begun = testbed
        .ask(SiteName::A, guest, &format!("call {SERVER}"))
        .unwrap();
    begun["known_as"].as_str().unwrap().to_owned()
}

/// The guest's own connections all go on, as whom they were begun.
fn calls_go_on(testbed: &Testbed, guest: &Guest, known_as: &[String]) {
    let calls = || {
        let answer = testbed.ask(SiteName::A, guest, "calls").unwrap();
        answer["calls"].as_array().unwrap().clone()
    };
    let before = calls();
    let names: Vec<_> = before.iter().map(|call| call["known_as"].clone()).collect();
    assert_eq!(names, known_as);
    wait_until("each connection carries more", || {
        let now = calls();
        for call in &now {
            assert_eq!(call["ended"], Value::Null, "{now:?}");
        }
        now.iter()
            .zip(&before)
            .all(|(now, before)| now["echoed"].as_u64() > before["echoed"].as_u64())
    });
}

/// One move of a guest behind the edge: a client's connections were kept, and its path is where it
/// is.
fn moves_with_its_connections(testbed: &Testbed, guest: &Guest, from: SiteName) {
    let report = report_of(testbed, from, "");
    let connections = &report["connections"];
    assert!(connections["kept"].as_u64() >= Some(1), "{report}");
    assert_eq!(connections["closed"], 0, "{report}");
    let at = settled(testbed, guest, &format!("a move from {from:?}"));
    assert_eq!(at, from.other());
    only_path_is_at(testbed, at);
}

#[test]
fn connections_outlive_moves_between_networks() {
    outlive(&[SiteName::A, SiteName::B]);
}

#[test]
#[ignore = "minutes: make test-full"]
fn connections_outlive_more_moves_between_networks() {
    outlive(&[SiteName::A, SiteName::B, SiteName::A, SiteName::B]);
}

/// Moves from these sites while a client watches by the edge: its connection lives.
fn outlive(moves: &[SiteName]) {
    let (testbed, guest, edge) = behind_an_edge();
    // From the site without the edge: across the WAN, as most clients.
    let watch = testbed.watch(SiteName::B, &guest).unwrap();
    // A path that is there is replaced under those who use it.
    testbed
        .site(SiteName::A)
        .run("vmshadow proxy open g1")
        .unwrap();
    for from in moves {
        moves_with_its_connections(&testbed, &guest, *from);
    }
    thread::sleep(Duration::from_secs(2));
    let seen = watch.finish().unwrap();
    seen.intact().unwrap();
    let log = edge.log(&testbed).unwrap();
    assert!(!log.contains("ERROR"), "{log}");
    let list = testbed
        .site(SiteName::B)
        .run("vmshadow proxy list")
        .unwrap();
    assert!(list.contains("g1"), "{list}");
}

/// What the guest has begun itself goes on through its old site.
#[test]
#[ignore = "minutes: make test-full"]
fn the_guests_own_connections_outlive_moves() {
    let (testbed, guest, edge) = behind_an_edge();
    edge.lead_outgoing(&testbed).unwrap();
    let mut known_as = vec![call(&testbed, &guest)];
    assert_eq!(known_as, ["10.77.0.11"]);
    let watch = testbed.watch(SiteName::B, &guest).unwrap();
    for from in [SiteName::A, SiteName::B, SiteName::A, SiteName::B] {
        moves_with_its_connections(&testbed, &guest, from);
        if known_as.len() == 1 {
            known_as.push(call(&testbed, &guest));
            assert_eq!(known_as[1], "10.77.0.12");
        }
        calls_go_on(&testbed, &guest, &known_as);
    }
    watch.finish().unwrap().intact().unwrap();
    edge.leave_outgoing(&testbed).unwrap();
}

/// A guest that is reached by its own address everywhere: a move changes the route.
#[test]
#[ignore = "minutes: make test-full"]
fn connections_outlive_moves_of_a_routed_guest() {
    let (testbed, guest, edge) = behind_an_edge();
    let here = testbed.site(SiteName::A);
    here.run("vmshadow proxy close g1").unwrap();
    edge.reach_by_routes(&testbed, &[&guest], SiteName::A)
        .unwrap();
    let watch = testbed.watch(SiteName::B, &guest).unwrap();
    let before = retargeted(&testbed);
    for from in [SiteName::A, SiteName::B] {
        // As an overlay does it: between the suspend and the guest's first act at the other site.
        let (moved, text) = hold_at(&testbed, from, from, "ready", |_| {
            edge.route(&testbed, &guest, from.other()).unwrap();
        });
        assert!(moved, "{text}");
        let at = settled(&testbed, &guest, &format!("routed from {from:?}"));
        assert_eq!(at, from.other());
    }
    thread::sleep(Duration::from_secs(2));
    watch.finish().unwrap().intact().unwrap();
    assert!(retargeted(&testbed) >= before + 2);
}

/// Connections that the proxy has made anew so far.
fn retargeted(testbed: &Testbed) -> u32 {
    let line = "vmshadow proxy metrics | sed -n 's/^netproxy_retargets_total{.*} //p'";
    let text = testbed.site(SiteName::A).run(line).unwrap();
    text.trim().parse().unwrap()
}

/// A move that fails, however late, leaves connections and paths where they were; one whose worker
/// is killed after the commit takes them along.
#[test]
#[ignore = "minutes: make test-full"]
fn connections_stay_with_the_guest() {
    let (testbed, guest, _edge) = behind_an_edge();
    let watch = testbed.watch(SiteName::A, &guest).unwrap();
    let here = testbed.site(SiteName::A);
    for point in ["recopying", "final-sent"] {
        let (moved, text) = hold_at(&testbed, SiteName::A, SiteName::A, point, |pid| {
            here.run(&format!("kill -TERM {pid}")).unwrap();
        });
        assert!(!moved, "{text}");
        assert_eq!(settled(&testbed, &guest, point), SiteName::A);
        only_path_is_at(&testbed, SiteName::A);
    }
    let (moved, text) = hold_at(&testbed, SiteName::A, SiteName::A, "ready", |pid| {
        here.run(&format!("kill -KILL {pid}")).unwrap();
    });
    assert!(!moved, "{text}");
    assert_eq!(settled(&testbed, &guest, "a kill"), SiteName::A);
    wait_until("the path is closed", || {
        paths(&testbed, SiteName::B).trim().is_empty()
    });
    let (_, text) = hold_at(&testbed, SiteName::A, SiteName::A, "acknowledged", |pid| {
        here.run(&format!("kill -KILL {pid}")).unwrap();
    });
    assert_eq!(settled(&testbed, &guest, &text), SiteName::B);
    wait_until("the path is closed", || {
        paths(&testbed, SiteName::A).trim().is_empty()
    });
    thread::sleep(Duration::from_secs(2));
    watch.finish().unwrap().intact().unwrap();
    alive(&testbed, &guest, "all");

    // Who has no edge to speak to does not lose connections unasked.
    let there = testbed.site(SiteName::B);
    there
        .run("sed -i 's/^host.*/host = \"10.77.0.99\"/' /etc/vmshadow/vmshadow.toml")
        .unwrap();
    let refused = there.output("vmshadow migrate g1 10.77.0.11").unwrap();
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    assert!(said(&refused).contains("--no-edge"), "{}", said(&refused));
    assert_eq!(settled(&testbed, &guest, "the refusal"), SiteName::B);

    // Unasked by its source, the edge is told by the destination.
    there
        .run("vmshadow migrate g1 10.77.0.11 --no-edge")
        .unwrap();
    assert_eq!(settled(&testbed, &guest, "no edge"), SiteName::A);
    wait_until("the edge has it there", || {
        let line = "vmshadow proxy list | awk '$1 == \"g1\" { print $2; exit }'";
        here.run(line).unwrap().trim() == "a"
    });
}
