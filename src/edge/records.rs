//! What is set up at this site for guests: a file each, until the next boot.
//!
//! ```text
//!  /run/vmshadow/DIRECTORY/NAME.json    written before the kernel is told, removed after
//! ```
//! The file says what is to be taken back, whoever has set it and however it ended. It and the
//! kernel's rules both end with a reboot.

use std::fs;
use std::io::{ErrorKind, Write};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use anyhow::Context;
use migrate::directories::Directories;
use migrate::guest::xen::host::Host;
use migrate::handover::journal;
use migrate::handover::recovery::{Action, action};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Files of one kind.
#[derive(Clone)]
pub(super) struct Records {
    directory: PathBuf,
    /// The versions of the format that can be read.
    versions: RangeInclusive<u32>,
}

/// What every file has, in whichever version.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

impl Records {
    /// Those in a directory of the host's runtime directory.
    pub(super) fn new(
        directories: &Directories,
        directory: &str,
        versions: RangeInclusive<u32>,
    ) -> Self {
        Self {
            directory: directories.runtime.join(directory),
            versions,
        }
    }

    fn file(&self, guest: &str) -> anyhow::Result<PathBuf> {
        anyhow::ensure!(
            !guest.is_empty() && !guest.starts_with('.') && !guest.contains(['/', '\0']),
            "{guest:?} is no name of a guest"
        );
        Ok(self.directory.join(format!("{guest}.json")))
    }

    /// The guests that have one.
    pub(super) fn names(&self) -> anyhow::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            names.extend(name.strip_suffix(".json").map(str::to_owned));
        }
        Ok(names)
    }

    /// That of a guest, if there is one.
    pub(super) fn read<T: DeserializeOwned>(&self, guest: &str) -> anyhow::Result<Option<T>> {
        let path = self.file(guest)?;
        let text = match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.with_context(|| format!("Can't read {}", path.display()))?,
        };
        let bad = || format!("Bad {}", path.display());
        let Versioned { version } = serde_json::from_slice(&text).with_context(bad)?;
        anyhow::ensure!(
            self.versions.contains(&version),
            "{} is of another version",
            path.display()
        );
        serde_json::from_slice(&text).map(Some).with_context(bad)
    }

    /// Replaces that of a guest as a whole.
    pub(super) fn write(&self, guest: &str, record: &impl Serialize) -> anyhow::Result<()> {
        let path = self.file(guest)?;
        let write = || {
            fs::create_dir_all(&self.directory)?;
            let new = self.directory.join(format!(".{guest}.new"));
            fs::File::create(&new)?.write_all(&serde_json::to_vec(record)?)?;
            fs::rename(new, &path)
        };
        write().with_context(|| format!("Can't write {}", path.display()))
    }

    /// Removes that of a guest, if there is one.
    pub(super) fn forget(&self, guest: &str) -> anyhow::Result<()> {
        let path = self.file(guest)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other.with_context(|| format!("Can't remove {}", path.display())),
        }
    }
}

/// The UUIDs of the guests that are here, or that a move may still bring.
pub(super) fn present_or_expected(directories: &Directories) -> anyhow::Result<Vec<String>> {
    let host = Host::open()?;
    let domains = host.ctl().domains()?;
    let here = domains
        .iter()
        .filter(|info| !info.dying)
        .map(|info| host.uuid_text(info));
    let journals = journal::list(directories)?;
    if let Some(error) = journals.unreadable.into_iter().next() {
        return Err(anyhow::Error::new(error).context("Which guests may come can't be told"));
    }
    let expected = journals
        .entries
        .into_iter()
        .filter(|entry| action(entry) != Action::Nothing)
        .map(|entry| entry.begin.uuid);
    Ok(here.chain(expected).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn names_stay_in_their_directory() {
        let root = tempfile::tempdir().unwrap();
        let records = Records::new(&Directories::under(root.path()), "paths", 1..=2);
        for name in ["", "..", "../x", "a/b", ".x"] {
            assert!(records.read::<Value>(name).is_err(), "{name}");
            assert!(records.write(name, &json!({})).is_err(), "{name}");
            assert!(records.forget(name).is_err(), "{name}");
        }
        assert!(records.read::<Value>("g1").unwrap().is_none());
        records.forget("g1").unwrap();
        assert!(records.names().unwrap().is_empty());
    }

    #[test]
    fn what_is_written_is_read_unless_it_is_of_another_version() {
        let root = tempfile::tempdir().unwrap();
        let records = Records::new(&Directories::under(root.path()), "paths", 1..=2);
        let record = json!({ "version": 2, "detour": null });
        records.write("g1", &record).unwrap();
        assert_eq!(records.read::<Value>("g1").unwrap(), Some(record));
        records.write("g1", &json!({ "version": 3 })).unwrap();
        assert_eq!(records.names().unwrap(), ["g1"]);
        let error = records.read::<Value>("g1").unwrap_err();
        assert!(error.to_string().ends_with("of another version"), "{error}");
        records.write("g1", &json!({})).unwrap();
        assert!(records.read::<Value>("g1").is_err());
        records.forget("g1").unwrap();
        assert!(records.names().unwrap().is_empty());
    }
}
