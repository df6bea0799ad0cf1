//! Counts of what must never happen.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use testbed_guest::Errors;

/// A kind of fault.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    Memory,
    Counter,
    Clock,
    Disk,
}

/// The faults so far.
#[derive(Default)]
pub struct Faults {
    memory: AtomicU64,
    counter: AtomicU64,
    clock: AtomicU64,
    disk: AtomicU64,
    first: Mutex<Option<String>>,
}

impl Faults {
    /// Counts a fault, and prints it: the console is kept when all else is lost.
    pub fn add(&self, fault: Fault, words: &str) {
        let count = match fault {
            Fault::Memory => &self.memory,
            Fault::Counter => &self.counter,
            Fault::Clock => &self.clock,
            Fault::Disk => &self.disk,
        };
        // A broken guest has many faults: print the first few only.
        if count.fetch_add(1, Ordering::Relaxed) < 10 {
            println!("testbed: FAULT {fault:?}: {words}");
        }
        if let Ok(mut first) = self.first.lock() {
            first.get_or_insert_with(|| format!("{fault:?}: {words}"));
        }
    }

    /// The counts.
    pub fn counts(&self) -> Errors {
        Errors {
            memory: self.memory.load(Ordering::Relaxed),
            counter: self.counter.load(Ordering::Relaxed),
            clock: self.clock.load(Ordering::Relaxed),
            disk: self.disk.load(Ordering::Relaxed),
            first: self.first.lock().ok().and_then(|first| first.clone()),
        }
    }
}
