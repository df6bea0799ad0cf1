//! Guests that move.

use std::thread;
use std::time::{Duration, Instant};

use testbed::{Guest, Hypervisor, Kind, Options, SiteName, Testbed};

use crate::scene::{
    Sites, alive, migrate, move_guest, report_of, said, settled, sites, small_guest, with,
};

/// What a firewall between the sites lets through.
enum Way {
    Open,
    ThroughSshAlone,
}

impl Way {
    /// Does something while `site` is reached so.
    fn to<T>(&self, testbed: &Testbed, site: SiteName, what: impl FnOnce() -> T) -> T {
        let site = testbed.site(site);
        if let Way::ThroughSshAlone = self {
            let firewall = "nft 'add table inet way; \
                 add chain inet way input { type filter hook input priority 0; }; \
                 add rule inet way input tcp dport 1024-65535 tcp flags & (syn | ack) == syn drop'";
            site.run(firewall).unwrap();
        }
        let done = what();
        if let Way::ThroughSshAlone = self {
            site.run("nft delete table inet way").unwrap();
        }
        done
    }
}

/// There and back while a client watches: its connection lives, the counter never repeats, and
/// memory is right.
fn there_and_back(testbed: &Testbed, guest: &Guest, trips: u32, tracker: &str) {
    testbed.start_guest(SiteName::A, guest).unwrap();
    let before = testbed.status(SiteName::A, guest).unwrap();
    let watch = testbed.watch(SiteName::A, guest).unwrap();
    for trip in 1..=trips {
        for from in [SiteName::A, SiteName::B] {
            // One way to cross is as good as the other.
            let (way, more, connections, direct) = match (trip, from) {
                (2, SiteName::A) => (Way::Open, "--connections 3", 3, true),
                (2, SiteName::B) => (Way::Open, "--connections 3 --no-direct", 3, false),
                (3, SiteName::A) => (Way::ThroughSshAlone, "--connections 3", 3, false),
                _ => (Way::Open, "--connections 1", 1, false),
            };
            let congestion = if trip == 2 { "reno" } else { "cubic" };
            let more = format!("{more} --congestion {congestion}");
            let report = way.to(testbed, from.other(), || report_of(testbed, from, &more));
            assert_eq!(report["tracker"], tracker, "{report}");
            assert_eq!(report["verified"], true, "{report}");
            assert_eq!(report["link"]["connections"], connections, "{report}");
            assert_eq!(report["link"]["direct"], direct, "{report}");
            assert_eq!(report["link"]["congestion"], congestion, "{report}");
            let crossed = |class: &str| -> u64 {
                let rounds = report["rounds"].as_array().unwrap();
                rounds
                    .iter()
                    .filter_map(|round| round[class].as_u64())
                    .sum()
            };
            let recalled = report["recalled"].as_u64().unwrap();
            if trip == 1 && from == SiteName::A {
                assert_eq!(recalled, 0, "{report}");
                // A running system has pages twice, and changes some a little while they cross.
                for class in ["zero", "reference", "delta", "raw"] {
                    assert!(crossed(class) > 0, "No {class}: {report}");
                }
            } else {
                // From then on each site has a shadow of it.
                assert!(recalled > 0 && crossed("same") > 0, "{report}");
            }
            let at = settled(testbed, guest, &format!("trip {trip} from {from:?}"));
            assert_eq!(at, from.other());
            let now = testbed.status(SiteName::A, guest).unwrap();
            let trip = format!("Started anew on trip {trip} from {from:?}");
            assert_eq!(now.boot_id, before.boot_id, "{trip}");
        }
    }
    thread::sleep(Duration::from_secs(2));
    let seen = watch.finish().unwrap();
    let breach = seen.intact().err();
    assert_eq!(breach, None, "{seen:?}");
    assert!(seen.ping.received > 0);
    let after = testbed.status(SiteName::A, guest).unwrap();
    assert_eq!(after.boot_id, before.boot_id);
    assert!(after.counter > before.counter);
}

