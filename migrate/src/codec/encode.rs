//! Writing batches.

use super::{Class, HEADER_SIZE, LZ4, MAX_BATCH_PAGES, STORED, Technique, ZSTD, ZSTD_AFTER};
use super::{delta, is_noise, is_prefix};
use crate::bytes::{push_signed, push_varint};
use crate::group::Witness;
use crate::pages::{MAX_PAGES, PAGE_SIZE, Page, PageType, Pfn, is_zero};
use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use std::fmt;
use std::sync::Arc;
use zstd_safe::{CCtx, CParameter};

/// Collects pages and writes them as one batch. It keeps its buffers from one batch to the next:
/// the content of the largest batch so far, once plain and once compressed, and the tables of the
/// compressors that were used.
///
/// A page is copied once, into the place where it is digested and normalised and where the
/// compressor finds it:
///
/// ```
/// # use migrate::codec::BatchEncoder;
/// # use migrate::pages::{PAGE_SIZE, PageType};
/// # fn main() -> Result<(), migrate::codec::EncodeError> {
/// # let mapped = [1; PAGE_SIZE];
/// let mut batch = BatchEncoder::new();
/// let copy = batch.slot();
/// copy.copy_from_slice(&mapped);
/// // Look at the copy, and keep it, or leave it and take the next page.
/// batch.keep(7, PageType::Normal)?;
/// let mut payload = Vec::new();
/// let statistics = batch.finish(&mut payload);
/// # assert_eq!(statistics.raw, 1);
/// # Ok(())
/// # }
/// ```
pub struct BatchEncoder {
    runs: Vec<Run>,
    pages: usize,
    next_pfn: Pfn,
    /// The content of the raw pages, and behind it the slot.
    raw: Vec<u8>,
    /// References and deltas, by ascending pfn.
    rest: Vec<u8>,
    /// The content of pages of noise.
    noise: Vec<u8>,
    /// The page that the next reference is expected to be to.
    expected: Pfn,
    /// The place at which the next shared page is expected.
    expected_place: u64,
    /// Pages of each class.
    counts: [usize; Class::COUNT],
    technique: Technique,
    /// The block before, where the destination will have had it.
    prefix: Option<Arc<Vec<u8>>>,
    compressor: Compressor,
}

/// The compressors with their tables, and where they write. Takes no memory before it is used.
#[derive(Default)]
pub(super) struct Compressor {
    compressed: Vec<u8>,
    lz4: Option<CompressTable>,
    zstd: Option<CCtx<'static>>,
}

struct Run {
    first: Pfn,
    length: u64,
    class: Class,
    page_type: PageType,
}

/// What was in a batch, and what became of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchStatistics {
    /// Pages in all.
    pub pages: usize,
    /// Pages of zeros.
    pub zero: usize,
    /// Pages that got another type only.
    pub same: usize,
    /// Pages that are as another one is.
    pub reference: usize,
    /// Pages of which the changes are in the block.
    pub delta: usize,
    /// Pages that the destination has of other guests.
    pub shared: usize,
    /// Pages whose content is in the block.
    pub raw: usize,
    /// Pages whose content is behind the block, as it is.
    pub noise: usize,
    /// Bytes of the whole batch.
    pub bytes: usize,
    /// Bytes of the block.
    pub block: usize,
    /// What wrote the block: the technique that was asked for, or none if that made it no smaller.
    pub technique: Technique,
}

/// A page that cannot be added to a batch. These are mistakes of the caller's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The batch has as many pages as it may.
    #[error("Batch of pages is full")]
    Full,
    /// The page does not come after the last one.
    #[error("Page {0:#x} is not above the batch's last one")]
    NotAscending(Pfn),
    /// No guest has this page.
    #[error("Page {0:#x} is beyond any guest's memory")]
    OutsideMemory(Pfn),
    /// No library has this place.
    #[error("Page {0:#x} cannot be at place {1} of a library")]
    BadPlace(Pfn, u64),
    /// The page cannot be as that one is: it is the same one, or no guest has it.
    #[error("Page {0:#x} cannot refer to page {1:#x}")]
    BadReference(Pfn, Pfn),
    /// The type has no content, and the call is about content, or the other way round.
    #[error("Page {0:#x} of type {1} does not fit the call")]
    ClassAndType(Pfn, PageType),
}

impl Default for BatchEncoder {
    fn default() -> Self {
        Self::new()
    }
}

