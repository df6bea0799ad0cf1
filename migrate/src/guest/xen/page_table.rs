//! Page tables of 64-bit PV guests, made independent of the host.
//!
//! A PV guest's page tables are the ones that the processor walks: their entries hold mfns. What
//! crosses holds pfns instead, and the destination puts its own mfns in:
//!
//! ```text
//!   source's table --normalise--> what is digested and crosses --localise--> destination's table
//!      mfns                            pfns                                      mfns
//!
//!   entry   63            52 51                         12 11             0
//!          +----------------+-----------------------------+----------------+
//!          | NX, available  |  frame: mfn <-> pfn         | flags          |    if bit 0, present
//!          +----------------+-----------------------------+----------------+
//! ```
//!
//! Only the frame of present entries changes. All flags cross as they are, accessed and dirty
//! among them, and so do entries that are not present: their bits are the guest's own business.
//! Entries 256 to 271 of an L4 table are Xen's; they become zero, and the destination's Xen puts
//! its own there when the table is used.
//!
//! These are the rules of the stock saver, which restoring relies on.

use crate::pages::{Mfn, Page, Pfn};
use std::ops::RangeInclusive;

/// The entries of an L4 table that belong to Xen: `HYPERVISOR_VIRT_START` to
/// `HYPERVISOR_VIRT_END`, 0xffff8000_00000000 to 0xffff87ff_ffffffff.
pub const XEN_L4_ENTRIES: RangeInclusive<usize> = 256..=271;

/// The bits of an entry that hold the frame's number.
pub const FRAME_MASK: u64 = 0x000f_ffff_ffff_f000;
/// The lowest bit of the frame's number.
pub const FRAME_SHIFT: u32 = 12;
/// The entry is in use.
pub const PRESENT: u64 = 1 << 0;
/// Above L1: the entry maps a superpage rather than a table.
pub const SUPERPAGE: u64 = 1 << 7;

/// Frame numbers that an entry can hold are below this.
const MAX_FRAMES: u64 = 1 << 40;

/// A page table that cannot be normalised or localised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PageTableError {
    /// An entry holds a frame that is none of the guest's pages. While the guest runs this is
    /// nothing unusual: the table is being changed, or maps granted or shared pages. Such a table
    /// waits. Once the guest is suspended it is an error.
    #[error("Entry {index} of a page table refers to frame {frame:#x}, which is not the guest's")]
    Untranslatable {
        /// The entry, from 0 to 511.
        index: usize,
        /// The frame in it.
        frame: u64,
    },
    /// An entry maps a superpage, which cannot move.
    #[error("Entry {index} of a page table maps a superpage")]
    Superpage {
        /// The entry, from 0 to 511.
        index: usize,
    },
    /// No page table has that level.
    #[error("There is no page table of level {0}")]
    Level(u8),
}

/// The frame in an entry.
#[must_use]
pub const fn frame(entry: u64) -> u64 {
    (entry & FRAME_MASK) >> FRAME_SHIFT
}

/// The entry with another frame, its flags left alone.
#[must_use]
pub const fn with_frame(entry: u64, frame: u64) -> u64 {
    (entry & !FRAME_MASK) | ((frame << FRAME_SHIFT) & FRAME_MASK)
}

/// Rewrites a copy of a table of a level from 1 to 4 from mfns to pfns, in place. `pfn_of` answers
/// only for frames that are the guest's own, which means that its p2m leads back to them.
///
/// # Errors
/// Fails on an entry that cannot be translated; the copy is of no use then.
pub fn normalise(
    table: &mut Page,
    level: u8,
    pfn_of: impl FnMut(Mfn) -> Option<Pfn>,
) -> Result<(), PageTableError> {
    if level == 4 {
        let (entries, _) = table.as_chunks_mut::<8>();
        entries[XEN_L4_ENTRIES].fill([0; 8]);
    }
    translate(table, level, pfn_of)
}

/// Rewrites a normalised table from pfns to mfns, in place: what restoring does. Xen's entries of
/// an L4 table are left zero.
///
/// # Errors
/// Fails on an entry that cannot be translated; the copy is of no use then.
pub fn localise(
    table: &mut Page,
    level: u8,
    mfn_of: impl FnMut(Pfn) -> Option<Mfn>,
) -> Result<(), PageTableError> {
    translate(table, level, mfn_of)
}

