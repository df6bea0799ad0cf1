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
//!
//! When one side fails, the other one has what that had said, and then sees a reset: see [`lost`].

mod going_back;
mod handing;
mod lost;
mod moving;
mod releasing;

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
use crate::repair;
use crate::repair::state::TcpState;
use crate::retarget::late::Late;
use crate::splice::{End, Endpoint, Failure, Flow, PipePool, Turn, Workspace};
use lost::{Lost, Sign};
use moving::Moved;
use releasing::Proving;

/// How long one turn of a flow may go on before the others have theirs, in bytes. With larger ones
/// hundreds of busy connections wait so long for theirs that the kernel takes it for a long way,
/// and grows their receive buffers until its memory for TCP is used up.
const TURN: usize = 256 << 10;
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
enum Stage {
    Normal,
    Held {
        frozen: bool,
        /// It was released before, and the guest may still know more than its socket.
        before: Option<Box<Proving>>,
    },
    Moved(Box<Moved>),
    Unmovable(String),
    Proving(Box<Proving>),
}

pub(crate) use handing::Packed;
pub(crate) use moving::{Step, Way};

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
    /// Bytes given to the guest, each of them once.
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
    /// The side that has failed first.
    lost: Option<Lost>,
    upstream: Upstream,
    to_guest: Flow,
    /// What the proxy itself says first to the guest, in bytes.
    header: usize,
    to_client: Flow,
    stage: Stage,
    opened: Instant,
    last_activity: Instant,
    /// When it was last looked whether both sides are there.
    looked: Instant,
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
        .with_interval(limits.keepalive_interval.get_ref().0)
        .with_retries(*limits.keepalive_probes.get_ref());
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
        let mut header = Vec::new();
        if service.proxy_protocol {
            let destination = client.local_addr().map_err(set_up())?;
            header = proxy_protocol::header(client_address, destination);
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
            lost: None,
            upstream: Upstream::Waiting,
            to_guest,
            header: header.len(),
            to_client: Flow::new(),
            stage: Stage::Normal,
            opened: ctx.now,
            last_activity: ctx.now,
            looked: ctx.now,
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
        // It may have waited for so long that its service is gone.
        let port = *self.service.port.get_ref();
        if ctx.shared.is_anothers(remote, &self.guest.name, port) {
            return Err(Error::Taken(remote));
        }
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

    /// Notes what epoll says of one side. Returns why, if the connection has to end now.
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
        // Who resets it is not the guest yet: the new site's host, or one that the guest does not
        // come to. If it goes back it gets another socket; if it goes on, reading shows the error.
        if !of_client && matches!(self.stage, Stage::Moved(_)) {
            return None;
        }
        let closed =
            repair::tcp_info(&endpoint.stream).map_or(true, |info| info.state == TcpState::Closed);
        if !closed {
            return None;
        }
        // Up to the error.
        endpoint.readable = true;
        self.lose(of_client, Sign::Event)
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
        let given = (self.to_guest.given(), self.to_client.given());
        if given != self.counted {
            self.guest.to_guest.inc_by(given.0 - self.counted.0);
            self.guest.to_client.inc_by(given.1 - self.counted.1);
            self.counted = given;
        }
        match next {
            Next::Wait if self.lost.is_some() => self.last_words(ctx),
            Next::Wait if self.ended() => self.settle(ctx),
            next => next,
        }
    }

    fn pump(&mut self, ctx: &mut Context<'_>) -> Next {
        let may_read = !matches!(self.stage, Stage::Moved(_) | Stage::Unmovable(_));
        let may_write = self.may_write();
        let mut work = Workspace {
            scratch: ctx.scratch,
            pool: ctx.pool,
            budget: &ctx.shared.budget,
            limit: ctx.limits.buffer.0,
            turn: TURN,
        };
        let mut again = false;
        for to_guest in [true, false] {
            let lost = self.lost.as_ref();
            if lost.is_some_and(|lost| lost.of_client != to_guest) {
                // It leads to who is lost.
                let flow = match to_guest {
                    true => &mut self.to_guest,
                    false => &mut self.to_client,
                };
                flow.clear(work.pool, work.budget);
                continue;
            }
            let (drained, endless) = lost.map_or((false, false), |it| (it.drained, it.endless));
            let open = match &mut self.upstream {
                Upstream::Open(endpoint) => Some(endpoint),
                _ => None,
            };
            let (flow, source, sink) = if to_guest {
                let source = Some(&mut self.client);
                (&mut self.to_guest, source, open.filter(|_| may_write))
            } else {
                let source = open.filter(|_| may_read);
                (&mut self.to_client, source, Some(&mut self.client))
            };
            let source = source.filter(|_| !drained);
            let before = flow.end();
            let result = if endless {
                flow.carry(source, sink, &mut work)
            } else {
                flow.pump(source, sink, &mut work)
            };
            let ended = flow.end() != before;
            if let Some(lost) = &mut self.lost {
                lost.drained |= flow.end() != End::Open;
            }
            match result {
                Ok((turn, moved)) => {
                    again |= turn == Turn::Again;
                    // What the other side says to an end has its time from then on.
                    if moved > 0 || ended {
                        self.last_activity = ctx.now;
                    }
                }
                Err(failure) => {
                    let lost = match failure {
                        Failure::Source(error) => self.lose(to_guest, Sign::Read(error)),
                        Failure::Sink(error) => self.lose(!to_guest, Sign::Write(error)),
                    };
                    if let Some(reason) = lost {
                        return Next::Failed(reason);
                    }
                    // What it had said before may be there still.
                    again = true;
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
    ///
    /// The guest's last word may come while it is held, up to the freeze. Then nothing is left that
    /// could be moved.
    fn settle(&mut self, ctx: &Context<'_>) -> Next {
        let held = matches!(self.stage, Stage::Held { .. });
        if matches!(self.stage, Stage::Moved(_) | Stage::Unmovable(_)) {
            return Next::Wait;
        }
        let Upstream::Open(endpoint) = &self.upstream else {
            return if held { Next::Wait } else { Next::Done };
        };
        let gone = repair::tcp_info(&endpoint.stream)
            .is_ok_and(|info| matches!(info.state, TcpState::Closed | TcpState::TimeWait));
        if gone {
            return Next::Done;
        }
        if held {
            return Next::Wait;
        }
        let since = *self.settle_since.get_or_insert(ctx.now);
        if repair::unacknowledged(&endpoint.stream).is_ok_and(|bytes| bytes == 0) {
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
        if self.settle_since.is_some() || self.has_last_words() {
            return now + SETTLE;
        }
        let idle = self.last_activity + self.idle_limit(limits);
        // One that is held is not ended by it, and would be due again and again.
        let idle = match self.is_held() {
            true => idle.max(now + SETTLE),
            false => idle,
        };
        match limits.silence() {
            Some(silence) => idle.min(self.looked + silence / 2),
            None => idle,
        }
    }

    /// Who does not answer for too long. Keep-alive does not ask while something is under way, and
    /// the kernel goes on sending that for a quarter of an hour. TCP_USER_TIMEOUT is no way out: it
    /// also ends those that answer, and only don't read. Those are asked rarely, so silence alone
    /// says nothing: two questions have to be open.
    fn unheard(&self, limits: &Limits) -> Option<&'static str> {
        let silence = limits.silence()?;
        let gone = |stream: &TcpStream| {
            repair::tcp_info(stream).is_ok_and(|info| {
                info.unanswered >= 2 && u128::from(info.silent_ms) >= silence.as_millis()
            })
        };
        if gone(&self.client.stream) {
            return Some("the client does not answer any more");
        }
        match &self.upstream {
            Upstream::Open(endpoint) if gone(&endpoint.stream) => {
                Some("the guest does not answer any more")
            }
            _ => None,
        }
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
            let could_write = self.may_write();
            return match self.check(ctx) {
                Next::Wait if self.lost.is_some() => self.advance(ctx),
                Next::Wait if !could_write && self.may_write() => self.advance(ctx),
                next => next,
            };
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
        if self.has_last_words() {
            return self.advance(ctx);
        }
        if self.settle_since.is_some() {
            return self.settle(ctx);
        }
        self.looked = ctx.now;
        if matches!(self.stage, Stage::Normal)
            && let Some(why) = self.unheard(ctx.limits)
        {
            return Next::Failed(why.into());
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
        let ended = self.ended();
        if let Upstream::Open(mut endpoint) = self.upstream {
            if reset {
                let _ = SockRef::from(&endpoint.stream).set_linger(Some(Duration::ZERO));
            } else if self.moved_before && ended {
                // The kernel does not know which ends passed through an earlier socket, and
                // would send another FIN. What it owes is an acknowledgement.
                let _ = SockRef::from(&endpoint.stream).set_tcp_quickack(true);
                let _ = repair::silence(&endpoint.stream);
                let ends = (endpoint.stream.local_addr(), endpoint.stream.peer_addr());
                if let (Ok(local), Ok(remote)) = ends
                    && ctx.registry.deregister(&mut endpoint.stream).is_ok()
                {
                    ctx.late.keep(local, remote, endpoint.stream, ctx.now);
                }
            }
        }
    }

    pub(crate) fn info(&self, now: Instant) -> ConnectionInfo {
        let state = match (&self.stage, &self.upstream) {
            (Stage::Held { .. }, _) => "held",
            (Stage::Moved(_), _) => "moved",
            (Stage::Unmovable(_), _) => "unmovable",
            (Stage::Proving(_), _) => "proving",
            (Stage::Normal, Upstream::Waiting) => "waiting",
            (Stage::Normal, Upstream::Connecting(..)) => "connecting",
            (Stage::Normal, Upstream::Open(_))
                if self.settle_since.is_some() || self.lost.is_some() =>
            {
                "closing"
            }
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
            to_guest: self.to_guest.given(),
            to_client: self.to_client.given(),
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
