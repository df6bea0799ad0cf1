//! The record of who owns a guest.
//!
//! One file a move and side, made before there is anything to lose. Records are appended as JSON
//! lines and synced before what they say takes effect; a torn last line (power cut while it was
//! written) never took effect and is ignored.
//!
//! ```text
//! source                                 destination
//! begin       before anything            begin     before the domain is made
//! tracking    before log-dirty
//! slowing     before the guest is slowed down
//! suspending  before the suspend         ready     before ready is sent
//! committed   before commit is sent      owner     before the guest is unpaused
//!                                        running   after it was
//! resuming    before a suspended guest
//!             goes on
//! end         guest gone, or goes on     end       guest runs, or all is gone
//! ```
//!
//! A destination's journal stays after its end for [`KEEP_ENDED`]: a source that committed and
//! lost the link asks what became of the move. Nobody asks about one that was given up before it
//! was ready.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::directories::{Directories, sync_directory};
use crate::error::{Error, IoContext, Result, chain};

/// The version of the journal's format. The first had no record of a guest that is slowed down, and
/// is read all the same. [`Phase::Resuming`] came after the second: an earlier program can't read a
/// journal that has it. It leaves that move alone, and begins none while the journal is there.
pub const JOURNAL_VERSION: u32 = 2;

/// How long a destination remembers a move that ended.
pub const KEEP_ENDED: Duration = Duration::from_secs(30 * 24 * 3600);

/// The largest journal that is read: it has a handful of lines.
const LONGEST: u64 = 1 << 20;

/// What is wrong with a journal that was created and not begun.
const EMPTY: &str = "Is empty";

/// Which end of a move this journal belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The guest leaves.
    Source,
    /// The guest arrives.
    Destination,
}

/// How far a move is, in the order of its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Both: nothing was touched yet; at the destination, memory arrives.
    Begun,
    /// Source: the hypervisor may be logging dirty pages.
    Tracking,
    /// Source: the guest was asked to suspend.
    Suspending,
    /// Source: the guest was suspended, is this site's, and is about to be resumed, or was. Also
    /// after the commit, by the word of the destination or of the operator.
    Resuming,
    /// Destination: all is here and proved; waiting for the commit.
    Ready,
    /// Source: the commit may have been sent. Only the destination knows who owns the guest.
    Committed,
    /// Destination: the guest is ours.
    Owner,
    /// Destination: it was let run. Whoever settles the move must not do it again: its operator may
    /// have paused it since.
    Running,
}

/// How a move ended at this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The guest is at the destination.
    Moved,
    /// The guest is at the source.
    Aborted,
}

/// What is fixed when a move begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begin {
    /// The journal's format, [`JOURNAL_VERSION`].
    pub version: u32,
    /// The move, the same at both sides.
    pub move_id: String,
    /// Which side this is.
    pub role: Role,
    /// The guest's name.
    pub name: String,
    /// The guest's UUID.
    pub uuid: String,
    /// At the source, the guest's domain id.
    pub domid: Option<u32>,
    /// The other site, as the operator named it.
    pub peer: String,
    /// The command that reaches the other site's `vmshadow`; empty at the destination.
    pub remote: Vec<String>,
    /// Where that command was given, and is to be run: paths in it may start there. None at the
    /// destination, where it can't be written as text, and in journals of earlier programs.
    #[serde(default)]
    pub directory: Option<String>,
    /// At the destination, the file that holds the memory.
    pub memory: Option<PathBuf>,
    /// The kernel's boot id: after a reboot no domain of the journal is left.
    pub boot_id: String,
}

impl Begin {
    /// A move that this program begins while this kernel runs. What only one side has is none yet.
    ///
    /// # Errors
    /// [`Error::Io`] where the boot id can't be read.
    pub fn new(role: Role, move_id: &str, name: &str, uuid: &str, peer: &str) -> Result<Begin> {
        Ok(Begin {
            version: JOURNAL_VERSION,
            move_id: move_id.to_owned(),
            role,
            name: name.to_owned(),
            uuid: uuid.to_owned(),
            domid: None,
            peer: peer.to_owned(),
            remote: Vec::new(),
            directory: None,
            memory: None,
            boot_id: boot_id()?,
        })
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "lowercase")]
enum Record {
    Begin(Box<Begin>),
    Phase { phase: Phase },
    Slowing { cap: u32 },
    End { outcome: Outcome },
}

