//! What a guest's memory is like, learned without moving it.
//!
//! ```text
//!   sample: pieces of 64 pages, evenly spread, more and more of them until time is over
//!      --> read, classed and encoded as a move would, for a link of that rate: bytes, time
//!
//!   probe: single pages, evenly spread
//!      read ---- a second ---- read ---- a second ---- read
//!                       changed        changed       in both: hot
//! ```
//!
//! Nothing is asked of the hypervisor but to read: no log of dirty pages is begun, and so nothing is
//! left behind, however this ends.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::codec::{AdaptiveEncoder, Sent as Taken};
use crate::digest::Digester;
use crate::error::{Error, Result};
use crate::guest::{Batch, Found, Moment, PageTable, Source};
use crate::held::{HOT_BYTES, Held};
use crate::pages::{PageSet, Pfn};
use crate::report::TrackerKind;
use crate::rounds::{FixedCost, Forecast, InRound, Limits, Prediction, Sent};

/// Pages that are read together where memory is sampled: compressed together they come to nearly
/// what larger batches do.
const PIECE: u64 = 64;

/// Pages read at once.
const READ_BATCH: usize = 1024;

/// Pages in a frame.
const FRAME_PAGES: usize = 256;

/// Parts in which pieces are taken.
const PARTS: u64 = 16;

/// Between two readings of the probe.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long one reading of the probe may take.
const PROBING: Duration = Duration::from_millis(300);

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Survey {
    /// Pages of the guest.
    pub pages: u64,
    /// Pages that were read to learn what they cost.
    pub sampled: u64,
    /// Of these, without content.
    pub empty: u64,
    /// Of these, as the destination has them.
    pub same: u64,
    /// Bytes that they come to.
    pub bytes: u64,
    /// How long a move would take for them: reading and encoding, or the link, whichever is slower.
    #[serde(rename = "seconds", with = "crate::rounds::seconds")]
    pub took: Duration,
    /// Of that, reading and digesting.
    #[serde(rename = "reading_seconds", with = "crate::rounds::seconds")]
    pub reading: Duration,
    /// Pages that were watched for changes.
    pub watched: u64,
    /// Pages, of all, that change in a second.
    pub dirty: f64,
    /// Of these, pages that had not changed in the second before.
    pub growth: f64,
    /// Pages, of all, that change in each second.
    pub hot: f64,
    /// Bytes that a changed page comes to.
    pub dirty_bytes: f64,
}

/// Looks at a guest for up to `time`, and two seconds more. `held` is what the destination has,
/// `rate` what the link takes, bytes a second.
///
/// # Errors
/// What Xen refuses; [`Error::Cancelled`] once `cancelled` says so.
pub fn survey(
    guest: &mut dyn Source,
    held: Held,
    digester: &Digester,
    rate: f64,
    time: Duration,
    cancelled: &dyn Fn() -> bool,
) -> Result<Survey> {
    // Looks where its pages are. Where there are holes only there is nothing to learn.
    let mut pages = PageSet::new(guest.facts().pages);
    guest.next_dirty(&mut pages, Moment::Live)?;
    let everything = guest.everything();
    let there = everything.len();
    let populated = guest.populated();
    let mut surveyor = Surveyor {
        guest,
        digester,
        rate: rate.max(1.0),
        cancelled,
    };
    let started = Instant::now();
    let sample = surveyor.sample(&everything, held, time)?;
    let page = started.elapsed().as_secs_f64() / sample.pages.max(1) as f64;
    let step = (page * there as f64 / PROBING.as_secs_f64())
        .ceil()
        .max(1.0) as u64;
    let changes = surveyor.watch(&everything, step)?;
    let seconds = INTERVAL.as_secs_f64();
    let [first, second] = &changes.found;
    let mut both = first.clone();
    both.intersect_with(second);
    let all = |count: u64| count as f64 * step as f64;
    Ok(Survey {
        pages: populated,
        sampled: sample.pages,
        empty: sample.empty,
        same: sample.same,
        bytes: sample.bytes,
        took: sample.took,
        reading: sample.reading,
        watched: there.div_ceil(step),
        dirty: all(first.len() + second.len()) / 2.0 / seconds,
        growth: all(second.len() - both.len()) / seconds,
        hot: all(both.len()),
        dirty_bytes: changes.bytes,
    })
}

