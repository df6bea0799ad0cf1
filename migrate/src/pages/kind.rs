//! The types that Xen gives to a guest's pages.

use std::fmt;

/// What Xen uses a guest's page for: the four bits of `XEN_DOMCTL_PFINFO_*` in Xen's
/// `public/domctl.h`.
///
/// `xc_domctl` getpageframeinfo3 returns them in bits 31-28, a migration stream carries them in
/// bits 63-60 of a pfn entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum PageType {
    /// A page without a special use.
    Normal = 0x0,
    /// A table of the lowest level: its entries point at pages.
    L1 = 0x1,
    /// A table whose entries point at L1 tables.
    L2 = 0x2,
    /// A table whose entries point at L2 tables.
    L3 = 0x3,
    /// A table of the highest level.
    L4 = 0x4,
    /// An L1 table that the guest has pinned: it stays a table without being pointed at.
    PinnedL1 = 0x9,
    /// A pinned L2 table.
    PinnedL2 = 0xa,
    /// A pinned L3 table.
    PinnedL3 = 0xb,
    /// A pinned L4 table.
    PinnedL4 = 0xc,
    /// A page with a hardware fault. It has no content.
    Broken = 0xd,
    /// A page that the guest has, with content that does not matter.
    AllocateOnly = 0xe,
    /// A pfn without a page: a hole.
    Invalid = 0xf,
}

/// Four bits that are no page type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Unknown page type {0:#x}")]
pub struct UnknownPageType(pub u8);

impl PageType {
    /// All page types, in the order of their numbers.
    pub const ALL: [Self; 12] = [
        Self::Normal,
        Self::L1,
        Self::L2,
        Self::L3,
        Self::L4,
        Self::PinnedL1,
        Self::PinnedL2,
        Self::PinnedL3,
        Self::PinnedL4,
        Self::Broken,
        Self::AllocateOnly,
        Self::Invalid,
    ];

    /// The type with a number from 0 to 15.
    ///
    /// # Errors
    /// Fails for the numbers that Xen keeps in reserve (5 to 8), and above 15.
    pub const fn from_bits(bits: u8) -> Result<Self, UnknownPageType> {
        Ok(match bits {
            0x0 => Self::Normal,
            0x1 => Self::L1,
            0x2 => Self::L2,
            0x3 => Self::L3,
            0x4 => Self::L4,
            0x9 => Self::PinnedL1,
            0xa => Self::PinnedL2,
            0xb => Self::PinnedL3,
            0xc => Self::PinnedL4,
            0xd => Self::Broken,
            0xe => Self::AllocateOnly,
            0xf => Self::Invalid,
            unknown => return Err(UnknownPageType(unknown)),
        })
    }

    /// The type in an answer of getpageframeinfo3. Only bits 31-28 are looked at: Xen returns the
    /// frame's number or zero in the rest.
    ///
    /// # Errors
    /// Fails for a type that Xen keeps in reserve.
    pub const fn from_page_frame_info(info: u64) -> Result<Self, UnknownPageType> {
        Self::from_bits(((info >> 28) & 0xf) as u8)
    }

    /// The type in bits 63-60 of a migration stream's pfn entry.
    ///
    /// # Errors
    /// Fails for a type that Xen keeps in reserve.
    pub const fn from_stream_entry(entry: u64) -> Result<Self, UnknownPageType> {
        Self::from_bits((entry >> 60) as u8)
    }

    /// The type's number, from 0 to 15.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self as u8
    }

    /// The pfn entry of a migration stream: the type in bits 63-60, the pfn in bits 51-0.
    #[must_use]
    pub const fn stream_entry(self, pfn: super::Pfn) -> u64 {
        ((self as u64) << 60) | (pfn & ((1 << 52) - 1))
    }

    /// Whether a page of this type has content that crosses.
    #[must_use]
    pub const fn has_data(self) -> bool {
        !matches!(self, Self::Broken | Self::AllocateOnly | Self::Invalid)
    }

    /// Whether the guest has memory at a pfn of this type.
    #[must_use]
    pub const fn is_populated(self) -> bool {
        !matches!(self, Self::Broken | Self::Invalid)
    }

    /// The level of a page table, from 1 (lowest) to 4; nothing for other pages.
    #[must_use]
    pub const fn table_level(self) -> Option<u8> {
        match self {
            Self::L1 | Self::PinnedL1 => Some(1),
            Self::L2 | Self::PinnedL2 => Some(2),
            Self::L3 | Self::PinnedL3 => Some(3),
            Self::L4 | Self::PinnedL4 => Some(4),
            Self::Normal | Self::Broken | Self::AllocateOnly | Self::Invalid => None,
        }
    }

    /// Whether this is a pinned page table.
    #[must_use]
    pub const fn is_pinned(self) -> bool {
        matches!(
            self,
            Self::PinnedL1 | Self::PinnedL2 | Self::PinnedL3 | Self::PinnedL4
        )
    }
}

