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

use crate::error::{Error, Result};

/// What libxl starts to save or restore a domain.
const HELPER: &str = "libxl-save-helper";

/// The parents of the directories that may have it.
const LIBRARIES: [&str; 4] = ["/usr/lib", "/usr/lib64", "/usr/libexec", "/usr/local/lib"];

/// A helper that is at work: its process, and what it was started with.
type Helper = (u32, Vec<Vec<u8>>);

/// A saver that saves `domid`: another tool is at it.
pub(super) fn saver_at_work(domid: DomId) -> Option<u32> {
    saver_of(domid, &helpers().collect::<Vec<_>>())
}

/// Refuses while a stock tool saves or moves the domain. It suspends the guest by itself, and takes
/// log-dirty mode for its own: what was dirty is lost to whoever had it before.
///
/// # Errors
/// [`Error::Busy`].
pub(super) fn refuse_saver(domid: DomId) -> Result<()> {
    refuse(saver_at_work(domid))
}

/// Refuses where a process is `at_work`.
///
/// # Errors
/// [`Error::Busy`].
pub(super) fn refuse(at_work: Option<u32>) -> Result<()> {
    at_work.map_or(Ok(()), |process| {
        Err(Error::Busy(format!(
            "xl is saving or moving the guest (process {process})"
        )))
    })
}

fn saver_of(domid: DomId, helpers: &[Helper]) -> Option<u32> {
    let domid = domid.to_string();
    helpers.iter().find_map(|(id, words)| {
        // libxl-save-helper --save-domain FD FD DOMID ...
        let saves = words.get(1).is_some_and(|word| word == b"--save-domain");
        let this_one = words.get(4).map(Vec::as_slice) == Some(domid.as_bytes());
        (saves && this_one).then_some(*id)
    })
}

fn helpers() -> impl Iterator<Item = Helper> {
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

/// What was seen of savers of a domain.
pub(super) struct Seen {
    /// The process of one that is at work.
    pub at_work: Option<u32>,
    /// One may have come and gone.
    pub gone: bool,
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

    /// Looks whether one is at work, or has been since it looked last. Helpers of other domains count
    /// as gone where they can't be told from it: programs that were opened and closed meanwhile,
    /// whoever did so.
    pub fn look(&mut self) -> Seen {
        let (mut opened, mut closed) = (false, false);
        // An error is that there is no more.
        while let Some(events) = self.programs.as_ref().and_then(|it| it.read_events().ok()) {
            for event in events {
                let lost = event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
                opened |= lost || event.mask.contains(AddWatchFlags::IN_OPEN);
                closed |= lost || event.mask.contains(AddWatchFlags::IN_CLOSE_NOWRITE);
            }
        }
        let helpers: Vec<_> = helpers().collect();
        let living: BTreeSet<u32> = helpers.iter().map(|(id, _)| *id).collect();
        let at_work = saver_of(self.domid, &helpers);
        let came = living.difference(&self.known).next().is_some();
        self.known = living;
        let own = std::mem::replace(&mut self.own, at_work);
        let has_gone = own.is_some_and(|own| at_work != Some(own));
        Seen {
            at_work,
            gone: has_gone || opened && (closed || !came),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;
    use std::process::Command;

    #[test]
    fn a_saver_is_known_by_what_it_was_started_with() {
        let helper = |words: &[&str]| {
            let words = words.iter().map(|word| word.as_bytes().to_vec());
            (7, words.collect::<Vec<_>>())
        };
        let found = |words: &[&str]| saver_of(DomId::new(1).unwrap(), &[helper(words)]);
        assert_eq!(
            found(&[HELPER, "--save-domain", "8", "8", "1", "5"]),
            Some(7)
        );
        for other in [
            &[HELPER][..],
            &[HELPER, "--save-domain", "8", "8", "11", "5"],
            &[HELPER, "--restore-domain", "8", "8", "1", "5"],
        ] {
            assert_eq!(found(other), None, "{other:?}");
        }
        assert!(
            refuse(Some(7))
                .unwrap_err()
                .to_string()
                .contains("process 7")
        );
    }

    #[test]
    fn one_that_came_and_went_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join(HELPER);
        std::fs::copy("/bin/sleep", &program).unwrap();
        let start = |seconds: &str| {
            loop {
                match Command::new(&program).arg(seconds).spawn() {
                    Ok(child) => break child,
                    // A process that another test starts has it open for writing until its exec.
                    Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => {}
                    Err(error) => panic!("{error}"),
                }
            }
        };
        let domid = DomId::new(1).unwrap();
        let mut savers = Savers::watching(domid, std::slice::from_ref(&program));
        assert!(!savers.look().gone);
        start("0").wait().unwrap();
        assert!(savers.look().gone);
        // The kernel closes a program some time after it has ended.
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!savers.look().gone);
        // Of one that is at work its process tells.
        let mut long = start("60");
        // It has its name a moment after it was started.
        while !helpers().any(|(id, _)| id == long.id()) {
            std::thread::yield_now();
        }
        assert!(!savers.look().gone);
        start("0").wait().unwrap();
        assert!(savers.look().gone);
        long.kill().unwrap();
        long.wait().unwrap();
        // It was of another domain.
        assert!(!savers.look().gone);
    }

    /// It was seen at work, so that it does not matter when its program was opened.
    #[test]
    fn one_that_was_at_work_and_has_gone_is_seen() {
        let mut savers = Savers::watching(DomId::new(1).unwrap(), &[]);
        savers.own = Some(1);
        assert!(savers.look().gone);
        assert!(!savers.look().gone);
    }
}
