//! What to do about a move whose worker is gone.
//!
//! [`action`] is the whole policy: a pure function of the journal. [`settle`] carries it out, and
//! can be run again after it was itself cut short.
//!
//! ```text
//! source       begun, tracking  -> the guest never stopped: end log-dirty
//!              suspending       -> take the request back, or resume
//!              slowed down      -> wherever it goes on here: give it its processor time back
//!              committed        -> ask the destination, and do what it says
//! destination  begun, ready     -> destroy what is incoming
//!              owner            -> the guest is ours: let it run, name it
//!              running          -> it runs already: name it
//! ```

use std::fmt;
use std::fs;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::journal::{self, Entry, Journal, Outcome, Phase, Role};
use super::lock::GuestLock;
use crate::directories::Directories;
use crate::error::{Error, Result, chain};
use crate::guest::xen::host::{Host, SUSPENDING};
use crate::guest::{EndedSuspend, MAY_SUSPEND};
use crate::keeper;
use crate::link::ssh::Remote;
use crate::shadow::{ShadowPolicy, Shadows};
use crate::wire::Text;

/// What a journal demands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It ended; nothing is open.
    Nothing,
    /// The guest stays at the source and was never asked to suspend.
    GoOn,
    /// The guest stays at the source; it may be suspended, or about to be.
    Resume,
    /// Only the destination knows.
    AskDestination,
    /// Destroy the incoming domain and its memory.
    Discard,
    /// The guest is this site's: let it run.
    Finish,
    /// The guest is this site's and was let run: clear up.
    ClearUp,
}

/// What to do about a move that left `entry` behind.
pub fn action(entry: &Entry) -> Action {
    if entry.outcome.is_some() {
        return Action::Nothing;
    }
    match (entry.begin.role, entry.phase) {
        (Role::Source, Phase::Begun | Phase::Tracking) => Action::GoOn,
        (Role::Source, Phase::Suspending) => Action::Resume,
        (Role::Source, Phase::Committed) => Action::AskDestination,
        (Role::Destination, Phase::Owner) => Action::Finish,
        (Role::Destination, Phase::Running) => Action::ClearUp,
        (Role::Destination, Phase::Begun | Phase::Ready) => Action::Discard,
        // Phases of the other side: a journal that we didn't write. Ask; never guess.
        (Role::Source, Phase::Ready | Phase::Owner | Phase::Running) => Action::AskDestination,
        (Role::Destination, _) => Action::Discard,
    }
}

/// A destination's answer to a source that committed and heard nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// The guest is the destination's.
    Destination,
    /// The destination gave up and has nothing of it: the guest is the source's.
    Source,
    /// The destination has no record of such a move.
    Unknown,
}

/// The answer as it is printed by `vmshadow receive --ask`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The format, 1.
    pub version: u32,
    /// Who owns the guest.
    pub owner: Owner,
}

/// How a move was settled, in words for the operator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Settled {
    /// The guest.
    pub name: String,
    /// Which end of the move this site was.
    pub role: Role,
    /// What was found and done.
    pub what: String,
    /// Where the guest is now, seen from here.
    pub place: Place,
}

/// Where a guest is, seen from the site that settled its move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// At this site.
    Here,
    /// At the other one.
    There,
    /// At neither: it has ended.
    Nowhere,
    /// At the other one, or at neither: somebody else settled it.
    NotHere,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Place::Here => "here",
            Place::There => "there",
            Place::Nowhere => "nowhere",
            Place::NotHere => "not here",
        })
    }
}

/// What to do about a guest that has taken a request to suspend and has not done it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LateSuspend {
    /// The move stays open, and somebody looks again.
    StaysOpen,
    /// It is waited for; where it does not come the move stays open.
    IsWaitedFor,
    /// It is waited for a last time.
    WillNotCome,
}

impl LateSuspend {
    /// Meanwhile nobody else can do anything about the guest.
    fn patience(self) -> Duration {
        match self {
            LateSuspend::StaysOpen => Duration::ZERO,
            LateSuspend::IsWaitedFor | LateSuspend::WillNotCome => SUSPENDING,
        }
    }
}

/// How long a worker of the same move is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long it is waited for before a source is told to ask again: less than it waits for an answer.
const ANSWERING: Duration = Duration::from_secs(20);

