//! The content of pages that are rewritten, as the destination has it.
//!
//! A round goes over the dirty pages once, in ascending order. Dropping what was used longest ago
//! would do the worst here: of a working set that is a little too large, each page would be gone
//! right before it is needed again. But the order also tells what is not needed: a page that the
//! round has passed over was not dirty.
//!
//! ```text
//!   pfn      0 ------------------> here ------------------------>
//!   kept     a    b        c         |     d      e
//!            |    |        |         |
//!            sent |        sent      not known yet: stay
//!                 passed over: room for what is sent here
//! ```
//!
//! Pages are taken in while there is room. When there is none, only those that the destination
//! had already are: they are dirty again, and may be so once more. They take the place of a page
//! that was passed over: at once if that was sent only once since it is kept, in the second round
//! if it was sent again.

use super::store::{PageStore, Place};
use crate::pages::{PAGE_SIZE, Page, Pfn};
use std::collections::BTreeMap;

pub(super) struct HotPages {
    /// The most pages that are kept.
    most: usize,
    pages: BTreeMap<Pfn, Hot>,
    contents: PageStore,
    round: u32,
    /// Pages below are known to stay in this round.
    looked_at: Pfn,
}

struct Hot {
    content: Place,
    /// The round in which it was sent last.
    sent: u32,
    /// Whether it was sent again since it is kept.
    again: bool,
}

impl HotPages {
    pub(super) fn new(bytes: usize) -> Self {
        HotPages {
            most: bytes / PAGE_SIZE,
            pages: BTreeMap::new(),
            contents: PageStore::default(),
            round: 0,
            looked_at: 0,
        }
    }

    pub(super) fn begin_round(&mut self) {
        self.round = self.round.saturating_add(1);
        self.looked_at = 0;
    }

    pub(super) fn get(&self, pfn: Pfn) -> Option<&Page> {
        self.contents.get(self.pages.get(&pfn)?.content)
    }

    /// The destination has this content now. `again` says that it had another one before.
    pub(super) fn keep(&mut self, pfn: Pfn, content: &Page, again: bool) {
        if let Some(hot) = self.pages.get_mut(&pfn) {
            self.contents.set(hot.content, content);
            hot.sent = self.round;
            hot.again = true;
            return;
        }
        if self.pages.len() >= self.most && !(again && self.make_room(pfn)) {
            return;
        }
        // Without memory for it, it crosses whole the next time.
        if let Some(content) = self.contents.put(content) {
            let hot = Hot {
                content,
                sent: self.round,
                again: false,
            };
            self.pages.insert(pfn, hot);
        }
    }

    /// The destination has something else now, that no page will be compared with.
    pub(super) fn forget(&mut self, pfn: Pfn) {
        if let Some(hot) = self.pages.remove(&pfn) {
            self.contents.free(hot.content);
        }
    }

    /// Drops a page that the round has passed over before it came to `pfn`, if there is one.
    fn make_room(&mut self, pfn: Pfn) -> bool {
        if pfn < self.looked_at {
            return false;
        }
        let round = self.round;
        let cold = self
            .pages
            .range(self.looked_at..pfn)
            .find(|(_, hot)| hot.sent + u32::from(hot.again) < round)
            .map(|(cold, _)| *cold);
        // No page is looked at twice in a round, however many ask for room.
        self.looked_at = cold.unwrap_or(pfn);
        if let Some(cold) = cold {
            self.forget(cold);
        }
        cold.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(hot: &mut HotPages, pfns: impl IntoIterator<Item = Pfn>, again: bool) -> usize {
        hot.begin_round();
        let mut hits = 0;
        for pfn in pfns {
            hits += usize::from(hot.get(pfn).is_some());
            hot.keep(pfn, &[pfn as u8; PAGE_SIZE], again);
            assert!(hot.pages.len() <= hot.most);
            assert!(hot.get(pfn).is_none_or(|page| page[0] == pfn as u8));
        }
        hits
    }

    #[test]
    fn a_working_set_replaces_what_the_first_round_left() {
        let mut hot = HotPages::new(100 * PAGE_SIZE);
        assert_eq!(round(&mut hot, 0..1000, false), 0);
        assert_eq!(hot.pages.len(), 100);
        assert_eq!(round(&mut hot, 500..590, true), 0);
        for _ in 0..5 {
            assert_eq!(round(&mut hot, 500..590, true), 90);
        }
        // Another one takes its place within two rounds.
        for _ in 0..2 {
            round(&mut hot, 700..790, true);
        }
        assert_eq!(round(&mut hot, 700..790, true), 90);
    }

    #[test]
    fn a_working_set_that_is_too_large_is_kept_in_part() {
        let mut hot = HotPages::new(100 * PAGE_SIZE);
        round(&mut hot, 0..150, false);
        for _ in 0..5 {
            assert_eq!(round(&mut hot, 0..150, true), 100);
            assert_eq!(hot.looked_at, 149);
        }
    }

    #[test]
    fn one_quiet_round_drops_nothing_that_was_hot() {
        let mut hot = HotPages::new(10 * PAGE_SIZE);
        round(&mut hot, 0..10, false);
        round(&mut hot, 0..10, true);
        round(&mut hot, 50..60, true);
        assert_eq!(round(&mut hot, 0..10, true), 10);
    }

    #[test]
    fn nothing_is_kept_without_room() {
        let mut hot = HotPages::new(PAGE_SIZE - 1);
        for _ in 0..3 {
            assert_eq!(round(&mut hot, 0..9, true), 0);
        }
    }

    #[test]
    fn what_is_forgotten_is_gone() {
        let mut hot = HotPages::new(2 * PAGE_SIZE);
        round(&mut hot, [4], false);
        assert_eq!(hot.get(4), Some(&[4; PAGE_SIZE]));
        hot.forget(4);
        assert_eq!(hot.get(4), None);
        // Pages in any order do no harm.
        round(&mut hot, [9, 3, 8, 1, 1, 7], true);
    }
}
