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

use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::arrival::Arrival;
use crate::codec::BatchDecoder;
use crate::connections::{Arranged, Lead};
use crate::control::Shared;
use crate::digest::{Digester, MemoryDigest};
use crate::error::{Error, Result, chain};
use crate::group::{Group, Library, NAME_SIZE, Nonce, Proof};
use crate::guest::xen::stream::state::GuestState;
use crate::guest::{Destination, PageTable};
use crate::handover::journal::{Journal, Outcome, Phase};
use crate::hold::hold;
use crate::image::Image;
use crate::link::{Conversation, Expecting};
use crate::outgoing::random;
use crate::report::{Progress, own_memory, rounded};
use crate::rounds::{Meter, Outlook};
use crate::shadow::{Named, Shadows, inventory};
use crate::wire::{
    Acceptance, GroupOffer, MAX_SHARES, Message, Offer, Part, Purpose, Readiness, Refusal,
    RefusalCode, ShadowHead, Text, ToDestination, ToSource, XenVersion,
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

fn receive_offer(peer: &mut Conversation) -> Result<Box<Offer>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let received = peer.receive(deadline)?;
        match ToDestination::decode(received.frame())? {
            ToDestination::Ping(token) => peer.send(&ToSource::Pong(token))?,
            ToDestination::Probe(_) => {}
            ToDestination::Offer(offer) => return Ok(offer),
            other => return Err(unexpected(peer, &other)),
        }
    }
}

/// Says what would be said to a guest that came, until nothing more is asked.
fn foretell(peer: &mut Conversation, offer: &Offer, willing: Willing) -> Result<()> {
    let Willing {
        acceptance,
        known,
        mut sharing,
        shadows,
    } = willing;
    peer.send(&ToSource::Accept(Box::new(acceptance)))?;
    let digester = Digester::new(&offer.digest_key);
    loop {
        let received = match peer.receive(Instant::now() + PATIENCE) {
            Ok(received) => received,
            Err(Error::LinkLost { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        match (ToDestination::decode(received.frame())?, &known) {
            (ToDestination::Ping(token), _) => peer.send(&ToSource::Pong(token))?,
            (ToDestination::Recall { known: true }, Some(_)) => {}
            (ToDestination::Recall { known: false }, Some(table)) => {
                send_inventory(peer, table, &digester)?;
            }
            (ToDestination::Prove(proof), _) => {
                share(peer, sharing.take(), &proof, &shadows, offer)?;
            }
            (other, _) => return Err(unexpected(peer, &other)),
        }
    }
}

/// Tells the source what is in `table`.
fn send_inventory(peer: &mut Conversation, table: &PageTable, digester: &Digester) -> Result<()> {
    for first in (0..table.pages()).step_by(inventory::CHUNK_PAGES as usize) {
        let end = first + inventory::CHUNK_PAGES;
        let mut runs = Vec::new();
        inventory::encode(table, digester, first, end, &mut runs);
        peer.send(&ToSource::Inventory { first, runs })?;
    }
    Ok(())
}

/// Tells the source what is here of other guests, if it has the key of their group. Asked once.
fn share(
    peer: &mut Conversation,
    sharing: Option<Sharing>,
    proof: &Proof,
    shadows: &Shadows,
    offer: &Offer,
) -> Result<Option<Library>> {
    let Some(Sharing { group, nonce }) = sharing else {
        return Err(Error::Protocol {
            peer: peer.peer().to_owned(),
            what: "a proof that nobody asked for".into(),
        });
    };
    if !group.accepts(proof, &nonce, offer.move_id) {
        log::warn!(
            "{} has another key of trust group {}: nothing is shared",
            peer.peer(),
            group.name()
        );
        let (total, names) = (0, Vec::new());
        peer.send(&ToSource::Shares { total, names })?;
        return Ok(None);
    }
    let library = Library::open(shadows, &group, &offer.uuid)?;
    let names: Vec<u8> = library.names().flat_map(|name| name.0).collect();
    let total = library.len() as u64;
    log::info!(
        "{total} contents of trust group {} are shared",
        group.name()
    );
    // One that is empty is told as well.
    let mut left = names.as_slice();
    loop {
        let (next, rest) = left.split_at(left.len().min(MAX_SHARES * NAME_SIZE));
        peer.send(&ToSource::Shares {
            total,
            names: next.to_vec(),
        })?;
        left = rest;
        if left.is_empty() {
            return Ok(Some(library));
        }
    }
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

    /// The pages that came are kept as a shadow.
    fn shelve(&mut self) -> Result<()> {
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
    fn receive_pages(&mut self) -> Result<Option<Last>> {
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

    fn restore(&mut self, last: Last) -> Result<()> {
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

    fn wait_for_commit(&mut self) -> Result<()> {
        self.phase("waiting for the commit");
        hold("ready");
        let received = self.peer.receive(Instant::now() + PATIENCE)?;
        match ToDestination::decode(received.frame())? {
            ToDestination::Commit => Ok(()),
            other => Err(unexpected(&self.peer, &other)),
        }
    }

    fn take_over(&mut self) -> Result<()> {
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
    fn discard(&mut self, error: &Error) {
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
