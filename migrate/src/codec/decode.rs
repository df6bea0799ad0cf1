//! Reading batches.

use super::delta::{Delta, MAX_DELTA_BYTES};
use super::{
    Class, CodecError, LZ4, MAX_BATCH_PAGES, MAX_REFERENCE_SIZE, PREFIX_LEAST, STORED, ZSTD,
    ZSTD_AFTER, is_prefix,
};
use crate::bytes::{Bytes, Malformed};
use crate::group::{WITNESS_SIZE, Witness};
use crate::pages::{MAX_PAGES, PAGE_SIZE, Page, PageType, Pfn};
use std::fmt;
use std::ops::Range;
use zstd_safe::{DCtx, find_frame_compressed_size};

/// Reads batches that may come from anybody. It keeps its buffers from one batch to the next; they
/// never grow beyond [`MAX_BATCH_PAGES`] pages, and the tables of a decompressor, which are as
/// large for any input.
#[derive(Default)]
pub struct BatchDecoder {
    runs: Vec<Run>,
    /// The block: raw pages, and behind them references and deltas.
    raw: Vec<u8>,
    /// How much of it is of the last batch that was read.
    length: usize,
    /// The block before, and how much of that is one: what the next may be compressed with.
    before: Vec<u8>,
    before_length: usize,
    /// The pfns of references, in the order of their pages.
    references: Vec<Pfn>,
    /// The places of shared pages and their witnesses, in the order of their pages.
    places: Vec<(u64, Witness)>,
    /// Where deltas are behind the raw pages, in the order of their pages.
    deltas: Vec<Range<usize>>,
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
    /// What the destination has at this pfn.
    Same,
    /// What it has at another pfn, below the number of the guest's pages.
    Reference(Pfn),
    /// What it has at this pfn, with these changes.
    Delta(Delta<'a>),
    /// What it has at this place of its library, which is given out by this witness. Whether there is
    /// one is not known here.
    Shared(u64, Witness),
}

/// Does not show the bytes: they are a guest's memory.
impl fmt::Debug for Content<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Zero => "Zero",
            Self::Raw(_) => "Raw(..)",
            Self::Same => "Same",
            Self::Reference(original) => return write!(f, "Reference({original:#x})"),
            Self::Delta(_) => "Delta(..)",
            Self::Shared(place, _) => return write!(f, "Shared({place})"),
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
    /// Its content, or what stands for it; [`Content::None`] exactly if the type has no data.
    pub content: Content<'a>,
}