/// Carries out what the journal at `entry` demands. Runs again without harm. `late` is what to do
/// about a suspend that may come yet.
///
/// # Errors
/// [`Error::Busy`] while its worker lives, and while the guest may suspend yet; [`Error::LinkLost`]
/// or [`Error::InDoubt`] where the destination has to be asked and doesn't answer; what Xen refuses.
pub fn settle(
    directories: &Directories,
    entry: &Entry,
    patience: Duration,
    late: LateSuspend,
) -> Result<Settled> {
    let begin = &entry.begin;
    let _lock = GuestLock::wait(directories, &begin.uuid, &begin.name, patience)?;
    // While we waited its worker, or another of us, may have gone on.
    if !journal::exists(&entry.path)? {
        // A source's journal goes however its move ended: only the guest itself tells.
        let place = match Host::open()?.find_named(&begin.uuid, &begin.name)? {
            Some(_) => Place::Here,
            None => Place::NotHere,
        };
        return Ok(settled(entry, "Settled already", place));
    }
    let mut journal = Journal::open(&entry.path)?;
    let entry = journal.entry().clone();
    // Its worker may have been killed while it kept the guest's memory.
    if let Err(error) =
        Shadows::new(directories, ShadowPolicy::default()).drop_drafts(&entry.begin.uuid)
    {
        log::warn!("{}", chain(&error));
    }
    if entry.outcome.is_none() && entry.begin.boot_id != journal::boot_id()? {
        return settle_after_reboot(journal, &entry);
    }
    match action(&entry) {
        Action::Nothing => {
            let place = match (entry.begin.role, entry.outcome) {
                (Role::Source, Some(Outcome::Moved))
                | (Role::Destination, Some(Outcome::Aborted)) => Place::There,
                _ => Place::Here,
            };
            if entry.begin.role == Role::Source {
                remove(&entry);
            }
            Ok(settled(&entry, "Ended already", place))
        }
        Action::GoOn => {
            let host = Host::open()?;
            speed_up(&host, &entry)?;
            let domid = host.find(&entry.begin.uuid)?;
            if let Some(domid) = domid {
                host.end_log_dirty(domid, entry.phase >= Phase::Tracking)?;
            }
            journal.end_and_remove(Outcome::Aborted)?;
            Ok(match domid {
                Some(_) => settled(
                    &entry,
                    "The move was given up before the guest was suspended",
                    Place::Here,
                ),
                None => settled(&entry, ENDED, Place::Nowhere),
            })
        }
        Action::Resume => {
            let there = resume(directories, &entry, late)?;
            journal.end_and_remove(Outcome::Aborted)?;
            let what = "The move was given up and the guest goes on";
            Ok(settled_here(&entry, what, there))
        }
        Action::AskDestination => match ask(&entry)? {
            Owner::Destination => {
                destroy_left(&entry)?;
                journal.end_and_remove(Outcome::Moved)?;
                Ok(settled(
                    &entry,
                    "The destination owns the guest",
                    Place::There,
                ))
            }
            Owner::Source => {
                let there = resume(directories, &entry, late)?;
                journal.end_and_remove(Outcome::Aborted)?;
                let what = "The destination gave up and the guest goes on";
                Ok(settled_here(&entry, what, there))
            }
            Owner::Unknown => Err(Error::InDoubt {
                peer: entry.begin.peer.clone(),
            }),
        },
        Action::Discard => {
            discard(&entry)?;
            journal.end(Outcome::Aborted)?;
            Ok(settled(
                &entry,
                "What had arrived was discarded",
                Place::There,
            ))
        }
        Action::Finish => {
            let there = finish(directories, &mut journal)?;
            let what = "The guest was committed to this site and runs";
            Ok(settled_here(&entry, what, there))
        }
        Action::ClearUp => {
            let there = clear_up(directories, &mut journal)?;
            let what = "The guest was committed to this site";
            Ok(settled_here(&entry, what, there))
        }
    }
}

