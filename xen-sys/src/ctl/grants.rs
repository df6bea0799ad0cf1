//! What a domain has granted to others.

use std::ffi::{c_int, c_void};
use std::io;

use super::Ctl;
use crate::{DomId, Error, Result, raw};

const PAGE: usize = 4096;

impl Ctl {
    /// The frames (PV: machine frames; else guest frames) of `domain` that another domain may be writing to right now
    /// through a mapping: rings, and buffers that a backend keeps mapped. Log-dirty doesn't see
    /// such writes. There may be frames among them that nobody writes to, or that it doesn't own.
    ///
    /// # Errors
    ///
    /// There is no such domain, or the hypervisor refused.
    pub fn frames_mapped_writable(&self, domain: DomId) -> Result<Vec<u64>> {
        const OPERATION: &str = "map the grant table";
        let domid = domain.get();
        // SAFETY: the handle is open.
        let version =
            self.handle()
                .call("ask for the grants' version", Some(domain), |xch| unsafe {
                    raw::xc_gnttab_get_version(xch, domid)
                })?;
        let mut entries: c_int = 0;
        let mut table: *mut c_void = std::ptr::null_mut();
        self.handle().call(OPERATION, Some(domain), |xch| {
            // SAFETY: the handle is open, and the count is ours. Null tells of an error.
            table = unsafe {
                if version == 2 {
                    raw::xc_gnttab_map_table_v2(xch, domid, &mut entries).cast()
                } else {
                    raw::xc_gnttab_map_table_v1(xch, domid, &mut entries).cast()
                }
            };
            if table.is_null() { -1 } else { 0 }
        })?;
        // libxenctrl counts entries of version 1, whichever it is.
        let words = usize::try_from(entries).unwrap_or_default();
        let bytes = (words * size_of::<u64>()).next_multiple_of(PAGE);
        let table: *mut u64 = table.cast();
        let copied: Vec<u64> = (0..words)
            // SAFETY: so many words were mapped. They may change meanwhile, hence volatile.
            .map(|index| unsafe { table.add(index).read_volatile() })
            .collect();
        // SAFETY: the range was mapped for us, and nobody else has its address.
        if unsafe { libc::munmap(table.cast(), bytes) } != 0 {
            let error = io::Error::last_os_error();
            log::warn!("Failed to unmap a grant table: {error}");
        }
        match version {
            1 => Ok(written_v1(&copied)),
            2 => Ok(written_v2(&copied)),
            other => Err(Error::Unexpected {
                operation: OPERATION,
                domain: Some(domain),
                what: format!("version {other}"),
            }),
        }
    }
}

/// In version 1 an entry is one word: flags, the other domain, the frame. Xen notes in the flags
/// that it is mapped for writing.
fn written_v1(words: &[u64]) -> Vec<u64> {
    words
        .iter()
        .filter(|word| {
            let flags = **word as u32 & 0xffff;
            flags & raw::GTF_type_mask == raw::GTF_permit_access && flags & raw::GTF_writing != 0
        })
        .map(|word| word >> 32)
        .collect()
}

/// In version 2 an entry is two words, the second the frame, and whether it is mapped is noted
/// elsewhere: whatever may be written counts.
fn written_v2(words: &[u64]) -> Vec<u64> {
    words
        .as_chunks::<2>()
        .0
        .iter()
        .filter(|[header, _]| {
            let flags = *header as u32 & 0xffff;
            flags & raw::GTF_type_mask == raw::GTF_permit_access && flags & raw::GTF_readonly == 0
        })
        .map(|[_, frame]| *frame)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(flags: u32, other: u64, frame: u64) -> u64 {
        u64::from(flags) | other << 16 | frame << 32
    }

    #[test]
    fn what_is_mapped_for_writing_is_found() {
        let mapped = raw::GTF_permit_access | raw::GTF_reading | raw::GTF_writing;
        let words = [
            entry(mapped, 0, 0x1234),
            // Granted, and not mapped; only read; a transfer; nothing.
            entry(raw::GTF_permit_access, 0, 1),
            entry(
                raw::GTF_permit_access | raw::GTF_readonly | raw::GTF_reading,
                0,
                2,
            ),
            entry(raw::GTF_accept_transfer | raw::GTF_writing, 0, 3),
            entry(0, 0, 4),
            entry(mapped, 0x7fff, 0xffff_ffff),
        ];
        assert_eq!(written_v1(&words), [0x1234, 0xffff_ffff]);
    }

    #[test]
    fn in_version_2_what_may_be_written_counts() {
        let words = [
            entry(raw::GTF_permit_access, 0, 0),
            0x12_3456_789a,
            entry(raw::GTF_permit_access | raw::GTF_readonly, 0, 0),
            1,
            entry(raw::GTF_transitive, 0, 0),
            2,
        ];
        assert_eq!(written_v2(&words), [0x12_3456_789a]);
    }
}
