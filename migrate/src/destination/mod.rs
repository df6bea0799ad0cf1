//! The side where a guest arrives.
//!
//! ```text
//! Greeted -> Accepted -> Receiving ---------> Restored -------> Owned -> done
//!    |          |        pages -> image          | ready          |
//!    |          |        image -> restore        | wait           journal: owner
//!    |          |        round end -> ack        | commit         unpause, running
//!    +----------+-----------+--------------------+
//!                           |
//!                     discard: nothing is left here
//! ```
//!
//! Where a shadow is wanted, no more than a round comes, and `keep` in the place of all that follows
//! it: the image becomes a shadow, and no domain is ever made.
//!
//! Pages never wait for the restore: they go into the image, and the restore is fed from there,
//! each page as often as it has time for. So the link is always read, and a restore that has to
//! start over starts from the image.
//!
//! `answering` says what this site has of a guest, `receiving` is all up to the last page, and
//! `taking_over` what follows, or the way back.

mod answering;
mod receiving;
mod taking_over;

use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use answering::{foretell, receive_offer};

use crate::arrival::Arrival;
use crate::codec::BatchDecoder;
use crate::connections::{Arranged, Lead};
use crate::control::Shared;
use crate::digest::{Digester, MemoryDigest};
use crate::error::{Error, Result, chain};
use crate::group::{Group, Library, Nonce};
use crate::guest::xen::stream::state::GuestState;
use crate::guest::{Destination, PageTable};
use crate::handover::journal::Journal;
use crate::hold::hold;
use crate::image::Image;
use crate::link::{Conversation, Expecting};
use crate::outgoing::random;
use crate::report::Progress;
use crate::rounds::Meter;
use crate::shadow::{Named, Shadows};
use crate::wire::{
    Acceptance, GroupOffer, Message, Offer, Purpose, Refusal, RefusalCode, ShadowHead, Text,
    ToDestination, ToSource, XenVersion,
};

/// How long a source may take between two messages. Its heartbeats don't count: they only show
/// that it lives.
const PATIENCE: Duration = Duration::from_secs(600);

/// How often to look whether the restore has got on.
const LOOK: Duration = Duration::from_millis(10);

/// How long a source may take to greet.
const GREETING: Duration = Duration::from_secs(60);

/// How long it may take to tell the source what failed.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// What this site prepared for an offer that it accepts.
pub struct Prepared {
    /// The guest to be.
    pub guest: Box<dyn Destination>,
    /// The journal, begun.
    pub journal: Journal,
    /// Where the memory goes.
    pub image: Image,
    /// What is in it already, where it was a shadow.
    pub shadow: Option<ShadowHead>,
    /// What this site holds of guests that run elsewhere.
    pub shadows: Shadows,
    /// Made from the offer's key.
    pub digester: Digester,
    /// This host's hypervisor.
    pub xen: XenVersion,
    /// What the operator at the source should know.
    pub warnings: Vec<String>,
    /// What is arranged for the guest's connections.
    pub arranged: Arranged,
    /// Starts what takes the place of `xl`'s monitor: called once the guest runs here.
    pub keep: Box<dyn FnMut() -> Result<()>>,
    /// Called last, however the move ended: gives the guest's lock back, which keeps others from
    /// settling the move meanwhile, and lets the guardian look at the journal.
    pub ended: Box<dyn FnOnce()>,
    /// Who watches it, and may give it up.
    pub control: Shared,
    /// Contents of other guests that may be shared, if there are any.
    pub sharing: Option<Sharing>,
    /// More connections that may come, if any are taken.
    pub expecting: Option<Expecting>,
}

/// A trust group of which this site has contents.
#[derive(Debug)]
pub struct Sharing {
    /// The group.
    pub group: Group,
    /// What the source has to prove its key over: random.
    pub nonce: Nonce,
}

impl Sharing {
    /// What can be shared with the guest of this UUID. None where the site has no other guest of
    /// the group.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn with(shadows: &Shadows, group: Group, uuid: &str) -> Result<Option<Sharing>> {
        if !Library::is_there(shadows, &group, uuid)? {
            return Ok(None);
        }
        let nonce = Nonce(random()?);
        Ok(Some(Sharing { group, nonce }))
    }

    /// What the source is told of it.
    #[must_use]
    pub fn offer(&self) -> GroupOffer {
        GroupOffer {
            name: Text::new(self.group.name()),
            nonce: self.nonce,
        }
    }
}

