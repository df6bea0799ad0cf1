//! When to go on copying a running guest, when to suspend it, and which pages wait till then.
//!
//! Pure policies over what each round has shown. A round sends what was dirty; meanwhile the
//! guest dirties more. Pre-copy pays while what is left keeps falling.
//!
//! ```text
//! round 1: everything    round 2: dirtied during 1    ...    suspend    last: what is left
//!                        but for hot pages                              hot pages too
//! ```
//!
//! [`decide`] suspends when the silence would be as short as was asked for, when there is next to
//! nothing left, when all that is left is hot, or when further rounds gain nothing (CloudNet's
//! smart stop, VEE'11: once what is left stops falling below what was sent, the newest minimum is
//! the moment). That they would gain nothing is often known before they have gone: where the guest
//! has written, in each of the last two whiles that a round would take, as much as is left, a round
//! would leave as much. Where the operator allows it the guest is slowed down before that is
//! accepted.

mod backlog;
mod prediction;
mod remedy;
pub mod throttle;

pub use backlog::Backlog;
pub use prediction::{Course, FixedCost, Forecast, InRound, Meter, Outlook, Prediction, Sent};
pub use remedy::Remedy;
pub use throttle::Share;

use std::time::Duration;

use serde::Serialize;

/// With this few pages left a further round can't be shorter.
pub const FEW_PAGES: u64 = 50;

/// Hot pages are held back for the last round at the price of this part of them that goes with
/// them although it is not hot.
const MOSTLY_HOT: u64 = 8;

/// A part of the silence that is one in so many hardly counts.
const HARDLY: u32 = 8;

/// What the operator asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// How long the guest may be silent. Zero asks for as short a silence as rounds can make: then
    /// hot pages are not held back either.
    pub downtime: Duration,
    /// After this many rounds the guest is suspended whatever is left. At least 1.
    pub rounds: u32,
    /// How many rounds a minimum of what is left is waited for, once it no longer falls.
    pub window: usize,
    /// How often the log of dirty pages is read within a round, to learn which pages are hot.
    pub looking: Duration,
    /// How far the guest may be slowed down where that makes the silence shorter.
    pub least_share: Share,
    /// How long the guest may be suspended before the handover, whatever it waits for: then it goes
    /// on where it was. One that would have to be is not suspended.
    pub silent: Duration,
    /// The most pages that may be at the destination and not in its restore yet when the guest is
    /// suspended: it is silent until they are.
    pub behind: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            downtime: Duration::from_millis(300),
            rounds: 12,
            window: 3,
            looking: Duration::from_secs(1),
            least_share: Share::WHOLE,
            silent: Duration::from_secs(300),
            // What a restore is given at once.
            behind: 1024,
        }
    }
}

impl Limits {
    /// How long the last round may take where a handover costs `fixed` besides. Where that alone
    /// is too long it is a third of the downtime, or an eighth of what can't be helped: shorter, it
    /// would hardly make a difference. Nothing where the silence is to be as short as it can be.
    #[must_use]
    pub fn last_round(&self, fixed: Duration) -> Duration {
        if self.downtime.is_zero() {
            return Duration::ZERO;
        }
        self.downtime
            .saturating_sub(fixed)
            .max(self.downtime / 3)
            .max(fixed / HARDLY)
    }
}

/// What a round has shown.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct RoundFacts {
    /// Pages that crossed, zero pages included.
    pub sent: u64,
    /// Pages known, or expected, to be dirty at its end, hot ones included.
    pub left: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// How long it took.
    #[serde(with = "seconds")]
    pub took: Duration,
    /// What the guest had of its processor time.
    pub share: Share,
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
    /// The silence is predicted to be as short as was asked for.
    DowntimeTarget,
    /// Next to nothing is left.
    FewPages,
    /// All that is left is written all the time.
    Hot,
    /// What is left no longer falls.
    NoProgress,
    /// The limit of rounds is reached.
    Rounds,
    /// The time that was given is over, and the operator wants the guest handed over then.
    Timeout,
}

