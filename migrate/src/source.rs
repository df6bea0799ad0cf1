//! The side that a guest leaves.
//!
//! ```text
//! Greeted -> Offered -> Copying --------> Suspended ------> Committed -> done
//!    |          |       round 1..n          last delta         |
//!    |          |          |                final digest       |
//!    +----------+----------+----------------------+            |
//!                          |                                   |
//!                      give up: the guest goes on here      no answer: in doubt
//! ```
//!
//! Each state is a type that only its step gives out, so that nothing can be done out of order.
//! [`run`] drives them and, where one fails, gives up in the one right way for how far the journal
//! says the move came.

use std::time::{Duration, Instant};

use crate::codec::AdaptiveEncoder;
use crate::connections::Connections;
use crate::control::Shared;
use crate::costs::Earlier;
use crate::digest::{DigestKey, Digester, MemoryDigest};
use crate::error::{Error, Result, chain};
use crate::guest::{Batch, Found, Moment, PageTable, Source};
use crate::handover::journal::{Entry, Journal, Outcome, Phase};
use crate::handover::recovery::Owner;
use crate::held::{HOT_BYTES, Held};
use crate::hold::hold;
use crate::link::{Conversation, Received};
use crate::pages::{PAGE_SIZE, PageSet};
use crate::report::{
    Downtime, Link as LinkReport, Observer, Predicted, Progress, REPORT_VERSION, Report, Round,
    Stopwatch, TrackerKind, rounded,
};
use crate::rounds::{
    Backlog, Forecast, InRound, Left, Limits, Meter, Next, Prediction, RoundFacts, Sent, Stop,
    decide,
};
use crate::shadow::{Named, Shadows, inventory};
use crate::wire::{Message, Offer, RefusalCode, ShadowHead, Text, ToDestination, ToSource};

/// Pages read, and so mapped, at once: the hypervisor's limit.
const READ_BATCH: usize = 1024;

/// Pages in one frame. Larger ones compress hardly better, and hold up what follows.
const FRAME_PAGES: usize = 256;

/// How long the other site may take to greet: ssh and the start of a program, emulated.
const GREETING: Duration = Duration::from_secs(60);

/// How long the other site may take to accept: it waits for memory, and for xl's lock.
const ACCEPTING: Duration = Duration::from_secs(240);

/// How long it may take to handle a round that has crossed.
const HANDLING: Duration = Duration::from_secs(300);

/// How long the guest may be suspended before the handover, whatever it waits for: then it goes on
/// here.
const SILENT: Duration = Duration::from_secs(300);

/// The same in the verify mode, which reads all memory at both sites meanwhile.
const SILENT_VERIFYING: Duration = Duration::from_secs(1200);

/// How long a restore may take to complete: devices' hotplug scripts, and the verify mode.
const RESTORING: Duration = Duration::from_secs(300);

/// How long a destination may take to let a guest run.
const RUNNING: Duration = Duration::from_secs(60);

/// Reading the log holds the guest up for a moment, and takes its time here: no more than one part
/// in so many is spent on it.
const LOOKING_SHARE: u32 = 20;

/// How long a source goes on asking what became of a commit without an answer.
const ASKING: Duration = Duration::from_secs(60);

/// What the operator asked for.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// When to suspend.
    pub limits: Limits,
    /// Compare all memory at both sides.
    pub verify: bool,
    /// How long it may take until the guest is suspended.
    pub timeout: Option<Duration>,
    /// What to do when that is over.
    pub on_timeout: OnTimeout,
}

/// What to do with a move whose time is over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// Give it up; the guest goes on here.
    #[default]
    Fail,
    /// Suspend the guest, and send what is left.
    HandOver,
}

