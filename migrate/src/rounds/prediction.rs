//! What a move will still take, from what it has shown so far.
//!
//! ```text
//!   rate of round 1, and of later rounds          pages a second, dirty ones compress worse
//!   rate at which pages are dirtied               pages a second
//!   fixed cost of a handover, from earlier moves  suspend, restore, commit
//!   what looking at all memory takes              where there is no log of dirty pages
//!        |
//!        +--> downtime, if it were suspended with so much left
//!        +--> time to the end: the rounds to come, one by one, then the downtime
//! ```

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{FEW_PAGES, Limits, MOSTLY_HOT};

/// What a handover costs whatever is left to send.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct FixedCost {
    /// Seconds from the command's start until the first page crosses: no part of the silence.
    pub set_up: f64,
    /// Seconds from the request to suspend until the guest is suspended.
    pub suspend: f64,
    /// Seconds from the last page until the destination is ready.
    pub restore: f64,
    /// Seconds from the commit until the guest runs.
    pub commit: f64,
    /// Seconds from then until what it left is gone: no part of its silence.
    pub clean_up: f64,
}

impl Default for FixedCost {
    /// Before the first move of a host.
    fn default() -> Self {
        FixedCost {
            set_up: 3.0,
            suspend: 0.1,
            restore: 0.2,
            commit: 0.1,
            clean_up: 1.0,
        }
    }
}

impl FixedCost {
    /// All that the guest is silent for.
    #[must_use]
    pub fn total(&self) -> Duration {
        let sum = self.suspend.max(0.0) + self.restore.max(0.0) + self.commit.max(0.0);
        Duration::try_from_secs_f64(sum).unwrap_or_default()
    }
}

/// What a move will take, or what it took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Prediction {
    /// From the command's start to its end.
    pub seconds: f64,
    /// Bytes on the link, both ways.
    pub bytes: u64,
    /// Seconds of silence.
    pub downtime: f64,
}

/// What a round has sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sent {
    /// Whether every page was new to the destination.
    pub first: bool,
    /// Pages with content. Zero pages and holes cost next to nothing.
    pub pages: u64,
    /// Bytes on the link.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
}

/// The rest of a move, as it will probably go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Course {
    /// Until the guest runs at the destination.
    pub rest: Duration,
    /// Of that, the guest's silence.
    pub downtime: Duration,
    /// Bytes that cross till then.
    pub bytes: f64,
}

/// What a page costs.
#[derive(Debug, Clone, Copy, PartialEq)]
struct PageCost {
    seconds: f64,
    bytes: f64,
}

/// What is known of a move's future. Nothing where nothing is known.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Outlook {
    /// What crosses of late, bytes a second.
    pub rate: Option<f64>,
    /// Pages that the guest changes in a second.
    pub dirty: Option<f64>,
    /// Pages still to be looked at: the rest of this round, and what has changed since.
    pub left: Option<u64>,
    /// Until the guest runs at the destination.
    pub rest: Option<Duration>,
    /// The guest's silence, if it were suspended with what this round leaves.
    pub downtime: Option<Duration>,
}

/// Measures what passes in a second, over the last few.
#[derive(Debug, Clone, Default)]
pub struct Meter {
    samples: VecDeque<(Instant, u64)>,
}

impl Meter {
    /// Over this long.
    const WINDOW: Duration = Duration::from_secs(5);

    /// Samples that come sooner than this after the one before are not kept.
    const STEP: Duration = Duration::from_millis(50);

    /// `total` has passed by `now`, since whenever.
    pub fn note(&mut self, now: Instant, total: u64) {
        if let Some((newest, _)) = self.samples.back()
            && now.saturating_duration_since(*newest) < Self::STEP
        {
            return;
        }
        self.samples.push_back((now, total));
        // One that is older than the window stays, so that there is always a whole one.
        while let Some((second, _)) = self.samples.get(1)
            && now.saturating_duration_since(*second) >= Self::WINDOW
        {
            self.samples.pop_front();
        }
    }

