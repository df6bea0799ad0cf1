//! What a batch makes of what is held already: zeros, references and deltas become pages.
//!
//! ```text
//!   batch:  raw         the bytes in the batch
//!           shared      a copy of what is held of another guest
//!           same        what is held at the pfn, with another type
//!           delta       a copy of what is held at the pfn, changed
//!           reference   a copy of what is held at another pfn -- or of a page of this batch
//!                       that came before
//! ```
//!
//! Pages of a batch are in ascending order, each once. So what a page replaces is what was held
//! before the batch, and a reference to a lower pfn that is in the batch is to that page of it.
//!
//! Nothing is trusted: the batch was checked, and here each page that it builds upon must be held
//! and have content. Every byte that is to be stored is digested as it is: where a peer lies, or a
//! copy went wrong, the digest of the whole memory shows it. The only memory that is taken is that
//! of the copies, one a page of the batch at most.

use crate::codec::{Batch, Content};
use crate::digest::Digester;
use crate::group::Witness;
use crate::guest::PageState;
use crate::image::{Arrived, Arriving};
use crate::pages::{PAGE_SIZE, Page, PageType, Pfn};
use std::fmt;

/// A batch that doesn't fit what is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ArrivalError {
    /// It builds upon a page without content.
    #[error("Page {pfn:#x} builds upon page {original:#x}, which has no content here")]
    NothingThere {
        /// The page.
        pfn: Pfn,
        /// What it builds upon, itself perhaps.
        original: Pfn,
    },
    /// It builds upon what is not held of other guests, or is not shown to be known.
    #[error("Page {pfn:#x} builds upon place {place} of the library, which has not that there")]
    NotShared {
        /// The page.
        pfn: Pfn,
        /// The place.
        place: u64,
    },
}

/// A page that is held.
#[derive(Clone, Copy)]
pub struct HeldPage<'a> {
    /// Its type, which has content, and its digest.
    pub state: PageState,
    /// Its content.
    pub content: &'a Page,
}

/// Makes pages of batches. It keeps its buffer from one batch to the next: the copies of the one
/// that had most of them.
#[derive(Default)]
pub struct Arrival {
    copies: Vec<u8>,
}

/// The pages of a batch, not digested yet.
pub struct Resolved<'a> {
    pages: Vec<ResolvedPage<'a>>,
    copies: &'a [Page],
}

/// One of them.
struct ResolvedPage<'a> {
    pfn: Pfn,
    page_type: PageType,
    is: Is<'a>,
}

/// What it is.
#[derive(Clone, Copy)]
enum Is<'a> {
    Hole,
    Zero,
    Raw(&'a Page),
    Copy(usize),
    /// What is held, which has this type and digest.
    Kept(PageState),
}

impl Arrival {
    /// Takes from what is held all that the batch needs of it. `held` says what is held at a pfn;
    /// none where nothing arrived yet, and where there is no content. `shared` copies what is at a
    /// place of the library, by its witness; whether it could.
    ///
    /// # Errors
    /// Where the batch builds upon a page that is not held.
    pub fn resolve<'a, 'h>(
        &'a mut self,
        batch: Batch<'a>,
        held: impl Fn(Pfn) -> Option<HeldPage<'h>>,
        shared: impl Fn(u64, Witness, &mut Page) -> bool,
    ) -> Result<Resolved<'a>, ArrivalError> {
        let mut pages: Vec<ResolvedPage<'a>> = Vec::with_capacity(batch.len());
        let mut used = 0;
        for page in batch.iter() {
            let pfn = page.pfn;
            let nothing = |original| ArrivalError::NothingThere { pfn, original };
            let is = match page.content {
                Content::None => Is::Hole,
                Content::Zero => Is::Zero,
                Content::Raw(content) => Is::Raw(content),
                Content::Same => Is::Kept(held(pfn).ok_or(nothing(pfn))?.state),
                Content::Delta(delta) => {
                    let old = held(pfn).ok_or(nothing(pfn))?;
                    let copy = new_copy(&mut self.copies, &mut used);
                    copy.copy_from_slice(old.content);
                    delta.apply(copy);
                    Is::Copy(used - 1)
                }
                Content::Shared(place, witness) => {
                    if !shared(place, witness, new_copy(&mut self.copies, &mut used)) {
                        return Err(ArrivalError::NotShared { pfn, place });
                    }
                    Is::Copy(used - 1)
                }
                Content::Reference(original) => {
                    let earlier = pages.binary_search_by_key(&original, |page| page.pfn);
                    match earlier.ok().and_then(|at| pages.get(at)).map(|it| it.is) {
                        // The bytes are there already.
                        Some(Is::Raw(content)) => Is::Raw(content),
                        Some(Is::Copy(copy)) => Is::Copy(copy),
                        Some(Is::Zero) => Is::Zero,
                        Some(Is::Hole) => return Err(nothing(original)),
                        Some(Is::Kept(_)) | None => {
                            let original = held(original).ok_or(nothing(original))?;
                            new_copy(&mut self.copies, &mut used).copy_from_slice(original.content);
                            Is::Copy(used - 1)
                        }
                    }
                }
            };
            pages.push(ResolvedPage {
                pfn,
                page_type: page.page_type,
                is,
            });
        }
        let (copies, _) = self.copies.as_chunks();
        Ok(Resolved {
            pages,
            copies: &copies[..used],
        })
    }
}

/// Room for one more copy. What is in it is arbitrary.
fn new_copy<'a>(copies: &'a mut Vec<u8>, used: &mut usize) -> &'a mut Page {
    let at = *used;
    *used += 1;
    if copies.len() < *used * PAGE_SIZE {
        copies.resize(*used * PAGE_SIZE, 0);
    }
    let (pages, _) = copies.as_chunks_mut();
    &mut pages[at]
}

impl Resolved<'_> {
    /// Digests each page: what is to be stored.
    #[must_use]
    pub fn digest(&self, digester: &Digester) -> Vec<Arrived<'_>> {
        // The same for each page of a type.
        let mut zeros = [None; 16];
        self.pages
            .iter()
            .map(|page| {
                let page_type = page.page_type;
                let with = |content: &Page| digester.page(page_type, content);
                let zero = &mut zeros[usize::from(page_type.bits())];
                let (digest, content) = match page.is {
                    Is::Hole => (digester.hole(page_type), Arriving::Nothing),
                    Is::Zero => (
                        *zero.get_or_insert_with(|| digester.zero(page_type)),
                        Arriving::Nothing,
                    ),
                    Is::Raw(content) => (with(content), Arriving::Content(content)),
                    Is::Copy(at) => (with(&self.copies[at]), Arriving::Content(&self.copies[at])),
                    // It was digested when it came.
                    Is::Kept(state) => {
                        let content = digester.content(state.page_type, state.digest);
                        (digester.with_type(content, page_type), Arriving::Kept)
                    }
                };
                Arrived {
                    pfn: page.pfn,
                    state: PageState { page_type, digest },
                    content,
                }
            })
            .collect()
    }
}

impl fmt::Debug for Arrival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arrival")
            .field("buffer", &self.copies.len())
            .finish()
    }
}

impl fmt::Debug for Resolved<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Resolved({} pages)", self.pages.len())
    }
}