/// All that a move needs.
pub struct Move<'a> {
    /// The guest.
    pub guest: &'a mut dyn Source,
    /// Makes the guest's digests.
    pub digester: Digester,
    /// The journal, begun.
    pub journal: Journal,
    /// The other site.
    pub peer: Conversation,
    /// Who watches.
    pub observer: &'a mut dyn Observer,
    /// What keeps the guest's connections.
    pub connections: &'a mut dyn Connections,
    /// What the operator asked for.
    pub plan: Plan,
    /// Who steers it while it runs.
    pub control: Shared,
    /// What this site holds of guests that run elsewhere.
    pub shadows: &'a Shadows,
    /// What earlier moves tell of this one.
    pub earlier: Earlier,
    /// Checks, right before and after the suspend, that the guest still is what was offered.
    pub unchanged: &'a mut dyn FnMut() -> Result<()>,
    /// Starts what takes the place of `xl`'s monitor: called where the guest goes on here after it
    /// was suspended.
    pub keep: &'a mut dyn FnMut() -> Result<()>,
    /// Asks the destination who owns the guest: called where a commit was left without an answer.
    pub ask: &'a mut dyn FnMut(&Entry) -> Result<Owner>,
}

struct Session<'a> {
    go: Move<'a>,
    key: DigestKey,
    watch: Stopwatch,
    report: Report,
    held: Held,
    backlog: Backlog,
    /// When the log of dirty pages was read last, and how long to wait until it is read again.
    looked: Instant,
    look_after: Duration,
    /// What the destination was told last of where the p2m is.
    told_frames: (u64, Vec<u64>),
    encoder: AdaptiveEncoder,
    history: Vec<RoundFacts>,
    forecast: Forecast,
    meter: Meter,
    /// The time that the operator gave is over, and the guest is to be handed over.
    time_is_up: bool,
    suspend_started: Option<Instant>,
}

/// Moves the guest. The report is complete either way.
///
/// # Errors
/// Up to the commit: whatever failed; the guest runs here. After it: [`Error::InDoubt`].
pub fn run(go: Move<'_>, offer: Offer) -> (Report, Result<()>) {
    let mut session = Session::new(go, offer.digest_key.clone());
    let result = session.migrate(offer);
    let result = match result {
        Ok(()) => Ok(()),
        Err(error) if session.go.journal.entry().phase < Phase::Committed => session.give_up(error),
        Err(error) => session.resolve_doubt(error),
    };
    session.conclude("moved", result)
}

/// Sends one round of the guest's pages, which the destination keeps as a shadow; the guest goes on
/// here. The report is complete either way.
///
/// # Errors
/// Whatever failed. The guest runs here in any case.
pub fn run_shadow(go: Move<'_>, offer: Offer) -> (Report, Result<()>) {
    let mut session = Session::new(go, offer.digest_key.clone());
    let result = match session.copy_to_shadow(offer) {
        Err(error) => session.give_up(error),
        kept => kept,
    };
    session.conclude("kept", result)
}

struct Greeted;
struct Offered;
struct Copied;
struct Suspended {
    digest: MemoryDigest,
}
struct Committed;

impl<'a> Session<'a> {
    fn new(go: Move<'a>, key: DigestKey) -> Self {
        let facts = go.guest.facts().clone();
        let report = Report {
            version: REPORT_VERSION,
            domain: facts.name.clone(),
            uuid: facts.uuid.clone(),
            kind: facts.kind.to_string(),
            source: nix::unistd::gethostname()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
            destination: go.peer.peer().to_owned(),
            outcome: String::new(),
            tracker: None,
            guest_bytes: go.guest.populated() * PAGE_SIZE as u64,
            wire_bytes: 0,
            took: Duration::ZERO,
            phases: Vec::new(),
            downtime: Downtime::default(),
            link: LinkReport::default(),
            recalled: 0,
            interruptions: Vec::new(),
            predicted: Predicted {
                at_start: go.earlier.prediction,
                after_first_round: None,
            },
            stop: None,
            rounds: Vec::new(),
            verified: false,
            connections: None,
        };
        let forecast = Forecast::new(go.earlier.fixed);
        Session {
            held: Held::nothing(facts.pages, go.digester.clone(), HOT_BYTES),
            backlog: Backlog::new(PageSet::new(facts.pages), go.plan.limits.looking),
            looked: Instant::now(),
            look_after: go.plan.limits.looking,
            told_frames: (0, Vec::new()),
            encoder: AdaptiveEncoder::default(),
            go,
            key,
            watch: Stopwatch::default(),
            report,
            history: Vec::new(),
            forecast,
            meter: Meter::default(),
            time_is_up: false,
            suspend_started: None,
        }
    }

