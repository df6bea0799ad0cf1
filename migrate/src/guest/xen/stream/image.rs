//! A whole stream in memory.

use super::state::{GuestState, StaticData};
use super::{Framing, MemoryRecord, StreamError, StreamReader};
use crate::digest::{Digester, MemoryDigest, PageDigest};
use crate::pages::{PAGE_SIZE, Page, PageType, Pfn, is_zero};
use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;

/// What a stream comes down to: for each pfn, the type and the content that came last. It is for
/// comparing streams, and keeps all that is not zero in memory.
#[derive(Clone, PartialEq, Eq)]
pub struct Image {
    /// What never changes.
    pub static_data: StaticData,
    /// The highest pfn that the p2m frames describe; nothing for an HVM guest.
    pub max_pfn: Option<Pfn>,
    /// The pfns of the p2m's frames, in order.
    pub p2m_frames: Vec<Pfn>,
    /// What the guest is besides its memory.
    pub state: GuestState,
    types: Vec<PageType>,
    contents: BTreeMap<Pfn, Box<Page>>,
}

impl Image {
    /// Reads a stream of a guest of at most `limit` pages to its end.
    ///
    /// # Errors
    /// Fails as [`StreamReader`] does.
    pub fn read(from: impl Read, framing: Framing, limit: u64) -> Result<Self, StreamError> {
        let mut reader = StreamReader::open(from, framing, limit)?;
        let static_data = reader.static_data().clone();
        let per_frame = static_data.kind.pfns_per_frame();
        let mut max_pfn = None;
        let mut p2m_frames = Vec::new();
        let mut types = Vec::new();
        let mut contents = BTreeMap::new();
        while let Some(record) = reader.read()? {
            match record {
                MemoryRecord::P2mFrames { start, end, frames } => {
                    max_pfn = max_pfn.max(Some(end));
                    let first = (start / per_frame.unwrap_or(1)) as usize;
                    let size = p2m_frames.len().max(first + frames.len());
                    p2m_frames.resize(size, Pfn::MAX);
                    p2m_frames[first..first + frames.len()].copy_from_slice(&frames);
                }
                MemoryRecord::Pages(pages) => {
                    for (pfn, page_type, content) in pages.iter() {
                        // It is below the limit that the caller gave.
                        let at = pfn as usize;
                        if types.len() <= at {
                            types.resize(at + 1, PageType::Invalid);
                        }
                        types[at] = page_type;
                        match content {
                            Some(content) if !is_zero(content) => {
                                contents.insert(pfn, Box::new(*content));
                            }
                            _ => drop(contents.remove(&pfn)),
                        }
                    }
                }
            }
        }
        let state = reader.finish()?;
        // Whether holes at the end were written or not makes no difference.
        let used = types
            .iter()
            .rposition(|t| *t != PageType::Invalid)
            .map_or(0, |at| at + 1);
        types.truncate(used);
        Ok(Self {
            static_data,
            max_pfn,
            p2m_frames,
            state,
            types,
            contents,
        })
    }

    /// The number of pfns up to the last that is no hole.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.types.len() as u64
    }

    /// A page's type. What was never written is a hole.
    #[must_use]
    pub fn page_type(&self, pfn: Pfn) -> PageType {
        usize::try_from(pfn)
            .ok()
            .and_then(|at| self.types.get(at).copied())
            .unwrap_or(PageType::Invalid)
    }

    /// A page's content, if its type has one.
    #[must_use]
    pub fn content(&self, pfn: Pfn) -> Option<&Page> {
        const ZERO: &Page = &[0; PAGE_SIZE];
        self.page_type(pfn)
            .has_data()
            .then(|| self.contents.get(&pfn).map_or(ZERO, |content| &**content))
    }

    /// The digest of a memory of `pages` pages, as both ends of a move make it.
    #[must_use]
    pub fn digest(&self, digester: &Digester, pages: u64) -> MemoryDigest {
        let pages = 0..pages;
        let types: Vec<_> = pages.clone().map(|pfn| self.page_type(pfn)).collect();
        let digests: Vec<_> = pages
            .map(|pfn| match self.content(pfn) {
                Some(content) => digester.page(self.page_type(pfn), content),
                None => PageDigest::UNKNOWN,
            })
            .collect();
        digester.memory(&types, &digests)
    }

    /// The pfns whose type or content is not the other image's.
    #[must_use]
    pub fn differing_pages(&self, other: &Self) -> Vec<Pfn> {
        (0..self.pages().max(other.pages()))
            .filter(|pfn| {
                self.page_type(*pfn) != other.page_type(*pfn)
                    || self.contents.get(pfn) != other.contents.get(pfn)
            })
            .collect()
    }
}

/// Does not show the content: it is a guest's memory.
impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("static_data", &self.static_data)
            .field("max_pfn", &self.max_pfn)
            .field("pages", &self.pages())
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}
