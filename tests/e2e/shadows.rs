//! What a site holds of guests that run elsewhere: ways back, warm copies, moves that go on.

use serde_json::Value;
use testbed::{Guest, Hypervisor, SiteName, Testbed};

use crate::scene::{
    alive, go_on, hold_with, report_of, said, settled, sites, small_guest, wait_until, with,
};

fn number(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap()
}

/// The memory file of the guest's shadow at a site; none where there is none.
fn memory_at(testbed: &Testbed, site: SiteName) -> Option<String> {
    let listed = testbed
        .site(site)
        .run("ls /var/lib/vmshadow/shadows/*.memory 2>/dev/null || true")
        .unwrap();
    listed.lines().next().map(str::to_owned)
}

fn drop_shadows(testbed: &Testbed) {
    for site in testbed.sites() {
        site.run("vmshadow shadows --drop-all").unwrap();
    }
}

/// A guest that comes back sends what changed; a shadow that is damaged costs bytes alone.
#[test]
fn the_way_back_is_short() {
    let testbed = sites(with(Hypervisor::Release));
    drop_shadows(&testbed);
    let guest = small_guest();
    testbed.start_guest(SiteName::A, &guest).unwrap();
    let first = report_of(&testbed, SiteName::A, "");
    assert_eq!(number(&first, "recalled"), 0);
    assert!(memory_at(&testbed, SiteName::A).is_some());
    assert!(memory_at(&testbed, SiteName::B).is_none());
    let listed = testbed.site(SiteName::A).run("vmshadow shadows").unwrap();
    assert!(listed.contains("g1"), "{listed}");

    let back = report_of(&testbed, SiteName::B, "");
    assert!(number(&back, "recalled") > 20_000, "{back}");
    let (there, here) = (number(&first, "wire_bytes"), number(&back, "wire_bytes"));
    assert!(here < there / 2, "{here} of {there}");
    assert_eq!(settled(&testbed, &guest, "the way back"), SiteName::A);

    // What is in the file is no longer what the table says.
    let memory = memory_at(&testbed, SiteName::B).unwrap();
    testbed
        .site(SiteName::B)
        .run(&format!(
            "dd if=/dev/urandom of={memory} bs=4096 seek=5000 count=3000 conv=notrunc 2>&1"
        ))
        .unwrap();
    let damaged = report_of(&testbed, SiteName::A, "");
    assert!(number(&damaged, "recalled") > 10_000, "{damaged}");
    assert_eq!(settled(&testbed, &guest, "a damaged shadow"), SiteName::B);

    let plain = report_of(&testbed, SiteName::B, "--no-shadow");
    assert!(number(&plain, "recalled") > 20_000, "{plain}");
    assert!(memory_at(&testbed, SiteName::B).is_none());
    drop_shadows(&testbed);
}

/// A shadow that was sent ahead makes the move short, and the guest notices nothing of it.
#[test]
#[ignore = "minutes: make test-full"]
fn a_warm_shadow_makes_a_move_short() {
    let testbed = sites(with(Hypervisor::Release));
    drop_shadows(&testbed);
    let guest = small_guest();
    testbed.start_guest(SiteName::A, &guest).unwrap();
    let to = SiteName::B.address();
    let shadow = |more: &str| -> Value {
        let text = testbed
            .site(SiteName::A)
            .run(&format!("vmshadow shadow g1 {to} --json {more}"))
            .unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let first = shadow("");
    assert_eq!(first["outcome"], "kept", "{first}");
    assert_eq!(first["guest"], "source", "{first}");
    let listed = testbed
        .site(SiteName::B)
        .run("vmshadow shadows --json")
        .unwrap();
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed[0]["name"], "g1", "{listed}");
    let second = shadow("--bandwidth 50M");
    assert!(
        number(&second, "wire_bytes") < number(&first, "wire_bytes") / 2,
        "{second}"
    );
    alive(&testbed, &guest, "two shadows");
    let moved = report_of(&testbed, SiteName::A, "");
    assert!(number(&moved, "recalled") > 20_000, "{moved}");
    assert!(number(&moved, "wire_bytes") < number(&first, "wire_bytes") / 2);
    assert_eq!(settled(&testbed, &guest, "the move"), SiteName::B);

    // A site that keeps none refuses one, and takes the guest all the same.
    let policy = "/etc/vmshadow/vmshadow.toml";
    let site = testbed.site(SiteName::A);
    site.run(&format!(
        "cp {policy} /tmp/policy && printf '[shadows]\\nkeep = false\\n' >> {policy}"
    ))
    .unwrap();
    let refused = testbed
        .site(SiteName::B)
        .output(&format!("vmshadow shadow g1 {}", SiteName::A.address()))
        .unwrap();
    assert!(
        said(&refused).contains("keeps no shadows"),
        "{}",
        said(&refused)
    );
    let back = report_of(&testbed, SiteName::B, "");
    assert_eq!(back["outcome"], "moved");
    assert_eq!(back["guest"], "destination");
    site.run(&format!("mv /tmp/policy {policy}")).unwrap();
    drop_shadows(&testbed);
}

