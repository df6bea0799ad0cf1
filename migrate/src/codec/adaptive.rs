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
        let raw = self.batch.raw_bytes();
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