/// A batch that has been checked as a whole.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    runs: &'a [Run],
    raw: &'a [Page],
    noise: &'a [Page],
    rest: &'a [u8],
    references: &'a [Pfn],
    places: &'a [(u64, Witness)],
    deltas: &'a [Range<usize>],
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
    pub fn decode<'a>(
        &'a mut self,
        payload: &'a [u8],
        pages: u64,
    ) -> Result<Batch<'a>, CodecError> {
        let mut from = Bytes::new(payload);
        let compression = from.u8()?;
        if from.u8()? != 0 {
            return Err(CodecError::Malformed);
        }
        let runs = from.u16()?;
        let rest = from.varint()?;

        self.runs.clear();
        let mut total = 0;
        let mut counts = [0; Class::COUNT];
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
            counts[run.class as usize] += run.length as usize;
            self.runs.push(run);
        }
        if total == 0 {
            return Err(CodecError::PageCount);
        }
        let most = counts[Class::Reference as usize] * MAX_REFERENCE_SIZE
            + counts[Class::Shared as usize] * (MAX_REFERENCE_SIZE + WITNESS_SIZE)
            + counts[Class::Delta as usize] * MAX_DELTA_BYTES;
        let rest = usize::try_from(rest)
            .ok()
            .filter(|rest| *rest <= most)
            .ok_or(CodecError::Rest)?;

        let raw = counts[Class::Raw as usize] * PAGE_SIZE;
        let noise = counts[Class::Noise as usize] * PAGE_SIZE;
        let block = from.rest().len().checked_sub(noise).ok_or(Malformed)?;
        let (block, noise) = from.rest().split_at(block);
        let before = std::mem::take(&mut self.length);
        if before >= PREFIX_LEAST {
            std::mem::swap(&mut self.raw, &mut self.before);
            self.before_length = before;
        }
        self.read_block(compression, block, raw + rest)?;
        self.read_rest(raw..raw + rest, pages)?;
        self.length = raw + rest;
        let (raw, rest) = self.raw[..raw + rest].split_at(raw);
        Ok(Batch {
            runs: &self.runs,
            raw: raw.as_chunks().0,
            noise: noise.as_chunks().0,
            rest,
            references: &self.references,
            places: &self.places,
            deltas: &self.deltas,
            pages: total as usize,
        })
    }

    /// Finds and checks the references and deltas in a part of the block.
    fn read_rest(&mut self, part: Range<usize>, pages: u64) -> Result<(), CodecError> {
        self.references.clear();
        self.places.clear();
        self.deltas.clear();
        let rest = &self.raw[part];
        let mut from = Bytes::new(rest);
        let mut expected: Pfn = 0;
        let mut expected_place: u64 = 0;
        for run in &self.runs {
            match run.class {
                Class::Reference => {
                    for pfn in run.pfns() {
                        let step = from.signed().map_err(|_| CodecError::Rest)?;
                        let original = expected
                            .checked_add_signed(step)
                            .filter(|original| *original < pages && *original != pfn)
                            .ok_or(CodecError::Reference(pfn))?;
                        self.references.push(original);
                        expected = original + 1;
                    }
                }
                Class::Delta => {
                    for _ in run.pfns() {
                        let start = rest.len() - from.rest().len();
                        Delta::read(&mut from).map_err(|_| CodecError::Rest)?;
                        self.deltas.push(start..rest.len() - from.rest().len());
                    }
                }
                Class::Shared => {
                    for pfn in run.pfns() {
                        let step = from.signed().map_err(|_| CodecError::Rest)?;
                        let place = expected_place
                            .checked_add_signed(step)
                            .filter(|place| *place < MAX_PAGES)
                            .ok_or(CodecError::Place(pfn))?;
                        let witness = from.array().map_err(|_| CodecError::Rest)?;
                        self.places.push((place, Witness(witness)));
                        expected_place = place + 1;
                    }
                }
                Class::None | Class::Zero | Class::Raw | Class::Noise | Class::Same => {}
            }
        }
        if from.is_empty() {
            Ok(())
        } else {
            Err(CodecError::Rest)
        }
    }

    fn read_block(
        &mut self,
        compression: u8,
        block: &[u8],
        expected: usize,
    ) -> Result<(), CodecError> {
        if compression > ZSTD_AFTER {
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
            ZSTD => decompress_zstd(&mut self.zstd, block, raw, &[])?,
            _ => {
                let before = &self.before[..self.before_length];
                if !is_prefix(before) {
                    return Err(CodecError::NoPrefix);
                }
                decompress_zstd(&mut self.zstd, block, raw, before)?
            }
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

/// How long the content of `block` is, which is one frame and nothing else, compressed with what
/// comes `before` it. The content goes straight to `raw`, which is the window as well: however large
/// a window the frame's header asks for, none is allocated.
fn decompress_zstd(
    context: &mut Option<DCtx<'static>>,
    block: &[u8],
    raw: &mut [u8],
    before: &[u8],
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
        .decompress_using_dict(raw, block, before)
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

impl Run {
    const fn pfns(&self) -> Range<Pfn> {
        self.first..self.first + self.length
    }
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
        let mut noise = self.noise.iter();
        let mut references = self.references.iter();
        let mut places = self.places.iter();
        let mut deltas = self.deltas.iter();
        let rest = self.rest;
        self.runs
            .iter()
            .flat_map(|run| run.pfns().map(move |pfn| (pfn, run)))
            .filter_map(move |(pfn, run)| {
                // Of each as many were counted as there are.
                let content = match run.class {
                    Class::None => Content::None,
                    Class::Zero => Content::Zero,
                    Class::Raw => Content::Raw(raw.next()?),
                    Class::Noise => Content::Raw(noise.next()?),
                    Class::Same => Content::Same,
                    Class::Reference => Content::Reference(*references.next()?),
                    Class::Shared => {
                        let (place, witness) = *places.next()?;
                        Content::Shared(place, witness)
                    }
                    Class::Delta => {
                        let mut from = Bytes::new(rest.get(deltas.next()?.clone())?);
                        Content::Delta(Delta::read(&mut from).ok()?)
                    }
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
        write!(
            f,
            "Batch({} pages, {} raw)",
            self.pages,
            self.raw.len() + self.noise.len()
        )
    }
}
