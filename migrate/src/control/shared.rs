//! What the engine and those who watch or steer it have in common.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::protocol::{Bandwidth, Change, Ended, Status};
use crate::handover::journal::Role;
use crate::link::Rate;
use crate::pages::PAGE_SIZE;
use crate::report::{Observer, Progress};
use crate::rounds::Outlook;

/// What is fixed of an attempt to move a guest.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Which end of it this is.
    pub role: Role,
    /// The move, the same at both ends.
    pub move_id: String,
    /// The guest's name.
    pub domain: String,
    /// Its UUID.
    pub uuid: String,
    /// Its domain id, at the source.
    pub domid: Option<u32>,
    /// The other host.
    pub peer: String,
    /// The guest's memory.
    pub guest_bytes: u64,
}

/// It is too late to give a move up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed;

/// Where the engine is.
#[derive(Debug, Clone, Default)]
struct Now {
    phase: String,
    /// Until the next attempt.
    waiting: bool,
    round: u32,
    done: u64,
    total: u64,
    wire_bytes: u64,
    /// Of attempts before this one.
    earlier_bytes: u64,
    outlook: Outlook,
}

/// One move, as seen from outside of its engine. Cloning gives another handle to the same.
#[derive(Debug, Clone)]
pub struct Shared(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    facts: Mutex<Facts>,
    began: Instant,
    rate: Rate,
    downtime_ms: AtomicU64,
    cancel: Arc<AtomicBool>,
    /// Whether it was asked for here.
    asked: AtomicBool,
    /// Whether a cancel comes too late. Locked for each decision between the two.
    committed: Mutex<bool>,
    now: Mutex<Now>,
    ended: Mutex<Option<Ended>>,
    ending: Condvar,
}

