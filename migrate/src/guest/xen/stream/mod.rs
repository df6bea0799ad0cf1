//! The migration stream that stock libxl restores, version 2, and the libxc image inside, version
//! 3: as in Xen's docs/specs/libxl-migration-stream.pandoc and libxc-migration-stream.pandoc.
//!
//! ```text
//!   libxl   "LibxlFmt" | version 2 | options                        16 bytes, big-endian
//!           LIBXC_CONTEXT, empty
//!     libxc   image header | domain header                          24 (big-endian) and 16 bytes
//!             [X86_PV_INFO]                                         a PV guest's width
//!             X86_CPUID_POLICY, X86_MSR_POLICY                      applied at once
//!             STATIC_DATA_END
//!             [X86_PV_P2M_FRAMES], again whenever the p2m moved     before pages it makes room for
//!             PAGE_DATA ...                                         the last one of a pfn counts
//!             X86_TSC_INFO
//!             [SHARED_INFO, VCPU_BASIC, _EXTENDED, _XSAVE, _MSRS ...]     PV
//!             [HVM_CONTEXT, HVM_PARAMS]                                   HVM and PVH
//!             END
//!           END
//! ```
//!
//! A record is a type and a length, 32 bits each and little-endian, and a body that zeros fill up
//! to a multiple of 8 bytes.
//!
//! [`StreamWriter`] synthesizes such a stream from what crossed; [`StreamReader`] and [`Image`]
//! read one, ours or the stock saver's, to compare the two.

mod image;
mod reader;
pub mod record;
#[cfg(test)]
pub(crate) mod samples;
pub mod state;
mod writer;

pub use image::Image;
pub use reader::{MemoryRecord, PageEntries, StreamReader};
pub use writer::{StreamPage, StreamWriter};

use crate::bytes::Malformed;
use crate::pages::{PageType, Pfn, UnknownPageType};
use record::RecordType;
use state::StateError;
use std::io;

/// What is around the libxc image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Nothing: what `xc_domain_save` writes and `xc_domain_restore` reads.
    Libxc,
    /// libxl's stream: what `libxl_domain_suspend` writes and `libxl_domain_create_restore` reads.
    Libxl,
    /// xl's file around libxl's stream: what `xl save` writes. It can be read only.
    XlSave,
}

/// What can go wrong with a stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// Reading or writing failed.
    #[error("Migration stream cannot be transferred")]
    Io(#[from] io::Error),
    /// It ended before its end record.
    #[error("Migration stream ends too early")]
    Truncated,
    /// Its first bytes are not a stream's.
    #[error("Not a migration stream: {0}")]
    Foreign(&'static str),
    /// A record is longer than the specification allows.
    #[error("Record {0:#x} of {1} bytes exceeds the limit of a migration stream")]
    TooLong(u32, u32),
    /// A record has a type that is unknown, or that this reader does not handle.
    #[error("Record {0:#x} in a migration stream is not supported")]
    Unsupported(u32),
    /// A record is not what its type says.
    #[error("{0:?} record is malformed")]
    Malformed(RecordType),
    /// A record stands where it may not.
    #[error("{0:?} record is out of order")]
    OutOfOrder(RecordType),
    /// A page type is unknown.
    #[error("Bad page type in a migration stream")]
    UnknownType(#[from] UnknownPageType),
    /// A page is outside the guest's memory.
    #[error("Page {0:#x} in a migration stream is outside the guest's memory")]
    OutsideMemory(Pfn),
    /// A page comes with content although its type has none, or the other way round.
    #[error("Page {0:#x} of type {1} does not fit its content")]
    Content(Pfn, PageType),
    /// A record would have no pages, or too many.
    #[error("Record of {0} pages is not possible")]
    PageCount(usize),
    /// The guest's state does not hold together.
    #[error("Guest state in a migration stream is malformed")]
    State(#[from] StateError),
}

impl StreamError {
    fn malformed(record: RecordType) -> impl Fn(Malformed) -> Self {
        move |Malformed| Self::Malformed(record)
    }
}

const LIBXL_IDENT: u64 = 0x4c69_6278_6c46_6d74;
const LIBXL_VERSION: u32 = 2;
const LIBXL_END: u32 = 0;
const LIBXL_LIBXC_CONTEXT: u32 = 1;
const LIBXL_EMULATOR_XENSTORE_DATA: u32 = 2;
const LIBXL_EMULATOR_CONTEXT: u32 = 3;

const LIBXC_MARKER: u64 = u64::MAX;
const LIBXC_IDENT: u32 = 0x5845_4e46;
const LIBXC_VERSION: u32 = 3;
const PAGE_SHIFT: u16 = 12;
const TYPE_PV: u32 = 1;
const TYPE_HVM: u32 = 2;

/// Set in the type of a libxc record that may be skipped.
const OPTIONAL: u32 = 1 << 31;
/// The longest record of a libxc image.
const MAX_RECORD: u32 = 128 << 20;
/// The most pages that the stock saver puts in a record.
const MAX_RECORD_PAGES: usize = 1024;

const fn padding(length: usize) -> usize {
    length.wrapping_neg() % 8
}

#[cfg(test)]
mod tests;
