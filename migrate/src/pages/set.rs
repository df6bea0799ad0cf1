//! Sets of pages: the dirty bitmap.

use super::Pfn;
use std::fmt;
use std::ops::Range;

const BITS: u64 = u64::BITS as u64;

/// A set of the pages 0 to `pages - 1` of a guest, one bit each in 64-bit words.
///
/// Bit `n` of word `w` stands for page `64 * w + n`: the layout of Xen's log-dirty bitmap on
/// x86-64. Nothing here goes over the bits one by one: empty words are skipped whole, and in the
/// others the next bit is found by one instruction.
///
/// Bits above `pages` in the last word are always zero.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

/// The words that `pages` bits need.
fn words_for(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(BITS)).expect("A set of pages fits the address space")
}

/// The word of a page, and its bit therein.
fn place(pfn: Pfn) -> (usize, u64) {
    (
        usize::try_from(pfn / BITS).unwrap_or(usize::MAX),
        1 << (pfn % BITS),
    )
}

impl PageSet {
    /// The empty set of a guest with that many pages.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        Self {
            words: vec![0; words_for(pages)],
            pages,
        }
    }

    /// The set of all pages of a guest.
    #[must_use]
    pub fn full(pages: u64) -> Self {
        let mut set = Self::new(pages);
        set.fill();
        set
    }

    /// The set that a bitmap describes, as Xen returns it. Missing words count as zero, and bits
    /// above `pages` are dropped.
    #[must_use]
    pub fn from_words(words: &[u64], pages: u64) -> Self {
        let mut words = words.to_vec();
        words.resize(words_for(pages), 0);
        let mut set = Self { words, pages };
        set.mask_tail();
        set
    }

    /// The number of pages of the guest: one more than the highest pfn that fits.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The bitmap.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Gives the set another size. Pages that no longer fit are dropped.
    pub fn resize(&mut self, pages: u64) {
        self.words.resize(words_for(pages), 0);
        self.pages = pages;
        self.mask_tail();
    }

    /// Adds a page, and tells whether it was new.
    ///
    /// # Panics
    /// When the pfn is not below [`pages`](Self::pages): a page that cannot be marked is a write
    /// of the guest's that would be lost.
    pub fn insert(&mut self, pfn: Pfn) -> bool {
        assert!(
            pfn < self.pages,
            "Page {pfn:#x} is outside a set of {:#x} pages",
            self.pages
        );
        let (word, bit) = place(pfn);
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        new
    }

    /// Takes a page out, and tells whether it was in.
    pub fn remove(&mut self, pfn: Pfn) -> bool {
        let (word, bit) = place(pfn);
        self.words.get_mut(word).is_some_and(|word| {
            let was_in = *word & bit != 0;
            *word &= !bit;
            was_in
        })
    }

    /// Whether a page is in the set.
    #[must_use]
    pub fn contains(&self, pfn: Pfn) -> bool {
        let (word, bit) = place(pfn);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// How many pages are in the set. It counts them.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Takes all pages out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Puts all pages in.
    pub fn fill(&mut self) {
        self.words.fill(u64::MAX);
        self.mask_tail();
    }

    /// Adds the pages of another set, and grows to its size if it is larger.
    pub fn union_with(&mut self, other: &Self) {
        if other.pages > self.pages {
            self.resize(other.pages);
        }
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
    }

    /// Takes the pages of another set out.
    pub fn difference_with(&mut self, other: &Self) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= !other;
        }
    }

    /// Keeps only pages that another set has too.
    pub fn intersect_with(&mut self, other: &Self) {
        let shared = self.words.len().min(other.words.len());
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= other;
        }
        self.words[shared..].fill(0);
    }

    /// The pages, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Pfn> + '_ {
        self.words.iter().zip(0u64..).flat_map(|(word, at)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                (left != 0).then(|| {
                    let bit = left.trailing_zeros();
                    left &= left - 1;
                    at * BITS + u64::from(bit)
                })
            })
        })
    }

    /// The longest ranges of pages that are in, in ascending order.
    #[must_use]
    pub fn runs(&self) -> Runs<'_> {
        Runs { set: self, at: 0 }
    }

    /// The lowest page in the set that is not below `from`.
    #[must_use]
    pub fn next(&self, from: Pfn) -> Option<Pfn> {
        self.search(from, |word| word)
    }

    /// The lowest page outside the set that is not below `from`.
    fn next_gap(&self, from: Pfn) -> Pfn {
        self.search(from, |word| !word)
            .map_or(self.pages, |pfn| pfn.min(self.pages))
    }

    fn search(&self, from: Pfn, view: impl Fn(u64) -> u64) -> Option<Pfn> {
        let (first, _) = place(from);
        let mut mask = u64::MAX << (from % BITS);
        for (word, at) in self.words.get(first..)?.iter().zip(from / BITS..) {
            let found = view(*word) & mask;
            if found != 0 {
                return Some(at * BITS + u64::from(found.trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }

    /// Takes up to `max` pages out of the set, from `cursor` on, and appends them to `batch`:
    /// the set as a queue of work. Returns how many it took.
    ///
    /// A batch is always in ascending order: one that meets the end of memory ends there, and the
    /// next begins at zero. When it took nothing although `max` is not zero, the set is empty.
    pub fn take_batch(&mut self, cursor: &mut Pfn, max: usize, batch: &mut Vec<Pfn>) -> usize {
        let taken = self.take_from(cursor, max, batch);
        if taken > 0 || *cursor == 0 {
            return taken;
        }
        *cursor = 0;
        self.take_from(cursor, max, batch)
    }

    fn take_from(&mut self, cursor: &mut Pfn, max: usize, batch: &mut Vec<Pfn>) -> usize {
        let (first, _) = place(*cursor);
        let mut mask = u64::MAX << (*cursor % BITS);
        let mut taken = 0;
        for (word, at) in self.words.iter_mut().zip(0u64..).skip(first) {
            let mut found = *word & mask;
            mask = u64::MAX;
            while found != 0 {
                if taken == max {
                    *cursor = at * BITS + u64::from(found.trailing_zeros());
                    return taken;
                }
                let bit = found & found.wrapping_neg();
                batch.push(at * BITS + u64::from(bit.trailing_zeros()));
                taken += 1;
                found ^= bit;
                *word ^= bit;
            }
        }
        if taken > 0 {
            *cursor = 0;
        }
        taken
    }

    fn mask_tail(&mut self) {
        let used = self.pages % BITS;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }
}

impl Extend<Pfn> for PageSet {
    fn extend<I: IntoIterator<Item = Pfn>>(&mut self, pages: I) {
        for pfn in pages {
            self.insert(pfn);
        }
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} of {} pages)", self.len(), self.pages)
    }
}

/// The ranges of a [`PageSet`], from [`PageSet::runs`].
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    set: &'a PageSet,
    at: Pfn,
}

