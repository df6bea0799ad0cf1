use super::*;
use std::collections::VecDeque;

/// Content of a guest: its ratios by technique.
type Ratios = [f64; TECHNIQUES];

/// An idle guest's pages, as measured but for the last one.
const IDLE: Ratios = [1.0, 0.341, 0.242, 0.2245, 0.217];

/// Programs, libraries and their documentation, as measured.
const FILES: Ratios = [1.0, 0.538, 0.403, 0.364, 0.335];

/// What doesn't shrink, and is not seen to be noise.
const RIGID: Ratios = [1.0; TECHNIQUES];

const BATCH: usize = 1 << 20;

const MBIT: f64 = 125_000.0;

/// A producer, a writer behind a queue of four frames, and a link behind buffers, on a clock of
/// their own.
struct World {
    choice: Choice,
    /// CPU seconds per raw byte.
    costs: [f64; TECHNIQUES],
    reading: f64,
    slowdown: f64,
    ratios: Ratios,
    /// The part of each batch that is noise; the rest has those ratios.
    noise: f64,
    link: f64,

    now: f64,
    written_at: f64,
    buffered: f64,
    buffered_at: f64,
    /// When frames leave the queue.
    begins: VecDeque<f64>,
    /// Pieces: when they are written, their bytes, and how long that took.
    pieces: VecDeque<(f64, f64, f64)>,
    bytes: f64,
    held_up: f64,
    waited: f64,
    raw: f64,
    used: [usize; TECHNIQUES],
    /// What the batches are made of, in turn by chance; nothing else than `ratios` if empty.
    mixture: Vec<Ratios>,
    /// Costs are measured up to this much too high or low.
    jitter: f64,
    random: u64,
}

impl World {
    const BUFFER: f64 = 2_000_000.0;

    fn new(ratios: Ratios, mbit: f64) -> Self {
        World {
            choice: Choice::new(0),
            // As measured, 1 MiB at a time.
            costs: [0.1e-9, 1.37e-9, 1.73e-9, 2.72e-9, 7.65e-9],
            reading: 0.6e-9,
            slowdown: 1.0,
            ratios,
            noise: 0.0,
            link: mbit * MBIT,
            now: 0.0,
            written_at: 0.0,
            buffered: 0.0,
            buffered_at: 0.0,
            begins: VecDeque::new(),
            pieces: VecDeque::new(),
            bytes: 0.0,
            held_up: 0.0,
            waited: 0.0,
            raw: 0.0,
            used: [0; TECHNIQUES],
            mixture: Vec::new(),
            jitter: 0.0,
            random: 1,
        }
    }

    /// From 0 to 1, the same every time.
    fn random(&mut self) -> f64 {
        self.random = self.random.wrapping_mul(0x5851_f42d_4c95_7f2d) | 1;
        self.random ^= self.random >> 33;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }

    fn sent(&mut self) -> Sent {
        while let Some((at, bytes, held_up)) = self.pieces.front().copied() {
            if at > self.now {
                break;
            }
            self.bytes += bytes;
            self.held_up += held_up;
            self.pieces.pop_front();
        }
        Sent {
            bytes: self.bytes as u64,
            held_up: Duration::from_secs_f64(self.held_up),
            cpu: None,
        }
    }

    /// Encodes and queues one batch.
    fn step(&mut self) -> Technique {
        if !self.mixture.is_empty() {
            let at = (self.random() * self.mixture.len() as f64) as usize;
            self.ratios = self.mixture[at.min(self.mixture.len() - 1)];
        }
        let jitter = 1.0 + self.jitter * (2.0 * self.random() - 1.0);
        let content = BATCH as f64;
        let noise = content * self.noise;
        let raw = content - noise;
        let order = self.choice.next(BATCH);
        let ratios = self.ratios;
        let ratio = |technique: Technique| ratios[technique as usize];
        let technique = order.technique;
        let cpu = raw * self.costs[technique as usize] * jitter;
        let block = raw * ratio(technique) + noise;
        let mut probing = 0.0;
        let probed = order.probe.map(|probe| {
            let cpu = raw * self.costs[probe as usize] / jitter;
            probing = cpu * self.slowdown;
            Probed {
                technique,
                probe,
                raw: BATCH,
                block: block as usize,
                probe_block: (raw * ratio(probe) + noise) as usize,
                cpu: Duration::from_secs_f64(cpu),
            }
        });
        let took = cpu * self.slowdown;
        let sent = self.sent();
        let reading = content * self.reading;
        self.now += reading + took + probing;
        let produced = Produced {
            raw: BATCH,
            reading: Duration::from_secs_f64(reading),
            reading_cpu: Duration::from_secs_f64(reading),
            elapsed: Duration::from_secs_f64(reading + took + self.waited + probing),
            processors: None,
        };
        self.choice.produced(produced, sent);
        self.choice.encoded(Encoded {
            technique,
            raw: BATCH,
            block: block as usize,
            cpu: Duration::from_secs_f64(cpu),
            took: Duration::from_secs_f64(took),
        });
        if let Some(probed) = probed {
            self.choice.probed(probed);
        }
        self.send(block);
        self.raw += content;
        self.used[technique as usize] += 1;
        technique
    }

