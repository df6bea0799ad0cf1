//! Taking the place of the program before, and giving it to the next one.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::desk::Desk;
use super::{Listening, Proxy, lock};
use crate::config::{Config, GuestConfig, ServiceConfig};
use crate::connection::Packed;
use crate::control::ControlServer;
use crate::error::{Error, Result, system};
use crate::event_loop::{self, Command, PackedWorker, WorkerHandle};
use crate::guest::Guest;
use crate::metrics::Metrics;
use crate::upgrade::state::{
    ConnectionState, GuestState, Handed, ListenerState, Micros, State, WorkerState,
};
use crate::upgrade::{self, Program, Start};

/// Things that are told apart by being the same one, and numbered.
struct Numbers<T> {
    all: Vec<Arc<T>>,
    by_pointer: BTreeMap<*const T, usize>,
}

impl<T> Numbers<T> {
    fn new() -> Self {
        Self {
            all: Vec::new(),
            by_pointer: BTreeMap::new(),
        }
    }

    fn of(&mut self, one: &Arc<T>) -> usize {
        *self.by_pointer.entry(Arc::as_ptr(one)).or_insert_with(|| {
            self.all.push(Arc::clone(one));
            self.all.len() - 1
        })
    }

    /// The number of one that has one; of anything else, a number that nobody has.
    fn known(&self, one: &Arc<T>) -> usize {
        let number = self.by_pointer.get(&Arc::as_ptr(one));
        number.copied().unwrap_or(usize::MAX)
    }
}

/// Guests and services of the connections that were put down, in the order of their numbers.
struct Register {
    guests: Numbers<Guest>,
    services: Numbers<ServiceConfig>,
    guest_states: Vec<GuestState>,
    service_texts: Vec<String>,
}

/// Replaces guests and services by their numbers.
fn number(
    worker: PackedWorker,
    guests: &Numbers<Guest>,
    services: &Numbers<ServiceConfig>,
) -> WorkerState {
    let connections = worker.connections.into_iter().map(|packed| {
        let mut state = packed.state;
        state.guest = guests.known(&packed.guest);
        state.service = services.known(&packed.service);
        state
    });
    WorkerState {
        connections: connections.collect(),
        listeners: worker.listeners,
        late: worker.late,
    }
}

/// The way back from [`number`].
fn find(
    workers: Vec<WorkerState>,
    guests: &[Arc<Guest>],
    services: &[Arc<ServiceConfig>],
) -> Vec<PackedWorker> {
    let packed = |state: ConnectionState| {
        Some(Packed {
            guest: Arc::clone(guests.get(state.guest)?),
            service: Arc::clone(services.get(state.service)?),
            state,
        })
    };
    let worker = |worker: WorkerState| PackedWorker {
        listeners: worker.listeners,
        connections: worker.connections.into_iter().filter_map(packed).collect(),
        late: worker.late,
    };
    workers.into_iter().map(worker).collect()
}

fn as_text(settings: &impl serde::Serialize) -> Result<String> {
    toml::to_string(settings).map_err(|error| Error::Config(error.to_string()))
}

fn from_text<T: serde::de::DeserializeOwned>(text: &str) -> Result<T> {
    toml::from_str(text).map_err(|error| Error::Config(error.to_string()))
}

/// The guests of a state, each name once: of several, the one that the configuration names. Older
/// programs have made a second one when a guest was named again, and a move knows it by its name.
fn known_guests(states: &[GuestState], metrics: &Metrics) -> Result<Vec<Arc<Guest>>> {
    let mut by_name: BTreeMap<String, Arc<Guest>> = BTreeMap::new();
    let mut known: Vec<Option<Arc<Guest>>> = vec![None; states.len()];
    for named in [true, false] {
        let own = states.iter().zip(&mut known);
        for (state, place) in own.filter(|(state, _)| state.named == named) {
            let settings: GuestConfig = from_text(&state.settings)?;
            let name = settings.name.get_ref().clone();
            let guest = by_name.entry(name).or_insert_with(|| {
                let guest = Guest::new(Arc::new(settings), state.site.clone(), metrics);
                guest.set_draining(state.draining);
                Arc::new(guest)
            });
            *place = Some(Arc::clone(guest));
        }
    }
    Ok(known.into_iter().flatten().collect())
}

