//! Moves that can't be: a clear error, before the guest is suspended.

use testbed::{Guest, Hypervisor, Options, SiteName, Testbed};

use crate::scene::{
    hold_at, move_guest, said, settled, sites, sites_with_small_guest, small_guest, with,
};

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
    let (testbed, guest) = sites_with_small_guest();
    refuses(&testbed, "vmshadow migrate nobody 10.77.0.12", "no domain");
    refuses(&testbed, "vmshadow migrate Domain-0 10.77.0.12", "Domain-0");
    refuses(&testbed, "vmshadow migrate g1 10.77.0.99", "10.77.0.99");
    refuses(
        &testbed,
        "vmshadow migrate g1 10.77.0.12 --remote-command nosuch",
        "nosuch",
    );
    refuses(
        &testbed,
        "vmshadow migrate g1 10.77.0.12 --congestion nosuch",
        "no congestion control \"nosuch\"",
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
    // What remains is less than the guest needs, and more than xl needs for itself.
    there
        .run(
            "free=$(xl info free_memory); \
             sed -i \"s/^memory=.*/memory=$((free - 60))/; s/^name=.*/name=\\\"big\\\"/\" /tmp/other.cfg; \
             xl create -p /tmp/other.cfg",
        )
        .unwrap();
    refuses(&testbed, "vmshadow migrate g1 10.77.0.12", "ree memory");
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

/// What only this host, its CPU or its disk refuses.
#[test]
#[ignore = "minutes: make test-full"]
fn what_the_hosts_cannot_do() {
    let options = Options {
        cpu_features: "+abm".into(),
        iommu: true,
        ..with(Hypervisor::Release)
    };
    let testbed = sites(options);
    let guest = small_guest();
    let (here, there) = (testbed.site(SiteName::A), testbed.site(SiteName::B));

    // A CPU without what the guest was promised.
    testbed.start_guest(SiteName::A, &guest).unwrap();
    refuses(&testbed, "vmshadow migrate g1 10.77.0.12", "abm");
    assert_eq!(settled(&testbed, &guest, "the other CPU"), SiteName::A);
    testbed.stop_guest("g1").unwrap();

    // A PCI device.
    here.run("modprobe xen-pciback && xl pci-assignable-add 00:1f.3")
        .unwrap();
    let with_device = Guest {
        extra: vec!["pci = [\"00:1f.3\"]".into()],
        ..small_guest()
    };
    testbed.start_guest(SiteName::A, &with_device).unwrap();
    refuses(&testbed, "vmshadow migrate g1 10.77.0.12", "PCI");
    testbed.stop_guest("g1").unwrap();

    // From here on a guest that b can take.
    let guest = Guest {
        extra: vec!["cpuid = \"host,abm=0\"".into()],
        ..small_guest()
    };
    testbed.start_guest(SiteName::A, &guest).unwrap();

    // A disk without room for its memory.
    there
        .run("mount -t tmpfs -o size=40m none /var/lib/vmshadow/incoming")
        .unwrap();
    refuses(&testbed, "vmshadow migrate g1 10.77.0.12", "enough room");
    there.run("umount /var/lib/vmshadow/incoming").unwrap();

    // A vmshadow that speaks another protocol: its hello, and nothing else.
    let hello = "#!/bin/sh\nprintf 'VMSHADOW\\143\\000\\143\\000\\002\\000\\014\\000\\000\\000\\000\\000\\000\\000\\000\\000\\0039.0'\n\
                 cat > /dev/null\n";
    there.write("/tmp/stranger", hello.as_bytes()).unwrap();
    there.run("chmod +x /tmp/stranger").unwrap();
    refuses(
        &testbed,
        "vmshadow migrate g1 10.77.0.12 --remote-command /tmp/stranger",
        "9.0",
    );
    assert_eq!(settled(&testbed, &guest, "all refusals"), SiteName::A);
    move_guest(&testbed, SiteName::A, "");
    assert_eq!(settled(&testbed, &guest, "the move"), SiteName::B);
}

/// What takes a part of a stock tool's stream, and goes.
const BREAKS: &str = "echo 'xl migration receiver ready, send binary domain data.'\n\
                      head -c 8000000 > /dev/null\n";

/// What passes a stream on, slowly.
const SLOWLY: &str = "import sys, time\n\
                      while part := sys.stdin.buffer.raw.read(65536):\n\
                      \x20   sys.stdout.buffer.write(part)\n\
                      \x20   sys.stdout.buffer.flush()\n\
                      \x20   time.sleep(0.02)\n";

/// A stock tool that moves the guest while we do takes the log of dirty pages over. One that breaks
/// off leaves all to be looked at again. To one that goes on we leave what it has, and step back: its
/// move comes to its end, and the guest is right.
#[test]
#[ignore = "minutes: make test-full"]
fn a_stock_tool_that_takes_the_guest_over() {
    let (testbed, guest) = sites_with_small_guest();
    let breaks_at = |at: SiteName| {
        let site = testbed.site(at);
        site.write("/tmp/breaks", BREAKS.as_bytes()).unwrap();
        let stock = site.output("xl migrate -s '' g1 'sh /tmp/breaks'").unwrap();
        assert!(!stock.status.success());
        // It dies by a closed pipe, and leaves the log on.
        assert!(said(&stock).contains("Broken pipe"), "{}", said(&stock));
    };
    let (moved, first) = hold_at(&testbed, SiteName::A, SiteName::A, "recopying", |_| {
        breaks_at(SiteName::A);
    });
    assert!(moved, "{first}");
    assert_eq!(settled(&testbed, &guest, "the broken tool"), SiteName::B);
    move_guest(&testbed, SiteName::B, "");
    assert_eq!(settled(&testbed, &guest, "the way back"), SiteName::A);

    let here = testbed.site(SiteName::A);
    let domid = || here.run("xl domid g1").unwrap();
    let before = domid();
    here.write("/tmp/slowly", SLOWLY.as_bytes()).unwrap();
    let (moved, said) = hold_at(&testbed, SiteName::A, SiteName::A, "copying", |_| {
        here.run(
            "nohup xl migrate -s '' g1 'python3 /tmp/slowly | xl migrate-receive' \
             > /tmp/stock 2>&1 < /dev/null & \
             for i in $(seq 500); do pgrep -x libxl-save-help > /dev/null && break; sleep 0.2; done; \
             sleep 5",
        )
        .unwrap();
    });
    let stock = "pgrep -x libxl-save-help > /dev/null";
    assert!(here.output(stock).unwrap().status.success(), "{said}");
    assert!(!moved && said.contains("saving or moving"), "{said}");
    assert_eq!(settled(&testbed, &guest, "the stock tool"), SiteName::A);
    assert_ne!(domid(), before, "{}", here.run("cat /tmp/stock").unwrap());
    move_guest(&testbed, SiteName::A, "");
    assert_eq!(settled(&testbed, &guest, "the move"), SiteName::B);
}

/// Two at once at one guest: the first goes on, the second says who is at work.
#[test]
fn another_tool_at_work() {
    let (testbed, guest) = sites_with_small_guest();
    let here = testbed.site(SiteName::A);

    let (moved, first) = hold_at(&testbed, SiteName::A, SiteName::A, "copying", |_| {
        refuses(&testbed, "vmshadow migrate g1 10.77.0.12", "at work on g1");
        // The name that stock tools would give it there is taken.
        let stock = here.output("xl migrate g1 10.77.0.12").unwrap();
        assert!(!stock.status.success());
    });
    assert!(moved, "{first}");
    assert_eq!(settled(&testbed, &guest, "two at once"), SiteName::B);
    move_guest(&testbed, SiteName::B, "");
    assert_eq!(settled(&testbed, &guest, "the way back"), SiteName::A);

    // `xl save`, which waits for its reader.
    here.run(
        "mkfifo /tmp/fifo; sleep 1000 < /tmp/fifo > /dev/null 2>&1 & \
         xl save -c g1 /tmp/fifo > /tmp/save 2>&1 & \
         for i in $(seq 500); do pgrep -x libxl-save-help > /dev/null && break; sleep 0.2; done; \
         sleep 1",
    )
    .unwrap();
    refuses(&testbed, "vmshadow migrate g1 10.77.0.12", "saving");
    here.run(
        "cat /tmp/fifo > /dev/null & kill $(pgrep -f '^sleep 1000'); \
         while pgrep -x libxl-save-help > /dev/null; do sleep 0.2; done; cat /tmp/save",
    )
    .unwrap();
    assert_eq!(settled(&testbed, &guest, "xl save"), SiteName::A);
}
