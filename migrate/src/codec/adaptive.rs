//! Encoding by choice, on as many cores as are given: the one place of the codec that looks at a
//! clock.
//!
//! ```text
//!   producer    batch: filled, in order      jobs          workers: compress
//!       ^                 |----------------> [ ][ ] -----> [ ] [ ] [ ]
//!       |                 |                                 |       |
//!       |   empty batches, figures  <-----------------------+       |
//!       |                 v                                         v
//!       |         Encoding, Encoding, ...  one for each batch: its bytes, once they are there
//! ```
//!
//! What is in a batch is decided while it is filled, by one thread, so the order in which batches
//! are compressed is of no matter, as long as they are sent in the order in which they were
//! filled. Their memory is bounded: there are two batches more than workers.

use super::PREFIX_LEAST;
use super::choice::{Choice, Encoded, Order, Probed, Produced};
use super::encode::{BatchEncoder, BatchStatistics, Compressor};
use super::link_rate::{Processors, Sent};
use super::technique::{PagesByTechnique, Technique};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use nix::time::ClockId;
use nix::unistd::{SysconfVar, sysconf};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// The most threads that compress: more than any link needs.
pub const MAX_WORKERS: usize = 16;

/// The bytes of a batch, received once they are there. Where the thread that makes them ended
/// without, none ever come, and receiving fails.
pub type Encoding = Receiver<Vec<u8>>;

/// Finishes batches with the technique that pays, and measures how it does.
///
/// All calls come from the thread that produces the batches.
pub struct AdaptiveEncoder {
    choice: Choice,
    batch: BatchEncoder,
    /// The last block that the next ones can be compressed with. None where it was not kept.
    before: Option<Arc<Vec<u8>>>,
    /// Empty ones, for batches to come.
    spare: Vec<BatchEncoder>,
    workers: Option<Workers>,
    compressed: PagesByTechnique,
    /// When the last batch was done, or production went on.
    last: Clocks,
    processors: ProcessorClock,
    waiting: Duration,
    /// CPU time of workers that was not counted yet.
    worked: Duration,
}

/// Threads that compress. They end when this is dropped.
struct Workers {
    jobs: Sender<Job>,
    done: Receiver<Done>,
    under_way: usize,
}

struct Job {
    batch: BatchEncoder,
    order: Order,
    bytes: Sender<Vec<u8>>,
}

struct Done {
    batch: BatchEncoder,
    /// None where it failed.
    work: Option<Work>,
}

/// What compressing a batch came to.
struct Work {
    statistics: BatchStatistics,
    technique: Technique,
    /// Bytes of its content, and what they came to.
    raw: usize,
    block: usize,
    cpu: Duration,
    took: Duration,
    probed: Option<Probed>,
    /// Elapsed time for what was compressed for the comparison alone, and CPU time.
    probing: Duration,
    probing_cpu: Duration,
}