/// What a journal says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The file.
    pub path: PathBuf,
    /// What was fixed at the beginning.
    pub begin: Begin,
    /// How far it came.
    pub phase: Phase,
    /// At the source, where the guest may have been slowed down: the cap of its processor time
    /// before that, in percent of one CPU, zero for none.
    pub cap: Option<u32>,
    /// How it ended, if it did.
    pub outcome: Option<Outcome>,
}

/// A journal open for writing.
#[derive(Debug)]
pub struct Journal {
    file: File,
    entry: Entry,
}

impl Journal {
    /// Starts the journal of a move.
    ///
    /// # Errors
    /// [`Error::Io`] where it can't be written and synced; [`Error::Journal`] where this move
    /// has one already.
    pub fn create(directories: &Directories, begin: Begin) -> Result<Journal> {
        let path = path_of(directories, &begin.move_id, begin.role)?;
        let doing = || format!("Can't start the journal {}", path.display());
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .context(doing)?;
        let entry = Entry {
            path: path.clone(),
            begin,
            phase: Phase::Begun,
            cap: None,
            outcome: None,
        };
        let mut journal = Journal { file, entry };
        let begin = journal.entry.begin.clone();
        let begun = journal
            .append(&Record::Begin(Box::new(begin)))
            .and_then(|()| sync_directory(&directories.moves()));
        match begun {
            Ok(()) => Ok(journal),
            Err(error) => {
                // A journal that nobody goes on with must not stay.
                let _ = fs::remove_file(&path);
                Err(error)
            }
        }
    }

    /// Opens the journal of a move to go on writing it.
    ///
    /// # Errors
    /// As [`read`], and [`Error::Io`].
    pub fn open(path: &Path) -> Result<Journal> {
        let entry = read(path)?;
        // A torn last line must not swallow the record that follows it.
        let length = complete_length(path)?;
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .context(|| format!("Can't open the journal {}", path.display()))?;
        file.set_len(length)
            .context(|| format!("Can't mend the journal {}", path.display()))?;
        Ok(Journal { file, entry })
    }

    /// What the journal says now.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }

    /// Records that the move reached `phase`. On return it is on the disk.
    ///
    /// # Errors
    /// [`Error::Io`]; then the phase must not take effect.
    pub fn reach(&mut self, phase: Phase) -> Result<()> {
        self.append(&Record::Phase { phase })?;
        self.entry.phase = phase;
        Ok(())
    }

    /// Records that the guest is about to be slowed down, and the cap of its processor time before
    /// that, in percent of one CPU. On return it is on the disk.
    ///
    /// # Errors
    /// [`Error::Io`]; then the guest must not be slowed down.
    pub fn slowing(&mut self, cap: u32) -> Result<()> {
        // The one that it had first is what it gets back.
        if self.entry.cap.is_none() {
            self.append(&Record::Slowing { cap })?;
            self.entry.cap = Some(cap);
        }
        Ok(())
    }

    /// Records the end of the move at this side.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn end(&mut self, outcome: Outcome) -> Result<()> {
        self.append(&Record::End { outcome })?;
        self.entry.outcome = Some(outcome);
        Ok(())
    }

    /// Ends the move and removes the file: for a source, whom nobody asks later.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn end_and_remove(&mut self, outcome: Outcome) -> Result<()> {
        // On a full disk the end can't be written. Removed, the journal is ended just as well.
        if let Err(error) = self.end(outcome) {
            log::warn!("{}", chain(&error));
        }
        self.remove()
    }

    /// Records the end of a source's move; where that can't be written, as on a full disk, removes
    /// the file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn end_or_remove(&mut self, outcome: Outcome) -> Result<()> {
        self.end(outcome).or_else(|error| {
            log::warn!("{}", chain(&error));
            self.remove()
        })
    }

    fn remove(&self) -> Result<()> {
        let path = &self.entry.path;
        fs::remove_file(path).context(|| format!("Can't remove the journal {}", path.display()))
    }

    fn append(&mut self, record: &Record) -> Result<()> {
        let path = &self.entry.path;
        let doing = || format!("Can't write the journal {}", path.display());
        let mut line = serde_json::to_vec(record).map_err(|error| Error::Journal {
            path: path.display().to_string(),
            what: error.to_string(),
        })?;
        line.push(b'\n');
        let before = self.file.metadata().context(doing)?.len();
        let written = self
            .file
            .write_all(&line)
            .and_then(|()| self.file.sync_data());
        if written.is_err() {
            // Part of it may be there. What never took effect must not be read later.
            if let Err(error) = self.file.set_len(before) {
                log::error!("Can't mend the journal {}: {error}", path.display());
            }
        }
        written.context(doing)
    }
}

