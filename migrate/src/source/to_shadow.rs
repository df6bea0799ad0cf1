//! Sending a guest's pages for a shadow: a move of one round, after which the guest stays.

use std::time::Instant;

use super::{HANDLING, Session};
use crate::error::{Result, chain};
use crate::guest::Moment;
use crate::handover::journal::{Outcome, Phase};
use crate::shadow::Named;
use crate::wire::{Offer, ToDestination, ToSource};

impl Session<'_> {
    pub(super) fn copy_to_shadow(&mut self, offer: Offer) -> Result<()> {
        let greeted = self.greet()?;
        let _offered = self.offer(greeted, offer)?;
        self.go.journal.reach(Phase::Tracking)?;
        self.report.tracker = Some(self.go.guest.begin()?);
        self.phase("copying");
        self.begin_copying()?;
        let started = Instant::now();
        self.backlog.begin_round(false);
        let round = self.round(1, Moment::Live, started)?;
        self.report.rounds.push(round);
        self.watch.lap("copy");
        self.go.peer.send(&ToDestination::Keep)?;
        match self.receive(HANDLING)? {
            ToSource::Kept => self.go.peer.end_spreading(),
            other => return Err(self.unexpected(&other)),
        }
        // What the destination has now is known here: the next time it needs no inventory.
        let named = Named {
            uuid: &self.report.uuid,
            name: &self.report.domain,
            peer: self.go.peer.peer(),
        };
        let shadows = self.go.shadows;
        if let Err(error) = shadows.remember(named, &self.key, self.held.table()) {
            log::warn!("{}", chain(&error));
        }
        self.go.guest.end_tracking()?;
        self.go.peer.close();
        self.end_journal(Outcome::Aborted);
        self.watch.lap("keep");
        Ok(())
    }
}