impl BatchEncoder {
    /// An empty batch, to be compressed by LZ4. Buffers grow as pages come.
    #[must_use]
    pub fn new() -> Self {
        Self {
            runs: Vec::new(),
            pages: 0,
            next_pfn: 0,
            raw: Vec::new(),
            rest: Vec::new(),
            noise: Vec::new(),
            expected: 0,
            expected_place: 0,
            counts: [0; Class::COUNT],
            technique: Technique::Lz4,
            prefix: None,
            compressor: Compressor::default(),
        }
    }

    /// How this batch and the next ones are compressed. It may be set anew when the batch is full;
    /// until then it says what is left to noise.
    pub fn set_technique(&mut self, technique: Technique) {
        self.technique = technique;
    }

    /// The block before this batch, if it is known: for techniques that make use of it. One that
    /// can't be used, see [`PREFIX_LEAST`](super::PREFIX_LEAST), is none.
    pub fn set_prefix(&mut self, prefix: Option<Arc<Vec<u8>>>) {
        self.prefix = prefix.filter(|block| is_prefix(block));
    }

    /// What will be compressed of the batch as it is now.
    pub fn block(&mut self) -> &[u8] {
        self.content().0
    }

    /// Gives the compressor out, or another one in: batches that are compressed one after the
    /// other need one of them.
    pub(super) fn swap_compressor(&mut self, other: &mut Compressor) {
        std::mem::swap(&mut self.compressor, other);
    }

