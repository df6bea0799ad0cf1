//! A guest's memory in this process, and what a guest does to it.

use std::fmt;
use std::sync::Arc;

use super::generated::{Made, Random, edit};
use super::recording::Recording;
use crate::pages::{PAGE_SIZE, Page, PageType, Pfn};

static ZERO: Page = [0; PAGE_SIZE];

/// What a page holds.
#[derive(Clone)]
pub enum Content {
    /// Zeros only.
    Zero,
    /// What is made whenever it is looked at: it takes no memory.
    Made(Made),
    /// A page of a recording: its number there.
    Recorded(Arc<Recording>, u32),
    /// Just this.
    Bytes(Arc<Page>),
}

impl Content {
    /// Shows it to `look`.
    pub fn look<T>(&self, look: impl FnOnce(&Page) -> T) -> T {
        match self {
            Content::Zero => look(&ZERO),
            Content::Made(made) => look(&made.page()),
            Content::Recorded(recording, number) => {
                look(recording.content(*number).unwrap_or(&ZERO))
            }
            Content::Bytes(page) => look(page),
        }
    }
}

/// Does not show what a page holds.
impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Content::Zero => "Zero",
            Content::Made(_) => "Made",
            Content::Recorded(..) => "Recorded",
            Content::Bytes(_) => "Bytes",
        })
    }
}

/// What a guest does to one of its pages.
#[derive(Debug, Clone)]
pub enum Change {
    /// It holds this from now on. Where there was no page, one appears.
    Content(Content),
    /// Some words of it, or a stretch, by numbers from this seed.
    Edit(u64),
    /// It becomes a copy of another page. Of a hole nothing is copied.
    CopyOf(Pfn),
    /// It is used for something else, and holds what it held. Nothing happens to a hole, nor for
    /// a type without content.
    Type(PageType),
    /// The page goes: the guest's balloon has it.
    Hole,
    /// From now on, and for as long as the guest runs, it can't be read: a table that is being
    /// built.
    Unsettled,
    /// It can be read again.
    Settled,
}

/// One thing that a guest does.
#[derive(Debug, Clone)]
pub struct Write {
    /// To which page; one beyond the guest is none.
    pub pfn: Pfn,
    /// What.
    pub change: Change,
}

/// What a guest has in its pages.
#[derive(Debug, Clone)]
pub struct Memory {
    types: Vec<PageType>,
    contents: Vec<Content>,
}

impl Memory {
    /// Holes only.
    #[must_use]
    pub fn holes(pages: u64) -> Self {
        Memory {
            types: vec![PageType::Invalid; pages as usize],
            contents: vec![Content::Zero; pages as usize],
        }
    }

    /// Ordinary pages with these contents.
    #[must_use]
    pub fn of(contents: Vec<Content>) -> Self {
        Memory {
            types: vec![PageType::Normal; contents.len()],
            contents,
        }
    }

    /// One more than the highest pfn.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.types.len() as u64
    }

    /// Pages that are no holes.
    #[must_use]
    pub fn populated(&self) -> u64 {
        let there = self.types.iter().filter(|it| it.is_populated());
        there.count() as u64
    }

    /// The page at `pfn`; nothing beyond the guest.
    #[must_use]
    pub fn page(&self, pfn: Pfn) -> Option<(PageType, &Content)> {
        let at = usize::try_from(pfn).ok()?;
        Some((*self.types.get(at)?, self.contents.get(at)?))
    }

    /// Puts a page there; beyond the guest nothing happens.
    pub fn set(&mut self, pfn: Pfn, page_type: PageType, content: Content) {
        let at = pfn as usize;
        if let (Some(its_type), Some(its)) = (self.types.get_mut(at), self.contents.get_mut(at)) {
            *its_type = page_type;
            *its = content;
        }
    }

    /// Does what a guest does, but for what says whether a page can be read. Whether anything is
    /// another thing now.
    pub fn apply(&mut self, write: &Write) -> bool {
        let Some((page_type, content)) = self.page(write.pfn) else {
            return false;
        };
        let there = page_type.has_data();
        // A page that appears is an ordinary one.
        let kept = if there { page_type } else { PageType::Normal };
        let (page_type, content) = match &write.change {
            Change::Content(content) => (kept, content.clone()),
            Change::Edit(seed) if there => {
                let mut page = content.look(|page| *page);
                edit(&mut page, &mut Random::new(*seed));
                (kept, Content::Bytes(Arc::new(page)))
            }
            Change::CopyOf(original) => match self.page(*original) {
                Some((original, content)) if original.has_data() => (kept, content.clone()),
                _ => return false,
            },
            Change::Type(page_type) if there && page_type.has_data() => {
                (*page_type, content.clone())
            }
            Change::Hole if there => (PageType::Invalid, Content::Zero),
            _ => return false,
        };
        self.set(write.pfn, page_type, content);
        true
    }

    /// The pfns whose types or contents differ.
    #[must_use]
    pub fn differences(&self, other: &Memory) -> Vec<Pfn> {
        (0..self.pages().max(other.pages()))
            .filter(|pfn| match (self.page(*pfn), other.page(*pfn)) {
                (Some((one, its)), Some((another, others))) => {
                    let same = || its.look(|page| others.look(|other| page == other));
                    one != another || one.has_data() && !same()
                }
                _ => true,
            })
            .collect()
    }
}
