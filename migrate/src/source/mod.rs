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

mod copying;
mod ending;
mod handover;
pub(crate) mod learning;
mod offering;
mod round;
mod slowing;
mod to_shadow;

use std::num::NonZeroUsize;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use slowing::Slowed;

use crate::codec::{AdaptiveEncoder, MAX_WORKERS};
use crate::connections::Connections;
use crate::control::Shared;
use crate::costs::Earlier;
use crate::digest::{DigestKey, Digester, MemoryDigest};
use crate::error::{Error, Result, chain};
use crate::group::Group;
use crate::guest::Source;
use crate::handover::journal::{Entry, Journal, Outcome, Phase};
use crate::handover::recovery::Owner;
use crate::held::{HOT_BYTES, Held};
use crate::link::{Conversation, QUEUE, Reach};
use crate::pages::{PAGE_SIZE, PageSet};
use crate::report::{
    Downtime, Link as LinkReport, MemoryOfBoth, Observer, Predicted, Progress, REPORT_VERSION,
    Report, Stopwatch, own_memory, rounded,
};
use crate::rounds::{Backlog, Forecast, Limits, Meter, RoundFacts};
use crate::shadow::Shadows;
use crate::whereabouts::Whereabouts;
use crate::wire::{Offer, ToSource};

/// Pages read, and so mapped, at once: the hypervisor's limit.
const READ_BATCH: usize = 1024;

/// How long the destination may take to handle a round that has crossed, or to look at what it has.
const HANDLING: Duration = Duration::from_secs(300);

/// How often the connections are seen to.
const TENDING: Duration = Duration::from_secs(1);

/// What the operator asked for.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// When to suspend.
    pub limits: Limits,
    /// Compare all memory at both sides.
    pub verify: bool,
    /// How long it may take until the guest is handed over, from when the move began.
    pub timeout: Option<Duration>,
    /// What to do when that is over.
    pub on_timeout: OnTimeout,
    /// The cores to encode on; those that this host has where none is given.
    pub cores: Option<NonZeroUsize>,
    /// The connections to send pages by; as many as the link needs where none is given. With one
    /// of them everything goes by that.
    pub connections: Option<NonZeroUsize>,
}

impl Plan {
    /// The cores to encode on.
    #[must_use]
    pub fn cores(&self) -> usize {
        self.cores
            .or_else(|| thread::available_parallelism().ok())
            .map_or(1, NonZeroUsize::get)
    }

    /// How many frames may wait for the link: what all cores encode.
    #[must_use]
    pub fn queue(&self) -> usize {
        QUEUE.max(self.cores().min(MAX_WORKERS) + 2)
    }
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
    /// When the move began: the first attempt, where this is another one.
    pub began: Instant,
    /// Who steers it while it runs.
    pub control: Shared,
    /// What this site holds of guests that run elsewhere.
    pub shadows: &'a Shadows,
    /// The trust group of the guest, if it is in one.
    pub group: Option<Group>,
    /// What earlier moves tell of this one.
    pub earlier: Earlier,
    /// What reaches the destination.
    pub reach: &'a mut dyn Reach,
    /// Checks, right before and after the suspend, that the guest still is what was offered, and
    /// that its disks have what was written to them.
    pub unchanged: &'a mut dyn FnMut() -> Result<()>,
    /// Starts what takes the place of `xl`'s monitor: called where the guest goes on here after it
    /// was suspended.
    pub keep: &'a mut dyn FnMut() -> Result<()>,
    /// Asks the destination who owns the guest: called where a commit was left without an answer.
    pub ask: &'a mut dyn FnMut(&Entry) -> Result<Owner>,
}

impl Move<'_> {
    /// When the move is to be given up, if it has not come to its commit. One that is handed over
    /// instead takes what that takes.
    fn out_of_time(&self) -> Option<Instant> {
        match self.plan.on_timeout {
            OnTimeout::Fail => self.began.checked_add(self.plan.timeout?),
            OnTimeout::HandOver => None,
        }
    }
}

