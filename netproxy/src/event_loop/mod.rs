//! The event loop: one thread, its listeners, its connections.
//!
//! ```text
//!  controller ── Command ──▶ worker 0 ── epoll: listeners (SO_REUSEPORT), clients, guests
//!             ◀── reply ───  worker 1 ── the same
//! ```
//!
//! Every thread has listeners of its own on every address, and the kernel spreads the clients
//! over them. A connection stays with its thread for life, so nothing in it is locked. One
//! round of the loop: events, commands, deadlines, one batch of a move, and the flows whose
//! turn was cut short.

mod accept;
mod handing;
mod moves;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mio::{Events, Poll, Token, Waker};
use slab::Slab;
use socket2::Socket;

use crate::config::{Limits, ServiceConfig};
use crate::connection::{Connection, ConnectionInfo, Context, Next, Way};
use crate::error::{Result, system};
use crate::guest::{Guest, Shared};
use crate::retarget::late::Late;
use crate::site::Forward;
use crate::splice::PipePool;
use accept::Listener;
pub(crate) use accept::open as open_listener;
pub(crate) use handing::PackedWorker;
use moves::{Canary, Freeze, Job};

const WAKE: Token = Token(usize::MAX);
/// Listeners' tokens start here; connections' slots are far below.
const LISTENERS: usize = usize::MAX / 2;
/// The copying buffer of a thread.
const SCRATCH: usize = 256 * 1024;

/// What a step of a move did to a thread's connections; sums over threads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tally {
    /// Connections that took the step.
    pub connections: usize,
    /// Connections that have no connection to the guest yet, and wait for one.
    pub waiting: usize,
    /// Connections that could not take it. They alone are closed at the release.
    pub failed: usize,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.connections += other.connections;
        self.waiting += other.waiting;
        self.failed += other.failed;
    }
}

/// What the controller asks of a thread.
#[derive(Debug)]
pub(crate) enum Command {
    Listen {
        id: usize,
        socket: Socket,
        guest: Arc<Guest>,
        service: Arc<ServiceConfig>,
    },
    UpdateListener {
        id: usize,
        guest: Arc<Guest>,
        service: Arc<ServiceConfig>,
    },
    Unlisten {
        id: usize,
    },
    LimitsChanged,
    List {
        reply: Sender<Vec<ConnectionInfo>>,
    },
    /// Hold all connections of the guest, and freeze them after the grace.
    Hold {
        guest: String,
        grace: Duration,
        reply: Sender<Tally>,
    },
    /// Where connections of the guest lead, and where they would at the site.
    Ways {
        guest: String,
        site: String,
        reply: Sender<BTreeSet<Way>>,
    },
    /// What sites have to translate for connections of the guest.
    Forwards {
        guest: String,
        reply: Sender<BTreeSet<Forward>>,
    },
    Retarget {
        guest: String,
        site: String,
        mark: u32,
        reply: Sender<Tally>,
    },
    /// `wait`: first probe until the guest answers, at most so long.
    Release {
        guest: String,
        wait: Duration,
        reply: Sender<Tally>,
    },
    /// Probe once over a re-targeted connection: has the guest answered it?
    Ask {
        guest: String,
        reply: Sender<bool>,
    },
    /// Back from the new sockets to the old ones, frozen still.
    Undo {
        guest: String,
        reply: Sender<Tally>,
    },
    Cancel {
        guest: String,
        reply: Sender<Tally>,
    },
    /// Take up what another thread put down.
    Adopt(PackedWorker),
    /// Put everything down, and end.
    Pack {
        reply: Sender<PackedWorker>,
    },
    Stop,
}

/// A thread, as the controller sees it.
#[derive(Debug)]
pub(crate) struct WorkerHandle {
    sender: Sender<Command>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl WorkerHandle {
    /// Hands a command over. False when the thread has ended.
    pub(crate) fn send(&self, command: Command) -> bool {
        self.sender.send(command).is_ok() && self.waker.wake().is_ok()
    }

    pub(crate) fn stop(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("A worker ended by a panic");
        }
    }
}

