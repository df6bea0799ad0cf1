//! What a move would do and take, found without moving: `vmshadow migrate --dry-run`.
//!
//! ```text
//!   find the guest -> checks -> ssh -> hello, round trip -> link measured -> offer, marked
//!                                                                            judged there
//!   -> what the destination has already -> the guest's memory surveyed against that, at the rate
//!      of the link -> prediction
//! ```
//!
//! The destination looks at all that a move would need and answers, and makes nothing. Here no
//! journal is begun, the log of dirty pages is left alone, and the guest is only read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::connections::Connections;
use crate::costs::Costs;
use crate::digest::Digester;
use crate::directories::Directories;
use crate::error::{Error, Result};
use crate::group::{Group, open_group_of};
use crate::guest;
use crate::guest::xen::host::Host;
use crate::link::Conversation;
use crate::outgoing::{Request, claim, find_domain, offer, random};
use crate::pages::PAGE_SIZE;
use crate::report::rounded;
use crate::rounds::{FixedCost, Prediction};
use crate::shadow::Shadows;
use crate::source::learning::{Asked, Learned, learn, receive, unexpected};
use crate::survey::{Survey, survey};
use crate::whereabouts::Whereabouts;
use crate::wire::{
    MAX_PROBE, MoveId, Offer, Purpose, Role as WireRole, Text, ToDestination, ToSource,
};

/// The version of [`DryRun`]'s format.
pub const DRY_RUN_VERSION: u32 = 3;

/// How long the other site may take to greet, and to answer.
const ANSWERING: Duration = Duration::from_secs(60);

/// How long the guest's memory is read.
const SURVEYING: Duration = Duration::from_secs(10);

/// A measurement of the link that took so long counts.
const MEASURING: Duration = Duration::from_secs(1);

/// No more is sent to measure the link.
const MOST_PROBED: u64 = 32 << 20;

/// What is known of the link.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LinkFound {
    /// The round trip, ms.
    pub rtt_ms: f64,
    /// What it takes, Mbit/s.
    pub mbit: f64,
    /// Whether that was measured, with so many bytes. Else it is the limit that was given, and the
    /// link may be slower.
    pub probed_bytes: Option<u64>,
}

/// What a move would do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DryRun {
    /// The format.
    pub version: u32,
    /// The guest's name.
    pub domain: String,
    /// Its UUID.
    pub uuid: String,
    /// Where it is: at the source.
    pub guest: Whereabouts,
    /// Where it would go.
    pub destination: String,
    /// Why the destination would not take it; none where it would.
    pub refused: Option<String>,
    /// What the destination warns of.
    pub warnings: Vec<String>,
    /// The link.
    pub link: LinkFound,
    /// The guest's memory, bytes.
    pub guest_bytes: u64,
    /// Pages of it that the destination has, going by what is written down there.
    pub recalled: u64,
    /// Contents of other guests of its trust group that the destination shares.
    pub shareable: u64,
    /// What was found in it.
    pub memory: Survey,
    /// What a handover costs whatever is left to send.
    pub fixed: FixedCost,
    /// Whether that was seen in earlier moves; else it is assumed.
    pub fixed_seen: bool,
    /// What the move would take.
    pub predicted: Option<Prediction>,
}

/// Finds out.
///
/// # Errors
/// As a move that is refused here, or whose `connections` could not follow; [`Error::LinkLost`] where
/// the other site can't be reached. That it would refuse is no error.
pub fn dry_run(
    directories: &Directories,
    request: &Request,
    connections: &mut dyn Connections,
    cancel: Arc<AtomicBool>,
) -> Result<DryRun> {
    directories.create()?;
    let host = Host::open()?;
    let domid = find_domain(&host, &request.domain)?;
    let name = host.name(domid)?;
    let info = host.info(domid)?;
    let uuid = host.uuid_text(&info);
    // Two at once would tell of one another.
    let (_lock, layout) = claim(directories, &host, domid, &uuid, &name, request.allowed)?;
    let shadows = Shadows::new(directories, request.shadows.clone());
    // By the same secret as a move, so that it can be told what the destination has.
    let key = shadows.key_for(&uuid)?;
    let digester = Digester::new(&key);
    let mut guest = guest::xen::open(&host, domid, &key, request.tracker, request.plan.cores())?;
    let tracker = guest::xen::foretell_tracker(&host, &info, guest.facts().kind, request.tracker)?;
    let move_id = MoveId::from_random(random()?);
    let mut offer = offer(
        &host,
        guest.as_mut(),
        domid,
        &layout,
        key.clone(),
        move_id,
        request,
    )?;
    offer.purpose = Purpose::DryRun;
    let mut warnings = Vec::new();
    let group = open_group_of(&request.groups, &name, |why| warnings.push(why));
    let asked = Asked {
        shadows: &shadows,
        uuid: &uuid,
        key: &key,
        digester: &digester,
        pages: guest.facts().pages,
        populated: guest.populated(),
    };
    let answer = ask(request, offer, &asked, group.as_ref(), Arc::clone(&cancel))?;
    warnings.extend(answer.warnings);
    if answer.refused.is_none() {
        connections.accepted(answer.site.as_deref())?;
    }

    let bytes_a_second = answer.rate;
    let learned = answer.learned;
    let memory = survey(
        guest.as_mut(),
        learned.held,
        &digester,
        bytes_a_second,
        SURVEYING,
        &|| cancel.load(Ordering::Relaxed),
    )?;
    let guest_bytes = guest.populated() * PAGE_SIZE as u64;
    let costs = Costs::read(directories);
    let kept = if shadows.keep() { guest_bytes } else { 0 };
    let seen = costs.fixed(&request.remote.host, kept);
    let fixed = seen.unwrap_or_default();
    Ok(DryRun {
        version: DRY_RUN_VERSION,
        domain: name,
        uuid,
        guest: Whereabouts::Source,
        destination: request.remote.host.clone(),
        refused: answer.refused,
        warnings,
        link: answer.link,
        guest_bytes,
        recalled: learned.recalled,
        shareable: learned.shareable.unwrap_or(0),
        memory,
        fixed,
        fixed_seen: seen.is_some(),
        predicted: memory.predict(
            bytes_a_second,
            &fixed,
            &request.plan.limits,
            tracker,
            request.plan.verify,
        ),
    })
}

