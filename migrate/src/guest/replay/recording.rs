//! A real guest's memory over time, in a file.
//!
//! ```text
//! "VMSHDREC" | version u32 | pages u64 | length u16 | what the guest did: text
//! part:  milliseconds u64 | n u64 | n entries u64 | contents, 4 KiB each
//! ...
//!
//! parts of the same time are a step:  the first has everything, the others what was dirty
//!
//! entry:   63..60 type | 59 all zero | 51..0 pfn      content follows: has data, is not all zero
//! ```
//!
//! Numbers are little-endian. Page tables are normalised, as they cross: what is recorded is what
//! an engine is given.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::history::{History, Step};
use super::memory::{Change, Content, Memory, Write as PageWrite};
use crate::error::{Error, IoContext, Result};
use crate::guest::{Batch, Found};
use crate::pages::{MAX_PAGES, PAGE_SIZE, Page, PageType, Pfn};

/// The version of the format.
pub const RECORDING_VERSION: u32 = 1;

const MAGIC: &[u8; 8] = b"VMSHDREC";

/// In an entry: the page is all zero.
const ALL_ZERO: u64 = 1 << 59;

const PFN: u64 = (1 << 52) - 1;

/// A recording, in memory.
pub struct Recording {
    /// What the guest did.
    pub name: String,
    pages: u64,
    contents: Vec<u8>,
    steps: Vec<RecordedStep>,
}

struct RecordedStep {
    at: Duration,
    pages: Vec<RecordedPage>,
}

#[derive(Clone, Copy)]
struct RecordedPage {
    pfn: Pfn,
    page_type: PageType,
    /// Its number among the contents; none for zeros.
    content: Option<u32>,
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Recording({}, {} pages)", self.name, self.pages)
    }
}

impl Recording {
    /// Reads a recording.
    ///
    /// # Errors
    /// [`Error::Io`], also for a file that is none, or is cut short.
    pub fn open(path: &Path) -> Result<Recording> {
        let file = File::open(path).context(|| format!("Can't open {}", path.display()))?;
        Self::read(BufReader::new(file)).context(|| format!("Can't read {}", path.display()))
    }

    /// Reads a recording.
    ///
    /// # Errors
    /// Where reading fails, or this is no recording of this version.
    pub fn read(mut from: impl Read) -> io::Result<Recording> {
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let mut magic = [0; 8];
        from.read_exact(&mut magic)?;
        if magic != *MAGIC {
            return Err(bad("It is no recording"));
        }
        let mut version = [0; 4];
        from.read_exact(&mut version)?;
        if u32::from_le_bytes(version) != RECORDING_VERSION {
            return Err(bad("It is a recording of another version"));
        }
        let pages = read_u64(&mut from)?;
        if pages == 0 || pages > MAX_PAGES {
            return Err(bad("No guest has so many pages"));
        }
        let mut length = [0; 2];
        from.read_exact(&mut length)?;
        let mut name = vec![0; usize::from(u16::from_le_bytes(length))];
        from.read_exact(&mut name)?;
        let mut recording = Recording {
            name: String::from_utf8_lossy(&name).into_owned(),
            pages,
            contents: Vec::new(),
            steps: Vec::new(),
        };
        let mut at = [0; 8];
        // The end of the file is the end of the recording, but not within a step.
        while from.read(&mut at[..1])? == 1 {
            from.read_exact(&mut at[1..])?;
            let count = read_u64(&mut from)?;
            if count > pages {
                return Err(bad("A step has more pages than the guest"));
            }
            let mut step = Vec::with_capacity(count as usize);
            for _ in 0..count {
                let entry = read_u64(&mut from)?;
                let page_type =
                    PageType::from_stream_entry(entry).map_err(|error| bad(&error.to_string()))?;
                let pfn = entry & PFN;
                if pfn >= pages {
                    return Err(bad("A page is beyond the guest"));
                }
                step.push((
                    pfn,
                    page_type,
                    entry & ALL_ZERO == 0 && page_type.has_data(),
                ));
            }
            let first = recording.contents.len() / PAGE_SIZE;
            let filled = step.iter().filter(|(_, _, content)| *content).count();
            let wanted = filled * PAGE_SIZE;
            let got = (&mut from)
                .take(wanted as u64)
                .read_to_end(&mut recording.contents)?;
            let highest = u32::try_from(first + filled);
            if got != wanted || highest.is_err() {
                return Err(bad("A step is cut short"));
            }
            let mut next = first as u32;
            let page = |(pfn, page_type, content): (Pfn, PageType, bool)| {
                let number = next;
                next += u32::from(content);
                RecordedPage {
                    pfn,
                    page_type,
                    content: content.then_some(number),
                }
            };
            let at = Duration::from_millis(u64::from_le_bytes(at));
            let pages = step.into_iter().map(page);
            match recording.steps.last_mut() {
                Some(last) if last.at == at => last.pages.extend(pages),
                _ => recording.steps.push(RecordedStep {
                    at,
                    pages: pages.collect(),
                }),
            }
        }
        Ok(recording)
    }