/// Once more there, by the other way to find what changed where there are two; a reboot from inside
/// brings the guest up again.
fn reboots_after_arrival((testbed, guest): (Sites, Guest)) {
    let (testbed, guest) = (&testbed, &guest);
    let before = testbed.status(SiteName::A, guest).unwrap();
    let text = move_guest(testbed, SiteName::A, "--json --tracker scan");
    assert!(text.contains("\"tracker\": \"scan\""), "{text}");
    testbed.ask(SiteName::A, guest, "reboot").unwrap();
    let deadline = Instant::now() + Duration::from_secs(300);
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

/// One row of the matrix. Its sites, and its guest at the first of them.
fn row(
    hypervisor: Hypervisor,
    kind: Kind,
    dom0: (u32, u32),
    vcpus: u32,
    memory_mib: u32,
    trips: u32,
) -> (Sites, Guest) {
    let (dom0_vcpus, dom0_memory_mib) = dom0;
    let options = Options {
        cpus: dom0_vcpus,
        dom0_vcpus,
        dom0_memory_mib,
        ..with(hypervisor)
    };
    let testbed = sites(options);
    let run: &[&str] = match (kind, memory_mib) {
        // Hardly more than its kernel needs.
        (_, ..=96) => &["rewrite 1 4", "random 1"],
        // Emulated, what it does is so slow that it leaves dom0 little of the processor.
        (Kind::Pvh, _) => &["rewrite 1 1", "random 4"],
        _ => &["rewrite 4 4", "random 8", "text 8"],
    };
    let guest = Guest {
        kind,
        vcpus,
        memory_mib,
        run: run.iter().map(|line| (*line).to_owned()).collect(),
        ..Guest::new("g1", 101)
    };
    there_and_back(&testbed, &guest, trips, tracker(hypervisor, kind));
    (testbed, guest)
}

/// How changed pages are found. Hardware-assisted paging has a log on every hypervisor.
fn tracker(hypervisor: Hypervisor, kind: Kind) -> &'static str {
    match (hypervisor, kind) {
        (Hypervisor::Release, _) | (_, Kind::Pvh) => "log-dirty",
        (Hypervisor::Security, _) => "scan",
    }
}

// Every pair of hypervisor, CPUs of dom0, vCPUs and memory is in one of these four, two vCPUs and one
// CPU of dom0 in `changes`.
// A reboot from inside takes a large guest as it takes a small one, and minutes.
// Five times there and back once, the others less often; all of them five times in the whole matrix.
// Debian's kernel takes 58 MiB from its 16th on, so 96 MiB is the least it runs in, with one vCPU:
// 64 MiB is `empty`'s. They run in the order of their names, so that those that need the same sites
// follow one another.

#[test]
fn log_dirty_96_mib_one_vcpu() {
    reboots_after_arrival(row(Hypervisor::Release, Kind::Pv, (1, 1024), 1, 96, 5));
}

#[test]
fn scan_128_mib_two_vcpus_two_cpus_of_dom0() {
    let row = row(Hypervisor::Security, Kind::Pv, (2, 1024), 2, 128, 1);
    only_scan_can(&row.0, &row.1);
    reboots_after_arrival(row);
}

#[test]
fn scan_512_mib_one_vcpu() {
    row(Hypervisor::Security, Kind::Pv, (1, 1024), 1, 512, 1);
}

#[test]
fn tracked_by_log_dirty_512_mib_larger_than_dom0_two_vcpus_two_cpus_of_dom0() {
    let (testbed, _) = row(Hypervisor::Release, Kind::Pv, (2, 384), 2, 512, 1);
    // Hosts with two CPUs, and one vCPU.
    testbed.stop_guest("g1").unwrap();
    let guest = small_guest();
    testbed.start_guest(SiteName::A, &guest).unwrap();
    move_guest(&testbed, SiteName::A, "");
    assert_eq!(settled(&testbed, &guest, "the small one"), SiteName::B);
}

