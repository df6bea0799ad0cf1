//! What a guest's move does to one connection, up to the release.
//!
//! ```text
//!  hold      nothing is written to the guest any more
//!  freeze    the socket hears nothing from it any more
//!  retarget  a new socket with the old one's state, towards the other site; it has sent nothing yet
//!  ask       whether the guest answers that one
//! ```
//!
//! The release is in [`releasing`](super::releasing), and what a move that is given up does in
//! [`going_back`](super::going_back).

use std::net::SocketAddr;
use std::time::Duration;

use mio::net::TcpStream;
use socket2::SockRef;

use super::releasing::Proving;
use super::{Connection, Context, Stage, Upstream, tune};
use crate::error::{Error, Result};
use crate::repair::state::Snapshot;
use crate::repair::{self, RestoreOptions};
use crate::site::Forward;
use crate::splice::Endpoint;

/// A connection with a new socket that has sent nothing yet.
#[derive(Debug)]
pub(super) struct Moved {
    /// The old socket, in repair mode. None if the new one has the very same addresses.
    pub(super) old: Option<TcpStream>,
    pub(super) snapshot: Snapshot,
    /// What the old one had to reach, if it had not yet when it was held.
    pub(super) before: Option<Box<Proving>>,
}

/// What a step of a move did to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// It has no upstream connection now.
    Waits,
    /// It took the step.
    Taken,
    /// It could not, and is closed at the release.
    Failed,
    /// Its client has gone meanwhile, and the guest is told: it ends as it would without a move.
    Gone,
}

/// Where the guest is reached now, and where at another site.
pub(crate) type Way = (SocketAddr, SocketAddr);

impl Connection {
    pub(crate) fn is_waiting(&self) -> bool {
        matches!(self.upstream, Upstream::Waiting)
    }

    /// Whether a move has hold of it: what is only prepared touches no connection.
    pub(crate) fn is_held(&self) -> bool {
        !matches!(self.stage, Stage::Normal | Stage::Proving(_))
    }

    /// Where it leads now, and where it would while the guest is at `site`.
    pub(crate) fn way(&self, site: &str) -> Option<Way> {
        Some((self.upstream_address()?, self.target(site)?))
    }

    /// Where it would lead while the guest is at `site`.
    fn target(&self, site: &str) -> Option<SocketAddr> {
        let to = self.guest.settings().upstream(site, &self.service)?;
        let now = self.upstream_address();
        // Where it is at that address already it stays as it is: of another port, which a reload
        // has given to the service since, the site may know nothing yet.
        Some(now.filter(|now| now.ip() == to.ip()).unwrap_or(to))
    }

    /// What sites have to translate for it.
    pub(crate) fn forward(&self) -> Forward {
        self.guest.settings().forward(&self.service)
    }

    /// The round trip time to the guest, if known.
    pub(crate) fn rtt(&self) -> Option<Duration> {
        let Upstream::Open(endpoint) = &self.upstream else {
            return None;
        };
        let info = repair::tcp_info(&endpoint.stream).ok()?;
        (info.rtt_us > 0)
            .then(|| Duration::from_micros(u64::from(info.rtt_us) + u64::from(info.rtt_var_us)))
    }

    /// From now on nothing is written to the guest.
    pub(crate) fn hold(&mut self) -> Step {
        // One whose guest has ended it waits for its client only.
        let moves = !self.guest_is_lost();
        if moves && matches!(self.stage, Stage::Normal | Stage::Proving(_)) {
            let before = self.take_proving();
            let frozen = false;
            self.stage = Stage::Held { frozen, before };
            self.begin_anew();
        }
        if self.is_waiting() {
            Step::Waits
        } else {
            Step::Taken
        }
    }

    /// Takes what is still to be proved of an earlier move out of the stage, which is replaced
    /// next.
    fn take_proving(&mut self) -> Option<Box<Proving>> {
        match std::mem::replace(&mut self.stage, Stage::Normal) {
            Stage::Proving(proving) => Some(proving),
            Stage::Held { before, .. } => before,
            Stage::Moved(moved) => moved.before,
            Stage::Normal | Stage::Unmovable(_) => None,
        }
    }

    /// The upstream socket hears nothing from now on. One that is being opened is dropped: the
    /// connection waits, and is opened anew at the release.
    pub(crate) fn freeze(&mut self) -> Step {
        match &self.upstream {
            Upstream::Waiting | Upstream::Connecting(..) => {
                self.upstream = Upstream::Waiting;
                return Step::Waits;
            }
            Upstream::Open(endpoint) => {
                if let Err(error) = repair::freeze(&endpoint.stream) {
                    self.unmovable(error.chain());
                    return Step::Failed;
                }
                // Deaf, it would take the guest for dead, and reset it.
                let _ = SockRef::from(&endpoint.stream).set_keepalive(false);
            }
        }
        let before = self.take_proving();
        let frozen = true;
        self.stage = Stage::Held { frozen, before };
        Step::Taken
    }

    pub(super) fn unmovable(&mut self, why: String) {
        log::warn!(
            "Connection {} of {}: {why}",
            self.admission.id,
            self.guest.name
        );
        self.stage = Stage::Unmovable(why);
    }