    /// A page's content by its number.
    pub(super) fn content(&self, number: u32) -> Option<&Page> {
        self.contents.as_chunks().0.get(number as usize)
    }

    /// One more than the highest pfn.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// For how long the guest was watched.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.steps.last().map_or(Duration::ZERO, |step| step.at)
    }

    /// The memory at the recording's begin.
    #[must_use]
    pub fn memory(self: &Arc<Self>) -> Memory {
        let mut memory = Memory::holes(self.pages);
        for page in self.steps.first().into_iter().flat_map(|step| &step.pages) {
            memory.set(page.pfn, page.page_type, self.content_of(*page));
        }
        memory
    }

    /// What the guest did from then on.
    #[must_use]
    pub fn history(self: &Arc<Self>) -> History {
        let begin = self.steps.first().map_or(Duration::ZERO, |step| step.at);
        let steps = self.steps.iter().skip(1).map(|step| Step {
            at: step.at.saturating_sub(begin),
            writes: step
                .pages
                .iter()
                .flat_map(|page| self.writes(*page))
                .collect(),
        });
        History {
            steps: steps.collect(),
            at_suspend: Vec::new(),
        }
    }

    fn content_of(self: &Arc<Self>, page: RecordedPage) -> Content {
        page.content.map_or(Content::Zero, |number| {
            Content::Recorded(Arc::clone(self), number)
        })
    }

    fn writes(self: &Arc<Self>, page: RecordedPage) -> Vec<PageWrite> {
        let pfn = page.pfn;
        let changes = if page.page_type.has_data() {
            vec![
                Change::Content(self.content_of(page)),
                Change::Type(page.page_type),
            ]
        } else {
            vec![Change::Hole]
        };
        let write = |change| PageWrite { pfn, change };
        changes.into_iter().map(write).collect()
    }
}

