//! Counting what crosses, and keeping below a rate.

use std::io::{self, IoSlice, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

    /// The bytes so far.
    pub fn count(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
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

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let count = self.inner.write_vectored(slices)?;
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// How long a writer was held up, for another thread to read.
#[derive(Debug, Clone, Default)]
pub struct HeldUp(Arc<AtomicU64>);

impl HeldUp {
    /// Until the value is dropped the writer is held up.
    pub fn begin(&self) -> impl Drop + use<> {
        Holding {
            total: Arc::clone(&self.0),
            since: Instant::now(),
        }
    }

    /// How long in all, but for what lasts.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

struct Holding {
    total: Arc<AtomicU64>,
    since: Instant,
}

impl Drop for Holding {
    fn drop(&mut self) {
        let nanoseconds = self.since.elapsed().as_nanos() as u64;
        self.total.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

/// How much may be sent a second, for all who send or change it, together: a change holds at once,
/// also for a wait that has begun.
///
/// A token bucket that holds a tenth of a second's worth, so that a pause is not made up for by a
/// burst. What is owed is counted in bytes, so that it is paid at whatever rate holds when it is
/// paid.
#[derive(Debug, Clone)]
pub struct Rate(Arc<Bucket>);

#[derive(Debug)]
struct Bucket {
    /// Bytes a second; 0 for no limit.
    limit: AtomicU64,
    debt: Mutex<Debt>,
}

#[derive(Debug)]
struct Debt {
    /// The limit as it was when `owed` was counted.
    limit: Option<f64>,
    /// Bytes that were sent and are not paid yet; negative for what was saved.
    owed: f64,
    counted: Instant,
}

impl Default for Rate {
    fn default() -> Self {
        Rate::new(None)
    }
}

impl Rate {
    const BURST: Duration = Duration::from_millis(100);

    /// At most `bytes` a second; `None` for no limit.
    pub fn new(bytes: Option<u64>) -> Self {
        let rate = Rate(Arc::new(Bucket {
            limit: AtomicU64::new(0),
            debt: Mutex::new(Debt {
                limit: None,
                owed: 0.0,
                counted: Instant::now(),
            }),
        }));
        rate.set(bytes);
        rate.debt().limit = rate.limit();
        rate
    }

    /// From now on at most `bytes` a second; `None` for no limit.
    pub fn set(&self, bytes: Option<u64>) {
        let value = bytes.map_or(0, |bytes| bytes.max(1));
        self.0.limit.store(value, Ordering::Relaxed);
    }

    /// Bytes a second, if there is a limit.
    pub fn get(&self) -> Option<u64> {
        match self.0.limit.load(Ordering::Relaxed) {
            0 => None,
            bytes => Some(bytes),
        }
    }

    fn limit(&self) -> Option<f64> {
        self.get().map(|bytes| bytes as f64)
    }

    /// A thread that was ended with the lock in hand leaves nothing half done here.
    fn debt(&self) -> MutexGuard<'_, Debt> {
        self.0.debt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long to wait at `now` for what is owed, with `bytes` that were just sent.
    fn owe(&self, bytes: usize, now: Instant) -> Duration {
        let mut debt = self.debt();
        let passed = now.saturating_duration_since(debt.counted);
        debt.counted = debt.counted.max(now);
        if let Some(limit) = debt.limit {
            let paid = limit * passed.as_secs_f64();
            let saved = limit * Self::BURST.as_secs_f64();
            debt.owed = (debt.owed - paid).max(-saved);
        }
        debt.limit = self.limit();
        match debt.limit {
            // What was owed at another rate is no debt any more, and what was saved no burst.
            None => {
                debt.owed = 0.0;
                Duration::ZERO
            }
            Some(limit) => {
                debt.owed += bytes as f64;
                Duration::try_from_secs_f64(debt.owed.max(0.0) / limit).unwrap_or(Duration::MAX)
            }
        }
    }
}

impl From<Option<u64>> for Rate {
    fn from(bytes: Option<u64>) -> Self {
        Rate::new(bytes)
    }
}

/// Keeps a sender below a rate: each payment says how long to wait before the next.
///
/// Long frames are written in slices, with a short pause after each: the peer keeps hearing
/// something, and whoever is in a hurry never waits for a whole frame to be paid.
#[derive(Debug)]
pub struct Pace {
    rate: Rate,
}

impl Pace {
    /// The longest sleep at once, after which a hurry, or another rate, is looked for.
    const NAP: Duration = Duration::from_millis(50);

    /// The shortest slice: smaller ones would be mostly headers of the layers below.
    const SHORTEST: usize = 512;

    /// The longest slice, also without a rate: what was written and what it took are counted after
    /// each, and must tell of the same bytes.
    const LONGEST: usize = 64 << 10;

    /// At most `rate`, whatever that is at the time, by all who share it.
    pub const fn new(rate: Rate) -> Self {
        Pace { rate }
    }

    /// The most bytes to write before the next wait: what the rate allows in a moment.
    pub fn slice(&self) -> usize {
        self.rate.get().map_or(Self::LONGEST, |rate| {
            ((rate as f64 * Self::NAP.as_secs_f64()) as usize).clamp(Self::SHORTEST, Self::LONGEST)
        })
    }

    /// Waits for as long as the rate demands after `bytes`, but no longer once `hurry` is set.
    pub fn wait(&mut self, bytes: usize, hurry: &AtomicBool) {
        let mut due = self.rate.owe(bytes, Instant::now());
        while !due.is_zero() && !hurry.load(Ordering::Relaxed) {
            thread::sleep(due.min(Self::NAP));
            due = self.rate.owe(0, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(rate: Option<u64>) -> Pace {
        Pace::new(Rate::new(rate))
    }

    #[test]
    fn the_rate_is_kept_over_any_stretch() {
        let start = Instant::now();
        let pace = pace(Some(1_000_000));
        let mut now = start;
        for _ in 0..100 {
            now += pace.rate.owe(50_000, now);
        }
        let elapsed = (now - start).as_secs_f64();
        // 5 MB at 1 MB/s, less one burst; the bucket may have filled since it was made.
        assert!((4.8..5.01).contains(&elapsed), "{elapsed}");
    }

    #[test]
    fn a_pause_buys_no_more_than_one_burst() {
        let pace = pace(Some(1_000_000));
        let later = Instant::now() + Duration::from_secs(60);
        assert_eq!(pace.rate.owe(100_000, later), Duration::ZERO);
        assert!(pace.rate.owe(100_000, later) >= Duration::from_millis(99));
    }

    #[test]
    fn all_who_share_a_rate_keep_it_together() {
        let start = Instant::now();
        let rate = Rate::new(Some(1_000_000));
        let senders = [
            Pace::new(rate.clone()),
            Pace::new(rate.clone()),
            Pace::new(rate),
        ];
        let mut now = start;
        for turn in 0..100 {
            now += senders[turn % 3].rate.owe(50_000, now);
        }
        let elapsed = (now - start).as_secs_f64();
        assert!((4.8..5.01).contains(&elapsed), "{elapsed}");
    }

    #[test]
    fn a_slice_is_what_the_rate_allows_in_a_moment() {
        assert_eq!(pace(Some(1)).slice(), Pace::SHORTEST);
        assert_eq!(pace(Some(100_000)).slice(), 5_000);
        assert_eq!(pace(Some(u64::MAX)).slice(), Pace::LONGEST);
        assert_eq!(pace(None).slice(), Pace::LONGEST);
    }

    #[test]
    fn a_hurry_waits_for_no_rate() {
        // At this rate the test would never end.
        let mut pace = pace(Some(1));
        pace.wait(1 << 40, &AtomicBool::new(true));
    }

    #[test]
    fn without_a_rate_nothing_waits() {
        assert_eq!(
            pace(None).rate.owe(usize::MAX, Instant::now()),
            Duration::ZERO
        );
    }

    #[test]
    fn another_rate_holds_for_what_is_owed_already() {
        let now = Instant::now();
        let rate = Rate::new(Some(1_000));
        let pace = Pace::new(rate.clone());
        let due = rate.owe(100_000, now).as_secs_f64();
        assert!((99.8..=100.0).contains(&due), "{due}");
        rate.set(Some(100_000));
        let due = rate.owe(0, now + Duration::from_millis(10)).as_secs_f64();
        assert!((0.9..=1.0).contains(&due), "{due}");
        rate.set(None);
        let later = now + Duration::from_millis(20);
        assert_eq!(rate.owe(0, later), Duration::ZERO);
        // Nothing was saved meanwhile, and nothing is owed.
        rate.set(Some(1_000));
        let due = rate.owe(100, later + Duration::from_secs(60)).as_secs_f64();
        assert!((0.09..=0.1).contains(&due), "{due}");
        assert_eq!(pace.slice(), Pace::SHORTEST);
    }

    #[test]
    fn a_wait_ends_when_the_rate_is_lifted() {
        // At this rate the test would never end.
        let rate = Rate::new(Some(1));
        let mut pace = Pace::new(rate.clone());
        let waiting = thread::spawn(move || pace.wait(1 << 40, &AtomicBool::new(false)));
        rate.set(None);
        waiting.join().unwrap();
    }
}
