//! What the operator can do about a silence that would be too long.

use std::fmt;
use std::time::Duration;

use super::{Forecast, Limits, Share, Stop};

/// What would make the guest's silence shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Nothing that concerns what is left: the handover alone takes so long.
    HandoverAlone(Duration),
    /// A shorter downtime: the operator allows as long a silence.
    Downtime,
    /// Leave to slow the guest down.
    Throttle,
    /// Leave to slow it down further: it is as slow as it may be.
    ThrottleFurther,
    /// A link that carries more.
    Bandwidth,
}

impl Remedy {
    /// For a guest that would be suspended by `stop`, be silent for longer than `silent`, and has
    /// `share` of its processor time. The limits are those that the operator gave.
    #[must_use]
    pub fn find(
        stop: Stop,
        forecast: &Forecast,
        limits: &Limits,
        silent: Duration,
        share: Share,
    ) -> Remedy {
        let unavoidable = forecast.unavoidable();
        let allowed = limits.least_share;
        if unavoidable >= silent {
            return Remedy::HandoverAlone(unavoidable);
        }
        match stop {
            Stop::DowntimeTarget if limits.downtime > silent => Remedy::Downtime,
            // What is left hardly counts beside it.
            Stop::DowntimeTarget => Remedy::HandoverAlone(unavoidable),
            // So few don't become fewer, however slow the guest is.
            Stop::FewPages => Remedy::Bandwidth,
            _ if allowed == Share::WHOLE => Remedy::Throttle,
            _ if share <= allowed && share > Share::LEAST => Remedy::ThrottleFurther,
            _ => Remedy::Bandwidth,
        }
    }
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Remedy::HandoverAlone(alone) => {
                write!(f, "the handover alone takes {:.0} s", alone.as_secs_f64())
            }
            Remedy::Downtime => f.write_str("a shorter --downtime makes it shorter"),
            Remedy::Throttle => f.write_str("--throttle makes it shorter, or more bandwidth"),
            Remedy::ThrottleFurther => {
                f.write_str("a lower --throttle makes it shorter, or more bandwidth")
            }
            Remedy::Bandwidth => f.write_str("more bandwidth makes it shorter"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rounds::FixedCost;

    const SILENT: Duration = Duration::from_secs(300);

    fn remedy(stop: Stop, downtime: u64, least: u8, share: u8, alone: f64) -> Remedy {
        let forecast = Forecast::new(FixedCost {
            suspend: alone,
            restore: 0.0,
            commit: 0.0,
            ..FixedCost::default()
        });
        let limits = Limits {
            downtime: Duration::from_secs(downtime),
            least_share: Share::new(least).unwrap(),
            ..Limits::default()
        };
        let share = Share::new(share).unwrap();
        Remedy::find(stop, &forecast, &limits, SILENT, share)
    }

    #[test]
    fn slowing_down_is_advised_where_it_may_help() {
        for stop in [Stop::NoProgress, Stop::Hot, Stop::Rounds, Stop::Timeout] {
            assert_eq!(remedy(stop, 0, 100, 100, 1.0), Remedy::Throttle);
            // It is allowed already.
            assert_eq!(remedy(stop, 0, 5, 5, 1.0), Remedy::ThrottleFurther);
            // It is not what the guest writes, or the guest can't be slowed down.
            assert_eq!(remedy(stop, 0, 5, 30, 1.0), Remedy::Bandwidth);
            assert_eq!(remedy(stop, 0, 5, 100, 1.0), Remedy::Bandwidth);
            assert_eq!(remedy(stop, 0, 1, 1, 1.0), Remedy::Bandwidth);
        }
        assert_eq!(remedy(Stop::FewPages, 0, 100, 100, 1.0), Remedy::Bandwidth);
    }

    #[test]
    fn what_is_left_is_not_blamed_for_what_the_handover_takes() {
        let alone = Remedy::HandoverAlone(Duration::from_secs(400));
        for stop in [Stop::NoProgress, Stop::DowntimeTarget] {
            assert_eq!(remedy(stop, 1, 100, 100, 400.0), alone);
        }
        let alone = Remedy::HandoverAlone(Duration::from_secs(290));
        assert_eq!(remedy(Stop::DowntimeTarget, 1, 100, 100, 290.0), alone);
        assert_eq!(alone.to_string(), "the handover alone takes 290 s");
    }

    #[test]
    fn whoever_allows_a_long_silence_may_allow_less() {
        assert_eq!(
            remedy(Stop::DowntimeTarget, 600, 100, 100, 1.0),
            Remedy::Downtime
        );
    }
}
