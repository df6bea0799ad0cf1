//! Slowing the guest down while it is copied, where the operator allows it.
//!
//! The cap that it had is in the journal before it is touched: whoever ends the move gives it back.

use std::thread;
use std::time::{Duration, Instant};

use super::Session;
use crate::error::{Result, chain};
use crate::pages::PageSet;
use crate::report::{Progress, SlowedDown, rounded};
use crate::rounds::{Share, throttle};

/// A guest that has just been slowed down is looked at for no less than this,
const SHORTEST_LOOK: Duration = Duration::from_millis(100);

/// and for no more.
const LONGEST_LOOK: Duration = Duration::from_millis(500);

/// How often a cancel is looked for meanwhile.
const TICK: Duration = Duration::from_millis(50);

/// A guest that is slowed down.
pub(super) struct Slowed {
    /// The cap that it had, in percent of one CPU; zero for none.
    cap: u32,
    share: Share,
    since: Instant,
}

impl Session<'_> {
    /// What the guest has of its processor time.
    pub(super) fn share(&self) -> Share {
        self.slowed
            .as_ref()
            .map_or(Share::WHOLE, |slowed| slowed.share)
    }

    /// Leaves the guest `share` of its processor time. False: it can't be, and will not be tried
    /// again.
    ///
    /// # Errors
    /// Where the journal can't be written.
    pub(super) fn slow_down(&mut self, share: Share) -> Result<bool> {
        let cap = match &self.slowed {
            Some(slowed) => Ok(Some(slowed.cap)),
            None => self.go.guest.cpu_cap(),
        };
        let why = match cap {
            Ok(Some(cap)) => {
                self.go.journal.slowing(cap)?;
                let (vcpus, since) = (self.go.guest.facts().vcpus, Instant::now());
                match self.go.guest.set_cpu_cap(share.of(cap, vcpus)) {
                    Ok(()) => {
                        let since = self.slowed.as_ref().map_or(since, |slowed| slowed.since);
                        self.slowed = Some(Slowed { cap, share, since });
                        self.backlog.slowed_down();
                        self.tell(format!(
                            "The guest is slowed down to {share} of its processor time"
                        ));
                        return Ok(true);
                    }
                    Err(error) => chain(&error),
                }
            }
            Ok(None) => "this host's scheduler can't".to_owned(),
            Err(error) => chain(&error),
        };
        self.no_slower = true;
        self.tell(format!("The guest is not slowed down further: {why}"));
        Ok(false)
    }

    /// Slows the guest down until it writes few of `all` pages again while they cross, which takes
    /// `crossing`. For that it is only looked at: rounds that send nearly everything again each time
    /// would take as long, and bytes.
    ///
    /// # Errors
    /// As by a round that can't go on.
    pub(super) fn slow_down_further(&mut self, all: u64, crossing: Option<Duration>) -> Result<()> {
        let Some(crossing) = crossing else {
            return Ok(());
        };
        let over = crossing.clamp(SHORTEST_LOOK, LONGEST_LOOK);
        let times = crossing.as_secs_f64() / over.as_secs_f64();
        let least = self.limits().least_share;
        while self.share() > least {
            // What it wrote with more of its time is none of this.
            self.look()?;
            let Some(first) = self.written_in(over / 2)? else {
                break;
            };
            let Some(mut second) = self.written_in(over / 2)? else {
                break;
            };
            // Those that it writes all the time are no more when it has longer.
            second.difference_with(&first);
            let again = first.len() as f64 + second.len() as f64 * (2.0 * times - 1.0);
            let further = throttle::further(self.share(), least, all, again as u64);
            log::debug!(
                "At {} it would write {again:.0} of {all} again",
                self.share()
            );
            match further {
                Some(share) if self.slow_down(share)? => {}
                _ => break,
            }
        }
        Ok(())
    }

    /// The pages that it writes within `over`. Nothing where that is not known.
    fn written_in(&mut self, over: Duration) -> Result<Option<PageSet>> {
        let since = Instant::now();
        while since.elapsed() < over {
            self.check_interrupted()?;
            self.tend();
            thread::sleep(over.saturating_sub(since.elapsed()).min(TICK));
        }
        self.look()
    }

    /// Lets a guest that is slowed down suspend at no less than [`throttle::SUSPENDING`]. Suspending
    /// takes processor time itself, at 5 % twenty times as long: that would be silence. What the
    /// guest writes until it stands still depends on that processor time, and hardly on the cap.
    pub(super) fn let_suspend(&mut self) {
        self.cap_at(self.share().max(throttle::SUSPENDING));
    }

    /// Gives a guest that is slowed down its time for as long as nothing of it crosses, or takes it
    /// again.
    pub(super) fn let_run(&mut self, runs: bool) {
        let share = match runs {
            true => Share::WHOLE,
            false => self.share(),
        };
        self.cap_at(share);
    }

    /// Sets the cap of a guest that is slowed down. It is only a matter of speed whether that works.
    fn cap_at(&mut self, share: Share) {
        let Some(slowed) = &self.slowed else {
            return;
        };
        let cap = share.of(slowed.cap, self.go.guest.facts().vcpus);
        if let Err(error) = self.go.guest.set_cpu_cap(cap) {
            log::warn!("The guest keeps its cap: {}", chain(&error));
        }
    }

    /// Gives the guest its processor time back, where it was slowed down. Harmless where it is
    /// gone.
    ///
    /// # Errors
    /// What Xen refuses.
    pub(super) fn speed_up(&mut self) -> Result<()> {
        self.note_slowed_down();
        match self.slowed.take() {
            Some(slowed) => self.go.guest.restore_cpu_cap(slowed.cap),
            // It may have been set even where that failed.
            None => match self.go.journal.entry().cap {
                Some(cap) => self.go.guest.restore_cpu_cap(cap),
                None => Ok(()),
            },
        }
    }

    /// Puts what was done into the report: once the guest is suspended, or goes on as it was.
    pub(super) fn note_slowed_down(&mut self) {
        if let (None, Some(slowed)) = (self.report.slowed_down, &self.slowed) {
            self.report.slowed_down = Some(SlowedDown {
                share: slowed.share,
                seconds: rounded(slowed.since.elapsed()),
            });
        }
    }

    fn tell(&mut self, what: String) {
        self.go.observer.notice(Progress::Warning(what));
    }
}