    /// The report, and how it ended.
    fn conclude(mut self, done: &str, result: Result<()>) -> (Report, Result<()>) {
        self.report.outcome = match &result {
            Ok(()) => done.into(),
            Err(error) => format!("failed: {}", chain(error)),
        };
        let (written, read) = self.go.peer.bytes();
        self.report.wire_bytes = written + read;
        self.report.took = self.watch.total();
        self.report.phases = self.watch.phases().to_vec();
        (self.report, result)
    }

    fn copy_to_shadow(&mut self, offer: Offer) -> Result<()> {
        let greeted = self.greet()?;
        let _offered = self.offer(greeted, offer)?;
        self.go.journal.reach(Phase::Tracking)?;
        self.report.tracker = Some(self.go.guest.begin()?);
        self.phase("copying");
        self.begin_copying()?;
        let started = Instant::now();
        self.backlog.begin_round(false);
        let round = self.round(1, Moment::Live, started)?;
        self.report.rounds.push(round);
        self.watch.lap("copy");
        self.go.peer.send(&ToDestination::Keep)?;
        match self.receive(HANDLING)? {
            ToSource::Kept => {}
            other => return Err(self.unexpected(&other)),
        }
        // What the destination has now is known here: the next time it needs no inventory.
        let named = Named {
            uuid: &self.report.uuid,
            name: &self.report.domain,
            peer: self.go.peer.peer(),
        };
        let shadows = self.go.shadows;
        if let Err(error) = shadows.remember(named, &self.key, self.held.table()) {
            log::warn!("{}", chain(&error));
        }
        self.go.guest.end_tracking()?;
        self.go.peer.close();
        self.end_journal(Outcome::Aborted);
        self.watch.lap("keep");
        Ok(())
    }

    fn migrate(&mut self, offer: Offer) -> Result<()> {
        let greeted = self.greet()?;
        let offered = self.offer(greeted, offer)?;
        let copied = self.copy(&offered)?;
        let suspended = self.suspend(&copied)?;
        let committed = self.hand_over(&suspended)?;
        self.finish(&committed)
    }

    fn phase(&mut self, name: &'static str) {
        log::debug!("{name}");
        self.go.observer.notice(Progress::Phase(name));
    }

    fn greet(&mut self) -> Result<Greeted> {
        self.phase("connecting");
        hold("connecting");
        self.go.peer.greet(Instant::now() + GREETING)?;
        self.watch.lap("connect");
        let start = Instant::now();
        self.go.peer.send(&ToDestination::Ping(1))?;
        match self.receive(GREETING)? {
            ToSource::Pong(1) => {}
            other => return Err(self.unexpected(&other)),
        }
        self.report.link.rtt_ms = rounded(start.elapsed()) * 1e3;
        Ok(Greeted)
    }

    fn offer(&mut self, _greeted: Greeted, offer: Offer) -> Result<Offered> {
        self.phase("offering");
        hold("offering");
        self.go.peer.send(&ToDestination::Offer(Box::new(offer)))?;
        let refused = |peer: &Conversation, code, reason: Text| Error::RefusedByPeer {
            peer: peer.peer().to_owned(),
            code,
            reason: reason.to_string(),
        };
        match self.receive(ACCEPTING)? {
            ToSource::Accept(accept) => {
                for warning in accept.warnings {
                    self.go
                        .observer
                        .notice(Progress::Warning(warning.to_string()));
                }
                let site = accept.edge_site.map(|site| site.to_string());
                self.go.connections.accepted(site.as_deref())?;
                if let Some(head) = &accept.shadow {
                    self.recall(head)?;
                }
            }
            ToSource::Refuse(refusal) => {
                return Err(refused(&self.go.peer, refusal.code, refusal.reason));
            }
            ToSource::Failed(reason) => {
                return Err(refused(&self.go.peer, RefusalCode::Other, reason));
            }
            other => return Err(self.unexpected(&other)),
        }
        self.watch.lap("offer");
        Ok(Offered)
    }

