//! From the hello to an answer to the offer, and what the destination has of the guest already.

use std::mem::take;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::learning::{Asked, learn};
use super::{Greeted, Offered, Session};
use crate::error::{Error, Result, chain};
use crate::hold::hold;
use crate::link::{
    Conversation, Joining, MAX_CONNECTIONS, OPENED_AT_ONCE, connections_for,
    direct_connections_for, direct_window_for,
};
use crate::report::{Progress, rounded};
use crate::wire::{
    Acceptance, DirectDoor, DirectOffer, JoinToken, MoveId, Offer, RefusalCode, Text,
    ToDestination, ToSource,
};

/// How long the other site may take to greet: ssh and the start of a program, emulated.
const GREETING: Duration = Duration::from_secs(60);

/// How long the other site may take to accept: it waits for memory, and for xl's lock, and reads all
/// of a shadow that it has. The guest runs meanwhile, and heartbeats tell whether the other site lives.
const ACCEPTING: Duration = Duration::from_secs(3600);

/// How long connections for pages may take to join: as the first one, and they start at once.
const JOINING: Duration = Duration::from_secs(60);

/// Who answers as soon as this is not far: in the same building, mostly.
const NEAR: Duration = Duration::from_millis(1);

/// What a link within a building is expected to carry, bytes a second: about as much as ssh
/// encrypts.
const NEAR_CARRIES: f64 = 500e6;

/// What is expected of a link before anything was sent by it, bytes a second: what it carried in
/// `earlier` moves, else that it is fast where the other site is near; no more than the `limit`.
fn expected_link(earlier: Option<f64>, limit: Option<u64>, round_trip: Duration) -> Option<f64> {
    let carries = earlier.or_else(|| (round_trip < NEAR).then_some(NEAR_CARRIES));
    let limit = limit.map(|limit| limit as f64);
    [carries, limit].into_iter().flatten().reduce(f64::min)
}

/// Connections for pages that are being opened.
struct Opening {
    token: JoinToken,
    /// Those that are to join.
    joining: Vec<Joining>,
    /// Those that are opened by ssh: once these have joined, or where none of these could.
    left: Range<u32>,
    /// Those that are to join don't go by ssh. If they do, no others are opened.
    direct: bool,
}

/// Connections for pages, as this side would have them.
struct Wanted {
    /// How many, where they go by ssh; none where one is enough.
    by_ssh: u32,
    /// How they are to go otherwise, where they are.
    direct: Option<DirectOffer>,
}

impl Wanted {
    /// As many as may come, whichever way.
    fn most(&self) -> u32 {
        let direct = self.direct.map_or(0, |direct| direct.connections);
        self.by_ssh.max(direct)
    }
}

