//! How fast the link is, from what a writer saw of it.
//!
//! A writer that is held up nearly all the time shows the link's rate: what it wrote in the time
//! that writing took. One that mostly waits for its producer shows less. The link is faster than
//! what was produced, and at most as fast as the writes were; where between, only more data can
//! tell. So the estimate then grows a little at a time, until more is sent and the writer is held
//! up again.
//!
//! ```text
//!   held up    >= 70 % of a window: seconds per byte = smoothed(seconds held up / bytes)
//!   held up less:                   rate = clamp(rate * growth, bytes since then / time since
//!                                          then, bytes / held up)
//! ```
//!
//! The growth is 1 % a window near the rate that held the writer up last: what was tried in vain is
//! tried again, but seldom. Elsewhere it is 25 % for each time that a window had what buffers hold,
//! and 95 % at the most.
//!
//! Where the host's processors are never idle, a writer is held up by those that need them too: ssh,
//! and who compresses. Then it tells nothing about the link, but that this carries what crosses: the
//! estimate grows to four times that at the most. What sending takes of the processors for each byte
//! is measured beside it. Where all of it is done in the writer's own time that is what
//! counts; what else the processors do, as for a destination on the same host, only leaves fewer of
//! them to share. Where ssh carries it all counts for sending.
//!
//! Buffers between the writer and the link (pipes, ssh, TCP) take the first megabytes after a pause
//! as fast as they come. These are no proof of a fast link, and are left out where they would be.

use std::time::Duration;

/// What a writer did since it began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes that it wrote.
    pub bytes: u64,
    /// How long its writes took, and the pauses that keep it below a rate.
    pub held_up: Duration,
    /// The CPU time of who writes, if what was written is carried in that.
    pub cpu: Option<Duration>,
}

/// What a host's processors did in a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Processors {
    /// How many there are.
    pub count: usize,
    /// How long they were idle, all together.
    pub idle: Duration,
    /// How long they worked for anything but reading and compressing.
    pub others: Duration,
}

/// What sending takes of a host's processors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sending {
    /// How many processors there are for it, and for reading and compressing.
    pub processors: f64,
    /// For how many seconds of one of them a byte that is sent keeps anybody at work, but who reads
    /// and compresses.
    pub per_byte: f64,
    /// Others carry it, behind buffers: what a byte takes of them shows long after it was written,
    /// and until these are full too little does.
    pub late: bool,
}

/// The shortest time to judge by, in seconds.
const WINDOW: f64 = 0.2;

/// The fewest bytes to judge by.
const WINDOW_BYTES: f64 = 65_536.0;

/// What buffers may take at once, in bytes.
const BUFFERS: f64 = 4_194_304.0;

/// The part of a window from which on the writer is the bottleneck.
const SATURATED: f64 = 0.7;

/// The part of a window for which one processor at least has to be idle: else they are what all
/// wait for.
const IDLE: f64 = 0.1;

/// The part of the processors that counts as ours however much others work: they share.
const SHARE: f64 = 0.25;

/// The weight of a new window.
const WEIGHT: f64 = 0.3;

/// How much an estimate grows in a window that doesn't contradict it, and had what buffers hold.
const GROWTH: f64 = 1.25;

/// How often it grows by that much in a window that had many times what buffers hold.
const GROWTH_MOST: f64 = 3.0;

/// How much it grows near a rate that was the limit before.
const GROWTH_NEAR_LIMIT: f64 = 1.01;

/// How near that is.
const NEAR_LIMIT: f64 = 1.5;

/// Where processors are what all wait for, the link is not taken to be faster than so many times
/// what crosses: whatever was chosen instead would hardly send more.
const BEYOND: f64 = 4.0;

/// An estimate of the link's rate.
#[derive(Debug, Clone, Default)]
pub struct LinkRate {
    seconds_per_byte: Option<f64>,
    /// It is what was expected, and nothing has been seen yet.
    expected: bool,
    last: Option<Sent>,
    bytes: f64,
    held_up: f64,
    elapsed: f64,
    /// CPU time for sending in the window, as long as that is known.
    cpu: Option<f64>,
    /// What the processors did in the window.
    processors: Option<Processors>,
    unsaturated: Unsaturated,
    /// The rate that held the writer up last.
    limit: Option<f64>,
    sending: Option<Sending>,
    /// No processor was idle in the last window.
    busy: bool,
}

/// The windows since the writer was held up last, or paused.
#[derive(Debug, Clone, Default)]
struct Unsaturated {
    bytes: f64,
    elapsed: f64,
    /// What buffers may have taken of it.
    buffered: f64,
}