/// A guest that was never there is built from what another one of its trust group left there.
#[test]
#[ignore = "minutes: make test-full"]
fn a_guest_is_built_from_what_another_one_left() {
    let testbed = sites(with(Hypervisor::Release));
    drop_shadows(&testbed);
    let (policy, key) = ("/etc/vmshadow/vmshadow.toml", "/etc/vmshadow/acme.key");
    let group =
        format!("[[group]]\\nname = \"acme\"\\nkey_file = \"{key}\"\\nguests = [\"g*\"]\\n");
    for site in testbed.sites() {
        site.run(&format!(
            "cp {policy} /tmp/policy; printf '{group}' >> {policy}; umask 077; \
             printf '%064d' 7 > {key}"
        ))
        .unwrap();
    }
    let here = testbed.site(SiteName::A);
    let found = here.run("vmshadow check").unwrap();
    assert!(found.contains("acme: g*"), "{found}");
    // Another guest with the same kernel.
    let other = Guest {
        memory_mib: 96,
        run: vec!["random 4".into()],
        ..Guest::new("g2", 102)
    };
    testbed.start_guest(SiteName::A, &other).unwrap();
    let left = here
        .run(&format!(
            "vmshadow shadow g2 {} --json",
            SiteName::B.address()
        ))
        .unwrap();
    let left: Value = serde_json::from_str(&left).unwrap();
    testbed.stop_guest("g2").unwrap();

    let guest = small_guest();
    testbed.start_guest(SiteName::A, &guest).unwrap();
    let report = report_of(&testbed, SiteName::A, "");
    let shared = number(&report["rounds"][0], "shared");
    assert!(number(&report, "shareable") > 5_000, "{report}");
    assert!(shared > 3_000, "{report}");
    let (first, second) = (number(&left, "wire_bytes"), number(&report, "wire_bytes"));
    eprintln!("{shared} pages shared: {second} bytes after {first}");
    assert!(second < first, "{second} after {first}");
    assert_eq!(settled(&testbed, &guest, "the move"), SiteName::B);

    // A key that others may read is none, and the move goes on without.
    drop_shadows(&testbed);
    here.run(&format!("chmod 644 {key}")).unwrap();
    let found = said(&here.output("vmshadow check").unwrap());
    assert!(found.contains("may read the key"), "{found}");
    assert_eq!(report_of(&testbed, SiteName::B, "")["outcome"], "moved");
    for site in testbed.sites() {
        site.run(&format!("mv /tmp/policy {policy}; rm {key}"))
            .unwrap();
    }
    drop_shadows(&testbed);
}

/// A link that is lost while the guest is copied comes back, and the same command goes on from
/// what has arrived.
#[test]
fn a_lost_link_is_not_a_lost_move() {
    let testbed = sites(with(Hypervisor::Release));
    drop_shadows(&testbed);
    let guest = Guest {
        run: vec!["rewrite 2 2".into(), "random 8".into()],
        ..small_guest()
    };
    testbed.start_guest(SiteName::A, &guest).unwrap();
    let here = testbed.site(SiteName::A);
    let (done, text) = hold_with(&testbed, SiteName::A, SiteName::A, "recopying", "", |_| {
        testbed.cut_link().unwrap();
        go_on(&testbed, SiteName::A);
        wait_until("the source notices", || {
            let told = here.run("cat /tmp/vmshadow-out").unwrap();
            told.contains("trying again")
        });
        alive(&testbed, &guest, "the link is away");
        testbed.mend_link().unwrap();
    });
    assert!(done, "{text}");
    assert_eq!(settled(&testbed, &guest, "a lost link"), SiteName::B);
    drop_shadows(&testbed);
}
