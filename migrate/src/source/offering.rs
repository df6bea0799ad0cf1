//! From the hello to an answer to the offer, and what the destination has of the guest already.

use std::time::{Duration, Instant};

use super::{Greeted, HANDLING, Offered, Session};
use crate::error::{Error, Result, chain};
use crate::group::Known;
use crate::guest::PageTable;
use crate::held::{HOT_BYTES, Held};
use crate::hold::hold;
use crate::link::{Conversation, Joining, MAX_CONNECTIONS, connections_for};
use crate::report::{Progress, rounded};
use crate::shadow::inventory;
use crate::wire::{
    GroupOffer, JoinToken, MoveId, Offer, RefusalCode, ShadowHead, Text, ToDestination, ToSource,
};

/// How long the other site may take to greet: ssh and the start of a program, emulated.
const GREETING: Duration = Duration::from_secs(60);

/// How long the other site may take to accept: it waits for memory, and for xl's lock.
const ACCEPTING: Duration = Duration::from_secs(240);

/// How long connections for pages may take to join: as the first one, and they start at once.
const JOINING: Duration = Duration::from_secs(60);

impl Session<'_> {
    pub(super) fn greet(&mut self) -> Result<Greeted> {
        self.phase("connecting");
        hold("connecting");
        self.go.peer.greet(Instant::now() + GREETING)?;
        self.watch.lap("connect");
        let start = Instant::now();
        self.go.peer.send(&ToDestination::Ping(1))?;
        match self.receive(GREETING)? {
            ToSource::Pong(1) => {}
            other => return Err(self.unexpected(&other)),
        }
        self.report.link.rtt_ms = rounded(start.elapsed()) * 1e3;
        Ok(Greeted)
    }

    pub(super) fn offer(&mut self, _greeted: Greeted, mut offer: Offer) -> Result<Offered> {
        self.phase("offering");
        hold("offering");
        // One connection is there already, and needs no other beside it.
        offer.connections = match self.connections() {
            1 => 0,
            more => more as u32,
        };
        let (wanted, move_id) = (offer.connections, offer.move_id);
        self.go.peer.send(&ToDestination::Offer(Box::new(offer)))?;
        let refused = |peer: &Conversation, code, reason: Text| Error::RefusedByPeer {
            peer: peer.peer().to_owned(),
            code,
            reason: reason.to_string(),
        };
        match self.receive(ACCEPTING)? {
            ToSource::Accept(accept) => {
                for warning in accept.warnings {
                    self.go
                        .observer
                        .notice(Progress::Warning(warning.to_string()));
                }
                let site = accept.edge_site.map(|site| site.to_string());
                self.go.connections.accepted(site.as_deref())?;
                let joining = match accept.join {
                    Some(token) => self.open_connections(token, wanted),
                    None => Vec::new(),
                };
                if let Some(head) = &accept.shadow {
                    self.recall(head)?;
                }
                // What the guest itself has left there tells more than names of others' pages,
                // where it is more than what arrived of a copy that broke.
                if let Some(group) = &accept.group
                    && self.report.recalled < self.go.guest.populated() / 2
                {
                    self.learn_shared(group, move_id)?;
                }
                self.spread(joining)?;
            }
            ToSource::Refuse(refusal) => {
                return Err(refused(&self.go.peer, refusal.code, refusal.reason));
            }
            ToSource::Failed(reason) => {
                return Err(refused(&self.go.peer, RefusalCode::Other, reason));
            }
            other => return Err(self.unexpected(&other)),
        }
        self.watch.lap("offer");
        Ok(Offered)
    }

    /// How many connections pages are to go by.
    fn connections(&self) -> usize {
        let plan = &self.go.plan;
        let round_trip = Duration::from_secs_f64(self.report.link.rtt_ms / 1e3);
        plan.connections.map_or_else(
            || connections_for(self.go.peer.limit(), round_trip, plan.cores()),
            |asked| asked.get().min(MAX_CONNECTIONS),
        )
    }

    /// Opens connections for pages. They join while this side goes on.
    fn open_connections(&mut self, token: JoinToken, wanted: u32) -> Vec<Joining> {
        let mut joining = Vec::new();
        for index in 0..wanted {
            let opened =
                (self.go.open)().and_then(|link| Joining::start(&self.go.peer, link, token, index));
            match opened {
                Ok(connection) => joining.push(connection),
                Err(error) => self.warn_of_connection(&error),
            }
        }
        joining
    }

    fn warn_of_connection(&mut self, error: &Error) {
        self.go.observer.notice(Progress::Warning(format!(
            "A connection for pages can't be made: {}",
            chain(error)
        )));
    }

    /// From here on pages go by those that have joined; without any, by the first one.
    fn spread(&mut self, joining: Vec<Joining>) -> Result<()> {
        hold("joining");
        let mut joined = Vec::new();
        for connection in Joining::finish_all(joining, JOINING) {
            match connection {
                Ok(connection) => joined.push(connection),
                Err(Error::Cancelled) => return Err(Error::Cancelled),
                Err(error) => self.warn_of_connection(&error),
            }
        }
        self.report.link.connections = joined.len().max(1) as u32;
        let queue = self.go.plan.queue();
        self.go.peer.spread_over(joined, queue)
    }

    /// The destination has a shadow of the guest: learns what is in it, by what is known here or by
    /// its inventory.
    fn recall(&mut self, head: &ShadowHead) -> Result<()> {
        let pages = self.held.table().pages();
        let known = head.basis.and_then(|basis| {
            let known = self.go.shadows.known(&self.report.uuid);
            known.filter(|(kept, _)| {
                (kept.digest, &kept.digest_key, kept.pages) == (basis, &self.key, pages)
            })
        });
        self.go.peer.send(&ToDestination::Recall {
            known: known.is_some(),
        })?;
        let table = match known {
            Some((_, mut table)) => {
                for (first, count) in &head.lacking {
                    let end = first.saturating_add(*count).min(pages);
                    (*first..end).for_each(|pfn| table.forget(pfn));
                }
                table
            }
            None => self.receive_inventory(pages)?,
        };
        self.report.recalled = (0..pages).filter(|pfn| table.get(*pfn).is_some()).count() as u64;
        self.held = Held::holding(table, self.go.digester.clone(), HOT_BYTES);
        Ok(())
    }

    /// The destination shares contents of a trust group: learns their names, where this side has
    /// the group's key.
    fn learn_shared(&mut self, offer: &GroupOffer, move_id: MoveId) -> Result<()> {
        let Some(group) = self.go.group.take() else {
            return Ok(());
        };
        if group.name() != offer.name.as_str() {
            return Ok(());
        }
        let proof = group.prove(&offer.nonce, move_id);
        self.go.peer.send(&ToDestination::Prove(proof))?;
        let mut known = Known::nothing(&group);
        loop {
            let (total, names) = match self.receive(HANDLING)? {
                ToSource::Shares { total, names } => (total, names),
                other => return Err(self.unexpected(&other)),
            };
            let all = known
                .take(total, &names)
                .map_err(|error| self.broken(error.to_string()))?;
            if all {
                break;
            }
        }
        if known.is_empty() {
            self.go.observer.notice(Progress::Warning(format!(
                "{} shares nothing of trust group {}: is the key the same there?",
                self.go.peer.peer(),
                group.name()
            )));
        }
        self.report.shareable = known.len() as u64;
        self.held.share(known);
        Ok(())
    }

    fn broken(&self, what: String) -> Error {
        Error::Protocol {
            peer: self.go.peer.peer().to_owned(),
            what,
        }
    }

    fn receive_inventory(&mut self, pages: u64) -> Result<PageTable> {
        let mut table = PageTable::new(pages);
        let mut next = 0;
        while next < pages {
            let (first, runs) = match self.receive(HANDLING)? {
                ToSource::Inventory { first, runs } => (first, runs),
                other => return Err(self.unexpected(&other)),
            };
            if first != next {
                return Err(self.broken("an inventory with a gap".into()));
            }
            next = inventory::decode(&runs, &self.go.digester, first, &mut table)
                .map_err(|error| self.broken(error.to_string()))?;
            if next == first {
                return Err(self.broken("an inventory of nothing".into()));
            }
        }
        Ok(table)
    }
}
