//! What follows a move, and what follows one that failed: the guest runs at one site, and
//! nothing else of it is left running anywhere.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::{Move, READ_BATCH, Session};
use crate::error::{Error, Result, chain};
use crate::guest::{Batch, Found, Moment, PageTable};
use crate::handover::going_on::go_on;
use crate::handover::journal::{Outcome, Phase};
use crate::handover::recovery::Owner;
use crate::pages::{PageSet, Pfn};
use crate::report::Progress;
use crate::shadow::Named;
use crate::wire::{Text, ToDestination};

/// How long it may take to tell the destination that it is over.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// How long a source goes on asking what became of a commit without an answer.
const ASKING: Duration = Duration::from_secs(60);

impl Session<'_> {
    /// The guest runs at the destination: its connections go on there.
    pub(super) fn lead_connections(&mut self) {
        match self.go.connections.moved() {
            None => {}
            Some(Ok(kept)) => self.report.connections = Some(kept),
            Some(Err(error)) => self.go.observer.notice(Progress::Warning(format!(
                "The guest has moved, but its connections may not have: {}",
                chain(&error)
            ))),
        }
    }

    /// The guest runs at the destination: nothing that fails here changes that.
    pub(super) fn clean_up_after_move(&mut self) {
        self.phase("cleaning up");
        // libxl forks for its scripts, and each page that is freed after it costs a page fault.
        self.held.forget_contents();
        if let Err(error) = self.go.guest.end_tracking() {
            log::warn!("{}", chain(&error));
        }
        if let Err(error) = self.leave_shadow() {
            log::warn!("No shadow is kept here: {}", chain(&error));
        }
        // Since the commit another tool may have let it go on: what it did then is nowhere else.
        let guest = &mut self.go.guest;
        match guest.confirm().and_then(|()| guest.destroy()) {
            Ok(()) => self.end_journal(Outcome::Moved),
            // The journal stays: `resolve` destroys it later, or says why it does not.
            Err(error) => self.go.observer.notice(Progress::Warning(format!(
                "The guest has moved, but its old domain is still here: {}; run: vmshadow resolve {}",
                chain(&error),
                self.report.domain
            ))),
        }
        self.go.peer.close();
    }

    /// Keeps the memory of the guest that is suspended here and runs at the destination, so that
    /// the way back is short.
    fn leave_shadow(&mut self) -> Result<()> {
        let table = self.held.table();
        let named = Named {
            uuid: &self.report.uuid,
            name: &self.report.domain,
            peer: self.go.peer.peer(),
        };
        let Some(shadow) = self.go.shadows.leave(named, &self.key, table)? else {
            return Ok(());
        };
        log::debug!("keeping a shadow");
        let zeros = self.go.digester.zeros();
        let mut left = PageSet::new(table.pages());
        for pfn in 0..table.pages() {
            if table.get(pfn).is_some_and(|state| {
                state.page_type.has_data() && state.digest != zeros.of(state.page_type)
            }) {
                left.insert(pfn);
            }
        }
        // Against nothing, so that each page is copied.
        let nothing = PageTable::new(0);
        let (mut batch, mut deferred) = (Batch::default(), PageSet::new(table.pages()));
        let mut pfns = Vec::with_capacity(READ_BATCH);
        let mut cursor = 0;
        while left.take_batch(&mut cursor, READ_BATCH, &mut pfns) > 0 {
            batch.clear();
            let guest = &mut self.go.guest;
            guest.read(&pfns, &nothing, Moment::Last, &mut batch, &mut deferred)?;
            pfns.clear();
            // dom0 may have written to a page since it crossed: then it is none of the shadow's.
            let kept = batch.entries.iter().filter_map(|entry| {
                let same = table.get(entry.pfn) == Some(entry.state);
                match entry.content {
                    Found::Slot(slot) if same => Some((entry.pfn, slot)),
                    _ => None,
                }
            });
            for (first, slots) in stretches(kept) {
                if let Some(contents) = batch.contents(slots) {
                    shadow.write(first, contents)?;
                }
            }
        }
        shadow.finish(table)?;
        self.watch.lap("keep a shadow");
        Ok(())
    }

    /// Before the commit: the guest goes on here.
    pub(super) fn give_up(&mut self, error: Error) -> Result<()> {
        let error = match error {
            // Both limits are the conversation's one deadline.
            Error::Stalled { .. } if self.is_out_of_time() => self.timed_out(),
            other => other,
        };
        self.phase("giving up");
        let mut safe = true;
        let mut note = |step: Result<()>| {
            if let Err(error) = step {
                safe = false;
                log::error!("{}", chain(&error));
            }
        };
        // First what the guest waits for: with its processor time, a suspend that is late ends soon.
        note(self.speed_up());
        if self.go.journal.entry().phase >= Phase::Suspending {
            note(self.go_on());
        }
        self.go.connections.stayed();
        note(self.go.guest.end_tracking());
        self.go.peer.ignore_cancel();
        // A peer that does not read must not keep this one here.
        self.go.peer.set_deadline(Some(Instant::now() + LAST_WORDS));
        self.go.peer.end_spreading();
        // A peer that is gone finds out by itself.
        let _ = self
            .go
            .peer
            .send(&ToDestination::Abort(Text::new(&chain(&error))));
        self.go.peer.close();
        if !safe {
            return Err(Error::Unsettled(Box::new(error)));
        }
        self.end_journal(Outcome::Aborted);
        Err(error)
    }

    /// Lets the guest run here again.
    fn go_on(&mut self) -> Result<()> {
        let Move {
            guest,
            journal,
            keep,
            ..
        } = &mut self.go;
        let ended = guest.end_suspend()?;
        let record = || journal.reach(Phase::Resuming);
        go_on(ended, record, keep, || guest.resume())
    }

    /// Commit was recorded and no answer came: only the destination knows.
    pub(super) fn resolve_doubt(&mut self, error: Error) -> Result<()> {
        self.phase("asking the destination");
        log::warn!("{}", chain(&error));
        self.go.peer.close();
        let started = Instant::now();
        loop {
            match (self.go.ask)(self.go.journal.entry()) {
                Ok(Owner::Destination) => {
                    self.lead_connections();
                    self.clean_up_after_move();
                    return Ok(());
                }
                Ok(Owner::Source) => {
                    return self.give_up(error);
                }
                Ok(Owner::Unknown) => break,
                Err(error) if started.elapsed() < ASKING => {
                    log::warn!("{}", chain(&error));
                    std::thread::sleep(Duration::from_secs(2));
                }
                Err(error) => {
                    log::warn!("{}", chain(&error));
                    break;
                }
            }
        }
        Err(Error::InDoubt {
            peer: self.go.peer.peer().to_owned(),
        })
    }
}

/// Pages that follow one another and are in slots that do, together: the first of each stretch, and
/// the slots.
fn stretches(pages: impl Iterator<Item = (Pfn, usize)>) -> Vec<(Pfn, Range<usize>)> {
    let mut stretches: Vec<(Pfn, Range<usize>)> = Vec::new();
    for (pfn, slot) in pages {
        match stretches.last_mut() {
            Some((first, slots)) if slots.end == slot && *first + slots.len() as u64 == pfn => {
                slots.end += 1;
            }
            _ => stretches.push((pfn, slot..slot + 1)),
        }
    }
    stretches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_written_together() {
        let pages = [(3, 0), (4, 1), (5, 2), (7, 3), (8, 5), (9, 6)];
        let expected = [(3, 0..3), (7, 3..4), (8, 5..7)];
        assert_eq!(stretches(pages.into_iter()), expected);
        assert_eq!(stretches([].into_iter()), []);
    }
}