/// Reads one journal.
///
/// # Errors
/// [`Error::Journal`] where it isn't one of ours or of another version, [`Error::Io`].
pub fn read(path: &Path) -> Result<Entry> {
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LONGEST).read_to_end(&mut text))
        .context(|| format!("Can't read the journal {}", path.display()))?;
    parse(path, &text)
}

fn parse(path: &Path, text: &[u8]) -> Result<Entry> {
    let bad = |what: String| Error::Journal {
        path: path.display().to_string(),
        what,
    };
    let mut entry: Option<Entry> = None;
    // Only what ends with a newline was written whole.
    let whole = text
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |end| end + 1);
    for line in text[..whole]
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let record =
            serde_json::from_slice(line).map_err(|error| bad(format!("Bad record: {error}")))?;
        match (record, &mut entry) {
            (Record::Begin(begin), None) => {
                if !(1..=JOURNAL_VERSION).contains(&begin.version) {
                    return Err(bad(format!(
                        "Version {} is not this program's ({JOURNAL_VERSION})",
                        begin.version
                    )));
                }
                entry = Some(Entry {
                    path: path.into(),
                    begin: *begin,
                    phase: Phase::Begun,
                    cap: None,
                    outcome: None,
                });
            }
            (Record::Phase { phase }, Some(entry)) => entry.phase = phase,
            // What there was before the first time.
            (Record::Slowing { cap }, Some(entry)) => {
                entry.cap.get_or_insert(cap);
            }
            (Record::End { outcome }, Some(entry)) => entry.outcome = Some(outcome),
            (Record::Begin(_), Some(_)) => return Err(bad("Begins twice".into())),
            (_, None) => return Err(bad("Has no beginning".into())),
        }
    }
    entry.ok_or_else(|| bad(EMPTY.into()))
}

fn complete_length(path: &Path) -> Result<u64> {
    let text = fs::read(path).context(|| format!("Can't read the journal {}", path.display()))?;
    Ok(text
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |end| end as u64 + 1))
}

/// The journals of a host.
#[derive(Debug, Default)]
pub struct Journals {
    /// What those say that can be read.
    pub entries: Vec<Entry>,
    /// Why others can't be, each with its file. Of which guests they are, and whether they are open,
    /// is not known, and never guessed.
    pub unreadable: Vec<Error>,
}

/// The journals of this host.
///
/// # Errors
/// [`Error::Io`] where the directory can't be read.
pub fn list(directories: &Directories) -> Result<Journals> {
    let moves = directories.moves();
    let doing = || format!("Can't read {}", moves.display());
    let mut journals = Journals::default();
    let listing = match fs::read_dir(&moves) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(journals),
        listing => listing.context(doing)?,
    };
    for file in listing {
        let path = file.context(doing)?.path();
        if path
            .extension()
            .is_none_or(|extension| extension != "journal")
        {
            continue;
        }
        match read(&path) {
            Ok(entry) => journals.entries.push(entry),
            // Created, not yet begun: the process that makes it died before anything happened.
            Err(Error::Journal { what, .. }) if what == EMPTY => {
                log::debug!("{} is empty", path.display());
            }
            // Its move has ended since the directory was read.
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            Err(error) => journals.unreadable.push(error),
        }
    }
    let entries = &mut journals.entries;
    entries.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(journals)
}

