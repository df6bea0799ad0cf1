//! Real guests, on real Xen.
//!
//! [`host`] is what every process of ours does to a domain: find it, suspend and resume it, name
//! it, destroy it. [`pv`] and [`pvh`] read guests that leave, by what `leaving` and `tracker` have
//! for both; [`restore`] feeds one that arrives to stock libxl; [`checks`] says beforehand why a
//! guest can't be moved.

pub mod checks;
pub mod host;
mod leaving;
pub mod p2m;
pub mod page_table;
mod presence;
pub mod pv;
pub mod pvh;
mod reconnecting;
pub mod restore;
mod savers;
pub mod stream;
mod tracker;
pub mod vcpu;
mod verify;

use xen_sys::DomId;
use xen_sys::toolstack::DomainKind;

use crate::digest::DigestKey;
use crate::error::{Error, Result};
use crate::guest::Source;
use crate::report::TrackerKind;

pub use tracker::foretell_tracker;

/// Takes hold of the running guest `domid`, whatever its kind. `key` is the secret of its digests;
/// `wanted` forces a tracker. Pages are compared on so many `cores`.
///
/// # Errors
/// What Xen refuses; [`Error::Refused`] for a kind that can't be moved.
pub fn open(
    host: &host::Host,
    domid: DomId,
    key: &DigestKey,
    wanted: Option<TrackerKind>,
    cores: usize,
) -> Result<Box<dyn Source>> {
    Ok(match host.kind(domid)? {
        DomainKind::Pv => Box::new(pv::PvSource::open(domid, key, wanted, cores)?),
        DomainKind::Pvh => Box::new(pvh::PvhSource::open(domid, key, wanted, cores)?),
        DomainKind::Hvm => return Err(Error::Refused(checks::HVM.into())),
    })
}
