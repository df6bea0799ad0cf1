//! A guest's memory as it arrives.
//!
//! ```text
//! incoming/<move>.memory   page 0 | page 1 | ...     one 4 KiB slot a pfn, mapped
//! in memory                type and digest a page
//! ```
//!
//! dom0 is often smaller than its guests. The file is mapped shared, so the kernel can write back
//! and drop what isn't touched. Its blocks are reserved at the start: a disk that is too full is
//! an error before the guest stops, never a fault in the middle of a copy. Where a guest has more
//! pfns than memory, holes are left out of that. Zero pages are one bit
//! and never written. Pages are written by runs, not through the mapping: a fault for each page
//! costs more than the copy.

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use memmap2::MmapMut;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::uio::pwritev;

use crate::arrival::HeldPage;
use crate::digest::Digester;
use crate::error::{Error, IoContext, Result};
use crate::guest::{PageState, PageTable};
use crate::pages::{PAGE_SIZE, Page, PageSet, PageType};

/// Pages written by one call: the kernel's limit is 1,024 pieces.
const RUN: usize = 256;

/// A page as it arrived.
#[derive(Debug, Clone, Copy)]
pub struct Arrived<'a> {
    /// Which.
    pub pfn: u64,
    /// What it is.
    pub state: PageState,
    /// Its content.
    pub content: Arriving<'a>,
}

/// What is to be done with a page's content.
#[derive(Debug, Clone, Copy)]
pub enum Arriving<'a> {
    /// It is all zero, or there is none.
    Nothing,
    /// It stays as it is here.
    Kept,
    /// It is this.
    Content(&'a Page),
}

/// The arriving memory of one guest.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    file: File,
    map: MmapMut,
    table: PageTable,
    zero: PageSet,
}

impl Image {
    /// Makes the file for `pages` pages and reserves its room.
    ///
    /// # Errors
    /// [`Error::Refused`] where the disk has no room; [`Error::Io`].
    pub fn create(path: &Path, pages: u64) -> Result<Image> {
        Self::create_in_part(path, pages, std::slice::from_ref(&(0..pages)))
    }

    /// Makes the file for `pages` pages and reserves room for those in `reserved`. Others take
    /// theirs when they come: where the disk has none then, storing them fails.
    ///
    /// # Errors
    /// [`Error::Refused`] where the disk has no room; [`Error::Io`].
    pub fn create_in_part(path: &Path, pages: u64, reserved: &[Range<u64>]) -> Result<Image> {
        let doing = || format!("Can't make {}", path.display());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .context(doing)?;
        match Self::reserve(&file, path, pages, reserved) {
            Ok(map) => Ok(Image {
                path: path.to_owned(),
                file,
                map,
                table: PageTable::new(pages),
                zero: PageSet::new(pages),
            }),
            Err(error) => {
                // What was reserved in part must not stay.
                let _ = std::fs::remove_file(path);
                Err(error)
            }
        }
    }

    /// Takes over the file at `path`, which held memory before: `table` says what. Each page is read
    /// and digested. What is not what the table says is forgotten, and returned. Room for the pages in
    /// `reserved` is reserved as by [`Image::create_in_part`].
    ///
    /// # Errors
    /// As [`Image::create`]; then the file is gone.
    pub fn recall(
        path: &Path,
        table: PageTable,
        reserved: &[Range<u64>],
        digester: &Digester,
    ) -> Result<(Image, PageSet)> {
        let doing = || format!("Can't open {}", path.display());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .context(doing)?;
        let pages = table.pages();
        let map = match Self::reserve(&file, path, pages, reserved) {
            Ok(map) => map,
            Err(error) => {
                let _ = std::fs::remove_file(path);
                return Err(error);
            }
        };
        let mut image = Image {
            path: path.to_owned(),
            file,
            map,
            table,
            zero: PageSet::new(pages),
        };
        let lacking = image.check(digester);
        Ok((image, lacking))
    }

