//! A table of pages as bytes: what is kept of a shadow beside its memory, and what a destination
//! tells of it.
//!
//! ```text
//!   run:   u8 kind and type | varint count | what each page of it has
//!
//!   kind   0x00  nothing is known                    -
//!          0x10  no content, by its type             -
//!          0x20  zeros                               -
//!          0x30  content                             16 B a page: its digest
//! ```
//!
//! Runs follow each other from some pfn on, without a gap. The lower half of the first byte is the
//! page's type; it is 0 where nothing is known. Half of a guest's memory is zero, mostly in long
//! runs, so a table takes 16 bytes for each page that has content, and next to nothing for others.

use crate::bytes::{Bytes, Malformed, push_varint};
use crate::digest::{Digester, PageDigest, Zeros};
use crate::guest::{PageState, PageTable};
use crate::pages::{PageType, Pfn};

/// Pages of which one message tells at most.
pub const CHUNK_PAGES: u64 = 1 << 15;

/// The most bytes that [`encode`] makes of [`CHUNK_PAGES`]: each page a run of its own.
pub const MAX_CHUNK_BYTES: usize = CHUNK_PAGES as usize * (2 + DIGEST);

const DIGEST: usize = 16;

/// Bytes that are no part of such a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Inventory is malformed")]
pub struct BadInventory;

impl From<Malformed> for BadInventory {
    fn from(_: Malformed) -> Self {
        BadInventory
    }
}

/// What a page of a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Unknown,
    NoContent(PageType),
    Zero(PageType),
    Content(PageType),
}

impl Kind {
    fn of(state: Option<PageState>, zeros: &Zeros) -> Kind {
        match state {
            None => Kind::Unknown,
            Some(state) if !state.page_type.has_data() => Kind::NoContent(state.page_type),
            Some(state) if state.digest == zeros.of(state.page_type) => Kind::Zero(state.page_type),
            Some(state) => Kind::Content(state.page_type),
        }
    }

    const fn byte(self) -> u8 {
        match self {
            Kind::Unknown => 0,
            Kind::NoContent(page_type) => 0x10 | page_type.bits(),
            Kind::Zero(page_type) => 0x20 | page_type.bits(),
            Kind::Content(page_type) => 0x30 | page_type.bits(),
        }
    }

    fn from_byte(byte: u8) -> Result<Kind, BadInventory> {
        if byte == 0 {
            return Ok(Kind::Unknown);
        }
        let page_type = PageType::from_bits(byte & 0xf).map_err(|_| BadInventory)?;
        match (byte >> 4, page_type.has_data()) {
            (1, false) => Ok(Kind::NoContent(page_type)),
            (2, true) => Ok(Kind::Zero(page_type)),
            (3, true) => Ok(Kind::Content(page_type)),
            _ => Err(BadInventory),
        }
    }
}

/// Appends what `table` has of the pfns from `first` up to `end`, which is at most its length.
pub fn encode(table: &PageTable, digester: &Digester, first: Pfn, end: Pfn, to: &mut Vec<u8>) {
    let zeros = digester.zeros();
    let end = end.min(table.pages());
    let mut at = first;
    while at < end {
        let kind = Kind::of(table.get(at), &zeros);
        let mut next = at + 1;
        while next < end && Kind::of(table.get(next), &zeros) == kind {
            next += 1;
        }
        to.push(kind.byte());
        push_varint(to, next - at);
        if matches!(kind, Kind::Content(_)) {
            for state in (at..next).filter_map(|pfn| table.get(pfn)) {
                to.extend(state.digest.0);
            }
        }
        at = next;
    }
}