/// Starts a thread.
pub(crate) fn spawn(
    index: usize,
    shared: Arc<Shared>,
    pipes: usize,
    pipe_size: usize,
) -> Result<WorkerHandle> {
    let poll = Poll::new().map_err(system("Making an epoll set"))?;
    let waker = Arc::new(Waker::new(poll.registry(), WAKE).map_err(system("Making an eventfd"))?);
    let (sender, inbox) = std::sync::mpsc::channel();
    let limits = shared.limits();
    let worker = Worker {
        poll,
        shared,
        limits,
        inbox,
        listeners: BTreeMap::new(),
        accepting: VecDeque::new(),
        accept_again: None,
        connections: Slab::new(),
        ended: Vec::new(),
        turns: VecDeque::new(),
        timers: BinaryHeap::new(),
        pool: PipePool::new(pipes, pipe_size),
        scratch: vec![0; SCRATCH],
        now: Instant::now(),
        held: HashSet::new(),
        freezes: Vec::new(),
        canaries: Vec::new(),
        jobs: VecDeque::new(),
        late: Late::default(),
    };
    let thread = std::thread::Builder::new()
        .name(format!("proxy-{index}"))
        .spawn(move || worker.run())
        .map_err(system("Starting a thread"))?;
    Ok(WorkerHandle {
        sender,
        waker,
        thread: Some(thread),
    })
}

/// A slot of the connections. One that has ended stays until the round is over, so that no
/// event of this round reaches a newcomer in its place.
#[derive(Debug)]
enum Slot {
    Live(Box<Connection>),
    Ended,
}

#[derive(Debug)]
struct Worker {
    poll: Poll,
    shared: Arc<Shared>,
    limits: Arc<Limits>,
    inbox: Receiver<Command>,
    listeners: BTreeMap<usize, Listener>,
    /// Listeners that may have more clients waiting.
    accepting: VecDeque<usize>,
    accept_again: Option<Instant>,
    connections: Slab<Slot>,
    ended: Vec<usize>,
    /// Connections whose turn was cut short.
    turns: VecDeque<usize>,
    timers: BinaryHeap<Reverse<(Instant, usize)>>,
    pool: PipePool,
    scratch: Vec<u8>,
    now: Instant,
    /// Guests that are held: their new connections wait.
    held: HashSet<String>,
    freezes: Vec<Freeze>,
    canaries: Vec<Canary>,
    jobs: VecDeque<Job>,
    late: Late,
}

impl Worker {
    fn run(mut self) {
        let mut events = Events::with_capacity(1024);
        loop {
            if let Err(error) = self.poll.poll(&mut events, self.patience())
                && error.kind() != io::ErrorKind::Interrupted
            {
                log::error!("Waiting for events: {error}");
                std::thread::sleep(Duration::from_millis(10));
            }
            self.now = Instant::now();
            for event in &events {
                let token = event.token();
                if token == WAKE {
                    continue;
                }
                if token.0 >= LISTENERS {
                    self.wake_listener(token.0 - LISTENERS);
                } else {
                    self.on_event(token.0 / 2, token.0 % 2 == 0, event);
                }
            }
            loop {
                match self.inbox.try_recv() {
                    Ok(Command::Stop) | Err(TryRecvError::Disconnected) => {
                        self.shut_down();
                        return;
                    }
                    Ok(Command::Pack { reply }) => {
                        let _ = reply.send(self.pack());
                        return;
                    }
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => break,
                }
            }
            self.accept_some();
            self.on_deadlines();
            self.move_some();
            self.late.expire(self.now);
            for _ in 0..self.turns.len() {
                let Some(key) = self.turns.pop_front() else {
                    break;
                };
                if let Some(Slot::Live(connection)) = self.connections.get_mut(key) {
                    connection.queued = false;
                }
                self.with(key, Connection::advance);
            }
            for key in self.ended.drain(..) {
                self.connections.try_remove(key);
            }
        }
    }

    /// How long the loop may sleep.
    fn patience(&self) -> Option<Duration> {
        // Without descriptors those who wait have to, as `accept_again` says.
        let accepting = !self.accepting.is_empty() && self.accept_again.is_none();
        if !self.turns.is_empty() || accepting || !self.jobs.is_empty() {
            return Some(Duration::ZERO);
        }
        let timer = self.timers.peek().map(|Reverse((at, _))| *at);
        [timer, self.accept_again, self.next_move(), self.late.next()]
            .into_iter()
            .flatten()
            .min()
            .map(|at| round_up(at.saturating_duration_since(Instant::now())))
    }