    /// Makes the upstream socket anew, towards `site`. The new one has sent nothing yet.
    pub(crate) fn retarget(&mut self, site: &str, mark: u32, ctx: &mut Context<'_>) -> Step {
        match self.stage {
            Stage::Unmovable(_) => return Step::Failed,
            Stage::Moved(_) => return Step::Taken,
            _ => {}
        }
        if !matches!(self.stage, Stage::Held { frozen: true, .. }) {
            match self.freeze() {
                Step::Taken => {}
                other => return other,
            }
        }
        match self.try_retarget(site, mark, ctx) {
            Ok(step) => step,
            Err(error) => {
                self.unmovable(error.chain());
                Step::Failed
            }
        }
    }

    fn try_retarget(&mut self, site: &str, mark: u32, ctx: &mut Context<'_>) -> Result<Step> {
        let remote = self.target(site).ok_or_else(|| Error::UnknownSite {
            guest: self.guest.name.clone(),
            site: site.to_owned(),
        })?;
        let Upstream::Open(endpoint) = &mut self.upstream else {
            return Ok(Step::Waits);
        };
        // Where the guest is already it stays as it is: what was translated there is so still.
        let stays = site == self.guest.site() && endpoint.stream.peer_addr().ok() == Some(remote);
        let port = *self.service.port.get_ref();
        if !stays && ctx.shared.is_anothers(remote, &self.guest.name, port) {
            return Err(Error::Taken(remote));
        }
        let (to_guest, to_client) = (self.to_guest.queued(), self.to_client.queued());
        let refuse_more = |unacknowledged: usize, unread: usize| {
            let (to_guest, to_client) = (unacknowledged + to_guest, unread + to_client);
            match ctx.limits.carry {
                Some(carry) if to_guest + to_client > carry.0 => Err(Error::TooMuch {
                    to_guest,
                    to_client,
                }),
                _ => Ok(()),
            }
        };
        let unread = repair::unread(&endpoint.stream)?;
        refuse_more(0, unread)?;
        // As if it had been read before. Its client may have it now.
        let taken = repair::drain(&endpoint.stream)?;
        self.to_client.push_back(&taken, &ctx.shared.budget);
        let snapshot = repair::dump(&endpoint.stream)?;
        refuse_more(snapshot.send.len(), taken.len() + snapshot.receive.len())?;
        let mark = ctx
            .shared
            .mark
            .load(std::sync::atomic::Ordering::Acquire)
            .then_some(mark);
        let waiting = to_client + snapshot.receive.len();
        let options = RestoreOptions {
            remote,
            mark,
            waiting,
        };
        let registered = |source| Error::Repair {
            step: "watch",
            source,
        };
        // Two sockets can't have the same addresses on both ends: what has them goes first.
        ctx.late.forget(snapshot.local, remote);
        let in_place = remote == snapshot.remote;
        let socket = if in_place {
            let Upstream::Open(mut old) = std::mem::replace(&mut self.upstream, Upstream::Waiting)
            else {
                return Ok(Step::Waits);
            };
            let clock = repair::clock(&old.stream)?;
            ctx.registry
                .deregister(&mut old.stream)
                .map_err(registered)?;
            repair::vacate(&old.stream)?;
            drop(old);
            repair::restore(&snapshot, options, clock)?
        } else {
            repair::restore(&snapshot, options, repair::clock(&endpoint.stream)?)?
        };
        // Without keep-alive: nobody can answer before the release, and the kernel would end a
        // healthy connection of which the guest, out of reach, is not even told.
        tune(SockRef::from(&socket), ctx.limits)
            .and_then(|()| SockRef::from(&socket).set_keepalive(false))
            .map_err(|source| Error::Repair {
                step: "set up",
                source,
            })?;
        let mut stream = TcpStream::from_std(socket.into());
        if let Upstream::Open(endpoint) = &mut self.upstream {
            ctx.registry
                .deregister(&mut endpoint.stream)
                .map_err(registered)?;
        }
        self.register(&mut stream, ctx).map_err(registered)?;
        let mut endpoint = Endpoint::new(stream);
        // It has heard nothing yet, and from now on epoll says when it does.
        endpoint.readable = false;
        endpoint.more = false;
        let new = Upstream::Open(endpoint);
        let old = match std::mem::replace(&mut self.upstream, new) {
            Upstream::Open(endpoint) => Some(endpoint.stream),
            _ => None,
        };
        let before = self.take_proving();
        self.stage = Stage::Moved(Box::new(Moved {
            old,
            snapshot,
            before,
        }));
        Ok(Step::Taken)
    }

    /// Sends a probe to the guest, and says whether it has ever answered the new socket. None if
    /// this connection can't tell.
    pub(crate) fn ask(&self) -> Option<bool> {
        let (Stage::Moved(_), Upstream::Open(endpoint)) = (&self.stage, &self.upstream) else {
            return None;
        };
        let info = repair::tcp_info(&endpoint.stream).ok()?;
        if !info.state.is_movable() {
            // Somebody else answered, with a reset.
            return None;
        }
        if info.segments_in > 0 {
            return Some(true);
        }
        repair::kick(&endpoint.stream).ok()?;
        Some(false)
    }
}
