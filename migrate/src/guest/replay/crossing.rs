//! One move between two sites of this process, with all that it leaves behind settled.
//!
//! ```text
//!   thread   source::run ............ guardian: settle      both end: what each site says
//!                 | link |
//!   thread   destination::run ....... guardian: settle
//! ```
//!
//! A worker can be killed: [`die`] ends its thread at once, with nothing given up or tidied, and
//! what it held (its lock, its end of the link) is let go of as the kernel would.

use std::mem;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::slice;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;

use super::destination::{ReplayDestination, Restored};
use super::guest::UUID;
use super::site::{Call, Site, Watch};
use super::source::ReplaySource;
use crate::connections::{Arranged, Untouched};
use crate::control::{Facts, Shared};
use crate::costs::Earlier;
use crate::destination::{self, Prepared, Sharing};
use crate::digest::{DigestKey, Digester};
use crate::error::{Error, Result};
use crate::guest::Source;
use crate::handover::journal::{Begin, Entry, Journal, Role, find};
use crate::handover::lock::GuestLock;
use crate::handover::recovery::Owner;
use crate::link::direct::PublicKey;
use crate::link::{Conversation, Expecting, Link, Rate, Reach};
use crate::outgoing::random;
use crate::pages::PAGE_SIZE;
use crate::report::{Observer, Progress, Report, TrackerKind};
use crate::shadow::{Named, ShadowPolicy, Shadows};
use crate::source::{self, Move, Plan};
use crate::wire::{
    CpuPolicy, DirectDoor, GuestKind, JoinToken, MoveId, Offer, Purpose, Role as WireRole, Text,
    TscOffer, XenVersion,
};

/// How long another worker may hold the guest's lock.
const LOCKED: Duration = Duration::from_secs(5);

/// How a guest is to move.
pub struct Crossing {
    /// What the operator asks for.
    pub plan: Plan,
    /// How dirty pages are found.
    pub tracker: TrackerKind,
    /// At most this many bytes a second.
    pub rate: Option<u64>,
    /// Whether the source keeps a shadow of it.
    pub keep: bool,
    /// The move is given up once this is set.
    pub cancel: Arc<AtomicBool>,
    /// What becomes of the memory that arrives.
    pub restored: Restored,
    /// Is told of each call at the source.
    pub at_source: Arc<Watch>,
    /// Is told of each call at the destination.
    pub at_destination: Arc<Watch>,
    /// Is told how far the move is.
    pub observer: Box<dyn Observer>,
    /// What earlier moves tell of it.
    pub earlier: Earlier,
    /// More connections, for pages: the source's ends, and the destination's.
    pub data: (Vec<Link>, Vec<Link>),
    /// How many of these come directly, where it is tried; the others can't.
    pub directly: Option<usize>,
}

impl Default for Crossing {
    fn default() -> Self {
        Crossing {
            plan: Plan::default(),
            tracker: TrackerKind::LogDirty,
            rate: None,
            keep: true,
            cancel: Arc::default(),
            restored: Restored::Kept,
            at_source: Arc::new(|_| Ok(())),
            at_destination: Arc::new(|_| Ok(())),
            observer: Box::new(Nobody),
            earlier: Earlier::default(),
            data: (Vec::new(), Vec::new()),
            directly: None,
        }
    }
}

struct Nobody;

impl Observer for Nobody {
    fn notice(&mut self, _progress: Progress) {}
}

/// How one side ended.
#[derive(Debug)]
pub enum End {
    /// By itself.
    Returned(Result<()>),
    /// It was killed.
    Killed,
}

impl End {
    /// Whether the worker ended well.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        matches!(self, End::Returned(Ok(())))
    }

    /// The error that it ended with.
    #[must_use]
    pub fn error(&self) -> Option<&Error> {
        match self {
            End::Returned(result) => result.as_ref().err(),
            End::Killed => None,
        }
    }
}