/// What waits after a round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Left {
    /// Pages that are not hot.
    pub cold: u64,
    /// Pages that are.
    pub hot: u64,
    /// Pages that the guest writes while all of these would cross, where that is known: see
    /// [`Backlog::rewritten`].
    pub rewritten: Option<u64>,
}

/// What comes after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Another one.
    Round {
        /// Hot pages wait.
        hold: bool,
    },
    /// Another one, of all that is left, with the guest slowed down to this share.
    SlowDown(Share),
    /// The last one.
    Suspend(Stop),
}

/// What to do after the last round of `history`, which left that much. The guest has `share` of its
/// processor time.
#[must_use]
pub fn decide(
    history: &[RoundFacts],
    left: &Left,
    forecast: &Forecast,
    limits: &Limits,
    share: Share,
) -> Next {
    let next = next(history, left, forecast, limits);
    let Next::Suspend(Stop::Hot | Stop::NoProgress) = next else {
        return next;
    };
    let all = left.cold.saturating_add(left.hot);
    let slower = forecast.sending(all).and_then(|sending| {
        let wanted = limits.last_round(forecast.unavoidable());
        throttle::slow_down(share, limits.least_share, sending, wanted)
    });
    slower.map_or(next, Next::SlowDown)
}

/// What to do with a guest that is not slowed down any further.
fn next(history: &[RoundFacts], left: &Left, forecast: &Forecast, limits: &Limits) -> Next {
    let all = left.cold.saturating_add(left.hot);
    if history.is_empty() {
        return Next::Round { hold: false };
    }
    if all <= FEW_PAGES {
        return Next::Suspend(Stop::FewPages);
    }
    let sending = forecast.sending(all);
    if sending.is_some_and(|time| time <= limits.last_round(forecast.unavoidable())) {
        return Next::Suspend(Stop::DowntimeTarget);
    }
    if history.len() >= limits.rounds as usize {
        return Next::Suspend(Stop::Rounds);
    }
    // Hot pages are written each time that the log is read. Sent in much less than that takes, most
    // of them would not be written again before they have crossed: then a round makes them fewer.
    let hold = left.hot > 0
        && !limits.downtime.is_zero()
        && sending.is_some_and(|time| time * 2 >= limits.looking);
    if hold && left.cold <= FEW_PAGES.max(left.hot / MOSTLY_HOT) {
        return Next::Suspend(Stop::Hot);
    }
    let in_vain = !limits.downtime.is_zero() && gains_little(left, forecast);
    if in_vain || no_longer_falls(history, limits.window) {
        return Next::Suspend(Stop::NoProgress);
    }
    Next::Round { hold }
}

/// Whether it is known that another round would leave about as much, or make the silence hardly
/// shorter.
fn gains_little(left: &Left, forecast: &Forecast) -> bool {
    let all = left.cold.saturating_add(left.hot);
    let Some(rewritten) = left.rewritten else {
        return false;
    };
    let gain = forecast.sending(all.saturating_sub(rewritten));
    let silence = forecast.downtime(all);
    !falls(all, rewritten)
        || matches!((gain, silence), (Some(gain), Some(silence)) if gain <= silence / HARDLY)
}

/// A tenth less is progress.
const fn falls(before: u64, left: u64) -> bool {
    left.saturating_mul(10) < before.saturating_mul(9)
}

