//! `vmshadow resolve`

use std::time::Duration;

use anyhow::{anyhow, bail};
use migrate::directories::Directories;
use migrate::error::Error;
use migrate::handover::journal;
use migrate::handover::recovery::{Action, Settled, action, settle, settle_by_decree};

use crate::cli::{self, Decree};

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
        if options.json {
            println!("[]");
        } else {
            println!(
                "No move of {} is open here",
                options.domain.as_deref().unwrap_or("any guest")
            );
        }
        return Ok(());
    }
    let mut done: Vec<Settled> = Vec::new();
    for entry in open {
        let name = entry.begin.name.clone();
        let settled = match options.decree {
            Some(Decree::Here) => settle_by_decree(directories, &entry, true),
            Some(Decree::There) => settle_by_decree(directories, &entry, false),
            None => settle(directories, &entry, PATIENCE),
        };
        match settled {
            Ok(settled) => done.push(settled),
            Err(Error::InDoubt { peer }) => bail!(
                "{peer} has no record of this move, which began there before it could be committed. \
                 Look whether {0} runs at {peer}, then run: vmshadow resolve --decree here|there {0}",
                name
            ),
            Err(error @ Error::LinkLost { .. }) => {
                return Err(anyhow!(error).context(format!(
                    "{} stays suspended here, since it may run at {}; try again when that host can be \
                     reached",
                    name, entry.begin.peer
                )));
            }
            Err(error) => return Err(error.into()),
        }
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&done)?);
    } else {
        for settled in done {
            println!(
                "{}: {} (it is {})",
                settled.name, settled.what, settled.place
            );
        }
    }
    Ok(())
}