/// Puts what [`encode`] made of the pfns from `first` on into `table`; the pfn after the last.
///
/// # Errors
/// [`BadInventory`] where it is malformed, or goes beyond the table. Then a part of it may be in
/// the table.
pub fn decode(
    bytes: &[u8],
    digester: &Digester,
    first: Pfn,
    table: &mut PageTable,
) -> Result<Pfn, BadInventory> {
    let zeros = digester.zeros();
    let mut from = Bytes::new(bytes);
    let mut at = first;
    while !from.is_empty() {
        let kind = Kind::from_byte(from.u8()?)?;
        let count = from.varint()?;
        let end = at
            .checked_add(count)
            .filter(|end| *end > at && *end <= table.pages())
            .ok_or(BadInventory)?;
        for pfn in at..end {
            let state = match kind {
                Kind::Unknown => None,
                Kind::NoContent(page_type) => Some(PageState {
                    page_type,
                    digest: digester.hole(page_type),
                }),
                Kind::Zero(page_type) => Some(PageState {
                    page_type,
                    digest: zeros.of(page_type),
                }),
                Kind::Content(page_type) => Some(PageState {
                    page_type,
                    digest: PageDigest(from.array()?),
                }),
            };
            match state {
                Some(state) => table.set(pfn, state),
                None => table.forget(pfn),
            }
        }
        at = end;
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DigestKey;
    use proptest::prelude::*;

    fn digester() -> Digester {
        Digester::new(&DigestKey::new([9; 32]))
    }

    fn page() -> impl Strategy<Value = Option<(PageType, u8)>> {
        // Few of each, so that there are runs.
        let types = prop_oneof![
            4 => Just(PageType::Normal),
            1 => Just(PageType::PinnedL1),
            1 => Just(PageType::Invalid),
        ];
        proptest::option::weighted(0.8, (types, 0u8..3))
    }

    fn table_of(pages: &[Option<(PageType, u8)>]) -> PageTable {
        let digester = digester();
        let mut table = PageTable::new(pages.len() as u64);
        for (pfn, page) in (0..).zip(pages) {
            if let Some((page_type, fill)) = *page {
                let digest = digester.page(page_type, &[fill; crate::pages::PAGE_SIZE]);
                table.set(pfn, PageState { page_type, digest });
            }
        }
        table
    }

    proptest! {
        #[test]
        fn what_was_known_is_known_again(pages in prop::collection::vec(page(), 1..300), cut in 0u64..300) {
            let digester = digester();
            let table = table_of(&pages);
            let cut = cut.min(table.pages());
            let mut again = PageTable::new(table.pages());
            // Whatever was known of it before.
            again.set(0, PageState { page_type: PageType::L4, digest: PageDigest([5; 16]) });
            let (mut one, mut other) = (Vec::new(), Vec::new());
            encode(&table, &digester, 0, cut, &mut one);
            encode(&table, &digester, cut, u64::MAX, &mut other);
            prop_assert_eq!(decode(&one, &digester, 0, &mut again), Ok(cut));
            prop_assert_eq!(decode(&other, &digester, cut, &mut again), Ok(table.pages()));
            for pfn in 0..table.pages() {
                prop_assert_eq!(again.get(pfn), table.get(pfn));
            }
            prop_assert!(one.len() + other.len() <= pages.len() * 18 + 18);
        }

        #[test]
        fn rubbish_is_refused_or_fits(bytes in prop::collection::vec(any::<u8>(), 0..200), first in 0u64..80) {
            let mut table = PageTable::new(64);
            if let Ok(end) = decode(&bytes, &digester(), first, &mut table) {
                prop_assert!(end <= 64 || bytes.is_empty());
            }
        }
    }

    #[test]
    fn a_run_beyond_the_guest_is_refused() {
        let mut table = PageTable::new(4);
        for bytes in [
            &[0x20u8, 5][..],
            &[0x20, 0],
            &[0x2f, 1],
            &[0x10, 1],
            &[0x30, 1, 7],
        ] {
            assert_eq!(decode(bytes, &digester(), 0, &mut table), Err(BadInventory));
        }
        let most = [
            0x20, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1,
        ];
        assert_eq!(decode(&most, &digester(), 1, &mut table), Err(BadInventory));
    }
}
