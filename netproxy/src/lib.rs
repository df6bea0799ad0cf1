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
//! Start one with [`Proxy::start`]; the steps of a move are its methods, or requests on its
//! control socket ([`control`]). A program starts it with [`Proxy::start_program`], and can then
//! be [upgraded](Proxy::upgrade) while it runs. [`site`] is the sites' side: the translation.
#![warn(unreachable_pub)]

pub mod config;
mod connection;
pub mod control;
mod error;
mod event_loop;
mod guest;
mod metrics;
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
