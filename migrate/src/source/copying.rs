//! Pre-copy: rounds over what is dirty, with the guest running, and when they end.

use std::time::{Duration, Instant};

use super::{Copied, Offered, OnTimeout, Plan, READ_BATCH, Session};
use crate::error::{Error, Result};
use crate::guest::{Batch, Dirty, Moment};
use crate::handover::journal::Phase;
use crate::pages::PageSet;
use crate::report::{Progress, Round, TrackerKind, rounded};
use crate::rounds::{
    InRound, Left, Limits, Next, Prediction, Remedy, RoundFacts, Sent, Share, Stop, decide,
};
use crate::wire::{ToDestination, ToSource};

/// Reading the log holds the guest up for a moment, and takes its time here: no more than one part
/// in so many is spent on it.
const LOOKING_SHARE: u32 = 20;

/// How long a destination may take to restore what has arrived: all of a large guest's memory, where
/// a shadow had it. The guest runs meanwhile, the move can be given up, and heartbeats tell whether
/// the other site lives.
const CATCHING_UP: Duration = Duration::from_secs(3600);

/// So many times as long the guest may be silent in the verify mode, which reads all memory at both
/// sites meanwhile.
const VERIFYING: u32 = 4;

/// A scan looks at one page in so many to learn how many have changed.
const SAMPLED: usize = 16;

