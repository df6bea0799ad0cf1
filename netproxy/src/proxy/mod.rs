//! The proxy as a whole: threads, listeners, and the steps of moves.

mod desk;
mod memory;
mod moves;
mod reach;
mod turn;
mod upgrade;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::{Config, GuestConfig, ServiceConfig};
use crate::connection::ConnectionInfo;
use crate::control::ControlServer;
use crate::error::{Error, Result};
use crate::event_loop::{self, Command, Tally, WorkerHandle};
use crate::guest::{Guest, Shared};
use crate::metrics::MetricsServer;
use crate::repair;
use crate::retarget::lease::Leases;
use crate::retarget::path::Paths;
use crate::retarget::phase::Phase;
use crate::upgrade::Program;
use crate::upgrade::state::State;
use desk::Desk;
use turn::Turns;

/// How long the threads may take for one step, beyond the time that they are asked to wait.
const PATIENCE: Duration = Duration::from_secs(60);

/// One guest in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInfo {
    /// Its name.
    pub name: String,
    /// The site where it is.
    pub site: String,
    /// Where its move is. A step that is under way shows at its end: only a guest that nobody
    /// moves is settled.
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
// Whoever locks more than one thing does it in this order:
//
//   moves ──▶ a guest's turn ──▶ listeners ──▶ removed ──▶ shared.guests ──▶ workers
//                       └──────▶ remembering ─────────────────▲
//
// Nothing else is locked while one of the other locks is held. What has a turn, or anything after
// it, never asks for `turns_of` a guest: an upgrade holds `moves` from its beginning to its end.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    workers: Mutex<Vec<WorkerHandle>>,
    listeners: Mutex<Listeners>,
    moves: Mutex<BTreeMap<String, Arc<Turns>>>,
    /// Guests that are not named any more, for as long as they have connections.
    removed: Mutex<BTreeMap<String, Weak<Guest>>>,
    /// When each guest last left a site.
    left: Mutex<BTreeMap<(String, String), Instant>>,
    /// What is lent, and a bell that rings when that changes.
    leases: Arc<(Mutex<Leases>, Condvar)>,
    watch: Mutex<Option<JoinHandle<()>>>,
    blocks: AtomicU64,
    paths: Paths,
    mark: u32,
    grace: Duration,
    /// How many pipes, and their size.
    pipes: (usize, usize),
    state: Option<PathBuf>,
    /// Held by who writes the state file.
    remembering: Mutex<()>,
    control: PathBuf,
    file: Option<PathBuf>,
    /// What takes this program's place at an upgrade.
    program: Option<Program>,
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
        Self::begin(config, file, None, None)
    }

    fn begin(
        config: Config,
        file: Option<PathBuf>,
        program: Option<Program>,
        state: Option<State>,
    ) -> Result<Arc<Self>> {
        if let Err(error) = repair::probe_permission() {
            log::warn!(
                "Connections can't be re-targeted without CAP_NET_ADMIN: {}",
                error.chain()
            );
        }
        raise_descriptor_limit();
        let settings = config.proxy.clone();
        let threads = match (&state, settings.threads) {
            // Each has its listeners, with clients in their queues.
            (Some(state), _) => state.workers.len(),
            (None, 0) => std::thread::available_parallelism().map_or(1, usize::from),
            (None, threads) => threads,
        };
        let proxy = Arc::new(Self {
            shared: Arc::new(Shared::new(config.limits.clone())),
            workers: Mutex::default(),
            listeners: Mutex::default(),
            moves: Mutex::default(),
            removed: Mutex::default(),
            left: Mutex::default(),
            leases: Arc::default(),
            watch: Mutex::default(),
            blocks: AtomicU64::new(0),
            paths: Paths::new(settings.mark, settings.table),
            mark: settings.mark,
            grace: settings.grace.0,
            pipes: (settings.pipes, settings.pipe_size.0),
            state: settings.state.clone(),
            remembering: Mutex::default(),
            control: settings.control.clone(),
            file,
            program,
            servers: Mutex::default(),
        });
        let workers = proxy.spawn_workers(threads)?;
        *lock(&proxy.workers) = workers;
        let taken_over = state.is_some();
        // Whoever has live connections does not give up for less.
        let unless_live = |result: Result<()>| match result {
            Err(error) if taken_over => {
                log::error!("After taking over: {}", error.chain());
                Ok(())
            }
            result => result,
        };
        let seed = match state {
            Some(state) => Some(proxy.take_over(state)?),
            None => None,
        };
        unless_live(proxy.apply(config))?;
        *lock(&proxy.watch) = Some(moves::watch(&proxy)?);
        let control = || -> Result<()> {
            let desk = Desk(Arc::downgrade(&proxy));
            let server = proxy.start_control(seed, desk)?;
            lock(&proxy.servers).0 = Some(server);
            Ok(())
        };
        unless_live(control())?;
        if let Some(address) = settings.metrics {
            let weak = Arc::downgrade(&proxy);
            let render = move || weak.upgrade().map_or_else(String::new, |p| p.metrics());
            let serve = MetricsServer::start(address, render)
                .map(|server| lock(&proxy.servers).1 = Some(server));
            unless_live(serve)?;
        }
        Ok(proxy)
    }

    /// Takes guests, services and limits of a configuration. Listeners that stay keep their
    /// sockets, and with them the clients in their queues.
    fn apply(&self, config: Config) -> Result<()> {
        let known = self.remembered()?;
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
        let mut removed = lock(&self.removed);
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
            // One that has connections still is the same one as before, with all that counts it.
            // How many these are says nothing: after an upgrade they may not be taken up yet.
            let again = || {
                let guest = removed.remove(&name)?.upgrade()?;
                guest.set_draining(false);
                Some(guest)
            };
            let guest = match guests.get(&name).cloned().or_else(again) {
                Some(guest) => {
                    guest.set_settings(Arc::clone(&settings));
                    if !settings.sites.contains_key(&guest.site()) {
                        guest.set_site(settings.site.get_ref());
                    }
                    guest
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
        guests.retain(|name, guest| {
            let stays = named.contains(name);
            if !stays {
                removed.insert(name.clone(), Arc::downgrade(guest));
            }
            stays
        });
        drop(guests);
        removed.retain(|_, guest| guest.strong_count() > 0);
        drop(removed);
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
        self.ask_all_within(PATIENCE, command)
    }

    fn ask_all_within<T>(
        &self,
        patience: Duration,
        command: impl Fn(Sender<T>) -> Command,
    ) -> Result<Vec<T>> {
        let (sender, receiver) = channel();
        let mut asked = 0;
        for worker in lock(&self.workers).iter() {
            asked += usize::from(worker.send(command(sender.clone())));
        }
        drop(sender);
        (0..asked)
            .map(|_| receiver.recv_timeout(patience).map_err(|_| Error::Worker))
            .collect()
    }

    fn tally(&self, command: impl Fn(Sender<Tally>) -> Command) -> Result<Tally> {
        self.tally_within(PATIENCE, command)
    }

    fn tally_within(
        &self,
        patience: Duration,
        command: impl Fn(Sender<Tally>) -> Command,
    ) -> Result<Tally> {
        let mut sum = Tally::default();
        self.ask_all_within(patience, command)?
            .into_iter()
            .for_each(|tally| sum += tally);
        Ok(sum)
    }

    fn guest(&self, name: &str) -> Result<Arc<Guest>> {
        self.shared
            .guest(name)
            .ok_or_else(|| Error::UnknownGuest(name.to_owned()))
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
    /// removed services too, also to where their guest moves; but a guest that is no longer named
    /// can't be moved. What is below
    /// `[proxy]` is only read at the start.
    ///
    /// # Errors
    /// [`Error::Busy`] while a guest is moved; or why a new listener can't be had. Then nothing
    /// has changed.
    pub fn reload(&self, config: Config) -> Result<()> {
        self.while_settled(|| self.apply(config))
    }

    /// Does something while no guest is moved, and no move can start.
    fn while_settled<T>(&self, what: impl FnOnce() -> Result<T>) -> Result<T> {
        let moves = lock(&self.moves);
        let mut all = Vec::new();
        for (name, turns) in moves.iter() {
            let turn = turns.take().ok_or_else(|| Error::Busy(name.clone()))?;
            if turn.phase() != Phase::Settled {
                return Err(Error::Busy(name.clone()));
            }
            all.push(turn);
        }
        what()
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
        // Before the listeners are locked, and before it is looked where a guest is: one that
        // arrives meanwhile is not to look settled where it was.
        let guests: Vec<(Arc<Guest>, Phase)> = guests
            .into_values()
            .map(|guest| {
                let phase = self.turns_of(&guest.name).phase();
                (guest, phase)
            })
            .collect();
        let listeners = lock(&self.listeners);
        let guests = guests
            .into_iter()
            .map(|(guest, phase)| GuestInfo {
                site: guest.site(),
                phase,
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
