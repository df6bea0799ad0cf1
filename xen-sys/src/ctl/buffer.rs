//! Memory that the hypervisor may read and write during a call.
//!
//! The kernel can move or unmap ordinary memory while the hypervisor uses it (a page fault there
//! is an `EFAULT`), so libxc allocates such buffers specially.

use std::ptr::NonNull;
use std::sync::Arc;

use super::Handle;
use crate::{Error, PAGE_SIZE, Result, raw};

/// A zeroed, page-aligned, hypercall-safe buffer, freed on drop.
pub(super) struct HypercallBuffer {
    handle: Arc<Handle>,
    address: NonNull<u8>,
    pages: i32,
}

// SAFETY: the buffer owns its memory, and is freed through a handle that allows it from any
// thread.
unsafe impl Send for HypercallBuffer {}

impl HypercallBuffer {
    /// Allocates at least `bytes`.
    pub(super) fn new(handle: &Arc<Handle>, bytes: usize) -> Result<HypercallBuffer> {
        let pages = i32::try_from(bytes.div_ceil(PAGE_SIZE).max(1))
            .map_err(|_| Error::argument(format!("buffer size of {bytes} bytes")))?;
        let mut buffer = unallocated();
        let mut address = None;
        handle.call("allocate a hypercall buffer", None, |xch| {
            // SAFETY: the handle is open; the descriptor is only written to.
            let memory = unsafe { raw::xc__hypercall_buffer_alloc_pages(xch, &mut buffer, pages) };
            address = NonNull::new(memory.cast());
            if address.is_some() { 0 } else { -1 }
        })?;
        match address {
            Some(address) => Ok(HypercallBuffer {
                handle: Arc::clone(handle),
                address,
                pages,
            }),
            None => Err(Error::argument("hypercall buffer")),
        }
    }

    /// For a guest handle in a hypercall's structure.
    pub(super) fn as_mut_ptr<T>(&mut self) -> *mut T {
        self.address.as_ptr().cast()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: the memory is ours, initialised (zeroed, then written by the hypervisor, which
        // does so only during a call that has us borrowed mutably).
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.len()) }
    }

    pub(super) fn words(&self) -> &[u64] {
        // SAFETY: as for `bytes`; page-aligned, and any bits are a u64.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr().cast(), self.len() / 8) }
    }

    pub(super) fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as for `words`, and we are borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr().cast(), self.len() / 8) }
    }

    /// The first `length` bytes, which the hypervisor says it has filled.
    pub(super) fn filled(
        &self,
        operation: &'static str,
        length: impl TryInto<usize>,
    ) -> Result<Vec<u8>> {
        let filled = length
            .try_into()
            .ok()
            .and_then(|length| self.bytes().get(..length));
        filled.map(<[u8]>::to_vec).ok_or_else(|| Error::Unexpected {
            operation,
            domain: None,
            what: "the hypervisor reports more than the buffer holds".to_owned(),
        })
    }

    fn len(&self) -> usize {
        self.pages.unsigned_abs() as usize * PAGE_SIZE
    }
}

impl Drop for HypercallBuffer {
    fn drop(&mut self) {
        let mut buffer = raw::xc_hypercall_buffer_t {
            hbuf: self.address.as_ptr().cast(),
            ..unallocated()
        };
        let pages = self.pages;
        // SAFETY: the memory came from the matching function with as many pages.
        let _ = self
            .handle
            .call("free a hypercall buffer", None, |xch| unsafe {
                raw::xc__hypercall_buffer_free_pages(xch, &mut buffer, pages);
                0
            });
    }
}

/// What the headers' `DECLARE_HYPERCALL_BUFFER` sets up: nothing allocated, nothing to copy.
fn unallocated() -> raw::xc_hypercall_buffer_t {
    raw::xc_hypercall_buffer_t {
        ubuf: std::ptr::without_provenance_mut(usize::MAX),
        ..raw::xc_hypercall_buffer_t::default()
    }
}