    /// Reads every page, on all processors: forgets those that the table is wrong about.
    fn check(&mut self, digester: &Digester) -> PageSet {
        let pages = self.table.pages();
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let mut lacking = PageSet::new(pages);
        let share = pages.div_ceil(threads as u64).clamp(1, CHECKED_AT_ONCE);
        for first in (0..pages).step_by(threads * share as usize) {
            let (table, contents) = (&self.table, self.map.as_chunks::<PAGE_SIZE>().0);
            let end = pages.min(first + threads as u64 * share);
            let found: Vec<Checked> = std::thread::scope(|scope| {
                let parts: Vec<_> = (first..end)
                    .step_by(share as usize)
                    .map(|first| {
                        let pfns = first..end.min(first + share);
                        let part = pfns.clone();
                        let check = move || check_pages(part, table, contents, digester);
                        (pfns, scope.spawn(check))
                    })
                    .collect();
                let found = parts.into_iter().flat_map(|(pfns, part)| {
                    // What nobody has looked at is not believed.
                    part.join().unwrap_or_else(|_| not_checked(pfns, table))
                });
                found.collect()
            });
            for Checked { pfn, zero } in found {
                if zero {
                    self.zero.insert(pfn);
                } else {
                    self.table.forget(pfn);
                    lacking.insert(pfn);
                }
            }
        }
        lacking
    }

    /// Gives back the room of pages that are zero: their bytes in the file may be others.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn thin(&self) -> Result<()> {
        let mut empty = PageSet::new(self.table.pages());
        for pfn in 0..self.table.pages() {
            if self.zero.contains(pfn) || self.held(pfn).is_none() {
                empty.insert(pfn);
            }
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for run in empty.runs() {
            let (at, length) = (run.start, run.end - run.start);
            fallocate(
                &self.file,
                flags,
                at as i64 * PAGE_SIZE as i64,
                length as i64 * PAGE_SIZE as i64,
            )
            .map_err(std::io::Error::from)
            .context(|| format!("Can't thin {}", self.path.display()))?;
        }
        Ok(())
    }

