//! Pages that the destination lacks: which go in this round, which in a later one.
//!
//! ```text
//!                     the tracker's log
//!                            |
//!              in this round | read already, or not of this round
//!                 +----------+-----------+
//!                 v                      v
//!    reads <--  now  <-- a round  ---  next, of these hot: wait while the guest runs
//!      |                 begins          ^
//!      +--- can't be read while it runs -+
//! ```
//!
//! A page is *hot* if it was written in each of the last two intervals in which the log was read,
//! and the destination has had it once. Sent now it would only have to be sent again. It goes when
//! it has cooled down, or in the last round.
//!
//! Nothing is forgotten: a page that the log names is in `now` or `next` until it is read, after
//! the log was read. One that is named while it still waits in `now` need not go twice: what is
//! read later has the change in it.

use std::collections::VecDeque;
use std::time::Duration;

use crate::pages::{PageSet, Pfn};

/// What the destination lacks of a guest, as far as the log has told.
#[derive(Debug, Clone)]
pub struct Backlog {
    now: PageSet,
    next: PageSet,
    cursor: Pfn,
    /// Pages that were taken at least once, and could be read.
    had: PageSet,
    heat: Heat,
}

impl Backlog {
    /// In which these pages wait. What was written is counted over intervals of `looking`, or a
    /// little less: within a moment any page may be written by chance, or none.
    #[must_use]
    pub fn new(waiting: PageSet, looking: Duration) -> Self {
        let pages = waiting.pages();
        Backlog {
            now: PageSet::new(pages),
            next: waiting,
            cursor: 0,
            had: PageSet::new(pages),
            heat: Heat::new(pages, looking / 2),
        }
    }

    /// The log was read: `pages` may have changed over the last `over`. How many of them wait for
    /// a later round and did not before.
    pub fn written(&mut self, pages: &PageSet, over: Duration) -> u64 {
        self.heat.written(pages, over);
        self.changed(pages)
    }

    /// The same, of a tracker that doesn't know which of `pages` were written and when.
    pub fn changed(&mut self, pages: &PageSet) -> u64 {
        let before = self.next.len();
        let mut late = pages.clone();
        late.difference_with(&self.now);
        self.next.union_with(&late);
        self.next.len() - before
    }

    /// A round of the running guest begins with all that waits, but for the hot pages if `hold`.
    /// How many go, and how many are held back.
    pub fn begin_round(&mut self, hold: bool) -> (u64, u64) {
        let mut held = PageSet::new(self.next.pages());
        if hold {
            held = self.hot();
        }
        self.next.difference_with(&held);
        self.now.union_with(&self.next);
        self.next = held;
        self.cursor = 0;
        (self.now.len(), self.next.len())
    }

    /// The last round begins: all that waits goes.
    pub fn begin_last(&mut self) -> u64 {
        self.begin_round(false).0
    }

    /// Takes up to `most` pages of this round, which are to be read now, in ascending order.
    pub fn take(&mut self, most: usize, pfns: &mut Vec<Pfn>) -> usize {
        let from = pfns.len();
        let taken = self.now.take_batch(&mut self.cursor, most, pfns);
        self.had.extend(pfns.iter().skip(from).copied());
        taken
    }

    /// Some of the pages that were taken could not be read: they wait for a later round.
    pub fn deferred(&mut self, pages: &PageSet) {
        self.next.union_with(pages);
        self.had.difference_with(pages);
    }

    /// Pages of this round that were not taken yet.
    #[must_use]
    pub const fn this_round(&self) -> &PageSet {
        &self.now
    }

    /// Pages that wait for a later round: those that are not hot, and those that are.
    #[must_use]
    pub fn waiting(&self) -> (u64, u64) {
        let hot = self.hot().len();
        (self.next.len() - hot, hot)
    }