/// What is behind these locks is right after any panic of a holder: it is assigned whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// A move that begins now, with these limits. `cancel` gives it up.
    #[must_use]
    pub fn new(facts: Facts, rate: Rate, downtime: Duration, cancel: Arc<AtomicBool>) -> Self {
        Shared(Arc::new(Inner {
            facts: Mutex::new(facts),
            began: Instant::now(),
            rate,
            downtime_ms: AtomicU64::new(milliseconds(downtime)),
            cancel,
            asked: AtomicBool::new(false),
            committed: Mutex::new(false),
            now: Mutex::default(),
            ended: Mutex::default(),
            ending: Condvar::new(),
        }))
    }

    /// What is fixed of it, for as long as an attempt takes.
    #[must_use]
    pub fn facts(&self) -> Facts {
        lock(&self.0.facts).clone()
    }

    /// What is sent, and how fast it may be.
    #[must_use]
    pub fn rate(&self) -> Rate {
        self.0.rate.clone()
    }

    /// An attempt has ended with its link, and `phase` is what is done until the next: what it has
    /// sent counts, and all else of it is over. It can be given up again, should it have come to its
    /// commit.
    pub fn pause(&self, phase: &str) {
        *lock(&self.0.committed) = false;
        let mut now = lock(&self.0.now);
        *now = Now {
            phase: phase.to_owned(),
            waiting: true,
            earlier_bytes: now.earlier_bytes + now.wire_bytes,
            ..Now::default()
        };
    }

    /// Another attempt begins, of which this is fixed.
    pub fn go_on(&self, facts: Facts) {
        *lock(&self.0.facts) = facts;
        lock(&self.0.now).waiting = false;
    }

    /// The downtime that is to be reached now.
    #[must_use]
    pub fn downtime(&self) -> Duration {
        Duration::from_millis(self.0.downtime_ms.load(Ordering::Relaxed))
    }

    /// The engine is about to commit. From here on nobody can give the move up. False: somebody
    /// has, before.
    #[must_use]
    pub fn commit(&self) -> bool {
        let mut committed = lock(&self.0.committed);
        *committed = !self.0.cancel.load(Ordering::Relaxed);
        *committed
    }

    /// Asks the engine to give the move up.
    ///
    /// # Errors
    /// [`Committed`].
    pub fn cancel(&self) -> Result<(), Committed> {
        let committed = lock(&self.0.committed);
        if *committed {
            return Err(Committed);
        }
        self.0.asked.store(true, Ordering::Relaxed);
        self.0.cancel.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether somebody has asked to give the move up, in whatever way.
    #[must_use]
    pub fn cancelled(&self) -> bool {
        self.0.cancel.load(Ordering::Relaxed)
    }

    /// Changes limits, and says which hold then.
    pub fn set(&self, change: Change) -> Change {
        if let Some(bandwidth) = change.bandwidth {
            self.0.rate.set(bandwidth.bytes());
        }
        if let Some(downtime) = change.downtime_ms {
            self.0.downtime_ms.store(downtime, Ordering::Relaxed);
        }
        Change {
            bandwidth: Some(Bandwidth::of_bytes(self.0.rate.get())),
            downtime_ms: Some(self.0.downtime_ms.load(Ordering::Relaxed)),
        }
    }

    /// Something happened to the move.
    pub fn note(&self, progress: &Progress) {
        let mut now = lock(&self.0.now);
        match progress {
            Progress::Phase(name) => (*name).clone_into(&mut now.phase),
            Progress::Warning(_) => {}
            Progress::Pages {
                round,
                done,
                total,
                wire_bytes,
                outlook,
            } => {
                now.round = *round;
                now.done = *done;
                now.total = *total;
                now.wire_bytes = *wire_bytes;
                now.outlook = *outlook;
            }
            Progress::Round { number, round, .. } => {
                now.round = *number;
                now.done = round.pages;
                now.total = round.pages;
            }
        }
    }

    /// How the move goes.
    #[must_use]
    pub fn status(&self) -> Status {
        let facts = self.facts();
        let committed = *lock(&self.0.committed);
        let now = lock(&self.0.now).clone();
        let seconds = |duration: Duration| (duration.as_secs_f64() * 1e3).round() / 1e3;
        let page = PAGE_SIZE as f64;
        Status {
            role: facts.role,
            move_id: facts.move_id,
            domain: facts.domain,
            uuid: facts.uuid,
            domid: facts.domid,
            peer: facts.peer,
            pid: std::process::id(),
            phase: now.phase,
            seconds: seconds(self.0.began.elapsed()),
            guest_bytes: facts.guest_bytes,
            wire_bytes: now.earlier_bytes + now.wire_bytes,
            rate: now.outlook.rate.map(f64::round),
            round: now.round,
            pages_done: now.done,
            pages: now.total,
            dirty_rate: now.outlook.dirty.map(|pages| (pages * page).round()),
            remaining_bytes: now.outlook.left.map(|pages| pages * PAGE_SIZE as u64),
            eta_seconds: now.outlook.rest.map(seconds),
            predicted_downtime: now.outlook.downtime.map(seconds),
            downtime_ms: self.0.downtime_ms.load(Ordering::Relaxed),
            bandwidth: Bandwidth::of_bytes(self.0.rate.get()),
            waiting: now.waiting,
            // A signal that comes after the commit gives nothing up.
            cancelling: self.0.cancel.load(Ordering::Relaxed) && !committed,
            committed,
        }
    }

    /// Whether it was asked for here, rather than by a signal, to give the move up.
    #[must_use]
    pub fn asked_to_cancel(&self) -> bool {
        self.0.asked.load(Ordering::Relaxed)
    }

    /// The move is over.
    pub fn end(&self, ended: Ended) {
        lock(&self.0.ended).get_or_insert(ended);
        self.0.ending.notify_all();
    }

    /// Waits until the move is over.
    #[must_use]
    pub fn wait(&self) -> Ended {
        let mut ended = lock(&self.0.ended);
        loop {
            if let Some(ended) = &*ended {
                return ended.clone();
            }
            ended = self
                .0
                .ending
                .wait(ended)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Tells both another observer and a [`Shared`].
pub struct Watched<'a> {
    /// The other one.
    pub observer: &'a mut dyn Observer,
    /// What others see of the move.
    pub shared: Shared,
}

impl Observer for Watched<'_> {
    fn notice(&mut self, progress: Progress) {
        self.shared.note(&progress);
        self.observer.notice(progress);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::control::Outcome;
    use crate::whereabouts::Whereabouts;

    pub fn a_move(role: Role, number: u8) -> Shared {
        let facts = Facts {
            role,
            move_id: format!("00000000-0000-4000-8000-0000000000{number:02x}"),
            domain: format!("g{number}"),
            uuid: format!("10000000-0000-4000-8000-0000000000{number:02x}"),
            domid: (role == Role::Source).then_some(u32::from(number) + 100),
            peer: "b".into(),
            guest_bytes: 96 << 20,
        };
        Shared::new(
            facts,
            Rate::default(),
            Duration::from_millis(300),
            Arc::default(),
        )
    }

    #[test]
    fn a_cancel_and_a_commit_exclude_one_another() {
        let shared = a_move(Role::Source, 1);
        assert!(shared.commit());
        assert_eq!(shared.cancel(), Err(Committed));
        assert!(!shared.cancelled() && shared.status().committed);
        // A signal that comes too late.
        shared.0.cancel.store(true, Ordering::Relaxed);
        let status = shared.status();
        assert!(status.committed && !status.cancelling);

        let shared = a_move(Role::Source, 1);
        shared.cancel().unwrap();
        assert!(!shared.commit());
        let status = shared.status();
        assert!(status.cancelling && !status.committed);
        // Of whoever asked in another way too.
        let shared = a_move(Role::Source, 1);
        shared.0.cancel.store(true, Ordering::Relaxed);
        assert!(!shared.commit() && !shared.asked_to_cancel());
    }

    #[test]
    fn an_attempt_goes_on_where_the_one_before_ended() {
        let shared = a_move(Role::Source, 1);
        let sent = |wire_bytes| Progress::Pages {
            round: 2,
            done: 3,
            total: 4,
            wire_bytes,
            outlook: Outlook::default(),
        };
        shared.note(&sent(1000));
        assert!(shared.commit());
        shared.pause("waiting for the link");
        let status = shared.status();
        assert_eq!((status.wire_bytes, status.round), (1000, 0));
        assert_eq!(status.phase, "waiting for the link");
        assert!(status.waiting && !status.committed);
        let first = shared.facts();
        shared.go_on(Facts {
            move_id: "another".into(),
            domid: Some(7),
            ..first
        });
        shared.note(&sent(10));
        let status = shared.status();
        assert_eq!((status.wire_bytes, status.round), (1010, 2));
        assert!(!status.waiting);
        assert_eq!((&*status.move_id, status.domid), ("another", Some(7)));
        shared.cancel().unwrap();
    }

    #[test]
    fn whoever_wins_of_many_is_obeyed() {
        for _ in 0..200 {
            let shared = a_move(Role::Source, 1);
            let other = shared.clone();
            let cancelling = std::thread::spawn(move || other.cancel());
            let committed = shared.commit();
            let cancelled = cancelling.join().unwrap().is_ok();
            assert_ne!(committed, cancelled);
        }
    }

    #[test]
    fn limits_are_changed_one_by_one() {
        let shared = a_move(Role::Source, 1);
        let change = |bandwidth, downtime_ms| Change {
            bandwidth,
            downtime_ms,
        };
        let limit = Bandwidth::of_bytes(Some(1_000_000));
        assert_eq!(
            shared.set(change(Some(limit), None)),
            change(Some(limit), Some(300))
        );
        assert_eq!(shared.0.rate.get(), Some(1_000_000));
        assert_eq!(
            shared.set(change(None, Some(50))),
            change(Some(limit), Some(50))
        );
        assert_eq!(shared.downtime(), Duration::from_millis(50));
        shared.set(change(Some(Bandwidth::of_bytes(None)), None));
        assert_eq!(shared.0.rate.get(), None);
    }

    #[test]
    fn whoever_waits_hears_of_the_end() {
        let shared = a_move(Role::Source, 1);
        let other = shared.clone();
        let waiting = std::thread::spawn(move || other.wait());
        let ended = Ended {
            outcome: Outcome::Cancelled,
            guest: Whereabouts::Source,
            what: "g1 runs here".into(),
        };
        shared.end(ended.clone());
        assert_eq!(waiting.join().unwrap(), ended);
        assert_eq!(shared.wait(), ended);
    }
}
