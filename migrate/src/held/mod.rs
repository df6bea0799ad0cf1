//! What the destination holds of a guest, as the source knows it: what each page that is sent can
//! build upon.
//!
//! ```text
//!                 type and digest of every page     17 B a page     what it has
//!   page, its ->  index: content -> pfn              8 B a page     where else it has that
//!   digest        hot pages: pfn -> content         32 MiB          what was there before
//!      |
//!      +-- no content --------------------------> none
//!      +-- zeros -------------------------------> zero
//!      +-- the content that is there already ---> same         its type alone is new
//!      +-- content that it has elsewhere -------> reference    to that pfn
//!      +-- content that it has of others -------> shared       at a place of its library
//!      +-- a hot page that changed a little ----> delta        against what is there
//!      +-- else --------------------------------> raw
//! ```
//!
//! The destination takes pages in the order in which they are sent, so what it holds is exact at
//! each point of the stream: the table is set with every page that is put into a batch, neither
//! earlier nor later. The index only guesses; it is the table that says what is at a pfn. Thus a
//! pfn that was sent anew, or became a hole, is never referred to for what it had before.

mod hot;
mod index;
mod store;

use crate::codec::{BatchEncoder, Class, EncodeError};
use crate::digest::{ContentDigest, Digester, MemoryDigest};
use crate::group::Known;
use crate::guest::{PageState, PageTable};
use crate::pages::{Page, Pfn};
use hot::HotPages;
use index::ContentIndex;
use std::fmt;

/// Bytes of hot pages that are kept if nothing else is said. dom0 has little memory, and what a
/// guest rewrites all the time is mostly less.
pub const HOT_BYTES: usize = 32 << 20;

/// What the destination holds.
pub struct Held {
    table: PageTable,
    digester: Digester,
    index: ContentIndex,
    hot: HotPages,
    /// Of other guests of the trust group.
    shared: Option<Known>,
}

impl Held {
    /// Nothing, of a guest with `pages` pages, whose digests `digester` makes. The content of hot
    /// pages will take `hot_bytes` at most.
    #[must_use]
    pub fn nothing(pages: u64, digester: Digester, hot_bytes: usize) -> Self {
        Held {
            table: PageTable::new(pages),
            digester,
            index: ContentIndex::new(pages),
            hot: HotPages::new(hot_bytes),
            shared: None,
        }
    }

    /// What `table` says, from the start. Of no page the content is known, so that the first
    /// change of each crosses whole.
    #[must_use]
    pub fn holding(table: PageTable, digester: Digester, hot_bytes: usize) -> Self {
        let mut held = Held::nothing(table.pages(), digester, hot_bytes);
        let zeros = held.digester.zeros();
        for pfn in 0..table.pages() {
            let Some(PageState { page_type, digest }) = table.get(pfn) else {
                continue;
            };
            // Zeros are never referred to.
            if page_type.has_data() && digest != zeros.of(page_type) {
                let content = held.digester.content(page_type, digest);
                let index = &mut held.index;
                index.insert(content, pfn, |pfn| content_at(&table, &held.digester, pfn));
            }
        }
        held.table = table;
        held
    }

    /// It holds this of other guests, too.
    pub fn share(&mut self, shared: Known) {
        self.shared = Some(shared);
    }

    /// The type and digest of each page that it holds.
    #[must_use]
    pub const fn table(&self) -> &PageTable {
        &self.table
    }

    /// The digest of the whole memory.
    #[must_use]
    pub fn digest(&self) -> MemoryDigest {
        self.table.digest(&self.digester)
    }

    /// A round begins: pages come in ascending order again.
    pub fn begin_round(&mut self) {
        self.hot.begin_round();
    }

    /// No more pages will be sent: what was kept to build upon is given back.
    pub fn forget_contents(&mut self) {
        self.hot = HotPages::new(0);
        self.index = ContentIndex::new(0);
        self.shared = None;
    }

    /// Adds a page to a batch, by the shortest of what can stand for it. `content` is the copy
    /// that `state` was digested from; none where it is all zero, or its type has none.
    ///
    /// All batches are sent, in the order in which they were filled.
    ///
    /// # Errors
    /// As [`BatchEncoder::push`]; then the page is not in the batch.
    pub fn send(
        &mut self,
        batch: &mut BatchEncoder,
        pfn: Pfn,
        state: PageState,
        content: Option<&Page>,
    ) -> Result<Class, EncodeError> {
        let page_type = state.page_type;
        let class = match content {
            _ if !page_type.has_data() => {
                batch.push_hole(pfn, page_type)?;
                Class::None
            }
            None => {
                batch.push_zero(pfn, page_type)?;
                Class::Zero
            }
            Some(content) => self.send_content(batch, pfn, state, content)?,
        };
        match (class, content) {
            (
                Class::Raw | Class::Noise | Class::Reference | Class::Delta | Class::Shared,
                Some(content),
            ) => {
                let again = self.content_at(pfn).is_some();
                self.hot.keep(pfn, content, again);
            }
            (Class::Same, _) => {}
            _ => self.hot.forget(pfn),
        }
        self.table.set(pfn, state);
        if matches!(
            class,
            Class::Raw | Class::Noise | Class::Delta | Class::Shared
        ) {
            let digest = self.digester.content(page_type, state.digest);
            self.index.insert(digest, pfn, |pfn| {
                content_at(&self.table, &self.digester, pfn)
            });
        }
        Ok(class)
    }

    fn send_content(
        &self,
        batch: &mut BatchEncoder,
        pfn: Pfn,
        state: PageState,
        content: &Page,
    ) -> Result<Class, EncodeError> {
        let page_type = state.page_type;
        let digest = self.digester.content(page_type, state.digest);
        if self.content_at(pfn) == Some(digest) {
            batch.push_same(pfn, page_type)?;
            return Ok(Class::Same);
        }
        if let Some(original) = self.index.find(digest, |pfn| self.content_at(pfn)) {
            batch.push_reference(pfn, page_type, original)?;
            return Ok(Class::Reference);
        }
        // What others have is what nobody has written since it was loaded: mostly in the first round.
        if self.content_at(pfn).is_none()
            && let Some((place, witness)) =
                self.shared.as_ref().and_then(|known| known.place(content))
        {
            batch.push_shared(pfn, page_type, place, witness)?;
            return Ok(Class::Shared);
        }
        match self.hot.get(pfn) {
            Some(old) => batch.push_changed(pfn, page_type, old, content),
            None => batch.push(pfn, page_type, content),
        }
    }

    /// What the destination has at `pfn`, if that is a page with content.
    fn content_at(&self, pfn: Pfn) -> Option<ContentDigest> {
        content_at(&self.table, &self.digester, pfn)
    }
}

fn content_at(table: &PageTable, digester: &Digester, pfn: Pfn) -> Option<ContentDigest> {
    let state = table.get(pfn)?;
    let page_type = state.page_type;
    page_type
        .has_data()
        .then(|| digester.content(page_type, state.digest))
}

/// Does not show what pages hold.
impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held")
            .field("pages", &self.table.pages())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
