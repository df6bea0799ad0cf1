//! One client's connection, and the one to the guest that belongs to it.
//!
//! ```text
//! upstream:  Waiting ──connect──▶ Connecting ──────▶ Open
//!               ▲                     │hold
//!               └─────────────────────┘
//!
//! stage:     Normal ──hold──▶ Held ──freeze──▶ Held, frozen ──retarget──▶ Moved
//!              ▲ ▲              │cancel            │cancel                  │  │
//!              │ └──────────────┴──────────────────┴────────────────cancel──┘  │
//!              └──── the guest has answered ──── Proving ◀────────────release──┘
//! ```
//!
//! While a connection is held the client's data is taken up to the flow's limit, and what the
//! guest had sent goes on to the client. Nothing is written to the guest. Frozen sockets hear
//! nothing any more. In `Moved`, the new socket exists and has sent nothing.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use crate::config::{Limits, ServiceConfig};
use crate::error::{Error, Result, system};
use crate::guest::{Admission, Guest, Shared};
use crate::proxy_protocol;
use crate::repair::state::{Snapshot, TcpState, covers};
use crate::repair::{self, RestoreOptions};
use crate::retarget::late::Late;
use crate::splice::{End, Endpoint, Failure, Flow, PipePool, Turn, Workspace};

/// How long one turn of a flow may go on before the others have theirs, in bytes.
const TURN: usize = 4 << 20;
/// How often a released connection is looked at until the guest has answered.
const CHECK: Duration = Duration::from_millis(5);
/// How often one is looked at whose guest does not answer for long.
const LATE_CHECK: Duration = Duration::from_millis(100);
/// How long before a probe is repeated at first; it doubles up to a second.
const FIRST_PROBE: Duration = Duration::from_millis(40);
/// After this, an answer is left to TCP's own timers.
const PROVING: Duration = Duration::from_secs(30);
/// How often it is looked whether the guest has acknowledged the last bytes.
const SETTLE: Duration = Duration::from_millis(20);

/// What a worker lends to the connection whose turn it is.
pub(crate) struct Context<'a> {
    pub registry: &'a Registry,
    pub scratch: &'a mut [u8],
    pub pool: &'a mut PipePool,
    pub late: &'a mut Late,
    pub shared: &'a Shared,
    pub limits: &'a Limits,
    pub now: Instant,
}

/// What is to become of a connection after a turn.
#[derive(Debug)]
pub(crate) enum Next {
    /// It waits for an event or its deadline.
    Wait,
    /// It needs another turn soon.
    Again,
    /// Both directions have ended, and everything has arrived.
    Done,
    /// A limit of time has passed.
    Expired(&'static str),
    /// It is broken: both sides see a reset.
    Failed(String),
}

#[derive(Debug)]
enum Upstream {
    Waiting,
    Connecting(TcpStream, Instant),
    Open(Endpoint),
}

#[derive(Debug)]
struct Moved {
    /// The old socket, in repair mode. None if the new one has the very same addresses.
    old: Option<TcpStream>,
    snapshot: Snapshot,
}

#[derive(Debug)]
struct Proving {
    released: Instant,
    /// What the guest may acknowledge, counted from the first byte written again.
    in_flight: u32,
    /// `written` of the flow to the guest at the release.
    base: u64,
    rtt: Duration,
    covered: bool,
    answered: bool,
    next_probe: Instant,
    probe_wait: Duration,
    next_check: Instant,
}

#[derive(Debug)]
enum Stage {
    Normal,
    Held { frozen: bool },
    Moved(Box<Moved>),
    Unmovable(String),
    Proving(Box<Proving>),
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
}

/// One line of a list.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ConnectionInfo {
    /// A number that no other connection of this run has.
    pub id: u64,
    /// The guest.
    pub guest: String,
    /// The service.
    pub service: String,
    /// The client's address.
    pub client: SocketAddr,
    /// The guest's address as the proxy sees it, while there is a connection to it.
    pub upstream: Option<SocketAddr>,
    /// `open`, `connecting`, `waiting`, `held`, `moved`, `unmovable`, `proving` or `closing`.
    pub state: String,
    /// Bytes given to the guest.
    pub to_guest: u64,
    /// Bytes given to the client.
    pub to_client: u64,
    /// Bytes that the proxy holds, both directions together.
    pub held: u64,
    /// Seconds since it was accepted.
    pub seconds: f64,
}

