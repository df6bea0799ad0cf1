//! The counter: up by one about every 10 ms, for as long as the guest lives.

use crate::Guest;
use crate::faults::Fault;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Two copies that are a page or more apart, so that one of them shows when the
/// page of the other is lost or stale.
#[derive(Default)]
pub struct Counter {
    value: AtomicU64,
    inverse: Far,
}

/// A number far from its neighbours.
#[repr(align(8192))]
struct Far(AtomicU64);

impl Default for Far {
    fn default() -> Self {
        Self(AtomicU64::new(!0))
    }
}

impl Counter {
    /// The current value.
    pub fn value(&self) -> u64 {
        self.value.load(Ordering::SeqCst)
    }
}

/// Counts for ever, and looks after both copies and the clock.
pub fn run(guest: &Guest) {
    let mut clock = Instant::now();
    // What this thread believes: on its stack, so in a third page.
    let mut believed = 0_u64;
    loop {
        thread::sleep(Duration::from_millis(10));
        let value = guest.counter.value.load(Ordering::SeqCst);
        let inverse = guest.counter.inverse.0.load(Ordering::SeqCst);
        if value != !inverse || value != black_box(believed) {
            let words = format!("{value}, {}, {believed}", !inverse);
            guest.faults.add(Fault::Counter, &words);
        }
        // After a fault the highest goes on, so that one fault is counted once.
        believed = value.max(!inverse).max(believed) + 1;
        guest.counter.inverse.0.store(!believed, Ordering::SeqCst);
        guest.counter.value.store(believed, Ordering::SeqCst);
        let now = Instant::now();
        if now < clock {
            guest.faults.add(
                Fault::Clock,
                &format!("{:?} back", clock.duration_since(now)),
            );
        }
        clock = now;
    }
}

/// Prints the counter once a second.
pub fn print(guest: &Guest) {
    loop {
        println!("testbed: counter {}", guest.counter.value());
        thread::sleep(Duration::from_secs(1));
    }
}
