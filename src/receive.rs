//! `vmshadow receive`: the other end, started by ssh.

use std::io::Write;

use migrate::directories::Directories;
use migrate::handover::recovery;
use migrate::incoming;

use crate::cli;
use crate::policy;

/// Receives a guest, or says what became of a move.
pub fn run(options: &cli::Receive, directories: &Directories) -> anyhow::Result<()> {
    if let Some(move_id) = &options.ask {
        let answer = recovery::answer(directories, move_id)?;
        // An answer that did not arrive must not look like one.
        writeln!(std::io::stdout(), "{}", serde_json::to_string(&answer)?)?;
        return Ok(());
    }
    incoming::receive(directories, &policy::read()?, crate::cancelled()?).map_err(Into::into)
}