    /// How much passes in a second.
    #[must_use]
    pub fn rate(&self) -> Option<f64> {
        let ((first, from), (last, to)) = (self.samples.front()?, self.samples.back()?);
        let seconds = last.saturating_duration_since(*first).as_secs_f64();
        (seconds > 0.0).then(|| to.saturating_sub(*from) as f64 / seconds)
    }
}

/// Foretells the rest of a move.
#[derive(Debug, Clone)]
pub struct Forecast {
    fixed: FixedCost,
    /// What it takes to look at all memory, where every round has to.
    looking: Duration,
    /// What it takes to compare all memory, where that was asked for.
    verifying: Duration,
    /// Of memory that is sent for the first time.
    first: Option<PageCost>,
    /// Of pages that were dirtied.
    again: Option<PageCost>,
    /// Pages written in a second.
    written: Option<f64>,
    /// Pages in a second that are dirty and were not before.
    growth: Option<f64>,
}

impl Forecast {
    /// So much of the newest round counts, and the rest of what was known before.
    const NEWEST: f64 = 0.6;

    /// With this fixed cost of a handover.
    #[must_use]
    pub fn new(fixed: FixedCost) -> Self {
        Forecast {
            fixed,
            looking: Duration::ZERO,
            verifying: Duration::ZERO,
            first: None,
            again: None,
            written: None,
            growth: None,
        }
    }

    /// What a handover costs besides what is left to send.
    #[must_use]
    pub const fn fixed(&self) -> &FixedCost {
        &self.fixed
    }

    /// Every round looks at all memory, the last one too, which takes so long.
    pub fn looks_at_all(&mut self, took: Duration) {
        self.looking = took;
    }

    /// All memory is compared while the guest is suspended, which takes so long: at both sites at
    /// the same time.
    pub fn verifies(&mut self, took: Duration) {
        self.verifying = took;
    }

    /// The guest's silence, if there were nothing left to send.
    #[must_use]
    pub fn unavoidable(&self) -> Duration {
        let looking = self.looking.saturating_add(self.verifying);
        self.fixed.total().saturating_add(looking)
    }

    /// A round has crossed. What a page costs is not told by few of them: the round trip does.
    pub fn sent(&mut self, sent: Sent) {
        if sent.pages == 0 || (sent.first && sent.pages <= FEW_PAGES) {
            return;
        }
        let pages = sent.pages as f64;
        let newest = PageCost {
            seconds: sent.took.as_secs_f64() / pages,
            bytes: sent.bytes as f64 / pages,
        };
        if sent.first {
            self.first = Some(newest);
        } else if sent.pages > FEW_PAGES || self.again.is_none() {
            let before = self.again.unwrap_or(newest);
            self.again = Some(PageCost {
                seconds: blend(before.seconds, newest.seconds),
                bytes: blend(before.bytes, newest.bytes),
            });
        }
    }

    /// `written` pages were written within `over`; `grown` of them were not dirty before.
    pub fn dirtied(&mut self, written: u64, grown: u64, over: Duration) {
        let seconds = over.as_secs_f64();
        if seconds > 0.0 {
            let note = |rate: &mut Option<f64>, pages: u64| {
                let newest = pages as f64 / seconds;
                *rate = Some(rate.map_or(newest, |before| blend(before, newest)));
            };
            note(&mut self.written, written);
            note(&mut self.growth, grown);
        }
    }

    /// What a dirty page costs. Few pages of round 1 were dirtied, but until there is another it
    /// is all that is known.
    fn dirty_page(&self) -> Option<PageCost> {
        self.again.or(self.first)
    }

    /// How long `pages` that were dirtied take to cross.
    #[must_use]
    pub fn sending(&self, pages: u64) -> Option<Duration> {
        if pages == 0 {
            return Some(Duration::ZERO);
        }
        seconds(self.dirty_page()?.seconds * pages as f64)
    }

    /// The guest's silence, if it were suspended with `pages` left.
    #[must_use]
    pub fn downtime(&self, pages: u64) -> Option<Duration> {
        self.sending(pages)?.checked_add(self.unavoidable())
    }

