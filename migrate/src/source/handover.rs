//! The handover: suspend, last round, proof, ready, commit.

use std::time::{Duration, Instant};

use super::{Committed, Copied, READ_BATCH, Session, Suspended};
use crate::error::{Error, Result};
use crate::guest::{Batch, Dirty, Moment};
use crate::handover::journal::Phase;
use crate::hold::hold;
use crate::pages::PageSet;
use crate::wire::{Part, ToDestination, ToSource};

/// How long a destination may take to let a guest run.
const RUNNING: Duration = Duration::from_secs(60);

impl Session<'_> {
    pub(super) fn suspend(&mut self, _copied: &Copied) -> Result<Suspended> {
        (self.go.unchanged)()?;
        self.phase("suspending");
        hold("suspending");
        self.check_interrupted()?;
        // What had to be done before may have taken its time.
        self.refuse_to_be_late()?;
        self.go.journal.reach(Phase::Suspending)?;
        self.let_suspend();
        let started = Instant::now();
        self.suspend_started = Some(started);
        self.go.guest.suspend()?;
        self.go.connections.suspended();
        self.part("suspend", started.elapsed());
        self.note_slowed_down();
        self.phase("sending the rest");
        let silent = started + self.silent();
        let end = self.go.out_of_time().map_or(silent, |end| end.min(silent));
        self.go.peer.set_deadline(Some(end));
        if let Some(flows) = self.go.connections.outgoing() {
            self.go.peer.send(&ToDestination::Outgoing(flows))?;
        }
        hold("suspended");
        let last = Instant::now();
        let mut written = PageSet::new(self.held.table().pages());
        self.go.guest.next_dirty(&mut written, Moment::Last)?;
        self.backlog.changed(&written);
        self.backlog.begin_last();
        let number = self.report.rounds.len() as u32 + 1;
        let read_last = self.backlog.this_round().clone();
        let round = self.round(number, Moment::Last, last)?;
        self.report.rounds.push(round);
        self.part("last delta", last.elapsed());
        let state = Instant::now();
        let guest_state = self.go.guest.final_state()?;
        self.go
            .peer
            .send(&ToDestination::State(Box::new(guest_state)))?;
        let digest = self.held.digest();
        self.go.peer.send(&ToDestination::Final(digest))?;
        self.part("state", state.elapsed());
        if self.go.plan.verify {
            let verify = Instant::now();
            self.verify(&read_last)?;
            self.part("verify at the source", verify.elapsed());
        }
        Ok(Suspended { digest })
    }

    /// Reads all memory again: what differs and was not read since the suspend is a change that
    /// nobody told us of.
    fn verify(&mut self, read_last: &PageSet) -> Result<()> {
        let pages = self.held.table().pages();
        let mut batch = Batch::default();
        let mut deferred = PageSet::new(pages);
        let mut everything = PageSet::full(pages);
        let mut pfns = Vec::with_capacity(READ_BATCH);
        let mut cursor = 0;
        let mut missed: Vec<u64> = Vec::new();
        while everything.take_batch(&mut cursor, READ_BATCH, &mut pfns) > 0 {
            self.check_interrupted()?;
            batch.clear();
            self.go.guest.read(
                &pfns,
                self.held.table(),
                Moment::Last,
                &mut batch,
                &mut deferred,
            )?;
            pfns.clear();
            // A page that was read since the suspend is right as it was read.
            missed.extend(
                batch
                    .entries
                    .iter()
                    .map(|entry| entry.pfn)
                    .filter(|pfn| !read_last.contains(*pfn)),
            );
        }
        // dom0 goes on filling the buffers that the guest has posted for its network: what it
        // copied there since the suspend was logged, and is no change of the guest's.
        let mut since = PageSet::new(pages);
        let named = self.go.guest.next_dirty(&mut since, Moment::Live)?;
        if named == Dirty::Everything && !self.scans() {
            let what = "What was logged meanwhile is not known; try again";
            return Err(Error::Verify(what.into()));
        }
        missed.retain(|pfn| !since.contains(*pfn));
        if missed.is_empty() {
            self.report.verified = true;
            return Ok(());
        }
        let shown: Vec<String> = missed
            .iter()
            .take(8)
            .map(|pfn| format!("{pfn:#x}"))
            .collect();
        Err(Error::Verify(format!(
            "{} pages changed unseen, {} among them",
            missed.len(),
            shown.join(", ")
        )))
    }

    pub(super) fn hand_over(&mut self, suspended: &Suspended) -> Result<Committed> {
        self.phase("waiting for the destination");
        hold("final-sent");
        let waited = Instant::now();
        // While the destination restores: a guest that is to go on there has its last words on its
        // disks, and its configuration is still that which went.
        (self.go.unchanged)()?;
        // It may take until the deadline, which is no lost link.
        match self.receive(self.silent())? {
            ToSource::Ready(ready) => {
                if ready.digest != suspended.digest {
                    return Err(Error::Verify("What arrived is not what was sent".into()));
                }
                self.report.memory.destination_bytes = ready.memory;
                // What arrived was sent.
                if let Some((before, end)) = self.last_round.take()
                    && let (Ok(end), Some(round)) = (end.try_recv(), self.report.rounds.last_mut())
                {
                    round.wire_bytes = (end + self.go.peer.bytes_beside()).saturating_sub(before);
                }
                // No pages follow. What becomes of these connections is of no matter any more.
                self.go.peer.end_spreading();
                for part in ready.parts.into_iter().filter(Part::can_be) {
                    let name = format!("destination: {}", part.name);
                    self.report.downtime.parts.insert(name, part.seconds);
                }
            }
            other => return Err(self.unexpected(&other)),
        }
        self.part("wait for ready", waited.elapsed());
        self.phase("handing over");
        hold("ready");
        let confirming = Instant::now();
        // Waiting may have taken minutes.
        self.go.guest.confirm()?;
        // From here on only the destination's word lets the guest run here again.
        if !self.go.control.commit() {
            return Err(Error::Cancelled);
        }
        self.go.peer.ignore_cancel();
        self.go.peer.set_deadline(None);
        self.go.journal.reach(Phase::Committed)?;
        self.part("confirm", confirming.elapsed());
        hold("committed");
        Ok(Committed)
    }

    pub(super) fn finish(&mut self, _committed: &Committed) -> Result<()> {
        let commit = Instant::now();
        self.go.peer.send(&ToDestination::Commit)?;
        match self.receive(RUNNING)? {
            ToSource::Running => {}
            other => return Err(self.unexpected(&other)),
        }
        self.part("commit and unpause", commit.elapsed());
        if let Some(started) = self.suspend_started {
            self.report.downtime.total = started.elapsed();
        }
        self.watch.lap("handover");
        self.lead_connections();
        hold("acknowledged");
        self.clean_up_after_move();
        self.watch.lap("clean up");
        Ok(())
    }
}
