//! Where VMShadow keeps what outlives a process.
//!
//! ```text
//! /var/lib/vmshadow/moves/<move>.journal     who owns a guest, synced before it takes effect
//! /var/lib/vmshadow/incoming/<move>.memory   a guest's memory as it arrives
//! /var/lib/vmshadow/shadows/<uuid>.table     what is known of a guest's pages; .memory: the pages
//! /run/vmshadow/<uuid>.lock                  one worker a guest
//! /run/vmshadow/<uuid>.keeper                one keeper a guest
//! /run/vmshadow/control/<move>.<role>        where a worker can be asked
//! /run/vmshadow/join/<move>                  where more connections of a move come in
//! /var/log/vmshadow/<name>.log               what guardians and keepers did
//! ```

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext, Result};

/// The directories of one host. [`Directories::default`] is what an installed VMShadow uses;
/// [`Directories::under`] puts them all below one root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directories {
    /// Survives a reboot: journals, and memory on its way in.
    pub state: PathBuf,
    /// Gone after a reboot: locks.
    pub runtime: PathBuf,
    /// What guardians and keepers did.
    pub log: PathBuf,
}

impl Default for Directories {
    fn default() -> Self {
        Directories {
            state: "/var/lib/vmshadow".into(),
            runtime: "/run/vmshadow".into(),
            log: "/var/log/vmshadow".into(),
        }
    }
}

impl Directories {
    /// All three below `root`.
    pub fn under(root: &Path) -> Self {
        Directories {
            state: root.join("state"),
            runtime: root.join("run"),
            log: root.join("log"),
        }
    }

    /// Where journals are.
    pub fn moves(&self) -> PathBuf {
        self.state.join("moves")
    }

    /// Where a guest's memory is while it arrives.
    pub fn incoming(&self) -> PathBuf {
        self.state.join("incoming")
    }

    /// Where workers listen for status, cancel and set.
    pub fn control(&self) -> PathBuf {
        self.runtime.join("control")
    }

    /// Where workers that receive a guest let more of its connections in.
    pub fn joining(&self) -> PathBuf {
        self.runtime.join("join")
    }

    /// Where what is held of guests that run elsewhere is.
    pub fn shadows(&self) -> PathBuf {
        self.state.join("shadows")
    }

    /// Makes what is missing, readable by root only: what is kept here is guests' memory.
    ///
    /// # Errors
    /// [`Error::Io`] where a directory can't be made.
    pub fn create(&self) -> Result<()> {
        let fresh = !self.moves().exists();
        for path in [
            &self.moves(),
            &self.incoming(),
            &self.shadows(),
            &self.runtime,
            &self.log,
        ] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .context(|| format!("Can't make {}", path.display()))?;
        }
        // A journal must be found again after a power cut.
        let parents = [Some(self.state.as_path()), self.state.parent()];
        for path in parents.into_iter().flatten().filter(|_| fresh) {
            sync_directory(path)?;
        }
        Ok(())
    }
}

/// Makes a directory that is its owner's alone, whatever it was.
pub(crate) fn make_private(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))
}

/// Syncs a directory, so that a file made in it is still there after a power cut.
pub(crate) fn sync_directory(path: &Path) -> Result<(), Error> {
    fs::File::open(path)
        .and_then(|directory| directory.sync_all())
        .context(|| format!("Can't sync {}", path.display()))
}
