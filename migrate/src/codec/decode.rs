//! Reading batches.

use super::{Class, CodecError, LZ4, MAX_BATCH_PAGES, STORED, ZSTD};
use crate::bytes::{Bytes, Malformed};
use crate::pages::{PAGE_SIZE, Page, PageType, Pfn};
use std::fmt;
use zstd_safe::{DCtx, find_frame_compressed_size};

/// Reads batches that may come from anybody. It keeps its buffers from one batch to the next; they
/// never grow beyond [`MAX_BATCH_PAGES`] pages, and the tables of a decompressor, which are as
/// large for any input.
#[derive(Default)]
pub struct BatchDecoder {
    runs: Vec<Run>,
    raw: Vec<u8>,
    zstd: Option<DCtx<'static>>,
}

struct Run {
    first: Pfn,
    length: u64,
    class: Class,
    page_type: PageType,
}

/// The content of a page in a batch.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Content<'a> {
    /// The type has none.
    None,
    /// All zeros.
    Zero,
    /// These bytes.
    Raw(&'a Page),
}

/// Does not show the bytes: they are a guest's memory.
impl fmt::Debug for Content<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Zero => "Zero",
            Self::Raw(_) => "Raw(..)",
        })
    }
}

/// A page of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPage<'a> {
    /// The page's number, below the number of the guest's pages.
    pub pfn: Pfn,
    /// Its type.
    pub page_type: PageType,
    /// Its content; there is one exactly if the type has data.
    pub content: Content<'a>,
}

/// A batch that has been checked as a whole.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    runs: &'a [Run],
    raw: &'a [Page],
    pages: usize,
}

impl BatchDecoder {
    /// A decoder without buffers yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads a batch for a guest that has `pages` pages. All of it is checked before anything of
    /// it can be seen.
    ///
    /// # Errors
    /// Fails when the bytes are not exactly one batch, and when a page is outside the memory.
    pub fn decode(&mut self, payload: &[u8], pages: u64) -> Result<Batch<'_>, CodecError> {
        let mut from = Bytes::new(payload);
        let compression = from.u8()?;
        if from.u8()? != 0 {
            return Err(CodecError::Malformed);
        }
        let runs = from.u16()?;

        self.runs.clear();
        let mut total = 0;
        let mut raw_pages = 0;
        let mut end: Pfn = 0;
        for _ in 0..runs {
            let run = read_run(&mut from, end)?;
            end = run.first.checked_add(run.length).ok_or(Malformed)?;
            if end > pages {
                return Err(CodecError::OutsideMemory(run.first.max(pages)));
            }
            if run.page_type.has_data() == (run.class == Class::None) {
                return Err(CodecError::ClassAndType(run.first));
            }
            total += run.length;
            if total > MAX_BATCH_PAGES as u64 {
                return Err(CodecError::PageCount);
            }
            if run.class == Class::Raw {
                raw_pages += run.length as usize;
            }
            self.runs.push(run);
        }
        if total == 0 {
            return Err(CodecError::PageCount);
        }

        self.read_block(compression, from.rest(), raw_pages * PAGE_SIZE)?;
        let (raw, _) = self.raw.as_chunks();
        Ok(Batch {
            runs: &self.runs,
            raw: &raw[..raw_pages],
            pages: total as usize,
        })
    }

    fn read_block(
        &mut self,
        compression: u8,
        block: &[u8],
        expected: usize,
    ) -> Result<(), CodecError> {
        if compression > ZSTD {
            return Err(CodecError::UnknownCompression(compression));
        }
        if (compression == STORED && block.len() != expected)
            || (expected == 0 && compression != STORED)
        {
            return Err(CodecError::BlockLength {
                expected,
                found: block.len(),
            });
        }
        if self.raw.len() < expected {
            self.raw.resize(expected, 0);
        }
        let raw = &mut self.raw[..expected];
        let found = match compression {
            STORED => {
                raw.copy_from_slice(block);
                expected
            }
            LZ4 => {
                lz4_flex::block::decompress_into(block, raw).map_err(|_| CodecError::Decompress)?
            }
            _ => decompress_zstd(&mut self.zstd, block, raw)?,
        };
        if found != expected {
            return Err(CodecError::BlockLength { expected, found });
        }
        Ok(())
    }

    /// Bytes that the decompressor holds.
    #[cfg(test)]
    pub(super) fn zstd_bytes(&self) -> usize {
        self.zstd.as_ref().map_or(0, DCtx::sizeof)
    }
}

/// How long the content of `block` is, which is one frame and nothing else. The content goes
/// straight to `raw`, which is the window as well: however large a window the frame's header asks
/// for, none is allocated.
fn decompress_zstd(
    context: &mut Option<DCtx<'static>>,
    block: &[u8],
    raw: &mut [u8],
) -> Result<usize, CodecError> {
    // Several frames, or some that are to be skipped, would decompress as well.
    if find_frame_compressed_size(block) != Ok(block.len()) {
        return Err(CodecError::Decompress);
    }
    let context = match context {
        Some(context) => context,
        None => context.insert(DCtx::try_create().ok_or(CodecError::Memory)?),
    };
    context
        .decompress(raw, block)
        .map_err(|_| CodecError::Decompress)
}

fn read_run(from: &mut Bytes<'_>, end: Pfn) -> Result<Run, CodecError> {
    let kind = from.u8()?;
    let class = Class::from_bits(kind >> 4).ok_or(CodecError::UnknownClass(kind >> 4))?;
    let page_type = PageType::from_bits(kind & 0xf)?;
    let first = end.checked_add(from.varint()?).ok_or(Malformed)?;
    let length = from.varint()?.checked_add(1).ok_or(Malformed)?;
    Ok(Run {
        first,
        length,
        class,
        page_type,
    })
}

impl<'a> Batch<'a> {
    /// How many pages are in it: 1 to [`MAX_BATCH_PAGES`].
    #[must_use]
    pub const fn len(&self) -> usize {
        self.pages
    }

    /// Whether there is none. A batch that was decoded is never empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// The pages, in ascending order, each once.
    pub fn iter(&self) -> impl Iterator<Item = BatchPage<'a>> + use<'a> {
        let mut raw = self.raw.iter();
        self.runs
            .iter()
            .flat_map(|run| (run.first..run.first + run.length).map(move |pfn| (pfn, run)))
            .filter_map(move |(pfn, run)| {
                let content = match run.class {
                    Class::None => Content::None,
                    Class::Zero => Content::Zero,
                    // As many were counted as there are.
                    Class::Raw => Content::Raw(raw.next()?),
                };
                Some(BatchPage {
                    pfn,
                    page_type: run.page_type,
                    content,
                })
            })
    }
}

impl fmt::Debug for BatchDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BatchDecoder")
            .field("buffer", &self.raw.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Batch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Batch({} pages, {} raw)", self.pages, self.raw.len())
    }
}