    fn send(&mut self, frame: f64) {
        let before = self.now;
        while self.begins.front().is_some_and(|at| *at <= self.now) {
            self.begins.pop_front();
        }
        if self.begins.len() >= 4
            && let Some(at) = self.begins.pop_front()
        {
            self.now = at;
        }
        self.waited = self.now - before;
        let mut at = self.written_at.max(self.now);
        self.begins.push_back(at);
        let mut left = frame;
        while left > 0.0 {
            let piece = left.min(65_536.0);
            left -= piece;
            let drained = (at - self.buffered_at) * self.link;
            self.buffered = (self.buffered - drained).max(0.0);
            let over = (self.buffered + piece - Self::BUFFER).max(0.0);
            let took = (over / self.link).max(piece / 4e9);
            self.buffered += piece - over;
            at += took;
            self.buffered_at = at;
            self.pieces.push_back((at, piece, took));
        }
        self.written_at = at;
    }

    /// Goes on for that long; bytes of the guest per second.
    fn run(&mut self, seconds: f64) -> f64 {
        let (start, raw) = (self.now, self.raw);
        self.used = [0; TECHNIQUES];
        while self.now < start + seconds {
            self.step();
        }
        (self.raw - raw) / (self.now - start)
    }

    /// The same on a machine that takes so many times as long for everything but the link, and
    /// shares its processors.
    fn on(mut self, speed: f64, slowdown: f64) -> Self {
        self.costs = self.costs.map(|cost| cost * speed);
        self.reading *= speed;
        self.slowdown = slowdown;
        self
    }

    /// Goes on until it has learnt what it can, and longer: its rate is then near the highest.
    fn comes_near_the_best(&mut self) {
        // A batch takes a slow machine longer.
        let seconds = 30.0 * (self.reading / 0.6e-9);
        self.run(seconds);
        let rate = self.run(seconds);
        assert!(
            rate > 0.9 * self.best(),
            "{:?}, {} of it noise, {} Mbit/s, {} s a GB read: {rate:.3e} of {:.3e}, {:?}",
            self.ratios,
            self.noise,
            self.link / MBIT,
            self.reading * 1e9,
            self.best(),
            self.used
        );
    }

    /// The highest rate that any technique has.
    fn best(&self) -> f64 {
        (0..TECHNIQUES)
            .map(|at| {
                let shrinks = 1.0 - self.noise;
                let encoding = self.reading + self.slowdown * self.costs[at] * shrinks;
                let ratio = self.noise + self.ratios[at] * shrinks;
                (self.link / ratio).min(encoding.recip())
            })
            .fold(0.0, f64::max)
    }

    fn mostly(&self) -> Technique {
        Technique::ALL
            .into_iter()
            .max_by_key(|technique| self.used[*technique as usize])
            .unwrap()
    }
}

#[test]
fn it_begins_with_zstd_and_without_experiments() {
    let mut world = World::new(IDLE, 1000.0);
    for _ in 0..3 {
        assert_eq!(
            world.choice.next(BATCH),
            Order {
                technique: Technique::Zstd1,
                probe: None
            }
        );
        world.step();
    }
    assert_eq!(world.choice.link().bytes_per_second(), None);
}

