//! A guest that runs, in its way: its history goes on.

use std::time::{Duration, Instant};

use super::history::{Clock, History};
use super::memory::{Change, Memory, Write};
use crate::guest::{Facts, Kind};
use crate::pages::PageSet;

/// The UUID of every guest that is replayed: a site has one at most.
pub(super) const UUID: &str = "5eed5eed-0000-4000-8000-000000000001";

/// A guest in this process.
#[derive(Debug)]
pub struct Guest {
    /// What is fixed.
    pub facts: Facts,
    memory: Memory,
    history: History,
    clock: Clock,
    /// How long it has run of its history, at the speed that its cap leaves it.
    ran: Duration,
    seen: Instant,
    /// The most processor time that it may use, in percent of its only CPU; zero: all.
    cap: u32,
    /// Of a step that it makes at a call, what its cap has left it so far, in percent.
    part: u32,
    suspended: bool,
    /// Pages that were written since they were last asked for, while they are logged.
    log: Option<PageSet>,
    /// Another tool has had some of them.
    log_was_taken: bool,
    /// Pages that can't be read while it runs.
    unsettled: PageSet,
}

impl Guest {
    /// A guest of that name and memory that does nothing.
    #[must_use]
    pub fn idle(name: &str, memory: Memory) -> Self {
        Guest {
            facts: Facts {
                name: name.to_owned(),
                uuid: UUID.into(),
                kind: Kind::Pv,
                pages: memory.pages(),
                vcpus: 1,
            },
            unsettled: PageSet::new(memory.pages()),
            memory,
            history: History::default(),
            clock: Clock::Calls,
            ran: Duration::ZERO,
            seen: Instant::now(),
            cap: 0,
            part: 0,
            suspended: false,
            log: None,
            log_was_taken: false,
        }
    }

    /// From now on it does this.
    pub fn live(&mut self, history: History, clock: Clock) {
        self.history = history;
        self.clock = clock;
        self.ran = Duration::ZERO;
        self.seen = Instant::now();
    }

    /// The most processor time that it may use, in percent of one CPU; zero: as much as it likes.
    #[must_use]
    pub fn cpu_cap(&self) -> u32 {
        self.cap
    }

    /// Sets what [`Guest::cpu_cap`] returns.
    pub fn set_cpu_cap(&mut self, percent: u32) {
        self.go_on();
        self.cap = percent;
    }

    /// Its speed, in percent.
    fn speed(&self) -> u32 {
        match self.cap {
            0 => 100,
            cap => cap.min(100),
        }
    }

    /// Its memory as it is now.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Whether it runs.
    #[must_use]
    pub fn runs(&self) -> bool {
        !self.suspended
    }

    /// Time goes on.
    pub(super) fn go_on(&mut self) {
        let now = Instant::now();
        let passed = now - std::mem::replace(&mut self.seen, now);
        if self.suspended {
            return;
        }
        let until = match self.clock {
            Clock::Calls => {
                self.part += self.speed();
                if self.part < 100 {
                    return;
                }
                self.part -= 100;
                Duration::MAX
            }
            Clock::Time => {
                self.ran += passed * self.speed() / 100;
                self.ran
            }
        };
        while self
            .history
            .steps
            .front()
            .is_some_and(|step| step.at <= until)
        {
            let step = self.history.steps.pop_front().unwrap_or_default();
            self.write(&step.writes);
            if self.clock == Clock::Calls {
                break;
            }
        }
    }

    fn write(&mut self, writes: &[Write]) {
        for write in writes {
            match write.change {
                Change::Unsettled if write.pfn < self.memory.pages() => {
                    self.unsettled.insert(write.pfn);
                }
                Change::Settled => {
                    self.unsettled.remove(write.pfn);
                }
                _ => {
                    if self.memory.apply(write)
                        && let Some(log) = &mut self.log
                    {
                        log.insert(write.pfn);
                    }
                }
            }
        }
    }

    /// Begins to log what is written.
    pub(super) fn begin_log(&mut self) {
        self.log = Some(PageSet::new(self.memory.pages()));
    }

    /// Moves what was logged into `dirty`. False: there was more, which another tool has.
    pub(super) fn take_log(&mut self, dirty: &mut PageSet) -> bool {
        if let Some(log) = &mut self.log {
            dirty.union_with(log);
            *log = PageSet::new(self.memory.pages());
        }
        !std::mem::take(&mut self.log_was_taken)
    }

    /// Has another tool read the log: of what is in it whoever moves the guest learns only that
    /// there was something.
    pub fn lose_log(&mut self) {
        if self.is_logged() {
            self.begin_log();
            self.log_was_taken = true;
        }
    }

    pub(super) fn end_log(&mut self) {
        self.log = None;
    }

    /// Whether its pages are logged.
    #[must_use]
    pub fn is_logged(&self) -> bool {
        self.log.is_some()
    }

    /// Whether a page can be read now.
    pub(super) fn can_be_read(&self, pfn: u64) -> bool {
        self.suspended || !self.unsettled.contains(pfn)
    }

    pub(super) fn suspend(&mut self) {
        let last = std::mem::take(&mut self.history.at_suspend);
        self.write(&last);
        // For the next time.
        self.history.at_suspend = last;
        self.suspended = true;
    }

    /// Lets it go on: the site's doing, or that of another tool.
    pub fn resume(&mut self) {
        self.seen = Instant::now();
        self.suspended = false;
    }
}
