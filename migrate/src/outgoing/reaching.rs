//! The connections of one attempt: ssh's first one, and those for pages, by ssh or directly.

use std::io;

use crate::error::{Result, chain};
use crate::link::direct::{self, Direct, Ends, Identity, PublicKey};
use crate::link::ssh::{Remote, Session};
use crate::link::{BBR, Link, Reach};
use crate::wire::{DirectDoor, MoveId};

/// They end with this, but for the first.
pub(super) struct Reached<'a> {
    remote: &'a Remote,
    move_id: MoveId,
    /// Which carries all but pages.
    first: Session,
    by_ssh: Vec<Session>,
    directly: Vec<Direct>,
    /// Whether there may be any of these.
    allowed: bool,
    /// Who this site is to them, and where they go; none until they are offered.
    other_end: Option<(Identity, Ends)>,
    /// Nobody looks any more whether packets are lost: somebody chose how connections send, or they go
    /// by what fills such a link.
    settled: bool,
}

impl<'a> Reached<'a> {
    /// Of which there is the first one. Whether there may be others directly is for `allowed`.
    pub(super) fn new(
        remote: &'a Remote,
        move_id: MoveId,
        first: Session,
        allowed: bool,
    ) -> Reached<'a> {
        Reached {
            remote,
            move_id,
            first,
            by_ssh: Vec::new(),
            directly: Vec::new(),
            allowed,
            other_end: None,
            settled: remote.congestion.is_some(),
        }
    }

    /// The first one. The others are closed.
    pub(super) fn into_first(self) -> Session {
        self.first
    }
}

impl Reach for Reached<'_> {
    fn reached(&mut self) -> Result<Option<String>> {
        let first = self.first.follow_congestion()?;
        // One that could not join has none, and is not needed.
        for session in &self.by_ssh {
            if let Err(error) = session.follow_congestion() {
                log::info!("{}", chain(&error));
            }
        }
        // What pages go by is what counts.
        let direct = self.directly.iter().find_map(Direct::congestion);
        Ok(direct.or(first))
    }

    fn tend(&mut self) -> Option<String> {
        if self.settled {
            return None;
        }
        let mut seen = vec![self.first.loses_packets()];
        seen.extend(self.by_ssh.iter_mut().map(Session::loses_packets));
        seen.extend(self.directly.iter_mut().map(Direct::loses_packets));
        let lossy = |seen: io::Result<bool>| {
            seen.inspect_err(|error| log::debug!("A connection can't be looked at: {error}"))
                .unwrap_or(false)
        };
        if !seen.into_iter().any(lossy) {
            return None;
        }
        // All go the same way: what one of them sees holds for the others, which may be too slow by
        // now to see it soon.
        self.settled = true;
        let mut followed = vec![self.first.follow_bbr()];
        followed.extend(self.by_ssh.iter().map(Session::follow_bbr));
        followed.extend(self.directly.iter().map(Direct::follow_bbr));
        let changed = |followed: io::Result<bool>| {
            followed
                .inspect_err(|error| {
                    log::warn!("Packets are lost on the way, and {BBR} can't be had: {error}");
                })
                .unwrap_or(false)
        };
        followed.into_iter().any(changed).then(|| BBR.to_owned())
    }

    fn open(&mut self) -> Result<Link> {
        let (link, session) = self.remote.join(self.move_id)?;
        self.by_ssh.push(session);
        Ok(link)
    }

    fn key(&mut self) -> Option<PublicKey> {
        if !self.allowed {
            return None;
        }
        let ends = match self.first.ends() {
            Ok(Some(ends)) => ends,
            Ok(None) => {
                log::info!("Pages go by ssh, which has no connection of its own");
                return None;
            }
            Err(error) => {
                log::info!("Pages go by ssh, whose connection can't be looked at: {error}");
                return None;
            }
        };
        let identity = Identity::new()
            .inspect_err(|error| log::warn!("{}", chain(error)))
            .ok()?;
        let (identity, _) = self.other_end.insert((identity, ends));
        Some(identity.public())
    }

    fn open_directly(&mut self, door: &DirectDoor, count: usize, window: u32) -> Vec<Result<Link>> {
        let Some((identity, ends)) = &self.other_end else {
            return Vec::new();
        };
        let congestion = self.remote.congestion.as_deref();
        let made = direct::connect(identity, *ends, door, count, window, congestion);
        let links = made.into_iter().map(|made| {
            made.map(|(link, direct)| {
                self.directly.push(direct);
                link
            })
        });
        links.collect()
    }
}
