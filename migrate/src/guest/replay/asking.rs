//! A dry run between two sites of this process: what a move would take, and nothing moves.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::crossing::{offer, xen};
use super::guest::UUID;
use super::site::Site;
use super::source::ReplaySource;
use crate::destination::{self, Sharing, Willing};
use crate::digest::Digester;
use crate::dry_run::ask_over;
use crate::error::{Error, Result};
use crate::guest::Source;
use crate::link::{Conversation, Link};
use crate::outgoing::random;
use crate::report::TrackerKind;
use crate::rounds::{FixedCost, Limits, Prediction};
use crate::shadow::{ShadowPolicy, Shadows};
use crate::source::learning::Asked;
use crate::survey::{Survey, survey};
use crate::wire::{MoveId, Offer, Purpose, Role};

/// How long the other site may take to greet.
const GREETING: Duration = Duration::from_secs(60);

/// How long the guest's memory is read at the most.
const SURVEYING: Duration = Duration::from_secs(5);

/// What a dry run tells.
#[derive(Debug)]
pub struct Foretold {
    /// Pages of the guest that the destination has.
    pub recalled: u64,
    /// Contents of others that it shares.
    pub shareable: u64,
    /// What was found in the guest's memory.
    pub memory: Survey,
    /// What the move would take.
    pub predicted: Option<Prediction>,
}

/// Asks what it would take to move the guest of `from` to `to`, over `link`, whose first end is the
/// source's and which takes `rate` bytes a second.
///
/// # Errors
/// What breaks on either side.
pub fn foretell(
    from: &Arc<Site>,
    to: &Arc<Site>,
    link: (Link, Link),
    rate: u64,
) -> Result<Foretold> {
    let (near, far) = link;
    thread::scope(|scope| {
        let answering = scope.spawn(move || answer(to, far));
        let told = ask(from, near, rate);
        let answered = answering
            .join()
            .unwrap_or_else(|why| std::panic::resume_unwind(why));
        answered.and(told)
    })
}

fn ask(from: &Arc<Site>, link: Link, rate: u64) -> Result<Foretold> {
    let shadows = Shadows::new(&from.directories, ShadowPolicy::default());
    let key = shadows.key_for(UUID)?;
    let digester = Digester::new(&key);
    let nobody = Arc::new(|_| Ok(()));
    let mut guest = ReplaySource::open(from, &key, TrackerKind::LogDirty, 1, nobody)?;
    let move_id = MoveId::from_random(random()?);
    let mut offer = offer(&mut guest, move_id, &key, false);
    offer.purpose = Purpose::DryRun;
    let asked = Asked {
        shadows: &shadows,
        uuid: UUID,
        key: &key,
        digester: &digester,
        pages: guest.facts().pages,
        populated: guest.populated(),
    };
    let mut peer = Conversation::start("destination", link, Role::Source, None, Arc::default());
    peer.greet(Instant::now() + GREETING)?;
    let answer = ask_over(&mut peer, Some(rate), offer, &asked, from.group().as_ref());
    peer.close();
    let learned = answer?.learned;
    let memory = survey(
        &mut guest,
        learned.held,
        &digester,
        rate as f64,
        SURVEYING,
        &|| false,
    )?;
    Ok(Foretold {
        recalled: learned.recalled,
        shareable: learned.shareable.unwrap_or(0),
        predicted: memory.predict(
            rate as f64,
            &FixedCost::default(),
            &Limits::default(),
            TrackerKind::LogDirty,
            false,
        ),
        memory,
    })
}

fn answer(to: &Arc<Site>, link: Link) -> Result<()> {
    let peer = Conversation::start("source", link, Role::Destination, None, Arc::default());
    let mut take = |_: &Offer| Err(Error::Refused("Nobody was to come".into()));
    let mut judge = |offer: &Offer| {
        let shadows = Shadows::new(&to.directories, ShadowPolicy::default());
        let sharing = match to.group() {
            Some(group) => Sharing::with(&shadows, group, &offer.uuid)?,
            None => None,
        };
        Ok(Willing::new(offer, xen(), &[], shadows, sharing))
    };
    destination::run(peer, &mut take, &mut judge)
}