impl Session<'_> {
    pub(super) fn greet(&mut self) -> Result<Greeted> {
        self.phase("connecting");
        hold("connecting");
        self.go.peer.greet(Instant::now() + GREETING)?;
        self.report.link.congestion = self.go.reach.reached()?;
        self.watch.lap("connect");
        let start = Instant::now();
        self.go.peer.send(&ToDestination::Ping(1))?;
        match self.receive(GREETING)? {
            ToSource::Pong(1) => {}
            other => return Err(self.unexpected(&other)),
        }
        let round_trip = start.elapsed();
        self.report.link.rtt_ms = rounded(round_trip) * 1e3;
        let (earlier, limit) = (self.go.earlier.link, self.go.peer.limit());
        if let Some(link) = expected_link(earlier, limit, round_trip) {
            self.encoder.expect(link);
        }
        Ok(Greeted)
    }

    pub(super) fn offer(&mut self, _greeted: Greeted, mut offer: Offer) -> Result<Offered> {
        self.phase("offering");
        hold("offering");
        let wanted = self.wanted();
        offer.connections = wanted.most();
        offer.direct = wanted.direct;
        let move_id = offer.move_id;
        self.go.peer.send(&ToDestination::Offer(Box::new(offer)))?;
        let refused = |peer: &Conversation, code, reason: Text| Error::RefusedByPeer {
            peer: peer.peer().to_owned(),
            code,
            reason: reason.to_string(),
        };
        match self.receive(ACCEPTING)? {
            ToSource::Accept(accept) => {
                for warning in &accept.warnings {
                    self.go
                        .observer
                        .notice(Progress::Warning(warning.to_string()));
                }
                let site = accept.edge_site.as_ref().map(ToString::to_string);
                self.go.connections.accepted(site.as_deref())?;
                let opening = match accept.join {
                    Some(token) => Some(self.open_first(token, &wanted, accept.direct)?),
                    None => None,
                };
                self.learn(&accept, move_id)?;
                self.spread(opening)?;
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

    /// Which connections pages are to go by.
    fn wanted(&mut self) -> Wanted {
        let plan = &self.go.plan;
        let round_trip = Duration::from_secs_f64(self.report.link.rtt_ms / 1e3);
        let limit = self.go.peer.limit();
        let asked = plan
            .connections
            .map(|asked| asked.get().min(MAX_CONNECTIONS));
        let by_ssh = asked.unwrap_or_else(|| {
            connections_for(limit, self.go.earlier.link, round_trip, plan.cores())
        });
        let key = match asked {
            Some(1) => None,
            _ => self.go.reach.key(),
        };
        let direct = key.map(|key| {
            let count = asked.unwrap_or_else(|| direct_connections_for(limit, round_trip));
            DirectOffer {
                key,
                connections: count as u32,
                window: direct_window_for(limit, round_trip, count),
            }
        });
        Wanted {
            // One connection is there already, and needs no other beside it.
            by_ssh: match by_ssh {
                1 => 0,
                more => more as u32,
            },
            direct,
        }
    }

    /// Opens connections for pages, directly where the destination takes them so, else the first of
    /// them by ssh. They join while this side goes on.
    fn open_first(
        &mut self,
        token: JoinToken,
        wanted: &Wanted,
        door: Option<DirectDoor>,
    ) -> Result<Opening> {
        let mut opening = Opening {
            token,
            joining: Vec::new(),
            left: 0..wanted.by_ssh,
            direct: false,
        };
        let (Some(door), Some(offered)) = (door, &wanted.direct) else {
            self.open_next(&mut opening)?;
            return Ok(opening);
        };
        let (count, window) = (offered.connections as usize, offered.window);
        let links = self.go.reach.open_directly(&door, count, window);
        opening.direct = links.iter().any(Result::is_ok);
        if !opening.direct {
            let why = links.into_iter().find_map(Result::err);
            self.goes_by_ssh(&why.map_or("none was made".into(), |error| chain(&error)));
            self.open_next(&mut opening)?;
            return Ok(opening);
        }
        for (index, link) in (0..).zip(links) {
            let joining = link.and_then(|link| Joining::start(&self.go.peer, link, token, index));
            opening.joining.extend(self.if_made(joining)?);
        }
        Ok(opening)
    }

    fn goes_by_ssh(&mut self, why: &str) {
        self.go.observer.notice(Progress::Warning(format!(
            "Pages go by ssh, as {} can't be reached directly: {why}",
            self.go.peer.peer()
        )));
    }

    /// Opens the next of the connections for pages. They join while this side goes on.
    fn open_next(&mut self, opening: &mut Opening) -> Result<()> {
        for index in opening.left.by_ref().take(OPENED_AT_ONCE) {
            let opened = self
                .go
                .reach
                .open()
                .and_then(|link| Joining::start(&self.go.peer, link, opening.token, index));
            opening.joining.extend(self.if_made(opened)?);
        }
        Ok(())
    }

    /// Another connection, if it could be made. It is done without else, unless all of the move is
    /// over.
    fn if_made<T>(&mut self, made: Result<T>) -> Result<Option<T>> {
        match made {
            Ok(connection) => Ok(Some(connection)),
            Err(error @ (Error::Cancelled | Error::Stalled { .. })) => Err(error),
            Err(error) => {
                self.go.observer.notice(Progress::Warning(format!(
                    "A connection for pages can't be made: {}",
                    chain(&error)
                )));
                Ok(None)
            }
        }
    }

    /// From here on pages go by those that have joined; without any, by the first one.
    fn spread(&mut self, opening: Option<Opening>) -> Result<()> {
        hold("joining");
        let mut joined = Vec::new();
        let mut direct = false;
        if let Some(mut opening) = opening {
            loop {
                for connection in Joining::finish_all(take(&mut opening.joining), JOINING) {
                    joined.extend(self.if_made(connection)?);
                }
                if opening.direct && joined.is_empty() {
                    // They are turned away once they are open where the other side doesn't know them.
                    opening.direct = false;
                    self.goes_by_ssh("none of the connections could join");
                } else if opening.direct || opening.left.is_empty() {
                    break;
                }
                self.open_next(&mut opening)?;
            }
            direct = opening.direct;
        }
        self.report.link.connections = joined.len().max(1) as u32;
        self.report.link.direct = direct;
        if !joined.is_empty() {
            self.report.link.congestion = self.go.reach.reached()?;
        }
        let queue = self.go.plan.queue();
        self.go.peer.spread_over(joined, queue)
    }

    /// What the destination has already, of the guest and of others.
    fn learn(&mut self, accepted: &Acceptance, move_id: MoveId) -> Result<()> {
        let group = self.go.group.take();
        let asked = Asked {
            shadows: self.go.shadows,
            uuid: &self.report.uuid,
            key: &self.key,
            digester: &self.go.digester,
            pages: self.held.table().pages(),
            populated: self.go.guest.populated(),
        };
        let learned = learn(&mut self.go.peer, accepted, &asked, group.as_ref(), move_id)?;
        if let (Some(0), Some(group)) = (learned.shareable, group) {
            self.go.observer.notice(Progress::Warning(format!(
                "{} shares nothing of trust group {}: is the key the same there?",
                self.go.peer.peer(),
                group.name()
            )));
        }
        self.report.recalled = learned.recalled;
        self.report.shareable = learned.shareable.unwrap_or(0);
        self.held = learned.held;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_expected_to_be_as_it_was() {
        let far = Duration::from_millis(40);
        let near = Duration::from_micros(200);
        for (earlier, limit, round_trip, expected) in [
            (None, None, far, None),
            (None, Some(1_000_000), far, Some(1e6)),
            (Some(6e6), None, far, Some(6e6)),
            (Some(6e6), Some(1_000_000), far, Some(1e6)),
            (Some(6e6), Some(9_000_000), far, Some(6e6)),
            (None, None, near, Some(NEAR_CARRIES)),
            (None, Some(1_000_000), near, Some(1e6)),
            (Some(6e6), None, near, Some(6e6)),
        ] {
            assert_eq!(expected_link(earlier, limit, round_trip), expected);
        }
    }
}