impl LinkRate {
    /// Bytes a second; none until enough was seen.
    #[must_use]
    pub fn bytes_per_second(&self) -> Option<f64> {
        self.seconds_per_byte.map(f64::recip)
    }

    /// What sending takes of the processors. None until that is known.
    #[must_use]
    pub const fn sending(&self) -> Option<Sending> {
        self.sending
    }

    /// Whether it is the host's processors that all wait for.
    #[must_use]
    pub const fn waits_for_processors(&self) -> bool {
        self.busy
    }

    /// What is believed of the link until it shows otherwise, bytes a second.
    pub fn expect(&mut self, bytes_per_second: f64) {
        if bytes_per_second.is_finite() && bytes_per_second >= 1.0 {
            self.seconds_per_byte = Some(bytes_per_second.recip());
            self.expected = true;
        }
    }

    /// Bytes a second, where that was seen, and not only expected.
    #[must_use]
    pub fn seen(&self) -> Option<f64> {
        self.bytes_per_second().filter(|_| !self.expected)
    }

    fn see(&mut self, seconds_per_byte: f64) {
        self.seconds_per_byte = Some(seconds_per_byte);
        self.expected = false;
    }

    /// Begins to look, after a pause in which nothing was produced.
    pub fn resume(&mut self, sent: Sent) {
        self.last = Some(sent);
        self.clear_window();
        self.unsaturated = Unsaturated {
            buffered: BUFFERS,
            ..Unsaturated::default()
        };
    }

    /// Notes what was sent, with the time since the last call, in which the producer never
    /// paused, and what the host's processors did meanwhile, if that is known.
    pub fn note(&mut self, sent: Sent, elapsed: Duration, processors: Option<Processors>) {
        let Some(last) = self.last.replace(sent) else {
            return;
        };
        self.bytes += sent.bytes.saturating_sub(last.bytes) as f64;
        self.held_up += sent.held_up.saturating_sub(last.held_up).as_secs_f64();
        self.elapsed += elapsed.as_secs_f64();
        let cpu = sent
            .cpu
            .zip(last.cpu)
            .map(|(sent, last)| sent.saturating_sub(last).as_secs_f64());
        self.cpu = self.cpu.zip(cpu).map(|(before, since)| before + since);
        self.processors = match (self.processors, processors) {
            (Some(before), Some(since)) => Some(Processors {
                count: since.count,
                idle: before.idle + since.idle,
                others: before.others + since.others,
            }),
            (before, since) => since.or(before),
        };
        if self.elapsed >= WINDOW && self.bytes >= WINDOW_BYTES {
            self.judge();
            self.clear_window();
        }
    }

    fn clear_window(&mut self) {
        (self.bytes, self.held_up, self.elapsed) = (0.0, 0.0, 0.0);
        (self.cpu, self.processors) = (Some(0.0), None);
    }

    fn see_sending(&mut self, processors: Processors) {
        let count = processors.count as f64;
        let others = processors.others.as_secs_f64();
        let cpu = self.cpu.unwrap_or(others);
        let elsewhere = (others - cpu).max(0.0) / self.elapsed;
        let new = Sending {
            processors: (count - elsewhere).max(SHARE * count),
            per_byte: cpu / self.bytes,
            late: self.cpu.is_none(),
        };
        let known = self.sending.unwrap_or(new);
        let smoothed = |known: f64, new: f64| known + WEIGHT * (new - known);
        self.sending = Some(Sending {
            processors: smoothed(known.processors, new.processors),
            per_byte: smoothed(known.per_byte, new.per_byte),
            late: new.late,
        });
    }

