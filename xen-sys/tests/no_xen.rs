//! What happens on a machine that is no Xen host, such as the one that builds: each interface
//! says so, and nothing crashes. Skipped, aloud, where Xen runs.

use std::error::Error as _;
use std::fs;

use xen_sys::Error;
use xen_sys::ctl::Ctl;
use xen_sys::host::{Missing, probe};
use xen_sys::memory::ForeignMemory;
use xen_sys::store::Store;
use xen_sys::toolstack::Toolstack;

fn under_xen() -> bool {
    let under_xen = fs::read_to_string("/sys/hypervisor/type").is_ok_and(|it| it.trim() == "xen");
    if under_xen {
        eprintln!("This machine runs under Xen: nothing to see here");
    }
    under_xen
}

#[test]
fn the_probe_says_that_there_is_no_xen() {
    if under_xen() {
        return;
    }
    let host = probe();
    assert!(host.version.is_none() && host.physical.is_none());
    let missing = host.missing.unwrap();
    assert!(matches!(missing, Missing::Xen), "{missing:?}");
    assert!(
        missing.to_string().contains("does not run under Xen"),
        "{missing}"
    );
}

#[test]
fn interfaces_can_not_be_opened_and_say_why() {
    if under_xen() {
        return;
    }
    for (name, error) in [
        ("hypervisor", Ctl::open().unwrap_err()),
        ("memory", ForeignMemory::open().unwrap_err()),
        ("xenstore", Store::open().unwrap_err()),
    ] {
        assert!(matches!(error, Error::Open { .. }), "{error:?}");
        assert!(error.to_string().contains(name), "{error}");
        assert!(error.errno().is_some_and(|errno| errno > 0), "{error:?}");
        assert!(error.source().is_some());
    }
}

#[test]
fn libxl_can_not_be_opened_and_says_why() {
    if under_xen() {
        return;
    }
    let error = Toolstack::open().unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("Failed to open libxl"), "{text}");
    // What libxl itself logged, which without the bridge would be on standard error.
    assert!(text.contains("cannot open libxc handle"), "{text}");
    assert!(error.libxl_code().is_some());
}

#[test]
fn handles_can_be_sent_to_other_threads() {
    fn send<T: Send>() {}
    fn sync<T: Sync>() {}
    send::<Ctl>();
    send::<ForeignMemory>();
    send::<Store>();
    send::<Toolstack>();
    send::<xen_sys::ctl::DirtyBitmap>();
    send::<xen_sys::memory::Mapping>();
    sync::<xen_sys::memory::Mapping>();
    send::<xen_sys::toolstack::DomainConfig>();
    send::<xen_sys::toolstack::LifeWatch>();
    send::<xen_sys::toolstack::Aborter>();
    sync::<xen_sys::toolstack::Aborter>();
    sync::<Error>();
}