impl TryFrom<u8> for PageType {
    type Error = UnknownPageType;

    fn try_from(bits: u8) -> Result<Self, UnknownPageType> {
        Self::from_bits(bits)
    }
}

impl From<PageType> for u8 {
    fn from(page_type: PageType) -> Self {
        page_type.bits()
    }
}

impl fmt::Debug for PageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Normal => "NOTAB",
            Self::L1 => "L1TAB",
            Self::L2 => "L2TAB",
            Self::L3 => "L3TAB",
            Self::L4 => "L4TAB",
            Self::PinnedL1 => "L1TAB|PIN",
            Self::PinnedL2 => "L2TAB|PIN",
            Self::PinnedL3 => "L3TAB|PIN",
            Self::PinnedL4 => "L4TAB|PIN",
            Self::Broken => "BROKEN",
            Self::AllocateOnly => "XALLOC",
            Self::Invalid => "XTAB",
        })
    }
}

impl fmt::Display for PageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xen_sys::raw;

    #[test]
    fn known_numbers_convert_and_reserved_ones_do_not() {
        for bits in 0..=u8::MAX {
            match PageType::from_bits(bits) {
                Ok(page_type) => assert_eq!(page_type.bits(), bits),
                Err(UnknownPageType(unknown)) => {
                    assert_eq!(unknown, bits);
                    assert!((5..=8).contains(&bits) || bits > 15);
                }
            }
        }
        assert!(PageType::ALL.iter().map(|t| t.bits()).is_sorted());
    }

    #[test]
    fn every_form_of_a_type_agrees() {
        for page_type in PageType::ALL {
            let entry = page_type.stream_entry(0xf_ffff_ffff_ffff);
            assert_eq!(PageType::from_stream_entry(entry), Ok(page_type));
            assert_eq!(entry & 0x0ff0_0000_0000_0000, 0);
            // XEN_DOMCTL_PFINFO_* shifted by 32 is what the stream carries.
            assert_eq!(PageType::from_page_frame_info(entry >> 32), Ok(page_type));
        }
        assert_eq!(
            PageType::from_page_frame_info(0x5 << 28),
            Err(UnknownPageType(5))
        );
    }

    #[test]
    fn types_are_those_of_the_headers() {
        let pinned = raw::XEN_DOMCTL_PFINFO_LPINTAB;
        let in_headers = [
            raw::XEN_DOMCTL_PFINFO_NOTAB,
            raw::XEN_DOMCTL_PFINFO_L1TAB,
            raw::XEN_DOMCTL_PFINFO_L2TAB,
            raw::XEN_DOMCTL_PFINFO_L3TAB,
            raw::XEN_DOMCTL_PFINFO_L4TAB,
            pinned | raw::XEN_DOMCTL_PFINFO_L1TAB,
            pinned | raw::XEN_DOMCTL_PFINFO_L2TAB,
            pinned | raw::XEN_DOMCTL_PFINFO_L3TAB,
            pinned | raw::XEN_DOMCTL_PFINFO_L4TAB,
            raw::XEN_DOMCTL_PFINFO_BROKEN,
            raw::XEN_DOMCTL_PFINFO_XALLOC,
            raw::XEN_DOMCTL_PFINFO_XTAB,
        ];
        let read = in_headers.map(|info| PageType::from_page_frame_info(info.into()));
        assert_eq!(read, PageType::ALL.map(Ok));
    }

    #[test]
    fn tables_have_a_level_and_data() {
        for page_type in PageType::ALL {
            let level = page_type.table_level();
            assert_eq!(level.unwrap_or(0) > 0, (1..=12).contains(&page_type.bits()));
            if level.is_some() {
                assert!(page_type.has_data());
                assert_eq!(page_type.is_pinned(), page_type.bits() & 8 != 0);
                assert_eq!(level, Some(page_type.bits() & 7));
            } else {
                assert!(!page_type.is_pinned());
            }
            assert!(page_type.is_populated() || !page_type.has_data());
        }
    }
}
