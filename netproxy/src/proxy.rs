//! The proxy as a whole: threads, listeners, and the steps of moves.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::{Config, GuestConfig, ServiceConfig};
use crate::connection::ConnectionInfo;
use crate::control::{Attendant, ControlServer, Request};
use crate::error::{Error, Result};
use crate::event_loop::{self, Command, Tally, WorkerHandle};
use crate::guest::{Guest, Shared};
use crate::metrics::MetricsServer;
use crate::repair;
use crate::retarget::block::Block;
use crate::retarget::late::LATE;
use crate::retarget::lease::{Leases, Term};
use crate::retarget::path::{self, Paths, Warmth};
use crate::retarget::phase::{Asked, Phase};
use crate::state_file;

/// How long the threads may take for one step.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a guest whose move was given up is asked whether it is at the new site already.
const LAST_QUESTION: Duration = Duration::from_secs(1);

/// One guest in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInfo {
    /// Its name.
    pub name: String,
    /// The site where it is.
    pub site: String,
    /// Where its move is.
    #[serde(flatten)]
    pub phase: Phase,
    /// Whether it takes no new connections.
    pub draining: bool,
    /// Its connections.
    pub connections: usize,
    /// Where its clients connect to.
    pub listeners: Vec<SocketAddr>,
}

/// Everything at a glance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Overview {
    /// The guests.
    pub guests: Vec<GuestInfo>,
    /// Their connections.
    pub connections: Vec<ConnectionInfo>,
}

#[derive(Debug)]
struct Listening {
    id: usize,
    guest: String,
    /// With port 0 in the configuration, the port that the kernel chose.
    address: SocketAddr,
}

#[derive(Debug, Default)]
struct Listeners {
    by_configured: BTreeMap<(String, String, SocketAddr), Listening>,
    next_id: usize,
}

