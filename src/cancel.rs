//! `vmshadow cancel`

use anyhow::bail;
use migrate::control::{self, Outcome};
use migrate::directories::Directories;

use crate::cli;

/// Gives the guest's move up, waits until it has ended, and says what came of it.
pub fn run(options: &cli::Cancel, directories: &Directories) -> anyhow::Result<()> {
    // Both ends of one may be here: the first to give up tells the other.
    let mut at = control::find(directories, &options.domain)?.swap_remove(0);
    let ended = at.client.cancel()?;
    if options.json {
        say!("{}", serde_json::to_string_pretty(&ended)?);
    }
    match ended.outcome {
        Outcome::Cancelled if options.json => Ok(()),
        Outcome::Cancelled => {
            say!("{}", ended.what);
            Ok(())
        }
        // It ended before it could be given up.
        Outcome::Moved | Outcome::Kept | Outcome::Failed => bail!("{}", ended.what),
    }
}
