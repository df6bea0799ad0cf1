//! What the destination has already, as it tells: of the guest itself, and of others of its trust
//! group.
//!
//! ```text
//!   Accept ------> a shadow? ----> its table is known here: nothing is asked
//!                     |      \---> else its inventory comes
//!                     v
//!                  less than half of the guest, and a group? ---> names of shared contents
//! ```
//!
//! A move asks so before its first page, and a dry run before it foretells.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::HANDLING;
use crate::digest::{DigestKey, Digester};
use crate::error::{Error, Result};
use crate::group::{Group, Known};
use crate::guest::PageTable;
use crate::held::{HOT_BYTES, Held};
use crate::link::{Conversation, Received};
use crate::shadow::{Shadows, inventory};
use crate::wire::{Acceptance, GroupOffer, Message, MoveId, ShadowHead, ToDestination, ToSource};

/// How long the destination may take to read what it has of other guests. Heartbeats tell whether it
/// lives.
const READING: Duration = Duration::from_secs(3600);

/// The guest that the destination is asked about.
pub(crate) struct Asked<'a> {
    /// What this site knows of it.
    pub shadows: &'a Shadows,
    /// Its UUID.
    pub uuid: &'a str,
    /// The secret of its digests.
    pub key: &'a DigestKey,
    /// Made of that.
    pub digester: &'a Digester,
    /// The length of its table.
    pub pages: u64,
    /// How many of them it has.
    pub populated: u64,
}

/// What was told.
pub(crate) struct Learned {
    /// What the destination holds.
    pub held: Held,
    /// Pages of the guest among it.
    pub recalled: u64,
    /// Contents of others, where those were asked for.
    pub shareable: Option<u64>,
}

impl Asked<'_> {
    /// A destination that has nothing.
    pub(crate) fn nothing(&self) -> Learned {
        Learned {
            held: Held::nothing(self.pages, self.digester.clone(), HOT_BYTES),
            recalled: 0,
            shareable: None,
        }
    }
}

/// Asks the destination that has accepted the guest what it has already. `group` is the guest's
/// own, if this site has made one.
///
/// # Errors
/// [`Error::Protocol`] for what makes no sense; what breaks the link.
pub(crate) fn learn(
    peer: &mut Conversation,
    accepted: &Acceptance,
    asked: &Asked<'_>,
    group: Option<&Group>,
    move_id: MoveId,
) -> Result<Learned> {
    let mut learned = asked.nothing();
    if let Some(head) = &accepted.shadow {
        let table = recall(peer, head, asked)?;
        learned.recalled = table.known().len();
        learned.held = Held::holding(table, asked.digester.clone(), HOT_BYTES);
    }
    // What the guest itself has left there tells more than names of others' pages, where it is
    // more than what arrived of a copy that broke.
    if let (Some(offer), Some(group)) = (&accepted.group, group)
        && learned.recalled < asked.populated / 2
        && group.name() == offer.name.as_str()
    {
        let known = ask_shared(peer, offer, group, move_id)?;
        learned.shareable = Some(known.len() as u64);
        learned.held.share(known);
    }
    Ok(learned)
}

/// The destination has a shadow of the guest: what is in it.
fn recall(peer: &mut Conversation, head: &ShadowHead, asked: &Asked<'_>) -> Result<PageTable> {
    let known = head.basis.and_then(|basis| {
        let known = asked.shadows.known(asked.uuid);
        known.filter(|(kept, _)| {
            (kept.digest, &kept.digest_key, kept.pages) == (basis, asked.key, asked.pages)
        })
    });
    peer.send(&ToDestination::Recall {
        known: known.is_some(),
    })?;
    match known {
        Some((_, mut table)) => {
            let runs = lacking(&head.lacking, asked.pages).ok_or_else(|| {
                broken(peer, "a shadow that lacks no pages of the guest's".into())
            })?;
            runs.for_each(|run| run.for_each(|pfn| table.forget(pfn)));
            Ok(table)
        }
        None => receive_inventory(peer, asked.pages, asked.digester),
    }
}

/// The runs of pages that a shadow lacks, each its first page and how many. None where they are not
/// in order, reach beyond the guest's memory, or say a page twice: each costs its time.
fn lacking(runs: &[(u64, u64)], pages: u64) -> Option<impl Iterator<Item = Range<u64>>> {
    let mut end = 0;
    for (first, count) in runs {
        if *first < end {
            return None;
        }
        end = first.checked_add(*count).filter(|end| *end <= pages)?;
    }
    Some(runs.iter().map(|(first, count)| *first..first + count))
}

fn receive_inventory(
    peer: &mut Conversation,
    pages: u64,
    digester: &Digester,
) -> Result<PageTable> {
    let mut table = PageTable::new(pages);
    let mut next = 0;
    while next < pages {
        let (first, runs) = match receive(peer, HANDLING)? {
            ToSource::Inventory { first, runs } => (first, runs),
            other => return Err(unexpected(peer, &other)),
        };
        if first != next {
            return Err(broken(peer, "an inventory with a gap".into()));
        }
        next = inventory::decode(&runs, digester, first, &mut table)
            .map_err(|error| broken(peer, error.to_string()))?;
        if next == first {
            return Err(broken(peer, "an inventory of nothing".into()));
        }
    }
    Ok(table)
}

/// The destination shares contents of a trust group: their names, if it finds that this side has
/// the group's key.
fn ask_shared(
    peer: &mut Conversation,
    offer: &GroupOffer,
    group: &Group,
    move_id: MoveId,
) -> Result<Known> {
    let proof = group.prove(&offer.nonce, move_id);
    peer.send(&ToDestination::Prove(proof))?;
    let mut known = Known::nothing(group);
    loop {
        let (total, names) = match receive(peer, READING)? {
            ToSource::Shares { total, names } => (total, names),
            other => return Err(unexpected(peer, &other)),
        };
        let all = known
            .take(total, &names)
            .map_err(|error| broken(peer, error.to_string()))?;
        if all {
            return Ok(known);
        }
    }
}

/// The next message, but for those that only ask for a sign of life.
pub(crate) fn receive(peer: &mut Conversation, patience: Duration) -> Result<ToSource> {
    let deadline = Instant::now() + patience;
    loop {
        let received: Received = peer.receive(deadline)?;
        match ToSource::decode(received.frame())? {
            ToSource::Ping(token) => peer.send(&ToDestination::Pong(token))?,
            message => return Ok(message),
        }
    }
}

/// A message that does not belong there.
pub(crate) fn unexpected(peer: &Conversation, message: &ToSource) -> Error {
    match message {
        ToSource::Failed(reason) => Error::PeerFailed {
            peer: peer.peer().to_owned(),
            reason: reason.to_string(),
        },
        other => broken(peer, format!("{:?} out of order", other.tag())),
    }
}

fn broken(peer: &Conversation, what: String) -> Error {
    Error::Protocol {
        peer: peer.peer().to_owned(),
        what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_shadow_lacks_is_said_in_order_and_once() {
        let found = |runs: &[(u64, u64)]| Some(lacking(runs, 100)?.flatten().collect::<Vec<_>>());
        assert_eq!(found(&[]), Some(vec![]));
        assert_eq!(found(&[(3, 2), (5, 1), (99, 1)]), Some(vec![3, 4, 5, 99]));
        for wrong in [
            &[(5, 1), (3, 2)][..],
            &[(3, 2), (4, 1)],
            &[(99, 2)],
            &[(u64::MAX, 2)],
            &[(0, 1 << 40), (0, 1 << 40)],
        ] {
            assert_eq!(found(wrong), None, "{wrong:?}");
        }
    }
}
