//! A thread's part in moving a guest: all of its connections to that guest, in batches, so that
//! other guests' connections have their turns between.
//!
//! ```text
//!  release:  what the guest has to hear, of each ─▶ the rest of the work, of each ─▶ probes
//!                      └───────── on its way meanwhile ──────────┘
//! ```
//! A guest is silent until it is asked. So all connections that have something to ask with ask
//! first, and what can wait for the answer does. The others ask at last, by a probe, if their
//! clients have sent nothing until then: with a thousand of them, probes and the answers to these
//! would hold up what somebody waits for.

use std::collections::BTreeSet;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::{Slot, Tally, Worker};
use crate::connection::{Connection, Context, Next, Step, Way};
use crate::site::Forward;

/// So many connections are moved in one round of the loop.
const BATCH: usize = 64;
/// How often the canary asks whether the guest can be reached.
const CANARY: Duration = Duration::from_millis(10);

/// Connections to be frozen when the grace is over.
#[derive(Debug)]
pub(super) struct Freeze {
    guest: String,
    at: Instant,
    reply: Sender<Tally>,
}

/// One connection that asks for all whether the guest can be reached.
#[derive(Debug)]
pub(super) struct Canary {
    guest: String,
    key: usize,
    next: Instant,
    until: Instant,
    reply: Sender<Tally>,
}

/// A step that is being taken, a batch at a time.
#[derive(Debug)]
pub(super) struct Job {
    guest: String,
    work: Work,
    keys: Vec<usize>,
    /// Those that what comes next has to come back to.
    unfinished: Vec<usize>,
    tally: Tally,
    reply: Sender<Tally>,
}

#[derive(Debug)]
enum Work {
    Freeze,
    Retarget {
        site: String,
        mark: u32,
    },
    /// Then [`Work::Finish`] and [`Work::Ask`].
    Release,
    Finish,
    Ask,
    Undo,
    Cancel,
}

impl Work {
    /// What is done when this is done of all connections.
    fn next(&self) -> Option<Self> {
        match self {
            Self::Release => Some(Self::Finish),
            Self::Finish => Some(Self::Ask),
            _ => None,
        }
    }

    fn one(&self, connection: &mut Connection, ctx: &mut Context<'_>, tally: &mut Tally) -> Next {
        if connection.guest_is_lost() {
            // Its guest has ended it: nothing is left that could be moved.
            return Next::Wait;
        }
        let held = connection.is_held();
        let outcome = match self {
            Self::Freeze => Ok(connection.freeze()),
            Self::Retarget { site, mark } => Ok(connection.retarget(site, *mark, ctx)),
            Self::Release => connection.release(ctx),
            Self::Finish => return connection.finish(ctx),
            Self::Ask => {
                connection.break_silence();
                return Next::Wait;
            }
            Self::Undo => Ok(connection.undo(ctx)),
            Self::Cancel => connection.cancel(ctx),
        };
        let metrics = &ctx.shared.metrics;
        let guest = &connection.guest.label;
        match &outcome {
            Ok(Step::Taken) => {
                tally.connections += 1;
                match self {
                    Self::Release => drop(metrics.moved.get_or_create(guest).inc()),
                    Self::Cancel if held => {
                        metrics.move_cancelled.get_or_create(guest).inc();
                    }
                    _ => {}
                }
            }
            Ok(Step::Waits) => tally.waiting += 1,
            Ok(Step::Failed) => tally.failed += 1,
            Ok(Step::Gone) => {}
            Err(_) => {
                tally.failed += 1;
                metrics.move_failures.get_or_create(guest).inc();
            }
        }
        match (outcome, self) {
            (Err(why), _) => Next::Failed(why),
            (Ok(Step::Gone), _) => Next::Failed("the client has gone".into()),
            (Ok(_), Self::Cancel) => {
                let next = connection.finish(ctx);
                connection.break_silence();
                next
            }
            (Ok(_), _) => Next::Wait,
        }
    }
}

impl Worker {
    fn keys_of(&self, guest: &str) -> Vec<usize> {
        self.live()
            .filter(|(_, c)| c.guest.name == guest)
            .map(|(key, _)| key)
            .collect()
    }

    /// Nothing is written to the guest from now on. What it sent before its suspend is on its
    /// way for half a round trip: frozen is only after that.
    pub(super) fn hold(&mut self, guest: String, grace: Duration, reply: Sender<Tally>) {
        let mut longest = Duration::from_millis(1);
        for key in self.keys_of(&guest) {
            self.with(key, |connection, _| {
                longest = longest.max(connection.rtt().unwrap_or_default());
                connection.hold();
                Next::Wait
            });
        }
        self.held.insert(guest.clone());
        self.freezes.push(Freeze {
            guest,
            at: self.now + longest.min(grace),
            reply,
        });
    }