    /// The room that the file takes on the disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn bytes(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        let doing = || format!("Can't look at {}", self.path.display());
        Ok(self.file.metadata().context(doing)?.blocks() * 512)
    }

    /// Gives the file another name; then it is no longer this image's to remove.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn rename(&self, to: &Path) -> Result<()> {
        std::fs::rename(&self.path, to).context(|| format!("Can't rename {}", self.path.display()))
    }

    fn reserve(file: &File, path: &Path, pages: u64, reserved: &[Range<u64>]) -> Result<MmapMut> {
        let doing = || format!("Can't reserve {}", path.display());
        let bytes = |pages: u64| {
            pages
                .checked_mul(PAGE_SIZE as u64)
                .and_then(|bytes| i64::try_from(bytes).ok())
                .ok_or_else(|| Error::Refused(format!("{pages} pages are no guest's memory")))
        };
        file.set_len(bytes(pages.max(1))?.unsigned_abs())
            .context(doing)?;
        for range in reserved.iter().filter(|range| !range.is_empty()) {
            let (start, length) = (bytes(range.start)?, bytes(range.end - range.start)?);
            match fallocate(file, FallocateFlags::empty(), start, length) {
                Ok(()) => {}
                Err(nix::errno::Errno::ENOSPC) => {
                    let directory = path.parent().unwrap_or(path).display().to_string();
                    let pages: u64 = reserved.iter().map(|range| range.end - range.start).sum();
                    return Err(Error::Refused(format!(
                        "{directory} has no room for the guest's memory ({} MiB)",
                        pages >> 8
                    )));
                }
                Err(error) => return Err(std::io::Error::from(error)).context(doing),
            }
        }
        map(file).context(doing)
    }

    /// What is known of each page.
    pub fn table(&self) -> &PageTable {
        &self.table
    }

    /// Stores pages as they arrived. Neighbours are written by one call.
    ///
    /// # Errors
    /// [`Error::Refused`] for a pfn beyond the guest; [`Error::Io`].
    pub fn store(&mut self, pages: &[Arrived<'_>]) -> Result<()> {
        let beyond = pages.iter().find(|page| page.pfn >= self.table.pages());
        if let Some(page) = beyond {
            return Err(Error::Refused(format!(
                "Page {:#x} is beyond the guest's memory",
                page.pfn
            )));
        }
        let mut run: Vec<IoSlice<'_>> = Vec::with_capacity(RUN);
        let mut first = 0;
        for page in pages {
            if let Arriving::Content(content) = page.content {
                if run.len() == RUN || first + run.len() as u64 != page.pfn {
                    self.write(first, &mut run)?;
                    first = page.pfn;
                }
                run.push(IoSlice::new(content));
            }
        }
        self.write(first, &mut run)?;
        for page in pages {
            match page.content {
                Arriving::Content(_) => {
                    self.zero.remove(page.pfn);
                }
                Arriving::Nothing => {
                    self.zero.insert(page.pfn);
                }
                Arriving::Kept => {}
            }
            self.table.set(page.pfn, page.state);
        }
        Ok(())
    }

    /// Writes the pages of `run`, which begin at `first`, and empties it.
    fn write(&self, first: u64, run: &mut Vec<IoSlice<'_>>) -> Result<()> {
        let doing = || format!("Can't write {}", self.path.display());
        let mut at = first as i64 * PAGE_SIZE as i64;
        let mut left = run.as_mut_slice();
        while !left.is_empty() {
            let written = match pwritev(&self.file, left, at) {
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => return Err(std::io::Error::from(error)).context(doing),
                // A disk that takes nothing more says so by an error.
                Ok(0) => {
                    return Err(std::io::Error::from(std::io::ErrorKind::WriteZero)).context(doing);
                }
                Ok(written) => written,
            };
            at += written as i64;
            IoSlice::advance_slices(&mut left, written);
        }
        run.clear();
        Ok(())
    }

    /// The content last stored for `pfn`; zeros where it was left out.
    pub fn content(&self, pfn: u64) -> Option<&Page> {
        static ZERO: Page = [0; PAGE_SIZE];
        if self.zero.contains(pfn) {
            return Some(&ZERO);
        }
        // Never what nobody wrote: there may be no room behind it.
        self.table.get(pfn)?;
        self.map.as_chunks::<PAGE_SIZE>().0.get(pfn as usize)
    }

    /// The page at `pfn`, if it has arrived and has content.
    pub fn held(&self, pfn: u64) -> Option<HeldPage<'_>> {
        let state = self.table.get(pfn)?;
        let content = self.content(pfn)?;
        let held = HeldPage { state, content };
        state.page_type.has_data().then_some(held)
    }

    /// The pages whose type is wanted.
    pub fn pages_of(&self, wanted: impl Fn(PageType) -> bool) -> PageSet {
        let mut pages = PageSet::new(self.table.pages());
        for pfn in 0..self.table.pages() {
            if self.table.get(pfn).is_some_and(|it| wanted(it.page_type)) {
                pages.insert(pfn);
            }
        }
        pages
    }

    /// Removes the file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(&self) -> Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other.context(|| format!("Can't remove {}", self.path.display())),
        }
    }
}

/// The most pages that one thread checks before what it found is noted: what is found of a large
/// guest takes memory.
const CHECKED_AT_ONCE: u64 = 1 << 15;

/// A page that was looked at and needs to be noted.
struct Checked {
    pfn: u64,
    /// It is all zero: its content is not in the file. Else its content is not what the table says.
    zero: bool,
}

/// Of pages that could not be looked at: their content is taken for another.
fn not_checked(pfns: Range<u64>, table: &PageTable) -> Vec<Checked> {
    pfns.filter(|pfn| table.get(*pfn).is_some())
        .map(|pfn| Checked { pfn, zero: false })
        .collect()
}

fn check_pages(
    pfns: Range<u64>,
    table: &PageTable,
    contents: &[Page],
    digester: &Digester,
) -> Vec<Checked> {
    let zeros = digester.zeros();
    let check = |pfn: u64| {
        let PageState { page_type, digest } = table.get(pfn)?;
        if !page_type.has_data() {
            return None;
        }
        if digest == zeros.of(page_type) {
            return Some(Checked { pfn, zero: true });
        }
        let same = contents
            .get(pfn as usize)
            .is_some_and(|content| digester.page(page_type, content) == digest);
        (!same).then_some(Checked { pfn, zero: false })
    };
    pfns.filter_map(check).collect()
}