/// A running proxy. Dropping it ends it, and all its connections.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    workers: Mutex<Vec<WorkerHandle>>,
    listeners: Mutex<Listeners>,
    moves: Mutex<BTreeMap<String, Arc<Mutex<Phase>>>>,
    /// When each guest last left a site.
    left: Mutex<BTreeMap<(String, String), Instant>>,
    /// What is lent, and a bell that rings when that changes.
    leases: Arc<(Mutex<Leases>, Condvar)>,
    watch: Mutex<Option<JoinHandle<()>>>,
    blocks: AtomicU64,
    paths: Paths,
    mark: u32,
    grace: Duration,
    state: Option<PathBuf>,
    file: Option<PathBuf>,
    servers: Mutex<(Option<ControlServer>, Option<MetricsServer>)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Proxy {
    /// Starts threads, listeners, the control socket and the metrics' listener. `file` is where
    /// a reload reads the configuration again. The process's limit of open files is raised to
    /// what it may be.
    ///
    /// # Errors
    /// When a listener or socket can't be had, or the state file is not understood.
    pub fn start(config: Config, file: Option<PathBuf>) -> Result<Arc<Self>> {
        if let Err(error) = repair::probe_permission() {
            log::warn!(
                "Connections can't be re-targeted without CAP_NET_ADMIN: {}",
                error.chain()
            );
        }
        raise_descriptor_limit();
        let settings = config.proxy.clone();
        let shared = Arc::new(Shared::new(config.limits.clone()));
        let threads = match settings.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let pipes = settings.pipes.div_ceil(threads);
        let workers = (0..threads)
            .map(|index| event_loop::spawn(index, Arc::clone(&shared), pipes, settings.pipe_size.0))
            .collect::<Result<Vec<_>>>()?;
        let proxy = Arc::new(Self {
            shared,
            workers: Mutex::new(workers),
            listeners: Mutex::default(),
            moves: Mutex::default(),
            left: Mutex::default(),
            leases: Arc::default(),
            watch: Mutex::default(),
            blocks: AtomicU64::new(0),
            paths: Paths::new(settings.mark, settings.table),
            mark: settings.mark,
            grace: settings.grace.0,
            state: settings.state.clone(),
            file,
            servers: Mutex::default(),
        });
        proxy.apply(config)?;
        *lock(&proxy.watch) = Some(watch(&proxy)?);
        let desk = Desk(Arc::downgrade(&proxy));
        let control = ControlServer::start(&settings.control, Arc::new(desk))?;
        lock(&proxy.servers).0 = Some(control);
        if let Some(address) = settings.metrics {
            let weak = Arc::downgrade(&proxy);
            let render = move || weak.upgrade().map_or_else(String::new, |p| p.metrics());
            lock(&proxy.servers).1 = Some(MetricsServer::start(address, render)?);
        }
        Ok(proxy)
    }

    /// Takes guests, services and limits of a configuration. Listeners that stay keep their
    /// sockets, and with them the clients in their queues.
    fn apply(&self, config: Config) -> Result<()> {
        let known = match &self.state {
            Some(path) => state_file::load(path)?,
            None => BTreeMap::new(),
        };
        let mut listeners = lock(&self.listeners);
        // First all that can fail: new sockets, one for each thread.
        let threads = lock(&self.workers).len();
        let mut opened = Vec::new();
        for guest in &config.guests {
            for (key, service) in keys_of(guest) {
                if !listeners.by_configured.contains_key(&key) {
                    let first = event_loop::open_listener(key.2)?;
                    let address = event_loop::local_address(&first).unwrap_or(key.2);
                    let mut sockets = vec![first];
                    for _ in 1..threads {
                        sockets.push(event_loop::open_listener(address)?);
                    }
                    opened.push((key, service, address, sockets));
                }
            }
        }
        self.shared.set_limits(config.limits);
        self.send_all(|| Command::LimitsChanged);
        let mut guests = self
            .shared
            .guests
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let mut wanted = BTreeMap::new();
        let named: BTreeSet<String> = config
            .guests
            .iter()
            .map(|guest| guest.name.get_ref().clone())
            .collect();
        for settings in config.guests {
            let name = settings.name.get_ref().clone();
            let settings = Arc::new(settings);
            let site = known
                .get(&name)
                .filter(|site| settings.sites.contains_key(*site));
            let guest = match guests.get(&name) {
                Some(guest) => {
                    guest.set_settings(Arc::clone(&settings));
                    if !settings.sites.contains_key(&guest.site()) {
                        guest.set_site(settings.site.get_ref());
                    }
                    Arc::clone(guest)
                }
                None => {
                    let site = site.unwrap_or(settings.site.get_ref()).clone();
                    Arc::new(Guest::new(
                        Arc::clone(&settings),
                        site,
                        &self.shared.metrics,
                    ))
                }
            };
            for (key, service) in keys_of(&settings) {
                if let Some(listening) = listeners.by_configured.get(&key) {
                    let id = listening.id;
                    self.send_all(|| Command::UpdateListener {
                        id,
                        guest: Arc::clone(&guest),
                        service: Arc::clone(&service),
                    });
                }
                wanted.insert(key, Arc::clone(&guest));
            }
            guests.insert(name, guest);
        }
        guests.retain(|name, _| named.contains(name));
        drop(guests);
        listeners.by_configured.retain(|key, listening| {
            let stays = wanted.contains_key(key);
            if !stays {
                let id = listening.id;
                self.send_all(|| Command::Unlisten { id });
            }
            stays
        });
        for (key, service, address, sockets) in opened {
            let Some(guest) = wanted.get(&key) else {
                continue;
            };
            let id = listeners.next_id;
            listeners.next_id += 1;
            for (worker, socket) in lock(&self.workers).iter().zip(sockets) {
                worker.send(Command::Listen {
                    id,
                    socket,
                    guest: Arc::clone(guest),
                    service: Arc::clone(&service),
                });
            }
            let guest = guest.name.clone();
            listeners
                .by_configured
                .insert(key, Listening { id, guest, address });
        }
        Ok(())
    }

    fn send_all(&self, command: impl Fn() -> Command) {
        for worker in lock(&self.workers).iter() {
            worker.send(command());
        }
    }

    /// Sends a command to all threads, and gathers their answers.
    fn ask_all<T>(&self, command: impl Fn(Sender<T>) -> Command) -> Result<Vec<T>> {
        let (sender, receiver) = channel();
        let mut asked = 0;
        for worker in lock(&self.workers).iter() {
            asked += usize::from(worker.send(command(sender.clone())));
        }
        drop(sender);
        (0..asked)
            .map(|_| receiver.recv_timeout(PATIENCE).map_err(|_| Error::Worker))
            .collect()
    }

    fn tally(&self, command: impl Fn(Sender<Tally>) -> Command) -> Result<Tally> {
        let mut sum = Tally::default();
        self.ask_all(command)?
            .into_iter()
            .for_each(|tally| sum += tally);
        Ok(sum)
    }

    fn guest(&self, name: &str) -> Result<Arc<Guest>> {
        self.shared
            .guest(name)
            .ok_or_else(|| Error::UnknownGuest(name.to_owned()))
    }

    fn phase(&self, guest: &str) -> Arc<Mutex<Phase>> {
        Arc::clone(lock(&self.moves).entry(guest.to_owned()).or_default())
    }

    /// Warms the path to a site, ahead of a move there.
    ///
    /// # Errors
    /// When there is no such guest or site, or its move is past this step.
    pub fn prepare(&self, guest: &str, site: &str) -> Result<Warmth> {
        self.prepare_for(guest, site, None)
    }

    fn prepare_for(&self, guest: &str, site: &str, term: Option<Term>) -> Result<Warmth> {
        let known = self.guest(guest)?;
        let settings = known.settings();
        if !settings.sites.contains_key(site) {
            let (guest, site) = (guest.to_owned(), site.to_owned());
            return Err(Error::UnknownSite { guest, site });
        }
        repair::probe_permission()?;
        let phase = self.phase(guest);
        let mut phase = lock(&phase);
        let next = phase.after(guest, &Asked::Prepare(site.to_owned()))?;
        let mut warmth = Warmth::default();
        match settings.probe(site) {
            Some(remote) => match path::probe(remote, settings.source) {
                Ok(time) => warmth.connect_ms = Some(time.as_secs_f64() * 1000.0),
                Err(error) => warmth.warnings.push(error.chain()),
            },
            None => warmth.warnings.push(format!(
                "Site {site} has no probe_port: the round trip time is not known ahead"
            )),
        }
        let remote = settings
            .services
            .iter()
            .find_map(|s| settings.upstream(site, s));
        if let Some(remote) = remote {
            match self.paths.open(guest, remote.ip(), settings.source) {
                Ok(()) => {
                    warmth.window = true;
                    self.shared.mark.store(true, Ordering::Release);
                }
                Err(error) => warmth.warnings.push(error.chain()),
            }
        }
        for warning in &warmth.warnings {
            log::warn!("Preparing {guest} for {site}: {warning}");
        }
        *phase = next;
        match term {
            Some(term) => self.lend(guest, term),
            None => lock(&self.leases.0).end(guest),
        }
        Ok(warmth)
    }

    /// Freezes all connections of a guest that has been suspended. Returns when everything that
    /// it had sent is in. The move is cancelled if it is not released within `lease`, or
    /// [renewed](Self::renew).
    ///
    /// # Errors
    /// When the guest is unknown, or was not prepared.
    pub fn hold(&self, guest: &str, lease: Duration) -> Result<Tally> {
        self.hold_for(guest, Term::within(lease, Instant::now()))
    }

    fn hold_for(&self, guest: &str, term: Term) -> Result<Tally> {
        self.guest(guest)?;
        let phase = self.phase(guest);
        let mut phase = lock(&phase);
        let next = phase.after(guest, &Asked::Hold)?;
        *phase = next;
        self.lend(guest, term);
        self.tally(|reply| Command::Hold {
            guest: guest.to_owned(),
            grace: self.grace,
            reply,
        })
    }

    /// Makes all connections of a held guest anew, towards the site it was prepared for.
    ///
    /// # Errors
    /// When the guest is unknown or not held.
    pub fn retarget(&self, guest: &str) -> Result<Tally> {
        let known = self.guest(guest)?;
        let phase = self.phase(guest);
        let mut phase = lock(&phase);
        let next = phase.after(guest, &Asked::Retarget)?;
        let site = phase.destination().unwrap_or_default().to_owned();
        let block = self.block(&known, &site)?;
        let tally = self.tally(|reply| Command::Retarget {
            guest: guest.to_owned(),
            site: site.clone(),
            mark: self.mark,
            reply,
        })?;
        drop(block);
        *phase = next;
        Ok(tally)
    }

    /// Where sockets with the new addresses are still there, they go first, and for a moment the
    /// connection has none: nothing may come in then. Twice the time that they are kept: a thread
    /// that is late to close them does no harm.
    fn block(&self, guest: &Guest, site: &str) -> Result<Option<Block>> {
        let (settings, from) = (guest.settings(), guest.site());
        let back = lock(&self.left)
            .get(&(guest.name.clone(), site.to_owned()))
            .is_some_and(|left| left.elapsed() < LATE * 2);
        let remotes: Vec<SocketAddr> = settings
            .services
            .iter()
            .filter_map(|service| {
                let remote = settings.upstream(site, service)?;
                let same = settings.upstream(&from, service) == Some(remote);
                (same || back).then_some(remote)
            })
            .collect();
        if remotes.is_empty() {
            return Ok(None);
        }
        let number = self.blocks.fetch_add(1, Ordering::Relaxed);
        Block::new(
            &format!("netproxy_{}_{number}", std::process::id()),
            &remotes,
        )
        .map(Some)
    }

    /// Lets all connections go on at the new site. With a `wait`, one connection of each thread
    /// asks the guest until it answers, at most so long, before anything pending is sent.
    ///
    /// # Errors
    /// When the guest is unknown or not re-targeted.
    pub fn release(&self, guest: &str, wait: Duration) -> Result<Tally> {
        let known = self.guest(guest)?;
        let phase = self.phase(guest);
        let mut phase = lock(&phase);
        self.release_now(&known, &mut phase, wait)
    }

    fn release_now(&self, known: &Guest, phase: &mut Phase, wait: Duration) -> Result<Tally> {
        let guest = known.name.as_str();
        let next = phase.after(guest, &Asked::Release)?;
        let site = phase.destination().unwrap_or_default().to_owned();
        lock(&self.left).insert((guest.to_owned(), known.site()), Instant::now());
        known.set_site(&site);
        let tally = self.tally(|reply| Command::Release {
            guest: guest.to_owned(),
            wait,
            reply,
        })?;
        *phase = next;
        // After what is urgent.
        self.end_move(guest);
        if let Err(error) = self.remember() {
            // The connections are where they should be; only a restart would not know.
            log::error!(
                "Where {guest} is could not be written down: {}",
                error.chain()
            );
        }
        Ok(tally)
    }

    /// Lets all connections go on at the old site.
    ///
    /// The old sockets have waited for answers in vain, longer each time, and would go on waiting.
    /// So frozen ones are made anew too, as for a move that ends where it began.
    ///
    /// # Errors
    /// When the guest is unknown or no move is under way.
    pub fn cancel(&self, guest: &str) -> Result<Tally> {
        let known = self.guest(guest)?;
        let phase = self.phase(guest);
        let mut phase = lock(&phase);
        self.cancel_now(&known, &mut phase)
    }

    fn cancel_now(&self, known: &Guest, phase: &mut Phase) -> Result<Tally> {
        let guest = known.name.as_str();
        let next = phase.after(guest, &Asked::Cancel)?;
        if !matches!(*phase, Phase::Prepared { .. })
            && let Err(error) = self.make_anew(known)
        {
            // They go on as they are, a little later.
            log::warn!("Cancelling the move of {guest}: {}", error.chain());
        }
        let tally = self.tally(|reply| Command::Cancel {
            guest: guest.to_owned(),
            reply,
        })?;
        *phase = next;
        self.end_move(guest);
        Ok(tally)
    }

    /// The move of a held guest may take until `lease` from now.
    ///
    /// # Errors
    /// When the guest is unknown, or nothing is lent: the move has ended, or its lease has.
    pub fn renew(&self, guest: &str, lease: Duration) -> Result<()> {
        self.guest(guest)?;
        let (leases, bell) = &*self.leases;
        if !lock(leases).renew(guest, lease, Instant::now()) {
            return Err(Error::LeaseOver(guest.to_owned()));
        }
        bell.notify_all();
        Ok(())
    }

    fn lend(&self, guest: &str, term: Term) {
        let (leases, bell) = &*self.leases;
        lock(leases).grant(guest, term);
        bell.notify_all();
    }

    /// Gives a move up, if its lease is over still: `over` is looked at when nobody else can
    /// take a step of it.
    ///
    /// The caller may have died when the guest ran at the new site already. So a re-targeted one
    /// is asked there for a moment, and goes on there if it answers.
    fn give_up(&self, guest: &str, why: &str, over: impl Fn(&Leases) -> bool) {
        let phase = self.phase(guest);
        let mut phase = lock(&phase);
        if !over(&lock(&self.leases.0)) {
            return;
        }
        let Ok(known) = self.guest(guest) else {
            lock(&self.leases.0).end(guest);
            return;
        };
        let ended = self.shared.metrics.leases_ended.get_or_create(&known.label);
        ended.inc();
        let answers = matches!(*phase, Phase::Retargeted { .. }) && self.answers(guest);
        let (result, site) = if answers {
            let to = phase.destination().unwrap_or_default().to_owned();
            (self.release_now(&known, &mut phase, Duration::ZERO), to)
        } else {
            (self.cancel_now(&known, &mut phase), known.site())
        };
        match result {
            Ok(tally) => log::warn!(
                "{why}: {} connections of {guest} go on at {site}, {} failed",
                tally.connections,
                tally.failed
            ),
            Err(error) => log::error!("{why}: giving up {guest}: {}", error.chain()),
        }
        // Whatever came of it, it is not tried for ever.
        lock(&self.leases.0).end(guest);
    }

    /// Whether a re-targeted guest answers at the new site.
    fn answers(&self, guest: &str) -> bool {
        let until = Instant::now() + LAST_QUESTION;
        loop {
            let ask = |reply| Command::Ask {
                guest: guest.to_owned(),
                reply,
            };
            match self.ask_all(ask) {
                Ok(answers) if answers.contains(&true) => return true,
                Ok(_) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                _ => return false,
            }
        }
    }

    /// Makes the frozen sockets of a guest anew, towards the site where it is.
    fn make_anew(&self, guest: &Guest) -> Result<()> {
        let name = || guest.name.clone();
        let site = guest.site();
        self.tally(|reply| Command::Undo {
            guest: name(),
            reply,
        })?;
        let settings = guest.settings();
        let remote = settings
            .services
            .iter()
            .find_map(|s| settings.upstream(&site, s));
        if let Some(remote) = remote {
            self.paths.open(&guest.name, remote.ip(), settings.source)?;
        }
        let _block = self.block(guest, &site)?;
        let mark = self.mark;
        self.tally(|reply| Command::Retarget {
            guest: name(),
            site: site.clone(),
            mark,
            reply,
        })?;
        Ok(())
    }

    fn end_move(&self, guest: &str) {
        lock(&self.leases.0).end(guest);
        self.paths.close(guest);
    }

    /// Writes down where each guest is.
    fn remember(&self) -> Result<()> {
        let Some(path) = &self.state else {
            return Ok(());
        };
        let guests = self
            .shared
            .guests
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let sites = guests
            .iter()
            .map(|(name, guest)| (name.clone(), guest.site()))
            .collect();
        drop(guests);
        state_file::store(path, sites)
    }

    /// Refuses new connections, of one guest or of all, or takes them again. Open ones go on.
    ///
    /// # Errors
    /// When the guest is unknown.
    pub fn drain(&self, guest: Option<&str>, on: bool) -> Result<()> {
        if let Some(guest) = guest {
            self.guest(guest)?.set_draining(on);
            return Ok(());
        }
        let guests = self
            .shared
            .guests
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        guests.values().for_each(|guest| guest.set_draining(on));
        Ok(())
    }

    /// Takes another configuration: guests, services and limits. Connections go on, those of
    /// removed services too; but a guest that is no longer named can't be moved. What is below
    /// `[proxy]` is only read at the start.
    ///
    /// # Errors
    /// [`Error::Busy`] while a guest is moved; or why a new listener can't be had. Then nothing
    /// has changed.
    pub fn reload(&self, config: Config) -> Result<()> {
        // No move may start meanwhile.
        let moves = lock(&self.moves);
        let mut phases = Vec::new();
        for (name, phase) in moves.iter() {
            let guard = phase.try_lock().map_err(|_| Error::Busy(name.clone()))?;
            if *guard != Phase::Settled {
                return Err(Error::Busy(name.clone()));
            }
            phases.push(guard);
        }
        self.apply(config)
    }

    fn reload_file(&self) -> Result<()> {
        let Some(file) = &self.file else {
            return Err(Error::Config("The proxy was started without a file".into()));
        };
        self.reload(Config::load(file)?)
    }

    /// All guests and all connections.
    ///
    /// # Errors
    /// [`Error::Worker`] when a thread does not answer.
    pub fn list(&self) -> Result<Overview> {
        let mut connections: Vec<ConnectionInfo> = self
            .ask_all(|reply| Command::List { reply })?
            .into_iter()
            .flatten()
            .collect();
        connections.sort_by_key(|connection| connection.id);
        let guests = self
            .shared
            .guests
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let listeners = lock(&self.listeners);
        let guests = guests
            .into_values()
            .map(|guest| GuestInfo {
                site: guest.site(),
                phase: self
                    .phase(&guest.name)
                    .try_lock()
                    .map_or_else(|_| Phase::Settled, |p| p.clone()),
                draining: guest.draining(),
                connections: guest.open(),
                listeners: listeners
                    .by_configured
                    .values()
                    .filter(|listening| listening.guest == guest.name)
                    .map(|listening| listening.address)
                    .collect(),
                name: guest.name.clone(),
            })
            .collect();
        Ok(Overview {
            guests,
            connections,
        })
    }

    /// The metrics, as Prometheus reads them.
    #[must_use]
    pub fn metrics(&self) -> String {
        let held = i64::try_from(self.shared.budget.held()).unwrap_or(i64::MAX);
        self.shared.metrics.buffered.set(held);
        self.shared.metrics.text()
    }

    /// Where metrics are asked for, if anywhere.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        lock(&self.servers).1.as_ref().map(MetricsServer::address)
    }

    /// Connections that are open now.
    #[must_use]
    pub fn open(&self) -> usize {
        self.shared.open()
    }

    fn carry_out(&self, caller: u64, request: Request) -> Result<serde_json::Value> {
        fn value(result: impl Serialize) -> Result<serde_json::Value> {
            serde_json::to_value(result).map_err(|error| Error::Protocol(error.to_string()))
        }
        let nothing = || Ok(serde_json::json!({}));
        match request {
            Request::List => value(self.list()?),
            Request::Prepare { guest, site, tied } => {
                let term = tied.then_some(Term::Caller(caller));
                value(self.prepare_for(&guest, &site, term)?)
            }
            Request::Hold {
                guest,
                lease_ms,
                tied,
            } => {
                let limit = Duration::from_millis(lease_ms);
                let term = if tied {
                    Term::Caller(caller)
                } else {
                    Term::within(limit, Instant::now())
                };
                value(self.hold_for(&guest, term)?)
            }
            Request::Renew { guest, lease_ms } => {
                self.renew(&guest, Duration::from_millis(lease_ms))?;
                nothing()
            }
            Request::Retarget { guest } => value(self.retarget(&guest)?),
            Request::Release { guest, wait_ms } => {
                value(self.release(&guest, Duration::from_millis(wait_ms))?)
            }
            Request::Cancel { guest } => value(self.cancel(&guest)?),
            Request::Drain { guest, on } => {
                self.drain(guest.as_deref(), on)?;
                nothing()
            }
            Request::Reload => {
                self.reload_file()?;
                nothing()
            }
            Request::Metrics => Ok(serde_json::json!({ "text": self.metrics() })),
        }
    }
}