/// What a move came to, all of it settled.
#[derive(Debug)]
pub struct Crossed {
    /// The source's report; none where its worker was killed.
    pub report: Option<Report>,
    /// How the source's worker ended.
    pub source: End,
    /// How the destination's worker ended.
    pub destination: End,
    /// What the source's journal says in the end.
    pub source_journal: Entry,
    /// What the destination's journal says in the end, if it began one.
    pub destination_journal: Option<Entry>,
}

/// Ends this worker as if it were killed.
pub fn die() -> ! {
    resume_unwind(Box::new(Killed))
}

struct Killed;

/// How a worker ends, if it ends by itself.
fn survive<T>(work: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(value) => Some(value),
        Err(why) if why.is::<Killed>() => None,
        // A panic of its own.
        Err(why) => resume_unwind(why),
    }
}

/// Moves the guest of `from` to `to` over `link`, whose first end is the source's.
///
/// # Errors
/// What keeps the move from beginning, and what can't be settled after it.
pub fn cross(
    from: &Arc<Site>,
    to: &Arc<Site>,
    link: (Link, Link),
    mut crossing: Crossing,
) -> Result<Crossed> {
    let (near, far) = link;
    let (restored, watch) = (crossing.restored, Arc::clone(&crossing.at_destination));
    let data = mem::take(&mut crossing.data.1);
    thread::scope(|scope| {
        let arriving = scope.spawn(move || arrive_by(to, far, data, restored, &watch));
        let left = leave(from, near, &mut crossing, &mut |entry| to.answer(entry));
        let arrived = arriving.join().unwrap_or_else(|why| resume_unwind(why))?;
        let left = left?;
        let move_id = &left.journal.begin.move_id;
        Ok(Crossed {
            destination_journal: find(&to.directories, move_id, Role::Destination)?,
            report: left.report,
            source: left.end,
            destination: arrived,
            source_journal: left.journal,
        })
    })
}

/// What a move came to at its source.
#[derive(Debug)]
pub struct Left {
    /// None where the worker was killed.
    pub report: Option<Report>,
    /// How the worker ended.
    pub end: End,
    /// What the journal says in the end.
    pub journal: Entry,
}

/// The source's end of a move: its worker, and its guardian after it. `ask` asks the destination
/// who owns the guest.
///
/// # Errors
/// What keeps the move from beginning, and what can't be settled after it.
pub fn leave(
    from: &Arc<Site>,
    link: Link,
    crossing: &mut Crossing,
    ask: &mut dyn FnMut(&Entry) -> Result<Owner>,
) -> Result<Left> {
    let policy = ShadowPolicy {
        keep: crossing.keep,
        ..ShadowPolicy::default()
    };
    let shadows = Shadows::new(&from.directories, policy);
    let key = shadows.key_for(UUID)?;
    let move_id = MoveId::from_random(random()?);
    let watch = &crossing.at_source;
    let mut guest = ReplaySource::open(
        from,
        &key,
        crossing.tracker,
        crossing.plan.cores(),
        Arc::clone(watch),
    )?;
    let (name, uuid) = (guest.facts().name.clone(), guest.facts().uuid.clone());
    let lock = GuestLock::wait(&from.directories, &uuid, &name, LOCKED)?;
    let begin = begin(move_id, Role::Source, &name, &uuid)?;
    let journal = Journal::create(&from.directories, begin)?;
    let path = journal.entry().path.clone();
    let named = Named {
        uuid: &uuid,
        name: &name,
        peer: "the other site",
    };
    shadows.keep_key(named, &key)?;
    let offer = offer(&mut guest, move_id, &key, crossing.plan.verify);
    let mut links = Links {
        left: mem::take(&mut crossing.data.0),
        directly: crossing.directly,
    };
    let mut plan = crossing.plan.clone();
    // Otherwise as many as the link needs.
    plan.connections = plan
        .connections
        .or(NonZeroUsize::new(links.left.len()))
        .or(NonZeroUsize::new(1));
    let rate = Rate::new(crossing.rate);
    let control = control(&offer, Role::Source, rate.clone(), crossing);
    let cancel = Arc::clone(&crossing.cancel);
    let queue = crossing.plan.queue();
    let peer = Conversation::start_with("destination", link, WireRole::Source, rate, cancel, queue);
    let ended = survive(|| {
        source::run(
            Move {
                guest: &mut guest,
                digester: Digester::new(&key),
                journal,
                peer,
                observer: crossing.observer.as_mut(),
                connections: &mut Untouched,
                plan,
                began: Instant::now(),
                shadows: &shadows,
                group: from.group(),
                control,
                earlier: crossing.earlier,
                reach: &mut links,
                unchanged: &mut || Ok(()),
                keep: &mut || {
                    watch(Call::Keep)?;
                    from.keep();
                    Ok(())
                },
                ask: &mut |entry| {
                    watch(Call::Ask)?;
                    ask(entry)
                },
            },
            offer,
        )
    });
    drop(guest);
    drop(lock);
    let journal = from.settle(&path, ask)?;
    let (report, end) = match ended {
        Some((report, result)) => (Some(report), End::Returned(result)),
        None => (None, End::Killed),
    };
    Ok(Left {
        report,
        end,
        journal,
    })
}