fn translate(
    table: &mut Page,
    level: u8,
    mut other: impl FnMut(u64) -> Option<u64>,
) -> Result<(), PageTableError> {
    if !(1..=4).contains(&level) {
        return Err(PageTableError::Level(level));
    }
    let (entries, _) = table.as_chunks_mut::<8>();
    for (index, bytes) in entries.iter_mut().enumerate() {
        let entry = u64::from_le_bytes(*bytes);
        if entry & PRESENT == 0 {
            continue;
        }
        // In an L1 table the same bit selects a kind of caching.
        if level > 1 && entry & SUPERPAGE != 0 {
            return Err(PageTableError::Superpage { index });
        }
        let from = frame(entry);
        match other(from) {
            Some(to) if to < MAX_FRAMES => *bytes = with_frame(entry, to).to_le_bytes(),
            _ => return Err(PageTableError::Untranslatable { index, frame: from }),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::PAGE_SIZE;
    use proptest::prelude::*;

    const ENTRIES: usize = 512;

    fn table(entries: &[(usize, u64)]) -> Page {
        let mut table = [0; PAGE_SIZE];
        for (index, entry) in entries {
            table[index * 8..index * 8 + 8].copy_from_slice(&entry.to_le_bytes());
        }
        table
    }

    fn entry(table: &Page, index: usize) -> u64 {
        u64::from_le_bytes(table[index * 8..index * 8 + 8].try_into().unwrap())
    }

    /// A way there and back between frame numbers that no arithmetic of the code resembles.
    fn there(pfn: Pfn) -> Option<Mfn> {
        (pfn < MAX_FRAMES).then_some((pfn ^ 0x5a_1234_5678) & (MAX_FRAMES - 1))
    }

    #[test]
    fn flags_and_absent_entries_are_kept() {
        // Present, writable, user, accessed, dirty, NX and available bits.
        let flags = 0xfff0_0000_0000_0e67;
        let absent = 0xffff_ffff_ffff_fffe;
        let mut it = table(&[
            (0, flags | 0x1234_5000),
            (1, absent),
            (511, 0x80_0000_0000_0001),
        ]);
        normalise(&mut it, 1, |mfn| Some(mfn + 1)).unwrap();
        assert_eq!(entry(&it, 0), flags | 0x1234_6000);
        assert_eq!(entry(&it, 1), absent);
        assert_eq!(entry(&it, 511), 0x80_0000_0000_1001);
        assert_eq!(entry(&it, 2), 0);
    }

    #[test]
    fn xens_entries_vanish_from_l4_only() {
        let all: Vec<_> = (0..ENTRIES)
            .map(|index| (index, 0x7000 | PRESENT))
            .collect();
        for level in 1..=4 {
            let mut it = table(&all);
            normalise(&mut it, level, |_| Some(9)).unwrap();
            for index in 0..ENTRIES {
                let zeroed = level == 4 && (256..272).contains(&index);
                assert_eq!(entry(&it, index), if zeroed { 0 } else { 0x9001 });
            }
        }
        // Xen's entries hold Xen's frames, and map superpages: nobody may ask for them.
        let mut it = table(&[(256, 0x7000 | PRESENT), (271, 0x8000 | PRESENT | SUPERPAGE)]);
        normalise(&mut it, 4, |_| None).unwrap();
        assert_eq!(it, [0; PAGE_SIZE]);
    }

    #[test]
    fn what_cannot_be_translated_is_told() {
        let mut it = table(&[(3, 0x5001), (7, 0x6001)]);
        let error = normalise(&mut it, 1, |mfn| (mfn == 5).then_some(1)).unwrap_err();
        assert_eq!(error, PageTableError::Untranslatable { index: 7, frame: 6 });
        // An answer that no entry can hold.
        let mut it = table(&[(0, 0x5001)]);
        assert!(normalise(&mut it, 1, |_| Some(MAX_FRAMES)).is_err());
        assert!(normalise(&mut it, 1, |_| Some(u64::MAX)).is_err());
    }

    #[test]
    fn superpages_are_refused_above_l1() {
        for level in 1..=4 {
            let mut it = table(&[(2, 0x20_0000 | PRESENT | SUPERPAGE)]);
            let result = normalise(&mut it, level, Some);
            if level == 1 {
                assert_eq!(result, Ok(()));
            } else {
                assert_eq!(result, Err(PageTableError::Superpage { index: 2 }));
            }
            // An absent entry maps nothing.
            let mut it = table(&[(2, 0x20_0000 | SUPERPAGE)]);
            assert_eq!(normalise(&mut it, level, |_| None), Ok(()));
        }
    }

    #[test]
    fn only_four_levels_are_known() {
        for level in [0, 5, 9, 255] {
            let mut it = [0; PAGE_SIZE];
            assert_eq!(
                normalise(&mut it, level, Some),
                Err(PageTableError::Level(level))
            );
            assert_eq!(
                localise(&mut it, level, Some),
                Err(PageTableError::Level(level))
            );
        }
    }

    proptest! {
        #[test]
        fn what_was_localised_normalises_to_the_same(
            entries in proptest::collection::vec((0..ENTRIES, any::<u64>()), 0..300),
            level in 1u8..=4,
        ) {
            let mut normalised = table(&entries
                .into_iter()
                .filter(|(index, _)| level < 4 || !XEN_L4_ENTRIES.contains(index))
                .map(|(index, entry)| (index, if level > 1 { entry & !SUPERPAGE } else { entry }))
                .collect::<Vec<_>>());
            let before = normalised;
            localise(&mut normalised, level, there).unwrap();
            if level == 4 {
                // The destination's Xen has put its own mappings in by then.
                let xen = table(&[(256, 0xdead_b0e3), (270, 0xbeef_0063)]);
                for index in XEN_L4_ENTRIES {
                    normalised[index * 8..index * 8 + 8]
                        .copy_from_slice(&xen[index * 8..index * 8 + 8]);
                }
            }
            normalise(&mut normalised, level, there).unwrap();
            prop_assert!(normalised == before);
        }

        #[test]
        fn any_bytes_are_handled(bytes in proptest::collection::vec(any::<u8>(), PAGE_SIZE), level: u8) {
            let mut table: Page = bytes.try_into().unwrap();
            let _ = normalise(&mut table, level % 6, |mfn| mfn.is_multiple_of(2).then_some(mfn));
        }
    }
}
