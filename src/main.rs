//! The command `vmshadow`: subcommands in the manner of xl. No logic of its own.

/// Prints a line.
macro_rules! say {
    ($($text:tt)*) => { $crate::output::say(format_args!($($text)*)) };
}

/// Prints a line to standard error.
macro_rules! tell {
    ($($text:tt)*) => { $crate::output::tell(format_args!($($text)*)) };
}

mod beside;
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
mod unit;

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
    if let Err(error) = leave_no_core() {
        tell!("vmshadow: Can't forbid core files: {error}");
        return ExitCode::from(1);
    }
    // Before any thread is started.
    if matches!(cli.command, Command::Migrate(_) | Command::Shadow(_))
        && let Err(error) = never_stop()
    {
        tell!("vmshadow: Can't leave signals alone: {error}");
        return ExitCode::from(1);
    }
    // What guardians and keepers do is read later, in their log files.
    let level = match cli.command {
        Command::Guard(_) | Command::Keeper(_) => "info",
        _ => "warn",
    };
    output::begin_log();
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("VMSHADOW_LOG", level))
        .target(env_logger::Target::Pipe(Box::new(output::Log)))
        .format_timestamp_millis()
        .init();
    let status = run(&cli);
    output::finish_log();
    status
}

fn run(cli: &Cli) -> ExitCode {
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
            output::finish_log();
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

/// What is in memory here is guests' memory, and secrets: no core file may hold it. Programs that are
/// started from here inherit the limit alone.
fn leave_no_core() -> nix::Result<()> {
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)?;
    // The limit does not hold where a program takes cores.
    nix::sys::prctl::set_dumpable(false)
}

/// Ctrl-Z stops nothing, nor does a terminal that lets no process in the background write: a worker
/// that is stopped could hold a guest suspended, for as long as nobody lets it go on.
fn never_stop() -> nix::Result<()> {
    use nix::sys::signal::{SigSet, Signal};
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU] {
        signals.add(signal);
    }
    signals.thread_block()
}

/// Set by Ctrl-C, by a polite kill and by a terminal that closes: the move is given up in good
/// order. Not by what was ignored when it was started, as `nohup` does it.
fn cancelled() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let status = std::fs::read_to_string("/proc/self/status")?;
    for signal in [
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
    ] {
        if signal == signal_hook::consts::SIGTERM || !ignored(&status, signal) {
            signal_hook::flag::register(signal, Arc::clone(&flag))?;
        }
    }
    Ok(flag)
}

/// Whether a signal is ignored, by a process's `status` in /proc.
fn ignored(status: &str, signal: i32) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & (1 << (signal - 1)) != 0)
}

#[cfg(test)]
mod tests {
    use super::{ignored, never_stop};

    #[test]
    fn what_would_stop_a_worker_is_left_waiting() {
        use nix::sys::signal::{SigSet, Signal};
        std::thread::spawn(|| {
            never_stop().unwrap();
            let blocked = SigSet::thread_get_mask().unwrap();
            assert!(blocked.contains(Signal::SIGTSTP) && blocked.contains(Signal::SIGTTOU));
            assert!(!blocked.contains(Signal::SIGINT));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_nohup_ignores_is_found() {
        let status = "Name:\tvmshadow\nSigBlk:\t0000000000000001\nSigIgn:\t0000000000000001\n";
        assert!(ignored(status, 1));
        assert!(!ignored(status, 2));
        assert!(!ignored("Name:\tvmshadow\n", 1));
    }
}
