//! Pre-copy: rounds over what is dirty, with the guest running, and when they end.

use std::time::{Duration, Instant};

use super::{Copied, Offered, OnTimeout, Session};
use crate::error::{Error, Result};
use crate::guest::Moment;
use crate::handover::journal::Phase;
use crate::pages::PageSet;
use crate::report::{Progress, Round, TrackerKind, rounded};
use crate::rounds::{InRound, Left, Limits, Next, Prediction, RoundFacts, Sent, Stop, decide};

/// Reading the log holds the guest up for a moment, and takes its time here: no more than one part
/// in so many is spent on it.
const LOOKING_SHARE: u32 = 20;

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
            let mut round = self.round(number, Moment::Live, started)?;
            round.held = held;
            self.look()?;
            let left = self.left(&round, number);
            let all = left.cold.saturating_add(left.hot);
            self.report.rounds.push(round);
            self.go.observer.notice(Progress::Round {
                number,
                round,
                left: all,
                hot: left.hot,
            });
            self.forecast.sent(Sent {
                first: number == 1,
                pages: round.with_content(),
                bytes: round.wire_bytes,
                took: round.took,
            });
            if self.scans() && number > 1 {
                let sent = round.sent();
                self.forecast.dirtied(sent, sent, round.took);
            }
            self.history.push(RoundFacts {
                sent: round.sent(),
                left: all,
                wire_bytes: round.wire_bytes,
                took: round.took,
            });
            if number == 1 {
                let seconds = round.took.as_secs_f64().max(1e-6);
                self.report.link.mbit =
                    (round.wire_bytes as f64 * 8e-6 / seconds * 10.0).round() / 10.0;
                self.report.predicted.after_first_round = self.predict(&left);
            }
            self.check_time(number + 1, all)?;
            let next = match self.time_is_up {
                true => Next::Suspend(Stop::Timeout),
                false => self.decide(&left)?,
            };
            match next {
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

    /// What comes after a round. Where that is to slow the guest down it has been.
    fn decide(&mut self, left: &Left) -> Result<Next> {
        loop {
            let limits = self.limits();
            let next = decide(&self.history, left, &self.forecast, &limits, self.share());
            match next {
                // It can't be, and will not be tried again: then what else?
                Next::SlowDown(share) if !self.slow_down(share)? => {}
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

    /// Reads the log of dirty pages.
    pub(super) fn look(&mut self) -> Result<()> {
        let began = Instant::now();
        let mut written = PageSet::new(self.held.table().pages());
        self.go.guest.next_dirty(&mut written, Moment::Live)?;
        let over = began - std::mem::replace(&mut self.looked, began);
        self.look_after = (began.elapsed() * LOOKING_SHARE).max(self.go.plan.limits.looking);
        if self.scans() {
            // It names all pages, as each has to be looked at.
            self.backlog.changed(&written);
        } else {
            let grown = self.backlog.written(&written, over);
            self.forecast.dirtied(written.len(), grown, over);
        }
        Ok(())
    }

    /// What waits after a round.
    fn left(&self, round: &Round, number: u32) -> Left {
        if self.scans() {
            // A scan can't know what is dirty before it looks: expect as much as it found this
            // time, which is what one pass's time makes dirty.
            let cold = match number {
                1 => u64::MAX,
                _ => round.sent().max(round.deferred),
            };
            return Left {
                cold,
                ..Left::default()
            };
        }
        let (cold, hot) = self.backlog.waiting();
        Left { cold, hot }
    }

    /// What the whole move will take, told after round 1.
    fn predict(&self, left: &Left) -> Option<Prediction> {
        let pages = self.go.guest.populated();
        // Where a scan knows nothing yet: as if nothing had changed.
        let next = match left.cold {
            u64::MAX => 0,
            cold => cold,
        };
        let between = InRound {
            number: 1,
            done: 0,
            left: 0,
            next,
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
            ..self.go.plan.limits.clone()
        }
    }

    /// Once the time that the operator gave is over: fails, or notes that the guest is to be handed
    /// over.
    pub(super) fn check_time(&mut self, round: u32, left: u64) -> Result<()> {
        let took = self.watch.total();
        if self.go.plan.timeout.is_none_or(|timeout| took <= timeout) {
            return Ok(());
        }
        match self.go.plan.on_timeout {
            OnTimeout::Fail => Err(Error::TimedOut(format!(
                "{left} pages are left in round {round} after {:.0} s",
                took.as_secs_f64()
            ))),
            OnTimeout::HandOver => {
                // Before the end of round 1 nearly all memory would cross in the guest's silence.
                self.time_is_up = round > 1;
                Ok(())
            }
        }
    }
}