/// One client's connection.
#[derive(Debug)]
pub(crate) struct Connection {
    admission: Admission,
    pub guest: Arc<Guest>,
    service: Arc<ServiceConfig>,
    client_address: SocketAddr,
    client: Endpoint,
    /// The client is gone, but the guest can't be told yet.
    client_lost: bool,
    upstream: Upstream,
    to_guest: Flow,
    to_client: Flow,
    stage: Stage,
    opened: Instant,
    last_activity: Instant,
    settle_since: Option<Instant>,
    /// It was re-targeted at least once.
    moved_before: bool,
    counted: (u64, u64),
    key: usize,
    /// The deadline that is in the worker's queue for it.
    pub timer_at: Option<Instant>,
    /// It is in the worker's queue for another turn.
    pub queued: bool,
}

/// The token of the client's side of the connection in slot `key`; the upstream side is next.
pub(crate) fn client_token(key: usize) -> Token {
    Token(key * 2)
}

fn upstream_token(key: usize) -> Token {
    Token(key * 2 + 1)
}

/// The options that every socket of the proxy has.
fn tune(socket: SockRef<'_>, limits: &Limits) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    if limits.keepalive.0.is_zero() {
        return Ok(());
    }
    let keepalive = TcpKeepalive::new()
        .with_time(limits.keepalive.0)
        .with_interval(limits.keepalive_interval.0)
        .with_retries(limits.keepalive_probes);
    socket.set_tcp_keepalive(&keepalive)
}

impl Connection {
    pub(crate) fn new(
        admission: Admission,
        guest: Arc<Guest>,
        service: Arc<ServiceConfig>,
        mut client: TcpStream,
        client_address: SocketAddr,
        key: usize,
        ctx: &mut Context<'_>,
    ) -> Result<Self> {
        let set_up = || system("Setting up a client's connection");
        tune(SockRef::from(&client), ctx.limits).map_err(set_up())?;
        let mut to_guest = Flow::new();
        if service.proxy_protocol {
            let destination = client.local_addr().map_err(set_up())?;
            let header = proxy_protocol::header(client_address, destination);
            to_guest.push_back(&header, &ctx.shared.budget);
        }
        ctx.registry
            .register(
                &mut client,
                client_token(key),
                Interest::READABLE | Interest::WRITABLE,
            )
            .map_err(set_up())?;
        Ok(Self {
            admission,
            guest,
            service,
            client_address,
            client: Endpoint::new(client),
            client_lost: false,
            upstream: Upstream::Waiting,
            to_guest,
            to_client: Flow::new(),
            stage: Stage::Normal,
            opened: ctx.now,
            last_activity: ctx.now,
            settle_since: None,
            moved_before: false,
            counted: (0, 0),
            key,
            timer_at: None,
            queued: false,
        })
    }

    /// Starts the connection to the guest, wherever that is now.
    pub(crate) fn connect(&mut self, ctx: &mut Context<'_>) -> Result<()> {
        let settings = self.guest.settings();
        let site = self.guest.site();
        let Some(remote) = settings.upstream(&site, &self.service) else {
            return Err(Error::UnknownSite {
                guest: self.guest.name.clone(),
                site,
            });
        };
        let failed = || system("Connecting to the guest");
        let socket = Socket::new(
            Domain::for_address(remote),
            Type::STREAM.nonblocking(),
            Some(Protocol::TCP),
        )
        .map_err(failed())?;
        tune(SockRef::from(&socket), ctx.limits).map_err(failed())?;
        if let Some(mss) = settings.mss {
            socket.set_tcp_mss(u32::from(mss)).map_err(failed())?;
        }
        if let Some(source) = settings.source {
            nix::sys::socket::setsockopt(
                &socket,
                nix::sys::socket::sockopt::IpBindAddressNoPort,
                &true,
            )
            .map_err(|error| failed()(error.into()))?;
            socket
                .bind(&SocketAddr::new(source, 0).into())
                .map_err(failed())?;
        }
        match socket.connect(&remote.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(failed()(error)),
        }
        let mut stream = TcpStream::from_std(socket.into());
        self.register(&mut stream, ctx).map_err(failed())?;
        self.upstream = Upstream::Connecting(stream, ctx.now);
        Ok(())
    }