/// The journal of one move at one side, if there is one.
///
/// # Errors
/// As [`read`], and [`Error::Refused`] for an id that isn't one.
pub fn find(directories: &Directories, move_id: &str, role: Role) -> Result<Option<Entry>> {
    let path = path_of(directories, move_id, role)?;
    match exists(&path)? {
        true => read(&path).map(Some),
        false => Ok(None),
    }
}

/// Whether there is a journal at `path`. That it can't be looked for is not that there is none.
///
/// # Errors
/// [`Error::Io`].
pub fn exists(path: &Path) -> Result<bool> {
    path.try_exists()
        .context(|| format!("Can't look for {}", path.display()))
}

/// Removes ended journals older than [`KEEP_ENDED`], and those that nobody asks about.
///
/// # Errors
/// As [`list`].
pub fn prune(directories: &Directories) -> Result<()> {
    let now = SystemTime::now();
    for entry in list(directories)?.entries {
        let old = || {
            let age = fs::metadata(&entry.path).and_then(|data| data.modified());
            let age = age
                .ok()
                .and_then(|modified| now.duration_since(modified).ok());
            age.is_some_and(|age| age > KEEP_ENDED)
        };
        if entry.outcome.is_some() && (is_never_asked(&entry) || old()) {
            fs::remove_file(&entry.path)
                .context(|| format!("Can't remove the journal {}", entry.path.display()))?;
        }
    }
    Ok(())
}

/// A source asks only what became of a commit, and commits only what it was told to be ready.
fn is_never_asked(entry: &Entry) -> bool {
    entry.outcome == Some(Outcome::Aborted) && entry.phase < Phase::Ready
}

/// This kernel's boot id.
///
/// # Errors
/// [`Error::Io`]: it is not known then whether this is the kernel that it was.
pub fn boot_id() -> Result<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .context(|| "Can't read the boot id")
}