impl Survey {
    /// What a move would take with these limits, over a link of `rate` bytes a second, where a
    /// handover costs `fixed`. It goes by `tracker`; `verify` says that all memory is compared.
    #[must_use]
    pub fn predict(
        &self,
        rate: f64,
        fixed: &FixedCost,
        limits: &Limits,
        tracker: TrackerKind,
        verify: bool,
    ) -> Option<Prediction> {
        let mut forecast = Forecast::new(*fixed);
        let mut limits = limits.clone();
        let all = self.pages as f64 / self.sampled.max(1) as f64;
        let reading = Duration::try_from_secs_f64(self.reading.as_secs_f64() * all).ok()?;
        if tracker == TrackerKind::Scan {
            forecast.looks_at_all(reading);
            // It can't tell which pages are hot, and holds none back.
            limits.looking = Duration::MAX;
        }
        if verify {
            forecast.verifies(reading);
        }
        let dirty = 1000.0;
        let bytes = self.dirty_bytes * dirty;
        // What is dirty takes the link as long as its bytes, and us as long as any page.
        let page = self.took.as_secs_f64() / self.sampled.max(1) as f64;
        let took = (bytes / rate.max(1.0)).max(page * dirty);
        forecast.sent(Sent {
            first: false,
            pages: dirty as u64,
            bytes: bytes as u64,
            took: Duration::try_from_secs_f64(took).ok()?,
        });
        let second = Duration::from_secs(1);
        forecast.dirtied(self.dirty as u64, self.growth as u64, second);
        let before = InRound {
            number: 1,
            done: self.sampled,
            left: self.pages,
            next: 0,
            hot: self.hot as u64,
            unseen: Duration::ZERO,
            spent: self.took,
            bytes: self.bytes,
            pages: self.pages,
        };
        let course = forecast.course(&before, &limits)?;
        Some(Prediction {
            seconds: fixed.set_up + course.rest.as_secs_f64() + fixed.clean_up,
            bytes: course.bytes as u64,
            downtime: course.downtime.as_secs_f64(),
        })
    }
}

struct Surveyor<'a> {
    guest: &'a mut dyn Source,
    digester: &'a Digester,
    rate: f64,
    cancelled: &'a dyn Fn() -> bool,
}

struct Sample {
    pages: u64,
    empty: u64,
    same: u64,
    bytes: u64,
    took: Duration,
    reading: Duration,
}

struct Changes {
    found: [PageSet; 2],
    bytes: f64,
}

impl Surveyor<'_> {
    /// Reads and encodes pieces of memory until `time` is over, or all of it.
    fn sample(&mut self, everything: &PageSet, held: Held, time: Duration) -> Result<Sample> {
        let pages = everything.pages();
        let started = Instant::now();
        let mut sender = Sender::new(held, self.rate);
        let mut read = 0;
        'all: for part in order(PARTS) {
            let pieces = (part..pages.div_ceil(PIECE)).step_by(PARTS as usize);
            let pfns: Vec<Pfn> = pieces
                .flat_map(|piece| piece * PIECE..(piece * PIECE + PIECE).min(pages))
                .filter(|pfn| everything.contains(*pfn))
                .collect();
            sender.held.begin_round();
            for pfns in pfns.chunks(READ_BATCH) {
                if started.elapsed() >= time {
                    break 'all;
                }
                self.read(pfns, &mut sender)?;
                read += pfns.len() as u64;
            }
        }
        Ok(Sample {
            pages: read,
            empty: sender.empty,
            same: sender.same,
            bytes: sender.bytes,
            took: sender.took(),
            reading: sender.reading,
        })
    }

    fn read(&mut self, pfns: &[Pfn], sender: &mut Sender) -> Result<()> {
        if (self.cancelled)() {
            return Err(Error::Cancelled);
        }
        let began = Instant::now();
        let mut batch = Batch::default();
        let mut deferred = PageSet::new(sender.held.table().pages());
        let known = sender.held.table();
        self.guest
            .read(pfns, known, Moment::Live, &mut batch, &mut deferred)?;
        sender.reading += began.elapsed();
        sender.encode(&batch)?;
        sender.working += began.elapsed();
        Ok(())
    }

    /// Reads every `step`th page three times, and tells which changed in between.
    fn watch(&mut self, everything: &PageSet, step: u64) -> Result<Changes> {
        let pages = everything.pages();
        let pfns: Vec<Pfn> = everything.iter().step_by(step as usize).collect();
        let mut known = PageTable::new(pages);
        // Whatever the destination has of them is old.
        let held = Held::nothing(pages, self.digester.clone(), HOT_BYTES);
        let mut sender = Sender::new(held, self.rate);
        let mut found = [PageSet::new(pages), PageSet::new(pages)];
        let mut changed = 0;
        let mut read_at = Instant::now();
        for reading in 0..3 {
            while read_at.elapsed() < INTERVAL && reading > 0 {
                if (self.cancelled)() {
                    return Err(Error::Cancelled);
                }
                let left = INTERVAL.saturating_sub(read_at.elapsed());
                std::thread::sleep(left.min(Duration::from_millis(50)));
            }
            read_at = Instant::now();
            sender.held.begin_round();
            for pfns in pfns.chunks(READ_BATCH) {
                let mut batch = Batch::default();
                let mut deferred = PageSet::new(pages);
                self.guest
                    .read(pfns, &known, Moment::Live, &mut batch, &mut deferred)?;
                for entry in &batch.entries {
                    known.set(entry.pfn, entry.state);
                }
                if let Some(found) = usize::checked_sub(reading, 1).and_then(|at| found.get_mut(at))
                {
                    found.extend(batch.entries.iter().map(|entry| entry.pfn));
                    changed += batch.entries.len() as u64;
                    sender.encode(&batch)?;
                }
            }
        }
        // Where nothing changed it doesn't matter.
        let bytes = sender.bytes as f64 / changed.max(1) as f64;
        Ok(Changes { found, bytes })
    }
}