/// What the destination said.
pub(crate) struct Answer {
    link: LinkFound,
    /// What the link takes, bytes a second.
    rate: f64,
    refused: Option<String>,
    warnings: Vec<String>,
    /// What it calls itself at the edge.
    site: Option<String>,
    /// What it has of the guest.
    pub learned: Learned,
}

fn ask(
    request: &Request,
    offer: Offer,
    asked: &Asked<'_>,
    group: Option<&Group>,
    cancel: Arc<AtomicBool>,
) -> Result<Answer> {
    let host = &request.remote.host;
    let (link, mut session) = request.remote.connect()?;
    let mut peer = Conversation::start(host, link, WireRole::Source, None, cancel);
    let answer = peer
        .greet(Instant::now() + ANSWERING)
        .and_then(|_| session.follow_congestion())
        .and_then(|_| ask_over(&mut peer, request.rate, offer, asked, group));
    peer.close();
    let answer = answer.map_err(|error| match error {
        Error::LinkLost { peer, reason } => Error::LinkLost {
            peer,
            reason: session.reason(reason),
        },
        other => other,
    });
    session.finish(Duration::from_secs(10));
    answer
}

/// Asks by a connection that has been greeted. A link that is given a `rate`, bytes a second, is not
/// measured.
///
/// # Errors
/// What breaks the link, and what makes no sense. That the other site would refuse is none.
pub(crate) fn ask_over(
    peer: &mut Conversation,
    rate: Option<u64>,
    offer: Offer,
    asked: &Asked<'_>,
    group: Option<&Group>,
) -> Result<Answer> {
    let round_trip = ping(peer, 1)?.min(ping(peer, 2)?);
    let (rate, probed_bytes) = match rate {
        Some(rate) => (rate as f64, None),
        None => {
            let (rate, bytes) = measure(peer, round_trip)?;
            (rate, Some(bytes))
        }
    };
    let link = LinkFound {
        rtt_ms: rounded(round_trip) * 1e3,
        mbit: (rate * 8e-6 * 10.0).round() / 10.0,
        probed_bytes,
    };
    let move_id = offer.move_id;
    peer.send(&ToDestination::Offer(Box::new(offer)))?;
    let refused = |reason: Text| Answer {
        link,
        rate,
        refused: Some(reason.to_string()),
        warnings: Vec::new(),
        site: None,
        learned: asked.nothing(),
    };
    match receive(peer, ANSWERING)? {
        ToSource::Accept(accepted) => {
            let learned = learn(peer, &accepted, asked, group, move_id)?;
            Ok(Answer {
                link,
                rate,
                refused: None,
                warnings: accepted.warnings.iter().map(ToString::to_string).collect(),
                site: accepted.edge_site.as_ref().map(ToString::to_string),
                learned,
            })
        }
        ToSource::Refuse(refusal) => Ok(refused(refusal.reason)),
        ToSource::Failed(reason) => Ok(refused(reason)),
        other => Err(unexpected(peer, &other)),
    }
}

/// How long the answer to a ping takes.
fn ping(peer: &mut Conversation, number: u64) -> Result<Duration> {
    let start = Instant::now();
    peer.send(&ToDestination::Ping(number))?;
    match receive(peer, ANSWERING)? {
        ToSource::Pong(answer) if answer == number => Ok(start.elapsed()),
        other => Err(unexpected(peer, &other)),
    }
}

/// Sends more and more until it takes long enough to tell: bytes a second, and how many were sent.
fn measure(peer: &mut Conversation, round_trip: Duration) -> Result<(f64, u64)> {
    // No layer below can make this smaller.
    let mut block = vec![0; MAX_PROBE];
    let mut state = u64::from_le_bytes(random()?) | 1;
    for bytes in block.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *bytes = state.to_le_bytes();
    }
    let (mut blocks, mut sent) = (1, 0);
    for number in 3.. {
        let start = Instant::now();
        for _ in 0..blocks {
            peer.send(&ToDestination::Probe(&block))?;
        }
        ping(peer, number)?;
        let bytes = blocks * MAX_PROBE as u64;
        sent += bytes;
        let took = start.elapsed().saturating_sub(round_trip);
        if took >= MEASURING || sent + 2 * bytes > MOST_PROBED {
            return Ok((bytes as f64 / took.as_secs_f64().max(1e-3), sent));
        }
        blocks *= 2;
    }
    Ok((1.0, sent))
}
