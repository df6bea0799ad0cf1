//! What the steps of a guest's move do to one connection.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use socket2::SockRef;

use super::{Connection, Context, Next, Stage, Upstream, tune};
use crate::error::{Error, Result};
use crate::repair::state::{Snapshot, TcpState, covers};
use crate::repair::{self, RestoreOptions};
use crate::site::Forward;
use crate::splice::{End, Endpoint, Workspace};
use crate::upgrade::state::{Micros, ProvingState};

/// How often a released connection is looked at until the guest has answered.
const CHECK: Duration = Duration::from_millis(5);
/// How often, when all that is left to learn is that the guest has answered without data.
const ANSWER_CHECK: Duration = Duration::from_millis(20);
/// How often one is looked at whose guest does not answer for long.
const LATE_CHECK: Duration = Duration::from_millis(100);
/// How long the first flight has, beyond two round trips, to reach all that the guest may know.
const MARK: Duration = Duration::from_millis(20);
/// How long, beyond a round trip, before a probe is repeated at first; it doubles up to a second.
/// Not sooner: with a thousand connections the answers need a moment, and more probes more.
const FIRST_PROBE: Duration = Duration::from_millis(40);
/// After this, an answer is left to TCP's own timers.
const PROVING: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Moved {
    /// The old socket, in repair mode. None if the new one has the very same addresses.
    pub(super) old: Option<TcpStream>,
    snapshot: Snapshot,
    /// What the old one had to reach, if it had not yet when it was held.
    pub(super) before: Option<Box<Proving>>,
}

#[derive(Debug)]
pub(super) struct Proving {
    released: Instant,
    /// What the guest may acknowledge, counted from the first byte written again.
    in_flight: u32,
    /// `written` of the flow to the guest at the release.
    base: u64,
    rtt: Duration,
    covered: bool,
    answered: bool,
    /// It goes on where it was: how long that took is no stall of a move.
    went_back: bool,
    next_probe: Instant,
    probe_wait: Duration,
    /// When it is left to ordinary retransmission what is not sent again by then.
    next_mark: Instant,
    /// What is left to do of the release, when every connection has asked the guest.
    rest: Option<Rest>,
    /// There was nothing to ask the guest with: its client may send something before this has its
    /// turn.
    silent: bool,
    pub(super) next_check: Instant,
}

/// The part of a release that can wait.
#[derive(Debug, Clone, Copy)]
struct Rest {
    /// Bytes of the old socket's queue.
    pending: usize,
    /// The size that the send buffer gets back.
    send_buffer: usize,
}

impl Proving {
    pub(super) fn pack(&self, now: Instant) -> ProvingState {
        ProvingState {
            released: Micros::since(self.released, now),
            in_flight: self.in_flight,
            base: self.base,
            rtt: Micros::of(self.rtt),
            covered: self.covered,
            answered: self.answered,
            went_back: self.went_back,
            next_probe: Micros::until(self.next_probe, now),
            probe_wait: Micros::of(self.probe_wait),
            next_mark: Micros::until(self.next_mark, now),
        }
    }

    pub(super) fn unpack(state: &ProvingState, now: Instant) -> Self {
        Self {
            released: state.released.ago(now),
            in_flight: state.in_flight,
            base: state.base,
            rtt: state.rtt.time(),
            covered: state.covered,
            answered: state.answered,
            went_back: state.went_back,
            next_probe: state.next_probe.ahead(now),
            probe_wait: state.probe_wait.time(),
            next_mark: state.next_mark.ahead(now),
            rest: None,
            silent: false,
            next_check: now,
        }
    }
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

    /// Where it leads now, and where it would while the guest is at `site`.
    pub(crate) fn way(&self, site: &str) -> Option<Way> {
        let Upstream::Open(endpoint) = &self.upstream else {
            return None;
        };
        Some((endpoint.stream.peer_addr().ok()?, self.target(site)?))
    }

