//! `vmshadow shadows`

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{anyhow, bail};
use indicatif::{HumanBytes, HumanDuration};
use migrate::directories::Directories;
use migrate::handover::lock::GuestLock;
use migrate::shadow::{Listed, Shadows};

use crate::cli;
use crate::output::tell_all_but_last;
use crate::policy;

/// How long a worker of the same guest is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Lists what is held of guests that run elsewhere, or drops it.
pub fn run(options: &cli::Shadows, directories: &Directories) -> anyhow::Result<()> {
    directories.create()?;
    let shadows = Shadows::new(directories, policy::read()?.shadows);
    let mut listed = shadows.list()?;
    if options.drop_all || options.drop.is_some() {
        if let Some(guest) = &options.drop {
            listed.retain(|one| one.name == *guest || one.uuid.eq_ignore_ascii_case(guest));
            if listed.is_empty() {
                bail!("Nothing is held of {guest} here");
            }
        }
        if options.drop_all {
            shadows.drop_useless()?;
        }
        let mut guests: Vec<_> = listed.into_iter().map(|one| (one.uuid, one.name)).collect();
        if options.drop_all {
            // Of those that are not listed only drafts are there, and nothing tells their names.
            let mut drafts = shadows.drafts()?;
            drafts.retain(|draft| guests.iter().all(|(uuid, _)| uuid != draft));
            guests.extend(drafts.into_iter().map(|uuid| (uuid.clone(), uuid)));
        }
        return drop_each(&guests, |uuid, name| {
            let _lock = GuestLock::wait(directories, uuid, name, PATIENCE)?;
            shadows.drop_shadow(uuid)
        });
    }
    if options.json {
        say!("{}", serde_json::to_string_pretty(&listed)?);
    } else if listed.is_empty() {
        say!("Nothing is held of guests that run elsewhere");
    } else {
        say!(
            "{:20} {:>10} {:>10} {:20} AGE",
            "NAME",
            "MEMORY",
            "ON DISK",
            "WITH"
        );
        for one in &listed {
            say!("{}", line(one));
        }
    }
    Ok(())
}

/// Drops what is held of all guests, by UUID and name; one that is in use does not hold up the others.
fn drop_each(
    guests: &[(String, String)],
    drop: impl Fn(&str, &str) -> migrate::error::Result<()>,
) -> anyhow::Result<()> {
    tell_all_but_last(guests.iter().filter_map(|(uuid, name)| {
        let error = drop(uuid, name).err()?;
        Some(anyhow!(error).context(format!("The shadow of {name} is still here")))
    }))
}

fn line(one: &Listed) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let memory = match one.memory {
        true => HumanBytes(one.guest_bytes).to_string(),
        // Only what is known of its pages.
        false => "-".to_owned(),
    };
    format!(
        "{:20} {memory:>10} {:>10} {:20} {}",
        one.name,
        HumanBytes(one.bytes).to_string(),
        one.peer,
        HumanDuration(Duration::from_secs(now.saturating_sub(one.kept_at))),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use migrate::Error;
    use std::cell::RefCell;

    #[test]
    fn one_shadow_in_use_does_not_keep_the_others() {
        let guests = ["g1", "g2", "g3"].map(|name| (format!("uuid of {name}"), name.to_owned()));
        let dropped = RefCell::<Vec<String>>::default();
        let error = drop_each(&guests, |_, name| {
            if name == "g2" {
                return Err(Error::Busy("Another vmshadow is at work on g2".into()));
            }
            dropped.borrow_mut().push(name.to_owned());
            Ok(())
        });
        assert_eq!(*dropped.borrow(), ["g1", "g3"]);
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.starts_with("The shadow of g2 is still"), "{error}");
        assert!(drop_each(&guests, |_, _| Ok(())).is_ok());
    }
}
