//! What a release does to one connection, until the guest has answered.
//!
//! ```text
//!  release ──▶ what the guest may know ──▶ finish: the rest of ──▶ check, now and then ──▶ Normal
//!              is written again, or        what was pending,       has it answered? is all that
//!              else a probe asks it        keep-alive              it may know sent again?
//! ```
//!
//! The guest may acknowledge more than the new socket has sent: then the kernel does not understand
//! its answers. So all that the old one had sent goes first, and nothing new before that is on its
//! way.

use std::time::{Duration, Instant};

use socket2::SockRef;

use super::moving::Moved;
use super::{Connection, Context, Next, Stage, Step, Upstream};
use crate::repair;
use crate::repair::state::{TcpState, covers};
use crate::splice::{End, Workspace};
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

/// A connection that was released, and whose guest has not shown yet that it understands it.
#[derive(Debug)]
pub(super) struct Proving {
    released: Instant,
    /// What the guest may acknowledge, counted from the first byte written again.
    in_flight: u32,
    /// `written` of the flow to the guest at the release.
    base: u64,
    /// `taken` of the flow to the client at the release: more is an answer. None where another
    /// program released it.
    heard: Option<u64>,
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
    /// The size that the send buffer gets back. It was made larger for what is pending.
    send_buffer: usize,
}

/// When one whose guest can't know more than was sent to it is looked at, so long after its release.
/// Nobody answers sooner than a round trip; data that comes is an event anyhow.
fn next_look(rtt: Duration, age: Duration) -> Duration {
    ANSWER_CHECK.max((rtt + CHECK).saturating_sub(age))
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
            heard: None,
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

impl Connection {
    /// The sequence numbers given to the new socket since the release.
    fn written_since(&self, proving: &Proving) -> u32 {
        let fin = u64::from(self.to_guest.end() == End::Told);
        u32::try_from(self.to_guest.written() - proving.base + fin).unwrap_or(u32::MAX)
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
        let covered = in_flight == 0;
        let first_look = match covered {
            true => next_look(rtt, Duration::ZERO),
            false => CHECK,
        };
        self.stage = Stage::Proving(Box::new(Proving {
            released: ctx.now,
            in_flight,
            base,
            heard: Some(self.to_client.taken()),
            rtt,
            covered,
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
            next_check: ctx.now + first_look,
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
            if pending > 0 {
                let _ = repair::relax(&endpoint.stream, send_buffer);
            }
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
        let stalled = |age: Duration| {
            let stall = metrics.stall.get_or_create(&self.guest.label);
            stall.observe(age.as_secs_f64());
        };
        if !proving.answered {
            let taken = self.to_client.taken();
            let heard = proving.heard.is_some_and(|before| taken > before);
            // So long ago.
            let answered = if heard {
                Some(Duration::ZERO)
            } else {
                match repair::tcp_info(&endpoint.stream) {
                    Ok(info) => {
                        (info.segments_in > 0).then(|| Duration::from_millis(info.silent_ms.into()))
                    }
                    Err(_) => return Next::Failed("its state can't be read".into()),
                }
            };
            if let Some(ago) = answered {
                proving.answered = true;
                if !proving.went_back {
                    stalled(age.saturating_sub(ago));
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
            next_look(proving.rtt, age)
        } else {
            CHECK
        };
        proving.next_check = ctx.now + wait;
        let proved = proving.covered && proving.answered || age > PROVING;
        let done = proved && proving.rest.is_none();
        if done {
            if !proving.answered && !proving.went_back {
                stalled(age);
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

    /// Moves what can be moved after an event of the guest's side, and sees what it tells of a
    /// release.
    pub(crate) fn hear(&mut self, ctx: &mut Context<'_>) -> Next {
        match &self.stage {
            // What can be written depends on what is sent again by now.
            Stage::Proving(proving) if !proving.covered => match self.check(ctx) {
                Next::Wait | Next::Again => self.advance(ctx),
                next => next,
            },
            // Data is an answer, and the kernel need not be asked for one.
            Stage::Proving(proving) => {
                let before = proving.heard;
                let next = self.advance(ctx);
                let heard =
                    Some(self.to_client.taken()) != before || self.to_client.end() != End::Open;
                match next {
                    Next::Wait | Next::Again if heard => match self.check(ctx) {
                        Next::Wait => next,
                        ended => ended,
                    },
                    next => next,
                }
            }
            _ => self.advance(ctx),
        }
    }
}