    fn start(&mut self, guest: &str, work: Work, reply: Sender<Tally>) {
        let keys = self.keys_of(guest);
        self.jobs.push_back(Job {
            guest: guest.to_owned(),
            work,
            keys,
            unfinished: Vec::new(),
            tally: Tally::default(),
            reply,
        });
    }

    /// The ways of all connections of a guest, each of them once.
    pub(super) fn ways(&self, guest: &str, site: &str) -> BTreeSet<Way> {
        let own = self.live().filter(|(_, c)| c.guest.name == guest);
        own.filter_map(|(_, connection)| connection.way(site))
            .collect()
    }

    /// What sites have to translate for all connections of a guest.
    pub(super) fn forwards(&self, guest: &str) -> BTreeSet<Forward> {
        let own = self.live().filter(|(_, c)| c.guest.name == guest);
        own.map(|(_, connection)| connection.forward()).collect()
    }

    pub(super) fn retarget(&mut self, guest: &str, site: String, mark: u32, reply: Sender<Tally>) {
        self.start(guest, Work::Retarget { site, mark }, reply);
    }

    pub(super) fn release(&mut self, guest: String, wait: Duration, reply: Sender<Tally>) {
        if !wait.is_zero() {
            let canary = self
                .live()
                .find(|(_, c)| c.guest.name == guest && c.ask().is_some());
            if let Some((key, _)) = canary {
                let (next, until) = (self.now + CANARY, self.now + wait);
                self.canaries.push(Canary {
                    guest,
                    key,
                    next,
                    until,
                    reply,
                });
                return;
            }
        }
        self.let_go(&guest, reply);
    }

    /// Asks over the first connection that can tell.
    pub(super) fn ask(&self, guest: &str) -> bool {
        let mut own = self.live().filter(|(_, c)| c.guest.name == guest);
        own.find_map(|(_, connection)| connection.ask()) == Some(true)
    }

    fn let_go(&mut self, guest: &str, reply: Sender<Tally>) {
        self.held.remove(guest);
        self.start(guest, Work::Release, reply);
    }

    pub(super) fn undo(&mut self, guest: &str, reply: Sender<Tally>) {
        self.start(guest, Work::Undo, reply);
    }

    pub(super) fn cancel(&mut self, guest: &str, reply: Sender<Tally>) {
        self.held.remove(guest);
        self.freezes.retain(|freeze| freeze.guest != guest);
        self.canaries.retain(|canary| canary.guest != guest);
        self.start(guest, Work::Cancel, reply);
    }

    /// When the next freeze or question of a canary is due.
    pub(super) fn next_move(&self) -> Option<Instant> {
        let freezes = self.freezes.iter().map(|freeze| freeze.at);
        let canaries = self.canaries.iter().map(|canary| canary.next);
        freezes.chain(canaries).min()
    }

    /// Does what is due, and one batch of what is under way.
    pub(super) fn move_some(&mut self) {
        let now = self.now;
        for freeze in self
            .freezes
            .extract_if(.., |freeze| freeze.at <= now)
            .collect::<Vec<_>>()
        {
            self.start(&freeze.guest, Work::Freeze, freeze.reply);
        }
        for mut canary in self
            .canaries
            .extract_if(.., |canary| canary.next <= now)
            .collect::<Vec<_>>()
        {
            let answered = match self.connections.get(canary.key) {
                Some(Slot::Live(connection)) => connection.ask().unwrap_or(true),
                _ => true,
            };
            if answered || now >= canary.until {
                self.let_go(&canary.guest, canary.reply);
            } else {
                canary.next = now + CANARY;
                self.canaries.push(canary);
            }
        }
        let Some(mut job) = self.jobs.pop_front() else {
            return;
        };
        for _ in 0..BATCH {
            let Some(key) = job.keys.pop() else { break };
            let Job {
                guest,
                work,
                unfinished,
                tally,
                ..
            } = &mut job;
            if work.next().is_some() {
                unfinished.push(key);
            }
            self.with(key, |connection, ctx| {
                // A slot may have a new tenant since.
                if connection.guest.name == *guest {
                    work.one(connection, ctx, tally)
                } else {
                    Next::Wait
                }
            });
        }
        if job.keys.is_empty()
            && let Some(next) = job.work.next()
        {
            job.work = next;
            job.keys = std::mem::take(&mut job.unfinished);
            // In the same order.
            job.keys.reverse();
        }
        if job.keys.is_empty() {
            let _ = job.reply.send(job.tally);
        } else {
            self.jobs.push_front(job);
        }
    }
}
