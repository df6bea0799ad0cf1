//! Which technique pays, decided anew for each batch from what was measured: a pure policy.
//!
//! A source reads pages in one thread, has them compressed by workers, and another thread sends
//! what was encoded before. So the slowest of these sets the pace, in bytes of the guest per second:
//!
//! ```text
//!   rate(technique) = min( 1 / reading,  workers / (slowdown * cost),  link / ratio )
//!
//!   or, where the thread that reads compresses as well:
//!
//!   rate(technique) = min( 1 / (reading + slowdown * cost),  link / ratio )
//!
//!   reading    seconds per byte that the producer spends on anything but compressing
//!   workers    threads that compress
//!   cost       CPU seconds per byte of the technique
//!   slowdown   elapsed seconds per CPU second: others want the CPU too
//!   link       bytes a second, see `LinkRate`
//!   ratio      bytes to be sent per byte
//! ```
//!
//! In a small dom0 it is another thing that counts. One processor reads, compresses, encrypts and
//! sends, and what one of these takes the others miss. Where none is ever idle, how long reading and
//! compressing take says more about ssh than about themselves:
//!
//! ```text
//!   rate(technique) = min( processors / (reading' + cost + ratio * sending),  link / ratio )
//!
//!   and elsewhere no more than that
//!
//!   processors  those that nobody else needs, see `LinkRate`
//!   reading'    CPU seconds per byte that the producer spends on anything but compressing
//!   sending     CPU seconds that a byte that is sent takes of who sends, and of ssh, if that carries it
//! ```
//!
//! The cheapest technique within 2 % of the highest rate is taken, and the one in use is kept
//! within 4 %. Where no processor is idle it becomes stronger one step at a time; and where ssh
//! carries as well, one that sends more has to promise a fifth of the time: what sending takes
//! wavers by nearly as much there, and bytes are dear on a WAN. It begins with what was expected of
//! the link. Where nothing was, zstd at level 1 is used until the link is known: on a slow link that
//! is not far from the best, and on a fast one there is little time to lose.
//!
//! **What is measured.** Each batch gives the ratio and the cost of the technique that wrote it;
//! half of what was known is forgotten after 4 MiB. Of the others' ratios it tells only indirectly:
//! now and then a batch is compressed by a neighbour as well, for the comparison alone (a probe).
//! Probes take 2 % of the time at most. Ratios of two techniques over the same content follow a
//! power law well enough: `ratio(b) = ratio(a) ^ exponent`. It is 1 for both where nothing shrinks,
//! and the exponent changes less with content than either ratio. Costs that were not measured yet
//! are typical ones, scaled by how this machine does with what was measured.
//!
//! **Noise** is a part of the content that costs nothing, where it goes beside the block
//! ([`is_noise`](super::is_noise)). What is stored tells nothing of how it would shrink, so that one
//! probe is enough to be believed then.

use super::link_rate::{LinkRate, Processors, Sent};
use super::technique::Technique;
use std::time::Duration;

/// The technique in use is kept for a cheaper one while it is this close to the best one, where what
/// sending takes is known late.
const NOT_WORTH_MORE_BYTES: f64 = 0.8;

/// Content that shrinks to more than this hardly shrinks.
const HARDLY: f64 = 0.97;

/// A technique this close to the best one is as good, if it is cheaper.
const AS_GOOD: f64 = 0.98;

/// The technique in use is kept while it is this close to the best one.
const GOOD_ENOUGH: f64 = 0.96;

/// Raw bytes after which a measurement counts half.
const HALF_LIFE: f64 = 4_194_304.0;

/// The part of the time that probes may take.
const PROBING: f64 = 0.02;

/// The fewest raw bytes for a probe: fewer tell little.
const PROBE_BYTES: usize = 131_072;

/// How much is left of what probes told when another one comes.
const PROBE_MEMORY: f64 = 0.8;

/// The ratio of LZ4 to begin with: what an idle guest's pages have, but for the zero ones.
const FIRST_RATIO: f64 = 0.35;

const TECHNIQUES: usize = Technique::ALL.len();

