//! What feeds a restore: pages out of the image, as they come, and at last the guest's state.
//!
//! ```text
//!   Work: pages to be fed, frames, the end       one thread          libxl
//!     changed(), begin_round(), complete()  -->  Feed::run  --pipe-->  restore
//! ```

use std::io::{PipeWriter, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

use super::super::stream::state::{GuestState, StaticData};
use super::super::stream::{Framing, StreamPage, StreamWriter};
use crate::error::{Error, IoContext, Result};
use crate::image::Image;
use crate::pages::{Page, PageSet, PageType};

/// Pages in one PAGE_DATA record.
const FEED_BATCH: usize = 1024;

#[derive(Default)]
pub(super) struct Shared {
    pub(super) work: Mutex<Work>,
    pub(super) wake: Condvar,
}

/// What the feeder has to do.
#[derive(Default)]
pub(super) struct Work {
    pub(super) pending: PageSet,
    /// Pages that the feeder is at.
    pub(super) feeding: u64,
    /// Pages wait for the p2m's frames: a PV guest's stream has those first. A shadow's pages are
    /// there before the source has said anything.
    pub(super) unframed: bool,
    pub(super) frames: Option<Vec<u64>>,
    pub(super) tail: Option<GuestState>,
    pub(super) stop: bool,
    /// When the stream's end was written.
    pub(super) fed: Option<Instant>,
    pub(super) failed: Option<String>,
}

/// What the feeder thread needs.
pub(super) struct Feed {
    pub(super) image: Arc<Mutex<Image>>,
    pub(super) static_data: StaticData,
    pub(super) max_pfn: u64,
}

/// What the feeder finds to do next.
enum Next {
    Frames(Vec<u64>),
    Pages,
    Tail(Box<GuestState>),
    Stop,
}

impl Feed {
    pub(super) fn run(&self, shared: &Shared, writer: PipeWriter) -> Result<()> {
        let mut stream = StreamWriter::begin(writer, Framing::Libxl, &self.static_data)?;
        let mut cursor = 0;
        let mut pfns = Vec::with_capacity(FEED_BATCH);
        let mut entries = Vec::with_capacity(FEED_BATCH);
        let mut contents = Vec::with_capacity(FEED_BATCH);
        loop {
            match self.next(shared, &mut cursor, &mut pfns)? {
                Next::Stop => return Ok(()),
                Next::Frames(frames) => stream.p2m_frames(self.max_pfn, &frames)?,
                Next::Pages => {
                    entries.clear();
                    contents.clear();
                    self.gather(&pfns, &mut entries, &mut contents)?;
                    pfns.clear();
                    let pages: Vec<StreamPage<'_>> = entries
                        .iter()
                        .zip(&contents)
                        .map(|((pfn, page_type), content)| StreamPage {
                            pfn: *pfn,
                            page_type: *page_type,
                            content: Some(content),
                        })
                        .collect();
                    stream.pages(&pages)?;
                }
                Next::Tail(state) => {
                    stream
                        .finish(&state)?
                        .flush()
                        .context(|| "Can't feed the restore")?;
                    locked(&shared.work)?.fed = Some(Instant::now());
                    return Ok(());
                }
            }
        }
    }

    fn next(&self, shared: &Shared, cursor: &mut u64, pfns: &mut Vec<u64>) -> Result<Next> {
        let mut work = locked(&shared.work)?;
        work.feeding = 0;
        loop {
            if work.stop {
                return Ok(Next::Stop);
            }
            if let Some(frames) = work.frames.take() {
                work.unframed = false;
                return Ok(Next::Frames(frames));
            }
            if !work.unframed && work.pending.take_batch(cursor, FEED_BATCH, pfns) > 0 {
                work.feeding = pfns.len() as u64;
                return Ok(Next::Pages);
            }
            if let Some(tail) = work.tail.take() {
                return Ok(Next::Tail(Box::new(tail)));
            }
            work = shared.wake.wait(work).map_err(|_| poisoned())?;
        }
    }

    /// Copies pages out of the image: the pipe may block, and the image must not be held then.
    fn gather(
        &self,
        pfns: &[u64],
        entries: &mut Vec<(u64, PageType)>,
        contents: &mut Vec<Page>,
    ) -> Result<()> {
        let image = locked(&self.image)?;
        for pfn in pfns {
            let Some(state) = image.table().get(*pfn) else {
                continue;
            };
            if !state.page_type.has_data() {
                continue;
            }
            let Some(content) = image.content(*pfn) else {
                continue;
            };
            entries.push((*pfn, state.page_type));
            contents.push(*content);
        }
        Ok(())
    }
}

pub(super) fn poisoned() -> Error {
    Error::Refused("A thread of the restore failed".into())
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> Result<MutexGuard<'_, T>> {
    mutex.lock().map_err(|_| poisoned())
}
