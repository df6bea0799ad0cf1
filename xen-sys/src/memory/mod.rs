//! Other domains' memory, mapped into this process (libxenforeignmemory).
//!
//! ```text
//!  guest:  pfn ──p2m──► mfn ─┐
//!                            │ ForeignMemory::map(domain, [mfn, ...])
//!  here:   page 0, page 1, ... one range of addresses, unmapped on drop
//! ```
//!
//! For a PV domain frames are machine frames (its p2m tells which), for PVH and HVM guest frames.
//!
//! A mapping keeps its pages alive: a domain that is destroyed meanwhile stays in the list
//! without a name until the last one is unmapped. Map a batch, use it, drop it.

mod m2p;
pub(crate) mod shared_info;
pub(crate) mod start_info;

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::sync::Arc;

pub use m2p::M2p;
pub use shared_info::P2mDescription;
pub use start_info::StartInfoRings;

use crate::log_bridge::LogBridge;
use crate::{DomId, Error, PAGE_SIZE, Page, Result, raw};

/// Whether a mapping may be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only read.
    Read,
    /// Read and written: for test tools; what a moved guest has is its own affair.
    ReadWrite,
}

/// A handle to other domains' memory.
///
/// `Send` but not `Sync`: each thread opens its own.
pub struct ForeignMemory {
    handle: Arc<Handle>,
    not_sync: PhantomData<std::cell::Cell<()>>,
}

struct Handle {
    memory: NonNull<raw::xenforeignmemory_handle>,
    // Used by the library until the handle is closed.
    _log: LogBridge,
}

// SAFETY: the handle is not tied to a thread.
unsafe impl Send for Handle {}
// SAFETY: it is shared only between a `ForeignMemory`, which isn't `Sync`, and its mappings,
// which do nothing but unmap themselves through it: a `munmap` that touches nothing of it.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: it is open, and all mappings are gone, as each holds a share of it.
        unsafe { raw::xenforeignmemory_close(self.memory.as_ptr()) };
    }
}

impl fmt::Debug for ForeignMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ForeignMemory").finish_non_exhaustive()
    }
}

impl ForeignMemory {
    /// Opens the driver.
    ///
    /// # Errors
    ///
    /// This is no Xen host, or this process may not.
    pub fn open() -> Result<ForeignMemory> {
        let log = LogBridge::new();
        // SAFETY: the logger outlives the handle.
        let memory = unsafe { raw::xenforeignmemory_open(log.as_ptr(), 0) };
        let source = io::Error::last_os_error();
        match NonNull::new(memory) {
            Some(memory) => Ok(ForeignMemory {
                handle: Arc::new(Handle { memory, _log: log }),
                not_sync: PhantomData,
            }),
            None => Err(Error::Open {
                interface: "other domains' memory",
                source,
            }),
        }
    }