/// What is typical of each technique: CPU seconds per raw byte, and the exponent of its ratio to
/// the one of LZ4.
const TYPICAL: [(f64, f64); TECHNIQUES] = [
    (0.1e-9, 0.0),
    (1.4e-9, 1.0),
    (1.8e-9, 1.4),
    (2.8e-9, 1.5),
    (7.7e-9, 1.6),
];

/// How to encode the next batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// The technique.
    pub technique: Technique,
    /// Compress the batch by this one as well, to learn.
    pub probe: Option<Technique>,
}

/// A batch that was produced: read, and put together.
#[derive(Debug, Clone, Copy)]
pub struct Produced {
    /// Bytes of its content: of noise as well.
    pub raw: usize,
    /// What the producer spent on it, but for compressing and waiting.
    pub reading: Duration,
    /// The CPU time in that.
    pub reading_cpu: Duration,
    /// Elapsed time since the last batch was.
    pub elapsed: Duration,
    /// What the host's processors did in that time, if that is known.
    pub processors: Option<Processors>,
}

/// A batch that was encoded.
#[derive(Debug, Clone, Copy)]
pub struct Encoded {
    /// What was asked for, also where the block was stored in the end because it grew.
    pub technique: Technique,
    /// Bytes of its content: of noise as well.
    pub raw: usize,
    /// Bytes that these came to: those of noise, and of the block.
    pub block: usize,
    /// CPU time for compressing.
    pub cpu: Duration,
    /// Elapsed time for compressing.
    pub took: Duration,
}

/// A batch that was compressed a second time.
#[derive(Debug, Clone, Copy)]
pub struct Probed {
    /// What wrote it.
    pub technique: Technique,
    /// What was tried.
    pub probe: Technique,
    /// Bytes of its content: of noise as well.
    pub raw: usize,
    /// Bytes that these came to.
    pub block: usize,
    /// Bytes that they would have come to.
    pub probe_block: usize,
    /// CPU time for the second time.
    pub cpu: Duration,
}

/// A mean in which later bytes weigh more.
#[derive(Debug, Clone, Copy)]
struct Smoothed {
    value: f64,
    /// Bytes that it stands for.
    bytes: f64,
}

impl Smoothed {
    /// What is believed until something is measured; the first measurement replaces it.
    const fn assumed(value: f64) -> Self {
        Smoothed { value, bytes: 0.0 }
    }

    const fn is_measured(self) -> bool {
        self.bytes > 0.0
    }

    fn add(&mut self, value: f64, bytes: f64) {
        self.fade(bytes);
        self.value = (self.value * self.bytes + value * bytes) / (self.bytes + bytes);
        self.bytes += bytes;
    }

    /// So many bytes passed of which nothing was measured.
    fn fade(&mut self, bytes: f64) {
        self.bytes *= (-bytes / HALF_LIFE).exp2();
    }
}

/// The same content by two neighbours, in bytes that were smoothed over probes.
#[derive(Debug, Clone, Copy)]
struct Pair {
    raw: f64,
    cheaper: f64,
    stronger: f64,
}

impl Pair {
    /// The exponent from the cheaper one's ratio to the stronger one's.
    fn exponent(self) -> f64 {
        let (cheaper, stronger) = (self.cheaper / self.raw, self.stronger / self.raw);
        if cheaper > HARDLY || stronger <= 0.0 {
            return 1.0;
        }
        (stronger.ln() / cheaper.ln()).clamp(0.5, 4.0)
    }

    fn add(&mut self, raw: usize, cheaper: usize, stronger: usize) {
        self.raw = self.raw * PROBE_MEMORY + raw as f64;
        self.cheaper = self.cheaper * PROBE_MEMORY + cheaper as f64;
        self.stronger = self.stronger * PROBE_MEMORY + stronger as f64;
    }
}

/// Chooses techniques.
#[derive(Debug, Clone)]
pub struct Choice {
    link: LinkRate,
    /// Threads that compress; none where the one that reads does.
    workers: usize,
    current: Technique,
    /// Of the technique beside it.
    ratio: Smoothed,
    ratio_of: Technique,
    costs: [Smoothed; TECHNIQUES],
    reading: Smoothed,
    /// In CPU time.
    reading_cpu: Smoothed,
    slowdown: Smoothed,
    /// The pair of LZ4 and what comes after it, and so on.
    pairs: [Pair; TECHNIQUES - 2],
    /// Time for reading that no raw byte was found for yet, and CPU time.
    unpaid: f64,
    unpaid_cpu: f64,
    elapsed: f64,
    probing: f64,
    probe_stronger: bool,
}

