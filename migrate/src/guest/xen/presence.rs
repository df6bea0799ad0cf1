//! Which of a PVH guest's pfns have a page.
//!
//! ```text
//! pfns    |#######|###....|.......|  ...  |.......|....##.|
//!           look   look     only where the pages found so    look
//!                           far are fewer than the guest owns
//! ```
//!
//! Its address space is much larger than its memory: the special pages lie right below 4 GiB,
//! however small it is. The hypervisor can only be asked of each pfn. So first those are asked
//! about that lie near pages of the last time; if the guest owns no more pages than were found
//! there, that was all.

use xen_sys::DomId;

use super::host::Host;
use super::leaving::BATCH;
use crate::error::{IoContext, Result};
use crate::pages::{PageSet, PageType, Pfn};

/// Where a guest had pages the last time.
pub(super) struct Presence {
    pages: PageSet,
}

impl Presence {
    /// A guest of `pages` pfns of which nothing is known.
    pub fn nothing(pages: u64) -> Presence {
        Presence {
            pages: PageSet::new(pages),
        }
    }

    /// A guest that had these pages.
    pub fn of(pages: PageSet) -> Presence {
        Presence { pages }
    }

    /// The pages that it had.
    pub fn pages(&self) -> &PageSet {
        &self.pages
    }

    /// These are its pages.
    pub fn set(&mut self, pages: PageSet) {
        self.pages = pages;
    }

    /// The pfns that have a page now, of a guest that owns `owned` pages, all told. `ask` says of
    /// each of some pfns whether it has one.
    ///
    /// # Errors
    /// What `ask` says.
    pub fn look(&self, owned: u64, ask: impl Fn(&[Pfn]) -> Result<Vec<bool>>) -> Result<PageSet> {
        let mut found = PageSet::new(self.pages.pages());
        let blocks = || (0..self.pages.pages()).step_by(BATCH);
        let known = |first: Pfn| {
            let next = self.pages.next(first);
            next.is_some_and(|pfn| pfn < first + BATCH as u64)
        };
        for first in blocks().filter(|first| known(*first)) {
            self.look_at(first, &ask, &mut found)?;
        }
        if found.len() != owned {
            for first in blocks().filter(|first| !known(*first)) {
                self.look_at(first, &ask, &mut found)?;
            }
        }
        Ok(found)
    }

    fn look_at(
        &self,
        first: Pfn,
        ask: impl Fn(&[Pfn]) -> Result<Vec<bool>>,
        found: &mut PageSet,
    ) -> Result<()> {
        let end = self.pages.pages().min(first + BATCH as u64);
        let pfns: Vec<Pfn> = (first..end).collect();
        for (pfn, there) in pfns.iter().zip(ask(&pfns)?) {
            if there {
                found.insert(*pfn);
            }
        }
        Ok(())
    }
}

/// Says of each of at most [`BATCH`] pfns whether the hypervisor has a page of the guest's there.
pub(super) fn ask(host: &Host, domid: DomId, pfns: &[Pfn]) -> Result<Vec<bool>> {
    let mut types = pfns.to_vec();
    host.ctl()
        .page_types(domid, &mut types)
        .context(|| "Can't read the types of pages")?;
    Ok(types
        .into_iter()
        .map(|raw| PageType::from_page_frame_info(raw).is_ok_and(PageType::is_populated))
        .collect())
}

/// The pfns that are in one of two sets only.
pub(super) fn difference(before: &PageSet, now: &PageSet) -> PageSet {
    let (mut went, mut came) = (before.clone(), now.clone());
    went.difference_with(now);
    came.difference_with(before);
    came.union_with(&went);
    came
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    const PAGES: u64 = 20 * BATCH as u64 + 7;

    fn set(pfns: &BTreeSet<Pfn>) -> PageSet {
        let mut set = PageSet::new(PAGES);
        set.extend(pfns.iter().copied());
        set
    }

    /// What is found of `now` by who knows of `before`, and how many pfns were asked about.
    fn look(before: &BTreeSet<Pfn>, now: &BTreeSet<Pfn>, owned: u64) -> (PageSet, u64) {
        let asked = Cell::new(0);
        let mut presence = Presence::nothing(PAGES);
        presence.set(set(before));
        let found = presence.look(owned, |pfns| {
            assert!(pfns.len() <= BATCH);
            asked.set(asked.get() + pfns.len() as u64);
            Ok(pfns.iter().map(|pfn| now.contains(pfn)).collect())
        });
        (found.unwrap(), asked.get())
    }

    #[test]
    fn a_hole_is_looked_at_only_if_pages_are_missing() {
        let before: BTreeSet<Pfn> = (0..3000).chain([PAGES - 1]).collect();
        let (found, asked) = look(&before, &before, 3001);
        assert_eq!((found.len(), asked), (3001, 3 * BATCH as u64 + 7));
        // A page came far from all others.
        let now: BTreeSet<Pfn> = before.iter().copied().chain([9000]).collect();
        let (found, asked) = look(&before, &now, 3002);
        assert!(found.contains(9000));
        assert_eq!(asked, PAGES);
    }

    #[test]
    fn the_first_look_is_at_everything() {
        let now = BTreeSet::from([0, 5000, PAGES - 1]);
        let (found, asked) = look(&BTreeSet::new(), &now, 3);
        assert_eq!(found, set(&now));
        assert_eq!(asked, PAGES);
    }

    proptest! {
        #[test]
        fn all_pages_are_found(
            before in proptest::collection::btree_set(0..PAGES, 0..40),
            now in proptest::collection::btree_set(0..PAGES, 0..40),
            elsewhere in 0u64..2,
        ) {
            // It may own pages that have no pfn.
            let (found, _) = look(&before, &now, now.len() as u64 + elsewhere);
            prop_assert_eq!(&found, &set(&now));
            let moved: BTreeSet<Pfn> = before.symmetric_difference(&now).copied().collect();
            prop_assert_eq!(difference(&set(&before), &found), set(&moved));
        }
    }
}
