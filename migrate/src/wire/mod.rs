//! The protocol between the source and the destination of a move. Pure: bytes to messages and
//! back, over any `Read` and `Write`.
//!
//! ```text
//!   source                                          destination
//!     | -------------------- Hello -------------------- |      both at once; versions are picked
//!     | Offer ----------------------------------------> |      what guest it is
//!     | <-------------------------------- Accept/Refuse |
//!     | Recall ---------------------------------------> |      where it has a shadow of the guest
//!     | <------------------------------------ Inventory |      unless the source knows what that is
//!     | Prove ----------------------------------------> |      where it shares a trust group's contents
//!     | <-------------------------------------- Shares |      their names, unless the proof is wrong
//!     | P2mFrames ------------------------------------> |      the p2m, and how large the guest is
//!     | Pages, Pages, ..., RoundEnd ------------------> |      a round, the guest running
//!     | <------------------------------------- RoundAck |
//!     |   ...                                           |
//!     | CatchUp --------------------------------------> |      before the suspend, where the restore
//!     | <------------------------------------- CaughtUp |      is far behind what has arrived
//!     | Outgoing -------------------------------------> |      of connections of its own, if led
//!     | P2mFrames, Pages, ..., RoundEnd --------------> |      the last round, the guest suspended
//!     | State, Final ---------------------------------> |
//!     | <----------------------------------------- Ready |     digests are equal, it could run
//!     | Commit ---------------------------------------> |      the record on disk says so first
//!     | <--------------------------------------- Running |
//!     |                                                 |
//!     | or, where the pages are to be a shadow, after a round:
//!     | Keep -----------------------------------------> |
//!     | <----------------------------------------- Kept |
//!
//!   at any time: Ping and Pong both ways; Abort from the source, Failed from the destination
//! ```
//!
//! Where both sides want it, pages go by connections of their own, and the first one carries all
//! else:
//!
//! ```text
//!   source, on each                                 destination
//!     | -------------------- Hello -------------------- |
//!     | Join -----------------------------------------> |      with what the acceptance gave
//!     | <--------------------------------------- Joined |
//!     |                 (first connection) Spread ----> |      which of them it uses
//!     | Batch, Batch, ... ----------------------------> |      each says where it stands
//! ```
//!
//! The stream is one all the same. A batch says how many batches and how many messages come before
//! it, and each message that must stand in its place among them follows an After, which says how
//! many batches come before it.
//!
//! A [`Hello`] has a layout that never changes, so that any two versions understand each other's.
//! Everything after it is frames:
//!
//! ```text
//!   u8 tag | u8 0 | u16 0 | u32 length | payload
//! ```
//!
//! All numbers are little-endian. Each tag belongs to one direction and has a limit for its
//! length; a frame above it is refused before a byte of its payload is read. Rare messages are
//! JSON documents, in which unknown fields are skipped; frequent ones are binary.

mod document;
mod frame;
mod hello;
mod message;
mod text;

pub use document::{
    Acceptance, CpuPolicy, DirectDoor, DirectOffer, GroupOffer, GuestKind, JoinToken, MoveId,
    NotAMoveId, Offer, OfferError, Part, Purpose, Readiness, Refusal, RefusalCode, ShadowHead,
    TscOffer, XenVersion,
};
pub use frame::{FRAME_HEADER_SIZE, Frame, FrameReader, FrameWriter, Tag};
pub use hello::{Agreement, Hello, MAX_PROTOCOL, MIN_PROTOCOL, Role};
pub use message::{Direction, MAX_PROBE, MAX_SHARES, Message, Place, ToDestination, ToSource};
pub use text::Text;
pub(crate) use text::printable;

use crate::bytes::Malformed;
use crate::guest::xen::stream::state::StateError;
use std::io;

/// What can go wrong between the two ends.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection failed.
    #[error("Connection to the peer failed")]
    Io(#[from] io::Error),
    /// The connection ended inside a hello or a frame.
    #[error("Peer closed the connection in the middle of a message")]
    Truncated,
    /// What came first was no hello.
    #[error("Peer does not speak VMShadow's protocol; it said {0:?}")]
    Foreign(Text),
    /// There is no version of the protocol that both speak.
    #[error(
        "This is vmshadow {our_program} (protocol {our_min} to {our_max}), and the peer's is \
         {their_program} (protocol {their_min} to {their_max})"
    )]
    Incompatible {
        /// Our program's version.
        our_program: Text,
        /// The lowest protocol that we speak.
        our_min: u16,
        /// The highest protocol that we speak.
        our_max: u16,
        /// The peer's program's version.
        their_program: Text,
        /// The lowest protocol that the peer speaks.
        their_min: u16,
        /// The highest protocol that the peer speaks.
        their_max: u16,
    },
    /// Both ends are sources, or destinations.
    #[error("Peer is {0:?} too")]
    SameRole(Role),
    /// The tag is no message's.
    #[error("Peer sent an unknown message {0:#04x}")]
    UnknownTag(u8),
    /// Another frame has to come first.
    #[error("{0:?} before its time")]
    NotYet(Tag),
    /// The message belongs to the other direction.
    #[error("Peer sent {0:?}, which is not its to send")]
    WrongDirection(Tag),
    /// The message is longer than its kind may be.
    #[error("{tag:?} message of {length} bytes exceeds its limit of {limit}")]
    TooLong {
        /// What it is.
        tag: Tag,
        /// How long it says it is.
        length: u64,
        /// How long it may be.
        limit: u64,
    },
    /// The payload is not what its tag says.
    #[error("{0:?} message is malformed")]
    Malformed(Tag),
    /// A JSON document has not the fields that it needs.
    #[error("Document in a {0:?} message is malformed")]
    Document(Tag, #[source] serde_json::Error),
    /// The offer does not hold together.
    #[error("Peer's offer is not acceptable")]
    Offer(#[from] OfferError),
    /// The guest's state does not hold together.
    #[error("Guest state from the peer is not acceptable")]
    State(#[from] StateError),
}

impl WireError {
    fn malformed(tag: Tag) -> impl Fn(Malformed) -> Self {
        move |Malformed| Self::Malformed(tag)
    }
}

#[cfg(test)]
mod tests;
