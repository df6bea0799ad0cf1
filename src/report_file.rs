//! The file of `--report`.
//!
//! It is opened before the move, so that a path that can't be written stops it. What was in it
//! stays until there is a new report; a file that was made for nothing is removed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;

/// A file that waits for its report.
#[derive(Debug)]
pub struct ReportFile {
    file: File,
    path: PathBuf,
    /// We made it, and there is nothing in it yet.
    new: bool,
}

impl ReportFile {
    /// Opens it, and makes it where there is none.
    pub fn open(path: &Path) -> anyhow::Result<ReportFile> {
        let made = File::options().write(true).create_new(true).open(path);
        let (file, new) = match made {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                (File::options().write(true).open(path), false)
            }
            made => (made, true),
        };
        let file = file.with_context(|| format!("Can't write {}", path.display()))?;
        Ok(ReportFile {
            file,
            path: path.into(),
            new,
        })
    }

    /// Puts the report in the place of whatever was in it.
    pub fn write(&mut self, text: &str) -> anyhow::Result<()> {
        self.new = false;
        let mut write = || {
            // A pipe or a terminal has no length.
            if self.file.metadata()?.is_file() {
                self.file.set_len(0)?;
            }
            self.file.write_all(text.as_bytes())
        };
        write().with_context(|| format!("Can't write the report {}", self.path.display()))
    }
}

impl Drop for ReportFile {
    fn drop(&mut self) {
        if self.new {
            // An empty file that stays harms nobody.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_stays_until_there_is_a_report() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("report");
        fs::write(&path, "the report of the last move, which was longer").unwrap();
        drop(ReportFile::open(&path).unwrap());
        assert!(fs::read_to_string(&path).unwrap().starts_with("the report"));
        ReportFile::open(&path).unwrap().write("{}\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{}\n");
    }

    #[test]
    fn a_file_made_for_nothing_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("report");
        drop(ReportFile::open(&path).unwrap());
        assert!(!path.exists());
        ReportFile::open(&path).unwrap().write("{}\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{}\n");
    }

    #[test]
    fn what_can_not_be_written_is_told_with_its_path() {
        for bad in ["/nonexistent/report", "/"] {
            let error = ReportFile::open(Path::new(bad)).unwrap_err();
            assert!(error.to_string().contains(bad), "{error}");
        }
        let mut full = ReportFile::open(Path::new("/dev/full")).unwrap();
        assert!(full.write("{}").is_err());
    }
}