#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<MmapMut> {
    // SAFETY: the file was made by us for this process alone, mode 0600 in a directory of mode
    // 0700: nobody else maps, writes or truncates it while it is mapped. Its blocks are reserved, or
    // were written before they are looked at, so that no access faults for want of room.
    unsafe { MmapMut::map_mut(file) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::PageDigest;

    #[test]
    fn what_is_stored_is_found() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("m.memory");
        let mut image = Image::create(&path, 4).unwrap();
        let state = PageState {
            page_type: PageType::Normal,
            digest: PageDigest([1; 16]),
        };
        let page = |pfn, content| Arrived {
            pfn,
            state,
            content,
        };
        let (seven, eight) = ([7; PAGE_SIZE], [8; PAGE_SIZE]);
        let arrived = [
            page(0, Arriving::Content(&eight)),
            page(1, Arriving::Nothing),
            page(2, Arriving::Content(&eight)),
            page(3, Arriving::Content(&seven)),
        ];
        image.store(&arrived[..1]).unwrap();
        assert!(image.held(0).is_some() && image.held(1).is_none());
        assert_eq!(image.content(0), Some(&eight));
        assert_eq!(image.table().get(2), None);
        image.store(&arrived[2..]).unwrap();
        assert_eq!(image.content(2), Some(&eight));
        image.store(&arrived).unwrap();
        assert_eq!(image.content(1), Some(&[0; PAGE_SIZE]));
        assert_eq!(image.content(3), Some(&[7; PAGE_SIZE]));
        assert_eq!(image.table().get(3), Some(state));
        let retyped = PageState {
            page_type: PageType::L1,
            digest: PageDigest([2; 16]),
        };
        let kept = Arrived {
            pfn: 3,
            state: retyped,
            content: Arriving::Kept,
        };
        image.store(&[kept]).unwrap();
        let held = image.held(3).unwrap();
        assert_eq!((held.state, held.content), (retyped, &seven));
        image.store(&[page(3, Arriving::Nothing)]).unwrap();
        assert_eq!(
            image.content(3),
            Some(&[0; PAGE_SIZE]),
            "zero hides what was there before"
        );
        let hole = PageState {
            page_type: PageType::Invalid,
            digest: PageDigest([3; 16]),
        };
        let gone = Arrived {
            pfn: 3,
            state: hole,
            content: Arriving::Nothing,
        };
        image.store(&[gone]).unwrap();
        assert!(image.held(3).is_none(), "a hole has no content");
        let beyond = page(4, Arriving::Content(&seven));
        assert!(image.store(&[beyond]).is_err());
        assert_eq!(image.content(4), None);
        assert!(image.held(4).is_none());
        image.remove().unwrap();
        assert!(!path.exists());
        image.remove().unwrap();
    }

    #[test]
    fn a_hole_takes_no_room() {
        use std::os::unix::fs::MetadataExt;
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("m.memory");
        // 64 GiB, of which 64 KiB are memory.
        let pages = 1 << 24;
        let mut image = Image::create_in_part(&path, pages, &[0..8, 900..908, 5..5]).unwrap();
        let size = || std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!((16 * 4096..1 << 20).contains(&size()), "{}", size());
        let state = PageState {
            page_type: PageType::Normal,
            digest: PageDigest([1; 16]),
        };
        let special = [9; PAGE_SIZE];
        let page = Arrived {
            pfn: 77_777,
            state,
            content: Arriving::Content(&special),
        };
        image.store(&[page]).unwrap();
        assert_eq!(image.content(77_777), Some(&special));
        assert_eq!(image.content(77_778), None);
    }

    #[test]
    fn a_move_never_takes_over_a_file() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("m.memory");
        let _image = Image::create(&path, 1).unwrap();
        assert!(Image::create(&path, 1).is_err());
    }

    #[test]
    fn too_much_is_refused_and_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("m.memory");
        assert!(Image::create(&path, 1 << 50).is_err());
        assert!(!path.exists());
    }
}
