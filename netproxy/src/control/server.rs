//! The proxy's end of the control socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::{Answer, MAX_LINE, Request, parse};
use crate::error::{Error, Result};

/// So many may hold the control socket open at a time.
const MAX_CLIENTS: usize = 32;
/// How long a client may take to read an answer.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// Who answers. A caller is a number that no other connection has.
pub(crate) trait Attendant: Send + Sync {
    /// Carries out a request.
    fn request(
        &self,
        caller: u64,
        stream: &UnixStream,
        request: Request,
    ) -> std::result::Result<serde_json::Value, String>;

    /// A caller's connection has closed, or its process died.
    fn closed(&self, caller: u64);
}

/// Serves the control socket until dropped.
#[derive(Debug)]
pub(crate) struct ControlServer {
    path: PathBuf,
    listener: Arc<UnixListener>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Opens one. `caller` of another one waits for word that this one is open.
    pub(crate) fn start(
        path: &Path,
        caller: Option<OwnedFd>,
        attendant: Arc<dyn Attendant>,
    ) -> Result<Self> {
        let failed = |source| Error::File {
            path: path.to_owned(),
            source,
        };
        let listener = listen(path).map_err(failed)?;
        Self::serve(path, listener, caller.map(UnixStream::from), attendant)
    }

    /// Goes on serving one that another program has opened. `caller` waits for word that it was
    /// taken over.
    pub(crate) fn adopt(
        path: &Path,
        listener: OwnedFd,
        caller: Option<OwnedFd>,
        attendant: Arc<dyn Attendant>,
    ) -> Result<Self> {
        let caller = caller.map(UnixStream::from);
        Self::serve(path, UnixListener::from(listener), caller, attendant)
    }

    /// A descriptor of the listener, for another program.
    pub(crate) fn listener(&self) -> std::io::Result<OwnedFd> {
        self.listener.try_clone().map(OwnedFd::from)
    }

    fn serve(
        path: &Path,
        listener: UnixListener,
        caller: Option<UnixStream>,
        attendant: Arc<dyn Attendant>,
    ) -> Result<Self> {
        let failed = |source| Error::File {
            path: path.to_owned(),
            source,
        };
        let listener = Arc::new(listener);
        let shared = Arc::clone(&listener);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || serve(&shared, caller, &attendant, &stopped))
            .map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            listener,
            stop,
            thread: Some(thread),
        })
    }
}

/// Binds the socket so that nobody else could ever have opened it: in a directory of its own
/// with mode 0700, from where it is moved to its place.
fn listen(path: &Path) -> std::io::Result<UnixListener> {
    // A socket that somebody answers on is another proxy's.
    if UnixStream::connect(path).is_ok() {
        return Err(std::io::ErrorKind::AddrInUse.into());
    }
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)?;
    let private = parent.join(format!(".netproxy.{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&private);
    std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700)
        .create(&private)?;
    let bind = || {
        let unfinished = private.join("s");
        let listener = UnixListener::bind(&unfinished)?;
        std::fs::set_permissions(&unfinished, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&unfinished, path)?;
        Ok(listener)
    };
    let result = bind();
    let _ = std::fs::remove_dir_all(&private);
    result
}

fn serve(
    listener: &UnixListener,
    first: Option<UnixStream>,
    attendant: &Arc<dyn Attendant>,
    stop: &AtomicBool,
) {
    let clients = Arc::new(AtomicUsize::new(0));
    let mut callers = 0..;
    let mut welcome = |stream: UnixStream| {
        let caller = callers.next().unwrap_or_default();
        if clients.fetch_add(1, Ordering::AcqRel) >= MAX_CLIENTS {
            clients.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        let (attendant, count) = (Arc::clone(attendant), Arc::clone(&clients));
        let started = std::thread::Builder::new()
            .name("control-client".into())
            .spawn(move || {
                if let Err(error) = attend(&stream, caller, &*attendant) {
                    log::debug!("A client of the control socket: {error}");
                }
                attendant.closed(caller);
                count.fetch_sub(1, Ordering::AcqRel);
            });
        if started.is_err() {
            clients.fetch_sub(1, Ordering::AcqRel);
        }
    };
    if let Some(stream) = first
        && answer(&stream, Ok(serde_json::json!({}))).is_ok()
    {
        welcome(stream);
    }
    for stream in listener.incoming() {
        if stop.load(Ordering::Acquire) {
            return;
        }
        match stream {
            Ok(stream) => welcome(stream),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn answer(
    mut stream: &UnixStream,
    result: std::result::Result<serde_json::Value, String>,
) -> std::io::Result<()> {
    let mut answer = serde_json::to_string(&Answer::of(result))?;
    answer.push('\n');
    stream.write_all(answer.as_bytes())
}

fn attend(stream: &UnixStream, caller: u64, attendant: &dyn Attendant) -> std::io::Result<()> {
    stream.set_write_timeout(Some(WRITE_LIMIT))?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        let read = reader
            .by_ref()
            .take(MAX_LINE as u64 + 1)
            .read_line(&mut line)?;
        if read == 0 {
            return Ok(());
        }
        let too_long = !line.ends_with('\n') && read > MAX_LINE;
        let result = if too_long {
            Err(format!("A request has at most {MAX_LINE} bytes"))
        } else {
            parse(&line).and_then(|request| attendant.request(caller, stream, request))
        };
        answer(stream, result)?;
        if too_long {
            return Ok(());
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the thread from accept.
        let woken = UnixStream::connect(&self.path).is_ok();
        if let Some(thread) = self.thread.take()
            && woken
        {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}
