//! Control of a move while it runs, from another terminal of the same host.
//!
//! ```text
//!  vmshadow status                               the worker of a move
//!  cancel, set        socket, mode 0600        +--------------------------------------+
//!    client  <- one JSON value a line ->  server thread  <-- Shared -->  engine       |
//!                                              |            rate, downtime, cancel    |
//!    /run/vmshadow/control/MOVE.ROLE           |            phase, round, figures     |
//!                                              +--------------------------------------+
//! ```
//!
//! The engine publishes what it knows into [`Shared`], and reads what was asked for from there.
//! Neither ever waits for the other: what both touch is an atomic, or a lock that is held for
//! the time of a copy. So a status is answered whatever the engine waits for.
//!
//! Each move has a name of its own, and so has its socket: one that nobody listens on belongs to
//! a worker that was killed, and the next worker removes it. A move that is tried again keeps the
//! socket of its first attempt, and a shadow that is renewed that of its first pass.

mod client;
mod protocol;
mod server;
mod shared;

pub use client::{At, Client, Found, find, moves};
pub use protocol::{Bandwidth, Change, Ended, MAX_LINE, Outcome, Request, Status, VERSION};
pub use server::Server;
pub use shared::{Committed, Facts, Shared, Watched};
