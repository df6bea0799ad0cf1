//! How a batch of pages is written: pure functions over bytes.
//!
//! ```text
//!   u8 compression | u8 0 | u16 runs | varint rest | run ... run | block | noise
//!
//!   run    u8 class << 4 | type          class: what stands for the pages' content
//!          varint gap                    pfns between the end of the last run and this one
//!          varint length - 1             pages in the run
//!   block  the content of all raw pages, one after the other, and then references, places and
//!          deltas, `rest` bytes, in the order of their pages: all compressed as one
//!   noise  the content of all pages of noise, one after the other, as it is
//! ```
//!
//! Numbers are little-endian; a varint is made of groups of seven bits, the lowest first, in its
//! shortest form. A batch holds 1 to [`MAX_BATCH_PAGES`] pages in ascending order, each once. The
//! batch's last bytes are those of its pages of noise, and the block ends before them.
//!
//! | class | content |
//! |---|---|
//! | 0 | none: the type says it all |
//! | 1 | zeros |
//! | 2 | raw: in the block |
//! | 3 | same: what the destination has at this pfn. Only the type is new |
//! | 4 | reference: what the destination has at another pfn, when it has come to this page |
//! | 5 | delta: in the block, what changed in what the destination has at this pfn (`delta`) |
//! | 6 | shared: what the destination has of other guests of the trust group, at a place of its [`Library`](crate::group::Library) |
//! | 7 | noise: behind the block, not compressed |
//!
//! A reference is a signed varint (zigzag): the pfn less the one after the pfn of the reference
//! before it in the batch, at first less 0. So a run of pages that is elsewhere as well costs a
//! byte a page. A place of the library is written likewise, less the one after the place before it;
//! behind it are the 8 bytes of its witness, without which the destination gives nothing out.
//! References and deltas are resolved in the order of the stream, by
//! [`Arrival`](crate::arrival::Arrival): pages of the same batch that come before count, later
//! ones don't. A page that is as the destination has it is not in a batch at all.
//!
//! | compression | block |
//! |---|---|
//! | 0 | as it is; empty when no page is raw |
//! | 1 | one LZ4 block |
//! | 2 | one zstd frame (RFC 8878), without a dictionary |
//! | 3 | one zstd frame, with the block before as its dictionary: as it is, without a header of its own |
//!
//! The block before is that of the last batch whose block has [`PREFIX_LEAST`] bytes or more, before
//! it was compressed. So strong compression sees two batches at once, and what is a little alike in
//! neighbouring memory is found across their border.
//!
//! What the frame's header says of its content is not needed, and mostly not written. Other numbers
//! are kept for techniques to come; a later version of the protocol may use them, and a decoder refuses
//! what it does not know.

mod adaptive;
mod choice;
mod decode;
pub mod delta;
mod encode;
mod link_rate;
mod noise;
mod technique;

pub use adaptive::{AdaptiveEncoder, Encoding, MAX_WORKERS};
pub use choice::{Choice, Encoded, Order, Probed, Produced};
pub use decode::{Batch, BatchDecoder, BatchPage, Content};
pub use encode::{BatchEncoder, BatchStatistics, EncodeError};
pub use link_rate::{LinkRate, Sending, Sent};
pub use noise::is_noise;
pub use technique::{PagesByTechnique, Technique};

use crate::bytes::Malformed;
use crate::pages::{MAX_PAGES, PAGE_SIZE, Pfn, UnknownPageType};

/// The most pages in a batch. It is what Xen takes in one getpageframeinfo3.
pub const MAX_BATCH_PAGES: usize = 1024;

/// The most bytes that a batch can have: every page raw, incompressible, in a run of its own.
pub const MAX_BATCH_BYTES: usize =
    HEADER_SIZE + MAX_BATCH_PAGES * (1 + MAX_GAP_SIZE + 1) + MAX_BATCH_PAGES * PAGE_SIZE;

/// With a number of bytes of references and deltas that is below `MAX_BATCH_PAGES * PAGE_SIZE`.
const HEADER_SIZE: usize = 4 + 4;