    fn judge(&mut self) {
        let mut fastest = self.bytes / self.held_up.max(1e-9);
        if let Some(processors) = self.processors {
            self.see_sending(processors);
            self.busy = processors.idle.as_secs_f64() < IDLE * self.elapsed;
            if self.busy {
                if self.held_up >= SATURATED * self.elapsed {
                    return;
                }
                fastest = BEYOND * self.bytes / self.elapsed;
            }
        }
        if self.held_up >= SATURATED * self.elapsed {
            // The buffers are full.
            self.unsaturated = Unsaturated::default();
            let new = fastest.recip();
            let smoothed = match self.seconds_per_byte {
                Some(old) => old + WEIGHT * (new - old),
                None => new,
            };
            self.see(smoothed);
            self.limit = Some(smoothed.recip());
            return;
        }
        let since = &mut self.unsaturated;
        since.bytes += self.bytes;
        since.elapsed += self.elapsed;
        let slowest = (since.bytes - since.buffered).max(0.0) / since.elapsed;
        // Buffers that still fill would have held up nobody; the more went through beside what
        // they hold, the less they explain.
        let growth = GROWTH.powf((self.bytes / BUFFERS).min(GROWTH_MOST));
        let grown = match self.bytes_per_second() {
            Some(rate) => {
                let near = self.limit.is_some_and(|limit| rate < NEAR_LIMIT * limit);
                rate * if near { GROWTH_NEAR_LIMIT } else { growth }
            }
            // More than buffers can hold went through without a halt.
            None if self.unsaturated.bytes > 2.0 * BUFFERS => self.bytes / self.elapsed * growth,
            None => return,
        };
        let rate = grown.max(slowest).min(fastest).max(1.0);
        if self.busy && self.bytes_per_second().is_some_and(|known| rate <= known) {
            return;
        }
        self.see(rate.recip());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A writer on a link of `rate` bytes a second behind a buffer, that is offered `offered`
    /// bytes a second for a while.
    struct Writer {
        sent: Sent,
        buffered: f64,
        /// The part of the time in which a processor is idle, where that is known.
        idle: Option<f64>,
        /// The part of the time in which a processor works for others.
        elsewhere: f64,
    }

    /// CPU seconds for a byte that is sent.
    const CARRYING: f64 = 20e-9;

    impl Writer {
        fn run(&mut self, link: &mut LinkRate, rate: f64, offered: f64, seconds: f64) {
            let step = 0.01;
            for _ in 0..(seconds / step) as u64 {
                self.buffered = (self.buffered - rate * step).max(0.0);
                let room = 2_000_000.0 - self.buffered;
                let taken = (offered * step).min(room);
                self.buffered += taken;
                let held_up = if taken < offered * step {
                    step
                } else {
                    taken / 2e9
                };
                self.sent.bytes += taken as u64;
                self.sent.held_up += Duration::from_secs_f64(held_up);
                let carrying = taken * CARRYING;
                self.sent.cpu = self
                    .sent
                    .cpu
                    .map(|cpu| cpu + Duration::from_secs_f64(carrying));
                let processors = self.idle.map(|idle| Processors {
                    count: 1,
                    idle: Duration::from_secs_f64(step * idle),
                    others: Duration::from_secs_f64(carrying + step * self.elsewhere),
                });
                link.note(self.sent, Duration::from_secs_f64(step), processors);
            }
        }
    }

    fn start() -> (LinkRate, Writer) {
        let mut link = LinkRate::default();
        link.resume(Sent::default());
        let writer = Writer {
            sent: Sent::default(),
            buffered: 0.0,
            idle: None,
            elsewhere: 0.0,
        };
        (link, writer)
    }

    fn near(link: &LinkRate, rate: f64) -> bool {
        link.bytes_per_second()
            .is_some_and(|found| (0.85..1.18).contains(&(found / rate)))
    }

    #[test]
    fn a_link_that_holds_the_writer_up_is_measured() {
        for rate in [125_000.0, 1.25e6, 12.5e6, 125e6] {
            let (mut link, mut writer) = start();
            assert_eq!(link.bytes_per_second(), None);
            writer.run(&mut link, rate, rate * 4.0, 20.0);
            assert!(near(&link, rate), "{rate} {link:?}");
        }
    }

    #[test]
    fn without_an_idle_processor_the_link_is_not_to_blame() {
        let (mut link, mut writer) = start();
        writer.idle = Some(0.05);
        writer.run(&mut link, 1e6, 8e6, 5.0);
        assert_eq!(link.bytes_per_second(), None);
        let sending = link.sending().unwrap();
        assert_eq!(sending.processors, 1.0);
        assert!((0.75..1.25).contains(&(sending.per_byte / CARRYING)));
        writer.idle = Some(0.5);
        writer.run(&mut link, 1e6, 8e6, 5.0);
        assert!(near(&link, 1e6), "{link:?}");
        // What is known stays.
        writer.idle = Some(0.0);
        writer.run(&mut link, 0.5e6, 8e6, 5.0);
        assert!(near(&link, 1e6), "{link:?}");
    }

    #[test]
    fn without_an_idle_processor_the_link_is_not_taken_for_any_rate() {
        let (mut link, mut writer) = start();
        writer.idle = Some(0.05);
        writer.run(&mut link, 6e6, 5e6, 120.0);
        let found = link.bytes_per_second().unwrap();
        assert!((5e6..=20e6).contains(&found), "{link:?}");
        // A while with little to send takes nothing back.
        writer.run(&mut link, 6e6, 0.4e6, 5.0);
        assert!(link.bytes_per_second().unwrap() >= found, "{link:?}");
        writer.run(&mut link, 60e6, 50e6, 120.0);
        assert!(link.bytes_per_second().unwrap() >= 50e6, "{link:?}");
    }

    #[test]
    fn what_a_processor_does_for_others_is_no_cost_of_sending() {
        let (mut link, mut writer) = start();
        (writer.idle, writer.elsewhere) = (Some(0.5), 0.4);
        writer.run(&mut link, 1e6, 8e6, 5.0);
        // Where others carry, all of it counts.
        assert!(link.sending().unwrap().per_byte > 10.0 * CARRYING);
        writer.sent.cpu = Some(Duration::ZERO);
        writer.run(&mut link, 1e6, 8e6, 10.0);
        let Sending {
            processors,
            per_byte,
            ..
        } = link.sending().unwrap();
        assert!((0.9..1.1).contains(&(per_byte / CARRYING)), "{per_byte}");
        assert!((0.55..0.65).contains(&processors), "{processors}");
        // However much they have to do, something is left.
        writer.elsewhere = 5.0;
        writer.run(&mut link, 1e6, 8e6, 10.0);
        assert!((0.2..0.3).contains(&link.sending().unwrap().processors));
    }

    #[test]
    fn what_buffers_took_is_no_proof_of_a_fast_link() {
        let (mut link, mut writer) = start();
        writer.run(&mut link, 1e6, 1e6, 0.2);
        writer.run(&mut link, 1e6, 8e6, 0.2);
        assert_eq!(link.bytes_per_second(), None);
        writer.run(&mut link, 1e6, 8e6, 10.0);
        assert!(near(&link, 1e6), "{link:?}");
        // A pause empties the buffers, and they fill anew.
        writer.buffered = 0.0;
        link.resume(writer.sent);
        writer.run(&mut link, 1e6, 8e6, 0.4);
        assert!(link.bytes_per_second().unwrap() < 3e6, "{link:?}");
    }

    #[test]
    fn a_link_that_is_not_filled_is_tried_with_more() {
        let (mut link, mut writer) = start();
        writer.run(&mut link, 10e6, 40e6, 5.0);
        assert!(near(&link, 10e6), "{link:?}");
        // It has become faster than anybody fills it.
        writer.run(&mut link, 500e6, 9e6, 1.0);
        assert!(link.bytes_per_second().unwrap() < 15e6, "{link:?}");
        writer.run(&mut link, 500e6, 9e6, 24.0);
        assert!(link.bytes_per_second().unwrap() > 25e6, "{link:?}");
        // What it took is proof.
        writer.run(&mut link, 500e6, 200e6, 1.0);
        assert!(link.bytes_per_second().unwrap() > 150e6, "{link:?}");
    }

    #[test]
    fn what_was_expected_is_believed_until_the_link_shows_otherwise() {
        for (expected, rate) in [(12.5e6, 12.5e6), (500e6, 12.5e6), (1.25e6, 12.5e6)] {
            let (mut link, mut writer) = start();
            link.expect(expected);
            assert!(near(&link, expected) && link.seen().is_none(), "{link:?}");
            writer.run(&mut link, rate, rate * 4.0, 3.0);
            assert!(
                near(&link, rate) && link.seen().is_some(),
                "{expected} {link:?}"
            );
        }
        let (mut link, _) = start();
        for nonsense in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            link.expect(nonsense);
            assert_eq!(link.bytes_per_second(), None);
        }
    }

    #[test]
    fn a_link_that_slows_down_is_noticed_at_once() {
        let (mut link, mut writer) = start();
        writer.run(&mut link, 100e6, 400e6, 5.0);
        writer.run(&mut link, 1e6, 400e6, 3.0);
        assert!(link.bytes_per_second().unwrap() < 2e6, "{link:?}");
    }

    #[test]
    fn a_link_that_nothing_fills_counts_as_what_it_took() {
        let (mut link, mut writer) = start();
        writer.run(&mut link, 1250e6, 80e6, 0.7);
        assert!(link.bytes_per_second().unwrap() >= 79e6, "{link:?}");
        writer.run(&mut link, 1250e6, 80e6, 10.0);
        // No more than the writes showed.
        assert!(link.bytes_per_second().unwrap() <= 2.1e9, "{link:?}");
    }
}
