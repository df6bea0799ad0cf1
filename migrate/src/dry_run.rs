//! What a move would do and take, found without moving: `vmshadow migrate --dry-run`.
//!
//! ```text
//!   find the guest -> checks -> ssh -> hello, round trip -> link measured -> offer, marked
//!                                                                            judged there
//!   -> the guest's memory surveyed, at the rate of the link -> prediction
//! ```
//!
//! The destination looks at all that a move would need and answers, and makes nothing. Here no
//! journal is begun, the log of dirty pages is left alone, and the guest is only read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::costs::Costs;
use crate::digest::{DigestKey, Digester};
use crate::directories::Directories;
use crate::error::{Error, Result};
use crate::guest;
use crate::guest::xen::checks::{Layout, hindrances};
use crate::guest::xen::host::Host;
use crate::handover::lock::GuestLock;
use crate::handover::recovery;
use crate::link::Conversation;
use crate::outgoing::{LOCKED, Request, find_domain, offer, random};
use crate::pages::PAGE_SIZE;
use crate::report::rounded;
use crate::rounds::{FixedCost, Prediction};
use crate::survey::{Survey, survey};
use crate::wire::{MAX_PROBE, MoveId, Offer, Purpose, Role as WireRole, ToDestination, ToSource};

/// The version of [`DryRun`]'s format.
pub const DRY_RUN_VERSION: u32 = 1;

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
/// As a move that is refused here; [`Error::LinkLost`] where the other site can't be reached. That
/// it would refuse is no error.
pub fn dry_run(
    directories: &Directories,
    request: &Request,
    cancel: Arc<AtomicBool>,
) -> Result<DryRun> {
    directories.create()?;
    let host = Host::open()?;
    let domid = find_domain(&host, &request.domain)?;
    let name = host.name(domid)?;
    let uuid = host.uuid_text(&host.info(domid)?);
    // Two at once would tell of one another.
    let _lock = GuestLock::wait(directories, &uuid, &name, LOCKED)?;
    recovery::refuse_open_moves(directories, &uuid, &name)?;
    let hindrances = hindrances(&host, domid, request.allowed)?;
    if !hindrances.is_empty() {
        return Err(Error::Refused(format!(
            "{name} can't be moved: {}",
            hindrances.join("; ")
        )));
    }
    let layout = Layout::read(&host, domid)?;
    let key = DigestKey::new(random()?);
    let digester = Digester::new(&key);
    let mut guest = guest::xen::open(&host, domid, &key, request.tracker)?;
    let move_id = MoveId::from_random(random()?);
    let mut offer = offer(&host, guest.as_mut(), domid, &layout, key, move_id, request)?;
    offer.purpose = Purpose::DryRun;
    let asked = ask(request, offer, Arc::clone(&cancel))?;

    let bytes_a_second = asked.link.mbit * 1e6 / 8.0;
    let memory = survey(
        guest.as_mut(),
        &digester,
        bytes_a_second,
        SURVEYING,
        &|| cancel.load(Ordering::Relaxed),
    )?;
    let costs = Costs::read(directories);
    let seen = costs.fixed(&request.remote.host);
    let fixed = seen.unwrap_or_default();
    Ok(DryRun {
        version: DRY_RUN_VERSION,
        domain: name,
        uuid,
        destination: request.remote.host.clone(),
        refused: asked.refused,
        warnings: asked.warnings,
        link: asked.link,
        guest_bytes: guest.populated() * PAGE_SIZE as u64,
        memory,
        fixed,
        fixed_seen: seen.is_some(),
        predicted: memory.predict(bytes_a_second, &fixed, &request.plan.limits),
    })
}

/// What the destination said.
struct Asked {
    link: LinkFound,
    refused: Option<String>,
    warnings: Vec<String>,
}

fn ask(request: &Request, offer: Offer, cancel: Arc<AtomicBool>) -> Result<Asked> {
    let host = &request.remote.host;
    let (link, mut session) = request.remote.connect()?;
    let mut peer = Conversation::start(host, link, WireRole::Source, None, cancel);
    let asked = ask_over(&mut peer, request, offer);
    peer.close();
    let asked = asked.map_err(|error| match error {
        Error::LinkLost { peer, reason } => Error::LinkLost {
            peer,
            reason: session.reason(reason),
        },
        other => other,
    });
    session.finish(Duration::from_secs(10));
    asked
}

fn ask_over(peer: &mut Conversation, request: &Request, offer: Offer) -> Result<Asked> {
    peer.greet(Instant::now() + ANSWERING)?;
    let round_trip = ping(peer, 1)?.min(ping(peer, 2)?);
    let (rate, probed_bytes) = match request.rate {
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
    peer.send(&ToDestination::Offer(Box::new(offer)))?;
    let (refused, warnings) = match receive(peer)? {
        ToSource::Accept(accept) => (None, accept.warnings),
        ToSource::Refuse(refusal) => (Some(refusal.reason.to_string()), Vec::new()),
        ToSource::Failed(reason) => (Some(reason.to_string()), Vec::new()),
        other => return Err(unexpected(peer, &other)),
    };
    Ok(Asked {
        link,
        refused,
        warnings: warnings.iter().map(ToString::to_string).collect(),
    })
}

/// How long the answer to a ping takes.
fn ping(peer: &mut Conversation, number: u64) -> Result<Duration> {
    let start = Instant::now();
    peer.send(&ToDestination::Ping(number))?;
    match receive(peer)? {
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
        if took >= MEASURING || sent >= MOST_PROBED {
            return Ok((bytes as f64 / took.as_secs_f64().max(1e-3), sent));
        }
        blocks *= 2;
    }
    Ok((1.0, sent))
}

fn receive(peer: &mut Conversation) -> Result<ToSource> {
    let deadline = Instant::now() + ANSWERING;
    let received = peer.receive(deadline)?;
    Ok(ToSource::decode(received.frame())?)
}

fn unexpected(peer: &Conversation, message: &ToSource) -> Error {
    Error::Protocol {
        peer: peer.peer().to_owned(),
        what: format!("{message:?} out of order"),
    }
}