impl Default for AdaptiveEncoder {
    fn default() -> Self {
        Self::new(1)
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

/// Sees what this host's processors do.
struct ProcessorClock {
    /// All of the host's, as its idle time is.
    count: usize,
    /// Where that stands. It is looked at for each batch, and so kept open.
    uptime: Option<File>,
    last: Option<ProcessorTimes>,
}

/// Since the host was started.
#[derive(Clone, Copy)]
struct ProcessorTimes {
    wall: Instant,
    idle: Duration,
}

impl ProcessorClock {
    fn new() -> Self {
        let online = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten();
        ProcessorClock {
            count: online.map_or(1, |count| usize::try_from(count).unwrap_or(1)),
            uptime: File::open("/proc/uptime").ok(),
            last: None,
        }
    }

    /// What they did since it was asked last, while `encoding` took so much CPU time.
    fn look(&mut self, encoding: Duration) -> Option<Processors> {
        let now = self.uptime.as_ref().and_then(ProcessorTimes::now);
        let last = std::mem::replace(&mut self.last, now)?;
        let now = now?;
        let count = self.count;
        let idle = now.idle.saturating_sub(last.idle);
        let all = (now.wall - last.wall) * count as u32;
        Some(Processors {
            count,
            idle,
            others: all.saturating_sub(idle).saturating_sub(encoding),
        })
    }
}

impl ProcessorTimes {
    /// None where this is not told.
    fn now(uptime: &File) -> Option<Self> {
        // Two numbers.
        let mut text = [0; 64];
        let length = uptime.read_at(&mut text, 0).ok()?;
        Some(ProcessorTimes {
            wall: Instant::now(),
            idle: idle_time(str::from_utf8(&text[..length]).ok()?)?,
        })
    }
}

/// How long all processors together were idle: the second number of `/proc/uptime`.
fn idle_time(uptime: &str) -> Option<Duration> {
    let seconds = uptime.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// Compresses a batch as `order` says, appends it to `to`, and empties it.
fn work(batch: &mut BatchEncoder, order: Order, to: &mut Vec<u8>) -> Work {
    let (raw, noise) = (batch.content_bytes(), batch.noise_bytes());
    let technique = order.technique;
    let begun = Clocks::now();
    let probe_block = order
        .probe
        .map(|probe| (probe, batch.block_length_with(probe)));
    let probed = Clocks::now();
    batch.set_technique(technique);
    let statistics = batch.finish(to);
    let (took, cpu) = probed.until(&Clocks::now());
    let (probing, probing_cpu) = begun.until(&probed);
    Work {
        statistics,
        technique,
        raw,
        block: statistics.block + noise,
        cpu,
        took,
        probed: probe_block.map(|(probe, probe_block)| Probed {
            technique,
            probe,
            raw,
            block: statistics.block + noise,
            probe_block: probe_block + noise,
            cpu: probing_cpu,
        }),
        probing,
        probing_cpu,
    }
}

/// A worker: until there are no jobs any more.
fn compress(jobs: &Receiver<Job>, done: &Sender<Done>) {
    // One for all batches that this thread compresses.
    let mut compressor = Compressor::default();
    while let Ok(Job {
        mut batch,
        order,
        bytes,
    }) = jobs.recv()
    {
        let mut encoded = Vec::new();
        batch.swap_compressor(&mut compressor);
        let result = catch_unwind(AssertUnwindSafe(|| work(&mut batch, order, &mut encoded)));
        let work = match result {
            Ok(work) => {
                batch.swap_compressor(&mut compressor);
                // Whoever does not want them any more has ended.
                let _ = bytes.send(encoded);
                Some(work)
            }
            Err(_) => {
                batch = BatchEncoder::new();
                compressor = Compressor::default();
                None
            }
        };
        if done.send(Done { batch, work }).is_err() {
            return;
        }
    }
}

impl Workers {
    fn start(count: usize) -> Self {
        let (jobs, waiting) = unbounded::<Job>();
        let (finished, done) = unbounded();
        for _ in 0..count {
            let (waiting, finished) = (waiting.clone(), finished.clone());
            thread::spawn(move || compress(&waiting, &finished));
        }
        Workers {
            jobs,
            done,
            under_way: 0,
        }
    }
}

impl AdaptiveEncoder {
    /// Compresses on so many cores, by threads of its own; with one, by the thread that calls.
    #[must_use]
    pub fn new(cores: usize) -> Self {
        let workers = match cores.min(MAX_WORKERS) {
            0 | 1 => 0,
            more => more,
        };
        AdaptiveEncoder {
            choice: Choice::new(workers),
            batch: BatchEncoder::new(),
            before: None,
            spare: (0..=workers).map(|_| BatchEncoder::new()).collect(),
            workers: (workers > 0).then(|| Workers::start(workers)),
            compressed: PagesByTechnique::default(),
            last: Clocks::now(),
            processors: ProcessorClock::new(),
            waiting: Duration::ZERO,
            worked: Duration::ZERO,
        }
    }

    /// The batch, to add pages to. It is filled for the technique in use; finishing it sets the one
    /// that it is written by.
    pub fn batch(&mut self) -> &mut BatchEncoder {
        self.batch.set_technique(self.choice.technique());
        &mut self.batch
    }

    /// What is known by now.
    #[must_use]
    pub const fn choice(&self) -> &Choice {
        &self.choice
    }

    /// Begins with what is believed of the link, bytes a second, before anything is sent.
    pub fn expect(&mut self, link: f64) {
        self.choice.expect(link);
    }

    /// Goes on after a pause in which nothing was produced, with what the link has taken so far.
    pub fn resume(&mut self, sent: Sent) {
        self.choice.resume(sent);
        self.waiting = Duration::ZERO;
        self.last = Clocks::now();
        self.worked = Duration::ZERO;
        self.processors.look(Duration::ZERO);
    }

    /// Notes that the producer waited for the link.
    pub fn waited(&mut self, waiting: Duration) {
        self.waiting += waiting;
    }

    /// Has the batch compressed, and goes on with an empty one; waits while all workers are busy
    /// and no batch is left. `sent` is what the link has taken so far.
    pub fn hand_out(&mut self, sent: Sent) -> Encoding {
        let (bytes, encoding) = bounded(1);
        if self.workers.is_none() {
            let mut encoded = Vec::new();
            self.finish(&mut encoded, sent);
            // Its receiver is here, and has room.
            let _ = bytes.send(encoded);
            return encoding;
        }
        self.take_done(false);
        let order = self.choice.next(self.batch.block_bytes());
        let raw = self.batch.content_bytes();
        self.look_back(order);
        let next = self.next_batch();
        let batch = std::mem::replace(&mut self.batch, next);
        self.produced(raw, None, sent);
        if let Some(workers) = &mut self.workers
            && workers
                .jobs
                .send(Job {
                    batch,
                    order,
                    bytes,
                })
                .is_ok()
        {
            workers.under_way += 1;
        }
        encoding
    }

    /// Appends the batch to `to` and empties it, as [`BatchEncoder::finish`] does, in this thread.
    /// `sent` is what the link has taken so far.
    pub fn finish(&mut self, to: &mut Vec<u8>, sent: Sent) -> BatchStatistics {
        let order = self.choice.next(self.batch.block_bytes());
        self.look_back(order);
        let work = work(&mut self.batch, order, to);
        self.produced(work.raw, Some(&work), sent);
        self.learn(&work);
        work.statistics
    }

    /// Gives the batch the block before, and keeps its own for the next: where they are of use.
    fn look_back(&mut self, order: Order) {
        self.batch.set_prefix(self.before.clone());
        if self.batch.block_bytes() >= PREFIX_LEAST {
            // The destination has it in any case; here it costs a copy.
            let keep = order.technique.looks_back();
            self.before = keep.then(|| Arc::new(self.batch.block().to_vec()));
        }
    }

    /// How many raw pages and deltas each technique wrote since this was asked last, of all batches
    /// that were handed out: waits for those that are still under way.
    pub fn take_compressed(&mut self) -> PagesByTechnique {
        self.take_done(true);
        std::mem::take(&mut self.compressed)
    }

    /// Notes how long it took to produce a batch of so much content, without what was waited, and
    /// without the `work` of compressing it, where this thread did that.
    fn produced(&mut self, raw: usize, work: Option<&Work>, sent: Sent) {
        let now = Clocks::now();
        let (elapsed, cpu) = self.last.until(&now);
        self.last = now;
        let waiting = std::mem::take(&mut self.waiting);
        let (took, took_cpu) = work.map_or_else(Default::default, |work| {
            (work.took + work.probing, work.cpu + work.probing_cpu)
        });
        let encoding = cpu + std::mem::take(&mut self.worked);
        let produced = Produced {
            raw,
            reading: elapsed.saturating_sub(took).saturating_sub(waiting),
            reading_cpu: cpu.saturating_sub(took_cpu),
            elapsed,
            processors: self.processors.look(encoding),
        };
        self.choice.produced(produced, sent);
    }

    fn learn(&mut self, work: &Work) {
        let in_block = (work.statistics.raw + work.statistics.delta) as u64;
        let noise = work.statistics.noise as u64;
        self.compressed.add(work.statistics.technique, in_block);
        self.compressed.add(Technique::Stored, noise);
        self.choice.encoded(Encoded {
            technique: work.technique,
            raw: work.raw,
            block: work.block,
            cpu: work.cpu,
            took: work.took,
        });
        if let Some(probed) = work.probed {
            self.choice.probed(probed);
        }
    }

    /// Takes batches back that are done; waits for `all` that are under way, if asked to.
    fn take_done(&mut self, all: bool) {
        while let Some(workers) = &mut self.workers {
            if workers.under_way == 0 {
                return;
            }
            let done = match all {
                true => workers.done.recv().ok(),
                false => workers.done.try_recv().ok(),
            };
            let Some(Done { batch, work }) = done else {
                return;
            };
            workers.under_way -= 1;
            self.spare.push(batch);
            if let Some(work) = work {
                self.worked += work.cpu + work.probing_cpu;
                self.learn(&work);
            }
        }
    }

    /// An empty batch. Waits until there is one.
    fn next_batch(&mut self) -> BatchEncoder {
        let started = Instant::now();
        loop {
            if let Some(batch) = self.spare.pop() {
                self.waiting += started.elapsed();
                return batch;
            }
            let done = self
                .workers
                .as_mut()
                .and_then(|workers| workers.done.recv().ok());
            // Where all threads have ended the batches that they had were never sent, and the link
            // tells.
            let Some(Done { batch, work }) = done else {
                return BatchEncoder::new();
            };
            if let Some(workers) = &mut self.workers {
                workers.under_way -= 1;
            }
            self.spare.push(batch);
            if let Some(work) = work {
                self.worked += work.cpu + work.probing_cpu;
                self.learn(&work);
            }
        }
    }
}

impl std::fmt::Debug for AdaptiveEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdaptiveEncoder")
            .field("choice", &self.choice)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::codec::tests::has_contents;
    use crate::codec::{BatchDecoder, Content};
    use crate::pages::{PAGE_SIZE, Page, PageType};

    #[test]
    fn idle_time_is_read() {
        assert_eq!(
            idle_time("12.50 20.25\n"),
            Some(Duration::from_millis(20_250))
        );
        for bad in ["", "12.50", "12.50 x", "1 -1"] {
            assert_eq!(idle_time(bad), None);
        }
        let mut clock = ProcessorClock::new();
        assert_eq!(clock.look(Duration::ZERO), None);
        let busy = clock.look(Duration::MAX);
        assert!(busy.is_some_and(|it| it.count > 0 && it.others.is_zero()));
    }

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
            assert_eq!(written.raw + written.noise, 64);
            assert!(written.noise == 0 || !shrinks);
            assert_eq!(written.bytes, bytes.len());
            let batch = decoder.decode(&bytes, 64).unwrap();
            assert!(has_contents(batch, &pages));
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

    #[test]
    fn batches_of_several_workers_come_in_the_order_in_which_they_were_filled() {
        let mut encoder = AdaptiveEncoder::new(3);
        let mut decoder = BatchDecoder::new();
        encoder.resume(Sent::default());
        let pages: Vec<Page> = (0..40 * 16).map(|at| page(at, at % 3 > 0)).collect();
        let mut encodings = Vec::new();
        for (batch, content) in pages.chunks(16).enumerate() {
            for (pfn, page) in (batch as u64 * 16..).zip(content) {
                encoder.batch().push(pfn, PageType::Normal, page).unwrap();
            }
            encodings.push(encoder.hand_out(Sent::default()));
        }
        let all = pages.len() as u64;
        let mut at = 0;
        for encoding in encodings {
            let bytes = encoding.recv().unwrap();
            let batch = decoder.decode(&bytes, all).unwrap();
            for page in batch.iter() {
                assert_eq!(page.pfn, at as u64);
                assert!(page.content == Content::Raw(&pages[at]));
                at += 1;
            }
        }
        assert_eq!(at, pages.len());
        assert_eq!(encoder.take_compressed().all(), all);
        // There are no more batches than were made at first.
        assert_eq!(encoder.spare.len(), 4);
        assert_eq!(encoder.take_compressed(), PagesByTechnique::default());
    }
}
