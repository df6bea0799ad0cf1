//! How far a guest is slowed down that changes memory faster than the link carries it.
//!
//! Only where the operator allows it. A guest that gets less of the processors writes less: each
//! time that further rounds would gain nothing, its share falls towards what the link can carry in
//! the downtime that was asked for, and one more round shows what that has done.
//!
//! ```text
//! share  100 % --- no progress ---> 60 % --- no progress ---> 36 % ---> ... down to the least
//! ```

use std::fmt;
use std::time::Duration;

use serde::Serialize;

/// A part of the processor time that a guest may use otherwise, in percent: 1 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Share(u8);

impl Default for Share {
    fn default() -> Self {
        Share::WHOLE
    }
}

impl Share {
    /// As much as it may use otherwise.
    pub const WHOLE: Share = Share(100);

    /// There is no less.
    pub const LEAST: Share = Share(1);

    /// None for what is no percentage from 1 to 100.
    #[must_use]
    pub fn new(percent: u8) -> Option<Share> {
        (1..=100).contains(&percent).then_some(Share(percent))
    }

    /// The cap of a guest of so many vCPUs that has this share of `cap`, both in percent of one
    /// CPU. A cap of zero is none: the guest then may use all its vCPUs.
    #[must_use]
    pub fn of(self, cap: u32, vcpus: u32) -> u32 {
        let whole = match cap {
            0 => vcpus.max(1).saturating_mul(100),
            cap => cap,
        };
        let part = u64::from(whole) * u64::from(self.0) / 100;
        u32::try_from(part.max(1)).unwrap_or(u32::MAX)
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", self.0)
    }
}

/// The least with which a guest is asked to suspend. Of a share `s` the suspend takes `c / s + w`,
/// for `c` of processor time and `w` of waiting for dom0, and the guest writes for `c + s w` as fast
/// as it can meanwhile: where both are some 50 ms, and memory is written ten times as fast as the
/// link carries it, the sum of suspend and last round is the least at about a third, and hardly more
/// at a half.
pub const SUSPENDING: Share = Share(50);

/// The share after `now` for a guest whose last round would take `sending`, and should take
/// `wanted`; none where `least` is reached.
///
/// What a guest writes is taken to fall with its share. It rarely falls quite so, and pages that
/// are written all the time do not become fewer at first: so no step leaves less than a third or
/// more than three quarters.
#[must_use]
pub fn slow_down(now: Share, least: Share, sending: Duration, wanted: Duration) -> Option<Share> {
    let fits = wanted.as_secs_f64() / sending.as_secs_f64().max(1e-6);
    let step = (fits * 0.8).clamp(1.0 / 3.0, 0.75);
    // From 1 to 100, so that nothing is lost.
    let next = Share(((f64::from(now.0) * step) as u8).max(1)).max(least);
    (next < now).then_some(next)
}

/// The share after `now` for a guest that would write `again` of `all` pages again while they cross:
/// none where that is no more than a third, or `least` is reached. Further rounds then send half as
/// much again, all together.
#[must_use]
pub fn further(now: Share, least: Share, all: u64, again: u64) -> Option<Share> {
    let few = all / 3;
    if again <= few {
        return None;
    }
    let pages = |count: u64| Duration::from_micros(count);
    slow_down(now, least, pages(again), pages(few))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn share(percent: u8) -> Share {
        Share::new(percent).unwrap()
    }

    #[test]
    fn a_share_is_a_percentage() {
        assert_eq!(Share::new(0), None);
        assert_eq!(Share::new(101), None);
        assert_eq!(share(100), Share::WHOLE);
        assert_eq!(share(7).to_string(), "7 %");
    }

    #[test]
    fn a_share_is_of_what_the_guest_may_use() {
        assert_eq!(share(50).of(0, 4), 200);
        assert_eq!(share(50).of(60, 4), 30);
        // No cap at all would be the opposite.
        assert_eq!(share(1).of(10, 1), 1);
        assert_eq!(share(100).of(0, 0), 100);
        assert_eq!(share(100).of(u32::MAX, 1), u32::MAX);
    }

    #[test]
    fn it_falls_towards_what_fits() {
        let wanted = SECOND / 2;
        // Far above: a third. A little above: three quarters. In between: by what fits.
        assert_eq!(
            slow_down(Share::WHOLE, share(5), SECOND * 60, wanted),
            Some(share(33))
        );
        assert_eq!(
            slow_down(Share::WHOLE, share(5), wanted, wanted),
            Some(share(75))
        );
        assert_eq!(
            slow_down(Share::WHOLE, share(5), SECOND, wanted),
            Some(share(40))
        );
    }

    #[test]
    fn a_third_that_is_written_again_is_little_enough() {
        let (now, least) = (share(33), share(5));
        assert_eq!(further(now, least, 3000, 1000), None);
        assert_eq!(further(now, least, 3000, 1001), Some(share(24)));
        assert_eq!(further(now, least, 3000, 9000), Some(share(11)));
        assert_eq!(further(least, least, 3000, 9000), None);
        // Next to nothing is left: no division by it.
        assert_eq!(further(now, least, 2, 2), Some(share(11)));
    }

    #[test]
    fn it_never_falls_below_the_least_and_always_ends() {
        for least in [1, 2, 5, 30, 75, 99, 100] {
            let mut now = Share::WHOLE;
            let mut steps = 0;
            while let Some(next) = slow_down(now, share(least), SECOND, SECOND) {
                assert!(next < now && next >= share(least));
                now = next;
                steps += 1;
            }
            assert_eq!(now, share(least));
            assert!(steps <= 20);
        }
        assert_eq!(
            slow_down(share(1), share(1), Duration::ZERO, Duration::ZERO),
            None
        );
    }
}
