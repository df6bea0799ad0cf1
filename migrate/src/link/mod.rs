//! How two sites reach one another.
//!
//! A [`Link`] is a pair of byte streams with what ends them. Over ssh, as in `xl migrate`, the
//! other end is a child process's standard input and output. One connection carries everything, or
//! several carry the pages and one the rest.

mod carrier;
mod congestion;
mod conversation;
pub mod direct;
pub mod door;
mod gathering;
mod loss;
mod order;
mod pacing;
mod reach;
mod said;
mod sign_of_life;
mod spreading;
pub mod ssh;
mod writing;

pub use carrier::Carrier;
pub(crate) use congestion::BBR;
pub use conversation::{Conversation, QUEUE, Received, SILENCE};
pub use gathering::Expecting;
pub use pacing::{Counted, HeldUp, Pace, Rate};
pub use reach::Reach;
pub use spreading::{
    Joining, MAX_CONNECTIONS, OPENED_AT_ONCE, connections_for, direct_connections_for,
    direct_window_for,
};

use std::io::{Read, Write};

/// The two directions of a link.
pub struct Link {
    /// What the other site says.
    pub reader: Box<dyn Read + Send>,
    /// What we say.
    pub writer: Box<dyn Write + Send>,
    /// In whose time that is carried.
    pub carrier: Carrier,
}

impl Link {
    /// A link that the kernel carries, in the time of whoever writes.
    #[must_use]
    pub fn new(reader: impl Read + Send + 'static, writer: impl Write + Send + 'static) -> Self {
        Link {
            reader: Box::new(reader),
            writer: Box::new(writer),
            carrier: Carrier::Writer,
        }
    }
}