    /// How many pages the guest writes within `over`, at the least: as it was in each of the last
    /// two such whiles. None where that is not remembered.
    #[must_use]
    pub fn rewritten(&self, over: Duration) -> Option<u64> {
        self.heat.rewritten(over)
    }

    /// The guest is slower from now on: what it has written in a while tells nothing of the next.
    pub fn slowed_down(&mut self) {
        self.heat.telling = 0;
    }

    fn hot(&self) -> PageSet {
        let mut hot = self.heat.hot();
        hot.intersect_with(&self.next);
        hot.intersect_with(&self.had);
        hot
    }
}

/// So many intervals are remembered.
const INTERVALS: usize = 16;

/// Which pages were written when.
#[derive(Debug, Clone)]
struct Heat {
    /// What was written in each of the last intervals, and how long it was, the newest last.
    intervals: VecDeque<(PageSet, Duration)>,
    /// How many of these tell how fast the guest writes now.
    telling: usize,
    /// Written since.
    since: PageSet,
    /// How long that is.
    length: Duration,
    /// What is shorter is counted together.
    shortest: Duration,
}

impl Heat {
    fn new(pages: u64, shortest: Duration) -> Self {
        Heat {
            intervals: VecDeque::new(),
            telling: 0,
            since: PageSet::new(pages),
            length: Duration::ZERO,
            shortest,
        }
    }

    fn written(&mut self, pages: &PageSet, over: Duration) {
        self.since.union_with(pages);
        self.length += over;
        if self.length < self.shortest {
            return;
        }
        let oldest = match self.intervals.len() < INTERVALS {
            true => None,
            false => self.intervals.pop_front(),
        };
        let mut empty = match oldest {
            Some((pages, _)) => pages,
            None => PageSet::new(self.since.pages()),
        };
        empty.clear();
        let written = std::mem::replace(&mut self.since, empty);
        let length = std::mem::take(&mut self.length);
        self.intervals.push_back((written, length));
        self.telling = self.intervals.len().min(self.telling + 1);
    }

    /// Written in each of the last two intervals.
    fn hot(&self) -> PageSet {
        let mut newest = self.intervals.iter().rev();
        let (Some((last, _)), Some((before, _))) = (newest.next(), newest.next()) else {
            return PageSet::new(self.since.pages());
        };
        let mut hot = before.clone();
        hot.intersect_with(last);
        hot
    }