    fn register(&self, stream: &mut TcpStream, ctx: &Context<'_>) -> io::Result<()> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        ctx.registry
            .register(stream, upstream_token(self.key), interest)
    }

    /// Notes what epoll says of one side.
    pub(crate) fn note(&mut self, of_client: bool, event: &mio::event::Event) -> Option<String> {
        let endpoint = match (&mut self.upstream, of_client) {
            (_, true) => &mut self.client,
            (Upstream::Open(endpoint), false) => endpoint,
            _ => return None,
        };
        endpoint.readable |= event.is_readable() || event.is_read_closed();
        endpoint.writable |= event.is_writable() || event.is_write_closed();
        if !event.is_error() {
            return None;
        }
        let error = endpoint.stream.take_error().ok().flatten()?;
        self.side_failed(of_client, &error)
    }

    /// One side is broken. Returns why, if the connection has to end now.
    fn side_failed(&mut self, of_client: bool, error: &io::Error) -> Option<String> {
        let side = if of_client { "client" } else { "guest" };
        if of_client && !matches!(self.stage, Stage::Normal) {
            // The guest is told when it can be reached again.
            self.client_lost = true;
            return None;
        }
        Some(format!("the {side}'s side: {error}"))
    }

    /// Moves what can be moved.
    pub(crate) fn advance(&mut self, ctx: &mut Context<'_>) -> Next {
        if let Upstream::Connecting(stream, _) = &self.upstream {
            match connected(stream) {
                Ok(true) => {
                    let placeholder = std::mem::replace(&mut self.upstream, Upstream::Waiting);
                    if let Upstream::Connecting(stream, _) = placeholder {
                        self.upstream = Upstream::Open(Endpoint::new(stream));
                    }
                }
                Ok(false) => {}
                Err(error) => {
                    ctx.shared
                        .metrics
                        .connect_failures
                        .get_or_create(&self.guest.label)
                        .inc();
                    return Next::Failed(format!("connecting to the guest: {error}"));
                }
            }
        }
        let next = self.pump(ctx);
        let written = (self.to_guest.written(), self.to_client.written());
        if written != self.counted {
            self.guest.to_guest.inc_by(written.0 - self.counted.0);
            self.guest.to_client.inc_by(written.1 - self.counted.1);
            self.counted = written;
        }
        match next {
            Next::Wait if self.ended() => self.settle(ctx),
            next => next,
        }
    }

    fn pump(&mut self, ctx: &mut Context<'_>) -> Next {
        let (may_read, may_write) = match self.stage {
            Stage::Normal | Stage::Proving(_) => (true, true),
            Stage::Held { .. } => (true, false),
            Stage::Moved(_) | Stage::Unmovable(_) => (false, false),
        };
        let mut work = Workspace {
            scratch: ctx.scratch,
            pool: ctx.pool,
            budget: &ctx.shared.budget,
            limit: ctx.limits.buffer.0,
            turn: TURN,
        };
        let mut again = false;
        for to_guest in [true, false] {
            let client = (!self.client_lost).then_some(&mut self.client);
            let open = match &mut self.upstream {
                Upstream::Open(endpoint) => Some(endpoint),
                _ => None,
            };
            let result = if to_guest {
                self.to_guest
                    .pump(client, open.filter(|_| may_write), &mut work)
            } else {
                self.to_client
                    .pump(open.filter(|_| may_read), client, &mut work)
            };
            match result {
                Ok((turn, moved)) => {
                    again |= turn == Turn::Again;
                    if moved > 0 {
                        self.last_activity = ctx.now;
                    }
                }
                Err(failure) => {
                    let (of_client, error) = match failure {
                        Failure::Source(error) => (to_guest, error),
                        Failure::Sink(error) => (!to_guest, error),
                    };
                    if let Some(reason) = self.side_failed(of_client, &error) {
                        return Next::Failed(reason);
                    }
                }
            }
        }
        if again { Next::Again } else { Next::Wait }
    }