    /// How many pages are in the batch.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.pages
    }

    /// Whether there is no page in the batch.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Whether no other page fits.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.pages == MAX_BATCH_PAGES
    }

    /// Bytes that wait for the compressor.
    #[must_use]
    pub const fn block_bytes(&self) -> usize {
        self.raw_bytes() + self.rest.len()
    }

    /// Bytes of raw pages and changes, noise among them.
    #[must_use]
    pub const fn content_bytes(&self) -> usize {
        self.block_bytes() + self.noise_bytes()
    }

    /// Bytes of pages that no compressor gets to see.
    #[must_use]
    pub const fn noise_bytes(&self) -> usize {
        self.noise.len()
    }

    const fn count(&self, class: Class) -> usize {
        self.counts[class as usize]
    }

    const fn raw_bytes(&self) -> usize {
        self.count(Class::Raw) * PAGE_SIZE
    }

    /// The place for the content of the next page. What is in it is forgotten unless
    /// [`keep`](Self::keep) comes next. It holds arbitrary bytes at first.
    pub fn slot(&mut self) -> &mut Page {
        let start = self.raw_bytes();
        if self.raw.len() < start + PAGE_SIZE {
            self.raw.resize(start + PAGE_SIZE, 0);
        }
        let (slots, _) = self.raw[start..].as_chunks_mut();
        &mut slots[0]
    }

    /// Adds the page whose content is in the slot: as zeros if it is all zeros, as noise if
    /// nothing makes it smaller and the technique would not look, else raw.
    ///
    /// # Errors
    /// Fails when the batch is full, the pfn is not above the last one, or the type has no
    /// content.
    pub fn keep(&mut self, pfn: Pfn, page_type: PageType) -> Result<Class, EncodeError> {
        let class = if is_zero(self.slot()) {
            Class::Zero
        } else if self.technique.leaves_noise() && is_noise(self.slot()) {
            Class::Noise
        } else {
            Class::Raw
        };
        self.add(pfn, page_type, class)?;
        if class == Class::Noise {
            let start = self.raw_bytes();
            let slot = &self.raw[start..start + PAGE_SIZE];
            self.noise.extend_from_slice(slot);
        }
        Ok(class)
    }

    /// Adds a page with its content, by a copy.
    ///
    /// # Errors
    /// As [`keep`](Self::keep).
    pub fn push(
        &mut self,
        pfn: Pfn,
        page_type: PageType,
        content: &Page,
    ) -> Result<Class, EncodeError> {
        *self.slot() = *content;
        self.keep(pfn, page_type)
    }

    /// Adds a page that is known to be all zeros.
    ///
    /// # Errors
    /// As [`keep`](Self::keep).
    pub fn push_zero(&mut self, pfn: Pfn, page_type: PageType) -> Result<(), EncodeError> {
        self.add(pfn, page_type, Class::Zero)
    }

    /// Adds a page whose type has no content.
    ///
    /// # Errors
    /// As [`keep`](Self::keep), but the type must have no content.
    pub fn push_hole(&mut self, pfn: Pfn, page_type: PageType) -> Result<(), EncodeError> {
        self.add(pfn, page_type, Class::None)
    }

    /// Adds a page whose content is what the destination has there; only its type is new.
    ///
    /// # Errors
    /// As [`keep`](Self::keep).
    pub fn push_same(&mut self, pfn: Pfn, page_type: PageType) -> Result<(), EncodeError> {
        self.add(pfn, page_type, Class::Same)
    }

    /// Adds a page whose content is what the destination has at `original` when it has come to
    /// this page of the stream.
    ///
    /// # Errors
    /// As [`keep`](Self::keep); and where `original` is the page itself, or beyond any guest's
    /// memory.
    pub fn push_reference(
        &mut self,
        pfn: Pfn,
        page_type: PageType,
        original: Pfn,
    ) -> Result<(), EncodeError> {
        if original == pfn || original >= MAX_PAGES {
            return Err(EncodeError::BadReference(pfn, original));
        }
        self.add(pfn, page_type, Class::Reference)?;
        // Both are below 2^30.
        push_signed(&mut self.rest, original as i64 - self.expected as i64);
        self.expected = original + 1;
        Ok(())
    }

    /// Adds a page whose content the destination has at `place` of what it shares, with what shows
    /// that it is known here.
    ///
    /// # Errors
    /// As [`keep`](Self::keep); and where no library has that place.
    pub fn push_shared(
        &mut self,
        pfn: Pfn,
        page_type: PageType,
        place: u64,
        witness: Witness,
    ) -> Result<(), EncodeError> {
        if place >= MAX_PAGES {
            return Err(EncodeError::BadPlace(pfn, place));
        }
        self.add(pfn, page_type, Class::Shared)?;
        // Both are below 2^30.
        push_signed(&mut self.rest, place as i64 - self.expected_place as i64);
        self.rest.extend(witness.0);
        self.expected_place = place + 1;
        Ok(())
    }

    /// Adds a page that was `old`, which the destination has there, and is `new`: its changes
    /// where they are clearly shorter, else as [`push`](Self::push) does.
    ///
    /// # Errors
    /// As [`keep`](Self::keep).
    pub fn push_changed(
        &mut self,
        pfn: Pfn,
        page_type: PageType,
        old: &Page,
        new: &Page,
    ) -> Result<Class, EncodeError> {
        let start = self.rest.len();
        if is_zero(new) || !delta::encode(old, new, &mut self.rest) {
            return self.push(pfn, page_type, new);
        }
        if let Err(error) = self.add(pfn, page_type, Class::Delta) {
            self.rest.truncate(start);
            return Err(error);
        }
        Ok(Class::Delta)
    }

    fn add(&mut self, pfn: Pfn, page_type: PageType, class: Class) -> Result<(), EncodeError> {
        if page_type.has_data() == (class == Class::None) {
            return Err(EncodeError::ClassAndType(pfn, page_type));
        }
        if self.is_full() {
            return Err(EncodeError::Full);
        }
        if pfn >= MAX_PAGES {
            return Err(EncodeError::OutsideMemory(pfn));
        }
        if pfn < self.next_pfn {
            return Err(EncodeError::NotAscending(pfn));
        }
        match self.runs.last_mut() {
            Some(run)
                if run.first + run.length == pfn
                    && run.class == class
                    && run.page_type == page_type =>
            {
                run.length += 1;
            }
            _ => self.runs.push(Run {
                first: pfn,
                length: 1,
                class,
                page_type,
            }),
        }
        self.next_pfn = pfn + 1;
        self.pages += 1;
        self.counts[class as usize] += 1;
        Ok(())
    }

    /// Appends the batch to `to` and empties it. An empty batch is not written.
    pub fn finish(&mut self, to: &mut Vec<u8>) -> BatchStatistics {
        let start = to.len();
        let (technique, block) = match self.pages {
            0 => (Technique::Stored, 0),
            _ => self.write(to),
        };
        let statistics = BatchStatistics {
            pages: self.pages,
            zero: self.count(Class::Zero),
            same: self.count(Class::Same),
            reference: self.count(Class::Reference),
            delta: self.count(Class::Delta),
            shared: self.count(Class::Shared),
            raw: self.count(Class::Raw),
            noise: self.count(Class::Noise),
            bytes: to.len() - start,
            block,
            technique,
        };
        self.clear();
        statistics
    }

    /// Forgets the pages of the batch.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.pages = 0;
        self.next_pfn = 0;
        self.rest.clear();
        self.noise.clear();
        self.expected = 0;
        self.expected_place = 0;
        self.counts = [0; Class::COUNT];
        self.prefix = None;
    }

    /// Puts references and deltas behind the raw pages, where the slot is: what is in that was
    /// not kept.
    fn lay_out(&mut self) {
        let (start, end) = (self.raw_bytes(), self.block_bytes());
        if self.raw.len() < end {
            self.raw.resize(end, 0);
        }
        self.raw[start..end].copy_from_slice(&self.rest);
    }

    /// What the compressor gets, and what comes before it, and the compressor.
    fn content(&mut self) -> (&[u8], Option<&[u8]>, &mut Compressor) {
        self.lay_out();
        let content = &self.raw[..self.block_bytes()];
        let prefix = self.prefix.as_deref().map(Vec::as_slice);
        (content, prefix, &mut self.compressor)
    }

    /// How long the block would be if the batch were finished with `technique` now.
    pub fn block_length_with(&mut self, technique: Technique) -> usize {
        let (content, prefix, compressor) = self.content();
        compressor.compress(technique, content, prefix).1.len()
    }

    /// Writes the batch; what compressed the block, and its length.
    fn write(&mut self, to: &mut Vec<u8>) -> (Technique, usize) {
        let wanted = self.technique;
        self.lay_out();
        let content = &self.raw[..self.block_bytes()];
        let prefix = self.prefix.as_deref().map(Vec::as_slice);
        let (technique, block) = self.compressor.compress(wanted, content, prefix);
        let compression = match technique {
            Technique::Stored => STORED,
            Technique::Lz4 => LZ4,
            _ if technique.looks_back() && prefix.is_some() => ZSTD_AFTER,
            Technique::Zstd1 | Technique::Zstd3 | Technique::Zstd6 => ZSTD,
        };
        to.reserve(HEADER_SIZE + self.runs.len() * 4 + block.len() + self.noise.len());
        to.extend([compression, 0]);
        // There are no more runs than pages, and 1,024 of these at most.
        to.extend((self.runs.len() as u16).to_le_bytes());
        push_varint(to, self.rest.len() as u64);
        let mut end = 0;
        for run in &self.runs {
            to.push((run.class as u8) << 4 | run.page_type.bits());
            push_varint(to, run.first - end);
            push_varint(to, run.length - 1);
            end = run.first + run.length;
        }
        to.extend_from_slice(block);
        to.extend_from_slice(&self.noise);
        (technique, block.len())
    }
}