impl Default for Choice {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Choice {
    /// Knows nothing yet. Batches will be compressed by so many threads; by none of their own
    /// where it is 0.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        let typical = |at: usize| FIRST_RATIO.powf(TYPICAL[at].1) * PROBE_BYTES as f64;
        Choice {
            link: LinkRate::default(),
            workers,
            current: Technique::Zstd1,
            ratio: Smoothed::assumed(FIRST_RATIO),
            ratio_of: Technique::Lz4,
            costs: TYPICAL.map(|(cost, _)| Smoothed::assumed(cost)),
            reading: Smoothed::assumed(0.5e-9),
            reading_cpu: Smoothed::assumed(0.5e-9),
            slowdown: Smoothed::assumed(1.0),
            pairs: std::array::from_fn(|at| Pair {
                raw: PROBE_BYTES as f64,
                cheaper: typical(at + 1),
                stronger: typical(at + 2),
            }),
            unpaid: 0.0,
            unpaid_cpu: 0.0,
            elapsed: 0.0,
            probing: 0.0,
            probe_stronger: true,
        }
    }

    /// The technique in use.
    #[must_use]
    pub const fn technique(&self) -> Technique {
        self.current
    }

    /// What is known of the link.
    #[must_use]
    pub const fn link(&self) -> &LinkRate {
        &self.link
    }

    /// Begins with what is believed of the link, bytes a second.
    pub fn expect(&mut self, link: f64) {
        self.link.expect(link);
    }

    /// Goes on after a pause in which nothing was produced.
    pub fn resume(&mut self, sent: Sent) {
        self.link.resume(sent);
    }

    /// How to encode a batch that has `raw` bytes of raw pages.
    pub fn next(&mut self, raw: usize) -> Order {
        self.decide();
        Order {
            technique: self.current,
            probe: self.next_probe(raw),
        }
    }

    fn decide(&mut self) {
        let link = match self.link.bytes_per_second() {
            Some(link) => link,
            // It has never been what held anything up.
            None if self.link.waits_for_processors() => f64::INFINITY,
            None => return,
        };
        let rates = Technique::ALL.map(|technique| self.rate(technique, link));
        let best = rates.iter().copied().fold(0.0, f64::max);
        let own = rates[self.current as usize];
        if own >= GOOD_ENOUGH * best {
            return;
        }
        let late =
            self.link.waits_for_processors() && self.link.sending().is_some_and(|it| it.late);
        if let Some((technique, _)) = Technique::ALL
            .into_iter()
            .zip(rates)
            .find(|(_, rate)| *rate >= AS_GOOD * best)
        {
            if late && technique < self.current && own >= NOT_WORTH_MORE_BYTES * best {
                return;
            }
            self.current = if self.link.waits_for_processors() {
                // What a stronger one costs is a guess until it was tried, and all wait meanwhile.
                let next = self.current.stronger().unwrap_or(self.current);
                technique.min(next)
            } else {
                technique
            };
        }
    }

    /// Bytes of the guest per second.
    fn rate(&self, technique: Technique, link: f64) -> f64 {
        let cost = self.cost(technique);
        let ratio = self.ratio(technique);
        let carried = link / ratio;
        let together = self.link.sending().map_or(f64::INFINITY, |sending| {
            sending.processors / (self.reading_cpu.value + cost + ratio * sending.per_byte)
        });
        if self.link.waits_for_processors() {
            return carried.min(together);
        }
        let compressing = self.slowdown.value * cost;
        let encoding = match self.workers {
            0 => self.reading.value + compressing,
            workers => self.reading.value.max(compressing / workers as f64),
        };
        carried.min(encoding.recip()).min(together)
    }

    /// CPU seconds per raw byte.
    fn cost(&self, technique: Technique) -> f64 {
        let own = self.costs[technique as usize];
        if own.is_measured() {
            return own.value;
        }
        // The nearest one that was measured, of the compressing ones.
        let nearest = (Technique::Lz4 as usize..TECHNIQUES)
            .filter(|at| self.costs[*at].is_measured())
            .min_by_key(|at| at.abs_diff(technique as usize));
        nearest.map_or(own.value, |at| {
            own.value * self.costs[at].value / TYPICAL[at].0
        })
    }