/// Links that are there already.
struct Links {
    left: Vec<Link>,
    /// How many of them can be made directly, where that is tried.
    directly: Option<usize>,
}

/// What both sites are known by.
const KEY: PublicKey = PublicKey::new([1; 32]);

impl Reach for Links {
    fn reached(&mut self) -> Result<Option<String>> {
        Ok(None)
    }

    fn tend(&mut self) -> Option<String> {
        None
    }

    fn open(&mut self) -> Result<Link> {
        let link = self.left.pop();
        link.ok_or_else(|| Error::Refused("There is no other link".into()))
    }

    fn key(&mut self) -> Option<PublicKey> {
        self.directly.map(|_| KEY)
    }

    fn open_directly(&mut self, _: &DirectDoor, count: usize, _: u32) -> Vec<Result<Link>> {
        let can = self.directly.unwrap_or(0);
        let one = |at| match at < can {
            true => self.open(),
            false => Err(Error::Refused("There is a firewall".into())),
        };
        (0..count).map(one).collect()
    }
}

/// The destination's end of a move: its worker, and its guardian after it.
///
/// # Errors
/// What can't be settled after it.
pub fn arrive(to: &Arc<Site>, link: Link, restored: Restored, watch: &Arc<Watch>) -> Result<End> {
    arrive_by(to, link, Vec::new(), restored, watch)
}

/// As [`arrive`], with more connections that come in, for pages.
///
/// # Errors
/// As [`arrive`].
pub fn arrive_by(
    to: &Arc<Site>,
    link: Link,
    data: Vec<Link>,
    restored: Restored,
    watch: &Arc<Watch>,
) -> Result<End> {
    let peer = Conversation::start("source", link, WireRole::Destination, None, Arc::default());
    let mut path = None;
    let mut data = Some(data);
    let ended = survive(|| {
        let mut take = |offer: &Offer| {
            let data = data.take().unwrap_or_default();
            let prepared = prepare(to, offer, data, restored, watch)?;
            path = Some(prepared.journal.entry().path.clone());
            Ok(prepared)
        };
        let mut judge = |_: &Offer| Err(Error::Refused("No dry runs are replayed".into()));
        destination::run(peer, &mut take, &mut judge)
    });
    if let Some(path) = path {
        to.settle(&path, &mut |_| Ok(Owner::Unknown))?;
    }
    Ok(ended.map_or(End::Killed, End::Returned))
}