/// Rounds leave about as much as they had to send, and the newest leaves the least of these, or
/// has been waited for long enough. One that leaves less than any before it is progress after all;
/// and what the guest did with more of its processor time says nothing of what it will do.
fn no_longer_falls(history: &[RoundFacts], window: usize) -> bool {
    let share = history.last().map(|round| round.share);
    let faster = history.iter().rposition(|round| Some(round.share) != share);
    // The last of those shows what there was to win.
    let history = &history[faster.unwrap_or(0)..];
    if let Some((newest, before)) = history.split_last()
        && let Some(lowest) = before.iter().map(|round| round.left).min()
        && falls(lowest, newest.left)
    {
        return false;
    }
    let mut had = history.first().map_or(0, |round| round.sent);
    let stands = history.iter().position(|round| {
        let before = std::mem::replace(&mut had, round.left);
        !falls(before, round.left)
    });
    let Some(first) = stands else {
        return false;
    };
    let Some((newest, before)) = history[first..].split_last() else {
        return false;
    };
    let lowest = before.iter().map(|round| round.left).min();
    // The newest may be a twentieth above the lowest.
    lowest.is_some_and(|lowest| newest.left.saturating_mul(20) <= lowest.saturating_mul(21))
        || before.len() >= window
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
            share: Share::WHOLE,
        }
    }

    /// Without a fixed cost.
    fn free() -> Forecast {
        Forecast::new(FixedCost {
            set_up: 0.0,
            suspend: 0.0,
            restore: 0.0,
            commit: 0.0,
            clean_up: 0.0,
        })
    }

    /// A guest whose rounds leave these pages, none of them hot.
    fn stop_of(lefts: &[u64]) -> (usize, Option<Stop>) {
        let traces: Vec<_> = lefts.iter().map(|left| (*left, 0)).collect();
        let (rounds, stop, _) = follow(&traces, free(), &Limits::default());
        (rounds, stop)
    }

    /// Goes through rounds that leave so many cold and hot pages each, as they were recorded. When
    /// it ended, why, and the pages that crossed before the last round.
    fn follow(
        trace: &[(u64, u64)],
        mut forecast: Forecast,
        limits: &Limits,
    ) -> (usize, Option<Stop>, u64) {
        let mut history = Vec::new();
        let (mut sent, mut all) = (32_768, 0);
        let mut share = Share::WHOLE;
        for (number, (cold, hot)) in trace.iter().copied().enumerate() {
            let facts = RoundFacts {
                share,
                ..round(sent, cold + hot)
            };
            forecast.sent(Sent {
                first: number == 0,
                pages: sent,
                bytes: facts.wire_bytes,
                took: facts.took,
            });
            history.push(facts);
            all += sent;
            let left = Left {
                cold,
                hot,
                rewritten: None,
            };
            match decide(&history, &left, &forecast, limits, share) {
                Next::Suspend(stop) => return (number + 1, Some(stop), all),
                Next::Round { hold: true } => sent = cold,
                Next::Round { hold: false } => sent = cold + hot,
                Next::SlowDown(slower) => (share, sent) = (slower, cold + hot),
            }
        }
        (trace.len(), None, all)
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
            (3, Some(Stop::NoProgress))
        );
    }

    #[test]
    fn a_peak_is_waited_out() {
        // At rounds 3 and 4 the newest is above the lowest: not the moment.
        assert_eq!(
            stop_of(&[2048, 2048, 4000, 3000, 2048]),
            (5, Some(Stop::NoProgress))
        );
        // A low is not waited for in vain.
        assert_eq!(
            stop_of(&[2048, 2048, 4000, 5000, 6000, 7000]),
            (5, Some(Stop::NoProgress))
        );
    }

    #[test]
    fn it_always_ends() {
        for seed in 1..50u64 {
            let wild: Vec<u64> = (0..40).map(|n| 3000 + (n * 7919 * seed) % 5000).collect();
            let (rounds, stop) = stop_of(&wild);
            assert!(rounds <= 12 && stop.is_some());
        }
    }

    #[test]
    fn the_fixed_cost_is_part_of_the_silence() {
        let limits = Limits {
            downtime: Duration::from_millis(900),
            ..Limits::default()
        };
        // 1,000 pages cross in 650 ms.
        let (rounds, stop, _) = follow(&[(1000, 0)], free(), &limits);
        assert_eq!((rounds, stop), (1, Some(Stop::DowntimeTarget)));
        let costly = |suspend| {
            Forecast::new(FixedCost {
                set_up: 0.0,
                suspend,
                restore: 0.1,
                commit: 0.1,
                clean_up: 0.0,
            })
        };
        assert_eq!(follow(&[(1000, 0)], costly(0.1), &limits).1, None);
        assert_eq!(
            follow(&[(800, 0)], costly(0.1), &limits).1,
            Some(Stop::DowntimeTarget)
        );
        // What is out of reach is not chased: a third of the target for the last round.
        assert_eq!(
            follow(&[(450, 0)], costly(5.0), &limits).1,
            Some(Stop::DowntimeTarget)
        );
        // Nor is what hardly counts beside it: 900 pages are 585 ms, and 5.2 s can't be helped.
        assert_eq!(
            follow(&[(900, 0)], costly(5.0), &limits).1,
            Some(Stop::DowntimeTarget)
        );
        let shortest = Limits {
            downtime: Duration::ZERO,
            ..Limits::default()
        };
        assert_eq!(follow(&[(900, 0)], costly(5.0), &shortest).1, None);
    }

    #[test]
    fn hot_pages_cross_twice() {
        // Known to be hot when round 1 ends: 8 MB that are always rewritten, and next to nothing
        // else.
        let trace = [(120, 2048), (100, 2048), (90, 2048)];
        let (rounds, stop, sent) = follow(&trace, free(), &Limits::default());
        assert_eq!((rounds, stop), (1, Some(Stop::Hot)));
        assert_eq!(sent, 32_768);
        // With other work going on besides, that crosses meanwhile, and the hot pages don't.
        let trace = [(3000, 2048), (900, 2048), (200, 2048)];
        let (rounds, stop, sent) = follow(&trace, free(), &Limits::default());
        assert_eq!((rounds, stop), (3, Some(Stop::Hot)));
        assert_eq!(sent, 32_768 + 3000 + 900);
    }

    #[test]
    fn without_a_silence_to_reach_nothing_is_held_back() {
        let limits = Limits {
            downtime: Duration::ZERO,
            ..Limits::default()
        };
        let trace = [(120, 2048), (100, 2048), (90, 2048)];
        let (rounds, stop, sent) = follow(&trace, free(), &limits);
        assert_eq!((rounds, stop), (3, Some(Stop::NoProgress)));
        assert_eq!(sent, 32_768 + 2168 + 2148);
    }

    #[test]
    fn on_a_link_that_outruns_the_guest_hot_pages_go() {
        // 400 pages cross in 260 ms. They were written in each second, not in each such moment.
        let limits = Limits {
            downtime: Duration::from_millis(100),
            ..Limits::default()
        };
        let trace = [(100, 400), (80, 60)];
        let (rounds, stop, sent) = follow(&trace, free(), &limits);
        assert_eq!((rounds, stop), (2, Some(Stop::DowntimeTarget)));
        assert_eq!(sent, 32_768 + 500);
    }

    #[test]
    fn what_is_rewritten_while_it_crosses_is_not_sent_again_in_vain() {
        let mut forecast = free();
        let first = round(32_768, 2048);
        forecast.sent(Sent {
            first: true,
            pages: first.sent,
            bytes: first.wire_bytes,
            took: first.took,
        });
        let after = |cold, rewritten, limits: &Limits| {
            let left = Left {
                cold,
                hot: 0,
                rewritten,
            };
            decide(&[first], &left, &forecast, limits, Share::WHOLE)
        };
        let limits = Limits::default();
        assert_eq!(
            after(2048, Some(1900), &limits),
            Next::Suspend(Stop::NoProgress)
        );
        // Less would be left, by more than an eighth of the silence, or nobody knows.
        for rewritten in [Some(1780), Some(0), None] {
            assert_eq!(after(2048, rewritten, &limits), Next::Round { hold: false });
        }
        assert_eq!(
            after(2048, Some(1800), &limits),
            Next::Suspend(Stop::NoProgress)
        );
        // Where the silence is short enough that is the reason.
        assert_eq!(
            after(400, Some(400), &limits),
            Next::Suspend(Stop::DowntimeTarget)
        );
        // Whoever asks for the shortest silence has it tried.
        let shortest = Limits {
            downtime: Duration::ZERO,
            ..Limits::default()
        };
        assert_eq!(
            after(2048, Some(2048), &shortest),
            Next::Round { hold: false }
        );
        // Whoever may slow the guest down does so at once.
        let slower = Limits {
            least_share: Share::new(5).unwrap(),
            ..Limits::default()
        };
        assert!(matches!(
            after(2048, Some(2048), &slower),
            Next::SlowDown(_)
        ));
    }

    #[test]
    fn nothing_sent_predicts_nothing() {
        assert_eq!(free().sending(10), None);
        let left = Left {
            cold: 1000,
            ..Left::default()
        };
        let decided = decide(
            &[round(32_768, 1000)],
            &left,
            &free(),
            &Limits::default(),
            Share::WHOLE,
        );
        assert_eq!(decided, Next::Round { hold: false });
    }

    /// A guest that rewrites as many pages as its share lets it: when and why it is suspended, and
    /// its share then. Every trace of it ends so.
    fn slowed_down(least: u8, pages_at_full: u64) -> (usize, Stop, Share) {
        let limits = Limits {
            least_share: Share::new(least).unwrap(),
            rounds: 40,
            ..Limits::default()
        };
        let mut forecast = free();
        let (mut history, mut share, mut sent) = (Vec::new(), Share::WHOLE, 32_768);
        loop {
            let left = u64::from(share.of(0, 1)) * pages_at_full / 100;
            let facts = RoundFacts {
                share,
                ..round(sent, left)
            };
            forecast.sent(Sent {
                first: history.is_empty(),
                pages: sent,
                bytes: facts.wire_bytes,
                took: facts.took,
            });
            history.push(facts);
            let cold = Left {
                cold: left,
                ..Left::default()
            };
            match decide(&history, &cold, &forecast, &limits, share) {
                Next::Suspend(stop) => return (history.len(), stop, share),
                Next::SlowDown(slower) => share = slower,
                Next::Round { .. } => {}
            }
            sent = left;
        }
    }

    #[test]
    fn progress_after_a_stall_goes_on() {
        assert_eq!(stop_of(&[9000, 5000, 6000, 2500, 1100]), (5, None));
        // Up and down without getting anywhere is none.
        assert_eq!(
            stop_of(&[9000, 5000, 6000, 4900, 6000]),
            (4, Some(Stop::NoProgress))
        );
    }

    #[test]
    fn what_a_faster_guest_did_is_forgotten() {
        let third = Share::new(33).unwrap();
        let of = |share, (sent, left)| RoundFacts {
            share,
            ..round(sent, left)
        };
        let mut history: Vec<_> = [(32_768, 8000), (8000, 8000), (8000, 8000)]
            .map(|facts| of(Share::WHOLE, facts))
            .into();
        assert!(no_longer_falls(&history, 3));
        // Slower it changes less, and further rounds less and less.
        for facts in [(8000, 2700), (2700, 900), (900, 600)] {
            history.push(of(third, facts));
            assert!(!no_longer_falls(&history, 3));
        }
        history.push(of(third, (600, 600)));
        assert!(no_longer_falls(&history, 3));
        // One that it does not help is known after one round.
        history.truncate(3);
        history.push(of(third, (8000, 8000)));
        assert!(no_longer_falls(&history, 3));
    }

    #[test]
    fn a_guest_that_may_be_slowed_down_is_so_until_its_silence_is_short() {
        // 8 MB all the time take 1.3 s: too long without, short enough with a quarter of it.
        assert_eq!(slowed_down(100, 2048), (3, Stop::NoProgress, Share::WHOLE));
        let (rounds, stop, share) = slowed_down(5, 2048);
        assert_eq!(stop, Stop::DowntimeTarget);
        assert!(rounds <= 8 && share < Share::new(30).unwrap(), "{share}");
        // No further than the operator allows.
        let (_, stop, share) = slowed_down(60, 2048);
        assert_eq!((stop, share), (Stop::NoProgress, Share::new(60).unwrap()));
        // One that is quiet enough is left alone.
        assert_eq!(slowed_down(5, 400), (1, Stop::DowntimeTarget, Share::WHOLE));
    }
}