    /// Whether both directions have ended and both sides were told.
    fn ended(&self) -> bool {
        self.to_guest.end() == End::Told && self.to_client.end() == End::Told
    }

    /// Keeps the upstream socket until the guest has acknowledged everything: the kernel would
    /// send it on without the socket, but only to where the guest is now.
    fn settle(&mut self, ctx: &Context<'_>) -> Next {
        if !matches!(self.stage, Stage::Normal | Stage::Proving(_)) {
            return Next::Wait;
        }
        let Upstream::Open(endpoint) = &self.upstream else {
            return Next::Done;
        };
        let since = *self.settle_since.get_or_insert(ctx.now);
        let gone = repair::tcp_info(&endpoint.stream)
            .is_ok_and(|info| matches!(info.state, TcpState::Closed | TcpState::TimeWait));
        if gone || repair::unacknowledged(&endpoint.stream).is_ok_and(|bytes| bytes == 0) {
            return Next::Done;
        }
        if ctx.now.duration_since(since) >= ctx.limits.linger.0 {
            return Next::Expired("the guest does not acknowledge the last bytes");
        }
        Next::Wait
    }

    /// When it has to be looked at without an event.
    pub(crate) fn deadline(&self, limits: &Limits, now: Instant) -> Instant {
        if let Stage::Proving(proving) = &self.stage {
            return proving.next_check;
        }
        if let Upstream::Connecting(_, since) = &self.upstream {
            return *since + limits.connect.0;
        }
        if self.settle_since.is_some() {
            return now + SETTLE;
        }
        self.last_activity + self.idle_limit(limits)
    }

    fn idle_limit(&self, limits: &Limits) -> Duration {
        let half = self.to_guest.end() != End::Open || self.to_client.end() != End::Open;
        if half {
            limits.half_closed.0.min(limits.idle.0)
        } else {
            limits.idle.0
        }
    }

    /// Its deadline may have come.
    pub(crate) fn on_timer(&mut self, ctx: &mut Context<'_>) -> Next {
        if matches!(self.stage, Stage::Proving(_)) {
            return self.check(ctx);
        }
        if let Upstream::Connecting(_, since) = &self.upstream {
            if ctx.now >= *since + ctx.limits.connect.0 {
                ctx.shared
                    .metrics
                    .connect_failures
                    .get_or_create(&self.guest.label)
                    .inc();
                return Next::Failed("the guest does not answer".into());
            }
            return Next::Wait;
        }
        if self.settle_since.is_some() {
            return self.settle(ctx);
        }
        if ctx.now < self.last_activity + self.idle_limit(ctx.limits) {
            return Next::Wait;
        }
        if matches!(self.stage, Stage::Normal) {
            return Next::Expired("it carried nothing for too long");
        }
        // A held connection can't carry anything: that is not its fault.
        self.last_activity = ctx.now;
        Next::Wait
    }

    /// Ends it. `reset`: both sides see a reset, as one of them or the proxy broke it.
    pub(crate) fn close(mut self, reset: bool, ctx: &mut Context<'_>) {
        self.to_guest.clear(ctx.pool, &ctx.shared.budget);
        self.to_client.clear(ctx.pool, &ctx.shared.budget);
        if reset {
            let _ = SockRef::from(&self.client.stream).set_linger(Some(Duration::ZERO));
        }
        if let Upstream::Open(endpoint) = &self.upstream {
            if reset {
                let _ = SockRef::from(&endpoint.stream).set_linger(Some(Duration::ZERO));
            } else if self.moved_before && self.ended() {
                // The kernel does not know which ends passed through an earlier socket, and
                // would send another FIN. What it owes is an acknowledgement.
                let _ = SockRef::from(&endpoint.stream).set_tcp_quickack(true);
                let _ = repair::silence(&endpoint.stream);
            }
        }
    }