fn read_u64(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Writes a recording.
#[derive(Debug)]
pub struct Recorder<W> {
    to: W,
}

impl<W: Write> Recorder<W> {
    /// Begins one of a guest with `pages` pages that does what `name` says.
    ///
    /// # Errors
    /// Where writing fails.
    pub fn begin(mut to: W, pages: u64, name: &str) -> io::Result<Self> {
        let name: String = name.chars().take(1000).collect();
        to.write_all(MAGIC)?;
        to.write_all(&RECORDING_VERSION.to_le_bytes())?;
        to.write_all(&pages.to_le_bytes())?;
        to.write_all(&(name.len() as u16).to_le_bytes())?;
        to.write_all(name.as_bytes())?;
        Ok(Recorder { to })
    }

    /// Adds pages that changed up to `at`, each once. Those of the same `at` belong together.
    ///
    /// # Errors
    /// Where writing fails; [`Error::Guest`] where the batch lacks a page of its own.
    pub fn add(&mut self, at: Duration, batch: &Batch) -> Result<()> {
        let doing = || "Can't write the recording";
        let mut head = Vec::with_capacity(16 + batch.entries.len() * 8);
        head.extend((at.as_millis() as u64).to_le_bytes());
        head.extend((batch.entries.len() as u64).to_le_bytes());
        for entry in &batch.entries {
            let zero = match entry.content {
                Found::Slot(_) => 0,
                Found::Nothing | Found::Zero => ALL_ZERO,
            };
            let word = entry.state.page_type.stream_entry(entry.pfn) | zero;
            head.extend(word.to_le_bytes());
        }
        self.to.write_all(&head).context(doing)?;
        for entry in &batch.entries {
            if let Found::Slot(slot) = entry.content {
                let content = batch.content(slot).ok_or_else(|| Error::Guest {
                    what: format!("page {:#x} was lost", entry.pfn),
                })?;
                self.to.write_all(content).context(doing)?;
            }
        }
        Ok(())
    }

    /// Ends it; what it was written to comes back.
    ///
    /// # Errors
    /// Where writing fails.
    pub fn end(mut self) -> io::Result<W> {
        self.to.flush()?;
        Ok(self.to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::PageDigest;
    use crate::guest::{BatchEntry, PageState};

    fn batch(pages: &[(Pfn, PageType, Option<u8>)]) -> Batch {
        let mut batch = Batch::default();
        for (pfn, page_type, byte) in pages {
            let content = match byte {
                Some(0) => Found::Zero,
                None => Found::Nothing,
                Some(byte) => {
                    let (slot, page) = batch.new_slot();
                    page.fill(*byte);
                    Found::Slot(slot)
                }
            };
            let state = PageState {
                page_type: *page_type,
                digest: PageDigest([1; 16]),
            };
            batch.entries.push(BatchEntry {
                pfn: *pfn,
                state,
                content,
            });
        }
        batch
    }

    fn record() -> Vec<u8> {
        let mut recorder = Recorder::begin(Vec::new(), 4, "idle").unwrap();
        let everything = [
            batch(&[(0, PageType::Normal, Some(7)), (1, PageType::L1, Some(9))]),
            batch(&[(2, PageType::Normal, Some(0)), (3, PageType::Invalid, None)]),
        ];
        for batch in &everything {
            recorder.add(Duration::from_millis(40), batch).unwrap();
        }
        let later = batch(&[
            (0, PageType::Invalid, None),
            (3, PageType::PinnedL4, Some(5)),
        ]);
        recorder.add(Duration::from_millis(90), &later).unwrap();
        recorder.end().unwrap()
    }

    #[test]
    fn what_is_recorded_happens_again() {
        let recording = Arc::new(Recording::read(record().as_slice()).unwrap());
        assert_eq!((recording.name.as_str(), recording.pages()), ("idle", 4));
        let mut memory = recording.memory();
        let holds = |memory: &Memory, pfn, page_type, byte| {
            let (its_type, content) = memory.page(pfn).unwrap();
            its_type == page_type && content.look(|page| *page == [byte; PAGE_SIZE])
        };
        assert!(holds(&memory, 0, PageType::Normal, 7));
        assert!(holds(&memory, 1, PageType::L1, 9));
        assert!(holds(&memory, 2, PageType::Normal, 0));
        assert!(holds(&memory, 3, PageType::Invalid, 0));
        let history = recording.history();
        assert_eq!(history.steps.len(), 1);
        assert_eq!(history.steps[0].at, Duration::from_millis(50));
        for write in &history.steps[0].writes {
            memory.apply(write);
        }
        assert!(holds(&memory, 0, PageType::Invalid, 0));
        assert!(holds(&memory, 3, PageType::PinnedL4, 5));
    }

    #[test]
    fn a_recording_that_is_cut_short_is_none() {
        let whole = record();
        let head = 8 + 4 + 8 + 2 + 4;
        let first = head + 16 + 2 * 8 + 2 * PAGE_SIZE;
        let second = first + 16 + 2 * 8;
        for end in 0..whole.len() {
            let read = Recording::read(&whole[..end]);
            let between = [head, first, second].contains(&end);
            assert_eq!(read.is_ok(), between, "{end}");
        }
    }

    #[test]
    fn what_is_none_is_refused() {
        let whole = record();
        for at in [0, 8, 19] {
            let mut changed = whole.clone();
            changed[at] ^= 0xff;
            assert!(Recording::read(changed.as_slice()).is_err(), "{at}");
        }
    }
}
