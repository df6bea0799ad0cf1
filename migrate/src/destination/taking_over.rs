//! The guest is whole here: restored, compared, committed and let run. Or nothing of it stays.

use std::time::Instant;

use super::{LOOK, Last, PATIENCE, Receiving, lock, named, tell, unexpected};
use crate::error::{Error, Result, chain};
use crate::handover::journal::{Outcome, Phase};
use crate::hold::hold;
use crate::report::rounded;
use crate::wire::{Part, Readiness, Text, ToDestination, ToSource};

impl Receiving {
    pub(super) fn restore(&mut self, last: Last) -> Result<()> {
        self.phase("restoring");
        let started = Instant::now();
        self.guest.complete(last.state)?;
        let digest = lock(&self.image)?.table().digest(&self.digester);
        if digest != last.digest {
            return Err(Error::Verify("What arrived is not what was sent".into()));
        }
        let mut parts = vec![("digest".to_owned(), rounded(started.elapsed()))];
        hold("restoring");
        loop {
            if let Some(restored) = self.guest.completed()? {
                parts.extend(restored);
                break;
            }
            if let Some(received) = self.peer.receive_for(LOOK)? {
                return Err(unexpected(
                    &self.peer,
                    &ToDestination::decode(received.frame())?,
                ));
            }
        }
        if self.offer.verify {
            let verifying = Instant::now();
            self.guest.verify()?;
            parts.push(("verify".into(), rounded(verifying.elapsed())));
        }
        self.wait_for_lead();
        hold("restored");
        self.journal.reach(Phase::Ready)?;
        let parts = parts
            .into_iter()
            .map(|(name, seconds)| Part {
                name: Text::new(&name),
                seconds,
            })
            .collect();
        self.peer.send(&ToSource::Ready(Readiness {
            digest,
            parts,
            memory: self.memory,
        }))
    }

    pub(super) fn wait_for_commit(&mut self) -> Result<()> {
        self.phase("waiting for the commit");
        hold("ready");
        let received = self.peer.receive(Instant::now() + PATIENCE)?;
        match ToDestination::decode(received.frame())? {
            ToDestination::Commit => Ok(()),
            other => Err(unexpected(&self.peer, &other)),
        }
    }

    pub(super) fn take_over(&mut self) -> Result<()> {
        hold("commit-received");
        if !self.control.commit() {
            return Err(Error::Cancelled);
        }
        self.phase("taking over");
        self.peer.ignore_cancel();
        self.guest.confirm()?;
        // From here on the guest is ours, whatever happens to us or to the link.
        self.owning = true;
        self.journal.reach(Phase::Owner)?;
        hold("owner");
        self.guest.take_over()?;
        hold("unpaused");
        // A source that can't be told asks.
        if let Err(error) = self.peer.send(&ToSource::Running) {
            log::warn!("{}", chain(&error));
        }
        self.journal.reach(Phase::Running)?;
        self.guest.find_devices();
        hold("running");
        (self.keep)()?;
        let image = lock(&self.image)?;
        // Where the guest came from it has left just this. That costs bytes on its way back, no
        // more.
        let kept = self.shadows.remember(
            named(&self.offer, &self.peer),
            &self.offer.digest_key,
            image.table(),
        );
        if let Err(error) = kept {
            log::warn!("{}", chain(&error));
        }
        image.remove()?;
        drop(image);
        self.journal.end(Outcome::Moved)
    }

    /// What arrived of a move that broke: the next attempt goes on from there.
    fn keep_shadow(&mut self, error: &Error) {
        // What was found wrong is not built upon. And what is a shadow already stays one, also where
        // the source could not be told.
        if self.shelved
            || matches!(
                error,
                Error::Verify(_) | Error::Protocol { .. } | Error::Wire(_)
            )
        {
            return;
        }
        let (named, key) = (named(&self.offer, &self.peer), &self.offer.digest_key);
        let kept = lock(&self.image).and_then(|image| self.shadows.keep_image(named, key, &image));
        match kept {
            Ok(true) => log::info!("What arrived of {} is kept as a shadow", self.offer.name),
            Ok(false) => log::info!("What arrived of {} is not kept", self.offer.name),
            Err(error) => log::warn!("{}", chain(&error)),
        }
    }

    /// Before the commit: no domain of the guest stays here, and of its memory what is kept as a
    /// shadow.
    pub(super) fn discard(&mut self, error: &Error) {
        tell(&mut self.peer, error, ToSource::Failed);
        let removed = self.guest.discard().and_then(|()| {
            self.keep_shadow(error);
            lock(&self.image)?.remove()
        });
        match removed {
            Ok(()) => {
                if let Err(error) = self.journal.end(Outcome::Aborted) {
                    log::error!("{}", chain(&error));
                }
            }
            // The journal stays open: the guardian tries again.
            Err(error) => log::error!("{}", chain(&error)),
        }
    }
}
