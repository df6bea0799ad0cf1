//! Whose turn it is: one step of a guest's move at a time.
//!
//! ```text
//!  prepare, hold, ... ──▶ Turns::wait ──▶ Turn, until it is dropped
//!  list ────────────────▶ Turns::phase ─▶ how far the move has come, at once
//! ```
//!
//! A step may take long: a release waits until the guest answers. Whoever only looks is not to
//! wait for it, and not to take the guest for settled either.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use super::lock;
use crate::retarget::phase::Phase;

/// The turns at the move of one guest.
#[derive(Debug, Default)]
pub(super) struct Turns {
    one: Mutex<()>,
    /// Locked for no longer than it takes to read or write it.
    phase: Mutex<Phase>,
}

/// The right to take steps, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    _one: MutexGuard<'a, ()>,
    phase: &'a Mutex<Phase>,
}

impl Turns {
    /// Waits until nobody takes a step.
    pub(super) fn wait(&self) -> Turn<'_> {
        self.turn(lock(&self.one))
    }

    /// None while somebody takes a step.
    pub(super) fn take(&self) -> Option<Turn<'_>> {
        let one = match self.one.try_lock() {
            Ok(one) => one,
            Err(TryLockError::Poisoned(broken)) => PoisonError::into_inner(broken),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(self.turn(one))
    }

    /// How far the move has come. A step that is under way shows when it has come to its end, but
    /// that a move begins, or a hold, shows at once.
    pub(super) fn phase(&self) -> Phase {
        lock(&self.phase).clone()
    }

    fn turn<'a>(&'a self, one: MutexGuard<'a, ()>) -> Turn<'a> {
        Turn {
            _one: one,
            phase: &self.phase,
        }
    }
}

impl Turn<'_> {
    /// How far the move has come: nobody else changes it now.
    pub(super) fn phase(&self) -> Phase {
        lock(self.phase).clone()
    }

    /// The move has come so far.
    pub(super) fn set(&mut self, phase: Phase) {
        *lock(self.phase) = phase;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_looks_does_not_wait_for_who_takes_a_step() {
        let turns = Turns::default();
        let mut turn = turns.wait();
        assert_eq!(turns.phase(), Phase::Settled);
        let held = Phase::Held { to: "b".into() };
        turn.set(held.clone());
        assert!(turns.take().is_none());
        assert_eq!((turns.phase(), turn.phase()), (held.clone(), held.clone()));
        drop(turn);
        assert_eq!(turns.take().unwrap().phase(), held);
    }

    #[test]
    fn a_step_that_panicked_leaves_the_next_one_its_turn() {
        let turns = Turns::default();
        std::thread::scope(|scope| {
            let step = scope.spawn(|| {
                let _turn = turns.wait();
                panic!("on purpose");
            });
            assert!(step.join().is_err());
        });
        assert!(turns.take().is_some());
    }
}
