//! What the hypervisor uses each page of a domain for.

use std::fmt;

use super::Ctl;
use crate::{DomId, Result, raw};

/// The hypervisor answers for at most so many pages in one call.
pub(super) const BATCH: usize = 1024;

/// The type of a page: a page table of some level, plain data, or nothing that can be read.
///
/// The upper four bits of a page entry in the migration stream.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageType(u8);

impl PageType {
    /// Plain data.
    pub const NOTAB: PageType = PageType(0x0);
    /// A page table of level 1, not pinned.
    pub const L1TAB: PageType = PageType(0x1);
    /// A page table of level 2, not pinned.
    pub const L2TAB: PageType = PageType(0x2);
    /// A page table of level 3, not pinned.
    pub const L3TAB: PageType = PageType(0x3);
    /// A page table of level 4, not pinned.
    pub const L4TAB: PageType = PageType(0x4);
    /// The memory is broken.
    pub const BROKEN: PageType = PageType(0xd);
    /// A page that is allocated, and has no content yet.
    pub const XALLOC: PageType = PageType(0xe);
    /// No page of this domain.
    pub const XTAB: PageType = PageType(0xf);

    /// The bit that a pinned page table has besides its level.
    const PINNED: u8 = 0x8;

    /// Of an entry that [`Ctl::page_types`] has filled in.
    pub fn from_entry(entry: u64) -> PageType {
        // Only the lowest four of the shifted bits are looked at: the cast loses nothing.
        PageType(((entry >> raw::XEN_DOMCTL_PFINFO_LTAB_SHIFT) & 0xf) as u8)
    }

    /// Of its four bits; `None` if there are more.
    pub fn from_bits(bits: u8) -> Option<PageType> {
        (bits <= 0xf).then_some(PageType(bits))
    }

    /// Its four bits.
    pub fn bits(self) -> u8 {
        self.0
    }

    /// The level of a page table, 1 to 4; `None` if it is none.
    pub fn table_level(self) -> Option<u8> {
        match self.0 {
            0x1..=0x4 => Some(self.0),
            0x9..=0xc => Some(self.0 & !PageType::PINNED),
            _ => None,
        }
    }

    /// A page table that the guest has pinned: it is one even while nothing uses it.
    pub fn is_pinned(self) -> bool {
        self.table_level().is_some() && self.0 & PageType::PINNED != 0
    }

    /// There is a content to send.
    pub fn has_data(self) -> bool {
        self == PageType::NOTAB || self.table_level().is_some()
    }
}

impl fmt::Debug for PageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            PageType::NOTAB => f.write_str("NOTAB"),
            PageType::BROKEN => f.write_str("BROKEN"),
            PageType::XALLOC => f.write_str("XALLOC"),
            PageType::XTAB => f.write_str("XTAB"),
            PageType(bits) => match self.table_level() {
                Some(level) => {
                    write!(
                        f,
                        "L{level}TAB{}",
                        if self.is_pinned() { "+PIN" } else { "" }
                    )
                }
                None => write!(f, "PageType({bits:#x})"),
            },
        }
    }
}

/// Operations on page types.
impl Ctl {
    /// Replaces each frame number (PV: machine frame; else guest frame) by its type, which
    /// [`PageType::from_entry`] reads.
    ///
    /// A type is as of the moment: a running guest makes page tables of its pages and back.
    ///
    /// # Errors
    ///
    /// There is no such domain, or the hypervisor refused; the frames are partly replaced then.
    pub fn page_types(&self, domain: DomId, frames: &mut [u64]) -> Result<()> {
        let mut buffer = self.page_types.borrow_mut();
        for batch in frames.chunks_mut(BATCH) {
            for (word, &frame) in buffer.words_mut().iter_mut().zip(batch.iter()) {
                *word = frame;
            }
            let array = raw::__guest_handle_xen_pfn_t {
                p: buffer.as_mut_ptr(),
            };
            let count = batch.len() as u64;
            self.domctl(
                "ask for page types",
                domain,
                raw::XEN_DOMCTL_getpageframeinfo3,
                |domctl| {
                    domctl.u.getpageframeinfo3 =
                        raw::xen_domctl_getpageframeinfo3 { num: count, array };
                },
            )?;
            for (frame, &word) in batch.iter_mut().zip(buffer.words()) {
                *frame = word;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_the_hypervisor_are_read() {
        let of = |entry: u32| PageType::from_entry(u64::from(entry));
        assert_eq!(of(raw::XEN_DOMCTL_PFINFO_NOTAB), PageType::NOTAB);
        assert_eq!(of(raw::XEN_DOMCTL_PFINFO_L1TAB), PageType::L1TAB);
        assert_eq!(of(raw::XEN_DOMCTL_PFINFO_L2TAB), PageType::L2TAB);
        assert_eq!(of(raw::XEN_DOMCTL_PFINFO_L3TAB), PageType::L3TAB);
        assert_eq!(of(raw::XEN_DOMCTL_PFINFO_L4TAB), PageType::L4TAB);
        assert_eq!(of(raw::XEN_DOMCTL_PFINFO_BROKEN), PageType::BROKEN);
        assert_eq!(of(raw::XEN_DOMCTL_PFINFO_XALLOC), PageType::XALLOC);
        assert_eq!(of(raw::XEN_DOMCTL_PFINFO_XTAB), PageType::XTAB);

        let pinned = of(raw::XEN_DOMCTL_PFINFO_L4TAB | raw::XEN_DOMCTL_PFINFO_LPINTAB);
        assert_eq!((pinned.bits(), pinned.table_level()), (0xc, Some(4)));
        assert!(pinned.is_pinned());
        assert_eq!(format!("{pinned:?}"), "L4TAB+PIN");
    }

    #[test]
    fn only_data_and_page_tables_have_a_content() {
        for bits in 0..=0xf {
            let page_type = PageType::from_bits(bits).unwrap();
            let expected = matches!(bits, 0x0..=0x4 | 0x9..=0xc);
            assert_eq!(page_type.has_data(), expected, "{page_type:?}");
            assert_eq!(page_type.table_level().is_some(), expected && bits != 0);
            assert_eq!(page_type.is_pinned(), matches!(bits, 0x9..=0xc));
        }
        assert_eq!(PageType::from_bits(0x10), None);
    }
}
