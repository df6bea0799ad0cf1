//! Rounds of pages: into the image, and from there into the restore.

use std::time::Instant;

use super::answering::{send_inventory, share};
use super::{LOOK, Last, PATIENCE, Receiving, lock, named, unexpected};
use crate::error::{Error, Result, chain};
use crate::handover::journal::Outcome;
use crate::hold::hold;
use crate::report::{Progress, own_memory};
use crate::rounds::Outlook;
use crate::wire::{Purpose, ToDestination, ToSource};

impl Receiving {
    /// The pages that came are kept as a shadow.
    pub(super) fn shelve(&mut self) -> Result<()> {
        let (named, key) = (named(&self.offer, &self.peer), &self.offer.digest_key);
        let image = lock(&self.image)?;
        if !self.shadows.keep_image(named, key, &image)? {
            return Err(Error::Refused("There is no room for the shadow".into()));
        }
        drop(image);
        self.shelved = true;
        // The guest stays where it is.
        self.journal.end(Outcome::Aborted)?;
        // A source that hears nothing takes it for lost. Next time it finds it here.
        if let Err(error) = self.peer.send(&ToSource::Kept) {
            log::warn!("{}", chain(&error));
        }
        Ok(())
    }

    /// Receives rounds up to the last one, or up to the word that what came is to be kept.
    pub(super) fn receive_pages(&mut self) -> Result<Option<Last>> {
        let mut state = None;
        let mut pages_here = 0;
        let mut number = 1;
        let mut catching_up = false;
        loop {
            if catching_up && self.guest.behind()? == 0 {
                catching_up = false;
                self.peer.send(&ToSource::CaughtUp)?;
            }
            let received = match catching_up {
                true => self.peer.receive_for(LOOK)?,
                false => Some(self.peer.receive(Instant::now() + PATIENCE)?),
            };
            let Some(received) = received else {
                continue;
            };
            match (ToDestination::decode(received.frame())?, &state) {
                (ToDestination::Ping(token), _) => self.peer.send(&ToSource::Pong(token))?,
                (ToDestination::Pong(_), _) => {}
                (ToDestination::Recall { known: true }, None) => {}
                (ToDestination::Recall { known: false }, None) => {
                    let image = lock(&self.image)?;
                    send_inventory(&mut self.peer, image.table(), &self.digester)?;
                }
                (ToDestination::Prove(proof), None) => {
                    let sharing = self.sharing.take();
                    let (shadows, offer) = (&self.shadows, &self.offer);
                    self.library = share(&mut self.peer, sharing, &proof, shadows, offer)?;
                }
                (
                    ToDestination::P2mFrames {
                        max_pfn,
                        populated,
                        frames,
                    },
                    None,
                ) => {
                    if max_pfn + 1 != self.offer.pages {
                        return Err(self.protocol("a p2m of another size than was offered"));
                    }
                    if self.guest.begin_round(&frames, populated)? {
                        log::info!("The guest has grown: starting over from what is here");
                    }
                }
                (ToDestination::Pages(batch), None) => {
                    if pages_here == 0 {
                        hold("receiving");
                    }
                    pages_here += self.store(batch)?;
                    self.received(number, pages_here);
                }
                (ToDestination::RoundEnd { round, last, .. }, None) => {
                    self.memory = self.memory.max(own_memory());
                    let vanished = std::mem::take(&mut self.vanished);
                    if self.guest.end_round(vanished)? {
                        log::info!("Pages of the guest went: starting over from what is here");
                    }
                    if !last {
                        self.peer.send(&ToSource::RoundAck {
                            round,
                            pages: pages_here,
                            behind: self.guest.behind()?,
                        })?;
                    }
                    pages_here = 0;
                    number = round.saturating_add(1);
                }
                (ToDestination::Outgoing(flows), None) if self.leading.is_none() => {
                    // A site that leads none leaves them to end.
                    self.leading = self.lead.as_mut().map(|lead| lead(flows));
                }
                (ToDestination::CatchUp, None) => catching_up = true,
                (ToDestination::State(given), None) => state = Some(*given),
                (ToDestination::Final(digest), Some(_)) => {
                    let state = state.ok_or_else(|| self.protocol("no state of the guest"))?;
                    return Ok(Some(Last { state, digest }));
                }
                (ToDestination::Keep, None) if self.offer.purpose == Purpose::Shadow => {
                    return Ok(None);
                }
                (other, _) => return Err(unexpected(&self.peer, &other)),
            }
        }
    }

    /// Shows how far it is.
    fn received(&mut self, round: u32, pages: u64) {
        let (_, wire_bytes) = self.peer.bytes();
        self.meter.note(Instant::now(), wire_bytes);
        self.control.note(&Progress::Pages {
            round,
            done: pages,
            total: pages,
            wire_bytes,
            outlook: Outlook {
                rate: self.meter.rate(),
                ..Outlook::default()
            },
        });
    }

    /// Puts a batch into the image; how many pages it had.
    fn store(&mut self, batch: &[u8]) -> Result<u64> {
        let broken = |what: String| Error::Protocol {
            peer: self.peer.peer().to_owned(),
            what,
        };
        let batch = self
            .decoder
            .decode(batch, self.offer.pages)
            .map_err(|error| broken(error.to_string()))?;
        // Only this thread stores: what is held stays so until it does. The feeder reads meanwhile.
        let image = lock(&self.image)?;
        let resolved = self
            .arrival
            .resolve(
                batch,
                |pfn| image.held(pfn),
                |place, witness, page| {
                    let library = self.library.as_ref();
                    library.is_some_and(|library| library.read(place, witness, page))
                },
            )
            .map_err(|error| broken(error.to_string()))?;
        drop(image);
        let arrived = resolved.digest(&self.digester);
        let mut image = lock(&self.image)?;
        let mut changed = Vec::with_capacity(arrived.len());
        for page in &arrived {
            if page.state.page_type.has_data() {
                changed.push(page.pfn);
            } else {
                let before = image.table().get(page.pfn);
                self.vanished |= before.is_some_and(|before| before.page_type.has_data());
            }
        }
        image.store(&arrived)?;
        drop(image);
        self.guest.changed(&changed)?;
        Ok(arrived.len() as u64)
    }

    fn protocol(&self, what: &str) -> Error {
        Error::Protocol {
            peer: self.peer.peer().to_owned(),
            what: what.to_owned(),
        }
    }
}
