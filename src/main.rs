//! The command `vmshadow`: subcommands in the manner of xl. No logic of its own.

/// Prints a line.
macro_rules! say {
    ($($text:tt)*) => { $crate::output::say(format_args!($($text)*)) };
}

/// Prints a line to standard error.
macro_rules! tell {
    ($($text:tt)*) => { $crate::output::tell(format_args!($($text)*)) };
}

mod cancel;
mod check;
mod cli;
mod dry_run;
mod edge;
mod list;
mod migrate;
mod output;
mod policy;
mod progress;
mod proxy;
mod receive;
mod report_file;
mod resolve;
mod set;
mod shadow;
mod shadows;
mod status;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use ::migrate::directories::Directories;
use ::migrate::handover::guardian;
use ::migrate::keeper;
use clap::Parser;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    // What guardians and keepers do is read later, in their log files.
    let level = match cli.command {
        Command::Guard(_) | Command::Keeper(_) => "info",
        _ => "warn",
    };
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("VMSHADOW_LOG", level))
        .format_timestamp_millis()
        .init();
    let directories = Directories::default();
    let result = match &cli.command {
        Command::Check(options) => return check::run(options),
        Command::List(options) => list::run(options),
        Command::Migrate(options) => migrate::run(options, &directories),
        Command::Status(options) => status::run(options, &directories),
        Command::Cancel(options) => cancel::run(options, &directories),
        Command::Set(options) => set::run(options, &directories),
        Command::Shadow(options) => shadow::run(options, &directories),
        Command::Shadows(options) => shadows::run(options, &directories),
        Command::Resolve(options) => resolve::run(options, &directories),
        Command::Proxy(options) => proxy::run(options, &directories),
        Command::Receive(options) => receive::run(options, &directories),
        Command::Guard(options) => guard(&directories, &options.journal),
        Command::Keeper(options) => keeper::run(&directories, &options.uuid).map_err(Into::into),
    };
    match result {
        // The status of a move tells of the move alone.
        Ok(()) if output::incomplete() && !matches!(cli.command, Command::Migrate(_)) => {
            ExitCode::from(1)
        }
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell!("vmshadow: {error:#}");
            ExitCode::from(1)
        }
    }
}

/// A guardian: what it settles, the edge has to know.
fn guard(directories: &Directories, journal: &Path) -> anyhow::Result<()> {
    if let Some(settled) = guardian::run(directories, journal)? {
        edge::follow(directories, &settled);
    }
    Ok(())
}

/// Fails, in words that say what to install or to do, where this machine can't control Xen guests.
fn require_xen() -> anyhow::Result<()> {
    match xen_sys::host::probe().missing {
        None => Ok(()),
        Some(missing) => Err(missing.into()),
    }
}

/// Set by Ctrl-C, by a polite kill and by a terminal that closes: the move is given up in good
/// order.
fn cancelled() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
    ] {
        signal_hook::flag::register(signal, Arc::clone(&flag))?;
    }
    Ok(flag)
}