    fn ratio(&self, technique: Technique) -> f64 {
        if technique == Technique::Stored {
            return 1.0;
        }
        let exponent = self.exponent(technique) / self.exponent(self.ratio_of);
        self.ratio.value.powf(exponent).clamp(1e-4, 1.0)
    }

    /// From the ratio of LZ4 to this one's.
    fn exponent(&self, technique: Technique) -> f64 {
        let pairs = (technique as usize).saturating_sub(Technique::Lz4 as usize);
        self.pairs
            .iter()
            .take(pairs)
            .map(|pair| pair.exponent())
            .product()
    }

    /// A neighbour, if there is time for one.
    fn next_probe(&mut self, raw: usize) -> Option<Technique> {
        if raw < PROBE_BYTES {
            return None;
        }
        let stronger = self.current.stronger();
        // That nothing comes of storing is known.
        let cheaper = self.current.cheaper().filter(|it| *it != Technique::Stored);
        let probe = if self.probe_stronger {
            stronger.or(cheaper)?
        } else {
            cheaper.or(stronger)?
        };
        let seconds = self.cost(probe) * raw as f64;
        (self.probing + seconds <= PROBING * self.elapsed).then(|| {
            self.probe_stronger = !self.probe_stronger;
            probe
        })
    }

    /// Learns from a batch that was produced, and from what was sent since the last one.
    pub fn produced(&mut self, batch: Produced, sent: Sent) {
        self.link.note(sent, batch.elapsed, batch.processors);
        self.elapsed += batch.elapsed.as_secs_f64();
        self.unpaid += batch.reading.as_secs_f64();
        self.unpaid_cpu += batch.reading_cpu.as_secs_f64();
        if batch.raw == 0 {
            return;
        }
        let bytes = batch.raw as f64;
        self.reading
            .add(std::mem::take(&mut self.unpaid) / bytes, bytes);
        self.reading_cpu
            .add(std::mem::take(&mut self.unpaid_cpu) / bytes, bytes);
    }

    /// Learns from a batch that was encoded.
    pub fn encoded(&mut self, batch: Encoded) {
        if batch.raw == 0 {
            return;
        }
        let bytes = batch.raw as f64;
        let cpu = batch.cpu.as_secs_f64();
        self.costs[batch.technique as usize].add(cpu / bytes, bytes);
        if cpu > 0.0 {
            let slowdown = batch.took.as_secs_f64() / cpu;
            self.slowdown.add(slowdown.clamp(1.0, 20.0), bytes);
        }
        if batch.technique == Technique::Stored {
            // It tells nothing of how far such content shrinks, and what did before tells less.
            self.ratio.fade(bytes);
        } else {
            self.shrunk(batch.technique, batch.block as f64 / bytes, bytes);
        }
    }

    fn shrunk(&mut self, technique: Technique, ratio: f64, bytes: f64) {
        if technique != self.ratio_of {
            self.ratio.value = self.ratio(technique);
            self.ratio_of = technique;
        }
        self.ratio.add(ratio.clamp(1e-4, 1.0), bytes);
    }

    /// Learns from a batch that was compressed a second time.
    pub fn probed(&mut self, probed: Probed) {
        let cpu = probed.cpu.as_secs_f64();
        self.probing += cpu;
        if probed.raw == 0 {
            return;
        }
        let bytes = probed.raw as f64;
        self.costs[probed.probe as usize].add(cpu / bytes, bytes);
        if probed.technique == Technique::Stored {
            self.shrunk(probed.probe, probed.probe_block as f64 / bytes, bytes);
            return;
        }
        let (cheaper, blocks) = if probed.technique < probed.probe {
            (probed.technique, (probed.block, probed.probe_block))
        } else {
            (probed.probe, (probed.probe_block, probed.block))
        };
        let pair = (cheaper as usize).checked_sub(Technique::Lz4 as usize);
        if let Some(pair) = pair.and_then(|at| self.pairs.get_mut(at)) {
            pair.add(probed.raw, blocks.0, blocks.1);
        }
    }
}

#[cfg(test)]
mod tests;
