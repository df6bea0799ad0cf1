//! What a move will still take, from what it has shown so far.
//!
//! ```text
//!   rate of round 1, and of later rounds          pages a second, dirty ones compress worse
//!   rate at which pages are dirtied               pages a second
//!   fixed cost of a handover, from earlier moves  suspend, restore, commit
//!        |
//!        +--> downtime, if it were suspended with so much left
//!        +--> time to the end: the rounds to come, one by one, then the downtime
//! ```

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{FEW_PAGES, Limits};

/// What a handover costs whatever is left to send.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct FixedCost {
    /// Seconds from the request to suspend until the guest is suspended.
    pub suspend: f64,
    /// Seconds from the last page until the destination is ready.
    pub restore: f64,
    /// Seconds from the commit until the guest runs.
    pub commit: f64,
}

impl Default for FixedCost {
    /// Before the first move of a host.
    fn default() -> Self {
        FixedCost {
            suspend: 0.1,
            restore: 0.2,
            commit: 0.1,
        }
    }
}

impl FixedCost {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> Duration {
        let sum = self.suspend.max(0.0) + self.restore.max(0.0) + self.commit.max(0.0);
        Duration::try_from_secs_f64(sum).unwrap_or_default()
    }
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
    /// Seconds a page of memory that is sent for the first time.
    first: Option<f64>,
    /// Seconds a page that was dirtied.
    again: Option<f64>,
    /// Pages dirtied in a second.
    dirty: Option<f64>,
}

impl Forecast {
    /// So much of the newest round counts, and the rest of what was known before.
    const NEWEST: f64 = 0.6;

    /// With this fixed cost of a handover.
    #[must_use]
    pub fn new(fixed: FixedCost) -> Self {
        Forecast {
            fixed,
            first: None,
            again: None,
            dirty: None,
        }
    }

    /// A round has sent `pages` in `took`; in the first every page is new to the destination.
    pub fn sent(&mut self, first: bool, pages: u64, took: Duration) {
        if pages == 0 {
            return;
        }
        let page = took.as_secs_f64() / pages as f64;
        if first {
            self.first = Some(page);
        } else if pages > FEW_PAGES || self.again.is_none() {
            self.again = Some(blend(self.again, page));
        }
    }

    /// `pages` were dirtied within `over`.
    pub fn dirtied(&mut self, pages: u64, over: Duration) {
        let seconds = over.as_secs_f64();
        if seconds > 0.0 {
            self.dirty = Some(blend(self.dirty, pages as f64 / seconds));
        }
    }

    /// Pages dirtied in a second.
    #[must_use]
    pub fn dirty(&self) -> Option<f64> {
        self.dirty
    }

    /// How long `pages` that were dirtied take to cross.
    #[must_use]
    pub fn sending(&self, pages: u64) -> Option<Duration> {
        if pages == 0 {
            return Some(Duration::ZERO);
        }
        // Few pages of round 1 were dirtied, but until there is a second it is all that is known.
        let page = self.again.or(self.first)?;
        Duration::try_from_secs_f64(page * pages as f64).ok()
    }

    /// The guest's silence, if it were suspended with `pages` left.
    #[must_use]
    pub fn downtime(&self, pages: u64) -> Option<Duration> {
        self.sending(pages)?.checked_add(self.fixed.total())
    }

    /// All of it, in the middle of a round; `rate` is what crosses of late.
    #[must_use]
    pub fn outlook(&self, round: &InRound, limits: &Limits, rate: Option<f64>) -> Outlook {
        let dirtied = |time: Duration| (self.dirty.unwrap_or(0.0) * time.as_secs_f64()) as u64;
        let next = (round.next + dirtied(round.spent)).min(round.pages);
        let after = self.page(round).and_then(|page| {
            let time = Duration::try_from_secs_f64(page * round.left as f64).ok()?;
            let left = (next + dirtied(time)).min(round.pages);
            // In round 1 it is all that is known of the link.
            let again = self.again.or(self.first).unwrap_or(page);
            let sending = Duration::try_from_secs_f64(again * left as f64).ok()?;
            sending.checked_add(self.fixed.total())
        });
        Outlook {
            rate,
            dirty: self.dirty,
            left: Some(round.left + next),
            rest: self.rest(round, limits),
            downtime: after,
        }
    }

    /// Seconds a page of this round.
    fn page(&self, round: &InRound) -> Option<f64> {
        if round.done > 0 {
            Some(round.spent.as_secs_f64() / round.done as f64)
        } else if round.number == 1 {
            self.first
        } else {
            self.again.or(self.first)
        }
    }

