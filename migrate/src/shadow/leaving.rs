//! Writing the memory of a guest that has left.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use super::table_file::{self, Head};
use crate::error::{IoContext, Result};
use crate::guest::PageTable;
use crate::pages::{PAGE_SIZE, Page, Pfn};

/// A shadow that is being written. Dropped before its end, nothing of it stays.
#[derive(Debug)]
pub struct Leaving {
    table: PathBuf,
    memory: PathBuf,
    draft: PathBuf,
    file: File,
    head: Head,
    done: bool,
}

impl Leaving {
    pub(super) fn begin(table: PathBuf, memory: PathBuf, head: Head) -> Result<Leaving> {
        let draft = super::draft(&memory);
        let doing = || format!("Can't write {}", draft.display());
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&draft)
            .context(doing)?;
        let leaving = Leaving {
            table,
            memory,
            draft,
            file,
            head,
            done: false,
        };
        // Sparse: pages of zeros are not written.
        let length = leaving.head.pages * PAGE_SIZE as u64;
        leaving
            .file
            .set_len(length)
            .context(|| format!("Can't write {}", leaving.draft.display()))?;
        Ok(leaving)
    }

    /// Writes pages that are not all zero, from `first` on one after the other.
    ///
    /// # Errors
    /// [`crate::Error::Io`], as where the disk is full.
    pub fn write(&self, first: Pfn, contents: &[Page]) -> Result<()> {
        self.file
            .write_all_at(contents.as_flattened(), first * PAGE_SIZE as u64)
            .context(|| format!("Can't write {}", self.draft.display()))
    }

    /// All is written: from now on this is the guest's shadow.
    ///
    /// # Errors
    /// [`crate::Error::Io`]; then nothing of it stays.
    pub fn finish(mut self, table: &PageTable) -> Result<()> {
        table_file::write(&self.table, &self.head, table)?;
        fs::rename(&self.draft, &self.memory)
            .context(|| format!("Can't rename {}", self.draft.display()))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if !self.done {
            // What is left of it would only be found and removed at the next time.
            let _ = fs::remove_file(&self.draft);
        }
    }
}
