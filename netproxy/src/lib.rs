//! A TCP splicing proxy that re-targets live connections.
//!
//! ```text
//!  client ── TCP ──▶ edge: Proxy ── TCP ──▶ site A ── translation ──▶ guest
//!                                  ╲
//!                                   ╲ after the move, the same connection
//!                                    ─────▶ site B ── translation ──▶ guest
//! ```
//!
//! The edge is a stable address. A guest behind it moves to another site, and the address under
//! which it is reached changes; neither its clients nor its own TCP notice. The proxy takes the
//! state of each connection to the guest out of its socket, and puts it into a new one towards
//! the other site ([`repair`]).
//!
//! Start one with [`Proxy::start`], or a program's only one with [`Proxy::start_program`], which
//! can be [upgraded](Proxy::upgrade) while it runs. [`config`] is what it reads.
//!
//! # A guest's move
//!
//! Whoever moves the guest drives the proxy by a [`control::Move`], over the control socket of
//! the edge, on the same host or through ssh:
//!
//! ```text
//!  mover             old site          edge (proxy)        new site           guest
//!    │ last rounds      │                  │                  │                 │ runs
//!    ├─ Translation::apply, Neighbour::apply ───────────────▶ rules, neighbour  │
//!    ├─ Move::prepare ────────────────────▶ path warmed ──────▶ probe           │
//!    ├─ suspend ───────────────────────────────────────────────────────────────▶ stands still
//!    ├─ hold ─────────────────────────────▶ frozen once all it sent is in       │
//!    ├─ retarget ─────────────────────────▶ each socket made anew               │
//!    │ last delta, verify, commit, unpause, vif connected                       │ runs
//!    ├─ release ──────────────────────────▶ what is pending ──▶ translated ────▶ goes on
//!    ├─ Translation::remove, Neighbour::remove                │                 │
//!    │                ▶ at the old site                       │                 │
//! ```
//!
//! On failure before the commit: [`back`](control::Move::back), or drop the move; and remove
//! what was applied at the new site. After a commit whose release failed, or that was settled
//! late: [`arrived`](control::Client::arrived). What the sites have to translate
//! ([`site::Translation`]) is known at the edge ([`control::Client::reach`]).
#![warn(unreachable_pub)]

pub mod config;
mod connection;
pub mod control;
mod error;
mod event_loop;
mod guest;
mod metrics;
mod nftables;
mod program;
mod proxy;
pub mod proxy_protocol;
pub mod repair;
pub mod retarget;
pub mod site;
mod splice;
mod state_file;
mod sys;
mod upgrade;

pub use connection::ConnectionInfo;
pub use error::{Error, Result};
pub use event_loop::Tally;
pub use proxy::{GuestInfo, Overview, Proxy};
