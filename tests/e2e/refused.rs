//! Moves that can't be: a clear error, before the guest is suspended.

use testbed::{Guest, Hypervisor, SiteName, Testbed};

use crate::scene::{said, settled, sites, small_guest, with};

/// Runs a command that must fail with status 1 and say `word`.
fn refuses(testbed: &Testbed, command: &str, word: &str) {
    let output = testbed.site(SiteName::A).output(command).unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{command}: {said}");
    assert!(said.contains(word), "{command}: {said}");
    assert!(!said.contains("suspending"), "{command}: {said}");
}

#[test]
fn clear_errors_before_anything_is_suspended() {
    let testbed = sites(with(Hypervisor::Release));
    let guest = small_guest();
    testbed.start_guest(SiteName::A, &guest).unwrap();
    refuses(&testbed, "vmshadow migrate nobody 10.77.0.12", "no domain");
    refuses(&testbed, "vmshadow migrate Domain-0 10.77.0.12", "Domain-0");
    refuses(&testbed, "vmshadow migrate g1 10.77.0.99", "10.77.0.99");
    refuses(
        &testbed,
        "vmshadow migrate g1 10.77.0.12 --remote-command nosuch",
        "nosuch",
    );
    let usage = testbed
        .site(SiteName::A)
        .output("vmshadow migrate")
        .unwrap();
    assert_eq!(usage.status.code(), Some(2));

    // A domain of that name there already, then too little memory there.
    let there = testbed.site(SiteName::B);
    let config = "name=\"g1\"\nkernel=\"/var/lib/vmshadow-testbed/vmlinuz\"\nmemory=96\n";
    there.write("/tmp/other.cfg", config.as_bytes()).unwrap();
    let kernel = testbed
        .site(SiteName::A)
        .run("sed -n 's/^kernel *= *//p' /etc/xen/g1.cfg")
        .unwrap();
    there
        .run(&format!(
            "sed -i 's|^kernel=.*|kernel={}|' /tmp/other.cfg",
            kernel.trim()
        ))
        .unwrap();
    there.run("xl create -p /tmp/other.cfg").unwrap();
    refuses(&testbed, "vmshadow migrate g1 10.77.0.12", "g1 already");
    there.run("xl destroy g1").unwrap();
    there
        .run("sed -i 's/^memory=.*/memory=900/; s/^name=.*/name=\"big\"/' /tmp/other.cfg")
        .unwrap();
    there.run("xl create -p /tmp/other.cfg").unwrap();
    refuses(&testbed, "vmshadow migrate g1 10.77.0.12", "memory");
    there.run("xl destroy big").unwrap();

    // A disk that nobody says is shared.
    let with_disk = Guest {
        disk_mib: 16,
        ..Guest::new("g2", 102)
    };
    testbed.start_guest(SiteName::A, &with_disk).unwrap();
    refuses(&testbed, "vmshadow migrate g2 10.77.0.12", "--no-disks");
    testbed.stop_guest("g2").unwrap();
    assert_eq!(settled(&testbed, &guest, "all refusals"), SiteName::A);
}
