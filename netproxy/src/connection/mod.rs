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

mod connecting;
mod deadline;
mod going_back;
mod handing;
mod info;
mod lost;
mod moving;
mod releasing;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use socket2::{SockRef, TcpKeepalive};

use crate::config::{Limits, ServiceConfig};
use crate::error::{Result, system};
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
pub use info::ConnectionInfo;
pub(crate) use moving::{Step, Way};

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

fn watch(stream: &mut TcpStream, token: Token, ctx: &Context<'_>) -> io::Result<()> {
    let interests = Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY;
    ctx.registry.register(stream, token, interests)
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
        watch(&mut client, client_token(key), ctx).map_err(set_up())?;
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

    fn register(&self, stream: &mut TcpStream, ctx: &Context<'_>) -> io::Result<()> {
        watch(stream, upstream_token(self.key), ctx)
    }

    /// The guest's address as the proxy sees it, while there is a connection to it.
    fn upstream_address(&self) -> Option<SocketAddr> {
        match &self.upstream {
            Upstream::Open(endpoint) => endpoint.stream.peer_addr().ok(),
            _ => None,
        }
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
        endpoint.more |= event.is_read_closed() || event.is_error() || event.is_priority();
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
        endpoint.more = true;
        self.lose(of_client, Sign::Event)
    }

    /// Moves what can be moved.
    pub(crate) fn advance(&mut self, ctx: &mut Context<'_>) -> Next {
        if let Err(why) = self.finish_connecting(ctx) {
            return Next::Failed(why);
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

    pub(crate) fn id(&self) -> u64 {
        self.admission.id
    }
}