/// Encodes as a move does, for a link that is not there.
struct Sender {
    held: Held,
    encoder: AdaptiveEncoder,
    rate: f64,
    bytes: u64,
    empty: u64,
    same: u64,
    working: Duration,
    /// Of that, reading.
    reading: Duration,
}

impl Sender {
    fn new(held: Held, rate: f64) -> Self {
        Sender {
            held,
            encoder: AdaptiveEncoder::default(),
            rate,
            bytes: 0,
            empty: 0,
            same: 0,
            working: Duration::ZERO,
            reading: Duration::ZERO,
        }
    }

    /// How long the link takes for what was encoded.
    fn crossing(&self) -> Duration {
        Duration::try_from_secs_f64(self.bytes as f64 / self.rate).unwrap_or(Duration::MAX)
    }

    /// Both at the same time.
    fn took(&self) -> Duration {
        self.working.max(self.crossing())
    }

    fn encode(&mut self, batch: &Batch) -> Result<()> {
        let mut encoded = Vec::new();
        self.same += batch.unchanged;
        for entries in batch.entries.chunks(FRAME_PAGES) {
            let encoder = self.encoder.batch();
            for entry in entries {
                let content = match entry.content {
                    Found::Nothing | Found::Zero => None,
                    Found::Slot(slot) => batch.content(slot),
                };
                self.empty += u64::from(content.is_none());
                self.held.send(encoder, entry.pfn, entry.state, content)?;
            }
            encoded.clear();
            let taken = Taken {
                bytes: self.bytes,
                held_up: self.crossing(),
                cpu: None,
            };
            self.encoder.finish(&mut encoded, taken);
            self.bytes += encoded.len() as u64;
        }
        Ok(())
    }
}

/// 0 to `parts` - 1, each far from those before it. `parts` is a power of two.
fn order(parts: u64) -> impl Iterator<Item = u64> {
    let bits = parts.trailing_zeros();
    (0..parts).map(move |part| match bits {
        0 => 0,
        bits => part.reverse_bits() >> (u64::BITS - bits),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_spread_evenly() {
        assert_eq!(order(8).collect::<Vec<_>>(), [0, 4, 2, 6, 1, 5, 3, 7]);
        assert_eq!(order(1).collect::<Vec<_>>(), [0]);
        let mut all: Vec<u64> = order(PARTS).collect();
        all.sort_unstable();
        assert_eq!(all, (0..PARTS).collect::<Vec<_>>());
    }

    fn quiet() -> Survey {
        Survey {
            pages: 32_768,
            sampled: 8192,
            empty: 4096,
            same: 0,
            bytes: 8 << 20,
            took: Duration::from_secs(2),
            reading: Duration::from_secs(1),
            watched: 32_768,
            dirty: 0.0,
            growth: 0.0,
            hot: 0.0,
            dirty_bytes: 0.0,
        }
    }

    fn foretold(survey: Survey, tracker: TrackerKind, verify: bool) -> Prediction {
        let (fixed, limits) = (FixedCost::default(), Limits::default());
        survey
            .predict(4e6, &fixed, &limits, tracker, verify)
            .unwrap()
    }

    #[test]
    fn what_reads_all_memory_in_the_silence_is_part_of_it() {
        let log = foretold(quiet(), TrackerKind::LogDirty, false);
        // Of 32,768 pages 8,192 took a second.
        let scan = foretold(quiet(), TrackerKind::Scan, false);
        assert!((scan.downtime - log.downtime - 4.0).abs() < 1e-3);
        let verified = foretold(quiet(), TrackerKind::LogDirty, true);
        assert!((verified.downtime - log.downtime - 4.0).abs() < 1e-3);
    }

    #[test]
    fn a_quiet_guest_is_one_round_and_the_fixed_cost() {
        let fixed = FixedCost::default();
        let predicted = foretold(quiet(), TrackerKind::LogDirty, false);
        let silence = fixed.total().as_secs_f64();
        assert!((predicted.downtime - silence).abs() < 1e-3);
        let seconds = fixed.set_up + 8.0 + silence + fixed.clean_up;
        assert!((predicted.seconds - seconds).abs() < 1e-2, "{predicted:?}");
        assert_eq!(predicted.bytes >> 20, 32);
    }

    #[test]
    fn hot_pages_go_once_more_in_the_silence() {
        let busy = Survey {
            dirty: 2048.0,
            hot: 2048.0,
            dirty_bytes: 4000.0,
            ..quiet()
        };
        let fixed = FixedCost::default();
        let predicted = foretold(busy, TrackerKind::LogDirty, false);
        let silence = fixed.total().as_secs_f64() + 2.048;
        assert!((predicted.downtime - silence).abs() < 1e-2, "{predicted:?}");
        let bytes = (32 << 20) + 8_192_000;
        assert!(predicted.bytes.abs_diff(bytes) < 10_000, "{predicted:?}");
    }
}