    fn context<'a>(
        poll: &'a Poll,
        scratch: &'a mut [u8],
        pool: &'a mut PipePool,
        late: &'a mut Late,
        shared: &'a Shared,
        limits: &'a Limits,
        now: Instant,
    ) -> Context<'a> {
        Context {
            registry: poll.registry(),
            scratch,
            pool,
            late,
            shared,
            limits,
            now,
        }
    }

    /// Gives a connection a turn at `what`, and sees to the outcome.
    fn with(&mut self, key: usize, what: impl FnOnce(&mut Connection, &mut Context<'_>) -> Next) {
        let Some(slot) = self.connections.get_mut(key) else {
            return;
        };
        let Slot::Live(connection) = slot else { return };
        let mut ctx = Self::context(
            &self.poll,
            &mut self.scratch,
            &mut self.pool,
            &mut self.late,
            &self.shared,
            &self.limits,
            self.now,
        );
        let next = what(connection, &mut ctx);
        let reset = match next {
            Next::Wait | Next::Again => {
                // One that has come already would be due again at once, and for ever.
                let soonest = ctx.now + Duration::from_millis(1);
                let deadline = connection.deadline(ctx.limits, ctx.now).max(soonest);
                if connection.timer_at.is_none_or(|at| deadline < at) {
                    connection.timer_at = Some(deadline);
                    self.timers.push(Reverse((deadline, key)));
                }
                if matches!(next, Next::Again) && !connection.queued {
                    connection.queued = true;
                    self.turns.push_back(key);
                }
                return;
            }
            Next::Done => false,
            Next::Expired(why) => {
                log::info!(
                    "Connection {} of {}: {why}",
                    connection.id(),
                    connection.guest.name
                );
                ctx.shared
                    .metrics
                    .timeouts
                    .get_or_create(&connection.guest.label)
                    .inc();
                false
            }
            Next::Failed(why) => {
                log::info!(
                    "Connection {} of {}: {why}",
                    connection.id(),
                    connection.guest.name
                );
                true
            }
        };
        if let Slot::Live(connection) = std::mem::replace(slot, Slot::Ended) {
            connection.close(reset, &mut ctx);
        }
        self.ended.push(key);
    }

    fn on_event(&mut self, key: usize, of_client: bool, event: &mio::event::Event) {
        self.with(key, |connection, ctx| {
            if let Some(reason) = connection.note(of_client, event) {
                return Next::Failed(reason);
            }
            match of_client {
                true => connection.advance(ctx),
                false => connection.hear(ctx),
            }
        });
    }

    fn on_deadlines(&mut self) {
        while let Some(Reverse((at, key))) = self.timers.peek().copied() {
            if at > self.now {
                break;
            }
            self.timers.pop();
            if let Some(Slot::Live(connection)) = self.connections.get_mut(key)
                && connection.timer_at == Some(at)
            {
                connection.timer_at = None;
                self.with(key, Connection::on_timer);
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Listen {
                id,
                socket,
                guest,
                service,
            } => {
                self.listen(id, socket, guest, service);
            }
            Command::UpdateListener { id, guest, service } => {
                if let Some(listener) = self.listeners.get_mut(&id) {
                    listener.guest = guest;
                    listener.service = service;
                }
            }
            Command::Unlisten { id } => {
                self.listeners.remove(&id);
            }
            Command::LimitsChanged => self.limits = self.shared.limits(),
            Command::List { reply } => {
                let _ = reply.send(self.live().map(|(_, c)| c.info(self.now)).collect());
            }
            Command::Hold {
                guest,
                grace,
                reply,
            } => self.hold(guest, grace, reply),
            Command::Ways { guest, site, reply } => {
                let _ = reply.send(self.ways(&guest, &site));
            }
            Command::Forwards { guest, reply } => {
                let _ = reply.send(self.forwards(&guest));
            }
            Command::Retarget {
                guest,
                site,
                mark,
                reply,
            } => {
                self.retarget(&guest, site, mark, reply);
            }
            Command::Release { guest, wait, reply } => self.release(guest, wait, reply),
            Command::Ask { guest, reply } => {
                let _ = reply.send(self.ask(&guest));
            }
            Command::Undo { guest, reply } => self.undo(&guest, reply),
            Command::Cancel { guest, reply } => self.cancel(&guest, reply),
            Command::Adopt(packed) => self.adopt(packed),
            Command::Stop | Command::Pack { .. } => {}
        }
    }

    fn live(&self) -> impl Iterator<Item = (usize, &Connection)> {
        self.connections
            .iter()
            .filter_map(|(key, slot)| match slot {
                Slot::Live(connection) => Some((key, &**connection)),
                Slot::Ended => None,
            })
    }

    fn shut_down(&mut self) {
        let keys: Vec<usize> = self.live().map(|(key, _)| key).collect();
        for key in keys {
            self.with(key, |_, _| Next::Done);
        }
    }
}

/// epoll counts in milliseconds, and mio rounds up; a deadline just ahead is not to spin.
fn round_up(time: Duration) -> Duration {
    if time.is_zero() {
        time
    } else {
        time.max(Duration::from_micros(100))
    }
}

/// The address that a listener got.
pub(crate) fn local_address(socket: &Socket) -> Option<SocketAddr> {
    socket.local_addr().ok()?.as_socket()
}
