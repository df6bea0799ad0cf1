//! `vmshadow receive`: the other end, started by ssh.

use std::io::Write;

use migrate::connections::Expected;
use migrate::directories::Directories;
use migrate::error::Error;
use migrate::handover::recovery;
use migrate::incoming::{self, Policies};

use crate::cli;
use crate::edge::Paths;
use crate::policy;

/// Receives a guest, or says what became of a move.
pub fn run(options: &cli::Receive, directories: &Directories) -> anyhow::Result<()> {
    if let Some(move_id) = &options.ask {
        let answer = recovery::answer(directories, move_id)?;
        // An answer that did not arrive must not look like one.
        writeln!(std::io::stdout(), "{}", serde_json::to_string(&answer)?)?;
        return Ok(());
    }
    let policy = policy::read()?;
    let paths = Paths::new(directories);
    let mut expect = |guest: Expected<'_>| match &policy.edge {
        None => Ok(None),
        Some(edge) => paths
            .open(edge, guest.name, guest.uuid, guest.configuration, true)
            .map(|_| Some(edge.site.clone()))
            .map_err(|error| Error::Refused(format!("{error:#}"))),
    };
    let cancel = crate::cancelled()?;
    let policies = Policies {
        site: policy.site.clone(),
        shadows: policy.shadows.clone(),
    };
    let received = incoming::receive(directories, &policies, &mut expect, cancel);
    if received.is_err() {
        // The guest did not come.
        paths.tidy(directories);
    }
    received.map_err(Into::into)
}