    /// All of it, in the middle of a round; `rate` is what crosses of late.
    #[must_use]
    pub fn outlook(&self, round: &InRound, limits: &Limits, rate: Option<f64>) -> Outlook {
        let page = self.page(round);
        let next = self.next(round, Duration::ZERO);
        let downtime = page.and_then(|page| {
            let left = self.next(round, seconds(page.seconds * round.left as f64)?);
            let again = self.dirty_page().unwrap_or(page);
            let left = left + round.hot as f64;
            seconds(again.seconds * left)?.checked_add(self.unavoidable())
        });
        Outlook {
            rate,
            dirty: self.written,
            left: Some(round.left + round.hot + next as u64),
            rest: self.course(round, limits).map(|course| course.rest),
            downtime,
        }
    }

    /// All of it, in the middle of the last round, with the guest `silent` for so long. Nothing more
    /// is dirtied, and no round follows.
    #[must_use]
    pub fn last(&self, round: &InRound, silent: Duration, rate: Option<f64>) -> Outlook {
        let rest = self.page(round).and_then(|page| {
            let crossing = seconds(page.seconds * round.left as f64)?;
            let handover = self.fixed.restore.max(0.0) + self.fixed.commit.max(0.0);
            let rest = crossing.checked_add(seconds(handover)?)?;
            rest.checked_add(self.verifying)
        });
        Outlook {
            rate,
            dirty: self.written,
            left: Some(round.left),
            rest,
            downtime: rest.and_then(|rest| rest.checked_add(silent)),
        }
    }

    /// What a page of this round costs.
    fn page(&self, round: &InRound) -> Option<PageCost> {
        if round.done > 0 {
            Some(PageCost {
                seconds: round.spent.as_secs_f64() / round.done as f64,
                bytes: round.bytes as f64 / round.done as f64,
            })
        } else if round.number == 1 {
            self.first
        } else {
            self.dirty_page()
        }
    }

    /// Pages that wait for the next round after so much more of this one. No more than there are.
    fn next(&self, round: &InRound, time: Duration) -> f64 {
        let grown = self.growth.unwrap_or(0.0) * (round.unseen + time).as_secs_f64();
        (round.next as f64 + grown).min(round.pages as f64)
    }

    /// How the rest of the move will go: the rounds to come, one by one, and the handover.
    #[must_use]
    pub fn course(&self, round: &InRound, limits: &Limits) -> Option<Course> {
        let page = self.page(round)?;
        let again = self.dirty_page().unwrap_or(page);
        let budget = limits.last_round(self.unavoidable()).as_secs_f64();
        let growth = self.growth.unwrap_or(0.0);
        let hot = round.hot as f64;
        let mut time = page.seconds * round.left as f64;
        let mut bytes = page.bytes * round.left as f64;
        let mut cold = self.next(round, seconds(time)?);
        for _ in round.number..limits.rounds {
            let left = cold + hot;
            if left <= FEW_PAGES as f64 || again.seconds * left <= budget {
                break;
            }
            let holds = hot > 0.0 && again.seconds * left * 2.0 >= limits.looking.as_secs_f64();
            let goes = if holds { cold } else { left };
            let took = again.seconds * goes + self.looking.as_secs_f64();
            let after = (growth * took).min(round.pages as f64);
            // Further rounds gain nothing.
            if (holds && cold <= (hot / MOSTLY_HOT as f64).max(FEW_PAGES as f64))
                || after > goes * 0.9
            {
                break;
            }
            time += took;
            bytes += again.bytes * goes;
            cold = after;
        }
        let left = cold + hot;
        let downtime = again.seconds * left + self.unavoidable().as_secs_f64();
        Some(Course {
            rest: seconds(time + downtime)?,
            downtime: seconds(downtime)?,
            bytes: bytes + again.bytes * left,
        })
    }
}

/// Nothing of what is no time, or too long for one.
fn seconds(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds).ok()
}

