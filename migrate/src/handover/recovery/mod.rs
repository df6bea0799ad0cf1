//! What to do about a move whose worker is gone.
//!
//! [`action`] is the whole policy: a pure function of the journal. [`settle`] carries it out, and
//! can be run again after it was itself cut short. What it does to guests is behind [`Here`], so that
//! it settles those that are replayed as well.
//!
//! ```text
//! source       begun, tracking  -> the guest never stopped: end log-dirty
//!              suspending       -> take the request back, or resume
//!              resuming         -> resume, where it is suspended still
//!              slowed down      -> wherever it goes on here: give it its processor time back
//!              committed        -> ask the destination, and do what it says
//! destination  begun, ready     -> destroy what is incoming
//!              owner            -> the guest is ours: let it run, name it
//!              running          -> it runs already: name it
//! ```

mod here;
mod steps;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub(crate) use here::Here;
use here::OnXen;
use steps::{clear_up, destroy_left, discard, finish, leave_alone, remove_memory, resume};

use super::journal::{self, Entry, Journal, Outcome, Phase, Role};
use super::lock::GuestLock;
use crate::directories::Directories;
use crate::error::{Error, Result, chain};
use crate::guest::xen::host::{Asked, Host, SUSPENDING};
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
        (Role::Source, Phase::Suspending | Phase::Resuming) => Action::Resume,
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

/// What a journal tells of the request to suspend. Only as long as it says no more than that it may
/// have been made can a suspend come late.
fn asked(phase: Phase, late: LateSuspend) -> Asked {
    match phase {
        Phase::Suspending => Asked::Waiting(late.patience()),
        // What is committed was suspended.
        _ => Asked::Done,
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
    carry_out(&mut journal, late, &mut ask, || {
        OnXen::open(directories, &entry.begin)
    })
}

/// Carries out what `journal` demands at the site that `open` takes hold of. `ask` asks the
/// destination.
pub(crate) fn carry_out<H: Here>(
    journal: &mut Journal,
    late: LateSuspend,
    ask: &mut dyn FnMut(&Entry) -> Result<Owner>,
    open: impl FnOnce() -> Result<H>,
) -> Result<Settled> {
    let entry = journal.entry().clone();
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
            let there = leave_alone(&open()?, &entry)?;
            journal.end_and_remove(Outcome::Aborted)?;
            let what = "The move was given up before the guest was suspended";
            Ok(settled_here(&entry, what, there))
        }
        Action::Resume => {
            let there = resume(&open()?, journal, late)?;
            journal.end_and_remove(Outcome::Aborted)?;
            let what = "The move was given up and the guest goes on";
            Ok(settled_here(&entry, what, there))
        }
        Action::AskDestination => match ask(&entry)? {
            Owner::Destination => {
                destroy_left(&open()?, &entry)?;
                journal.end_and_remove(Outcome::Moved)?;
                Ok(settled(
                    &entry,
                    "The destination owns the guest",
                    Place::There,
                ))
            }
            Owner::Source => {
                let there = resume(&open()?, journal, late)?;
                journal.end_and_remove(Outcome::Aborted)?;
                let what = "The destination gave up and the guest goes on";
                Ok(settled_here(&entry, what, there))
            }
            Owner::Unknown => Err(Error::InDoubt {
                peer: entry.begin.peer.clone(),
            }),
        },
        Action::Discard => {
            discard(&open()?, &entry)?;
            journal.end(Outcome::Aborted)?;
            Ok(settled(
                &entry,
                "What had arrived was discarded",
                Place::There,
            ))
        }
        Action::Finish => {
            let there = finish(&open()?, journal)?;
            let what = "The guest was committed to this site and runs";
            Ok(settled_here(&entry, what, there))
        }
        Action::ClearUp => {
            let there = clear_up(&open()?, journal)?;
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
    let open_here = || OnXen::open(directories, &entry.begin);
    let (what, place) = match (entry.begin.role, entry.phase, here) {
        (Role::Source, Phase::Committed, false) => {
            destroy_left(&open_here()?, &entry)?;
            journal.end_and_remove(Outcome::Moved)?;
            ("By decree the guest is the destination's", Place::There)
        }
        (Role::Source, Phase::Committed, true) if open => {
            let there = resume(&open_here()?, &mut journal, LateSuspend::WillNotCome)?;
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
            let there = finish(&open_here()?, &mut journal)?;
            let what = "By decree the guest is this site's, and runs";
            return Ok(settled_here(&entry, what, there));
        }
        (Role::Destination, Phase::Ready, false) if open => {
            discard(&open_here()?, &entry)?;
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

/// What an incoming guest is called until it is committed, as xl does.
pub fn incoming_name(name: &str) -> String {
    format!("{name}--incoming")
}