/// A move's id comes from the other site: as a file name it may hold hexadecimal digits and
/// dashes only.
fn path_of(directories: &Directories, move_id: &str, role: Role) -> Result<PathBuf> {
    let fits = (8..=64).contains(&move_id.len())
        && move_id
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    if !fits {
        return Err(Error::Refused("That is no id of a move".into()));
    }
    let side = match role {
        Role::Source => "source",
        Role::Destination => "destination",
    };
    Ok(directories
        .moves()
        .join(format!("{move_id}.{side}.journal")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directories() -> (tempfile::TempDir, Directories) {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::under(root.path());
        directories.create().unwrap();
        (root, directories)
    }

    fn begin() -> Begin {
        Begin {
            domid: Some(3),
            remote: vec!["ssh".into(), "b".into(), "vmshadow".into()],
            directory: Some("/root".into()),
            ..Begin::new(Role::Source, "0123abcd-ef", "g1", "u", "b").unwrap()
        }
    }

    #[test]
    fn what_was_written_is_read_back() {
        let (_root, directories) = directories();
        let mut journal = Journal::create(&directories, begin()).unwrap();
        journal.slowing(0).unwrap();
        journal.slowing(60).unwrap();
        journal.reach(Phase::Suspending).unwrap();
        journal.reach(Phase::Committed).unwrap();
        let entries = list(&directories).unwrap().entries;
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0].phase, Phase::Committed);
        assert_eq!(entries[0].begin, begin());
        assert_eq!(entries[0].cap, Some(0));
        assert_eq!(entries[0].outcome, None);
        journal.end_and_remove(Outcome::Moved).unwrap();
        assert!(list(&directories).unwrap().entries.is_empty());
    }

    #[test]
    fn a_record_cut_short_at_any_byte_never_took_effect() {
        let (_root, directories) = directories();
        let mut journal = Journal::create(&directories, begin()).unwrap();
        journal.reach(Phase::Suspending).unwrap();
        let path = journal.entry().path.clone();
        let before = fs::read(&path).unwrap();
        journal.reach(Phase::Committed).unwrap();
        let after = fs::read(&path).unwrap();
        for length in before.len()..after.len() {
            assert_eq!(
                parse(&path, &after[..length]).unwrap().phase,
                Phase::Suspending
            );
        }
        assert_eq!(parse(&path, &after).unwrap().phase, Phase::Committed);
        // Writing goes on after a torn record.
        fs::write(&path, &after[..after.len() - 3]).unwrap();
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.entry().phase, Phase::Suspending);
        journal.end(Outcome::Aborted).unwrap();
        assert_eq!(read(&path).unwrap().outcome, Some(Outcome::Aborted));
    }

    #[test]
    fn a_source_whose_disk_is_full_has_ended_its_move_all_the_same() {
        let (_root, directories) = directories();
        let mut journal = Journal::create(&directories, begin()).unwrap();
        journal.reach(Phase::Suspending).unwrap();
        let path = journal.entry().path.clone();
        // Nothing can be written any more.
        journal.file = File::open(&path).unwrap();
        assert!(journal.reach(Phase::Resuming).is_err());
        assert_eq!(read(&path).unwrap().phase, Phase::Suspending);
        journal.end_or_remove(Outcome::Aborted).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_move_has_one_journal_a_side() {
        let (_root, directories) = directories();
        let _journal = Journal::create(&directories, begin()).unwrap();
        assert!(Journal::create(&directories, begin()).is_err());
    }

    #[test]
    fn another_version_is_refused() {
        let (_root, directories) = directories();
        Journal::create(
            &directories,
            Begin {
                version: 99,
                ..begin()
            },
        )
        .unwrap();
        let path = path_of(&directories, "0123abcd-ef", Role::Source).unwrap();
        assert!(matches!(read(&path), Err(Error::Journal { .. })));
    }

    /// As those of shadows that are sent every minute.
    #[test]
    fn what_nobody_asks_about_is_not_kept() {
        let (_root, directories) = directories();
        let ended = |number: u32, phase: Option<Phase>, outcome| {
            let begin = Begin {
                move_id: format!("0123abcd-{number}"),
                role: Role::Destination,
                ..begin()
            };
            let mut journal = Journal::create(&directories, begin).unwrap();
            if let Some(phase) = phase {
                journal.reach(phase).unwrap();
            }
            if let Some(outcome) = outcome {
                journal.end(outcome).unwrap();
            }
            journal.entry().path.clone()
        };
        let given_up = ended(1, None, Some(Outcome::Aborted));
        let kept = [
            ended(2, None, None),
            ended(3, Some(Phase::Ready), Some(Outcome::Aborted)),
            ended(4, Some(Phase::Running), Some(Outcome::Moved)),
        ];
        prune(&directories).unwrap();
        assert!(!given_up.exists());
        assert!(kept.iter().all(|path| path.exists()));
    }

    #[test]
    fn a_journal_of_an_earlier_program_has_no_directory() {
        let line = serde_json::to_string(&Record::Begin(Box::new(begin()))).unwrap();
        let line = line.replace(r#""directory":"/root","#, "") + "\n";
        let entry = parse(Path::new("x"), line.as_bytes()).unwrap();
        assert_eq!(entry.begin.directory, None);
    }

    #[test]
    fn one_that_can_not_be_read_is_not_none() {
        let (_root, directories) = directories();
        let write = |name: &str, text: &str| {
            fs::write(directories.moves().join(name), text).unwrap();
        };
        // Its worker died before anything happened.
        write("00000000-00.source.journal", "");
        write("00000000-01.source.journal", "{\"record\":\"beg");
        assert!(list(&directories).unwrap().unreadable.is_empty());
        write("00000000-02.source.journal", "{\"record\":\"other\"}\n");
        // As what the disk does not give any more.
        fs::create_dir(directories.moves().join("00000000-03.source.journal")).unwrap();
        let journals = list(&directories).unwrap();
        assert!(journals.entries.is_empty());
        let mut told: Vec<_> = journals.unreadable.iter().map(|it| chain(it)).collect();
        told.sort();
        assert!(told[0].contains("00000000-03") && told[1].contains("00000000-02"));
        assert_eq!(told.len(), 2);
    }

    #[test]
    fn a_peer_cannot_name_a_path() {
        let (_root, directories) = directories();
        for bad in ["", "../../../etc", "abc/defgh", "0123456789abcdefg"] {
            assert!(find(&directories, bad, Role::Destination).is_err(), "{bad}");
        }
    }
}
