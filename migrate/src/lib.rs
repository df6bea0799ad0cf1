//! Moving a running guest: what changed, how it is encoded, how it crosses, how it is handed over.
//!
//! ```text
//!            source site                                        destination site
//!                            held                                   arrival
//!   guest/xen/pv  --pages-->  source  --codec, wire-->  link  -->  destination  -->  image
//!        ^                      |                                      |               |
//!   log-dirty, scan          rounds                                    |       guest/xen/restore
//!                               |                                      |               v
//!                               +------------- handover ---------------+        stock libxl
//!                                    journal, guardian, recovery
//! ```
//!
//! [`outgoing`] and [`incoming`] put the pieces together for a real guest; [`keeper`] watches it
//! afterwards. The protocol ([`wire`]), the codec, what each end knows of what is there already
//! ([`held`], [`arrival`]) and the policies are pure.

pub mod arrival;
mod bytes;
pub mod codec;
pub mod configuration;
pub mod connections;
pub mod control;
pub mod costs;
pub mod destination;
pub mod digest;
pub mod directories;
pub mod dry_run;
pub mod error;
pub mod group;
pub mod guest;
pub mod handover;
pub mod held;
mod hexadecimal;
mod hold;
pub mod image;
pub mod incoming;
pub mod keeper;
pub mod link;
pub mod outgoing;
pub mod pages;
mod pipe;
pub mod report;
pub mod retry;
pub mod rounds;
pub mod shadow;
pub mod source;
pub mod survey;
pub mod whereabouts;
pub mod wire;

pub use error::{Error, Result};