    /// Maps frames of a domain next to each other. Single frames may fail, as
    /// [`Mapping::error`] tells; the others are usable.
    ///
    /// # Errors
    ///
    /// Nothing could be mapped at all: there is no such domain, no room, or no frames were given.
    pub fn map(&self, domain: DomId, access: Access, frames: &[u64]) -> Result<Mapping> {
        const OPERATION: &str = "map the guest's memory";
        if frames.is_empty() {
            return Err(Error::argument("mapping without pages"));
        }
        let protection = match access {
            Access::Read => libc::PROT_READ,
            Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        let mut errors = vec![0; frames.len()];
        // SAFETY: there are as many frames, and as much room for errors, as said.
        let address = unsafe {
            raw::xenforeignmemory_map(
                self.handle.memory.as_ptr(),
                domain.get(),
                protection,
                frames.len(),
                frames.as_ptr(),
                errors.as_mut_ptr(),
            )
        };
        let source = io::Error::last_os_error();
        let Some(address) = NonNull::new(address.cast::<u8>()) else {
            return Err(Error::os(OPERATION, Some(domain), source));
        };
        let failed = errors.iter().any(|&error| error != 0);
        Ok(Mapping {
            handle: Arc::clone(&self.handle),
            address,
            pages: frames.len(),
            errors: if failed { errors } else { Vec::new() },
            writable: access == Access::ReadWrite,
        })
    }

    /// Maps one frame.
    ///
    /// # Errors
    ///
    /// It could not be mapped.
    pub fn map_page(&self, domain: DomId, access: Access, frame: u64) -> Result<Mapping> {
        let mapping = self.map(domain, access, &[frame])?;
        match mapping.error(0) {
            None => Ok(mapping),
            Some(source) => Err(Error::os("map the guest's memory", Some(domain), source)),
        }
    }
}

/// Pages of another domain in this process, unmapped on drop.
///
/// The guest goes on writing to them. So there is no `&[u8]` that outlives a call: a page is
/// copied once and then worked on, or looked at in place where a torn reading does no harm.
pub struct Mapping {
    handle: Arc<Handle>,
    address: NonNull<u8>,
    pages: usize,
    /// The errno of each page (0: mapped), or nothing if all are mapped.
    errors: Vec<i32>,
    writable: bool,
}

// SAFETY: a mapping is an address range of the process, not of a thread.
unsafe impl Send for Mapping {}
// SAFETY: shared, it can only be read, which any number of threads may do; that the content
// changes is so in any case.
unsafe impl Sync for Mapping {}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

impl Mapping {
    /// How many pages were asked for.
    pub fn len(&self) -> usize {
        self.pages
    }

    /// Never: a mapping has at least one page.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Every page is mapped.
    pub fn is_complete(&self) -> bool {
        self.errors.is_empty()
    }

    /// Why a page is not mapped; `None` if it is, or was not asked for.
    pub fn error(&self, index: usize) -> Option<io::Error> {
        // The driver answers negative numbers, as the kernel does; the header says positive.
        let errno = self.errors.get(index)?.abs();
        (errno != 0).then(|| io::Error::from_raw_os_error(errno))
    }

    /// The pages that are not mapped, and why.
    pub fn errors(&self) -> impl Iterator<Item = (usize, io::Error)> + '_ {
        (0..self.pages).filter_map(|index| Some((index, self.error(index)?)))
    }

    /// The address of a page that is mapped.
    fn page_address(&self, index: usize) -> Option<NonNull<u8>> {
        if index >= self.pages || self.errors.get(index).is_some_and(|&errno| errno != 0) {
            return None;
        }
        // SAFETY: the index is within the range, which is one allocation.
        Some(unsafe { self.address.add(index * PAGE_SIZE) })
    }

    /// Copies a page as it is at the moment; false if it is not mapped.
    ///
    /// A guest that runs may write meanwhile: then some words are old, some new.
    #[must_use]
    pub fn copy_page(&self, index: usize, to: &mut Page) -> bool {
        let Some(from) = self.page_address(index) else {
            return false;
        };
        // SAFETY: a whole page is mapped there; `to` is ours alone, so they do not overlap. The
        // page may change during the copy, which goes through a function that the compiler can't
        // look into: it can't assume that what it read before is what it would read again.
        unsafe { copy_foreign(from.as_ptr(), to.as_mut_ptr(), PAGE_SIZE) };
        true
    }

    /// Looks at a page in place, without a copy; `None` if it is not mapped.
    ///
    /// **Only for what may be torn**, such as a digest that answers "unchanged": the page can
    /// change between two readings of the same byte, however the code reads as if it could not.
    /// Whatever is decided by the content, sent, or relied on again, needs [`copy_page`]. Bounds
    /// and lengths must never be taken from it.
    ///
    /// [`copy_page`]: Mapping::copy_page
    pub fn with_page<T>(&self, index: usize, look: impl FnOnce(&Page) -> T) -> Option<T> {
        let address = self.page_address(index)?;
        // SAFETY: a whole page is mapped there, readable until we are dropped, and any bytes are
        // a `Page`. That it changes behind the reference is outside of what Rust defines; the
        // reference is laundered through `black_box`, so that the compiler knows nothing of where
        // it leads, and callers are told to compute from it nothing but what may be wrong.
        let page = unsafe { std::hint::black_box(address).cast::<Page>().as_ref() };
        Some(look(page))
    }

