//! The page that a PV guest finds when it starts, and again when it is resumed.

use crate::{Page, raw};

/// Where the fields are that are read on a move.
pub(crate) mod offset {
    use std::mem::offset_of;

    use crate::raw::start_info;

    pub(crate) const STORE: usize = offset_of!(start_info, store_mfn);
    pub(crate) const CONSOLE: usize = offset_of!(start_info, console.domU.mfn);
}

/// Which pages the start info page of a 64-bit PV guest names as its rings.
///
/// Machine frames while the guest runs; while it is suspended it has put pfns in their place. The
/// guest can write anything there: check it before use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartInfoRings {
    /// The ring to xenstored.
    pub store: u64,
    /// The ring to the console.
    pub console: u64,
}

impl StartInfoRings {
    /// Reads a copy of the page.
    #[must_use]
    pub fn parse(start_info: &Page) -> StartInfoRings {
        StartInfoRings {
            store: super::word(start_info, offset::STORE),
            console: super::word(start_info, offset::CONSOLE),
        }
    }
}

// What is read lies within the page.
const _: () = assert!(size_of::<raw::start_info>() <= crate::PAGE_SIZE);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;

    #[test]
    fn rings_are_where_the_interface_has_them() {
        // Offsets as in the public header of Xen: 32 bytes of magic, two words, the flags, the
        // store's ring and its event channel, each in a word of its own, then the console's ring.
        let mut page = [0; PAGE_SIZE];
        for (slot, value) in [(6, 98u64), (7, 1), (8, 99), (9, 2), (10, 100)] {
            page[8 * slot..][..8].copy_from_slice(&value.to_le_bytes());
        }
        let expected = StartInfoRings {
            store: 1,
            console: 2,
        };
        assert_eq!(StartInfoRings::parse(&page), expected);
    }
}