impl Iterator for Runs<'_> {
    type Item = Range<Pfn>;

    fn next(&mut self) -> Option<Range<Pfn>> {
        let start = self.set.next(self.at)?;
        let end = self.set.next_gap(start);
        self.at = end;
        Some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn sets() -> impl Strategy<Value = (u64, BTreeSet<u64>)> {
        (1u64..400).prop_flat_map(|pages| {
            (
                Just(pages),
                proptest::collection::btree_set(0..pages, 0..200),
            )
        })
    }

    fn set_of(pages: u64, members: &BTreeSet<u64>) -> PageSet {
        let mut set = PageSet::new(pages);
        set.extend(members.iter().copied());
        set
    }

    #[test]
    fn a_full_set_has_no_page_beyond_its_end() {
        for pages in [0, 1, 63, 64, 65, 128, 1000] {
            let set = PageSet::full(pages);
            assert_eq!(set.len(), pages);
            assert_eq!(
                set.iter().collect::<Vec<_>>(),
                (0..pages).collect::<Vec<_>>()
            );
            assert!(set.runs().eq((pages > 0).then_some(0..pages)));
            assert!(!set.contains(pages));
            assert_eq!(PageSet::from_words(&[u64::MAX; 40], pages), set);
        }
    }

    #[test]
    fn shrinking_drops_pages_for_good() {
        let mut set = PageSet::full(100);
        set.resize(70);
        set.resize(100);
        assert_eq!(set.len(), 70);
    }

    #[test]
    #[should_panic(expected = "outside a set")]
    fn a_page_that_does_not_fit_is_not_lost_in_silence() {
        PageSet::new(65).insert(65);
    }

    #[test]
    fn far_pages_are_simply_not_in() {
        let mut set = PageSet::full(10);
        assert!(!set.contains(u64::MAX));
        assert!(!set.remove(u64::MAX));
        assert_eq!(set.next(u64::MAX), None);
        let mut cursor = u64::MAX;
        let mut batch = Vec::new();
        assert_eq!(set.take_batch(&mut cursor, 4, &mut batch), 4);
        assert_eq!(batch, [0, 1, 2, 3]);
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_set_of_numbers((pages, a) in sets(), b in sets()) {
            let (other_pages, b) = b;
            let set = set_of(pages, &a);
            let other = set_of(other_pages, &b);
            prop_assert_eq!(set.len(), a.len() as u64);
            prop_assert_eq!(set.is_empty(), a.is_empty());
            prop_assert_eq!(set.iter().collect::<BTreeSet<_>>(), a.clone());
            prop_assert_eq!(PageSet::from_words(set.words(), pages), set.clone());
            for from in 0..pages + 70 {
                prop_assert_eq!(set.next(from), a.range(from..).next().copied());
                prop_assert_eq!(set.contains(from), a.contains(&from));
            }

            let mut union = set.clone();
            union.union_with(&other);
            prop_assert_eq!(union.pages(), pages.max(other_pages));
            prop_assert_eq!(union.iter().collect::<BTreeSet<_>>(), &a | &b);
            let mut difference = set.clone();
            difference.difference_with(&other);
            prop_assert_eq!(difference.iter().collect::<BTreeSet<_>>(), &a - &b);
            let mut intersection = set.clone();
            intersection.intersect_with(&other);
            prop_assert_eq!(intersection.iter().collect::<BTreeSet<_>>(), &a & &b);

            let mut emptied = set;
            for pfn in &a {
                prop_assert!(emptied.remove(*pfn));
                prop_assert!(!emptied.remove(*pfn));
            }
            prop_assert!(emptied.is_empty());
        }

        #[test]
        fn runs_are_the_longest_ranges((pages, a) in sets()) {
            let set = set_of(pages, &a);
            let runs: Vec<_> = set.runs().collect();
            let listed: Vec<_> = runs.iter().cloned().flatten().collect();
            prop_assert_eq!(listed, a.iter().copied().collect::<Vec<_>>());
            for pair in runs.windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
        }

        #[test]
        fn batches_take_every_page_once((pages, a) in sets(), start in 0u64..500, max in 1usize..80) {
            let mut set = set_of(pages, &a);
            let mut cursor = start;
            let mut taken = Vec::new();
            loop {
                let from = cursor;
                let mut batch = Vec::new();
                let count = set.take_batch(&mut cursor, max, &mut batch);
                prop_assert_eq!(count, batch.len());
                if count == 0 {
                    break;
                }
                prop_assert!(count <= max);
                prop_assert!(batch.is_sorted());
                let wrapped = a.range(from..).all(|pfn| taken.contains(pfn));
                prop_assert!(wrapped || batch[0] >= from);
                taken.extend(batch);
            }
            prop_assert!(set.is_empty());
            prop_assert_eq!(taken.len(), a.len());
            prop_assert_eq!(taken.into_iter().collect::<BTreeSet<_>>(), a);
        }
    }
}