    /// Writes a page; false if it is not mapped for that.
    #[must_use]
    pub fn write_page(&mut self, index: usize, from: &Page) -> bool {
        if !self.writable {
            return false;
        }
        let Some(to) = self.page_address(index) else {
            return false;
        };
        // SAFETY: a whole page is mapped there, writably; the source is ours.
        unsafe { copy_foreign(from.as_ptr(), to.as_ptr(), PAGE_SIZE) };
        true
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let address = self.address.as_ptr().cast();
        // SAFETY: this range was mapped with that many pages, and nobody has its address.
        let result = unsafe {
            raw::xenforeignmemory_unmap(self.handle.memory.as_ptr(), address, self.pages)
        };
        if result != 0 {
            let error = io::Error::last_os_error();
            log::warn!("Failed to unmap {} pages of a guest: {error}", self.pages);
        }
    }
}

/// The word at an offset of a page, which the callers choose so that it lies within.
fn word(page: &Page, offset: usize) -> u64 {
    let bytes = page.get(offset..).and_then(<[u8]>::first_chunk);
    bytes.copied().map_or(0, u64::from_le_bytes)
}

/// Copies memory that somebody else may change meanwhile.
///
/// # Safety
///
/// Both ranges are mapped as needed, and do not overlap.
#[inline(never)]
unsafe fn copy_foreign(from: *const u8, to: *mut u8, length: usize) {
    // SAFETY: as the caller says.
    unsafe { ptr::copy_nonoverlapping(std::hint::black_box(from), to, length) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mapping over ordinary memory, with one page that failed.
    fn with_ordinary_memory(test: impl FnOnce(&mut Mapping)) {
        // SAFETY: a new range of our own.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                3 * PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        // The handle is never reached: the mapping is taken apart by hand below.
        let handle = Arc::new(Handle {
            memory: NonNull::dangling(),
            _log: LogBridge::new(),
        });
        let mut mapping = Mapping {
            handle,
            address: NonNull::new(address.cast()).unwrap(),
            pages: 3,
            errors: vec![0, -libc::EINVAL, 0],
            writable: true,
        };
        test(&mut mapping);
        // SAFETY: the test has returned the mapping; neither it nor the handle is dropped.
        unsafe { libc::munmap(address, 3 * PAGE_SIZE) };
        std::mem::forget(mapping);
    }

    #[test]
    fn pages_that_are_not_mapped_are_never_touched() {
        with_ordinary_memory(|mapping| {
            let mut page = [7; PAGE_SIZE];
            assert!(!mapping.copy_page(1, &mut page));
            assert!(!mapping.copy_page(3, &mut page));
            assert!(!mapping.write_page(1, &page));
            assert!(mapping.with_page(1, |_| ()).is_none());
            assert!(mapping.with_page(usize::MAX, |_| ()).is_none());
            assert_eq!(page, [7; PAGE_SIZE]);

            assert!(!mapping.is_complete());
            let errors: Vec<_> = mapping.errors().collect();
            assert_eq!(errors.len(), 1);
            assert_eq!(
                (errors[0].0, errors[0].1.raw_os_error()),
                (1, Some(libc::EINVAL))
            );
        });
    }

    #[test]
    fn pages_are_copied_where_they_belong() {
        with_ordinary_memory(|mapping| {
            assert!(mapping.write_page(0, &[1; PAGE_SIZE]));
            assert!(mapping.write_page(2, &[3; PAGE_SIZE]));
            let mut page = [0; PAGE_SIZE];
            assert!(mapping.copy_page(2, &mut page));
            assert_eq!(page, [3; PAGE_SIZE]);
            assert_eq!(mapping.with_page(0, |page| page[PAGE_SIZE - 1]), Some(1));
        });
    }

    #[test]
    fn a_read_only_mapping_is_not_written() {
        with_ordinary_memory(|mapping| {
            mapping.writable = false;
            assert!(!mapping.write_page(0, &[1; PAGE_SIZE]));
            assert_eq!(mapping.with_page(0, |page| page[0]), Some(0));
        });
    }
}