impl Compressor {
    /// `raw` by `technique`, or as it is where that makes it no shorter. One that looks back does
    /// so to `prefix`, if there is one.
    fn compress<'a>(
        &'a mut self,
        technique: Technique,
        raw: &'a [u8],
        prefix: Option<&[u8]>,
    ) -> (Technique, &'a [u8]) {
        let length = match technique {
            _ if raw.is_empty() => None,
            Technique::Stored => None,
            Technique::Lz4 => {
                // It asks for room for the worst case, although only a result that is shorter
                // than its input is of use.
                self.make_room(get_maximum_output_size(raw.len()));
                let table = self.lz4.get_or_insert_with(CompressTable::large);
                compress_into_with_table(raw, &mut self.compressed, table).ok()
            }
            Technique::Zstd1 | Technique::Zstd3 | Technique::Zstd6 => {
                self.make_room(zstd_safe::compress_bound(raw.len()));
                self.compress_zstd(technique, raw, prefix.filter(|_| technique.looks_back()))
            }
        };
        match length {
            Some(length) if length < raw.len() => (technique, &self.compressed[..length]),
            _ => (Technique::Stored, raw),
        }
    }

    fn make_room(&mut self, room: usize) {
        if self.compressed.len() < room {
            self.compressed.resize(room, 0);
        }
    }

    /// The length of what is in the buffer then; none if there is no memory for it.
    fn compress_zstd(
        &mut self,
        technique: Technique,
        raw: &[u8],
        prefix: Option<&[u8]>,
    ) -> Option<usize> {
        let context = match &mut self.zstd {
            Some(context) => context,
            none => none.insert(CCtx::try_create()?),
        };
        let level = technique.zstd_level()?;
        let to = self.compressed.as_mut_slice();
        if let Some(prefix) = prefix {
            return context.compress_using_dict(to, raw, prefix, level).ok();
        }
        // The destination knows the length, digests what it gets, and has no dictionaries.
        for parameter in [
            CParameter::CompressionLevel(level),
            CParameter::ContentSizeFlag(false),
            CParameter::ChecksumFlag(false),
            CParameter::DictIdFlag(false),
        ] {
            context.set_parameter(parameter).ok()?;
        }
        context.compress2(to, raw).ok()
    }
}

impl fmt::Debug for BatchEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BatchEncoder")
            .field("pages", &self.pages)
            .field("raw", &self.count(Class::Raw))
            .finish_non_exhaustive()
    }
}
