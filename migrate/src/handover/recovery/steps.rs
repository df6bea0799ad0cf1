//! What is done to a guest, and to what its move left behind, in order to settle it.

use std::fs;

use super::{LateSuspend, asked, incoming_name};
use crate::directories::Directories;
use crate::error::{Error, Result};
use crate::guest::EndedSuspend;
use crate::guest::xen::host::Host;
use crate::handover::going_on::go_on;
use crate::handover::journal::{self, Entry, Journal, Outcome, Phase};
use crate::keeper;

/// Makes sure that the guest runs here. False where there is no such guest any more.
///
/// # Errors
/// [`Error::Busy`] where the guest may suspend yet, if that leaves the move open; what Xen refuses.
pub(super) fn resume(
    directories: &Directories,
    journal: &mut Journal,
    late: LateSuspend,
) -> Result<bool> {
    let entry = journal.entry().clone();
    let (name, uuid) = (&entry.begin.name, &entry.begin.uuid);
    let host = Host::open()?;
    // With its processor time, a suspend that is late ends soon. But nothing of this keeps a guest
    // from going on.
    let sped_up = speed_up(&host, &entry);
    let Some(domid) = host.find(uuid)? else {
        log::warn!("{name} is gone from this host");
        return Ok(false);
    };
    let ended = match host.end_suspend(domid, asked(entry.phase, late))? {
        EndedSuspend::MayCome if late == LateSuspend::WillNotCome => EndedSuspend::WillNot,
        ended => ended,
    };
    let goes_on = go_on(
        ended,
        || journal.reach(Phase::Resuming),
        || keeper::start(directories, name, uuid),
        || host.resume(domid),
    );
    goes_on
        .and(host.end_log_dirty(domid, true))
        .and(sped_up)
        .map(|()| true)
}

/// Gives a guest that was slowed down its processor time back.
pub(super) fn speed_up(host: &Host, entry: &Entry) -> Result<()> {
    match entry.cap {
        Some(cap) => host.restore_cpu_cap(&entry.begin.uuid, cap),
        None => Ok(()),
    }
}

/// Destroys the domain that the guest left behind here.
///
/// # Errors
/// [`Error::Refused`] where another tool has let it go on: what it did since is nowhere else.
pub(super) fn destroy_left(entry: &Entry) -> Result<()> {
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
pub(super) fn discard(entry: &Entry) -> Result<()> {
    let host = Host::open()?;
    if let Some(domid) = host.find_named(&entry.begin.uuid, &incoming_name(&entry.begin.name))? {
        host.destroy(domid)?;
    }
    remove_memory(entry)
}

/// Lets the guest run that was committed to this site, and ends the journal. False where there is
/// no such guest any more.
pub(super) fn finish(directories: &Directories, journal: &mut Journal) -> Result<bool> {
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
pub(super) fn clear_up(directories: &Directories, journal: &mut Journal) -> Result<bool> {
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
