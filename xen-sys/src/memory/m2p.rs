//! The machine-to-physical table.

use std::ffi::c_ulong;
use std::fmt;
use std::io;
use std::ptr::{self, NonNull};

use crate::ctl::Ctl;
use crate::{Error, Result, raw};

/// The hypervisor hands the table out in pieces of so many bytes.
const CHUNK: usize = 2 << 20;

/// The hypervisor's table that says of each machine frame which pfn its owner has it at; mapped
/// read-only, unmapped on drop.
///
/// An entry counts only if the owner's p2m leads back: the table does not say whose a frame is,
/// and a PV guest writes the entries of its own frames.
pub struct M2p {
    table: NonNull<u64>,
    frames: usize,
    bytes: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread.
unsafe impl Send for M2p {}
// SAFETY: it is only read.
unsafe impl Sync for M2p {}

impl fmt::Debug for M2p {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("M2p")
            .field("frames", &self.frames)
            .finish_non_exhaustive()
    }
}

impl M2p {
    /// Maps the table.
    ///
    /// # Errors
    ///
    /// The hypervisor or the kernel refused.
    pub fn map(ctl: &Ctl) -> Result<M2p> {
        const OPERATION: &str = "map the machine-to-physical table";
        let mut frames: c_ulong = 0;
        ctl.handle()
            .call("ask for the machine's last frame", None, |xch| {
                // SAFETY: the handle is open.
                unsafe { raw::xc_maximum_ram_page(xch, &mut frames) }
            })?;
        let mut table = None;
        ctl.handle().call(OPERATION, None, |xch| {
            // SAFETY: the handle is open; the first chunk's frame is not asked for.
            let address = unsafe { raw::xc_map_m2p(xch, frames, libc::PROT_READ, ptr::null_mut()) };
            table = NonNull::new(address);
            if table.is_some() { 0 } else { -1 }
        })?;
        let size = usize::try_from(frames).ok().and_then(|frames| {
            let bytes = frames
                .checked_mul(size_of::<u64>())?
                .checked_next_multiple_of(CHUNK)?;
            Some((frames, bytes))
        });
        match (table, size) {
            (Some(table), Some((frames, bytes))) => Ok(M2p {
                table,
                frames,
                bytes,
            }),
            _ => Err(Error::Unexpected {
                operation: OPERATION,
                domain: None,
                what: format!("{frames} frames"),
            }),
        }
    }

    /// The pfn of a machine frame; `None` if the frame does not exist, or the table has nothing
    /// sensible for it.
    pub fn pfn_of(&self, mfn: u64) -> Option<u64> {
        let index = usize::try_from(mfn)
            .ok()
            .filter(|&index| index < self.frames)?;
        // SAFETY: the table has that many entries. It changes all the time, hence volatile.
        let pfn = unsafe { self.table.add(index).read_volatile() };
        // Frame numbers have 52 bits at most; "invalid", "shared" and the debugging patterns
        // have more.
        (pfn >> 52 == 0).then_some(pfn)
    }

    /// How many frames the table covers: those from this number on do not exist.
    pub fn frames(&self) -> u64 {
        self.frames as u64
    }
}

impl Drop for M2p {
    fn drop(&mut self) {
        // SAFETY: the range was mapped so by us, and nobody has its address.
        if unsafe { libc::munmap(self.table.as_ptr().cast(), self.bytes) } != 0 {
            let error = io::Error::last_os_error();
            log::warn!("Failed to unmap the machine-to-physical table: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_frames_of_the_table_have_a_pfn() {
        let entries: Vec<u64> = vec![7, u64::MAX, 0x5555_5555_5555_5555, (1 << 52) - 1, 99];
        let table = NonNull::from(entries.as_slice()).cast();
        // One entry less than there is, and nothing to unmap.
        let m2p = std::mem::ManuallyDrop::new(M2p {
            table,
            frames: 4,
            bytes: 0,
        });
        assert_eq!(m2p.pfn_of(0), Some(7));
        assert_eq!(m2p.pfn_of(1), None);
        assert_eq!(m2p.pfn_of(2), None);
        assert_eq!(m2p.pfn_of(3), Some((1 << 52) - 1));
        assert_eq!(m2p.pfn_of(4), None);
        assert_eq!(m2p.pfn_of(u64::MAX), None);
    }
}