/// This host has started anew since: its domains of that time are gone, the guest's among them
/// where it had one here.
fn settle_after_reboot(mut journal: Journal, entry: &Entry) -> Result<Settled> {
    match action(entry) {
        Action::AskDestination => match ask(entry)? {
            Owner::Destination => {
                journal.end_and_remove(Outcome::Moved)?;
                Ok(settled(
                    entry,
                    "The destination owns the guest",
                    Place::There,
                ))
            }
            Owner::Source => {
                journal.end_and_remove(Outcome::Aborted)?;
                Ok(settled(
                    entry,
                    "The guest was this host's and ended with its reboot",
                    Place::Nowhere,
                ))
            }
            Owner::Unknown => Err(Error::InDoubt {
                peer: entry.begin.peer.clone(),
            }),
        },
        Action::Discard => {
            remove_memory(entry)?;
            journal.end(Outcome::Aborted)?;
            Ok(settled(
                entry,
                "What had arrived was discarded",
                Place::There,
            ))
        }
        Action::Finish | Action::ClearUp => {
            remove_memory(entry)?;
            journal.end(Outcome::Moved)?;
            Ok(settled(
                entry,
                "The guest was this host's and ended with its reboot",
                Place::Nowhere,
            ))
        }
        Action::Nothing | Action::GoOn | Action::Resume => {
            journal.end_and_remove(Outcome::Aborted)?;
            Ok(settled(
                entry,
                "The guest was this host's and ended with its reboot",
                Place::Nowhere,
            ))
        }
    }
}

/// The operator's word about a move that can't be settled otherwise: the guest is `here`, on this
/// host, or at the other. Nobody is asked.
///
/// At the source it counts once the commit may have been sent. At the destination, where the
/// source is lost for good: once the guest is complete there.
///
/// # Errors
/// [`Error::Refused`] where the journal itself says what to do.
pub fn settle_by_decree(directories: &Directories, entry: &Entry, here: bool) -> Result<Settled> {
    let begin = &entry.begin;
    let _lock = GuestLock::wait(directories, &begin.uuid, &begin.name, PATIENCE)?;
    let mut journal = Journal::open(&entry.path)?;
    let entry = journal.entry().clone();
    let open = entry.outcome.is_none() && entry.begin.boot_id == journal::boot_id()?;
    if !can_be_decreed(entry.begin.role, entry.phase, here) {
        return Err(Error::Refused(format!(
            "The move of {} is not in doubt: resolve it without a decree",
            entry.begin.name
        )));
    }
    let (what, place) = match (entry.begin.role, entry.phase, here) {
        (Role::Source, Phase::Committed, false) => {
            destroy_left(&entry)?;
            journal.end_and_remove(Outcome::Moved)?;
            ("By decree the guest is the destination's", Place::There)
        }
        (Role::Source, Phase::Committed, true) if open => {
            let there = resume(directories, &entry, LateSuspend::WillNotCome)?;
            journal.end_and_remove(Outcome::Aborted)?;
            let what = "By decree the guest is this site's, and goes on";
            return Ok(settled_here(&entry, what, there));
        }
        (Role::Source, Phase::Committed, true) if entry.outcome.is_none() => {
            journal.end_and_remove(Outcome::Aborted)?;
            (
                "By decree the guest was this site's, and ended with its reboot",
                Place::Nowhere,
            )
        }
        (Role::Destination, Phase::Ready | Phase::Owner, true) if open => {
            let there = finish(directories, &mut journal)?;
            let what = "By decree the guest is this site's, and runs";
            return Ok(settled_here(&entry, what, there));
        }
        (Role::Destination, Phase::Ready, false) if open => {
            discard(&entry)?;
            journal.end(Outcome::Aborted)?;
            ("By decree the guest is the source's", Place::There)
        }
        _ => {
            return Err(Error::Refused(format!(
                "The move of {} has ended: resolve it without a decree",
                entry.begin.name
            )));
        }
    };
    Ok(settled(&entry, what, place))
}

/// Whether the operator's word can count that the guest is `here`, or at the other site. What owns
/// the guest may run it already: that it is elsewhere nobody can decree.
fn can_be_decreed(role: Role, phase: Phase, here: bool) -> bool {
    match (role, phase) {
        (Role::Source, Phase::Committed) | (Role::Destination, Phase::Ready) => true,
        (Role::Destination, Phase::Owner) => here,
        _ => false,
    }
}

/// The destination's answer about a move: settles it first, so that the answer holds for good. What
/// was settled comes with it.
///
/// # Errors
/// As [`settle`].
pub fn answer(directories: &Directories, move_id: &str) -> Result<(Answer, Option<Settled>)> {
    // After a reboot it may be the first to come: there are no locks yet.
    directories.create()?;
    let mut done = None;
    let owner = match journal::find(directories, move_id, Role::Destination)? {
        None => Owner::Unknown,
        Some(entry) => {
            if entry.outcome.is_none() {
                done = Some(settle(
                    directories,
                    &entry,
                    ANSWERING,
                    LateSuspend::StaysOpen,
                )?);
            }
            match journal::read(&entry.path)?.outcome {
                Some(Outcome::Moved) => Owner::Destination,
                Some(Outcome::Aborted) => Owner::Source,
                None => return Err(Error::Busy("The move is still under way".into())),
            }
        }
    };
    Ok((Answer { version: 1, owner }, done))
}