/// The most bytes of a reference: any pfn less any other.
const MAX_REFERENCE_SIZE: usize = (MAX_PAGES.ilog2() as usize + 1) / 7 + 1;

/// The bytes of the largest gap.
const MAX_GAP_SIZE: usize = MAX_PAGES.ilog2() as usize / 7 + 1;

/// What stands for a page's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// Nothing: its type has no content.
    None = 0,
    /// Nothing: it is all zeros.
    Zero = 1,
    /// The content itself.
    Raw = 2,
    /// Nothing: the destination has it at this pfn.
    Same = 3,
    /// Another pfn, at which the destination has it.
    Reference = 4,
    /// What changed in what the destination has at this pfn.
    Delta = 5,
    /// The place of the content among what the destination shares.
    Shared = 6,
    /// The content itself, which no technique makes smaller ([`is_noise`]).
    Noise = 7,
}

impl Class {
    const COUNT: usize = 8;

    const fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits {
            0 => Self::None,
            1 => Self::Zero,
            2 => Self::Raw,
            3 => Self::Same,
            4 => Self::Reference,
            5 => Self::Delta,
            6 => Self::Shared,
            7 => Self::Noise,
            _ => return None,
        })
    }
}

const STORED: u8 = 0;
const LZ4: u8 = 1;
const ZSTD: u8 = 2;
const ZSTD_AFTER: u8 = 3;

/// The fewest bytes of a block that the next ones are compressed with.
pub const PREFIX_LEAST: usize = 64 * 1024;

/// What a dictionary of zstd's own begins with: it would be taken for one, where what is meant is
/// the bytes as they are.
const DICTIONARY_MAGIC: [u8; 4] = [0x37, 0xa4, 0x30, 0xec];

/// Whether a block can stand before another one.
fn is_prefix(block: &[u8]) -> bool {
    block.len() >= PREFIX_LEAST && !block.starts_with(&DICTIONARY_MAGIC)
}

/// A batch that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// It ends too early, or a number is not in its shortest form.
    #[error("Batch of pages is truncated or malformed")]
    Malformed,
    /// Its class of content is not known to this version.
    #[error("Unknown class {0} in a batch of pages")]
    UnknownClass(u8),
    /// Its page type is none.
    #[error("Bad page type in a batch of pages")]
    UnknownType(#[from] UnknownPageType),
    /// Its compression is not known to this version.
    #[error("Unknown compression {0} of a batch of pages")]
    UnknownCompression(u8),
    /// It claims content for a type without, or the other way round.
    #[error("Class and type of page {0:#x} do not fit together")]
    ClassAndType(Pfn),
    /// It has a page that the guest has not.
    #[error("Page {0:#x} is outside the guest's memory")]
    OutsideMemory(Pfn),
    /// It has none, or too many pages.
    #[error("Batch does not have 1 to {MAX_BATCH_PAGES} pages")]
    PageCount,
    /// A page refers to itself, or to what the guest has not.
    #[error("Page {0:#x} refers to itself, or to a page outside the guest's memory")]
    Reference(Pfn),
    /// A place is beyond any library.
    #[error("Page {0:#x} is said to be at a place that no library has")]
    Place(Pfn),
    /// What follows the raw pages is not the references and deltas that the runs announce.
    #[error("References and deltas of a batch are malformed")]
    Rest,
    /// The block is not as long as its pages.
    #[error("Block of a batch has {found} bytes, and its pages {expected}")]
    BlockLength {
        /// Bytes that the raw pages need.
        expected: usize,
        /// Bytes that the block has.
        found: usize,
    },
    /// It is compressed with the block before, and there is none.
    #[error("Batch of pages builds upon one that was not there")]
    NoPrefix,
    /// The block is not what its compression says, or more than its pages.
    #[error("Block of a batch does not decompress")]
    Decompress,
    /// There is no memory for the decompressor.
    #[error("No memory to decompress a batch of pages")]
    Memory,
}

impl From<Malformed> for CodecError {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

#[cfg(test)]
mod tests;