/// How far a round is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InRound {
    /// Its number, from 1.
    pub number: u32,
    /// Pages of it that were looked at.
    pub done: u64,
    /// Pages of it that were not.
    pub left: u64,
    /// Pages that are known to wait for the next one, but for the hot ones.
    pub next: u64,
    /// Hot pages that wait.
    pub hot: u64,
    /// For how long nobody has looked which do.
    pub unseen: Duration,
    /// How long it has taken.
    pub spent: Duration,
    /// Bytes that it has put on the link.
    pub bytes: u64,
    /// All pages of the guest.
    pub pages: u64,
}

/// The newest figure counts most.
fn blend(before: f64, newest: f64) -> f64 {
    before + Forecast::NEWEST * (newest - before)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn forecast() -> Forecast {
        Forecast::new(FixedCost {
            set_up: 0.0,
            suspend: 0.1,
            restore: 0.3,
            commit: 0.1,
            clean_up: 0.0,
        })
    }

    fn sent(first: bool, pages: u64, took: Duration) -> Sent {
        Sent {
            first,
            pages,
            bytes: pages * 1000,
            took,
        }
    }

    fn close(duration: Option<Duration>, to: f64) {
        let is = duration.unwrap().as_secs_f64();
        assert!((is - to).abs() < 2e-3, "{is}, not {to}");
    }

    #[test]
    fn the_downtime_is_what_is_left_and_the_fixed_cost() {
        let mut forecast = forecast();
        assert_eq!(forecast.downtime(10), None);
        close(forecast.downtime(0), 0.5);
        forecast.sent(sent(true, 32_768, 8 * SECOND));
        close(forecast.downtime(4096), 1.5);
        // Dirty pages compress worse: their own rate is what counts.
        forecast.sent(sent(false, 1000, SECOND));
        close(forecast.downtime(500), 1.0);
    }

    #[test]
    fn all_memory_is_compared_in_the_silence() {
        let mut forecast = forecast();
        forecast.verifies(2 * SECOND);
        close(forecast.downtime(0), 2.5);
    }

    #[test]
    fn nothing_comes_after_the_last_round() {
        let mut forecast = forecast();
        forecast.sent(sent(true, 32_768, 8 * SECOND));
        forecast.dirtied(1000, 1000, SECOND);
        let round = InRound {
            number: 2,
            done: 1000,
            left: 2000,
            next: 0,
            hot: 0,
            unseen: 9 * SECOND,
            spent: SECOND,
            bytes: 1_000_000,
            pages: 32_768,
        };
        let outlook = forecast.last(&round, 3 * SECOND, None);
        assert_eq!(outlook.left, Some(2000));
        // The rest of the round, the restore and the commit.
        close(outlook.rest, 2.4);
        close(outlook.downtime, 5.4);
    }

    #[test]
    fn few_pages_tell_nothing_of_the_first_round() {
        let mut forecast = forecast();
        forecast.sent(sent(true, FEW_PAGES, SECOND));
        assert_eq!(forecast.downtime(1), None);
        forecast.sent(sent(true, FEW_PAGES + 1, SECOND));
        assert!(forecast.downtime(1).is_some());
    }

    #[test]
    fn without_a_log_the_last_round_looks_at_all_memory() {
        let mut forecast = forecast();
        forecast.looks_at_all(3 * SECOND);
        forecast.sent(sent(true, 32_768, 8 * SECOND));
        close(forecast.downtime(4096), 4.5);
        // And so does every round before it: 600 pages a second are dirtied, 1,800 within 3 s,
        // which is as many as a further round would leave.
        forecast.dirtied(600, 600, SECOND);
        let so_far = InRound {
            next: 1800,
            unseen: Duration::ZERO,
            ..in_round_one(32_768)
        };
        let course = forecast.course(&so_far, &Limits::default()).unwrap();
        close(Some(course.downtime), 3.5 + 1800.0 / 4096.0);
        assert_eq!(course.rest, course.downtime);
    }

    #[test]
    fn the_newest_round_tells_most() {
        let mut forecast = forecast();
        forecast.sent(sent(false, 1000, SECOND));
        forecast.sent(sent(false, 1000, 2 * SECOND));
        close(forecast.sending(1000), 1.6);
        // A handful of pages is mostly the round trip.
        forecast.sent(sent(false, 2, SECOND));
        close(forecast.sending(1000), 1.6);
    }

    /// 2,000 pages a second.
    fn in_round_one(done: u64) -> InRound {
        InRound {
            number: 1,
            done,
            left: 32_768 - done,
            next: 0,
            hot: 0,
            unseen: SECOND * done as u32 / 2000,
            spent: SECOND * done as u32 / 2000,
            bytes: done * 1000,
            pages: 32_768,
        }
    }

    #[test]
    fn the_rest_of_an_idle_guest_is_the_rest_of_the_round() {
        let course = forecast()
            .course(&in_round_one(12_768), &Limits::default())
            .unwrap();
        close(Some(course.rest), 10.5);
        close(Some(course.downtime), 0.5);
        assert!((course.bytes - 20e6).abs() < 1.0);
    }

    #[test]
    fn later_rounds_are_foretold_as_long_as_they_gain() {
        let mut forecast = forecast();
        // 2,000 pages a second cross, and a tenth of that is dirtied.
        forecast.dirtied(250, 200, SECOND);
        let limits = Limits::default();
        // 10 s more, then 3,276 pages: 1.638 s; then 327 pages: 0.164 s; then 32, which cross
        // within a third of the downtime.
        let so_far = in_round_one(12_768);
        let course = forecast.course(&so_far, &limits).unwrap();
        close(Some(course.rest), 12.318);
        let outlook = forecast.outlook(&so_far, &limits, Some(1e6));
        assert_eq!(outlook.left, Some(21_276));
        assert_eq!(outlook.dirty, Some(250.0));
        assert_eq!(outlook.rest, Some(course.rest));
        // With the 3,276 pages that are left at its end.
        close(outlook.downtime, 2.138);
        // Faster than it crosses: no round after this one gains anything.
        let mut busy = self::forecast();
        busy.dirtied(40_000, 40_000, SECOND);
        let course = busy.course(&so_far, &limits).unwrap();
        close(Some(course.rest), 10.0 + 16.384 + 0.5);
        close(Some(course.downtime), 16.884);
    }

    #[test]
    fn hot_pages_cross_once_more() {
        let mut forecast = forecast();
        forecast.dirtied(2248, 200, SECOND);
        let so_far = InRound {
            hot: 2000,
            ..in_round_one(12_768)
        };
        // 10 s more and the 3,276 pages that are left then, without the hot ones: 1.638 s; then
        // 327 and 2,000 pages, with more than an eighth of them not hot: 0.164 s; then 32.
        let course = forecast.course(&so_far, &Limits::default()).unwrap();
        close(Some(course.rest), 10.0 + 1.638 + 0.164 + 0.016 + 1.0 + 0.5);
        close(Some(course.downtime), 0.016 + 1.0 + 0.5);
        assert!((course.bytes - (20e6 + 5.636e6)).abs() < 1e4);
    }

    #[test]
    fn nothing_is_foretold_of_what_was_never_seen() {
        assert_eq!(
            forecast().course(&in_round_one(0), &Limits::default()),
            None
        );
    }

    #[test]
    fn a_rate_is_that_of_the_last_seconds() {
        let mut meter = Meter::default();
        let start = Instant::now();
        assert_eq!(meter.rate(), None);
        for tenth in 0..200u64 {
            // 1,000 a second for 10 s, then none.
            meter.note(
                start + Duration::from_millis(tenth * 100),
                tenth.min(100) * 100,
            );
            if tenth == 100 {
                assert!((meter.rate().unwrap() - 1000.0).abs() < 1.0);
            }
        }
        assert_eq!(meter.rate(), Some(0.0));
        assert!(meter.samples.len() <= 60);
    }
}