/// Settles whatever dead workers left on this host, but for what is in doubt and what living
/// workers have in hand. What can't be settled now is logged. `follow` hears of each that was: the
/// edge has to know.
pub fn settle_all(directories: &Directories, follow: &mut dyn FnMut(&Settled)) {
    let journals = match journal::list(directories) {
        Ok(journals) => journals,
        Err(error) => return log::warn!("{}", chain(&error)),
    };
    for error in &journals.unreadable {
        log::warn!("{}", chain(error));
    }
    for entry in journals
        .entries
        .iter()
        .filter(|entry| action(entry) != Action::Nothing)
    {
        if action(entry) == Action::AskDestination {
            continue;
        }
        match settle(directories, entry, Duration::ZERO, LateSuspend::StaysOpen) {
            Ok(settled) => {
                log::info!("{}: {}", settled.name, settled.what);
                follow(&settled);
            }
            Err(Error::Busy(_)) => {}
            Err(error) => log::warn!("{}: {}", entry.begin.name, chain(&error)),
        }
    }
    if let Err(error) = journal::prune(directories) {
        log::warn!("{}", chain(&error));
    }
}

/// An earlier move of the guest that is still open must be settled first. A journal that can't be
/// read may be of one.
///
/// # Errors
/// [`Error::Refused`] says how.
pub fn refuse_open_moves(directories: &Directories, uuid: &str, name: &str) -> Result<()> {
    let journals = journal::list(directories)?;
    if let Some(error) = journals.unreadable.first() {
        return Err(Error::Refused(format!(
            "Whether an earlier move of {name} is open can't be told: {}",
            chain(error)
        )));
    }
    for entry in journals
        .entries
        .iter()
        .filter(|entry| entry.begin.uuid == uuid)
    {
        match action(entry) {
            Action::Nothing => {}
            Action::AskDestination => {
                return Err(Error::Refused(format!(
                    "An earlier move of {name} to {} is in doubt; run: vmshadow resolve {name}",
                    entry.begin.peer
                )));
            }
            _ => {
                return Err(Error::Refused(format!(
                    "An earlier move of {name} is not settled; run: vmshadow resolve {name}"
                )));
            }
        }
    }
    Ok(())
}

/// Of a guest that is not where it has to be any more.
const ENDED: &str = "The guest is this site's, and has ended meanwhile";

/// Of a guest that is this site's: `what` is said if it is there.
fn settled_here(entry: &Entry, what: &str, there: bool) -> Settled {
    match there {
        true => settled(entry, what, Place::Here),
        false => settled(entry, ENDED, Place::Nowhere),
    }
}

fn settled(entry: &Entry, what: &str, place: Place) -> Settled {
    Settled {
        name: entry.begin.name.clone(),
        role: entry.begin.role,
        what: what.to_owned(),
        place,
    }
}

fn remove(entry: &Entry) {
    if let Err(error) = fs::remove_file(&entry.path) {
        log::warn!("Can't remove {}: {error}", entry.path.display());
    }
}

/// Asks the destination, which may itself have to wait for its worker to notice the lost link.
pub(crate) fn ask(entry: &Entry) -> Result<Owner> {
    let begin = &entry.begin;
    let remote = Remote::from_parts(
        begin.peer.clone(),
        begin.remote.clone(),
        begin.directory.clone(),
    );
    let text = remote.ask(&["receive", "--ask", &begin.move_id])?;
    let answer: Answer = serde_json::from_str(text.trim()).map_err(|error| Error::Protocol {
        peer: begin.peer.clone(),
        what: Text::new(&format!("an answer that can't be read: {error}")).to_string(),
    })?;
    Ok(answer.owner)
}

