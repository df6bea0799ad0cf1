//! The worker's end of the control socket.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::client::{Socket, sockets};
use super::protocol::{
    Change, Done, Ended, MAX_LINE, Outcome, Request, read_request, write_answer,
};
use super::shared::Shared;
use crate::directories::Directories;
use crate::error::{IoContext, Result};
use crate::handover::journal::Role;
use crate::whereabouts::Whereabouts;

/// So many may hold the control socket open at a time.
const MAX_CLIENTS: usize = 16;

/// How long a client may take to ask, or to read an answer. One that hangs is cut off, so that it
/// doesn't keep others away.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long those who wait for the end of a move may take to read of it. Then the worker ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// Serves the control socket of one move until it ends.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    shared: Shared,
    stop: Arc<AtomicBool>,
    clients: Arc<Clients>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Clients {
    /// All of them.
    open: AtomicUsize,
    /// Those who wait for the end of the move.
    waiting: AtomicUsize,
}

/// Counts one up until it is dropped.
struct Counting<'a>(&'a AtomicUsize);

impl<'a> Counting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Counting(count)
    }
}

impl Drop for Counting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Server {
    /// Opens the socket of a move, and removes those that killed workers have left.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn start(directories: &Directories, shared: Shared) -> Result<Server> {
        let directory = directories.control();
        let failed = || format!("Can't open a control socket in {}", directory.display());
        prepare(&directory).context(failed)?;
        remove_stale(directories);
        let facts = shared.facts();
        let path = directory.join(Socket::name(&facts.move_id, facts.role));
        let listener = listen(&path).context(failed)?;
        let stop = Arc::new(AtomicBool::new(false));
        let clients = Arc::<Clients>::default();
        let (stopped, counted, seen) = (Arc::clone(&stop), Arc::clone(&clients), shared.clone());
        let thread = thread::Builder::new()
            .name("control".into())
            .spawn(move || accept(&listener, &seen, &counted, &stopped))
            .context(failed)?;
        Ok(Server {
            path,
            shared,
            stop,
            clients,
            thread: Some(thread),
        })
    }

    /// The move.
    #[must_use]
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The move is over: tells those who wait for that, and closes the socket.
    pub fn end(self, ended: Ended) {
        self.shared.end(ended);
        let start = Instant::now();
        while self.clients.waiting.load(Ordering::Acquire) > 0 && start.elapsed() < FAREWELL {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Where nobody has said more.
        self.shared.end(Ended {
            outcome: Outcome::Failed,
            guest: Whereabouts::Unknown,
            what: format!("The move of {} failed", self.shared.facts().domain),
        });
        self.stop.store(true, Ordering::Release);
        // Wakes the thread that accepts.
        let woken = UnixStream::connect(&self.path).is_ok();
        // The next worker removes it where this fails.
        let _ = fs::remove_file(&self.path);
        if let Some(thread) = self.thread.take()
            && woken
        {
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

/// Makes the directory, for root alone whatever it was.
fn prepare(directory: &Path) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    fs::set_permissions(directory, Permissions::from_mode(0o700))
}

/// Sockets are named after moves, which end with their worker: where nobody listens nobody ever
/// will again.
fn remove_stale(directories: &Directories) {
    for socket in sockets(directories).unwrap_or_default() {
        if UnixStream::connect(&socket.path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        {
            // It harms nobody, and the next worker tries again.
            let _ = fs::remove_file(&socket.path);
        }
    }
}

/// Binds the socket beside its place, where nobody looks for it, and moves it there once only its
/// owner can open it and somebody listens.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".new");
    let unfinished = PathBuf::from(unfinished);
    let _ = fs::remove_file(&unfinished);
    let listener = UnixListener::bind(&unfinished)?;
    let finish = fs::set_permissions(&unfinished, Permissions::from_mode(0o600))
        .and_then(|()| fs::rename(&unfinished, path));
    if finish.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    finish.map(|()| listener)
}

fn accept(listener: &UnixListener, shared: &Shared, clients: &Arc<Clients>, stop: &AtomicBool) {
    for stream in listener.incoming() {
        if stop.load(Ordering::Acquire) {
            return;
        }
        let Ok(stream) = stream else {
            // Too many files are open: it may get better.
            thread::sleep(Duration::from_millis(100));
            continue;
        };
        if clients.open.load(Ordering::Acquire) >= MAX_CLIENTS {
            continue;
        }
        let (shared, clients) = (shared.clone(), Arc::clone(clients));
        // Counted here, so that a flood is seen before its threads run. A thread that can't be
        // started drops what it would count with.
        clients.open.fetch_add(1, Ordering::AcqRel);
        let counted = Arc::clone(&clients);
        let started = thread::Builder::new()
            .name("control-client".into())
            .spawn(move || {
                if let Err(error) = attend(&stream, &shared, &clients) {
                    log::debug!("A client of the control socket: {error}");
                }
                clients.open.fetch_sub(1, Ordering::AcqRel);
            });
        if started.is_err() {
            counted.open.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

fn attend(stream: &UnixStream, shared: &Shared, clients: &Clients) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let read = reader
            .by_ref()
            .take(MAX_LINE as u64 + 1)
            .read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(());
        }
        let too_long = line.len() > MAX_LINE;
        let request = match std::str::from_utf8(&line) {
            _ if too_long => Err(format!("A request has at most {MAX_LINE} bytes")),
            Ok(text) => read_request(text),
            Err(_) => Err("Not a request: it is no text".into()),
        };
        let _waiting;
        let answer = match request {
            Ok(Request::Status) => Ok(Done::Status(Box::new(shared.status()))),
            Ok(Request::Set(change)) => set(shared, change),
            Ok(Request::Cancel) => {
                // Until it is written.
                _waiting = Counting::new(&clients.waiting);
                cancel(shared)
            }
            Err(error) => Err(error),
        };
        let mut stream = stream;
        stream.write_all(write_answer(answer)?.as_bytes())?;
        if too_long {
            return Ok(());
        }
    }
}

fn set(shared: &Shared, change: Change) -> std::result::Result<Done, String> {
    let facts = shared.facts();
    if facts.role == Role::Destination && change.downtime_ms.is_some() {
        return Err(format!(
            "When {} is suspended is decided where it leaves: set its downtime at {}",
            facts.domain, facts.peer
        ));
    }
    Ok(Done::Set(shared.set(change)))
}

fn cancel(shared: &Shared) -> std::result::Result<Done, String> {
    match shared.cancel() {
        Ok(()) => Ok(Done::Cancel(shared.wait())),
        Err(_) => {
            let facts = shared.facts();
            Err(format!(
                "It is too late to cancel the move of {}: it is being handed over, {} {}",
                facts.domain,
                match facts.role {
                    Role::Source => "to",
                    Role::Destination => "from",
                },
                facts.peer
            ))
        }
    }
}
