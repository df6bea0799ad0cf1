//! Every call into Xen: generated bindings ([`raw`]), and a thin safe layer over them.
//!
//! ```text
//!                    vmshadow, migrate
//!                              │
//!  ┌──────────┬────────────────┼─────────────┬──────────┐
//!  │  ctl     │  memory        │ toolstack   │  store   │   safe: errors, ownership, bounds
//!  ├──────────┴────────────────┴─────────────┴──────────┤
//!  │  raw (bindgen)                                      │
//!  └──────────┬───────────────┬─────────────┬───────────┘
//!         libxenctrl    libxenforeign-    libxl      libxenstore
//!         libxenguest       memory
//!             │               │             │             │
//!        hypercalls       /dev/xen/     forks helpers,  xenstored
//!                          privcmd      runs scripts
//! ```
//!
//! - [`ctl`]: what the hypervisor knows of domains: state, dirty pages, page types, vCPUs, CPU
//!   policies.
//! - [`memory`]: other domains' pages, mapped here; the machine-to-physical table; the shared
//!   info and the start info page.
//! - [`toolstack`]: domains as libxl sees them: create, restore, suspend, resume, rename, destroy,
//!   configuration, events.
//! - [`store`]: xenstore, where domains and their devices are written down.
//! - [`host`]: whether this machine can do any of it.
//!
//! A handle is `Send` but not `Sync`: a thread that calls Xen opens its own, which is cheap.
//! Nothing here is usable in a child after `fork` without `exec`, which is a rule of Xen's
//! libraries; `std::process::Command` is fine.
//!
//! What Xen's libraries would print goes to the `log` crate instead, and the errors among it into
//! [`Error`].

// Foreign calls are what this crate is for; each block says why it is sound.
#![allow(unsafe_code)]

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("VMShadow runs in the dom0 of x86-64 Xen hosts under Linux");

pub mod ctl;
mod domain_id;
mod error;
pub mod host;
mod log_bridge;
pub mod memory;
pub mod raw;
#[cfg(feature = "oracle")]
pub mod stock;
pub mod store;
pub mod toolstack;

#[cfg(test)]
mod layout;

pub use domain_id::{DomId, InvalidDomId};
pub use error::{Error, LibxlCode, Result};

/// Bytes of a page, in every domain and on every host that Xen runs on here.
pub const PAGE_SIZE: usize = 4096;

/// A page's content.
pub type Page = [u8; PAGE_SIZE];
