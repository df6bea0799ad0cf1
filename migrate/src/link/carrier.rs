//! What carrying bytes takes of this host's processors.
//!
//! ```text
//!   writer thread --> pipe --> ssh: encrypts --> TCP
//!         |                     |
//!       Worked               Carrier             clocks of their CPU time
//! ```
//!
//! Where a host has few processors, what sending a byte takes decides how much compressing it pays.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;

/// Who carries what is written to a link, beside the thread that writes.
#[derive(Debug, Clone, Default)]
pub struct Carrier(Arc<OnceLock<By>>);

#[derive(Debug)]
enum By {
    /// The kernel, in the time of whoever writes.
    Kernel,
    Process(ClockId),
}

impl Carrier {
    /// The kernel does, and no other process.
    #[must_use]
    pub fn kernel() -> Self {
        Carrier(Arc::new(By::Kernel.into()))
    }

    /// That process does, as was found out. What was known before stays.
    pub(super) fn found(&self, process: u32) {
        let clock = i32::try_from(process)
            .ok()
            .and_then(|id| clock_getcpuclockid(Pid::from_raw(id)).ok());
        if let Some(clock) = clock {
            self.0.get_or_init(|| By::Process(clock));
        }
    }

    /// The CPU time that it took so far. None as long as nobody knows who it is, and once it has
    /// ended.
    pub(super) fn cpu(&self) -> Option<Duration> {
        match self.0.get()? {
            By::Kernel => Some(Duration::ZERO),
            By::Process(clock) => clock.now().ok().map(Duration::from),
        }
    }
}

/// The CPU time of the thread that writes, for another thread to read.
#[derive(Debug, Clone, Default)]
pub(super) struct Worked(Arc<AtomicU64>);

impl Worked {
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
    use std::process::{Command, Stdio};

    #[test]
    fn what_a_process_works_counts_until_it_has_ended() {
        let mut child = Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let carrier = Carrier::default();
        let shared = carrier.clone();
        assert_eq!(carrier.cpu(), None);
        shared.found(child.id());
        let before = carrier.cpu().unwrap();
        while carrier.cpu().unwrap() < before + Duration::from_millis(20) {
            std::thread::yield_now();
        }
        // Who was found is who it is.
        carrier.found(std::process::id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(carrier.cpu(), None);
    }

    #[test]
    fn the_kernel_works_in_the_writers_time() {
        assert_eq!(Carrier::kernel().cpu(), Some(Duration::ZERO));
        let worked = Worked::default();
        worked.note();
        let before = worked.total();
        while worked.total() < before + Duration::from_millis(1) {
            worked.note();
        }
    }
}
