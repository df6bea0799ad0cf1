//! `vmshadow resolve`

use std::time::Duration;

use anyhow::anyhow;
use migrate::directories::Directories;
use migrate::error::Error;
use migrate::handover::journal::{self, Entry};
use migrate::handover::recovery::{Action, Settled, action, settle, settle_by_decree};

use crate::cli::{self, Decree};
use crate::edge;

/// How long a worker of the same guest is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Settles every open move of the guest.
pub fn run(options: &cli::Resolve, directories: &Directories) -> anyhow::Result<()> {
    directories.create()?;
    let open: Vec<_> = journal::list(directories)?
        .into_iter()
        .filter(|entry| {
            options
                .domain
                .as_ref()
                .is_none_or(|name| entry.begin.name == *name)
        })
        .filter(|entry| action(entry) != Action::Nothing)
        .collect();
    if open.is_empty() {
        // Here no guest can be, nor a move of it: the operator may be at another host.
        crate::require_xen()?;
        if options.json {
            say!("[]");
        } else {
            say!(
                "No move of {} is open here",
                options.domain.as_deref().unwrap_or("any guest")
            );
        }
        return Ok(());
    }
    let (done, mut failed) = settle_each(open, |entry| match options.decree {
        Some(Decree::Here) => settle_by_decree(directories, entry, true),
        Some(Decree::There) => settle_by_decree(directories, entry, false),
        None => settle(directories, entry, PATIENCE),
    });
    for settled in &done {
        edge::follow(directories, settled);
    }
    if options.json {
        say!("{}", serde_json::to_string_pretty(&done)?);
    } else {
        for settled in done {
            say!(
                "{}: {} (it is {})",
                settled.name,
                settled.what,
                settled.place
            );
        }
    }
    // The last of them is for the caller to tell.
    let last = failed.pop();
    for error in failed {
        tell!("vmshadow: {error:#}");
    }
    last.map_or(Ok(()), Err)
}

/// Settles all; one that can't be settled does not hold up the others.
fn settle_each(
    open: Vec<Entry>,
    mut settle: impl FnMut(&Entry) -> Result<Settled, Error>,
) -> (Vec<Settled>, Vec<anyhow::Error>) {
    let mut done = Vec::new();
    let mut failed = Vec::new();
    for entry in open {
        match settle(&entry) {
            Ok(settled) => done.push(settled),
            Err(error) => failed.push(explain(error, &entry)),
        }
    }
    (done, failed)
}

/// Adds where the guest is, and what to do.
fn explain(error: Error, entry: &Entry) -> anyhow::Error {
    let (name, peer) = (&entry.begin.name, &entry.begin.peer);
    match error {
        Error::InDoubt { .. } => anyhow!(
            "{peer} has no record of the move of {name}, which began there before it could be \
             committed. Look whether {name} runs at {peer}, then run: \
             vmshadow resolve --decree here|there {name}"
        ),
        // The domain of that time is gone.
        Error::LinkLost { .. } if journal::boot_id().is_ok_and(|id| id != entry.begin.boot_id) => {
            anyhow!(error).context(format!(
                "{name} ended here with the reboot and may run at {peer}: don't start it here yet; \
                 try again when {peer} can be reached"
            ))
        }
        Error::LinkLost { .. } => anyhow!(error).context(format!(
            "{name} stays suspended here, since it may run at {peer}; try again when {peer} can be \
             reached"
        )),
        error => anyhow!(error).context(format!("The move of {name} stays open")),
    }
}