    /// The destination has a shadow of the guest: learns what is in it, by what is known here or by
    /// its inventory.
    fn recall(&mut self, head: &ShadowHead) -> Result<()> {
        let pages = self.held.table().pages();
        let known = head.basis.and_then(|basis| {
            let known = self.go.shadows.known(&self.report.uuid);
            known.filter(|(kept, _)| {
                (kept.digest, &kept.digest_key, kept.pages) == (basis, &self.key, pages)
            })
        });
        self.go.peer.send(&ToDestination::Recall {
            known: known.is_some(),
        })?;
        let table = match known {
            Some((_, mut table)) => {
                for (first, count) in &head.lacking {
                    let end = first.saturating_add(*count).min(pages);
                    (*first..end).for_each(|pfn| table.forget(pfn));
                }
                table
            }
            None => self.receive_inventory(pages)?,
        };
        self.report.recalled = (0..pages).filter(|pfn| table.get(*pfn).is_some()).count() as u64;
        self.held = Held::holding(table, self.go.digester.clone(), HOT_BYTES);
        Ok(())
    }

    fn receive_inventory(&mut self, pages: u64) -> Result<PageTable> {
        let mut table = PageTable::new(pages);
        let mut next = 0;
        while next < pages {
            let (first, runs) = match self.receive(HANDLING)? {
                ToSource::Inventory { first, runs } => (first, runs),
                other => return Err(self.unexpected(&other)),
            };
            let broken = |what: String| Error::Protocol {
                peer: self.go.peer.peer().to_owned(),
                what,
            };
            if first != next {
                return Err(broken("an inventory with a gap".into()));
            }
            next = inventory::decode(&runs, &self.go.digester, first, &mut table)
                .map_err(|error| broken(error.to_string()))?;
            if next == first {
                return Err(broken("an inventory of nothing".into()));
            }
        }
        Ok(table)
    }