/// Makes sure that the guest runs here; under a keeper where it was suspended, since `xl`'s
/// monitor ends then. False where there is no such guest any more.
///
/// # Errors
/// [`Error::Busy`] where the guest may suspend yet, if that leaves the move open; what Xen refuses.
fn resume(directories: &Directories, entry: &Entry, late: LateSuspend) -> Result<bool> {
    let host = Host::open()?;
    // With its processor time, a suspend that is late ends soon. But nothing of this keeps a guest
    // from going on.
    let sped_up = speed_up(&host, entry);
    let Some(domid) = host.find(&entry.begin.uuid)? else {
        log::warn!("{} is gone from this host", entry.begin.name);
        keeper::forget_missing(directories, &entry.begin.uuid);
        return Ok(false);
    };
    let (name, uuid) = (&entry.begin.name, &entry.begin.uuid);
    let keep = || keeper::start(directories, name, uuid);
    let mut may_come = false;
    match host.end_suspend(domid, Some(late.patience()))? {
        EndedSuspend::Suspended => {
            // First the keeper: it is to see all that the guest does.
            let kept = keep();
            host.resume(domid)?;
            // What it lacked may be there by now.
            kept.or_else(|_| keep())?;
        }
        // It was suspended, and goes on already.
        _ if keeper::is_missing(directories, uuid) => keep()?,
        EndedSuspend::WillNot => {}
        EndedSuspend::MayCome => may_come = true,
    }
    host.end_log_dirty(domid, true)?;
    if may_come && late != LateSuspend::WillNotCome {
        return Err(Error::Busy(MAY_SUSPEND.into()));
    }
    sped_up.map(|()| true)
}

/// Gives a guest that was slowed down its processor time back.
fn speed_up(host: &Host, entry: &Entry) -> Result<()> {
    match entry.cap {
        Some(cap) => host.restore_cpu_cap(&entry.begin.uuid, cap),
        None => Ok(()),
    }
}

/// Destroys the domain that the guest left behind here.
///
/// # Errors
/// [`Error::Refused`] where another tool has let it go on: what it did since is nowhere else.
fn destroy_left(entry: &Entry) -> Result<()> {
    let host = Host::open()?;
    let left = entry.begin.domid;
    match host.find(&entry.begin.uuid)? {
        // It must be the one that was suspended, not a guest that came back since.
        Some(domid) if host.is_suspended(domid)? => {
            host.end_log_dirty(domid, true)?;
            host.destroy(domid)
        }
        Some(domid) if left == Some(domid.get()) && entry.begin.boot_id == journal::boot_id()? => {
            Err(Error::Refused(format!(
                "{} runs there, and here too: another tool let domain {domid} go on. Destroy it and \
                 resolve again; or, to keep it, destroy the one there and decree \"here\"",
                entry.begin.name
            )))
        }
        Some(domid) => {
            log::warn!(
                "{} (domain {domid}) runs here; it is left alone",
                entry.begin.name
            );
            Ok(())
        }
        None => Ok(()),
    }
}

/// Destroys what has arrived of a guest that stays where it was.
fn discard(entry: &Entry) -> Result<()> {
    let host = Host::open()?;
    if let Some(domid) = host.find_named(&entry.begin.uuid, &incoming_name(&entry.begin.name))? {
        host.destroy(domid)?;
    }
    remove_memory(entry)
}

/// Lets the guest run that was committed to this site, and ends the journal. False where there is
/// no such guest any more.
fn finish(directories: &Directories, journal: &mut Journal) -> Result<bool> {
    // Whoever wrote this first may have failed to get it onto the disk.
    journal.reach(Phase::Owner)?;
    let host = Host::open()?;
    let begin = journal.entry().begin.clone();
    match host.find(&begin.uuid)? {
        Some(domid) => {
            host.take_over(domid, &incoming_name(&begin.name), &begin.name)?;
            journal.reach(Phase::Running)?;
        }
        None => log::error!("{} was committed to this host and is gone", begin.name),
    }
    clear_up(directories, journal)
}

/// The guest runs here: gives it its name and a keeper, and ends the journal. False where there is
/// no such guest any more.
fn clear_up(directories: &Directories, journal: &mut Journal) -> Result<bool> {
    let host = Host::open()?;
    let entry = journal.entry();
    let begin = &entry.begin;
    let domid = host.find(&begin.uuid)?;
    if let Some(domid) = domid {
        host.name_arrived(domid, &incoming_name(&begin.name), &begin.name);
        keeper::start(directories, &begin.name, &begin.uuid)?;
    }
    remove_memory(entry)?;
    journal.end(Outcome::Moved)?;
    Ok(domid.is_some())
}