#[test]
fn each_situation_has_its_techniques() {
    use Technique::{Lz4, Stored, Zstd1, Zstd3, Zstd6};
    // On a host that is emulated everything but the link takes 25 times as long.
    for (ratios, mbit, speed, fitting) in [
        (IDLE, 1.0, 1.0, [Zstd3, Zstd6].as_slice()),
        (IDLE, 10.0, 1.0, &[Zstd3, Zstd6]),
        (FILES, 10.0, 1.0, &[Zstd6]),
        (FILES, 100.0, 1.0, &[Zstd6]),
        (FILES, 500.0, 1.0, &[Zstd3]),
        (IDLE, 400.0, 1.0, &[Zstd3]),
        (FILES, 1000.0, 1.0, &[Zstd1, Zstd3]),
        (IDLE, 1000.0, 1.0, &[Zstd1]),
        (FILES, 2200.0, 1.0, &[Lz4]),
        (IDLE, 10_000.0, 1.0, &[Lz4, Stored]),
        (IDLE, 40_000.0, 1.0, &[Stored]),
        (FILES, 10.0, 25.0, &[Zstd6, Zstd3]),
        (FILES, 50.0, 25.0, &[Zstd1, Lz4]),
        (FILES, 1000.0, 25.0, &[Stored]),
        (RIGID, 10_000.0, 1.0, &[Stored]),
    ] {
        let mut world = World::new(ratios, mbit);
        world.costs = world.costs.map(|cost| cost * speed);
        world.reading *= speed;
        world.run(20.0 * speed);
        world.run(20.0 * speed);
        assert!(
            fitting.contains(&world.mostly()),
            "{ratios:?} {mbit} Mbit/s, {speed}: {:?}",
            world.used
        );
    }
}

#[test]
fn it_comes_near_the_best_rate_anywhere() {
    // What was measured, one that hardly shrinks, one where zstd is far ahead of LZ4, one that
    // shrinks to next to nothing, and one that doesn't.
    let contents = [
        IDLE,
        FILES,
        [1.0, 0.93, 0.91, 0.9, 0.9],
        [1.0, 0.8, 0.35, 0.3, 0.25],
        [1.0, 0.05, 0.02, 0.018, 0.017],
        RIGID,
    ];
    for ratios in contents {
        for mbit in [5.0, 30.0, 200.0, 800.0, 3000.0, 10_000.0] {
            // The machine: a fast one, one that is emulated, one that is shared.
            for (speed, slowdown) in [(1.0, 1.0), (25.0, 1.0), (1.5, 3.0)] {
                World::new(ratios, mbit)
                    .on(speed, slowdown)
                    .comes_near_the_best();
            }
        }
    }
}

#[test]
fn what_does_not_shrink_holds_nothing_up() {
    for mbit in [10.0, 1000.0, 10_000.0] {
        let mut world = World::new(RIGID, mbit);
        world.run(5.0);
        let rate = world.run(10.0);
        assert!(rate > 0.97 * world.best(), "{mbit} Mbit/s: {rate:.3e}");
        // What comes behind it shrinks again.
        world.ratios = IDLE;
        world.run(5.0);
        let rate = world.run(10.0);
        assert!(rate > 0.9 * world.best(), "{mbit} Mbit/s: {rate:.3e}");
    }
}

/// Half of a batch, or nearly all, is noise: what is left is compressed by what pays for it.
#[test]
fn noise_is_no_reason_not_to_compress_the_rest() {
    for noise in [0.3, 0.6, 0.9] {
        for mbit in [5.0, 30.0, 200.0, 800.0, 3000.0] {
            for speed in [1.0, 25.0] {
                let mut world = World::new(IDLE, mbit).on(speed, 1.0);
                world.noise = noise;
                world.comes_near_the_best();
            }
        }
    }
}

#[test]
fn a_fast_link_is_no_reason_to_store_for_ever() {
    let mut world = World::new(IDLE, 40_000.0);
    world.run(10.0);
    assert_eq!(world.mostly(), Technique::Stored);
    world.ratios = RIGID;
    world.run(10.0);
    assert_eq!(world.mostly(), Technique::Stored);
    world.ratios = IDLE;
    world.link = 10.0 * MBIT;
    world.run(60.0);
    let rate = world.run(10.0);
    assert!(rate > 0.9 * world.best(), "{rate:.3e} {:?}", world.used);
}