fn control(offer: &Offer, role: Role, rate: Rate, crossing: &Crossing) -> Shared {
    Shared::new(
        Facts {
            role,
            move_id: offer.move_id.to_string(),
            domain: offer.name.clone(),
            uuid: offer.uuid.clone(),
            domid: None,
            peer: "the other site".into(),
            guest_bytes: offer.populated_pages * PAGE_SIZE as u64,
        },
        rate,
        crossing.plan.limits.downtime,
        Arc::clone(&crossing.cancel),
    )
}

fn prepare(
    to: &Arc<Site>,
    offer: &Offer,
    data: Vec<Link>,
    restored: Restored,
    watch: &Arc<Watch>,
) -> Result<Prepared> {
    let (name, uuid) = (&offer.name, &offer.uuid);
    if to.has_any() {
        return Err(Error::Refused(format!("There is a domain {name} already")));
    }
    let lock = GuestLock::wait(&to.directories, uuid, name, LOCKED)?;
    let memory = to
        .directories
        .incoming()
        .join(format!("{}.memory", offer.move_id));
    let mut begin = begin(offer.move_id, Role::Destination, name, uuid)?;
    begin.memory = Some(memory.clone());
    let journal = Journal::create(&to.directories, begin)?;
    let guest = ReplayDestination::new(
        to,
        name,
        offer.pages,
        offer.populated_pages,
        restored,
        Arc::clone(watch),
    );
    let (site, watch) = (Arc::clone(to), Arc::clone(watch));
    let shadows = Shadows::new(&to.directories, ShadowPolicy::default());
    let (image, shadow) = shadows.image(
        &offer.uuid,
        offer.pages,
        &offer.digest_key,
        slice::from_ref(&(0..offer.pages)),
        &memory,
    )?;
    let sharing = match to.group() {
        Some(group) => Sharing::with(&shadows, group, uuid)?,
        None => None,
    };
    Ok(Prepared {
        guest: Box::new(guest),
        journal,
        image,
        shadow,
        shadows,
        digester: Digester::new(&offer.digest_key),
        xen: xen(),
        warnings: Vec::new(),
        arranged: Arranged::default(),
        keep: Box::new(move || {
            watch(Call::Keep)?;
            site.keep();
            Ok(())
        }),
        ended: Box::new(move || drop(lock)),
        control: control(
            offer,
            Role::Destination,
            Rate::default(),
            &Crossing::default(),
        ),
        sharing,
        expecting: match offer.connections {
            0 => None,
            _ => {
                let (come, links) = bounded(data.len());
                for link in data {
                    // There is room for all of them.
                    let _ = come.send(link);
                }
                let token = JoinToken::new(random()?);
                Some(Expecting {
                    token,
                    links,
                    direct: offer.direct.map(|_| DirectDoor { port: 1, key: KEY }),
                })
            }
        },
    })
}

fn begin(move_id: MoveId, role: Role, name: &str, uuid: &str) -> Result<Begin> {
    Begin::new(role, &move_id.to_string(), name, uuid, "the other site")
}

pub(super) fn xen() -> XenVersion {
    XenVersion {
        major: 4,
        minor: 17,
        extra: Text::new(".0"),
    }
}

pub(super) fn offer(
    guest: &mut ReplaySource,
    move_id: MoveId,
    key: &DigestKey,
    verify: bool,
) -> Offer {
    let facts = guest.facts();
    Offer {
        move_id,
        name: facts.name.clone(),
        uuid: facts.uuid.clone(),
        kind: GuestKind::Pv,
        pages: facts.pages,
        populated_pages: guest.populated(),
        vcpus: facts.vcpus,
        configuration: serde_json::Value::Null,
        cpu_policy: CpuPolicy::default(),
        tsc: TscOffer {
            mode: 0,
            khz: 2_000_000,
        },
        xen: xen(),
        digest_key: key.clone(),
        verify,
        purpose: Purpose::Move,
        connections: 0,
        direct: None,
    }
}
