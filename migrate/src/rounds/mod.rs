//! When to go on copying a running guest, and when to suspend it.
//!
//! Pure policies over what each round has shown. A round sends what was dirty; meanwhile the
//! guest dirties more. Pre-copy pays while what is left keeps falling.
//!
//! ```text
//! round 1: everything    round 2: dirtied during 1    ...    suspend    last: what is left
//! ```
//!
//! [`decide`] suspends when what is left would cross within the downtime target, when there is
//! next to nothing left, or when further rounds gain nothing (CloudNet's smart stop, VEE'11: once
//! what is left stops falling, the newest minimum is the moment).

mod prediction;

pub use prediction::{FixedCost, Forecast, InRound, Meter, Outlook};

use std::time::Duration;

use serde::Serialize;

/// With this few pages left a further round can't be shorter.
pub const FEW_PAGES: u64 = 50;

/// What the operator asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// How long the last round may take on the link.
    pub downtime: Duration,
    /// After this many rounds the guest is suspended whatever is left. At least 1.
    pub rounds: u32,
    /// How many rounds may pass without a new minimum of what is left.
    pub window: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            downtime: Duration::from_millis(300),
            rounds: 12,
            window: 3,
        }
    }
}

/// What a round has shown.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct RoundFacts {
    /// Pages that crossed, zero pages included.
    pub sent: u64,
    /// Pages known, or expected, to be dirty at its end.
    pub left: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// How long it took.
    #[serde(with = "seconds")]
    pub took: Duration,
}

/// Durations as seconds, as users see them.
pub(crate) mod seconds {
    use serde::Serializer;
    use std::time::Duration;

    pub fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64((value.as_secs_f64() * 1e4).round() / 1e4)
    }
}

/// Why the guest is suspended now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stop {
    /// What is left crosses within the downtime target.
    DowntimeTarget,
    /// Next to nothing is left.
    FewPages,
    /// What is left no longer falls.
    NoProgress,
    /// The limit of rounds is reached.
    Rounds,
}

/// How long `pages` would take on the link at the rate the rounds have shown.
pub fn predict(history: &[RoundFacts], pages: u64) -> Option<Duration> {
    // The newest rounds tell most: their pages are the hot ones, which compress worse.
    let recent = history.iter().rev().filter(|round| round.sent > 0).take(2);
    let (sent, took) = recent.fold((0u64, Duration::ZERO), |(sent, took), round| {
        (sent + round.sent, took + round.took)
    });
    if sent == 0 {
        None
    } else {
        // Out of range where nothing is known of what is left.
        Duration::try_from_secs_f64(took.as_secs_f64() * (pages as f64 / sent as f64)).ok()
    }
}

/// Whether to suspend after the last round of `history`, and why.
pub fn decide(history: &[RoundFacts], limits: &Limits) -> Option<Stop> {
    let last = history.last()?;
    if last.left <= FEW_PAGES {
        return Some(Stop::FewPages);
    }
    if predict(history, last.left).is_some_and(|time| time <= limits.downtime) {
        return Some(Stop::DowntimeTarget);
    }
    if history.len() >= limits.rounds as usize {
        return Some(Stop::Rounds);
    }
    no_progress(history, limits.window).then_some(Stop::NoProgress)
}

/// Over the last `window` rounds nothing came noticeably below what was left before them, and the
/// newest is as low as it has been since.
fn no_progress(history: &[RoundFacts], window: usize) -> bool {
    let Some(start) = history.len().checked_sub(window).filter(|start| *start > 0) else {
        return false;
    };
    let before = history[..start]
        .iter()
        .map(|round| round.left)
        .min()
        .unwrap_or(u64::MAX);
    let recent = &history[start..];
    let lowest = recent
        .iter()
        .map(|round| round.left)
        .min()
        .unwrap_or(u64::MAX);
    let newest = recent.last().map_or(u64::MAX, |round| round.left);
    // A tenth less is progress; the newest may be a twentieth above the lowest.
    lowest.saturating_mul(10) >= before.saturating_mul(9)
        && newest.saturating_mul(20) <= lowest.saturating_mul(21)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(sent: u64, left: u64) -> RoundFacts {
        RoundFacts {
            sent,
            left,
            wire_bytes: sent * 4096,
            took: Duration::from_micros(sent * 650),
        }
    }

    fn stop_of(lefts: &[u64]) -> (usize, Option<Stop>) {
        let limits = Limits::default();
        let mut history = Vec::new();
        let mut sent = 32_768;
        for (number, left) in lefts.iter().enumerate() {
            history.push(round(sent, *left));
            if let Some(stop) = decide(&history, &limits) {
                return (number + 1, Some(stop));
            }
            sent = *left;
        }
        (lefts.len(), None)
    }

    #[test]
    fn an_idle_guest_is_suspended_after_the_first_round() {
        assert_eq!(stop_of(&[30]), (1, Some(Stop::FewPages)));
        assert_eq!(stop_of(&[400]), (1, Some(Stop::DowntimeTarget)));
    }

    #[test]
    fn falling_work_goes_on() {
        assert_eq!(stop_of(&[9000, 5000, 2500, 1200]), (4, None));
        assert_eq!(
            stop_of(&[9000, 5000, 2500, 1200, 460]),
            (5, Some(Stop::DowntimeTarget))
        );
    }

    #[test]
    fn a_working_set_that_is_always_rewritten_stops_soon() {
        assert_eq!(
            stop_of(&[2048, 2048, 2048, 2048, 2048]),
            (4, Some(Stop::NoProgress))
        );
    }

    #[test]
    fn a_peak_is_waited_out() {
        // At round 4 the newest is far above the window's lowest: not the moment.
        assert_eq!(
            stop_of(&[2048, 2048, 2048, 4000, 2048]),
            (5, Some(Stop::NoProgress))
        );
    }

    #[test]
    fn it_always_ends() {
        let wild: Vec<u64> = (0..40).map(|n| 3000 + (n * 7919) % 5000).collect();
        let (rounds, stop) = stop_of(&wild);
        assert!(rounds <= 12 && stop.is_some());
    }

    #[test]
    fn nothing_sent_predicts_nothing() {
        assert_eq!(predict(&[], 10), None);
        assert_eq!(predict(&[round(0, 10)], 10), None);
    }
}
