//! `vmshadow resolve`

use std::time::Duration;

use anyhow::{anyhow, bail};
use migrate::directories::Directories;
use migrate::error::Error;
use migrate::guest::xen::host::Host;
use migrate::handover::journal::{self, Entry, Journals};
use migrate::handover::recovery::{Action, LateSuspend, Settled, action, settle, settle_by_decree};
use migrate::outgoing::find_domain;

use crate::cli::{self, Decree};
use crate::edge;
use crate::output::tell_all_but_last;

/// How long a worker of the same guest is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Settles every open move of the guest.
pub fn run(options: &cli::Resolve, directories: &Directories) -> anyhow::Result<()> {
    directories.create()?;
    let Journals {
        entries: mut open,
        unreadable,
    } = journal::list(directories)?;
    let mut known = true;
    if let Some(domain) = &options.domain {
        let here = uuid_here(domain);
        let uuid = here.as_ref().map_or(None, Option::as_deref);
        open.retain(|entry| is_of(entry, domain, uuid));
        known = !open.is_empty() || here?.is_some();
    }
    open.retain(|entry| action(entry) != Action::Nothing);
    if open.is_empty() && unreadable.is_empty() {
        // Here no guest can be, nor a move of it: the operator may be at another host.
        crate::require_xen()?;
        if let (Some(domain), false) = (&options.domain, known) {
            bail!(
                "There is no guest {domain} here, and no move of one is open. Where it has left, \
                 its move is settled"
            );
        }
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
        None => settle(directories, entry, PATIENCE, LateSuspend::WillNotCome),
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
    // Whose they are nobody knows: perhaps of a move of this guest.
    failed.extend(unreadable.into_iter().map(|error| {
        anyhow!(error).context("A move may be open here whose journal can't be read")
    }));
    tell_all_but_last(failed)
}

/// The UUID of the guest that is called `domain` here, if there is one.
fn uuid_here(domain: &str) -> anyhow::Result<Option<String>> {
    // Without Xen only journals tell.
    if crate::require_xen().is_err() {
        return Ok(None);
    }
    let host = Host::open()?;
    match find_domain(&host, domain) {
        Ok(domid) => Ok(Some(host.uuid_text(&host.info(domid)?))),
        Err(Error::Refused(_)) => Ok(None),
        // That it can't be told is no reason to say that there is none.
        Err(error) => Err(error.into()),
    }
}

/// Whether a journal is of the guest that is called `domain`: by its name, its UUID or its domain id.
/// `here` is the UUID of the guest that is called so now.
fn is_of(entry: &Entry, domain: &str, here: Option<&str>) -> bool {
    let begin = &entry.begin;
    let has_uuid = |uuid: &str| begin.uuid.eq_ignore_ascii_case(uuid);
    // Ids of before a reboot say nothing, nor does that of another domain.
    let has_id = || {
        here.is_none()
            && domain.parse().is_ok_and(|id| begin.domid == Some(id))
            && journal::boot_id().is_ok_and(|id| id == begin.boot_id)
    };
    begin.name == domain || has_uuid(domain) || here.is_some_and(has_uuid) || has_id()
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
    let rebooted = journal::boot_id().is_ok_and(|id| id != entry.begin.boot_id);
    let (name, peer) = (&entry.begin.name, &entry.begin.peer);
    let place = match (&error, action(entry), rebooted) {
        (Error::InDoubt { .. }, ..) => {
            return anyhow!(
                "{peer} has no record of the move of {name}, which began there before it could be \
                 committed. Look whether {name} runs at {peer}, then run: \
                 vmshadow resolve --decree here|there {name}"
            );
        }
        // They say themselves who has it, or somebody else is just about to settle it; or the other
        // site has answered, and what it said could not be carried out here.
        (Error::Refused(_) | Error::Busy(_), ..)
        | (Error::Xen { .. }, Action::AskDestination, false)
        | (_, Action::Nothing, _) => format!("The move of {name} stays open"),
        // The domain of that time is gone.
        (_, Action::AskDestination, true) => format!(
            "{name} ended here with the reboot and may run at {peer}: don't start it here yet; try \
             again when {peer} can be reached"
        ),
        (_, Action::AskDestination, false) => format!(
            "{name} stays suspended here, since it may run at {peer}; try again when {peer} can be \
             reached"
        ),
        (_, Action::Discard, _) => format!("{name} is at {peer}, and its move stays open here"),
        (_, _, true) => format!("{name} ended here with the reboot, and its move stays open"),
        (_, Action::Resume, false) => {
            format!("{name} is here and may be suspended, and its move stays open")
        }
        (_, Action::GoOn | Action::Finish | Action::ClearUp, false) => {
            format!("{name} is here, and its move stays open")
        }
    };
    anyhow!(error).context(place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate::handover::journal::{Begin, Phase, Role};

    const UUID: &str = "6C1C2B54-62a4-4f3b-9d5a-0d8e7d1b6b0f";

    fn entry(role: Role, phase: Phase) -> Entry {
        Entry {
            path: "/nowhere".into(),
            begin: Begin {
                domid: Some(5),
                ..Begin::new(role, "m", "g1", UUID, "b").unwrap()
            },
            phase,
            cap: None,
            outcome: None,
        }
    }

    #[test]
    fn whatever_fails_is_told_with_where_the_guest_is() {
        let unstarted = || Error::Io {
            doing: "Can't start ssh".into(),
            source: std::io::ErrorKind::NotFound.into(),
        };
        let told = |error, entry| format!("{:#}", explain(error, &entry));
        let committed = entry(Role::Source, Phase::Committed);
        let text = told(unstarted(), committed.clone());
        assert!(text.starts_with("g1 stays suspended here"), "{text}");
        // That says itself where it is.
        let twice = Error::Refused("g1 runs there, and here too".into());
        let text = told(twice, committed.clone());
        assert!(!text.contains("suspended"), "{text}");
        let mut before = committed;
        before.begin.boot_id = "another".into();
        let text = told(unstarted(), before);
        assert!(
            text.contains("ended here with the reboot and may"),
            "{text}"
        );
        let text = told(unstarted(), entry(Role::Source, Phase::Tracking));
        assert!(text.starts_with("g1 is here, and"), "{text}");
        let text = told(unstarted(), entry(Role::Destination, Phase::Begun));
        assert!(text.starts_with("g1 is at b"), "{text}");
    }

    #[test]
    fn a_guest_is_called_by_its_name_its_uuid_or_its_id() {
        let entry = entry(Role::Source, Phase::Committed);
        let uuid = "6c1c2b54-62a4-4f3b-9d5a-0d8e7d1b6b0f";
        for name in ["g1", uuid, "5"] {
            assert!(is_of(&entry, name, None), "{name}");
        }
        for name in ["g2", "6", ""] {
            assert!(!is_of(&entry, name, None), "{name}");
        }
        // By what it is called now.
        assert!(is_of(&entry, "renamed", Some(uuid)));
        // The number is another domain's by now.
        assert!(!is_of(&entry, "5", Some("another")));
        let mut before = entry;
        before.begin.boot_id = "another".into();
        assert!(!is_of(&before, "5", None));
    }
}