impl Proxy {
    /// Starts the proxy of a configuration file as a program's one task: takes over what the
    /// program before left, if this one was started for that, and can itself be
    /// [upgraded](Self::upgrade). None: this program was only asked whether it could take over;
    /// it has answered on its standard output, and should end.
    ///
    /// Signals that a program takes have to be taken before this: those that came while the
    /// program before it made way come now. Those that ask it to end set `ends` as well: then it
    /// does, and makes way for no other program any more.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_program(file: &Path, ends: Arc<AtomicBool>) -> Result<Option<Arc<Self>>> {
        let program = Program::own(ends)?;
        let (config, state) = match upgrade::start()? {
            Start::Fresh => (Config::load(file)?, None),
            Start::Check(text) => {
                Config::parse(&text, &file.display().to_string())?;
                upgrade::answer()?;
                return Ok(None);
            }
            Start::TakeOver(state) => {
                // What was checked, whatever has become of the file since.
                let config = Config::parse(&state.text, &file.display().to_string())?;
                upgrade::let_signals_in();
                (config, Some(*state))
            }
        };
        Self::begin(config, Some(file.to_owned()), Some(program), state).map(Some)
    }

    /// Makes way for the program that is now where this one was started from. All connections go
    /// on. Returns only if that fails; then they go on as well, in this program.
    #[must_use]
    pub fn upgrade(&self) -> Error {
        self.upgrade_for(None)
    }

    pub(super) fn upgrade_for(&self, caller: Option<OwnedFd>) -> Error {
        match self.while_settled(|| self.make_way(caller)) {
            Ok(error) | Err(error) => error,
        }
    }

    /// An `Err` is before anything happened.
    fn make_way(&self, caller: Option<OwnedFd>) -> Result<Error> {
        let (Some(program), Some(file)) = (&self.program, &self.file) else {
            return Err(Error::Config(
                "The proxy is part of another program, and can't be exchanged".into(),
            ));
        };
        let text = std::fs::read_to_string(file).map_err(|source| Error::File {
            path: file.clone(),
            source,
        })?;
        program.check(&text)?;
        let control = match &lock(&self.servers).0 {
            Some(server) => server.listener().map_err(system("The control socket"))?,
            None => return Err(Error::Worker),
        };
        let fresh = self.spawn_workers(lock(&self.workers).len())?;
        // From here on nothing may be lost.
        let packed = self.pack_all();
        let mut old = std::mem::replace(&mut *lock(&self.workers), fresh);
        old.iter_mut().for_each(WorkerHandle::stop);
        let register = match self.register(&packed) {
            Ok(register) => register,
            Err(error) => {
                self.give_back(packed);
                return Ok(error);
            }
        };
        let mut state = State {
            text,
            next_id: self.shared.next_id(),
            guests: register.guest_states,
            services: register.service_texts,
            listeners: self.listener_states(),
            workers: packed
                .into_iter()
                .map(|worker| number(worker, &register.guests, &register.services))
                .collect(),
            left: self.left_states(),
            control: Handed(control),
            control_path: self.control.clone(),
            caller: caller.map(Handed),
        };
        log::info!("Making way for another program");
        let error = program.become_it(&mut state);
        log::error!("This program goes on: {}", error.chain());
        let (guests, services) = (register.guests.all, register.services.all);
        self.give_back(find(state.workers, &guests, &services));
        Ok(error)
    }

    pub(super) fn spawn_workers(&self, threads: usize) -> Result<Vec<WorkerHandle>> {
        let pipes = self.pipes.0.div_ceil(threads.max(1));
        (0..threads)
            .map(|index| event_loop::spawn(index, Arc::clone(&self.shared), pipes, self.pipes.1))
            .collect()
    }

    /// Lets all threads put down what they have. One that does not answer has died, and its
    /// connections with it: that is no reason to lose those of the others.
    fn pack_all(&self) -> Vec<PackedWorker> {
        let (sender, receiver) = channel();
        self.send_all(|| Command::Pack {
            reply: sender.clone(),
        });
        drop(sender);
        receiver.into_iter().collect()
    }

    /// Numbers the guests and services of connections; those that the configuration names first.
    fn register(&self, packed: &[PackedWorker]) -> Result<Register> {
        let (mut guests, mut services) = (Numbers::new(), Numbers::new());
        let named = self
            .shared
            .guests
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let connections = packed.iter().flat_map(|worker| &worker.connections);
        for guest in named.values() {
            guests.of(guest);
        }
        for connection in connections {
            guests.of(&connection.guest);
            services.of(&connection.service);
        }
        let guest_state = |(number, guest): (usize, &Arc<Guest>)| {
            Ok(GuestState {
                settings: as_text(&*guest.settings())?,
                site: guest.site(),
                draining: guest.draining(),
                named: number < named.len(),
            })
        };
        let guest_states = guests.all.iter().enumerate().map(guest_state);
        let service_texts = services.all.iter().map(|service| as_text(&**service));
        Ok(Register {
            guest_states: guest_states.collect::<Result<_>>()?,
            service_texts: service_texts.collect::<Result<_>>()?,
            guests,
            services,
        })
    }

    fn listener_states(&self) -> Vec<ListenerState> {
        lock(&self.listeners)
            .by_configured
            .iter()
            .map(|((guest, service, configured), listening)| ListenerState {
                id: listening.id,
                guest: guest.clone(),
                service: service.clone(),
                configured: *configured,
                address: listening.address,
            })
            .collect()
    }

    fn left_states(&self) -> Vec<(String, String, Micros)> {
        let now = Instant::now();
        lock(&self.left)
            .iter()
            .map(|((guest, site), at)| (guest.clone(), site.clone(), Micros::since(*at, now)))
            .collect()
    }

    /// Gives the threads what was put down.
    fn give_back(&self, workers: Vec<PackedWorker>) {
        let commands: Vec<Vec<Command>> = workers
            .into_iter()
            .map(|mut worker| {
                let listeners = std::mem::take(&mut worker.listeners);
                let listens = listeners.into_iter().filter_map(|(id, socket)| {
                    let (guest, service) = self.offered_by(id)?;
                    Some(Command::Listen {
                        id,
                        socket: socket.0.into(),
                        guest,
                        service,
                    })
                });
                let mut commands: Vec<Command> = listens.collect();
                commands.push(Command::Adopt(worker));
                commands
            })
            .collect();
        // Only now: the listeners are locked before the threads, never after.
        for (handle, commands) in lock(&self.workers).iter().zip(commands) {
            for command in commands {
                handle.send(command);
            }
        }
    }

    /// What a listener is for.
    fn offered_by(&self, id: usize) -> Option<(Arc<Guest>, Arc<ServiceConfig>)> {
        let listeners = lock(&self.listeners);
        let mut all = listeners.by_configured.iter();
        let ((guest, service, _), _) = all.find(|(_, listening)| listening.id == id)?;
        let guest = self.shared.guest(guest)?;
        let settings = guest.settings();
        let mut services = settings.services.iter();
        let service = services.find(|own| own.name.get_ref() == service)?.clone();
        Some((guest, Arc::new(service)))
    }

    /// Goes on where the program before was.
    pub(super) fn take_over(&self, state: State) -> Result<ControlSeed> {
        let guests = known_guests(&state.guests, &self.shared.metrics)?;
        let services = state
            .services
            .iter()
            .map(|service| from_text(service).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let mut named = self
            .shared
            .guests
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let mut removed = BTreeMap::new();
        for (guest, state) in guests.iter().zip(&state.guests) {
            if state.named {
                named.insert(guest.name.clone(), Arc::clone(guest));
            } else {
                removed.insert(guest.name.clone(), Arc::downgrade(guest));
            }
        }
        removed.retain(|name, _| !named.contains_key(name));
        drop(named);
        *lock(&self.removed) = removed;
        self.shared.set_next_id(state.next_id);
        let mut listeners = lock(&self.listeners);
        for listener in &state.listeners {
            listeners.next_id = listeners.next_id.max(listener.id + 1);
            let key = (
                listener.guest.clone(),
                listener.service.clone(),
                listener.configured,
            );
            let listening = Listening {
                id: listener.id,
                guest: listener.guest.clone(),
                address: listener.address,
            };
            listeners.by_configured.insert(key, listening);
        }
        drop(listeners);
        let now = Instant::now();
        for (guest, site, at) in state.left {
            lock(&self.left).insert((guest, site), at.ago(now));
        }
        self.give_back(find(state.workers, &guests, &services));
        Ok(ControlSeed {
            listener: state.control.0,
            path: state.control_path,
            caller: state.caller.map(|caller| caller.0),
        })
    }

    pub(super) fn start_control(
        &self,
        seed: Option<ControlSeed>,
        desk: Desk,
    ) -> Result<ControlServer> {
        let desk = Arc::new(desk);
        let Some(seed) = seed else {
            return ControlServer::start(&self.control, None, desk);
        };
        if seed.path == self.control {
            return ControlServer::adopt(&self.control, seed.listener, seed.caller, desk);
        }
        // The configuration has another path for it now.
        let server = ControlServer::start(&self.control, seed.caller, desk)?;
        let _ = std::fs::remove_file(&seed.path);
        Ok(server)
    }
}

/// A control socket that was taken over.
pub(super) struct ControlSeed {
    listener: OwnedFd,
    path: PathBuf,
    caller: Option<OwnedFd>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(name: &str, site: &str, named: bool) -> GuestState {
        let settings = format!(
            "name = {name:?}\naddress = \"192.0.2.1\"\nsite = \"a\"\n[sites.a]\nrouted = true\n"
        );
        let (site, draining) = (site.to_owned(), !named);
        GuestState {
            settings,
            site,
            draining,
            named,
        }
    }

    #[test]
    fn what_has_one_name_is_one_guest() {
        let states = [
            state("split", "old", false),
            state("split", "here", true),
            state("gone", "a", false),
            state("other", "a", true),
            state("gone", "a", false),
        ];
        let guests = known_guests(&states, &Metrics::new()).unwrap();
        let names: Vec<&str> = guests.iter().map(|guest| guest.name.as_str()).collect();
        assert_eq!(names, ["split", "split", "gone", "other", "gone"]);
        assert!(Arc::ptr_eq(&guests[0], &guests[1]) && Arc::ptr_eq(&guests[2], &guests[4]));
        assert_eq!(
            (guests[0].site().as_str(), guests[0].draining()),
            ("here", false)
        );
    }
}