/// Says whether this site takes a guest, and prepares for it: checks, journal, guardian, image.
pub type Prepare<'a> = dyn FnMut(&Offer) -> Result<Prepared> + 'a;

/// A site that would take a guest.
pub struct Willing {
    /// What it says.
    pub acceptance: Acceptance,
    /// What it has of the guest, going by what is written down of it.
    pub known: Option<PageTable>,
    /// Contents of other guests that may be shared, if there are any.
    pub sharing: Option<Sharing>,
    /// What this site holds of guests that run elsewhere.
    pub shadows: Shadows,
}

impl Willing {
    /// It would take the guest of `offer`, with these warnings, on this hypervisor.
    #[must_use]
    pub fn new(
        offer: &Offer,
        xen: XenVersion,
        warnings: &[String],
        shadows: Shadows,
        sharing: Option<Sharing>,
    ) -> Willing {
        let (shadow, known) = shadows
            .expected(&offer.uuid, offer.pages, &offer.digest_key)
            .unzip();
        Willing {
            acceptance: Acceptance {
                xen,
                tsc_khz: None,
                warnings: warnings.iter().map(|warning| Text::new(warning)).collect(),
                edge_site: None,
                shadow,
                join: None,
                direct: None,
                group: sharing.as_ref().map(Sharing::offer),
            },
            known,
            sharing,
            shadows,
        }
    }
}

/// Says whether this site would take a guest, and makes nothing.
pub type Judge<'a> = dyn FnMut(&Offer) -> Result<Willing> + 'a;

/// Receives one guest from `peer`; or only says whether it would, by `judge`.
///
/// # Errors
/// Whatever failed; then nothing of the guest is left here, or the journal says what is.
pub fn run(mut peer: Conversation, prepare: &mut Prepare<'_>, judge: &mut Judge<'_>) -> Result<()> {
    let answered = peer
        .greet(Instant::now() + GREETING)
        .and_then(|_| receive_offer(&mut peer))
        .and_then(|offer| match offer.purpose {
            Purpose::DryRun => judge(&offer).map(|willing| Answer::Would(offer, Box::new(willing))),
            Purpose::Move | Purpose::Shadow => {
                prepare(&offer).map(|prepared| Answer::Does(offer, Box::new(prepared)))
            }
        });
    match answered {
        Err(error) => {
            tell(&mut peer, &error, |reason| {
                let code = match &error {
                    Error::Busy(_) => RefusalCode::Busy,
                    _ => RefusalCode::Other,
                };
                ToSource::Refuse(Refusal { code, reason })
            });
            peer.close();
            Err(error)
        }
        Ok(Answer::Would(offer, willing)) => {
            let told = foretell(&mut peer, &offer, *willing);
            peer.close();
            told
        }
        Ok(Answer::Does(offer, prepared)) => Receiving::new(peer, *offer, *prepared).run(),
    }
}

/// To an offer that is not refused.
enum Answer {
    /// It was a question only.
    Would(Box<Offer>, Box<Willing>),
    /// All is prepared.
    Does(Box<Offer>, Box<Prepared>),
}

struct Receiving {
    peer: Conversation,
    guest: Box<dyn Destination>,
    journal: Journal,
    image: Arc<Mutex<Image>>,
    digester: Digester,
    shadows: Shadows,
    offer: Offer,
    acceptance: Acceptance,
    decoder: BatchDecoder,
    arrival: Arrival,
    sharing: Option<Sharing>,
    /// Contents of other guests, once the source has proved that it may build upon them.
    library: Option<Library>,
    control: Shared,
    expecting: Option<Expecting>,
    meter: Meter,
    /// The most memory of our own that was seen.
    memory: u64,
    /// A page became a hole in this round.
    vanished: bool,
    /// The journal may say that the guest is ours.
    owning: bool,
    /// What came is a shadow.
    shelved: bool,
    keep: Box<dyn FnMut() -> Result<()>>,
    ended: Box<dyn FnOnce()>,
    /// What leads the guest's own connections, if anything does; then the work under way.
    lead: Option<Lead>,
    leading: Option<JoinHandle<()>>,
}

