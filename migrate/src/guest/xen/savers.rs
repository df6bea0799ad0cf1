//! Stock tools that save or move a guest beside us.
//!
//! ```text
//!   xl migrate --fork, exec--> libxl-save-helper: log-dirty off, on, clean ...; off, unless it is killed
//!                    |
//!                 inotify: the program was opened, and closed
//! ```
//!
//! Log-dirty is one mode of the domain: a saver takes it over, and with it what was logged for us.
//! While it is at work its process shows it. One that came and went between two looks, broken off or
//! killed, may have left the log on as if nothing had been: only that its program was started tells.

use std::collections::BTreeSet;
use std::path::PathBuf;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use xen_sys::DomId;

/// What libxl starts to save or restore a domain.
const HELPER: &str = "libxl-save-helper";

/// The parents of the directories that may have it.
const LIBRARIES: [&str; 4] = ["/usr/lib", "/usr/lib64", "/usr/libexec", "/usr/local/lib"];

/// A saver that saves `domid`: another tool is at it.
pub(super) fn saver_at_work(domid: DomId) -> Option<u32> {
    helpers().find_map(|(id, words)| {
        // libxl-save-helper --save-domain FD FD DOMID ...
        let saves = words.get(1).is_some_and(|word| word == b"--save-domain");
        let this_one = words.get(4).map(Vec::as_slice) == Some(domid.to_string().as_bytes());
        (saves && this_one).then_some(id)
    })
}

/// The helpers that are at work: their processes, and what they were started with.
fn helpers() -> impl Iterator<Item = (u32, Vec<Vec<u8>>)> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|process| {
        let id = process.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(process.path().join("cmdline")).ok()?;
        let words: Vec<_> = line.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
        words
            .first()?
            .ends_with(HELPER.as_bytes())
            .then_some((id, words))
    })
}

/// The programs that libxl may start: one for each version of Xen that is installed.
fn programs() -> Vec<PathBuf> {
    let directories = LIBRARIES
        .iter()
        .filter_map(|directory| std::fs::read_dir(directory).ok());
    directories
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"xen"))
        .map(|entry| entry.path().join("bin").join(HELPER))
        .filter(|path| path.exists())
        .collect()
}

/// Sees savers of a domain that come and go.
pub(super) struct Savers {
    domid: DomId,
    /// None where nothing tells.
    programs: Option<Inotify>,
    /// The helpers that were at work when it looked last.
    known: BTreeSet<u32>,
    /// Of these, one that saves the domain.
    own: Option<u32>,
}

impl Savers {
    /// Begins to look.
    pub fn watch(domid: DomId) -> Self {
        Self::watching(domid, &programs())
    }

    fn watching(domid: DomId, programs: &[PathBuf]) -> Self {
        let flags = AddWatchFlags::IN_OPEN | AddWatchFlags::IN_CLOSE_NOWRITE;
        let watched = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .and_then(|inotify| {
                for program in programs {
                    inotify.add_watch(program, flags)?;
                }
                Ok(inotify)
            })
            .inspect_err(|error| log::warn!("Can't watch {HELPER}: {error}"));
        if programs.is_empty() {
            log::warn!("There is no {HELPER}: stock tools that meddle may not be seen");
        }
        Savers {
            domid,
            programs: watched.ok(),
            known: helpers().map(|(id, _)| id).collect(),
            own: None,
        }
    }

    /// Whether one may have come and gone since this was asked last. What is at work still does not
    /// count yet. Helpers of other domains count where they can't be told from it: programs that were
    /// opened and closed meanwhile, whoever did so.
    pub fn came_and_went(&mut self) -> bool {
        let (mut opened, mut closed) = (false, false);
        // An error is that there is no more.
        while let Some(events) = self.programs.as_ref().and_then(|it| it.read_events().ok()) {
            for event in events {
                let lost = event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
                opened |= lost || event.mask.contains(AddWatchFlags::IN_OPEN);
                closed |= lost || event.mask.contains(AddWatchFlags::IN_CLOSE_NOWRITE);
            }
        }
        let living: BTreeSet<u32> = helpers().map(|(id, _)| id).collect();
        let came = living.difference(&self.known).next().is_some();
        self.known = living;
        let own = std::mem::replace(&mut self.own, saver_at_work(self.domid));
        let has_gone = own.is_some_and(|own| self.own != Some(own));
        has_gone || opened && (closed || !came)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn one_that_came_and_went_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join(HELPER);
        std::fs::copy("/bin/sleep", &program).unwrap();
        let start = |seconds: &str| Command::new(&program).arg(seconds).spawn().unwrap();
        let domid = DomId::new(1).unwrap();
        let mut savers = Savers::watching(domid, std::slice::from_ref(&program));
        assert!(!savers.came_and_went());
        start("0").wait().unwrap();
        assert!(savers.came_and_went());
        // The kernel closes a program some time after it has ended.
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!savers.came_and_went());
        // Of one that is at work its process tells.
        let mut long = start("60");
        // It has its name a moment after it was started.
        while !helpers().any(|(id, _)| id == long.id()) {
            std::thread::yield_now();
        }
        assert!(!savers.came_and_went());
        start("0").wait().unwrap();
        assert!(savers.came_and_went());
        long.kill().unwrap();
        long.wait().unwrap();
        // It was of another domain.
        assert!(!savers.came_and_went());
    }

    /// It was seen at work, so that it does not matter when its program was opened.
    #[test]
    fn one_that_was_at_work_and_has_gone_is_seen() {
        let mut savers = Savers::watching(DomId::new(1).unwrap(), &[]);
        savers.own = Some(1);
        assert!(savers.came_and_went());
        assert!(!savers.came_and_went());
    }
}