impl Session<'_> {
    pub(super) fn copy(&mut self, _offered: &Offered) -> Result<Copied> {
        self.go.journal.reach(Phase::Tracking)?;
        self.report.tracker = Some(self.go.guest.begin()?);
        self.phase("copying");
        self.begin_copying()?;
        let mut hold_back = false;
        for number in 1.. {
            let started = Instant::now();
            let (_, held) = self.backlog.begin_round(hold_back);
            self.unclear = false;
            let mut round = self.round(number, Moment::Live, started)?;
            round.held = held;
            self.look()?;
            let left = self.left(number)?;
            let all = left.cold.saturating_add(left.hot);
            self.report.rounds.push(round);
            self.go.observer.notice(Progress::Round {
                number,
                round,
                left: all,
                hot: left.hot,
            });
            if self.scans() {
                self.forecast.looks_at_all(self.reading);
                self.forecast.dirtied(left.cold, left.cold, round.took);
            }
            if number == 1 && self.go.plan.verify {
                self.forecast.verifies(self.reading);
            }
            self.forecast.sent(Sent {
                first: number == 1,
                pages: round.with_content(),
                bytes: round.wire_bytes,
                took: round.took.saturating_sub(self.looking_in_vain(&round)),
            });
            // What is left after a round that ended so tells nothing.
            if !self.unclear {
                self.history.push(RoundFacts {
                    sent: round.sent(),
                    left: all,
                    wire_bytes: round.wire_bytes,
                    took: round.took,
                    share: self.share(),
                });
            }
            if number == 1 {
                let seconds = round.took.as_secs_f64().max(1e-6);
                self.report.link.mbit =
                    (round.wire_bytes as f64 * 8e-6 / seconds * 10.0).round() / 10.0;
                self.report.predicted.after_first_round = self.predict(&left);
            }
            self.check_time(number + 1);
            match self.next(number, left)? {
                Next::Round { hold } => hold_back = hold,
                Next::SlowDown(_) => hold_back = false,
                Next::Suspend(stop) => {
                    self.report.stop = Some(stop);
                    break;
                }
            }
        }
        self.go.connections.prepare()?;
        self.watch.lap("pre-copy");
        Ok(Copied)
    }

    /// How long the round took to look at pages of which nothing crossed. A scan looks at all memory
    /// in each round: that is foretold apart.
    fn looking_in_vain(&self, round: &Round) -> Duration {
        match self.scans() {
            true => self.reading,
            false => self
                .reading
                .mul_f64(round.same as f64 / round.pages.max(1) as f64),
        }
    }

    /// What comes after a round that left so much. A guest isn't suspended while the destination is
    /// far behind: it would be silent until the restore has what crossed long ago.
    fn next(&mut self, number: u32, mut left: Left) -> Result<Next> {
        loop {
            let next = if self.time_is_up {
                Next::Suspend(Stop::Timeout)
            } else if self.unclear {
                // All of it would be looked at with the guest suspended. But rounds end.
                match number < self.limits().rounds {
                    true => Next::Round { hold: false },
                    false => Next::Suspend(Stop::Rounds),
                }
            } else {
                self.decide(&left)?
            };
            match next {
                Next::Suspend(_) if self.behind > self.go.plan.limits.behind => {}
                Next::Suspend(stop) => {
                    self.refuse_silence(stop, &left)?;
                    return Ok(next);
                }
                next => return Ok(next),
            }
            self.let_run(true);
            self.catch_up(number)?;
            self.let_run(false);
            self.look()?;
            // What it wrote with all of its time is not to cross in its silence.
            if self.share() < Share::WHOLE && !self.time_is_up && number < self.limits().rounds {
                self.backlog.slowed_down();
                return Ok(Next::Round { hold: false });
            }
            left = self.left(number)?;
            self.check_time(number + 1);
        }
    }

    /// A guest that could not be handed over in the time that it may be silent is not suspended.
    fn refuse_silence(&mut self, stop: Stop, left: &Left) -> Result<()> {
        let all = left.cold.saturating_add(left.hot);
        self.foretold = self.forecast.downtime(all);
        let silent = self.silent();
        match self.foretold {
            Some(foretold) if foretold > silent => {
                // What the operator allows, also where no scheduler can do it.
                let limits = Limits {
                    downtime: self.go.control.downtime(),
                    ..self.go.plan.limits.clone()
                };
                let remedy = Remedy::find(stop, &self.forecast, &limits, silent, self.share());
                Err(Error::TooSilent(format!(
                    "{:.0} s, where {:.0} s are allowed; {remedy}",
                    foretold.as_secs_f64(),
                    silent.as_secs_f64()
                )))
            }
            _ => self.refuse_to_be_late(),
        }
    }

    /// Nor is one whose silence would end after the move's time. A shorter one would take more of
    /// that before.
    pub(super) fn refuse_to_be_late(&self) -> Result<()> {
        let end = self.go.out_of_time();
        let time = end.map(|end| end.saturating_duration_since(Instant::now()));
        match (self.foretold, time) {
            (Some(foretold), Some(time)) if foretold > time => Err(Error::TooSilent(format!(
                "{:.1} s, and the time for the move is over in {:.1} s; a longer --timeout \
                 allows that",
                foretold.as_secs_f64(),
                time.as_secs_f64()
            ))),
            _ => Ok(()),
        }
    }

    /// How long the guest may be silent before it goes on here.
    pub(super) fn silent(&self) -> Duration {
        let silent = self.go.plan.limits.silent;
        match self.go.plan.verify {
            true => silent * VERIFYING,
            false => silent,
        }
    }

    /// Waits until the destination's restore has all that has arrived there.
    fn catch_up(&mut self, number: u32) -> Result<()> {
        log::debug!("the destination has {} pages yet to restore", self.behind);
        self.phase("waiting for the destination");
        self.go.peer.send(&ToDestination::CatchUp)?;
        let asked = Instant::now();
        loop {
            let Some(received) = self.go.peer.receive_for(Duration::from_secs(1))? else {
                // A guest that is handed over once its time is up waits all the same: suspended, it
                // would be silent for as long.
                self.check_time(number + 1);
                if asked.elapsed() > CATCHING_UP {
                    return Err(Error::PeerFailed {
                        peer: self.go.peer.peer().to_owned(),
                        reason: "it does not restore what has arrived".into(),
                    });
                }
                // Which pages are hot is told by what is written between two readings of the log.
                if self.looked.elapsed() >= self.look_after {
                    self.look()?;
                }
                continue;
            };
            match ToSource::decode(received.frame())? {
                ToSource::CaughtUp => break,
                ToSource::Ping(token) => self.go.peer.send(&ToDestination::Pong(token))?,
                other => return Err(self.unexpected(&other)),
            }
        }
        self.behind = 0;
        self.phase("copying");
        Ok(())
    }

    /// What comes after a round. Where that is to slow the guest down it has been.
    fn decide(&mut self, left: &Left) -> Result<Next> {
        // Only now: how long it takes to cross is known of the round that left it.
        let crossing = self.forecast.sending(left.cold.saturating_add(left.hot));
        let left = Left {
            rewritten: crossing.and_then(|over| self.backlog.rewritten(over)),
            ..*left
        };
        log::debug!("{left:?}, which would take {crossing:?}");
        loop {
            let limits = self.limits();
            let next = decide(&self.history, &left, &self.forecast, &limits, self.share());
            match next {
                // It can't be, and will not be tried again: then what else?
                Next::SlowDown(share) if !self.slow_down(share)? => {}
                Next::SlowDown(_) => {
                    self.slow_down_further(left.cold.saturating_add(left.hot), crossing)?;
                    return Ok(next);
                }
                next => return Ok(next),
            }
        }
    }

    /// The first time everything waits, whatever a tracker knows: what the guest has, and what the
    /// destination may have of it.
    pub(super) fn begin_copying(&mut self) -> Result<()> {
        let mut everything = PageSet::new(self.held.table().pages());
        self.go.guest.next_dirty(&mut everything, Moment::Live)?;
        everything.union_with(&self.go.guest.everything());
        everything.union_with(&self.held.table().known());
        self.backlog.changed(&everything);
        self.looked = Instant::now();
        Ok(())
    }

    pub(super) fn scans(&self) -> bool {
        self.report.tracker == Some(TrackerKind::Scan)
    }

    /// Reads the log of dirty pages: those that have been written since it was read last. Nothing where
    /// that is not known.
    pub(super) fn look(&mut self) -> Result<Option<PageSet>> {
        let began = Instant::now();
        let mut written = PageSet::new(self.held.table().pages());
        let named = self.go.guest.next_dirty(&mut written, Moment::Live)?;
        let over = began - std::mem::replace(&mut self.looked, began);
        self.look_after = (began.elapsed() * LOOKING_SHARE).max(self.go.plan.limits.looking);
        match named {
            // Each has to be looked at, and which were written nobody knows.
            Dirty::Everything => {
                self.backlog.changed(&written);
                self.unclear = !self.scans();
                Ok(None)
            }
            Dirty::Written => {
                let grown = self.backlog.written(&written, over);
                self.forecast.dirtied(written.len(), grown, over);
                Ok(Some(written))
            }
        }
    }

    /// What waits after a round.
    fn left(&mut self, number: u32) -> Result<Left> {
        if self.scans() {
            return Ok(Left {
                cold: self.sample(number)?,
                ..Left::default()
            });
        }
        let (cold, hot) = self.backlog.waiting();
        Ok(Left {
            cold,
            hot,
            ..Left::default()
        })
    }

    /// How many pages have changed since they were sent. A scan can't know before it looks again:
    /// it looks at some of them, evenly spread, and at others after each round.
    fn sample(&mut self, number: u32) -> Result<u64> {
        let everything = self.go.guest.everything();
        let skipped = (number as usize * 7) % SAMPLED;
        let pfns: Vec<u64> = everything.iter().skip(skipped).step_by(SAMPLED).collect();
        let (mut batch, mut deferred) = (Batch::default(), PageSet::new(everything.pages()));
        let mut changed = 0;
        for pfns in pfns.chunks(READ_BATCH) {
            self.check_interrupted()?;
            batch.clear();
            let (guest, known) = (&mut self.go.guest, self.held.table());
            guest.read(pfns, known, Moment::Live, &mut batch, &mut deferred)?;
            changed += batch.entries.len() as u64;
        }
        Ok((changed + deferred.len()) * SAMPLED as u64)
    }

    /// What the whole move will take, told after round 1.
    fn predict(&self, left: &Left) -> Option<Prediction> {
        let pages = self.go.guest.populated();
        let between = InRound {
            number: 1,
            done: 0,
            left: 0,
            next: left.cold,
            hot: left.hot,
            unseen: Duration::ZERO,
            spent: Duration::ZERO,
            bytes: 0,
            pages,
        };
        let course = self.forecast.course(&between, &self.limits())?;
        let (written, read) = self.go.peer.bytes();
        let seconds = self.watch.total() + course.rest;
        Some(Prediction {
            seconds: rounded(seconds) + self.forecast.fixed().clean_up,
            bytes: written + read + course.bytes as u64,
            downtime: rounded(course.downtime),
        })
    }

    /// The limits that hold now.
    pub(super) fn limits(&self) -> Limits {
        Limits {
            downtime: self.go.control.downtime(),
            least_share: match self.no_slower {
                true => self.share(),
                false => self.go.plan.limits.least_share,
            },
            ..self.go.plan.limits.clone()
        }
    }

    /// Once the time that the operator gave is over: notes that the guest is to be handed over, where
    /// that is wanted.
    pub(super) fn check_time(&mut self, round: u32) {
        let Plan {
            timeout: Some(timeout),
            on_timeout: OnTimeout::HandOver,
            ..
        } = self.go.plan
        else {
            return;
        };
        if self.go.began.elapsed() > timeout {
            // Before the end of round 1 nearly all memory would cross in the guest's silence.
            self.time_is_up = round > 1;
        }
    }
}
