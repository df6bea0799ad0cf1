//! The page that a PV guest and the hypervisor share.

use crate::{Page, raw};

/// Where the fields are that are read on a move.
pub(crate) mod offset {
    use std::mem::offset_of;

    use crate::raw::shared_info_x86_64;

    pub(crate) const MAX_PFN: usize = offset_of!(shared_info_x86_64, arch.max_pfn);
    pub(crate) const FRAME_LIST_LIST: usize =
        offset_of!(shared_info_x86_64, arch.pfn_to_mfn_frame_list_list);
    pub(crate) const P2M_CR3: usize = offset_of!(shared_info_x86_64, arch.p2m_cr3);
    pub(crate) const P2M_VADDR: usize = offset_of!(shared_info_x86_64, arch.p2m_vaddr);
    pub(crate) const P2M_GENERATION: usize = offset_of!(shared_info_x86_64, arch.p2m_generation);
}

/// What a 64-bit PV guest says in its shared info page of its p2m: the table of the machine frame
/// of each pfn.
///
/// All of it was written by the guest: check it before use. Frames are machine frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct P2mDescription {
    /// The number of pfns: one more than the highest, though Xen calls it `max_pfn`.
    pub pages: u64,
    /// The root of the tree; 0 or all ones when there is none.
    pub frame_list_list: u64,
    /// The root of the page tables that map the linear form, in the form of a control register 3;
    /// 0 when there is none.
    pub cr3: u64,
    /// The address of the linear form.
    pub address: u64,
    /// Counts changes of the linear form's mappings, before and after each: odd during one.
    pub generation: u64,
}

impl P2mDescription {
    /// Reads a copy of the page.
    #[must_use]
    pub fn parse(shared_info: &Page) -> P2mDescription {
        let word = |offset| super::word(shared_info, offset);
        P2mDescription {
            pages: word(offset::MAX_PFN),
            frame_list_list: word(offset::FRAME_LIST_LIST),
            cr3: word(offset::P2M_CR3),
            address: word(offset::P2M_VADDR),
            generation: word(offset::P2M_GENERATION),
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
        // The word that is left out is the reason of an NMI.
        for (slot, value) in [(0, 1u64), (1, 2), (2, 99), (3, 3), (4, 4), (5, 5)] {
            page[ARCH + 8 * slot..][..8].copy_from_slice(&value.to_le_bytes());
        }
        let expected = P2mDescription {
            pages: 1,
            frame_list_list: 2,
            cr3: 3,
            address: 4,
            generation: 5,
        };
        assert_eq!(P2mDescription::parse(&page), expected);
    }
}
