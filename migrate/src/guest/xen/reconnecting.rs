//! A guest that goes on looks for its disks and network interfaces again.
//!
//! ```text
//!   unpaused    the guest resumes, and asks     backends connected     first packets
//!       |---- for each device, by xenstore ------------|----------------------|
//!       |<---------------- dom0's processor is left to this ----------------->|
//! ```
//!
//! Nobody can reach it until then. dom0 answers each of its questions: what else dom0 does
//! meanwhile makes the silence longer.

use std::thread;
use std::time::{Duration, Instant};

use xen_sys::DomId;
use xen_sys::store::Store;

/// How a backend says that it is connected, `XenbusStateConnected` (xen/io/xenbus.h).
const CONNECTED: &[u8] = b"4";

/// How long a guest whose devices are connected is left its first packets: to tell the network
/// where it is, and to answer what has waited.
const FIRST_PACKETS: Duration = Duration::from_millis(300);

/// Waits until the domain's disks and network interfaces are connected and used, `patience` at the
/// most. Whether they come to be connected is up to the guest: nothing may depend on it.
///
/// # Errors
/// What xenstore refuses.
pub fn wait_for_devices(domid: DomId, patience: Duration) -> xen_sys::Result<()> {
    let end = Instant::now() + patience;
    let store = Store::open()?;
    let states = states(&store, domid)?;
    let Some((first, others)) = states.split_first() else {
        return Ok(());
    };
    let mut watch = store.watch(first, "state")?;
    for state in others {
        watch.add(state, "state")?;
    }
    for state in &states {
        while watch.store().read(state)?.as_deref() != Some(CONNECTED) {
            let left = end.saturating_duration_since(Instant::now());
            // Changes that never cease are no reason to stay.
            if left.is_zero() || watch.wait(Some(left))?.is_none() {
                return Ok(());
            }
        }
    }
    thread::sleep(FIRST_PACKETS);
    Ok(())
}

/// Where the backends of a domain's disks and network interfaces have their states. By the guest's
/// own word, which may name anything: it is only read.
fn states(store: &Store, domid: DomId) -> xen_sys::Result<Vec<String>> {
    let mut states = Vec::new();
    for kind in ["vif", "vbd"] {
        let devices = format!("/local/domain/{domid}/device/{kind}");
        for number in store.list(&devices)? {
            let backend = store.read_text(&format!("{devices}/{number}/backend"))?;
            states.extend(backend.map(|backend| format!("{backend}/state")));
        }
    }
    Ok(states)
}
