//! One worker a guest.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::directories::Directories;
use crate::error::{Error, IoContext, Result};

/// Held while something is done with a guest; the kernel lets go of it when the process ends.
#[derive(Debug)]
pub struct GuestLock {
    _file: File,
}

impl GuestLock {
    /// Takes the guest's lock, or says that somebody has it.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::Io`].
    pub fn take(directories: &Directories, uuid: &str, name: &str) -> Result<GuestLock> {
        Self::try_take(directories, uuid)?
            .ok_or_else(|| Error::Busy(format!("Another vmshadow is at work on {name}")))
    }

    /// Takes the guest's lock, waiting for up to `patience`.
    ///
    /// # Errors
    /// As [`GuestLock::take`].
    pub fn wait(
        directories: &Directories,
        uuid: &str,
        name: &str,
        patience: Duration,
    ) -> Result<GuestLock> {
        let start = Instant::now();
        loop {
            match Self::take(directories, uuid, name) {
                Err(Error::Busy(_)) if start.elapsed() < patience => {
                    thread::sleep(Duration::from_millis(50));
                }
                other => return other,
            }
        }
    }

    fn try_take(directories: &Directories, uuid: &str) -> Result<Option<GuestLock>> {
        let path = directories.runtime.join(format!("{uuid}.lock"));
        let file = open(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(GuestLock { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => {
                Err(error).context(|| format!("Can't lock {}", path.display()))
            }
        }
    }
}

/// The lock that `xl` takes around checking free memory and creating a domain.
#[derive(Debug)]
pub struct XlLock {
    _file: File,
}

impl XlLock {
    /// `xl`'s own lock file.
    pub const PATH: &'static str = "/var/lock/xl";

    /// Takes xl's lock, waiting for up to `patience`: `xl` holds it for seconds.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::Io`].
    pub fn wait(patience: Duration) -> Result<XlLock> {
        let file = open(Path::new(Self::PATH))?;
        let start = Instant::now();
        // xl uses fcntl(F_SETLKW), which flock does not see: nix has it without unsafe.
        loop {
            let lock = nix::libc::flock {
                l_type: nix::libc::F_WRLCK as i16,
                l_whence: nix::libc::SEEK_SET as i16,
                l_start: 0,
                l_len: 0,
                l_pid: 0,
            };
            match nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETLK(&lock)) {
                Ok(_) => return Ok(XlLock { _file: file }),
                Err(nix::errno::Errno::EACCES | nix::errno::Errno::EAGAIN)
                    if start.elapsed() < patience =>
                {
                    thread::sleep(Duration::from_millis(50));
                }
                Err(nix::errno::Errno::EACCES | nix::errno::Errno::EAGAIN) => {
                    return Err(Error::Busy(format!("xl holds {}", Self::PATH)));
                }
                Err(error) => {
                    return Err(std::io::Error::from(error))
                        .context(|| format!("Can't lock {}", Self::PATH));
                }
            }
        }
    }
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .context(|| format!("Can't open {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_has_one_worker() {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::under(root.path());
        directories.create().unwrap();
        let held = GuestLock::take(&directories, "u", "g1").unwrap();
        assert!(matches!(
            GuestLock::take(&directories, "u", "g1"),
            Err(Error::Busy(_))
        ));
        assert!(GuestLock::take(&directories, "v", "g2").is_ok());
        drop(held);
        assert!(GuestLock::take(&directories, "u", "g1").is_ok());
    }
}
