//! Run directories: all that a running testbed writes.
//!
//! ```text
//! $TMPDIR or /tmp
//! └─ vmshadow-testbed
//!    └─ NAME
//!       ├─ owner              pid and start time of whoever cleans up
//!       ├─ options.json       how it was started
//!       ├─ link.json          the shape of the WAN
//!       ├─ tools.tar          a disk: what guests and sites need besides the images
//!       ├─ guests/NAME.json   guests that were started
//!       ├─ a.command          the command line of site a's QEMU
//!       ├─ a.qcow2            site a's disk, over the image
//!       ├─ a.console, a.log   what site a's console and its QEMU print
//!       ├─ a.port             port of its ssh on loopback
//!       ├─ a.qmp, a.ssh       sockets: QEMU's monitor, the shared ssh connection
//!       ├─ a.wan              socket: site a's end of the WAN
//!       ├─ b....              the same of site b
//!       └─ stop               pipe: a line in it ends a testbed that has no owner
//! ```
//! A directory whose owner is gone is stale: it was left behind by a run that was
//! killed together with its supervisor. [`sweep`] ends what still runs in there,
//! and removes it.

use crate::{Error, Result, process};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// A run directory that exists.
#[derive(Clone, Debug)]
pub struct RunDirectory {
    name: String,
    path: PathBuf,
}

/// The longest path of a socket, less the names in a run directory.
const LONGEST: usize = 107 - 20;

fn root() -> PathBuf {
    std::env::temp_dir().join("vmshadow-testbed")
}

impl RunDirectory {
    /// Makes a new one, owned by this process.
    pub(crate) fn create(name: &str) -> Result<Self> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        if name.is_empty() || !name.bytes().all(plain) {
            return Err(Error::Unfit(format!(
                "Not a name of letters, digits, - and _: {name:?}"
            )));
        }
        let root = root();
        let path = root.join(name);
        if path.as_os_str().len() > LONGEST {
            return Err(Error::Unfit(format!(
                "Path is too long for a socket: {}",
                path.display()
            )));
        }
        fs::create_dir_all(&root).map_err(Error::file(&root))?;
        // With its owner in it from the first moment, or a sweep would take it.
        let draft = root.join(format!(".{name}.{}", std::process::id()));
        fs::create_dir_all(draft.join("guests")).map_err(Error::file(&draft))?;
        let run = Self {
            name: name.to_owned(),
            path: path.clone(),
        };
        write_owner(&draft, std::process::id())?;
        fs::rename(&draft, &path).map_err(|source| {
            let _ = fs::remove_dir_all(&draft);
            match source.kind() {
                ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists => {
                    Error::Up(name.to_owned())
                }
                _ => Error::File { path, source },
            }
        })?;
        Ok(run)
    }

    /// Opens that of a running testbed.
    pub(crate) fn open(name: &str) -> Result<Self> {
        let path = root().join(name);
        let run = Self {
            name: name.to_owned(),
            path,
        };
        if name.is_empty() || !run.path.join("owner").exists() || !run.owned() {
            return Err(Error::NotUp(name.to_owned()));
        }
        Ok(run)
    }

    /// All of running testbeds.
    ///
    /// # Errors
    /// When the directory of run directories can't be read.
    pub fn list() -> Result<Vec<Self>> {
        Ok(all()?.into_iter().filter(Self::owned).collect())
    }

    /// The testbed's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in here.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn read(&self, name: &str) -> Result<String> {
        let path = self.file(name);
        fs::read_to_string(&path).map_err(Error::file(path))
    }

    pub(crate) fn write(&self, name: &str, content: &str) -> Result<()> {
        let path = self.file(name);
        fs::write(&path, content).map_err(Error::file(path))
    }

    /// Hands the directory to another process, which will remove it.
    pub(crate) fn give_to(&self, pid: u32) -> Result<()> {
        write_owner(&self.path, pid)
    }

    /// Whether the owner lives.
    fn owned(&self) -> bool {
        let owner = fs::read_to_string(self.file("owner")).unwrap_or_default();
        let mut words = owner.split_whitespace();
        let pid = words.next().and_then(|word| word.parse().ok());
        let start = words.next().and_then(|word| word.parse::<u64>().ok());
        pid.is_some_and(|pid| start.is_some() && process::start_time(pid) == start)
    }

    /// Ends the QEMUs that have this directory in their command line, and removes
    /// all.
    pub(crate) fn remove(&self) -> Result<()> {
        let Some(path) = self.path.to_str() else {
            return Ok(());
        };
        // The slash keeps testbed "x" apart from testbed "xy".
        for _ in 0..50 {
            let left = process::qemus_mentioning(&format!("{path}/"));
            if left.is_empty() {
                break;
            }
            left.into_iter().for_each(process::end);
            thread::sleep(Duration::from_millis(100));
        }
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::File {
                path: self.path.clone(),
                source: error,
            }),
            _ => Ok(()),
        }
    }
}

