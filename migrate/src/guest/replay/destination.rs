//! A replayed guest that arrives.
//!
//! As at a real destination, what is restored is fed from the image while pages still arrive, and
//! a page that was fed can't be taken back but by starting over: what the engine forgets to say of
//! a page shows as memory that differs.

use std::sync::{Arc, Mutex, MutexGuard};

use super::memory::{Content, Memory};
use super::site::{Call, Incoming, Site, Watch};
use crate::error::{Error, Result};
use crate::guest::Destination;
use crate::guest::xen::stream::state::{GuestState, StaticData};
use crate::image::Image;
use crate::pages::{PageSet, PageType, is_zero};

/// Pages that are fed each time that some have arrived: fewer than arrive, as libxl takes them.
const FEED: usize = 200;

/// Pages that are fed between two questions how many are left.
const CATCHING_UP: usize = 2000;

/// What becomes of the memory that arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restored {
    /// It is the memory of the guest that runs then.
    Kept,
    /// Nothing of it is kept, and the guest that runs then has holes only: for measurements of
    /// what the engine itself needs.
    Dropped,
}

/// A guest on its way to a site.
pub struct ReplayDestination {
    site: Arc<Site>,
    name: String,
    pages: u64,
    /// Pages that the guest was said to have.
    populated: u64,
    /// Pages that the guest to be may have.
    limit: u64,
    restored: Restored,
    image: Option<Arc<Mutex<Image>>>,
    pending: PageSet,
    given: PageSet,
    batch: Vec<u64>,
    stale: bool,
    watch: Arc<Watch>,
}

impl ReplayDestination {
    /// Prepares; nothing is made yet. `watch` is told of each call, and may let it fail.
    #[must_use]
    pub fn new(
        site: &Arc<Site>,
        name: &str,
        pages: u64,
        populated: u64,
        restored: Restored,
        watch: Arc<Watch>,
    ) -> Self {
        ReplayDestination {
            site: Arc::clone(site),
            name: name.to_owned(),
            pages,
            populated,
            limit: populated,
            restored,
            image: None,
            pending: PageSet::new(pages),
            given: PageSet::new(pages),
            batch: Vec::new(),
            stale: false,
            watch,
        }
    }

    fn image(&self) -> Result<MutexGuard<'_, Image>> {
        let image = self.image.as_ref().ok_or_else(broken)?;
        image.lock().map_err(|_| broken())
    }

    /// The pages in the image.
    fn pages_here(&self) -> Result<PageSet> {
        Ok(self.image()?.pages_of(PageType::has_data))
    }

    /// Begins with nothing but the image.
    fn restart(&mut self) -> Result<()> {
        self.limit = self.populated;
        self.given = self.pages_here()?;
        self.stale = self.given.len() > self.limit;
        self.pending = match self.stale {
            true => PageSet::new(self.pages),
            false => self.given.clone(),
        };
        self.site.begin_incoming(Incoming {
            name: self.name.clone(),
            memory: Memory::holes(match self.restored {
                Restored::Kept => self.pages,
                Restored::Dropped => 0,
            }),
            state: None,
        })?;
        // As the real feeder, which begins at once.
        match self.stale {
            true => Ok(()),
            false => self.feed(FEED),
        }
    }

    /// Gives pages to the guest to be, at most so many.
    fn feed(&mut self, most: usize) -> Result<()> {
        // As libxl: a domain has a limit.
        if self.given.len() > self.limit {
            return Err(Error::Refused("The restore failed: too many pages".into()));
        }
        let mut cursor = 0;
        self.batch.clear();
        self.pending.take_batch(&mut cursor, most, &mut self.batch);
        if self.restored == Restored::Dropped {
            return Ok(());
        }
        let image = self.image()?;
        self.site.with_incoming(|incoming| {
            for pfn in &self.batch {
                // It may have become a hole since.
                if let Some(held) = image.held(*pfn) {
                    let content = if is_zero(held.content) {
                        Content::Zero
                    } else {
                        Content::Bytes(Arc::new(*held.content))
                    };
                    incoming.memory.set(*pfn, held.state.page_type, content);
                }
            }
            Ok(())
        })
    }
}