    /// The fewer of what was written in each of the last two whiles of `over`, at the least.
    fn rewritten(&self, over: Duration) -> Option<u64> {
        let mut intervals = self.intervals.iter().rev().take(self.telling);
        let mut fewest = u64::MAX;
        for _ in 0..2 {
            let (mut all, mut length) = (PageSet::new(self.since.pages()), Duration::ZERO);
            while length < over {
                let (written, took) = intervals.next()?;
                all.union_with(written);
                length += *took;
            }
            // In half of a while at least half as many are written.
            let part = over.as_secs_f64() / length.max(over).as_secs_f64();
            fewest = fewest.min((all.len() as f64 * part) as u64);
        }
        Some(fewest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn set(pages: u64, members: impl IntoIterator<Item = Pfn>) -> PageSet {
        let mut set = PageSet::new(pages);
        set.extend(members);
        set
    }

    fn take_all(backlog: &mut Backlog) -> Vec<Pfn> {
        let mut all = Vec::new();
        while backlog.take(7, &mut all) > 0 {}
        all
    }

    /// All pages have crossed once.
    fn after_round_one(pages: u64) -> Backlog {
        let mut backlog = Backlog::new(PageSet::full(pages), SECOND);
        assert_eq!(backlog.begin_round(true), (pages, 0));
        assert_eq!(take_all(&mut backlog).len() as u64, pages);
        backlog
    }

    #[test]
    fn hot_pages_wait_until_they_cool_or_for_the_last_round() {
        let mut backlog = after_round_one(100);
        backlog.written(&set(100, 0..10), SECOND);
        assert_eq!(backlog.waiting(), (10, 0));
        backlog.written(&set(100, 0..12), SECOND);
        assert_eq!(backlog.waiting(), (2, 10));
        assert_eq!(backlog.begin_round(true), (2, 10));
        assert_eq!(take_all(&mut backlog), [10, 11]);
        // Half of them cool down.
        backlog.written(&set(100, 0..5), SECOND);
        assert_eq!(backlog.waiting(), (5, 5));
        assert_eq!(backlog.begin_round(true), (5, 5));
        assert_eq!(take_all(&mut backlog), [5, 6, 7, 8, 9]);
        assert_eq!(backlog.begin_last(), 5);
        assert_eq!(take_all(&mut backlog), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn nothing_is_held_unless_asked_for() {
        let mut backlog = after_round_one(100);
        for _ in 0..3 {
            backlog.written(&set(100, 0..10), SECOND);
        }
        assert_eq!(backlog.begin_round(false), (10, 0));
    }

    #[test]
    fn what_is_written_before_it_is_read_goes_once() {
        let mut backlog = Backlog::new(PageSet::full(100), SECOND);
        backlog.begin_round(true);
        let mut pfns = Vec::new();
        backlog.take(50, &mut pfns);
        // Of these, 40 to 49 were read.
        assert_eq!(backlog.written(&set(100, 40..60), SECOND), 10);
        assert_eq!(take_all(&mut backlog).len(), 50);
        assert_eq!(backlog.begin_last(), 10);
        assert_eq!(take_all(&mut backlog), (40..50).collect::<Vec<_>>());
    }

    #[test]
    fn what_never_crossed_is_not_hot() {
        let mut backlog = Backlog::new(PageSet::full(10), SECOND);
        backlog.begin_round(true);
        take_all(&mut backlog);
        // A page table that could not be read in round 1.
        backlog.deferred(&set(10, [3]));
        for _ in 0..3 {
            backlog.written(&set(10, [3, 4]), SECOND);
        }
        assert_eq!(backlog.waiting(), (1, 1));
        assert_eq!(backlog.begin_round(true), (1, 1));
        assert_eq!(take_all(&mut backlog), [3]);
        // Now the destination has it.
        backlog.written(&set(10, [3, 4]), SECOND);
        assert_eq!(backlog.waiting(), (0, 2));
    }

    #[test]
    fn moments_are_counted_together() {
        let mut backlog = after_round_one(10);
        for _ in 0..5 {
            backlog.written(&set(10, [1]), Duration::from_millis(100));
        }
        assert_eq!(backlog.waiting(), (1, 0));
        backlog.written(&set(10, [1]), SECOND);
        assert_eq!(backlog.waiting(), (0, 1));
    }

    #[test]
    fn what_is_written_in_a_while_is_known_from_the_last_two() {
        let mut backlog = after_round_one(100);
        // Half of ten pages a second.
        let seconds = |backlog: &mut Backlog, count: u64| {
            for second in 0..count {
                let from = second % 2 * 5;
                backlog.written(&set(100, from..from + 5), SECOND);
            }
        };
        seconds(&mut backlog, 3);
        assert_eq!(backlog.waiting(), (10, 0));
        assert_eq!(backlog.rewritten(SECOND), Some(5));
        // Not known for so long.
        assert_eq!(backlog.rewritten(SECOND * 2), None);
        seconds(&mut backlog, 2);
        assert_eq!(backlog.rewritten(SECOND * 2), Some(10));
        // Not known so exactly.
        assert_eq!(backlog.rewritten(SECOND / 2), Some(2));
        // One that rests now and then may rest again.
        backlog.written(&set(100, []), SECOND);
        assert_eq!(backlog.rewritten(SECOND), Some(0));
        // What is forgotten after a while is not known.
        seconds(&mut backlog, 100);
        assert_eq!(backlog.rewritten(SECOND * 8), Some(10));
        assert_eq!(backlog.rewritten(SECOND * 9), None);
        backlog.slowed_down();
        seconds(&mut backlog, 1);
        assert_eq!(backlog.rewritten(SECOND), None);
        seconds(&mut backlog, 1);
        assert_eq!(backlog.rewritten(SECOND), Some(5));
    }

    /// A guest, the log of its tracker, and what the destination has.
    struct World {
        guest: Vec<u32>,
        log: PageSet,
        there: Vec<Option<u32>>,
        backlog: Backlog,
    }

    #[derive(Debug, Clone)]
    enum Event {
        Write(Vec<u64>),
        ReadLog(u64),
        Take(usize, Vec<u64>),
        Round(bool),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let pfns = || proptest::collection::vec(0u64..PAGES, 0..12);
        proptest::collection::vec(
            prop_oneof![
                3 => pfns().prop_map(Event::Write),
                2 => (0u64..1500).prop_map(Event::ReadLog),
                4 => (1usize..40, pfns()).prop_map(|(most, bad)| Event::Take(most, bad)),
                1 => any::<bool>().prop_map(Event::Round),
            ],
            0..120,
        )
    }

    const PAGES: u64 = 130;

    impl World {
        fn new() -> World {
            World {
                guest: vec![1; PAGES as usize],
                log: PageSet::new(PAGES),
                there: vec![None; PAGES as usize],
                backlog: Backlog::new(PageSet::full(PAGES), SECOND),
            }
        }

        fn read_log(&mut self, milliseconds: u64) {
            let written = std::mem::replace(&mut self.log, PageSet::new(PAGES));
            self.backlog
                .written(&written, Duration::from_millis(milliseconds));
        }

        fn take(&mut self, most: usize, unreadable: &[u64]) -> usize {
            let mut pfns = Vec::new();
            let taken = self.backlog.take(most, &mut pfns);
            let mut deferred = PageSet::new(PAGES);
            for pfn in pfns {
                if unreadable.contains(&pfn) {
                    deferred.insert(pfn);
                } else {
                    self.there[pfn as usize] = Some(self.guest[pfn as usize]);
                }
            }
            self.backlog.deferred(&deferred);
            taken
        }
    }

    proptest! {
        /// Law 2, whatever is written, held and deferred, and whenever the log is read.
        #[test]
        fn no_write_is_lost(events in events()) {
            let mut world = World::new();
            for event in events {
                match event {
                    Event::Write(pfns) => for pfn in pfns {
                        world.guest[pfn as usize] += 1;
                        world.log.insert(pfn);
                    },
                    Event::ReadLog(milliseconds) => world.read_log(milliseconds),
                    Event::Take(most, bad) => { world.take(most, &bad); }
                    Event::Round(hold) => {
                        let waited = world.backlog.waiting();
                        let left = world.backlog.this_round().len();
                        let (go, held) = world.backlog.begin_round(hold);
                        prop_assert_eq!(held, if hold { waited.1 } else { 0 });
                        prop_assert!(go >= left && go <= left + waited.0 + waited.1);
                        // Whoever is held back has been there, and will go again.
                        for pfn in world.backlog.next.iter() {
                            prop_assert!(world.there[pfn as usize].is_some());
                        }
                    }
                }
                // What differs is in the log or waits.
                for pfn in 0..PAGES {
                    let same = world.there[pfn as usize] == Some(world.guest[pfn as usize]);
                    let known = world.log.contains(pfn)
                        || world.backlog.now.contains(pfn)
                        || world.backlog.next.contains(pfn);
                    prop_assert!(same || known, "{pfn}");
                }
            }
            // The guest is suspended.
            world.read_log(10);
            world.backlog.begin_last();
            while world.take(33, &[]) > 0 {}
            for (there, guest) in world.there.iter().zip(&world.guest) {
                prop_assert_eq!(*there, Some(*guest));
            }
        }
    }
}
