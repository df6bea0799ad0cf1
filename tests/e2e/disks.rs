//! Guests with disks that both sites have: of shared storage, or as good as that.

use testbed::{Guest, Hypervisor, SiteName};

use crate::scene::{alive, hold_with, settled, sites_to_change, small_guest, wait_until, with};

/// A guest writes to its disk, and checks what it has written, through moves there and back. Each
/// site has a file of its own: what it holds is taken along while the guest is suspended, as shared
/// storage would have it then.
#[test]
fn a_guest_goes_on_writing_to_its_disk() {
    let testbed = sites_to_change(with(Hypervisor::Release));
    let guest = Guest {
        disk_mib: 4,
        ..small_guest()
    };
    testbed.start_guest(SiteName::A, &guest).unwrap();
    testbed
        .ask(SiteName::A, &guest, "disk /dev/xvda 2")
        .unwrap();
    let written = || testbed.status(SiteName::A, &guest).unwrap().disk_blocks;
    for from in [SiteName::A, SiteName::B] {
        let before = written();
        let (path, to) = (guest.disk_path(), from.other());
        let take_along = format!(
            "ssh {} 'dd of={path} conv=notrunc status=none' < {path}",
            to.address()
        );
        let (moved, text) = hold_with(&testbed, from, from, "ready", "--no-disks", |_| {
            testbed.site(from).run(&take_along).unwrap();
        });
        assert!(moved, "{text}");
        let after = format!("a move from {from:?} with a disk");
        assert_eq!(settled(&testbed, &guest, &after), to);
        // More than it had under way: all of the disk once more.
        wait_until("the disk is written", || written() > before + 1024);
    }
    alive(&testbed, &guest, "all with its disk");
}