/// Where the control socket's requests are answered.
struct Desk(Weak<Proxy>);

impl Attendant for Desk {
    fn request(
        &self,
        caller: u64,
        request: Request,
    ) -> std::result::Result<serde_json::Value, String> {
        let proxy = self.0.upgrade().ok_or("The proxy is ending")?;
        proxy
            .carry_out(caller, request)
            .map_err(|error| error.chain())
    }

    fn closed(&self, caller: u64) {
        let Some(proxy) = self.0.upgrade() else {
            return;
        };
        let guests = lock(&proxy.leases.0).of(caller);
        for guest in guests {
            proxy.give_up(&guest, "The caller of a move has gone", |leases| {
                leases.of(caller).contains(&guest)
            });
        }
    }
}

/// Starts the thread that waits for leases to end.
fn watch(proxy: &Arc<Proxy>) -> Result<JoinHandle<()>> {
    let (weak, shared) = (Arc::downgrade(proxy), Arc::clone(&proxy.leases));
    let wait = move || {
        let (leases, bell) = &*shared;
        let mut lent = lock(leases);
        while !lent.is_closed() {
            let now = Instant::now();
            let due = lent.due(now);
            if due.is_empty() {
                let idle = Duration::from_secs(3600);
                let wait = lent.next().map_or(idle, |at| at - now);
                lent = bell
                    .wait_timeout(lent, wait)
                    .map_or_else(|broken| broken.into_inner().0, |(lent, _)| lent);
                continue;
            }
            drop(lent);
            let Some(proxy) = weak.upgrade() else { return };
            for guest in due {
                proxy.give_up(&guest, "The lease of a move is over", |leases| {
                    leases.due(Instant::now()).contains(&guest)
                });
            }
            drop(proxy);
            lent = lock(leases);
        }
    };
    std::thread::Builder::new()
        .name("leases".into())
        .spawn(wait)
        .map_err(crate::error::system("Starting a thread"))
}

/// A connection takes two descriptors. The limit that a shell gives is for old programs that
/// use select.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        log::info!("The limit of open files stays at {soft}: {error}");
    }
}

/// The listeners that a guest's configuration asks for.
fn keys_of(guest: &GuestConfig) -> Vec<((String, String, SocketAddr), Arc<ServiceConfig>)> {
    let mut keys = Vec::new();
    for service in &guest.services {
        let shared = Arc::new(service.clone());
        for listen in &service.listen {
            let key = (
                guest.name.get_ref().clone(),
                service.name.get_ref().clone(),
                *listen.get_ref(),
            );
            keys.push((key, Arc::clone(&shared)));
        }
    }
    keys
}

impl Drop for Proxy {
    fn drop(&mut self) {
        *lock(&self.servers) = (None, None);
        lock(&self.leases.0).close();
        self.leases.1.notify_all();
        if let Some(watch) = lock(&self.watch).take()
            && watch.thread().id() != std::thread::current().id()
        {
            let _ = watch.join();
        }
        for worker in lock(&self.workers).iter_mut() {
            worker.stop();
        }
    }
}
