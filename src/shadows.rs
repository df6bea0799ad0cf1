//! `vmshadow shadows`

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::bail;
use indicatif::{HumanBytes, HumanDuration};
use migrate::directories::Directories;
use migrate::handover::lock::GuestLock;
use migrate::shadow::{Listed, Shadows};

use crate::cli;
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
        for one in &listed {
            let _lock = GuestLock::wait(directories, &one.uuid, &one.name, PATIENCE)?;
            shadows.drop_shadow(&one.uuid)?;
        }
        return Ok(());
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