    /// Until the guest runs at the destination.
    #[must_use]
    pub fn rest(&self, round: &InRound, limits: &Limits) -> Option<Duration> {
        let page = self.page(round)?;
        let again = self.again.or(self.first).unwrap_or(page);
        let dirty = self.dirty.unwrap_or(0.0);
        let mut time = page * round.left as f64;
        // No more than there are.
        let most = round.pages as f64;
        let dirtied = dirty * (round.spent.as_secs_f64() + time);
        let mut left = (round.next as f64 + dirtied).min(most);
        for _ in round.number..limits.rounds {
            if left <= FEW_PAGES as f64 || again * left <= limits.downtime.as_secs_f64() {
                break;
            }
            let took = again * left;
            let after = (dirty * took).min(most);
            if after > left * 0.9 {
                // More rounds gain nothing.
                break;
            }
            time += took;
            left = after;
        }
        let seconds = time + again * left + self.fixed.total().as_secs_f64();
        Duration::try_from_secs_f64(seconds).ok()
    }
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
    /// Pages that are known to wait for the next one.
    pub next: u64,
    /// How long it has taken.
    pub spent: Duration,
    /// All pages of the guest.
    pub pages: u64,
}

/// The newest figure counts most.
fn blend(before: Option<f64>, newest: f64) -> f64 {
    before.map_or(newest, |before| {
        before + Forecast::NEWEST * (newest - before)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn forecast() -> Forecast {
        Forecast::new(FixedCost {
            suspend: 0.1,
            restore: 0.3,
            commit: 0.1,
        })
    }

    fn seconds(duration: Option<Duration>) -> f64 {
        duration.unwrap().as_secs_f64()
    }

    #[test]
    fn the_downtime_is_what_is_left_and_the_fixed_cost() {
        let mut forecast = forecast();
        assert_eq!(forecast.downtime(10), None);
        assert_eq!(seconds(forecast.downtime(0)), 0.5);
        forecast.sent(true, 32_768, 8 * SECOND);
        assert!((seconds(forecast.downtime(4096)) - 1.5).abs() < 1e-6);
        // Dirty pages compress worse: their own rate is what counts.
        forecast.sent(false, 1000, SECOND);
        assert!((seconds(forecast.downtime(500)) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn the_newest_round_tells_most() {
        let mut forecast = forecast();
        forecast.sent(false, 1000, SECOND);
        forecast.sent(false, 1000, 2 * SECOND);
        assert!((seconds(forecast.sending(1000)) - 1.6).abs() < 1e-6);
        // A handful of pages is mostly the round trip.
        forecast.sent(false, 2, SECOND);
        assert!((seconds(forecast.sending(1000)) - 1.6).abs() < 1e-6);
    }

    fn round(number: u32, done: u64, left: u64, next: u64, spent: Duration) -> InRound {
        InRound {
            number,
            done,
            left,
            next,
            spent,
            pages: 32_768,
        }
    }

    #[test]
    fn the_rest_of_an_idle_guest_is_the_rest_of_the_round() {
        let rest = forecast().rest(&round(1, 8192, 24_576, 0, 5 * SECOND), &Limits::default());
        assert!((seconds(rest) - 15.5).abs() < 1e-6);
    }

    #[test]
    fn later_rounds_are_foretold_as_long_as_they_gain() {
        let mut forecast = forecast();
        // 2,000 pages a second cross, and a tenth of that is dirtied.
        forecast.dirtied(200, SECOND);
        let limits = Limits {
            downtime: Duration::from_millis(100),
            ..Limits::default()
        };
        // 10 s more, then 3,276 pages: 1.638 s; then 327 pages: 0.164 s; then 32: within the
        // downtime.
        let so_far = round(1, 12_768, 20_000, 0, SECOND * 6384 / 1000);
        let rest = forecast.rest(&so_far, &limits);
        assert!((seconds(rest) - 12.318).abs() < 2e-3, "{rest:?}");
        let outlook = forecast.outlook(&so_far, &limits, Some(1e6));
        assert_eq!(outlook.left, Some(21_276));
        assert_eq!(outlook.rest, rest);
        // 3,276 pages left at its end.
        assert!((seconds(outlook.downtime) - 2.138).abs() < 2e-3);
        // Faster than it crosses: no round after this one gains anything.
        let mut busy = self::forecast();
        busy.dirtied(40_000, SECOND);
        let rest = busy.rest(&round(1, 12_768, 20_000, 0, SECOND * 6384 / 1000), &limits);
        assert!(
            (seconds(rest) - (10.0 + 16.384 + 0.5)).abs() < 1e-3,
            "{rest:?}"
        );
    }

    #[test]
    fn nothing_is_foretold_of_what_was_never_seen() {
        let rest = forecast().rest(&round(1, 0, 10, 0, Duration::ZERO), &Limits::default());
        assert_eq!(rest, None);
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
