//! The sites' side: how a guest that keeps its own address is reached under the site's.
//!
//! ```text
//!  edge ──▶ site:15900 ── prerouting: destination := guest:5900 ──▶ guest
//!  edge ◀── site:15900 ◀─ postrouting: source := site:15900 ─────── guest
//! ```
//!
//! The rules belong at the new site before the first packet comes there, and leave the old one
//! only after the edge has switched.
//!
//! Connections that the guest has begun itself know the address of the site where they began:
//! [`Detour`] leads them there, for a time.

mod neighbour;
mod outgoing;
mod translation;

pub use neighbour::Neighbour;
pub use outgoing::{
    Detour, Flow, MAX_FLOWS, Protocol, Side, Tunnel, flows_of, pack as pack_flows,
    unpack as unpack_flows,
};
pub use translation::{Forward, Translation, forwards_packets};
