//! What sending bytes takes of this host's processors.
//!
//! ```text
//!   writer thread --> socket: the kernel works in the writer's time       Carrier::Writer
//!   writer thread --> pipe --> ssh --> TCP, interrupts, other threads     Carrier::Others
//! ```
//!
//! Where a host has few processors, what sending a byte takes decides how much compressing it pays.
//! Of what ssh sends a good part is done by nobody's time in particular: there only what all
//! processors did tells.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::time::ClockId;

/// In whose time what is written to a link is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// In that of the thread that writes.
    Writer,
    /// In that of others too.
    Others,
}

/// The CPU time of the thread that writes, for another thread to read.
#[derive(Debug, Clone, Default)]
pub(super) struct Worked(Arc<AtomicU64>);

impl Worked {
    /// None where it is not all.
    pub(super) fn of(carrier: Carrier) -> Option<Self> {
        (carrier == Carrier::Writer).then(Self::default)
    }

    /// Notes what the calling thread took so far.
    pub(super) fn note(&self) {
        if let Ok(cpu) = ClockId::CLOCK_THREAD_CPUTIME_ID.now() {
            let nanoseconds = Duration::from(cpu).as_nanos() as u64;
            self.0.store(nanoseconds, Ordering::Relaxed);
        }
    }

    pub(super) fn total(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_writer_works_is_noted() {
        let worked = Worked::default();
        worked.note();
        let before = worked.total();
        while worked.total() < before + Duration::from_millis(1) {
            worked.note();
        }
    }
}