#[test]
fn a_link_that_changes_is_followed() {
    let mut world = World::new(IDLE, 100.0);
    for mbit in [1000.0, 10.0, 10_000.0, 50.0, 400.0] {
        world.link = mbit * MBIT;
        world.run(15.0);
        let rate = world.run(15.0);
        assert!(
            rate > 0.9 * world.best(),
            "{mbit} Mbit/s: {rate:.3e} of {:.3e}, {:?}",
            world.best(),
            world.used
        );
    }
}

#[test]
fn probes_take_a_small_part_of_the_time() {
    let mut world = World::new(IDLE, 10_000.0);
    world.run(20.0);
    assert!(world.choice.probing > 0.0);
    assert!(world.choice.probing <= 1.1 * PROBING * world.choice.elapsed);
}

#[test]
fn batches_without_raw_pages_change_nothing() {
    let mut world = World::new(IDLE, 100.0);
    world.run(10.0);
    let before = world.choice.technique();
    let sent = world.sent();
    for _ in 0..1000 {
        assert_eq!(world.choice.next(0).probe, None);
        let produced = Produced {
            raw: 0,
            reading: Duration::ZERO,
            reading_cpu: Duration::ZERO,
            elapsed: Duration::ZERO,
            processors: None,
        };
        world.choice.produced(produced, sent);
        world.choice.encoded(Encoded {
            technique: before,
            raw: 0,
            block: 0,
            cpu: Duration::ZERO,
            took: Duration::ZERO,
        });
    }
    assert_eq!(world.choice.technique(), before);
}

#[test]
fn content_that_is_mixed_and_measurements_that_waver_do_not_confuse_it() {
    let mixture = [IDLE, FILES, FILES, RIGID, [1.0, 0.05, 0.02, 0.018, 0.017]];
    let mean: Ratios = std::array::from_fn(|at| mixture.iter().map(|it| it[at]).sum::<f64>() / 5.0);
    for mbit in [10.0, 100.0, 500.0, 1500.0, 10_000.0] {
        let mut world = World::new(mean, mbit);
        world.mixture = mixture.to_vec();
        world.jitter = 0.6;
        world.run(20.0);
        let rate = world.run(60.0);
        world.ratios = mean;
        assert!(
            rate > 0.88 * world.best(),
            "{mbit} Mbit/s: {rate:.3e} of {:.3e}, {:?}",
            world.best(),
            world.used
        );
    }
}

#[test]
fn more_workers_afford_a_stronger_technique() {
    let chosen = |workers| {
        let mut choice = Choice::new(workers);
        choice.resume(Sent::default());
        let mut sent = Sent::default();
        // A link of 1 Gbit/s that is never idle.
        for _ in 0..200 {
            let raw = BATCH as f64;
            let technique = choice.next(0).technique;
            let block = raw * IDLE[technique as usize];
            let took = block / (1000.0 * MBIT);
            sent.bytes += block as u64;
            sent.held_up += Duration::from_secs_f64(took);
            let produced = Produced {
                raw: BATCH,
                reading: Duration::from_secs_f64(raw * 0.3e-9),
                reading_cpu: Duration::from_secs_f64(raw * 0.3e-9),
                elapsed: Duration::from_secs_f64(took),
                processors: None,
            };
            choice.produced(produced, sent);
            let cpu = Duration::from_secs_f64(raw * TYPICAL[technique as usize].0);
            choice.encoded(Encoded {
                technique,
                raw: BATCH,
                block: block as usize,
                cpu,
                took: cpu,
            });
        }
        choice.technique()
    };
    assert!(chosen(0) < chosen(4), "{:?} {:?}", chosen(0), chosen(4));
    assert!(chosen(4) <= chosen(16));
}

/// CPU seconds for a byte that is read.
const READING: f64 = 0.6e-9;

/// One processor does all, and is never idle.
struct Small {
    /// CPU seconds per byte, by technique.
    costs: [f64; TECHNIQUES],
    /// CPU seconds for a byte that is sent.
    sending: f64,
    /// CPU seconds for a byte that is sent, of a destination on the same host.
    elsewhere: f64,
    /// Who writes carries it: not ssh.
    carries: bool,
}