fn broken() -> Error {
    Error::Refused("There is no restore".into())
}

impl Destination for ReplayDestination {
    fn start(&mut self, image: Arc<Mutex<Image>>, static_data: StaticData) -> Result<()> {
        (self.watch)(Call::Start)?;
        static_data.check().map_err(|error| Error::Guest {
            what: error.to_string(),
        })?;
        self.image = Some(image);
        self.restart()
    }

    fn begin_round(&mut self, frames: &[u64], populated: u64) -> Result<bool> {
        (self.watch)(Call::BeginRound)?;
        if populated > self.pages || frames.iter().any(|pfn| *pfn >= self.pages) {
            return Err(Error::Guest {
                what: "memory is larger than was offered".into(),
            });
        }
        self.populated = populated;
        let grown = populated > self.limit;
        if grown {
            self.restart()?;
        }
        Ok(grown)
    }

    fn changed(&mut self, pfns: &[u64]) -> Result<()> {
        (self.watch)(Call::Changed)?;
        for pfn in pfns {
            self.pending.insert(*pfn);
            self.given.insert(*pfn);
        }
        self.stale |= self.given.len() > self.limit;
        if self.stale {
            return Ok(());
        }
        self.feed(FEED)
    }

    fn end_round(&mut self, vanished: bool) -> Result<bool> {
        (self.watch)(Call::EndRound)?;
        self.stale |= vanished;
        // As in the real destination: which pages went may come after how many.
        let again = self.stale && self.pages_here()?.len() <= self.populated;
        if again {
            self.restart()?;
        }
        Ok(again)
    }

    /// As time passes between two of these questions, the restore gets on.
    fn behind(&mut self) -> Result<u64> {
        (self.watch)(Call::Behind)?;
        if self.stale {
            return Ok(0);
        }
        let behind = self.pending.len();
        self.feed(CATCHING_UP)?;
        Ok(behind)
    }

    fn complete(&mut self, state: GuestState) -> Result<()> {
        (self.watch)(Call::Complete)?;
        if self.stale {
            return Err(Error::Guest {
                what: format!("more pages of it came than the {} told", self.populated),
            });
        }
        self.site.with_incoming(|incoming| {
            incoming.state = Some(state);
            Ok(())
        })
    }

    fn completed(&mut self) -> Result<Option<Vec<(String, f64)>>> {
        (self.watch)(Call::Completed)?;
        self.feed(usize::MAX)?;
        Ok(Some(Vec::new()))
    }

    fn verify(&mut self) -> Result<()> {
        (self.watch)(Call::Verify)?;
        if self.restored == Restored::Dropped {
            return Err(Error::Verify("No memory was kept to compare".into()));
        }
        let image = self.image()?;
        let differs = self.site.with_incoming(|incoming| {
            let differs = (0..self.pages).find(|pfn| {
                let here = incoming.memory.page(*pfn).filter(|(it, _)| it.has_data());
                match (here, image.held(*pfn)) {
                    (Some((page_type, content)), Some(held)) => {
                        page_type != held.state.page_type
                            || content.look(|page| page != held.content)
                    }
                    (here, held) => here.is_some() != held.is_some(),
                }
            });
            Ok(differs)
        })?;
        match differs {
            None => Ok(()),
            Some(pfn) => Err(Error::Verify(format!("Page {pfn:#x} is not what arrived"))),
        }
    }

    fn confirm(&mut self) -> Result<()> {
        (self.watch)(Call::Confirm)?;
        self.site.with_incoming(|_| Ok(()))
    }

    fn take_over(&mut self) -> Result<()> {
        (self.watch)(Call::TakeOver)?;
        self.site.take_over()
    }

    fn discard(&mut self) -> Result<()> {
        (self.watch)(Call::Discard)?;
        self.site.discard()
    }
}