    fn copy(&mut self, _offered: &Offered) -> Result<Copied> {
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
                false => decide(&self.history, &left, &self.forecast, &self.limits()),
            };
            match next {
                Next::Round { hold } => hold_back = hold,
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

    /// The first time everything waits, whatever a tracker knows: what the guest has, and what the
    /// destination may have of it.
    fn begin_copying(&mut self) -> Result<()> {
        let mut everything = PageSet::new(self.held.table().pages());
        self.go.guest.next_dirty(&mut everything, Moment::Live)?;
        everything.union_with(&self.go.guest.everything());
        everything.union_with(&self.held.table().known());
        self.backlog.changed(&everything);
        self.looked = Instant::now();
        Ok(())
    }

    fn scans(&self) -> bool {
        self.report.tracker == Some(TrackerKind::Scan)
    }

    /// Reads the log of dirty pages.
    fn look(&mut self) -> Result<()> {
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

    /// Tells the destination where the p2m is, and how large the guest; in the middle of a round
    /// only where that has changed.
    fn tell_frames(&mut self, always: bool) -> Result<()> {
        let populated = self.go.guest.populated();
        let frames = self.go.guest.p2m_frames();
        if !always && (populated, frames) == (self.told_frames.0, self.told_frames.1.as_slice()) {
            return Ok(());
        }
        let frames = frames.to_vec();
        self.told_frames = (populated, frames.clone());
        self.go.peer.send(&ToDestination::P2mFrames {
            max_pfn: self.held.table().pages().saturating_sub(1),
            populated,
            frames,
        })
    }

    /// One pass over the pages that the backlog has for it; waits until it has crossed.
    fn round(&mut self, number: u32, moment: Moment, started: Instant) -> Result<Round> {
        hold(match (moment, number) {
            (Moment::Live, 1) => "copying",
            (Moment::Live, _) => "recopying",
            (Moment::Last, _) => "last-round",
        });
        let mut round = Round {
            pages: self.backlog.this_round().len(),
            ..Round::default()
        };
        let bytes_before = self.go.peer.bytes().0;
        let populated = self.go.guest.populated();
        self.tell_frames(true)?;
        let mut encoded = Vec::new();
        self.held.begin_round();
        self.encoder.resume(self.go.peer.sent());
        let mut pfns = Vec::with_capacity(READ_BATCH);
        let mut batch = Batch::default();
        let mut deferred = PageSet::new(self.held.table().pages());
        let mut done = 0;
        loop {
            self.check_cancelled()?;
            if moment == Moment::Live {
                self.check_time(number, round.pages - done)?;
                if self.time_is_up {
                    break;
                }
                if !self.scans() && self.looked.elapsed() >= self.look_after {
                    self.look()?;
                    self.tell_frames(false)?;
                }
            }
            if self.backlog.take(READ_BATCH, &mut pfns) == 0 {
                break;
            }
            batch.clear();
            let known = self.held.table();
            let guest = &mut self.go.guest;
            guest.read(&pfns, known, moment, &mut batch, &mut deferred)?;
            if !deferred.is_empty() {
                round.deferred += deferred.len();
                self.backlog.deferred(&deferred);
                deferred.clear();
            }
            done += pfns.len() as u64;
            pfns.clear();
            round.same += batch.unchanged;
            for entries in batch.entries.chunks(FRAME_PAGES) {
                let encoder = self.encoder.batch();
                for entry in entries {
                    let content = match entry.content {
                        Found::Nothing | Found::Zero => None,
                        Found::Slot(slot) => {
                            Some(batch.content(slot).ok_or_else(|| Error::Guest {
                                what: format!("page {:#x} was lost", entry.pfn),
                            })?)
                        }
                    };
                    let class = self.held.send(encoder, entry.pfn, entry.state, content)?;
                    round.count(class);
                }
                encoded.clear();
                let written = self.encoder.finish(&mut encoded, self.go.peer.sent());
                let in_block = (written.raw + written.delta) as u64;
                round.compressed.add(written.technique, in_block);
                let waiting = Instant::now();
                self.go.peer.send(&ToDestination::Pages(&encoded))?;
                self.encoder.waited(waiting.elapsed());
            }
            let wire_bytes = self.go.peer.bytes().0;
            self.meter.note(Instant::now(), wire_bytes);
            let waiting = self.backlog.waiting();
            let so_far = InRound {
                number,
                done,
                left: round.pages - done,
                next: waiting.0,
                hot: waiting.1,
                unseen: self.looked.elapsed(),
                spent: started.elapsed(),
                bytes: wire_bytes - bytes_before,
                pages: populated,
            };
            let outlook = self
                .forecast
                .outlook(&so_far, &self.limits(), self.meter.rate());
            self.go.observer.notice(Progress::Pages {
                round: number,
                done,
                total: round.pages,
                wire_bytes,
                outlook,
            });
        }
        // Where time was up, the rest of them wait.
        round.pages = done;
        let last = moment == Moment::Last;
        self.go.peer.send(&ToDestination::RoundEnd {
            round: number,
            pages: round.sent(),
            last,
        })?;
        // The last one is answered by "ready": nothing waits for a round trip in the silence.
        if !last {
            match self.receive(HANDLING)? {
                ToSource::RoundAck { round, .. } if round == number => {}
                other => return Err(self.unexpected(&other)),
            }
        }
        round.took = started.elapsed();
        round.wire_bytes = self.go.peer.bytes().0 - bytes_before;
        Ok(round)
    }

    /// The limits that hold now.
    fn limits(&self) -> Limits {
        Limits {
            downtime: self.go.control.downtime(),
            ..self.go.plan.limits.clone()
        }
    }

    /// Fails once somebody has asked to give the move up: not all that takes its time is a wait
    /// for the other site.
    fn check_cancelled(&self) -> Result<()> {
        if self.go.control.cancelled() {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Once the time that the operator gave is over: fails, or notes that the guest is to be handed
    /// over.
    fn check_time(&mut self, round: u32, left: u64) -> Result<()> {
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

    fn suspend(&mut self, _copied: &Copied) -> Result<Suspended> {
        (self.go.unchanged)()?;
        self.phase("suspending");
        hold("suspending");
        self.check_cancelled()?;
        self.go.journal.reach(Phase::Suspending)?;
        let started = Instant::now();
        self.suspend_started = Some(started);
        self.go.guest.suspend()?;
        self.go.connections.suspended();
        self.part("suspend", started.elapsed());
        let silent = if self.go.plan.verify {
            SILENT_VERIFYING
        } else {
            SILENT
        };
        self.go.peer.set_deadline(Some(started + silent));
        if let Some(flows) = self.go.connections.outgoing() {
            self.go.peer.send(&ToDestination::Outgoing(flows))?;
        }
        hold("suspended");
        (self.go.unchanged)()?;
        let last = Instant::now();
        let mut written = PageSet::new(self.held.table().pages());
        self.go.guest.next_dirty(&mut written, Moment::Last)?;
        self.backlog.changed(&written);
        self.backlog.begin_last();
        let number = self.history.len() as u32 + 1;
        let read_last = self.backlog.this_round().clone();
        let round = self.round(number, Moment::Last, last)?;
        self.report.rounds.push(round);
        self.part("last delta", last.elapsed());
        let state = Instant::now();
        let guest_state = self.go.guest.final_state()?;
        self.go
            .peer
            .send(&ToDestination::State(Box::new(guest_state)))?;
        let digest = self.held.digest();
        self.go.peer.send(&ToDestination::Final(digest))?;
        self.part("state", state.elapsed());
        if self.go.plan.verify {
            let verify = Instant::now();
            self.verify(&read_last)?;
            self.part("verify at the source", verify.elapsed());
        }
        Ok(Suspended { digest })
    }

    /// Reads all memory again: what differs and was not read since the suspend is a change that
    /// nobody told us of.
    fn verify(&mut self, read_last: &PageSet) -> Result<()> {
        let pages = self.held.table().pages();
        let mut batch = Batch::default();
        let mut deferred = PageSet::new(pages);
        let mut everything = PageSet::full(pages);
        let mut pfns = Vec::with_capacity(READ_BATCH);
        let mut cursor = 0;
        let mut missed: Vec<u64> = Vec::new();
        while everything.take_batch(&mut cursor, READ_BATCH, &mut pfns) > 0 {
            self.check_cancelled()?;
            batch.clear();
            self.go.guest.read(
                &pfns,
                self.held.table(),
                Moment::Last,
                &mut batch,
                &mut deferred,
            )?;
            pfns.clear();
            // A page that was read since the suspend is right as it was read.
            missed.extend(
                batch
                    .entries
                    .iter()
                    .map(|entry| entry.pfn)
                    .filter(|pfn| !read_last.contains(*pfn)),
            );
        }
        // dom0 goes on filling the buffers that the guest has posted for its network: what it
        // copied there since the suspend was logged, and is no change of the guest's.
        let mut since = PageSet::new(pages);
        self.go.guest.next_dirty(&mut since, Moment::Live)?;
        missed.retain(|pfn| !since.contains(*pfn));
        if missed.is_empty() {
            self.report.verified = true;
            return Ok(());
        }
        let shown: Vec<String> = missed
            .iter()
            .take(8)
            .map(|pfn| format!("{pfn:#x}"))
            .collect();
        Err(Error::Verify(format!(
            "{} pages changed unseen, {} among them",
            missed.len(),
            shown.join(", ")
        )))
    }

    fn hand_over(&mut self, suspended: &Suspended) -> Result<Committed> {
        hold("final-sent");
        let waited = Instant::now();
        match self.receive(RESTORING)? {
            ToSource::Ready(ready) => {
                if ready.digest != suspended.digest {
                    return Err(Error::Verify("What arrived is not what was sent".into()));
                }
                for part in ready.parts {
                    let name = format!("destination: {}", part.name);
                    self.report.downtime.parts.insert(name, part.seconds);
                }
            }
            other => return Err(self.unexpected(&other)),
        }
        self.part("wait for ready", waited.elapsed());
        self.phase("handing over");
        hold("ready");
        // From here on only the destination's word lets the guest run here again.
        if !self.go.control.commit() {
            return Err(Error::Cancelled);
        }
        self.go.peer.ignore_cancel();
        self.go.peer.set_deadline(None);
        self.go.journal.reach(Phase::Committed)?;
        hold("committed");
        Ok(Committed)
    }

    fn finish(&mut self, _committed: &Committed) -> Result<()> {
        let commit = Instant::now();
        self.go.peer.send(&ToDestination::Commit)?;
        match self.receive(RUNNING)? {
            ToSource::Running => {}
            other => return Err(self.unexpected(&other)),
        }
        self.part("commit and unpause", commit.elapsed());
        if let Some(started) = self.suspend_started {
            self.report.downtime.total = started.elapsed();
        }
        self.watch.lap("handover");
        self.lead_connections();
        hold("acknowledged");
        self.clean_up_after_move();
        self.watch.lap("clean up");
        Ok(())
    }

    /// The guest runs at the destination: its connections go on there.
    fn lead_connections(&mut self) {
        match self.go.connections.moved() {
            None => {}
            Some(Ok(kept)) => self.report.connections = Some(kept),
            Some(Err(error)) => self.go.observer.notice(Progress::Warning(format!(
                "The guest has moved, but its connections may not have: {}",
                chain(&error)
            ))),
        }
    }

    /// The guest runs at the destination: nothing that fails here changes that.
    fn clean_up_after_move(&mut self) {
        self.phase("cleaning up");
        if let Err(error) = self.go.guest.end_tracking() {
            log::warn!("{}", chain(&error));
        }
        if let Err(error) = self.leave_shadow() {
            log::warn!("No shadow is kept here: {}", chain(&error));
        }
        match self.go.guest.destroy() {
            Ok(()) => self.end_journal(Outcome::Moved),
            // The journal stays: `resolve` destroys it later.
            Err(error) => self.go.observer.notice(Progress::Warning(format!(
                "The guest has moved, but its old domain is still here: {}",
                chain(&error)
            ))),
        }
        self.go.peer.close();
    }

    /// Keeps the memory of the guest that is suspended here and runs at the destination, so that
    /// the way back is short.
    fn leave_shadow(&mut self) -> Result<()> {
        let table = self.held.table();
        let named = Named {
            uuid: &self.report.uuid,
            name: &self.report.domain,
            peer: self.go.peer.peer(),
        };
        let Some(shadow) = self.go.shadows.leave(named, &self.key, table)? else {
            return Ok(());
        };
        log::debug!("keeping a shadow");
        let zeros = self.go.digester.zeros();
        let mut left = PageSet::new(table.pages());
        for pfn in 0..table.pages() {
            if table.get(pfn).is_some_and(|state| {
                state.page_type.has_data() && state.digest != zeros.of(state.page_type)
            }) {
                left.insert(pfn);
            }
        }
        // Against nothing, so that each page is copied.
        let nothing = PageTable::new(table.pages());
        let (mut batch, mut deferred) = (Batch::default(), PageSet::new(table.pages()));
        let mut pfns = Vec::with_capacity(READ_BATCH);
        let mut cursor = 0;
        while left.take_batch(&mut cursor, READ_BATCH, &mut pfns) > 0 {
            batch.clear();
            let guest = &mut self.go.guest;
            guest.read(&pfns, &nothing, Moment::Last, &mut batch, &mut deferred)?;
            pfns.clear();
            for entry in &batch.entries {
                // dom0 may have written to it since it crossed: then it is none of the shadow's.
                let same = table.get(entry.pfn) == Some(entry.state);
                if let (true, Found::Slot(slot)) = (same, entry.content)
                    && let Some(content) = batch.content(slot)
                {
                    shadow.write(entry.pfn, content)?;
                }
            }
        }
        shadow.finish(table)?;
        self.watch.lap("keep a shadow");
        Ok(())
    }

    /// Before the commit: the guest goes on here.
    fn give_up(&mut self, error: Error) -> Result<()> {
        self.phase("giving up");
        let mut safe = true;
        let mut note = |step: Result<()>| {
            if let Err(error) = step {
                safe = false;
                log::error!("{}", chain(&error));
            }
        };
        if self.go.journal.entry().phase >= Phase::Suspending {
            // First what the guest waits for.
            note(self.go_on());
        }
        self.go.connections.stayed();
        note(self.go.guest.end_tracking());
        self.go.peer.ignore_cancel();
        self.go.peer.set_deadline(None);
        // A peer that is gone finds out by itself.
        let _ = self
            .go
            .peer
            .send(&ToDestination::Abort(Text::new(&chain(&error))));
        self.go.peer.close();
        if !safe {
            return Err(Error::Unsettled(Box::new(error)));
        }
        self.end_journal(Outcome::Aborted);
        Err(error)
    }

    /// Lets the guest run here again, under a keeper where it was suspended: `xl`'s monitor ends
    /// then.
    fn go_on(&mut self) -> Result<()> {
        if self.go.guest.end_suspend()? {
            let kept = (self.go.keep)();
            self.go.guest.resume()?;
            kept?;
        }
        Ok(())
    }

    /// Commit was recorded and no answer came: only the destination knows.
    fn resolve_doubt(&mut self, error: Error) -> Result<()> {
        self.phase("asking the destination");
        log::warn!("{}", chain(&error));
        self.go.peer.close();
        let started = Instant::now();
        loop {
            match (self.go.ask)(self.go.journal.entry()) {
                Ok(Owner::Destination) => {
                    self.lead_connections();
                    self.clean_up_after_move();
                    return Ok(());
                }
                Ok(Owner::Source) => {
                    return self.give_up(error);
                }
                Ok(Owner::Unknown) => break,
                Err(error) if started.elapsed() < ASKING => {
                    log::warn!("{}", chain(&error));
                    std::thread::sleep(Duration::from_secs(2));
                }
                Err(error) => {
                    log::warn!("{}", chain(&error));
                    break;
                }
            }
        }
        Err(Error::InDoubt {
            peer: self.go.peer.peer().to_owned(),
        })
    }

    fn end_journal(&mut self, outcome: Outcome) {
        if let Err(error) = self.go.journal.end(outcome) {
            log::error!("{}", chain(&error));
        }
    }

    fn part(&mut self, name: &str, took: Duration) {
        self.report
            .downtime
            .parts
            .insert(name.to_owned(), rounded(took));
    }

    /// The next message, but for those that only tell how far the destination is.
    fn receive(&mut self, patience: Duration) -> Result<ToSource> {
        let deadline = Instant::now() + patience;
        loop {
            let received: Received = self.go.peer.receive(deadline)?;
            match ToSource::decode(received.frame())? {
                ToSource::Progress { .. } => {}
                ToSource::Ping(token) => self.go.peer.send(&ToDestination::Pong(token))?,
                message => return Ok(message),
            }
        }
    }

    fn unexpected(&self, message: &ToSource) -> Error {
        let peer = self.go.peer.peer().to_owned();
        match message {
            ToSource::Failed(reason) => Error::PeerFailed {
                peer,
                reason: reason.to_string(),
            },
            other => Error::Protocol {
                peer,
                what: format!("{:?} out of order", other.tag()),
            },
        }
    }
}