fn write_owner(directory: &Path, pid: u32) -> Result<()> {
    let start = i32::try_from(pid)
        .ok()
        .and_then(process::start_time)
        .unwrap_or_default();
    // Renamed into place: whoever reads it finds it whole.
    let draft = directory.join("owner.new");
    let path = directory.join("owner");
    fs::write(&draft, format!("{pid} {start}\n"))
        .and_then(|()| fs::rename(&draft, &path))
        .map_err(Error::file(path))
}

fn all() -> Result<Vec<RunDirectory>> {
    let root = root();
    let entries = match fs::read_dir(&root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(Error::File { path: root, source }),
    };
    let found = entries
        .flatten()
        .filter(|entry| entry.path().join("owner").exists());
    Ok(found
        .map(|entry| RunDirectory {
            name: entry.file_name().to_string_lossy().into_owned(),
            path: entry.path(),
        })
        .collect())
}

/// Cleans up after runs that were killed. Gives their names.
///
/// # Errors
/// When a directory can't be removed.
pub fn sweep() -> Result<Vec<String>> {
    let mut swept = Vec::new();
    for run in all()? {
        if !run.owned() {
            run.remove()?;
            swept.push(run.name);
        }
    }
    Ok(swept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn unique(tag: &str) -> String {
        format!("unit-{tag}-{}", std::process::id())
    }

    #[test]
    fn a_name_is_taken_once() {
        let name = unique("once");
        let run = RunDirectory::create(&name).unwrap();
        assert!(matches!(RunDirectory::create(&name), Err(Error::Up(_))));
        assert!(RunDirectory::open(&name).is_ok());
        run.remove().unwrap();
        assert!(matches!(RunDirectory::open(&name), Err(Error::NotUp(_))));
    }

    #[test]
    fn odd_names_are_refused() {
        for name in ["", "a/b", "..", "a b"] {
            assert!(
                matches!(RunDirectory::create(name), Err(Error::Unfit(_))),
                "{name}"
            );
        }
    }

    #[test]
    fn a_sweep_takes_the_stale_with_their_processes_and_leaves_the_rest() {
        let stale = RunDirectory::create(&unique("stale")).unwrap();
        let live = RunDirectory::create(&unique("live")).unwrap();
        // A program of QEMU's name that has the directory in its command line.
        let program = stale.file("qemu-system-x86_64");
        std::os::unix::fs::symlink("/bin/cat", &program).unwrap();
        let mut left = Command::new(&program)
            .arg("-")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        // One that is no QEMU.
        let other = stale.file("owner");
        let mut tail = Command::new("cat")
            .arg(other)
            .arg("-")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        // An owner that has ended.
        let mut owner = Command::new("true").spawn().unwrap();
        stale.give_to(owner.id()).unwrap();
        owner.wait().unwrap();
        let swept = sweep().unwrap();
        assert!(swept.contains(&stale.name) && !swept.contains(&live.name));
        assert!(!stale.path.exists() && live.path.exists());
        assert!(!left.wait().unwrap().success());
        drop(tail.stdin.take());
        assert!(tail.wait().unwrap().success());
        live.remove().unwrap();
    }
}
