//! What a destination's shadows hold of a group's guests: each content once, at a place.
//!
//! ```text
//!   shadows of the group, the newest first       places
//!     web-1   pages with content  --name-->        0 | 1 | 2 | ...
//!     web-3   ... those not yet there  ----->      ... | 71,200 | ...
//! ```
//!
//! Only names and where they were found are in memory, 24 bytes a place. A content is read from the
//! shadow's file when it is asked for, and given out only if it still has its name, and the witness
//! that it is asked for with. The files are
//! locked, shared, so that nobody takes a shadow up and changes it meanwhile; one that is removed
//! stays here as long as this.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::thread;

use nix::fcntl::Flock;

use super::{ContentName, Group, Names, Witness};
use crate::error::{Result, chain};
use crate::pages::{PAGE_SIZE, Page, PageType, Pfn};
use crate::shadow::{Lent, Shadows};

/// The most places: contents of 1 GiB, whose names are 4 MiB.
pub const MAX_LIBRARY: usize = 1 << 18;

/// The most pages that are read to find them: guests that are alike have few that are new.
const MOST_READ: usize = 4 * MAX_LIBRARY;

/// Pages read by one call.
const RUN: u64 = 256;

/// Contents of other guests.
pub struct Library {
    names: Names,
    files: Vec<Flock<File>>,
    places: Vec<Place>,
}

#[derive(Clone, Copy)]
struct Place {
    file: u32,
    pfn: u32,
    name: ContentName,
}

impl Library {
    /// Whether there is anything to share with a guest of this UUID: shadows of other guests. A site
    /// that keeps none uses none that it has kept before.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn is_there(shadows: &Shadows, group: &Group, uuid: &str) -> Result<bool> {
        if !shadows.keep() {
            return Ok(false);
        }
        let listed = shadows.list()?;
        let mut others = listed.iter().filter(|one| one.memory && one.uuid != uuid);
        Ok(others.any(|one| group.takes(&one.name)))
    }

    /// Names what the shadows of the group's guests hold, but for the guest of this UUID. Reads
    /// them, on all processors. A shadow that can't be read is left out.
    ///
    /// # Errors
    /// [`crate::Error::Io`] where shadows can't be listed.
    pub fn open(shadows: &Shadows, group: &Group, uuid: &str) -> Result<Library> {
        let mut library = Library {
            names: group.names().clone(),
            files: Vec::new(),
            places: Vec::new(),
        };
        let mut seen = HashSet::new();
        let mut read = 0;
        for listed in shadows.list()? {
            if !listed.memory || listed.uuid == uuid || !group.takes(&listed.name) {
                continue;
            }
            match shadows.lend(&listed.uuid) {
                Ok(Some(lent)) => read += library.add(lent, &mut seen, MOST_READ - read),
                Ok(None) => {}
                Err(error) => log::warn!("{}", chain(&error)),
            }
            if library.places.len() >= MAX_LIBRARY || read >= MOST_READ {
                break;
            }
        }
        Ok(library)
    }

    /// Reads no more than so many pages; how many.
    fn add(&mut self, lent: Lent, seen: &mut HashSet<ContentName>, most: usize) -> usize {
        let left = most.min(MAX_LIBRARY - self.places.len());
        // Page tables are of one guest alone.
        let pfns: Vec<Pfn> = lent.with_content(PageType::Normal).take(left).collect();
        let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let share = pfns.len().div_ceil(threads).max(1);
        let (file, names) = (&*lent.memory, &self.names);
        let found: Vec<(Pfn, ContentName)> = thread::scope(|scope| {
            let parts: Vec<_> = pfns
                .chunks(share)
                .map(|pfns| scope.spawn(move || name_pages(file, names, pfns)))
                .collect();
            let parts = parts.into_iter().filter_map(|part| part.join().ok());
            parts.flatten().collect()
        });
        let at = self.files.len() as u32;
        for (pfn, name) in found {
            if let Ok(pfn) = u32::try_from(pfn)
                && seen.insert(name)
            {
                self.places.push(Place {
                    file: at,
                    pfn,
                    name,
                });
            }
        }
        self.files.push(lent.memory);
        pfns.len()
    }

    /// How many places there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The names, in the order of their places.
    pub fn names(&self) -> impl Iterator<Item = ContentName> + '_ {
        self.places.iter().map(|place| place.name)
    }

    /// Copies what is at a place. False where there is none, where it is no longer what it was, and
    /// where the `witness` is not that of it: then the peer does not know what it asks for.
    #[must_use]
    pub fn read(&self, place: u64, witness: Witness, to: &mut Page) -> bool {
        let place = usize::try_from(place)
            .ok()
            .and_then(|at| self.places.get(at));
        let Some(place) = place else {
            return false;
        };
        let Some(file) = self.files.get(place.file as usize) else {
            return false;
        };
        let at = u64::from(place.pfn) * PAGE_SIZE as u64;
        file.read_exact_at(to, at).is_ok() && self.names.witnessed(to) == (place.name, witness)
    }
}

/// Reads pages, neighbours by one call, and names them. Those that can't be read are left out.
fn name_pages(file: &File, names: &Names, pfns: &[Pfn]) -> Vec<(Pfn, ContentName)> {
    let mut found = Vec::with_capacity(pfns.len());
    let mut buffer = vec![0; RUN as usize * PAGE_SIZE];
    let mut rest = pfns;
    while let Some(first) = rest.first() {
        let together = (*first..first + RUN).zip(rest);
        let run = together.take_while(|(expected, pfn)| expected == *pfn);
        let (run, others) = rest.split_at(run.count());
        rest = others;
        let bytes = &mut buffer[..run.len() * PAGE_SIZE];
        if file.read_exact_at(bytes, first * PAGE_SIZE as u64).is_err() {
            continue;
        }
        let (pages, _) = bytes.as_chunks();
        found.extend(
            run.iter()
                .zip(pages)
                .map(|(pfn, page)| (*pfn, names.of(page))),
        );
    }
    found
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Library({} contents)", self.places.len())
    }
}
