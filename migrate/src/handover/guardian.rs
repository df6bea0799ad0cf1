//! The process that outlives a worker.
//!
//! A worker starts its guardian before there is anything to lose, and holds the only writing end
//! of a pipe to it. The pipe ends when the worker does, however it does.
//!
//! ```text
//! worker    start guardian ... move ... journal ended, exit
//! guardian        wait for the pipe's end              journal ended: nothing to do
//!
//! worker    start guardian ... move ... killed
//! guardian        wait for the pipe's end    settle from the journal
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::journal::{self, Role};
use super::recovery::{Action, LateSuspend, Settled, action, settle};
use crate::directories::Directories;
use crate::error::{Error, IoContext, Result, chain};

/// The name that `ps` shows, so that it can be told from a worker.
pub const PROCESS_NAME: &str = "vmshadow-guard";

/// How long a guardian tries what does not succeed.
const TRYING: Duration = Duration::from_secs(180);

/// How often it tries at first.
const TRYING_AGAIN: Duration = Duration::from_secs(2);

/// How often it asks a destination that gives no answer after that, or looks again at a guest that is
/// in other hands or may suspend yet: that may last, and nobody else lets the guest go on.
const ASKING_AGAIN: Duration = Duration::from_secs(60);

/// After that a suspend that has not come will not.
const LATEST_SUSPEND: Duration = Duration::from_secs(15 * 60);

/// A worker's hold on its guardian. Dropped at the worker's end, or by the kernel.
#[derive(Debug)]
pub struct Guardian {
    child: Child,
    _pipe: ChildStdin,
}

impl Guardian {
    /// Starts the guardian of the move whose journal is at `journal`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn start(directories: &Directories, journal: &Path, name: &str) -> Result<Guardian> {
        let log = log_file(directories, name)?;
        let mut child = Command::new("/proc/self/exe")
            .arg0(PROCESS_NAME)
            .arg("guard")
            .arg(journal)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .current_dir("/")
            .process_group(0)
            .spawn()
            .context(|| "Can't start the guardian")?;
        let pipe = child
            .stdin
            .take()
            .ok_or_else(|| Error::Refused("No pipe to the guardian".into()))?;
        Ok(Guardian { child, _pipe: pipe })
    }

    /// The guardian's process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Leaves the guardian to go on by itself.
    pub fn leave(self) {}

    /// Lets the guardian look at the journal, and waits for it.
    pub fn finish(self) {
        let Guardian { mut child, _pipe } = self;
        drop(_pipe);
        if let Err(error) = child.wait() {
            log::warn!("Can't wait for the guardian: {error}");
        }
    }
}

/// The guardian itself: `vmshadow guard JOURNAL`, its standard input the worker's pipe. What it
/// settled; nothing where the worker had ended the move itself.
///
/// # Errors
/// What could not be settled; it is then up to `vmshadow resolve`.
pub fn run(directories: &Directories, path: &Path) -> Result<Option<Settled>> {
    name_process(PROCESS_NAME);
    // The worker never writes: this returns when it ends.
    let mut nothing = Vec::new();
    io::stdin()
        .lock()
        .take(1 << 10)
        .read_to_end(&mut nothing)
        .context(|| "Can't watch the worker")?;
    let start = Instant::now();
    let mut late = LateSuspend::IsWaitedFor;
    loop {
        let error = match look(directories, path, late) {
            Ok(settled) => return Ok(settled),
            Err(error) => error,
        };
        log::warn!("{}", chain(&error));
        late = match start.elapsed() < LATEST_SUSPEND {
            true => LateSuspend::StaysOpen,
            false => LateSuspend::WillNotCome,
        };
        let needed = journal::read(path).is_ok_and(|entry| is_needed(action(&entry)));
        match pause(&error, needed, start.elapsed()) {
            Some(pause) => thread::sleep(pause),
            None => return Err(error),
        }
    }
}

/// Whether a guest may be silent until that is done, however long it takes.
fn is_needed(action: Action) -> bool {
    use Action::{AskDestination, Finish, Resume};
    matches!(action, AskDestination | Resume | Finish)
}

/// When to try again what failed; none where that is of no use any more. What a guest waits for
/// (`needed`) is tried for as long as it takes, whatever is in the way of it: that ssh can't be
/// started here may pass as well. That the destination has no record of the move will not, nor that
/// the guest runs at both. A guest that is in other hands, or may suspend yet, is looked at again
/// too.
fn pause(error: &Error, needed: bool, since: Duration) -> Option<Duration> {
    match error {
        _ if since < TRYING => Some(TRYING_AGAIN),
        Error::InDoubt { .. } | Error::Refused(_) => None,
        Error::Busy(_) => Some(ASKING_AGAIN),
        _ => needed.then_some(ASKING_AGAIN),
    }
}

/// Settles what the journal at `path` demands. Nothing where it has ended, or is gone.
fn look(directories: &Directories, path: &Path, late: LateSuspend) -> Result<Option<Settled>> {
    if !journal::exists(path)? {
        return Ok(None);
    }
    let entry = journal::read(path)?;
    if action(&entry) == Action::Nothing {
        if entry.begin.role == Role::Source {
            fs::remove_file(path).context(|| format!("Can't remove {}", path.display()))?;
        }
        return Ok(None);
    }
    let name = &entry.begin.name;
    log::warn!("{name}: its worker is gone at {:?}", entry.phase);
    let settled = settle(directories, &entry, Duration::from_secs(10), late)?;
    log::warn!("{name}: {}", settled.what);
    Ok(Some(settled))
}

/// Gives this process the name that `ps` and `/proc/PID/comm` show.
pub fn name_process(name: &str) {
    if let Err(error) = fs::write("/proc/self/comm", name) {
        log::debug!("Can't name the process: {error}");
    }
}

/// Where guardians and keepers of the guest `name` write.
pub(crate) fn log_file(directories: &Directories, name: &str) -> Result<File> {
    // A guest's name can't hold a slash, but a peer's word for it could.
    let file: String = name
        .chars()
        .map(|c| if c == '/' || c == '\0' { '_' } else { c })
        .collect();
    let path = directories
        .log
        .join(format!("{}.log", file.trim_start_matches('.')));
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&path)
        .context(|| format!("Can't open {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_waits_for_is_tried_for_as_long_as_it_takes() {
        let unstarted = Error::Io {
            doing: "Can't start ssh".into(),
            source: io::ErrorKind::NotFound.into(),
        };
        let lost = Error::LinkLost {
            peer: "b".into(),
            reason: "No route".into(),
        };
        let unknown = Error::InDoubt { peer: "b".into() };
        for error in [&unstarted, &lost, &unknown] {
            assert_eq!(pause(error, true, Duration::ZERO), Some(TRYING_AGAIN));
        }
        assert_eq!(pause(&unstarted, true, TRYING), Some(ASKING_AGAIN));
        assert_eq!(pause(&lost, true, TRYING), Some(ASKING_AGAIN));
        assert_eq!(pause(&unknown, true, TRYING), None);
        let busy = Error::Busy("It is in other hands".into());
        assert_eq!(pause(&busy, false, TRYING), Some(ASKING_AGAIN));
        let twice = Error::Refused("It runs there, and here too".into());
        assert_eq!(pause(&twice, true, TRYING), None);
        // What nobody waits for fails for good some day.
        assert_eq!(pause(&unstarted, false, TRYING), None);
        for needed in [Action::AskDestination, Action::Resume, Action::Finish] {
            assert!(is_needed(needed), "{needed:?}");
        }
        assert!(!is_needed(Action::Discard));
    }
}