    /// Where it would lead while the guest is at `site`.
    fn target(&self, site: &str) -> Option<SocketAddr> {
        let to = self.guest.settings().upstream(site, &self.service)?;
        let now = match &self.upstream {
            Upstream::Open(endpoint) => endpoint.stream.peer_addr().ok(),
            _ => None,
        };
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

    /// The sequence numbers given to the new socket since the release.
    fn written_since(&self, proving: &Proving) -> u32 {
        let fin = u64::from(self.to_guest.end() == End::Told);
        u32::try_from(self.to_guest.written() - proving.base + fin).unwrap_or(u32::MAX)
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
        let new = Upstream::Open(Endpoint::new(stream));
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

    /// The guest can be reached: the connection goes on.
    pub(crate) fn release(&mut self, ctx: &mut Context<'_>) -> std::result::Result<Step, String> {
        match std::mem::replace(&mut self.stage, Stage::Normal) {
            Stage::Moved(moved) => {
                self.proceed(*moved, false, ctx);
                Ok(Step::Taken)
            }
            Stage::Unmovable(_) if self.client_is_lost() => Ok(Step::Gone),
            Stage::Unmovable(why) => Err(why),
            // Not re-targeted: it goes on where it was.
            Stage::Held { frozen, before } => self.go_back(frozen, before, ctx),
            stage @ (Stage::Normal | Stage::Proving(_)) => {
                self.stage = stage;
                Ok(Step::Taken)
            }
        }
    }

    /// Goes on with the new socket: at the new site, or where it was if it `went_back`.
    pub(super) fn proceed(&mut self, moved: Moved, went_back: bool, ctx: &mut Context<'_>) {
        let Moved {
            old,
            snapshot,
            before,
        } = moved;
        if let Some(old) = old {
            ctx.late.keep(snapshot.local, snapshot.remote, old, ctx.now);
        }
        self.moved_before = true;
        // What the guest may know, from the first byte that it has not acknowledged on: all that
        // the old socket had sent, or what that one itself had yet to reach.
        let in_flight = before.map_or(0, |proving| {
            let given = self.written_since(&proving);
            let acknowledged = given.saturating_sub(snapshot.unacknowledged());
            proving.in_flight.saturating_sub(acknowledged)
        });
        let in_flight = in_flight.max(snapshot.in_flight());
        let send_buffer = snapshot.send_buffer;
        let peer_ended = matches!(
            snapshot.info.state,
            TcpState::CloseWait | TcpState::LastAck | TcpState::Closing
        );
        if snapshot.fin_outstanding() {
            self.to_guest.tell_again();
        }
        self.to_client
            .push_back(&snapshot.receive, &ctx.shared.budget);
        if peer_ended {
            self.to_client.source_ended();
        }
        let pending = snapshot.send.len();
        // What the guest may know goes first and by itself. A last segment that is cut too large
        // for the window would not be sent, and the guest's answers not be understood.
        let mut first = snapshot.send;
        let rest = first.split_off((in_flight as usize).min(pending));
        self.to_guest.push_front(rest, &ctx.shared.budget);
        let base = self.to_guest.written();
        if let Upstream::Open(endpoint) = &self.upstream {
            self.to_guest
                .write_apart(first, &endpoint.stream, &ctx.shared.budget);
        }
        // Data asks as well as a probe: what the guest lacks, or what its client has sent meanwhile.
        if pending == 0 && in_flight > 0 {
            self.kick();
        }
        let silent = pending == 0 && in_flight == 0 && !self.write_waiting(ctx);
        let rtt = Duration::from_micros(u64::from(snapshot.info.rtt_us));
        self.stage = Stage::Proving(Box::new(Proving {
            released: ctx.now,
            in_flight,
            base,
            rtt,
            covered: in_flight == 0,
            answered: false,
            went_back,
            next_probe: ctx.now + rtt + FIRST_PROBE,
            probe_wait: FIRST_PROBE,
            next_mark: ctx.now + rtt * 2 + MARK,
            rest: Some(Rest {
                pending,
                send_buffer,
            }),
            silent,
            next_check: ctx.now + CHECK,
        }));
        self.last_activity = ctx.now;
    }

    /// Asks the guest by a probe.
    fn kick(&self) {
        if let Upstream::Open(endpoint) = &self.upstream
            && let Err(error) = repair::kick(&endpoint.stream)
        {
            log::debug!("Connection {}: {}", self.admission.id, error.chain());
        }
    }

    /// Writes to the guest what its client sent in the hold; whether there was any.
    fn write_waiting(&mut self, ctx: &mut Context<'_>) -> bool {
        let before = self.to_guest.written();
        self.write_queued(self.to_guest.queued(), ctx);
        self.to_guest.written() > before
    }

    /// Writes to the guest what is queued for it, about so many bytes.
    fn write_queued(&mut self, bytes: usize, ctx: &mut Context<'_>) {
        let Upstream::Open(endpoint) = &mut self.upstream else {
            return;
        };
        if bytes == 0 {
            return;
        }
        let mut work = Workspace {
            scratch: ctx.scratch,
            pool: ctx.pool,
            budget: &ctx.shared.budget,
            limit: 0,
            turn: bytes,
        };
        let endless = self.lost.as_ref().is_some_and(|lost| lost.endless);
        let written = if endless {
            self.to_guest.carry(None, Some(endpoint), &mut work)
        } else {
            self.to_guest.pump(None, Some(endpoint), &mut work)
        };
        if let Err(failure) = written {
            // The next turn meets it again.
            log::debug!("Connection {}: {failure:?}", self.admission.id);
        }
    }

    /// What a release leaves to be done when all connections that have something to ask the guest
    /// with have done so. Nothing else is written before, but for what its client sent in the hold.
    pub(crate) fn finish(&mut self, ctx: &mut Context<'_>) -> Next {
        let Stage::Proving(proving) = &mut self.stage else {
            return self.advance(ctx);
        };
        let Some(Rest {
            pending,
            send_buffer,
        }) = proving.rest.take()
        else {
            return self.advance(ctx);
        };
        let (base, silent) = (proving.base, proving.silent);
        if !proving.covered {
            // Mostly everything that was in flight is so again by now.
            self.check(ctx);
        }
        // The rest goes out as a whole, and nothing new with it: the buffer that was made for it
        // is not to be filled again.
        let may_write = self.may_write();
        let rest =
            pending.saturating_sub(usize::try_from(self.to_guest.written() - base).unwrap_or(0));
        if may_write {
            self.write_queued(rest, ctx);
        }
        if let Upstream::Open(endpoint) = &self.upstream {
            let _ = repair::relax(&endpoint.stream, send_buffer);
            let asked = !ctx.limits.keepalive.0.is_zero();
            let _ = SockRef::from(&endpoint.stream).set_keepalive(asked);
        }
        // Its client may have said something since epoll was looked at.
        self.client.readable |= silent;
        self.advance(ctx)
    }

    /// Asks the guest by a probe where nothing else has asked it.
    pub(crate) fn break_silence(&mut self) {
        if let Stage::Proving(proving) = &mut self.stage
            && std::mem::take(&mut proving.silent)
            && !proving.answered
            && self.to_guest.written() == proving.base
        {
            self.kick();
        }
    }

    /// Whether the guest may be written to. Not if it may know more than was sent to it and this
    /// waits in the socket already: more would have to wait for a timeout with it.
    pub(super) fn may_write(&self) -> bool {
        match &self.stage {
            Stage::Normal => true,
            Stage::Proving(proving) => {
                proving.rest.is_none()
                    && (proving.covered || self.written_since(proving) < proving.in_flight)
            }
            Stage::Held { .. } | Stage::Moved(_) | Stage::Unmovable(_) => false,
        }
    }

    /// Whether a move has hold of it: what is only prepared touches no connection.
    pub(crate) fn is_held(&self) -> bool {
        !matches!(self.stage, Stage::Normal | Stage::Proving(_))
    }

    /// Looks after a released connection until the guest has answered and can't know more than
    /// the new socket does.
    pub(crate) fn check(&mut self, ctx: &mut Context<'_>) -> Next {
        let written = match &self.stage {
            Stage::Proving(proving) => self.written_since(proving),
            _ => 0,
        };
        let (Stage::Proving(proving), Upstream::Open(endpoint)) = (&mut self.stage, &self.upstream)
        else {
            return Next::Wait;
        };
        let age = ctx.now.duration_since(proving.released);
        let metrics = &ctx.shared.metrics;
        if !proving.answered {
            let Ok(info) = repair::tcp_info(&endpoint.stream) else {
                return Next::Failed("its state can't be read".into());
            };
            if info.segments_in > 0 {
                proving.answered = true;
                if !proving.went_back {
                    metrics
                        .stall
                        .get_or_create(&self.guest.label)
                        .observe(age.as_secs_f64());
                }
            }
        }
        if !proving.covered {
            let unsent = repair::unsent(&endpoint.stream).unwrap_or(written);
            proving.covered = covers(proving.in_flight, written, unsent);
            if !proving.covered && ctx.now >= proving.next_mark {
                log::debug!(
                    "Connection {}: {} of {} bytes sent again",
                    self.admission.id,
                    written - unsent.min(written),
                    proving.in_flight
                );
                // Rarely, as what is marked has to wait for a timeout.
                proving.next_mark = ctx.now + age.max(MARK);
                if repair::mark_as_sent(&endpoint.stream).is_ok() {
                    metrics
                        .move_fallbacks
                        .get_or_create(&self.guest.label)
                        .inc();
                    proving.covered = written >= proving.in_flight;
                }
            }
        }
        if !proving.answered && ctx.now >= proving.next_probe {
            let _ = repair::kick(&endpoint.stream);
            proving.probe_wait = (proving.probe_wait * 2).min(Duration::from_secs(1));
            proving.next_probe = ctx.now + proving.probe_wait;
        }
        let wait = if age >= Duration::from_secs(1) {
            LATE_CHECK
        } else if proving.covered {
            // Nobody answers sooner than a round trip; data that comes is an event anyhow.
            ANSWER_CHECK.max((proving.rtt + CHECK).saturating_sub(age))
        } else {
            CHECK
        };
        proving.next_check = ctx.now + wait;
        let proved = proving.covered && proving.answered || age > PROVING;
        let done = proved && proving.rest.is_none();
        if done {
            if !proving.answered && !proving.went_back {
                metrics
                    .stall
                    .get_or_create(&self.guest.label)
                    .observe(age.as_secs_f64());
            }
            self.stage = Stage::Normal;
            if self.lost.is_some() {
                return self.last_words(ctx);
            }
            if self.ended() {
                return self.settle(ctx);
            }
        }
        Next::Wait
    }

    /// Whether [`Self::check`] has work on any event of the guest's side.
    pub(crate) fn is_proving(&self) -> bool {
        matches!(self.stage, Stage::Proving(_))
    }
}
