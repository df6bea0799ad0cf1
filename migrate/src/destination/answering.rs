//! What is said before a page crosses: the offer is heard, and the source told what is here of its
//! guest, and of others of its trust group.

use std::time::Instant;

use super::{PATIENCE, Sharing, Willing, unexpected};
use crate::digest::Digester;
use crate::error::{Error, Result};
use crate::group::{Library, NAME_SIZE, Proof};
use crate::guest::PageTable;
use crate::link::Conversation;
use crate::shadow::{Shadows, inventory};
use crate::wire::{MAX_SHARES, Offer, ToDestination, ToSource};

pub(super) fn receive_offer(peer: &mut Conversation) -> Result<Box<Offer>> {
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
pub(super) fn foretell(peer: &mut Conversation, offer: &Offer, willing: Willing) -> Result<()> {
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
pub(super) fn send_inventory(
    peer: &mut Conversation,
    table: &PageTable,
    digester: &Digester,
) -> Result<()> {
    for first in (0..table.pages()).step_by(inventory::CHUNK_PAGES as usize) {
        let end = first + inventory::CHUNK_PAGES;
        let mut runs = Vec::new();
        inventory::encode(table, digester, first, end, &mut runs);
        peer.send(&ToSource::Inventory { first, runs })?;
    }
    Ok(())
}

/// Tells the source what is here of other guests, if it has the key of their group. Asked once.
pub(super) fn share(
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
