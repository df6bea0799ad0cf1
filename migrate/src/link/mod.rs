//! How two sites reach one another.
//!
//! A [`Link`] is a pair of byte streams with what ends them. Over ssh, as in `xl migrate`, the
//! other end is a child process's standard input and output.

mod conversation;
mod pacing;
mod said;
mod sign_of_life;
pub mod ssh;

pub use conversation::{Conversation, QUEUE, Received, SILENCE};
pub use pacing::{Counted, HeldUp, Pace, Rate};

use std::io::{Read, Write};

/// The two directions of a link.
pub struct Link {
    /// What the other site says.
    pub reader: Box<dyn Read + Send>,
    /// What we say.
    pub writer: Box<dyn Write + Send>,
}
