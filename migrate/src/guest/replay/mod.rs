//! Guests that are replayed: memory in this process, with a history of what a guest did to it.
//!
//! The engine is the real one: both ends, the codec, the protocol, the journals, the image on
//! disk. What is replayed is the guest, and what is simulated is the wire.
//!
//! ```text
//!   recording, or generated              site                       site
//!        |                                 | guest                    | incoming
//!        v                                 v                          v
//!      memory, history  ----------->  ReplaySource              ReplayDestination
//!                                          |                          |
//!                                     source::run  <-- link -->  destination::run
//!                                          +------- crossing ---------+
//! ```

mod asking;
mod crossing;
mod destination;
pub mod generated;
mod guest;
mod history;
mod link;
mod memory;
mod recording;
mod site;
mod source;

pub use asking::{Foretold, foretell};
pub use crossing::{Crossed, Crossing, End, Left, arrive, arrive_by, cross, die, leave};
pub use destination::{ReplayDestination, Restored};
pub use guest::Guest;
pub use history::{Clock, History, Step};
pub use link::{Cut, Shape, pair};
pub use memory::{Change, Content, Memory, Write};
pub use recording::{RECORDING_VERSION, Recorder, Recording};
pub use site::{Call, Incoming, Site, Watch};
pub use source::ReplaySource;
