//! Shadows that are read for other guests, and not changed meanwhile.
//!
//! Whoever reads one holds a shared lock on its file; whoever takes one up, to write what arrives
//! into it, needs the lock alone, and waits for it a second at the most. A shadow that is dropped, or
//! replaced by a newer one, is another file: readers keep the one that they have.

use std::fmt;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::Shadows;
use crate::digest::{Digester, Zeros};
use crate::error::{IoContext, Result};
use crate::guest::PageTable;
use crate::pages::{PageType, Pfn};

/// How often one that is in use is tried again.
const TICK: Duration = Duration::from_millis(20);

/// A shadow that is read.
pub struct Lent {
    table: PageTable,
    zeros: Zeros,
    /// Its pages, each at its place; only those are there that the table has content for.
    pub memory: Flock<File>,
}

impl Lent {
    /// The pages of a type that have content other than zeros.
    pub fn with_content(&self, page_type: PageType) -> impl Iterator<Item = Pfn> + '_ {
        (0..self.table.pages()).filter(move |pfn| {
            self.table.get(*pfn).is_some_and(|state| {
                state.page_type == page_type && state.digest != self.zeros.of(page_type)
            })
        })
    }
}

/// Does not show what pages hold.
impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lent({} pages)", self.table.pages())
    }
}

impl Shadows {
    /// A guest's shadow, to be read. None where there is none with memory, or where it is being
    /// taken up.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn lend(&self, uuid: &str) -> Result<Option<Lent>> {
        let path = self.memory_path(uuid)?;
        let Some(memory) = lock(&path, FlockArg::LockSharedNonblock)? else {
            return Ok(None);
        };
        Ok(self.known(uuid).map(|(head, table)| Lent {
            table,
            zeros: Digester::new(&head.digest_key).zeros(),
            memory,
        }))
    }
}

/// Opens and locks a shadow's memory alone, waiting for up to `patience` for others. None as by
/// [`lock`].
pub(super) fn lock_alone(path: &Path, patience: Duration) -> Result<Option<Flock<File>>> {
    let start = Instant::now();
    loop {
        match lock(path, FlockArg::LockExclusiveNonblock)? {
            None if start.elapsed() < patience && path.exists() => thread::sleep(TICK),
            locked => return Ok(locked),
        }
    }
}

/// Opens and locks a shadow's memory. None where there is none, or where others have it locked.
pub(super) fn lock(path: &Path, how: FlockArg) -> Result<Option<Flock<File>>> {
    let doing = || format!("Can't open {}", path.display());
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.context(doing)?,
    };
    let locked = match Flock::lock(file, how) {
        Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
        Err((_, error)) => return Err(std::io::Error::from(error)).context(doing),
        Ok(locked) => locked,
    };
    // It may have been taken up, or replaced, before it was locked.
    let found = locked.metadata().context(doing)?;
    let same = fs::metadata(path)
        .is_ok_and(|there| (there.dev(), there.ino()) == (found.dev(), found.ino()));
    Ok(same.then_some(locked))
}
