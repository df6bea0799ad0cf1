//! Changing the program without losing a connection.
//!
//! ```text
//!  old program                                          new program
//!  ── no guest is being moved?
//!  ── start the new one with NETPROXY_UPGRADE=check,
//!     and the configuration as its input ────────────▶ understands that, says which state
//!     ◀───────────────────────── "... version 1" ────── it can take over, and ends
//!  ── threads put down what they have ([`state`])
//!  ── state into a memfd, descriptors left open
//!  ── exec, the same process ─────────────────────────▶ NETPROXY_UPGRADE=number of the memfd
//!                                                       takes the descriptors, goes on
//! ```
//!
//! The process keeps its number, its privileges and its place in the service manager. Listeners
//! stay open, and clients in their queues wait for the new program. If the exec fails, the old
//! program takes up again what it had put down. What the kernel holds (queues of sockets, bytes
//! in pipes) is not touched.

pub(crate) mod state;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, SigmaskHow};

use crate::error::{Error, Result, system};
use crate::sys;
use state::State;

/// The environment variable that says what a program was started for.
const VARIABLE: &str = "NETPROXY_UPGRADE";
const CHECK: &str = "check";
/// What a program prints that was asked whether it can take over.
pub(crate) const ANSWER: &str = "netproxy takes over state version 1";
/// How long it may think about that.
const PATIENCE: Duration = Duration::from_secs(20);

/// What this program was started for.
#[derive(Debug)]
pub(crate) enum Start {
    /// To begin anew.
    Fresh,
    /// To say whether it can take over with this configuration, and end.
    Check(String),
    /// To take over.
    TakeOver(Box<State>),
}

/// Looks why this program was started. Only once: descriptors are taken.
pub(crate) fn start() -> Result<Start> {
    let Some(value) = std::env::var_os(VARIABLE) else {
        return Ok(Start::Fresh);
    };
    if value == CHECK {
        let text = io::read_to_string(io::stdin()).map_err(system("Reading the configuration"))?;
        return Ok(Start::Check(text));
    }
    let taken = || system("Taking over from the program before");
    let number = value
        .to_str()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| taken()(io::ErrorKind::InvalidInput.into()))?;
    let mut file = File::from(sys::adopt(number).map_err(taken())?);
    file.rewind().map_err(taken())?;
    let state = State::read(&mut io::BufReader::new(file)).map_err(taken())?;
    Ok(Start::TakeOver(Box::new(state)))
}

/// The program that runs, and what takes its place at an upgrade: what is then at its path.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
    /// Set when it was asked to end.
    ends: Arc<AtomicBool>,
}

impl Program {
    /// This one, as it was started. Once `ends` is set nothing takes its place.
    pub(crate) fn own(ends: Arc<AtomicBool>) -> Result<Self> {
        Ok(Self {
            path: std::env::current_exe().map_err(system("Finding the own program"))?,
            arguments: std::env::args_os().skip(1).collect(),
            ends,
        })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command.args(&self.arguments);
        command
    }

    fn failed(&self, message: impl std::fmt::Display) -> Error {
        Error::Program {
            program: self.path.display().to_string(),
            message: message.to_string(),
        }
    }

    /// Asks what is at the path now whether it can take over, with this configuration.
    pub(crate) fn check(&self, configuration: &str) -> Result<()> {
        let failed = |error: io::Error| self.failed(error);
        let mut input = memory()?;
        input
            .write_all(configuration.as_bytes())
            .and_then(|()| input.rewind())
            .map_err(failed)?;
        let mut child = self
            .command()
            .env(VARIABLE, CHECK)
            .stdin(Stdio::from(input))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let limit = Instant::now() + PATIENCE;
        while child.try_wait().map_err(failed)?.is_none() {
            if Instant::now() > limit {
                let _ = child.kill();
                let _ = child.wait();
                return Err(self.failed("it does not say whether it can take over"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let output = child.wait_with_output().map_err(failed)?;
        let said = String::from_utf8_lossy(&output.stdout);
        if output.status.success() && said.trim() == ANSWER {
            return Ok(());
        }
        let why = String::from_utf8_lossy(&output.stderr);
        Err(self.failed(format!("it can't take over: {}", why.trim())))
    }

    /// Becomes the new program. Returns only if that fails; everything is then as before.
    pub(crate) fn become_it(&self, state: &mut State) -> Error {
        let memory = match written(state) {
            Ok(memory) => memory,
            Err(error) => return error,
        };
        // A signal that comes before the new program takes any would end it: it waits for so long,
        // and for `start_program` to let it in.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
        let result = keep_open(state, &memory, true);
        let error = match result {
            // The next program would never hear of it.
            Ok(()) if self.ends.load(Ordering::SeqCst) => io::Error::other("the proxy is to end"),
            Ok(()) => self
                .command()
                .env(VARIABLE, memory.as_raw_fd().to_string())
                .exec(),
            Err(error) => error,
        };
        let _ = keep_open(state, &memory, false);
        if let Err(error) = sys::ignore_broken_pipes() {
            log::error!("A connection that breaks may end the program: {error}");
        }
        if let Ok(before) = before {
            // It was the mask of this thread.
            let _ = before.thread_set_mask();
        }
        self.failed(error)
    }
}

/// A file that is nowhere but in memory.
fn memory() -> Result<File> {
    memfd_create(c"netproxy", MFdFlags::MFD_CLOEXEC)
        .map(File::from)
        .map_err(|error| system("Making a file in memory")(error.into()))
}

fn written(state: &mut State) -> Result<File> {
    let failed = || system("Writing down the connections");
    let mut file = BufWriter::new(memory()?);
    state.write(&mut file).map_err(failed())?;
    file.into_inner()
        .map_err(|error| failed()(error.into_error()))
}

/// Leaves descriptors open over an exec, or not.
fn keep_open(state: &State, memory: &File, open: bool) -> io::Result<()> {
    let flag = if open {
        FdFlag::empty()
    } else {
        FdFlag::FD_CLOEXEC
    };
    let all = state.descriptors().into_iter().map(AsFd::as_fd);
    for descriptor in all.chain([memory.as_fd()]) {
        fcntl(descriptor, FcntlArg::F_SETFD(flag))?;
    }
    Ok(())
}

/// Takes the signals that came since the program before this one made way.
pub(crate) fn let_signals_in() {
    if let Err(error) = SigSet::all().thread_unblock() {
        log::error!("Signals stay blocked: {error}");
    }
}

/// Answers who asked whether this program can take over.
pub(crate) fn answer() -> Result<()> {
    let mut out = io::stdout();
    writeln!(out, "{ANSWER}")
        .and_then(|()| out.flush())
        .map_err(system("Answering"))
}