/// On the sites that other tests use.
#[test]
#[ignore = "minutes: make test-full"]
fn a_pvh_guest() {
    reboots_after_arrival(row(Hypervisor::Release, Kind::Pvh, (1, 1024), 1, 128, 2));
}

/// The largest guests: with less memory dom0 is the smaller one.
const LARGEST: u32 = 512;

/// The rows of the matrix with guests of all sizes.
fn all_sizes(hypervisor: Hypervisor, dom0_vcpus: u32) {
    let dom0 = (dom0_vcpus, 1024);
    for vcpus in [1, 2] {
        let least = if vcpus == 1 { 96 } else { 128 };
        for memory_mib in [least, 192, LARGEST] {
            eprintln!("{vcpus} vCPUs, {memory_mib} MiB");
            reboots_after_arrival(row(hypervisor, Kind::Pv, dom0, vcpus, memory_mib, 5));
        }
        // Where several processors are emulated, one of several vCPUs ends by itself: see
        // docs/testing.md.
        if (vcpus, dom0_vcpus) == (2, 2) {
            continue;
        }
        eprintln!("{vcpus} vCPUs, PVH");
        reboots_after_arrival(row(hypervisor, Kind::Pvh, dom0, vcpus, 192, 2));
    }
}

/// Those with guests that are larger than their dom0.
fn larger_than_dom0(hypervisor: Hypervisor, dom0_vcpus: u32) {
    for vcpus in [1, 2] {
        eprintln!("{vcpus} vCPUs");
        let dom0 = (dom0_vcpus, 384);
        reboots_after_arrival(row(hypervisor, Kind::Pv, dom0, vcpus, LARGEST, 5));
    }
}

/// The whole matrix, a test for each kind of sites: so that a part of it can be run.
mod whole_matrix {
    use super::{Hypervisor, all_sizes, larger_than_dom0};

    macro_rules! sites {
        ($($name:ident: $rows:ident, $hypervisor:ident, $dom0_vcpus:literal;)*) => {$(
            #[test]
            #[ignore = "minutes: make test-full"]
            fn $name() {
                $rows(Hypervisor::$hypervisor, $dom0_vcpus);
            }
        )*};
    }

    sites! {
        log_dirty_dom0_of_one_cpu: all_sizes, Release, 1;
        log_dirty_dom0_of_two_cpus: all_sizes, Release, 2;
        log_dirty_larger_than_dom0_of_one_cpu: larger_than_dom0, Release, 1;
        log_dirty_larger_than_dom0_of_two_cpus: larger_than_dom0, Release, 2;
        scan_dom0_of_one_cpu: all_sizes, Security, 1;
        scan_dom0_of_two_cpus: all_sizes, Security, 2;
        scan_larger_than_dom0_of_one_cpu: larger_than_dom0, Security, 1;
        scan_larger_than_dom0_of_two_cpus: larger_than_dom0, Security, 2;
    }
}

/// Without shadow paging there is no log of dirty pages: it can't be forced, and stock tools, which
/// need it, fail.
fn only_scan_can(testbed: &Testbed, guest: &Guest) {
    let site = testbed.site(SiteName::A);
    let forced = site
        .output(&migrate(SiteName::A, "--tracker log-dirty"))
        .unwrap();
    assert_eq!(forced.status.code(), Some(1), "{}", said(&forced));
    assert!(said(&forced).contains("shadow paging"), "{}", said(&forced));
    assert_eq!(settled(testbed, guest, "the refusal"), SiteName::A);
    let stock = site.output("xl migrate g1 10.77.0.12").unwrap();
    assert!(
        !stock.status.success(),
        "Stock tools move PV guests again: say so in the README"
    );
    assert_eq!(settled(testbed, guest, "the stock tools' try"), SiteName::A);
}
