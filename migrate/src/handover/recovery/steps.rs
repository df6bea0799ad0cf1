//! What is done to a guest, and to what its move left behind, in order to settle it.

use std::fs;

use super::{Here, LateSuspend, asked};
use crate::error::{Error, Result};
use crate::guest::EndedSuspend;
use crate::handover::going_on::go_on;
use crate::handover::journal::{Entry, Journal, Outcome, Phase};

/// The guest was never asked to suspend: ends what may slow it down. False where there is no such
/// guest any more.
pub(super) fn leave_alone(here: &impl Here, entry: &Entry) -> Result<bool> {
    speed_up(here, entry)?;
    let domid = here.find()?;
    if let Some(domid) = domid
        && entry.phase >= Phase::Tracking
    {
        here.end_log_dirty(domid)?;
    }
    Ok(domid.is_some())
}

/// Makes sure that the guest runs here. False where there is no such guest any more.
///
/// # Errors
/// [`Error::Busy`] where the guest may suspend yet, if that leaves the move open; what Xen refuses.
pub(super) fn resume(here: &impl Here, journal: &mut Journal, late: LateSuspend) -> Result<bool> {
    // With its processor time, a suspend that is late ends soon. But nothing of this keeps a guest
    // from going on.
    let sped_up = speed_up(here, journal.entry());
    let Some(domid) = here.find()? else {
        log::warn!("{} is gone from this host", journal.entry().begin.name);
        return Ok(false);
    };
    let ended = match here.end_suspend(domid, asked(journal.entry().phase, late))? {
        EndedSuspend::MayCome if late == LateSuspend::WillNotCome => EndedSuspend::WillNot,
        ended => ended,
    };
    let goes_on = go_on(
        ended,
        || journal.reach(Phase::Resuming),
        || here.keep(),
        || here.resume(domid),
    );
    goes_on
        .and(here.end_log_dirty(domid))
        .and(sped_up)
        .map(|()| true)
}

/// Gives a guest that was slowed down its processor time back.
fn speed_up(here: &impl Here, entry: &Entry) -> Result<()> {
    match entry.cap {
        Some(cap) => here.restore_cpu_cap(cap),
        None => Ok(()),
    }
}

/// Destroys the domain that the guest left behind here.
///
/// # Errors
/// [`Error::Refused`] where another tool has let it go on: what it did since is nowhere else.
pub(super) fn destroy_left(here: &impl Here, entry: &Entry) -> Result<()> {
    let name = &entry.begin.name;
    match here.find()? {
        // It must be the one that was suspended, not a guest that came back since.
        Some(domid) if here.is_suspended(domid)? => {
            here.end_log_dirty(domid)?;
            here.destroy(domid)
        }
        Some(domid) if here.is_left(domid)? => Err(Error::Refused(format!(
            "{name} runs there, and here too: another tool let domain {domid} go on. Destroy it and \
             resolve again; or, to keep it, destroy the one there and decree \"here\""
        ))),
        Some(domid) => {
            log::warn!("{name} (domain {domid}) runs here; it is left alone");
            Ok(())
        }
        None => Ok(()),
    }
}

/// Destroys what has arrived of a guest that stays where it was.
pub(super) fn discard(here: &impl Here, entry: &Entry) -> Result<()> {
    if let Some(domid) = here.find_incoming()? {
        here.destroy(domid)?;
    }
    remove_memory(entry)
}

/// Lets the guest run that was committed to this site, and ends the journal. False where there is
/// no such guest any more.
pub(super) fn finish(here: &impl Here, journal: &mut Journal) -> Result<bool> {
    // Whoever wrote this first may have failed to get it onto the disk.
    journal.reach(Phase::Owner)?;
    match here.find()? {
        Some(domid) => {
            here.take_over(domid)?;
            journal.reach(Phase::Running)?;
        }
        None => log::error!(
            "{} was committed to this host and is gone",
            journal.entry().begin.name
        ),
    }
    clear_up(here, journal)
}

/// The guest runs here: gives it its name and a keeper, and ends the journal. False where there is
/// no such guest any more.
pub(super) fn clear_up(here: &impl Here, journal: &mut Journal) -> Result<bool> {
    let domid = here.find()?;
    if let Some(domid) = domid {
        here.name_arrived(domid);
        here.keep()?;
    }
    remove_memory(journal.entry())?;
    journal.end(Outcome::Moved)?;
    Ok(domid.is_some())
}

pub(super) fn remove_memory(entry: &Entry) -> Result<()> {
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
