//! What happens to a guest that stops after its move: as its configuration says, though the `xl`
//! that started it is gone.

use testbed::{Guest, Hypervisor, SiteName, Testbed};

use crate::scene::{
    alive, hold_at, move_guest, nothing_left, settled, sites, small_guest, wait_until, with,
};

/// The guest crashes, and comes up again where it was.
fn crashes_and_restarts(testbed: &Testbed, guest: &Guest, at: SiteName, after: &str) {
    let before = testbed.status(SiteName::A, guest).unwrap();
    testbed.ask(SiteName::A, guest, "crash").unwrap();
    wait_until(&format!("{after}: up again"), || {
        testbed
            .status(SiteName::A, guest)
            .is_ok_and(|status| status.boot_id != before.boot_id)
    });
    assert_eq!(settled(testbed, guest, after), at);
}

/// After an arrival, after a move that failed once the guest was suspended, and after a restart;
/// a guest that powers off is gone, and its keeper too.
#[test]
fn a_guest_that_stops_after_its_move() {
    let testbed = sites(with(Hypervisor::Release));
    let guest = Guest {
        extra: vec![
            "on_crash = \"restart\"".into(),
            "on_poweroff = \"destroy\"".into(),
        ],
        ..small_guest()
    };
    testbed.start_guest(SiteName::A, &guest).unwrap();
    let (moved, said) = hold_at(&testbed, SiteName::A, SiteName::A, "final-sent", |worker| {
        let give_up = format!("kill -TERM {worker}");
        testbed.site(SiteName::A).run(&give_up).unwrap();
    });
    assert!(!moved, "{said}");
    assert_eq!(settled(&testbed, &guest, "a failed move"), SiteName::A);
    crashes_and_restarts(&testbed, &guest, SiteName::A, "a crash after a failed move");

    move_guest(&testbed, SiteName::A, "");
    assert_eq!(settled(&testbed, &guest, "the move"), SiteName::B);
    crashes_and_restarts(&testbed, &guest, SiteName::B, "a crash after the arrival");
    alive(&testbed, &guest, "the second boot");

    testbed.ask(SiteName::A, &guest, "poweroff").unwrap();
    nothing_left(&testbed, "the end of the guest");
    wait_until("the keeper ends with its guest", || {
        SiteName::BOTH.into_iter().all(|site| {
            let keepers = "grep -x vmshadow-keeper /proc/[0-9]*/comm || true";
            testbed.site(site).run(keepers).unwrap().is_empty()
        })
    });
}

/// A domain that was kept beside the guest, when that was started anew, has the guest's UUID still: it
/// is not taken for the guest.
#[test]
#[ignore = "minutes: make test-full"]
fn a_guest_beside_the_domain_that_it_was() {
    let testbed = sites(with(Hypervisor::Release));
    let here = testbed.site(SiteName::A);
    let guest = Guest {
        extra: vec!["on_crash = \"rename-restart\"".into()],
        ..small_guest()
    };
    testbed.start_guest(SiteName::A, &guest).unwrap();
    let before = testbed.status(SiteName::A, &guest).unwrap();
    testbed.ask(SiteName::A, &guest, "crash").unwrap();
    wait_until("it is up again", || {
        let status = testbed.status(SiteName::A, &guest);
        status.is_ok_and(|status| status.boot_id != before.boot_id)
    });
    let kept = "xl list | awk '$1 ~ /^g1-/ { print $2 }'";
    let kept = here.run(kept).unwrap().trim().to_owned();
    assert!(!kept.is_empty(), "{}", here.run("xl list").unwrap());

    let (moved, _) = hold_at(&testbed, SiteName::A, SiteName::A, "suspended", |worker| {
        here.run(&format!("kill -9 {worker}")).unwrap();
    });
    assert!(!moved);
    alive(&testbed, &guest, "killed when it was suspended");
    here.run(&format!("xl destroy {kept}")).unwrap();
    assert_eq!(
        settled(&testbed, &guest, "without what was kept"),
        SiteName::A
    );
    move_guest(&testbed, SiteName::A, "");
    assert_eq!(settled(&testbed, &guest, "the move"), SiteName::B);
}
