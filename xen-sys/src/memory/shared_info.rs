//! The page that a PV guest and the hypervisor share.

use std::mem::offset_of;

use crate::{Page, raw};

/// What the shared info page of a 64-bit PV guest says of its memory.
///
/// All of it was written by the guest: check it before use. Frames are machine frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedInfo {
    /// The number of pfns that the p2m covers: one more than the highest pfn.
    pub max_pfn: u64,
    /// The frame of the top of the three-level p2m, for guests without `p2m_cr3`; 0 or all ones
    /// if there is none.
    pub frame_list_list: u64,
    /// The page tables through which `p2m_vaddr` leads, in the form of a control register 3; 0 if
    /// the guest uses the three-level p2m.
    pub p2m_cr3: u64,
    /// Where the guest itself sees its p2m as one table.
    pub p2m_vaddr: u64,
    /// Changes whenever the p2m's own pages do; odd during a change.
    pub p2m_generation: u64,
}

impl SharedInfo {
    /// Reads a copy of the page.
    pub fn parse(page: &Page) -> SharedInfo {
        const ARCH: usize = offset_of!(raw::shared_info_x86_64, arch);
        let field = |offset: usize| {
            let bytes = page.get(ARCH + offset..).and_then(<[u8]>::first_chunk);
            bytes.copied().map_or(0, u64::from_le_bytes)
        };
        SharedInfo {
            max_pfn: field(offset_of!(raw::arch_shared_info_x86_64, max_pfn)),
            frame_list_list: field(offset_of!(
                raw::arch_shared_info_x86_64,
                pfn_to_mfn_frame_list_list
            )),
            p2m_cr3: field(offset_of!(raw::arch_shared_info_x86_64, p2m_cr3)),
            p2m_vaddr: field(offset_of!(raw::arch_shared_info_x86_64, p2m_vaddr)),
            p2m_generation: field(offset_of!(raw::arch_shared_info_x86_64, p2m_generation)),
        }
    }
}

// What is read lies within the page.
const _: () = assert!(size_of::<raw::shared_info_x86_64>() <= crate::PAGE_SIZE);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;

    #[test]
    fn fields_are_where_the_interface_has_them() {
        // Offsets as in the public header of Xen: 32 vCPUs of 64 bytes, two times 512 bytes of
        // event bits, 16 bytes of wall clock, then the part of the architecture.
        const ARCH: usize = 32 * 64 + 2 * 512 + 16;
        let mut page = [0; PAGE_SIZE];
        for (slot, value) in [(0, 1u64), (1, 2), (3, 3), (4, 4), (5, 5)] {
            page[ARCH + 8 * slot..][..8].copy_from_slice(&value.to_le_bytes());
        }
        let expected = SharedInfo {
            max_pfn: 1,
            frame_list_list: 2,
            p2m_cr3: 3,
            p2m_vaddr: 4,
            p2m_generation: 5,
        };
        assert_eq!(SharedInfo::parse(&page), expected);
    }
}
