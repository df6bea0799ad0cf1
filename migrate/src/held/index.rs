//! Where the destination has a content: a guess, to be checked.
//!
//! ```text
//!   content digest --> bucket of 4 pfns --> the one of which the table says that it has it
//! ```
//!
//! Entries are never removed: what is said of a pfn is asked for anew each time. So nothing has to
//! follow when a page changes, and entries that are no longer true are the first to be replaced.
//! Where all four are true the newcomer takes the place of one of them, which can then no longer
//! be referred to; that costs bytes, and nothing else.

use crate::digest::ContentDigest;
use crate::pages::Pfn;

/// Pfns in a bucket: a quarter of a cache line.
const WAYS: usize = 4;

/// No pfn: those of guests are below 2^30.
const EMPTY: u32 = u32::MAX;

/// Finds a pfn by content. It takes 4 to 8 bytes for each page of the guest, from the start.
pub(super) struct ContentIndex {
    /// As many as a power of two.
    buckets: Vec<[u32; WAYS]>,
}

impl ContentIndex {
    pub(super) fn new(pages: u64) -> Self {
        let buckets = (pages as usize).div_ceil(WAYS).next_power_of_two();
        ContentIndex {
            buckets: vec![[EMPTY; WAYS]; buckets],
        }
    }

    fn bucket(&self, digest: ContentDigest) -> usize {
        digest.bits() as usize & (self.buckets.len() - 1)
    }

    /// A pfn that has this content now, as `content_at` says.
    pub(super) fn find(
        &self,
        digest: ContentDigest,
        content_at: impl Fn(Pfn) -> Option<ContentDigest>,
    ) -> Option<Pfn> {
        self.buckets
            .get(self.bucket(digest))?
            .iter()
            .filter(|entry| **entry != EMPTY)
            .map(|entry| Pfn::from(*entry))
            .find(|pfn| content_at(*pfn) == Some(digest))
    }

    /// `pfn` has this content now.
    pub(super) fn insert(
        &mut self,
        digest: ContentDigest,
        pfn: Pfn,
        content_at: impl Fn(Pfn) -> Option<ContentDigest>,
    ) {
        let at = self.bucket(digest);
        let Ok(entry) = u32::try_from(pfn) else {
            return;
        };
        let outdated = |entry: u32| {
            let content = content_at(Pfn::from(entry));
            content.is_none_or(|content| self.bucket(content) != at)
        };
        let bucket = self.buckets[at];
        let way = bucket
            .iter()
            .position(|it| *it == entry || *it == EMPTY)
            .or_else(|| bucket.iter().position(|it| outdated(*it)))
            // Any one: bits that did not choose the bucket.
            .unwrap_or((digest.bits() >> 60) as usize % WAYS);
        self.buckets[at][way] = entry;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::{DigestKey, Digester};
    use crate::pages::{PAGE_SIZE, PageType};
    use std::collections::HashMap;

    fn contents(count: u64) -> Vec<ContentDigest> {
        let digester = Digester::new(&DigestKey::new([3; 32]));
        let mut page = [0; PAGE_SIZE];
        (0..count)
            .map(|number| {
                page[..8].copy_from_slice(&number.to_le_bytes());
                digester.content(PageType::L2, digester.page(PageType::L2, &page))
            })
            .collect()
    }

    #[test]
    fn most_contents_are_found_and_none_where_it_is_not() {
        let contents = contents(3000);
        let mut index = ContentIndex::new(4096);
        let mut held = HashMap::new();
        for (pfn, content) in (0..).zip(&contents) {
            held.insert(pfn, *content);
            index.insert(*content, pfn, |pfn| held.get(&pfn).copied());
        }
        let find = |held: &HashMap<Pfn, ContentDigest>, index: &ContentIndex| {
            contents
                .iter()
                .enumerate()
                .filter(|(pfn, content)| {
                    let found = index.find(**content, |pfn| held.get(&pfn).copied());
                    assert!(found.is_none_or(|found| found == *pfn as u64));
                    found.is_some()
                })
                .count()
        };
        let found = find(&held, &index);
        assert!(found > 2600, "{found}");
        // What is gone is not found, and makes room.
        held.retain(|pfn, _| pfn % 2 == 0);
        assert!(find(&held, &index) <= 1500);
        for (pfn, content) in (0..).zip(&contents) {
            held.insert(pfn, *content);
            index.insert(*content, pfn, |pfn| held.get(&pfn).copied());
        }
        assert!(find(&held, &index) > 2600);
    }

    #[test]
    fn a_guest_without_pages_has_an_index_all_the_same() {
        let content = contents(1)[0];
        let mut index = ContentIndex::new(0);
        assert_eq!(index.find(content, |_| Some(content)), None);
        index.insert(content, 7, |_| None);
        assert_eq!(index.find(content, |_| Some(content)), Some(7));
    }
}
