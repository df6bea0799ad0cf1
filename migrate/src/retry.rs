//! When a move that lost its link is tried again: pure.
//!
//! ```text
//!   attempt --> link lost, the guest runs here --> pause --> attempt, from what arrived --> ...
//!                  |
//!                  any other end: that is how the move ended
//! ```
//!
//! A lost link ends an attempt in the one way that any failure does: the guest goes on at the
//! source, and the destination has no domain of it. But what arrived stays there as a shadow, and
//! the next attempt sends what is missing. Nothing is assumed of what was on its way: the
//! destination tells what it has, by digests.

use std::time::Duration;

use serde::Serialize;

use crate::error::Error;
use crate::wire::RefusalCode;

/// How long it goes on without a step forward, if nothing else is said.
pub const AWAY: Duration = Duration::from_secs(600);

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// An attempt that ended with its link.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Interruption {
    /// Why, in words.
    pub reason: String,
    /// Since the command's start.
    #[serde(rename = "seconds", with = "crate::rounds::seconds")]
    pub at: Duration,
    /// What had crossed in this attempt.
    pub wire_bytes: u64,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended<'a> {
    /// Why.
    pub error: &'a Error,
    /// Pages that the destination had when they began to cross; none where it did not come to that.
    pub recalled: Option<u64>,
    /// Whether the guest is known to run here.
    pub runs_here: bool,
}

/// Attempts of one move.
#[derive(Debug, Clone, Default)]
pub struct Attempts {
    /// The most pages that the destination had at the start of one of them; none where none came
    /// to copy pages.
    most: Option<u64>,
    /// Attempts since one got further than those before.
    in_vain: u32,
    /// When that was.
    forward: Duration,
}

impl Attempts {
    /// How long to wait before another attempt after one that ended `now`, since the command's
    /// start; none where there is to be none. `timeout` is for the whole move. Without a step forward
    /// it goes on for `away`: a link that always breaks at the same place ends too.
    pub fn pause(
        &mut self,
        ended: Ended<'_>,
        now: Duration,
        timeout: Option<Duration>,
        away: Duration,
    ) -> Option<Duration> {
        if ended.recalled > self.most {
            self.most = ended.recalled;
            self.in_vain = 0;
            self.forward = now;
        }
        let again = match ended.error {
            Error::LinkLost { .. } => true,
            // Its worker has not found out yet.
            Error::RefusedByPeer { code, .. } => *code == RefusalCode::Busy,
            _ => false,
        };
        // A host that can't be reached at all is told at once.
        if !again || self.most.is_none() || !ended.runs_here {
            return None;
        }
        let pause = FIRST_PAUSE
            .saturating_mul(1 << self.in_vain.min(10))
            .min(LONGEST_PAUSE);
        self.in_vain += 1;
        let end = timeout
            .unwrap_or(Duration::MAX)
            .min(self.forward.saturating_add(away));
        (now.saturating_add(pause) < end).then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost() -> Error {
        Error::LinkLost {
            peer: "b".into(),
            reason: "cut".into(),
        }
    }

    fn after(error: &Error, recalled: Option<u64>) -> Ended<'_> {
        Ended {
            error,
            recalled,
            runs_here: true,
        }
    }

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn a_host_that_never_answered_is_not_asked_again() {
        let mut attempts = Attempts::default();
        assert_eq!(
            attempts.pause(after(&lost(), None), seconds(1), None, AWAY),
            None
        );
    }

    #[test]
    fn pauses_grow_and_end() {
        let mut attempts = Attempts::default();
        let mut now = seconds(100);
        let first = attempts.pause(after(&lost(), Some(0)), now, None, AWAY);
        assert_eq!(first, Some(FIRST_PAUSE));
        let mut last = FIRST_PAUSE;
        let mut count = 0;
        while let Some(pause) = attempts.pause(after(&lost(), None), now, None, AWAY) {
            assert!(pause >= last && pause <= LONGEST_PAUSE);
            last = pause;
            now += pause;
            count += 1;
        }
        assert!(now <= seconds(100) + AWAY && now + LONGEST_PAUSE >= seconds(100) + AWAY);
        assert!(count > 10);
        // One that gets somewhere begins anew.
        assert_eq!(
            attempts.pause(after(&lost(), Some(10)), now, None, AWAY),
            Some(FIRST_PAUSE)
        );
    }

    #[test]
    fn one_that_always_breaks_at_the_same_place_ends() {
        let mut attempts = Attempts::default();
        let mut now = Duration::ZERO;
        let mut count = 0;
        while let Some(pause) = attempts.pause(after(&lost(), Some(7)), now, None, seconds(100)) {
            now += pause + seconds(5);
            count += 1;
        }
        assert!((3..100).contains(&count), "{count}");
        let mut attempts = Attempts::default();
        let none = attempts.pause(after(&lost(), Some(0)), now, None, Duration::ZERO);
        assert_eq!(none, None, "no retries are wanted");
    }

    #[test]
    fn it_can_go_on_for_ever() {
        let mut attempts = Attempts::default();
        let again = attempts.pause(after(&lost(), Some(0)), seconds(9), None, Duration::MAX);
        assert_eq!(again, Some(FIRST_PAUSE));
    }

    #[test]
    fn a_timeout_is_for_all_attempts() {
        let mut attempts = Attempts::default();
        let timeout = Some(seconds(10));
        assert!(
            attempts
                .pause(after(&lost(), Some(0)), seconds(8), timeout, AWAY)
                .is_some()
        );
        assert_eq!(
            attempts.pause(after(&lost(), Some(0)), seconds(9), timeout, AWAY),
            None
        );
    }

    #[test]
    fn only_a_lost_link_is_tried_again_and_only_where_the_guest_runs() {
        let refused = |code| Error::RefusedByPeer {
            peer: "b".into(),
            code,
            reason: "no".into(),
        };
        let ended = [
            (lost(), true, true),
            (lost(), false, false),
            (refused(RefusalCode::Busy), true, true),
            (refused(RefusalCode::Memory), true, false),
            (Error::Cancelled, true, false),
            (Error::Verify("x".into()), true, false),
            (Error::InDoubt { peer: "b".into() }, true, false),
        ];
        for (error, runs_here, again) in ended {
            let ended = Ended {
                error: &error,
                recalled: Some(0),
                runs_here,
            };
            let pause = Attempts::default().pause(ended, seconds(1), None, AWAY);
            assert_eq!(pause.is_some(), again, "{error:?}");
        }
    }
}