fn remove_memory(entry: &Entry) -> Result<()> {
    let Some(path) = &entry.begin.memory else {
        return Ok(());
    };
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::Io {
            doing: format!("Can't remove {}", path.display()),
            source: error,
        }),
        _ => Ok(()),
    }
}

/// What an incoming guest is called until it is committed, as xl does.
pub fn incoming_name(name: &str) -> String {
    format!("{name}--incoming")
}

#[cfg(test)]
mod tests {
    use super::super::journal::{Begin, JOURNAL_VERSION};
    use super::*;

    fn entry(role: Role, phase: Phase, outcome: Option<Outcome>) -> Entry {
        Entry {
            path: "/nowhere".into(),
            begin: Begin {
                version: JOURNAL_VERSION,
                move_id: "m".into(),
                role,
                name: "g1".into(),
                uuid: "u".into(),
                domid: None,
                peer: "b".into(),
                remote: Vec::new(),
                directory: None,
                memory: None,
                boot_id: String::new(),
            },
            phase,
            cap: None,
            outcome,
        }
    }

    const PHASES: [Phase; 7] = [
        Phase::Begun,
        Phase::Tracking,
        Phase::Suspending,
        Phase::Ready,
        Phase::Committed,
        Phase::Owner,
        Phase::Running,
    ];

    /// Law 1 as a table: whatever pair of journals a double crash leaves behind, one guest runs.
    #[test]
    fn every_pair_of_journals_leaves_one_owner() {
        // The pairs that the protocol can reach: ready precedes committed precedes owner.
        let reachable = |source: Phase, destination: Phase| match destination {
            Phase::Begun => source < Phase::Committed,
            Phase::Ready => true,
            Phase::Owner | Phase::Running => source == Phase::Committed,
            _ => false,
        };
        let mut pairs = 0;
        for source in [
            Phase::Begun,
            Phase::Tracking,
            Phase::Suspending,
            Phase::Committed,
        ] {
            for destination in [Phase::Begun, Phase::Ready, Phase::Owner, Phase::Running] {
                if !reachable(source, destination) {
                    continue;
                }
                pairs += 1;
                let there = matches!(
                    action(&entry(Role::Destination, destination, None)),
                    Action::Finish | Action::ClearUp
                );
                let here = match action(&entry(Role::Source, source, None)) {
                    Action::GoOn | Action::Resume => true,
                    // The source does what the destination's own settlement decided.
                    Action::AskDestination => !there,
                    other => panic!("{other:?}"),
                };
                assert!(here ^ there, "{source:?} {destination:?}");
            }
        }
        assert_eq!(pairs, 9);
    }

    #[test]
    fn a_source_never_resumes_by_itself_after_commit() {
        for phase in PHASES
            .into_iter()
            .filter(|phase| *phase >= Phase::Committed)
        {
            assert_eq!(
                action(&entry(Role::Source, phase, None)),
                Action::AskDestination
            );
        }
    }

    #[test]
    fn a_site_that_may_run_the_guest_can_not_be_told_that_it_is_elsewhere() {
        for phase in PHASES {
            let source = phase == Phase::Committed;
            for here in [true, false] {
                assert_eq!(can_be_decreed(Role::Source, phase, here), source);
            }
            let complete = phase == Phase::Ready;
            let owned = action(&entry(Role::Destination, phase, None)) == Action::Finish;
            assert_eq!(can_be_decreed(Role::Destination, phase, false), complete);
            assert_eq!(
                can_be_decreed(Role::Destination, phase, true),
                complete || owned
            );
        }
    }

    #[test]
    fn a_journal_that_can_not_be_read_may_be_of_an_open_move() {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::under(root.path());
        directories.create().unwrap();
        refuse_open_moves(&directories, "u", "g1").unwrap();
        let journal = directories.moves().join("00000000-00.source.journal");
        fs::write(&journal, "{\"record\":\"of another time\"}\n").unwrap();
        let error = refuse_open_moves(&directories, "u", "g1").unwrap_err();
        assert!(chain(&error).contains("00000000-00"), "{error}");
    }

    #[test]
    fn an_ended_move_needs_nothing() {
        for role in [Role::Source, Role::Destination] {
            for phase in PHASES {
                for outcome in [Outcome::Moved, Outcome::Aborted] {
                    assert_eq!(action(&entry(role, phase, Some(outcome))), Action::Nothing);
                }
            }
        }
    }
}
