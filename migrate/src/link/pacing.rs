//! Counting what crosses, and keeping below a rate.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A reader or writer that counts its bytes.
#[derive(Debug)]
pub struct Counted<T> {
    inner: T,
    bytes: Arc<AtomicU64>,
}

impl<T> Counted<T> {
    /// Counts what crosses `inner` into `bytes`.
    pub fn new(inner: T, bytes: Arc<AtomicU64>) -> Self {
        Counted { inner, bytes }
    }
}

impl<T: Read> Read for Counted<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

impl<T: Write> Write for Counted<T> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(buffer)?;
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Keeps a sender below a rate: each payment says how long to wait before the next.
///
/// A token bucket that holds a tenth of a second's worth, so that a pause is not made up for by a
/// burst. Long frames are written in slices, with a short pause after each: the peer keeps hearing
/// something, and whoever is in a hurry never waits for a whole frame to be paid.
#[derive(Debug)]
pub struct Pace {
    rate: Option<f64>,
    paid_until: Instant,
}

impl Pace {
    const BURST: Duration = Duration::from_millis(100);

    /// The longest sleep at once, after which a hurry is looked for.
    const NAP: Duration = Duration::from_millis(50);

    /// The shortest slice: smaller ones would be mostly headers of the layers below.
    const SHORTEST: usize = 512;

    /// The longest slice.
    const LONGEST: usize = 256 << 10;

    /// At most `rate` bytes a second; `None` for no limit.
    pub fn new(rate: Option<u64>) -> Self {
        Pace {
            rate: rate.map(|rate| rate.max(1) as f64),
            paid_until: Instant::now(),
        }
    }

    /// How long to wait after sending `bytes` at `now`.
    fn pay(&mut self, bytes: usize, now: Instant) -> Duration {
        let Some(rate) = self.rate else {
            return Duration::ZERO;
        };
        let start = self
            .paid_until
            .max(now.checked_sub(Self::BURST).unwrap_or(now));
        self.paid_until = start + Duration::from_secs_f64(bytes as f64 / rate);
        self.paid_until.saturating_duration_since(now)
    }

    /// The most bytes to write before the next wait: what the rate allows in a moment.
    pub fn slice(&self) -> usize {
        self.rate.map_or(usize::MAX, |rate| {
            ((rate * Self::NAP.as_secs_f64()) as usize).clamp(Self::SHORTEST, Self::LONGEST)
        })
    }

    /// Waits for as long as the rate demands after `bytes`, but no longer once `hurry` is set.
    pub fn wait(&mut self, bytes: usize, hurry: &AtomicBool) {
        let pause = self.pay(bytes, Instant::now());
        let until = Instant::now() + pause;
        while !hurry.load(Ordering::Relaxed) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            thread::sleep(left.min(Self::NAP));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_over_any_stretch() {
        let start = Instant::now();
        let mut pace = Pace::new(Some(1_000_000));
        let mut now = start;
        for _ in 0..100 {
            now += pace.pay(50_000, now);
        }
        let elapsed = (now - start).as_secs_f64();
        // 5 MB at 1 MB/s, less one burst; the bucket may have filled since it was made.
        assert!((4.8..5.01).contains(&elapsed), "{elapsed}");
    }

    #[test]
    fn a_pause_buys_no_more_than_one_burst() {
        let mut pace = Pace::new(Some(1_000_000));
        let later = Instant::now() + Duration::from_secs(60);
        assert_eq!(pace.pay(100_000, later), Duration::ZERO);
        assert!(pace.pay(100_000, later) >= Duration::from_millis(99));
    }

    #[test]
    fn a_slice_is_what_the_rate_allows_in_a_moment() {
        assert_eq!(Pace::new(Some(1)).slice(), Pace::SHORTEST);
        assert_eq!(Pace::new(Some(100_000)).slice(), 5_000);
        assert_eq!(Pace::new(Some(u64::MAX)).slice(), Pace::LONGEST);
        assert_eq!(Pace::new(None).slice(), usize::MAX);
    }

    #[test]
    fn a_hurry_waits_for_no_rate() {
        // At this rate the test would never end.
        let mut pace = Pace::new(Some(1));
        pace.wait(1 << 40, &AtomicBool::new(true));
    }

    #[test]
    fn without_a_rate_nothing_waits() {
        assert_eq!(
            Pace::new(None).pay(usize::MAX, Instant::now()),
            Duration::ZERO
        );
    }
}
