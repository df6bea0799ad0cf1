//! How many shadows a site keeps, how large, how long: pure.

use serde::Deserialize;

/// What this site keeps of guests that run elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShadowPolicy {
    /// Whether memory is kept at all: of guests that leave, and of moves that broke on the way in.
    pub keep: bool,
    /// The most guests whose memory is kept; the oldest goes first.
    pub guests: usize,
    /// The most GiB that shadows take on the disk, all together. Not given: half of what the disk
    /// could hold of them.
    pub gib: Option<u64>,
    /// Days after which a shadow is dropped.
    pub days: u64,
}

impl Default for ShadowPolicy {
    fn default() -> Self {
        ShadowPolicy {
            keep: true,
            guests: 32,
            gib: None,
            days: 30,
        }
    }
}

/// A shadow, as far as the policy looks at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) uuid: String,
    /// Seconds since 1970.
    pub(super) kept_at: u64,
    /// On the disk.
    pub(super) bytes: u64,
}

impl ShadowPolicy {
    /// The most bytes of all shadows, where the disk has `free` bytes and shadows take `used`. What
    /// has arrived of a guest, and is `there` already, may be more than half of that.
    pub(super) fn most_bytes(&self, used: u64, free: u64, there: u64) -> u64 {
        let half = (used + free) / 2;
        self.gib
            .map_or(half.max(there), |gib| gib.saturating_mul(1 << 30))
    }

    /// Whether what was kept at that time is not to be kept any longer.
    pub(super) fn is_old(&self, kept_at: u64, now: u64) -> bool {
        now.saturating_sub(kept_at) > self.days.saturating_mul(24 * 3600)
    }

    /// Which of `kept` have to go at `now`, seconds since 1970, so that `room` more bytes and one
    /// more guest find a place where that is not 0; `most` bytes are allowed in all.
    pub(super) fn too_many(&self, kept: &[Kept], now: u64, most: u64, room: u64) -> Vec<String> {
        let mut newest_first: Vec<&Kept> = kept.iter().collect();
        newest_first.sort_by_key(|kept| std::cmp::Reverse(kept.kept_at));
        let mut guests = usize::from(room > 0);
        let mut bytes = room;
        let mut gone = Vec::new();
        for kept in newest_first {
            if self.is_old(kept.kept_at, now)
                || guests >= self.guests
                || bytes.saturating_add(kept.bytes) > most
            {
                gone.push(kept.uuid.clone());
            } else {
                guests += 1;
                bytes += kept.bytes;
            }
        }
        gone
    }
}

/// Which of `kept` go so that `bytes` more are free, the oldest first. None where that is not enough.
pub(super) fn oldest_for(kept: &[Kept], bytes: u64) -> Vec<String> {
    let mut oldest_first: Vec<&Kept> = kept.iter().collect();
    oldest_first.sort_by_key(|kept| kept.kept_at);
    let mut given_back = 0;
    let mut gone = Vec::new();
    for kept in oldest_first {
        if given_back >= bytes {
            break;
        }
        given_back += kept.bytes;
        gone.push(kept.uuid.clone());
    }
    match given_back >= bytes {
        true => gone,
        false => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(uuid: &str, kept_at: u64, bytes: u64) -> Kept {
        Kept {
            uuid: uuid.into(),
            kept_at,
            bytes,
        }
    }

    #[test]
    fn the_oldest_go_first() {
        let policy = ShadowPolicy {
            guests: 2,
            ..ShadowPolicy::default()
        };
        let all = [kept("a", 10, 1), kept("b", 30, 1), kept("c", 20, 1)];
        assert_eq!(policy.too_many(&all, 40, 100, 0), ["a"]);
        assert_eq!(policy.too_many(&all, 40, 100, 5), ["c", "a"]);
    }

    #[test]
    fn what_is_too_large_or_too_old_goes() {
        let policy = ShadowPolicy {
            days: 1,
            ..ShadowPolicy::default()
        };
        let day = 24 * 3600;
        let all = [kept("a", 0, 1), kept("b", day, 60), kept("c", 2 * day, 50)];
        assert_eq!(policy.too_many(&all, 2 * day, 100, 0), ["b", "a"]);
        assert_eq!(policy.too_many(&all, 2 * day, 100, 60), ["c", "b", "a"]);
        assert_eq!(policy.too_many(&all, day, 1000, 0), [""; 0]);
    }

    #[test]
    fn no_more_go_for_a_guest_than_it_needs() {
        let all = [kept("a", 10, 5), kept("b", 30, 5), kept("c", 20, 5)];
        assert_eq!(oldest_for(&all, 0), [""; 0]);
        assert_eq!(oldest_for(&all, 5), ["a"]);
        assert_eq!(oldest_for(&all, 6), ["a", "c"]);
        assert_eq!(oldest_for(&all, 16), [""; 0]);
    }

    #[test]
    fn half_of_the_disk_is_the_most_unless_said() {
        let policy = ShadowPolicy::default();
        assert_eq!(policy.most_bytes(10, 90, 0), 50);
        assert_eq!(policy.most_bytes(60, 40, 55), 55);
        let said = ShadowPolicy {
            gib: Some(2),
            ..policy
        };
        assert_eq!(said.most_bytes(10, 90, 5 << 30), 2 << 30);
    }
}