    // ---- the steps of a move ----

    pub(crate) fn is_waiting(&self) -> bool {
        matches!(self.upstream, Upstream::Waiting)
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
        if let Stage::Proving(proving) = &self.stage
            && !proving.covered
            && let Upstream::Open(endpoint) = &self.upstream
        {
            // The guest may still know more than this socket: settle that before it is moved
            // on.
            let _ = repair::mark_as_sent(&endpoint.stream);
        }
        if matches!(self.stage, Stage::Normal | Stage::Proving(_)) {
            self.stage = Stage::Held { frozen: false };
        }
        if self.is_waiting() {
            Step::Waits
        } else {
            Step::Taken
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
            }
        }
        self.stage = Stage::Held { frozen: true };
        Step::Taken
    }

    fn unmovable(&mut self, why: String) {
        log::warn!(
            "Connection {} of {}: {why}",
            self.admission.id,
            self.guest.name
        );
        self.stage = Stage::Unmovable(why);
    }

    /// Makes the upstream socket anew, towards `site`. The new one has sent nothing yet.
    pub(crate) fn retarget(&mut self, site: &str, mark: u32, ctx: &mut Context<'_>) -> Step {
        if matches!(self.stage, Stage::Unmovable(_)) {
            return Step::Failed;
        }
        if !matches!(self.stage, Stage::Held { frozen: true }) {
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
        let settings = self.guest.settings();
        let remote = settings
            .upstream(site, &self.service)
            .ok_or_else(|| Error::UnknownSite {
                guest: self.guest.name.clone(),
                site: site.to_owned(),
            })?;
        let Upstream::Open(endpoint) = &mut self.upstream else {
            return Ok(Step::Waits);
        };
        let snapshot = repair::dump(&endpoint.stream)?;
        let carried = snapshot.send.len() + snapshot.receive.len();
        if carried + self.to_guest.queued() + self.to_client.queued() > ctx.limits.carry.0 {
            return Err(Error::TooMuch {
                to_guest: snapshot.send.len() + self.to_guest.queued(),
                to_client: snapshot.receive.len() + self.to_client.queued(),
            });
        }
        let mark = ctx
            .shared
            .mark
            .load(std::sync::atomic::Ordering::Acquire)
            .then_some(mark);
        let waiting = self.to_client.queued() + snapshot.receive.len();
        let options = RestoreOptions {
            remote,
            mark,
            waiting,
        };
        // Two sockets can't have the same addresses on both ends: what has them goes first.
        ctx.late.forget(snapshot.local, remote);
        let in_place = remote == snapshot.remote;
        let socket = if in_place {
            let Upstream::Open(old) = std::mem::replace(&mut self.upstream, Upstream::Waiting)
            else {
                return Ok(Step::Waits);
            };
            let clock = repair::clock(&old.stream)?;
            drop(old);
            repair::restore(&snapshot, options, clock)?
        } else {
            repair::restore(&snapshot, options, repair::clock(&endpoint.stream)?)?
        };
        tune(SockRef::from(&socket), ctx.limits).map_err(|source| Error::Repair {
            step: "set up",
            source,
        })?;
        let mut stream = TcpStream::from_std(socket.into());
        let registered = |source| Error::Repair {
            step: "watch",
            source,
        };
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
        self.stage = Stage::Moved(Box::new(Moved { old, snapshot }));
        Ok(Step::Taken)
    }

    /// Sends a probe to the guest, and says whether it has ever answered the new socket. None if
    /// this connection can't tell.
    pub(crate) fn ask(&self) -> Option<bool> {
        let (Stage::Moved(_), Upstream::Open(endpoint)) = (&self.stage, &self.upstream) else {
            return None;
        };
        if repair::tcp_info(&endpoint.stream).ok()?.segments_in > 0 {
            return Some(true);
        }
        repair::kick(&endpoint.stream).ok()?;
        Some(false)
    }

    /// The guest can be reached: the connection goes on.
    pub(crate) fn release(&mut self, ctx: &mut Context<'_>) -> std::result::Result<Step, String> {
        match std::mem::replace(&mut self.stage, Stage::Normal) {
            Stage::Moved(moved) => {
                self.proceed(*moved, ctx);
                Ok(Step::Taken)
            }
            Stage::Unmovable(why) => Err(why),
            // Not re-targeted: it goes on where it was.
            Stage::Held { frozen } => self.go_back(frozen, ctx),
            stage @ (Stage::Normal | Stage::Proving(_)) => {
                self.stage = stage;
                Ok(Step::Taken)
            }
        }
    }

    fn proceed(&mut self, moved: Moved, ctx: &mut Context<'_>) {
        let Moved { old, snapshot } = moved;
        if let Some(old) = old {
            ctx.late.keep(snapshot.local, snapshot.remote, old, ctx.now);
        }
        self.moved_before = true;
        let in_flight = snapshot.in_flight();
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
        self.to_guest.push_front(snapshot.send, &ctx.shared.budget);
        if let Upstream::Open(endpoint) = &self.upstream
            && let Err(error) = repair::kick(&endpoint.stream)
        {
            log::debug!("Connection {}: {}", self.admission.id, error.chain());
        }
        self.stage = Stage::Proving(Box::new(Proving {
            released: ctx.now,
            in_flight,
            base: self.to_guest.written(),
            rtt: Duration::from_micros(u64::from(snapshot.info.rtt_us)),
            covered: in_flight == 0,
            answered: false,
            next_probe: ctx.now + FIRST_PROBE,
            probe_wait: FIRST_PROBE,
            next_check: ctx.now + CHECK,
        }));
        self.last_activity = ctx.now;
        // What is pending goes out as a whole, and nothing new with it: the buffer that was made
        // for it is not to be filled again.
        if let Upstream::Open(endpoint) = &mut self.upstream {
            let mut work = Workspace {
                scratch: ctx.scratch,
                pool: ctx.pool,
                budget: &ctx.shared.budget,
                limit: 0,
                turn: pending,
            };
            if let Err(failure) = self.to_guest.pump(None, Some(endpoint), &mut work) {
                // The next turn meets it again.
                log::debug!("Connection {}: {failure:?}", self.admission.id);
            }
            let _ = repair::relax(&endpoint.stream, send_buffer);
        }
    }

    /// The move is off: the connection goes on at the old site.
    pub(crate) fn cancel(&mut self, ctx: &mut Context<'_>) -> std::result::Result<Step, String> {
        match std::mem::replace(&mut self.stage, Stage::Normal) {
            Stage::Held { frozen } => self.go_back(frozen, ctx),
            Stage::Unmovable(why) => match self.upstream {
                Upstream::Open(_) => self.go_back(true, ctx),
                _ => Err(why),
            },
            Stage::Moved(moved) => match moved.old {
                Some(mut old) => {
                    if let Upstream::Open(new) = &self.upstream {
                        repair::silence(&new.stream).map_err(|error| error.chain())?;
                    }
                    self.upstream = Upstream::Waiting;
                    self.register(&mut old, ctx)
                        .map_err(|error| error.to_string())?;
                    self.upstream = Upstream::Open(Endpoint::new(old));
                    self.go_back(true, ctx)
                }
                None => {
                    self.proceed(*moved, ctx);
                    Ok(Step::Taken)
                }
            },
            stage @ (Stage::Normal | Stage::Proving(_)) => {
                self.stage = stage;
                Ok(Step::Taken)
            }
        }
    }

    fn go_back(
        &mut self,
        frozen: bool,
        ctx: &mut Context<'_>,
    ) -> std::result::Result<Step, String> {
        match &self.upstream {
            Upstream::Open(endpoint) => {
                if frozen {
                    repair::thaw(&endpoint.stream).map_err(|error| error.chain())?;
                }
                if self.client_lost {
                    return Err("the client has gone".into());
                }
                Ok(Step::Taken)
            }
            Upstream::Connecting(..) => Ok(Step::Waits),
            Upstream::Waiting => {
                if self.client_lost {
                    return Err("the client has gone".into());
                }
                self.connect(ctx).map_err(|error| error.chain())?;
                Ok(Step::Waits)
            }
        }
    }

    /// Looks after a released connection until the guest has answered and can't know more than
    /// the new socket does.
    pub(crate) fn check(&mut self, ctx: &mut Context<'_>) -> Next {
        let (Stage::Proving(proving), Upstream::Open(endpoint)) = (&mut self.stage, &self.upstream)
        else {
            return Next::Wait;
        };
        let age = ctx.now.duration_since(proving.released);
        let Ok(info) = repair::tcp_info(&endpoint.stream) else {
            return Next::Failed("its state can't be read".into());
        };
        let metrics = &ctx.shared.metrics;
        if !proving.answered && info.segments_in > 0 {
            proving.answered = true;
            metrics
                .stall
                .get_or_create(&self.guest.label)
                .observe(age.as_secs_f64());
        }
        if !proving.covered {
            let fin = u64::from(self.to_guest.end() == End::Told);
            let written = self.to_guest.written() - proving.base + fin;
            let written = u32::try_from(written).unwrap_or(u32::MAX);
            let unsent = repair::unsent(&endpoint.stream).unwrap_or(written);
            proving.covered = covers(proving.in_flight, written, unsent);
            if !proving.covered && age > proving.rtt * 2 + Duration::from_millis(20) {
                log::debug!(
                    "Connection {}: {} of {} bytes sent again",
                    self.admission.id,
                    written - unsent.min(written),
                    proving.in_flight
                );
                if repair::mark_as_sent(&endpoint.stream).is_ok() && written >= proving.in_flight {
                    metrics
                        .move_fallbacks
                        .get_or_create(&self.guest.label)
                        .inc();
                    proving.covered = true;
                }
            }
        }
        if !proving.answered && ctx.now >= proving.next_probe {
            let _ = repair::kick(&endpoint.stream);
            proving.probe_wait = (proving.probe_wait * 2).min(Duration::from_secs(1));
            proving.next_probe = ctx.now + proving.probe_wait;
        }
        let wait = if age < Duration::from_secs(1) {
            CHECK
        } else {
            LATE_CHECK
        };
        proving.next_check = ctx.now + wait;
        let done = proving.covered && proving.answered || age > PROVING;
        if done {
            if !proving.answered {
                metrics
                    .stall
                    .get_or_create(&self.guest.label)
                    .observe(age.as_secs_f64());
            }
            self.stage = Stage::Normal;
            if self.client_lost {
                return Next::Failed("the client has gone".into());
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

    pub(crate) fn info(&self, now: Instant) -> ConnectionInfo {
        let state = match (&self.stage, &self.upstream) {
            (Stage::Held { .. }, _) => "held",
            (Stage::Moved(_), _) => "moved",
            (Stage::Unmovable(_), _) => "unmovable",
            (Stage::Proving(_), _) => "proving",
            (Stage::Normal, Upstream::Waiting) => "waiting",
            (Stage::Normal, Upstream::Connecting(..)) => "connecting",
            (Stage::Normal, Upstream::Open(_)) if self.settle_since.is_some() => "closing",
            (Stage::Normal, Upstream::Open(_)) => "open",
        };
        let upstream = match &self.upstream {
            Upstream::Open(endpoint) => endpoint.stream.peer_addr().ok(),
            _ => None,
        };
        ConnectionInfo {
            id: self.admission.id,
            guest: self.guest.name.clone(),
            service: self.service.name.get_ref().clone(),
            client: self.client_address,
            upstream,
            state: state.to_owned(),
            to_guest: self.to_guest.written(),
            to_client: self.to_client.written(),
            held: (self.to_guest.queued() + self.to_client.queued()) as u64,
            seconds: now.duration_since(self.opened).as_secs_f64(),
        }
    }

    pub(crate) fn id(&self) -> u64 {
        self.admission.id
    }
}

/// Whether a connect has come to its end.
fn connected(stream: &TcpStream) -> io::Result<bool> {
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    match stream.peer_addr() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
        Err(error) => Err(error),
    }
}
