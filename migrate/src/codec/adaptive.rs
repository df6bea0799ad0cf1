//! Encoding by choice: the one place of the codec that looks at a clock.

use super::choice::{Choice, Encoded, HARDLY, Probed};
use super::encode::{BatchEncoder, BatchStatistics};
use super::link_rate::Sent;
use super::technique::Technique;
use nix::time::ClockId;
use std::time::{Duration, Instant};

/// Finishes batches with the technique that pays, and measures how it does.
///
/// All calls come from the thread that produces the batches.
#[derive(Debug)]
pub struct AdaptiveEncoder {
    choice: Choice,
    batch: BatchEncoder,
    /// When the last batch was done, or production went on.
    last: Instant,
    waiting: Duration,
}

impl Default for AdaptiveEncoder {
    fn default() -> Self {
        AdaptiveEncoder {
            choice: Choice::new(),
            batch: BatchEncoder::new(),
            last: Instant::now(),
            waiting: Duration::ZERO,
        }
    }
}

/// A point in time, by both clocks.
struct Clocks {
    wall: Instant,
    cpu: Option<Duration>,
}

impl Clocks {
    fn now() -> Self {
        Clocks {
            wall: Instant::now(),
            cpu: ClockId::CLOCK_THREAD_CPUTIME_ID
                .now()
                .ok()
                .map(Duration::from),
        }
    }

    /// Elapsed time until `end`, and the thread's CPU time.
    fn until(&self, end: &Self) -> (Duration, Duration) {
        let took = end.wall - self.wall;
        let cpu = match (self.cpu, end.cpu) {
            (Some(start), Some(end)) => end.saturating_sub(start),
            _ => took,
        };
        (took, cpu)
    }
}

impl AdaptiveEncoder {
    /// The batch, to add pages to. [`AdaptiveEncoder::finish`] sets its technique.
    pub fn batch(&mut self) -> &mut BatchEncoder {
        &mut self.batch
    }

    /// What is known by now.
    #[must_use]
    pub const fn choice(&self) -> &Choice {
        &self.choice
    }

    /// Goes on after a pause in which nothing was produced, with what the link has taken so far.
    pub fn resume(&mut self, sent: Sent) {
        self.choice.resume(sent);
        self.waiting = Duration::ZERO;
        self.last = Instant::now();
    }

    /// Notes that the producer waited for the link.
    pub fn waited(&mut self, waiting: Duration) {
        self.waiting += waiting;
    }

    /// Appends the batch to `to` and empties it, as [`BatchEncoder::finish`] does. `sent` is what
    /// the link has taken so far.
    pub fn finish(&mut self, to: &mut Vec<u8>, sent: Sent) -> BatchStatistics {
        let waiting = std::mem::take(&mut self.waiting);
        let raw = self.batch.block_bytes();
        let order = self.choice.next(raw);
        let mut technique = order.technique;
        if order.sample && raw > 0 {
            let (from, block) = self.batch.sample();
            let ratio = block as f64 / from.max(1) as f64;
            if ratio > HARDLY {
                technique = Technique::Stored;
                self.choice.sampled(raw, ratio);
            }
        }
        let sampled = Clocks::now();
        let probe_block = order
            .probe
            .map(|probe| (probe, self.batch.block_length_with(probe)));
        let probed = Clocks::now();

        self.batch.set_technique(technique);
        let statistics = self.batch.finish(to);
        let end = Clocks::now();
        let (took, cpu) = probed.until(&end);
        let (probing, probing_cpu) = sampled.until(&probed);
        // Whatever is not compressing, waiting or learning.
        let reading = (end.wall - self.last)
            .saturating_sub(took)
            .saturating_sub(probing)
            .saturating_sub(waiting);
        self.choice.encoded(
            Encoded {
                technique,
                raw,
                block: statistics.block,
                cpu,
                took,
                reading,
                waiting: waiting + probing,
            },
            sent,
        );
        if let Some((probe, probe_block)) = probe_block {
            self.choice.probed(Probed {
                technique,
                probe,
                raw,
                block: statistics.block,
                probe_block,
                cpu: probing_cpu,
            });
        }
        self.last = end.wall;
        statistics
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{BatchDecoder, Content};
    use crate::pages::{PAGE_SIZE, Page, PageType};

    /// Content that shrinks, or doesn't.
    fn page(seed: u64, shrinks: bool) -> Page {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        std::array::from_fn(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if shrinks {
                state as u8 & 3
            } else {
                state as u8
            }
        })
    }

    #[test]
    fn whatever_the_link_does_pages_come_back() {
        let mut encoder = AdaptiveEncoder::default();
        let mut decoder = BatchDecoder::new();
        let mut sent = Sent::default();
        encoder.resume(sent);
        let mut bytes = Vec::new();
        for at in 0..60 {
            let shrinks = !(20..40).contains(&at);
            let pages: Vec<Page> = (0..64).map(|pfn| page(at * 64 + pfn, shrinks)).collect();
            for (pfn, page) in (0..).zip(&pages) {
                encoder.batch().push(pfn, PageType::Normal, page).unwrap();
            }
            bytes.clear();
            let written = encoder.finish(&mut bytes, sent);
            assert_eq!((written.raw, written.bytes), (64, bytes.len()));
            let batch = decoder.decode(&bytes, 64).unwrap();
            assert!(
                batch
                    .iter()
                    .zip(&pages)
                    .all(|(it, page)| it.content == Content::Raw(page))
            );
            if !shrinks {
                assert_eq!(written.technique, Technique::Stored);
            }
            // A link of 100 Mbit/s that holds the writer up, and then one that takes everything.
            sent.bytes += bytes.len() as u64;
            if at < 30 {
                let held_up = Duration::from_secs_f64(bytes.len() as f64 / 12.5e6);
                sent.held_up += held_up;
                encoder.waited(held_up);
            }
        }
    }

    #[test]
    fn a_batch_without_raw_pages_is_finished_as_well() {
        let mut encoder = AdaptiveEncoder::default();
        let mut bytes = Vec::new();
        let written = encoder.finish(&mut bytes, Sent::default());
        assert_eq!(written, BatchStatistics::default());
        encoder.batch().push_zero(3, PageType::Normal).unwrap();
        let written = encoder.finish(&mut bytes, Sent::default());
        assert_eq!((written.zero, written.block), (1, 0));
        assert_eq!(written.technique, Technique::Stored);
        let batch = page(1, true);
        encoder.batch().push(3, PageType::Normal, &batch).unwrap();
        let written = encoder.finish(&mut bytes, Sent::default());
        assert_eq!(written.technique, Technique::Zstd1);
        assert!(written.block < PAGE_SIZE);
    }
}