struct Session<'a> {
    go: Move<'a>,
    key: DigestKey,
    watch: Stopwatch,
    /// What is being done.
    phase: &'static str,
    report: Report,
    held: Held,
    backlog: Backlog,
    /// When the log of dirty pages was read last, and how long to wait until it is read again.
    looked: Instant,
    look_after: Duration,
    /// When the connections were seen to last.
    tended: Instant,
    /// What the destination was told last of where the p2m is.
    told_frames: (u64, Vec<u64>),
    /// What reading the guest's pages took in this round, or the last one.
    reading: Duration,
    /// Pages that were at the destination after a round and not yet given to its restore.
    behind: u64,
    encoder: AdaptiveEncoder,
    /// The bytes that were written before the last round, and those at its end, once it has been
    /// sent.
    last_round: Option<(u64, Receiver<u64>)>,
    history: Vec<RoundFacts>,
    /// Since the round began everything was named as dirty, for once.
    unclear: bool,
    forecast: Forecast,
    meter: Meter,
    /// The time that the operator gave is over, and the guest is to be handed over.
    time_is_up: bool,
    slowed: Option<Slowed>,
    /// The guest can't be slowed down further, whatever the operator allows.
    no_slower: bool,
    /// How long the guest is predicted to be silent, when it is to be suspended.
    foretold: Option<Duration>,
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
    fn new(mut go: Move<'a>, key: DigestKey) -> Self {
        go.peer.set_deadline(go.out_of_time());
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
            guest: Whereabouts::Unknown,
            tracker: None,
            guest_bytes: go.guest.populated() * PAGE_SIZE as u64,
            wire_bytes: 0,
            took: Duration::ZERO,
            phases: Vec::new(),
            downtime: Downtime::default(),
            link: LinkReport::default(),
            recalled: 0,
            shareable: 0,
            interruptions: Vec::new(),
            predicted: Predicted {
                at_start: go.earlier.prediction,
                after_first_round: None,
            },
            stop: None,
            slowed_down: None,
            rounds: Vec::new(),
            verified: false,
            connections: None,
            memory: MemoryOfBoth::default(),
        };
        let forecast = Forecast::new(go.earlier.fixed);
        Session {
            held: Held::nothing(facts.pages, go.digester.clone(), HOT_BYTES),
            backlog: Backlog::new(PageSet::new(facts.pages), go.plan.limits.looking),
            looked: Instant::now(),
            look_after: go.plan.limits.looking,
            tended: Instant::now(),
            told_frames: (0, Vec::new()),
            reading: Duration::ZERO,
            behind: 0,
            encoder: AdaptiveEncoder::new(go.plan.cores()),
            last_round: None,
            go,
            key,
            watch: Stopwatch::default(),
            phase: "",
            report,
            history: Vec::new(),
            unclear: false,
            forecast,
            meter: Meter::default(),
            time_is_up: false,
            slowed: None,
            no_slower: false,
            foretold: None,
            suspend_started: None,
        }
    }

    /// The report, and how it ended.
    fn conclude(mut self, done: &str, result: Result<()>) -> (Report, Result<()>) {
        self.report.outcome = match &result {
            Ok(()) => done.into(),
            Err(error) => Report::failed(error),
        };
        let carries = self.encoder.choice().link().seen();
        let carries = carries.filter(|_| self.go.peer.limit().is_none());
        self.report.link.carries_mbit = carries.map(|bytes| (bytes * 8e-6 * 10.0).round() / 10.0);
        let (written, read) = self.go.peer.bytes();
        self.report.wire_bytes = written + read;
        self.report.took = self.watch.total();
        self.report.phases = self.watch.phases().to_vec();
        (self.report, result)
    }

    fn migrate(&mut self, offer: Offer) -> Result<()> {
        let greeted = self.greet()?;
        let offered = self.offer(greeted, offer)?;
        let copied = self.copy(&offered)?;
        let suspended = self.suspend(&copied)?;
        let committed = self.hand_over(&suspended)?;
        self.finish(&committed)
    }

    /// Notes what memory this process has now, if that is the most so far.
    fn note_memory(&mut self) {
        let memory = &mut self.report.memory.source_bytes;
        *memory = (*memory).max(own_memory());
    }

    fn phase(&mut self, name: &'static str) {
        log::debug!("{name}");
        self.phase = name;
        self.go.observer.notice(Progress::Phase(name));
    }

    /// Sees to the connections, where it is time.
    fn tend(&mut self) {
        if self.tended.elapsed() < TENDING {
            return;
        }
        if let Some(congestion) = self.go.reach.tend() {
            self.go.observer.notice(Progress::Warning(format!(
                "Packets are lost on the way to {}: sending by {congestion} from now on",
                self.go.peer.peer()
            )));
            self.report.link.congestion = Some(congestion);
        }
        self.tended = Instant::now();
    }

    /// Fails once somebody has asked to give the move up, or its time is over: not all that takes
    /// its time is a wait for the other site.
    fn check_interrupted(&self) -> Result<()> {
        if self.go.control.cancelled() {
            return Err(Error::Cancelled);
        }
        match self.is_out_of_time() {
            true => Err(self.timed_out()),
            false => Ok(()),
        }
    }

    fn is_out_of_time(&self) -> bool {
        let end = self.go.out_of_time();
        end.is_some_and(|end| Instant::now() >= end)
    }

    fn timed_out(&self) -> Error {
        Error::TimedOut(format!(
            "still {} after {:.0} s",
            self.phase,
            self.go.began.elapsed().as_secs_f64()
        ))
    }

    fn end_journal(&mut self, outcome: Outcome) {
        if let Err(error) = self.go.journal.end_or_remove(outcome) {
            log::error!("{}", chain(&error));
        }
    }

    fn part(&mut self, name: &str, took: Duration) {
        self.report
            .downtime
            .parts
            .insert(name.to_owned(), rounded(took));
    }

    /// The next message, but for those that only ask for a sign of life.
    fn receive(&mut self, patience: Duration) -> Result<ToSource> {
        learning::receive(&mut self.go.peer, patience)
    }

    fn unexpected(&self, message: &ToSource) -> Error {
        learning::unexpected(&self.go.peer, message)
    }
}
