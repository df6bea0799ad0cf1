//! What we read of a suspended guest is what the stock saver reads of it.

use std::path::PathBuf;

use testbed::{Guest, Hypervisor, Kind, SiteName};

use crate::scene::{move_guest, said, settled, sites, with};

const CHECKER: &str = "/usr/lib/xen-4.17/bin/verify-stream-v2";

/// A PVH guest: its pages, its parameters and its virtual hardware, but for the registers of a vCPU
/// and its clock, which go on. On the sites that other tests use.
#[test]
#[ignore = "minutes: make test-full"]
fn our_image_of_a_pvh_guest_is_the_stock_savers() {
    let program = PathBuf::from(
        std::env::var_os("VMSHADOW_ORACLE").expect("VMSHADOW_ORACLE names it: see `make test`"),
    );
    let testbed = sites(with(Hypervisor::Release));
    let guest = Guest {
        kind: Kind::Pvh,
        vcpus: 2,
        run: vec!["random 8".into()],
        ..Guest::new("g1", 101)
    };
    testbed.start_guest(SiteName::A, &guest).unwrap();
    let site = testbed.site(SiteName::A);
    site.put(&program, "/tmp/oracle", 0o755).unwrap();
    let script = "set -e; cd /tmp; d=$(xl domid g1); \
         ip link set vif$d.0 down; ./oracle save $d ours; ./oracle stock $d stock; \
         ./oracle compare ours stock";
    let output = site.output(script).unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("2 vCPUs"), "{}", said(&output));
    let checked = site
        .output(&format!(
            "PYTHONPATH=/usr/lib/xen-4.17/lib/python python3 {CHECKER} -f libxl -v -i /tmp/ours"
        ))
        .unwrap();
    assert!(checked.status.success(), "{}", said(&checked));
}

/// Page by page, page tables and vCPU state included; and Xen's own checker accepts the stream
/// that a restore is fed with. The guest has been moved and ballooned before: its p2m has holes,
/// and its tables were written by a restore.
#[test]
fn our_image_is_the_stock_savers() {
    let program = PathBuf::from(
        std::env::var_os("VMSHADOW_ORACLE").expect("VMSHADOW_ORACLE names it: see `make test`"),
    );
    let testbed = sites(with(Hypervisor::Release));
    let guest = Guest {
        vcpus: 2,
        run: vec!["rewrite 4 4".into(), "random 8".into()],
        ..Guest::new("g1", 101)
    };
    testbed.start_guest(SiteName::A, &guest).unwrap();
    move_guest(&testbed, SiteName::A, "");
    assert_eq!(settled(&testbed, &guest, "the move"), SiteName::B);
    let site = testbed.site(SiteName::B);
    site.put(&program, "/tmp/oracle", 0o755).unwrap();
    let script = "set -e; cd /tmp; xl mem-set g1 112; sleep 3; d=$(xl domid g1); \
         ip link set vif$d.0 down; ./oracle save $d ours; ./oracle stock $d stock; \
         ./oracle compare ours stock";
    let output = site.output(script).unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("2 vCPUs"), "{}", said(&output));

    // What differs is seen: a byte of a page in the middle of the file.
    let script = "cd /tmp; cp ours other; printf x | dd of=other bs=1 seek=60000001 conv=notrunc \
         status=none; ./oracle compare other stock";
    let output = site.output(script).unwrap();
    assert!(said(&output).contains("pages differ"), "{}", said(&output));

    let check = |file: &str| {
        let python = "PYTHONPATH=/usr/lib/xen-4.17/lib/python python3";
        site.output(&format!("{python} {CHECKER} -f libxl -v -i /tmp/{file}"))
            .unwrap()
    };
    let output = check("ours");
    assert!(output.status.success(), "{}", said(&output));
    site.run("head -c 60000000 /tmp/ours > /tmp/cut").unwrap();
    assert!(!check("cut").status.success(), "It accepts anything");
}