impl Small {
    /// What a byte takes of it in all, by technique.
    fn needs(&self, technique: Technique) -> f64 {
        let at = technique as usize;
        READING + self.costs[at] + IDLE[at] * self.sending
    }

    /// Runs for a while, and tells which techniques were used.
    fn run(&self) -> (Choice, Vec<Technique>) {
        let mut choice = Choice::new(0);
        choice.resume(Sent::default());
        let mut sent = Sent::default();
        let mut used = Vec::new();
        for _ in 0..2000 {
            let raw = BATCH as f64;
            let technique = choice.next(0).technique;
            let at = technique as usize;
            used.push(technique);
            let (cpu, block) = (raw * self.costs[at], raw * IDLE[at]);
            let elapsed = raw * self.needs(technique) + block * self.elsewhere;
            let carrying = Duration::from_secs_f64(block * self.sending);
            sent.cpu = self
                .carries
                .then(|| sent.cpu.unwrap_or_default() + carrying);
            sent.bytes += block as u64;
            // Writing waits for the processor whenever another one has it.
            sent.held_up += Duration::from_secs_f64(elapsed * 0.9);
            let produced = Produced {
                raw: BATCH,
                // Others have the processor while this one reads.
                reading: Duration::from_secs_f64(elapsed - cpu),
                reading_cpu: Duration::from_secs_f64(raw * READING),
                elapsed: Duration::from_secs_f64(elapsed),
                processors: Some(Processors {
                    count: 1,
                    idle: Duration::ZERO,
                    others: carrying + Duration::from_secs_f64(block * self.elsewhere),
                }),
            };
            choice.produced(produced, sent);
            choice.encoded(Encoded {
                technique,
                raw: BATCH,
                block: block as usize,
                cpu: Duration::from_secs_f64(cpu),
                took: Duration::from_secs_f64(elapsed),
            });
        }
        (choice, used)
    }
}

/// Costs of an emulated processor: there ssh is dear, and zstd dearer.
const EMULATED: [f64; TECHNIQUES] = [1e-9, 60e-9, 90e-9, 200e-9, 700e-9];

/// Whoever is held up waits for the processor, not for the link.
#[test]
fn a_small_host_does_not_take_itself_for_a_slow_link() {
    let fast = TYPICAL.map(|(cost, _)| cost);
    // The last two: a destination on the same host takes the processor as well.
    for (costs, sending, elsewhere) in [
        (fast, 2.5e-9, 0.0),
        (EMULATED, 200e-9, 0.0),
        (EMULATED, 20e-9, 0.0),
        (fast, 0.3e-9, 3e-9),
        (EMULATED, 20e-9, 300e-9),
    ] {
        let small = Small {
            costs,
            sending,
            elsewhere,
            carries: elsewhere > 0.0,
        };
        let best = Technique::ALL
            .map(|it| small.needs(it))
            .into_iter()
            .fold(f64::INFINITY, f64::min);
        let (mut choice, used) = small.run();
        // Until a fast host has found out how it does, it has sent a quarter of this.
        let used = &used[used.len() / 4..];
        let mean = used.iter().map(|it| small.needs(*it)).sum::<f64>() / used.len() as f64;
        assert!(mean < 1.1 * best, "{mean:.2e}, {best:.2e}");
        // A guess that is wrong would keep everyone waiting: not more than a step at once.
        let next = choice.technique().stronger();
        choice.expect(0.1 * MBIT);
        assert_eq!(Some(choice.next(0).technique), next);
    }
}

/// What ssh takes is known late: more bytes have to be worth it.
#[test]
fn a_little_time_is_not_worth_more_bytes() {
    // LZ4 would be that much faster.
    for (gain, carries, stays) in [
        (1.07, false, true),
        (1.07, true, false),
        (1.27, false, false),
    ] {
        let mut small = Small {
            // What it guesses of those that were not tried is right.
            costs: TYPICAL.map(|(cost, _)| 40.0 * cost),
            sending: 0.0,
            elsewhere: 0.0,
            carries,
        };
        let gains = |small: &Small| small.needs(Technique::Zstd1) / small.needs(Technique::Lz4);
        while gains(&small) > gain {
            small.sending += 1e-10;
        }
        let stayed = small.run().0.technique() == Technique::Zstd1;
        assert_eq!(stayed, stays, "{gain} {carries}");
    }
}
