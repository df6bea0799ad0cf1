//! Real guests, on real Xen.
//!
//! [`host`] is what every process of ours does to a domain: find it, suspend and resume it, name
//! it, destroy it. [`pv`] reads a paravirtualised guest that leaves; [`restore`] feeds one that
//! arrives to stock libxl; [`checks`] says beforehand why a guest can't be moved.

pub mod checks;
pub mod host;
pub mod p2m;
pub mod page_table;
pub mod pv;
pub mod restore;
pub mod stream;
pub mod vcpu;
pub mod verify;