/// What the source says of the suspended guest.
struct Last {
    state: GuestState,
    digest: MemoryDigest,
}

impl Receiving {
    fn new(peer: Conversation, offer: Offer, prepared: Prepared) -> Self {
        let warnings = prepared
            .warnings
            .iter()
            .map(|warning| Text::new(warning))
            .collect();
        Receiving {
            peer,
            guest: prepared.guest,
            journal: prepared.journal,
            image: Arc::new(Mutex::new(prepared.image)),
            digester: prepared.digester,
            shadows: prepared.shadows,
            offer,
            acceptance: Acceptance {
                xen: prepared.xen,
                tsc_khz: None,
                warnings,
                edge_site: prepared.arranged.site.as_deref().map(Text::new),
                shadow: prepared.shadow,
                join: prepared.expecting.as_ref().map(|expecting| expecting.token),
                direct: (prepared.expecting.as_ref()).and_then(|expecting| expecting.direct),
                group: prepared.sharing.as_ref().map(Sharing::offer),
            },
            decoder: BatchDecoder::new(),
            arrival: Arrival::default(),
            sharing: prepared.sharing,
            library: None,
            control: prepared.control,
            expecting: prepared.expecting,
            meter: Meter::default(),
            memory: 0,
            vanished: false,
            owning: false,
            shelved: false,
            keep: prepared.keep,
            ended: prepared.ended,
            lead: prepared.arranged.outgoing,
            leading: None,
        }
    }

    fn run(mut self) -> Result<()> {
        let result = self.receive_guest();
        let result = match result {
            // Once the journal may say that the guest is ours it stays, paused or not: the guardian
            // reads what the journal says.
            Err(error) if !self.owning => {
                self.discard(&error);
                Err(error)
            }
            other => other,
        };
        self.peer.close();
        self.wait_for_lead();
        (self.ended)();
        result
    }

    /// Waits until the guest's own connections are led, as far as they can be.
    fn wait_for_lead(&mut self) {
        if self.leading.take().is_some_and(|work| work.join().is_err()) {
            log::error!("Leading the guest's own connections ended by a panic");
        }
    }

    fn phase(&self, name: &'static str) {
        self.control.note(&Progress::Phase(name));
    }

    fn receive_guest(&mut self) -> Result<()> {
        self.phase("accepting");
        hold("accepting");
        self.guest
            .start(Arc::clone(&self.image), self.offer.static_data())?;
        if let Some(expecting) = self.expecting.take() {
            self.peer.gather(expecting, self.offer.connections as usize);
        }
        self.peer
            .send(&ToSource::Accept(Box::new(self.acceptance.clone())))?;
        self.phase("receiving");
        match self.receive_pages()? {
            Some(last) => {
                self.restore(last)?;
                self.wait_for_commit()?;
                self.take_over()
            }
            None => self.shelve(),
        }
    }
}

/// What names the guest of an offer.
fn named<'a>(offer: &'a Offer, peer: &'a Conversation) -> Named<'a> {
    Named {
        uuid: &offer.uuid,
        name: &offer.name,
        peer: peer.peer(),
    }
}

fn lock(image: &Mutex<Image>) -> Result<MutexGuard<'_, Image>> {
    image
        .lock()
        .map_err(|_| Error::Refused("A thread of ours failed with the image in hand".into()))
}

/// Tells the source what failed, as long as it can be told.
fn tell(peer: &mut Conversation, error: &Error, message: impl FnOnce(Text) -> ToSource) {
    if matches!(error, Error::LinkLost { .. }) {
        return;
    }
    peer.ignore_cancel();
    // A source that does not read must not keep the guest's memory here.
    peer.set_deadline(Some(Instant::now() + LAST_WORDS));
    // Why it can't be told is of no interest beside the error itself.
    let _ = peer.send(&message(Text::new(&chain(error))));
}

fn unexpected(peer: &Conversation, message: &ToDestination<'_>) -> Error {
    let peer = peer.peer().to_owned();
    match message {
        ToDestination::Abort(reason) => Error::PeerFailed {
            peer,
            reason: reason.to_string(),
        },
        other => Error::Protocol {
            peer,
            what: format!("{:?} out of order", other.tag()),
        },
    }
}
