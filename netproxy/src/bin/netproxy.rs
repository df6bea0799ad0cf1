//! Runs the proxy of a configuration file until SIGTERM or SIGINT. SIGHUP reads the file again;
//! SIGUSR2 lets a new program take over, connections and all. Or leads standard input and output
//! to the control socket of one that runs, for callers on other hosts.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use netproxy::config::Config;
use netproxy::{Proxy, Result};
use nix::sys::resource::{Resource, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR2};
use signal_hook::iterator::Signals;

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    // What waits here for slow sides is others' traffic.
    if let Err(error) = setrlimit(Resource::RLIMIT_CORE, 0, 0) {
        log::warn!("A core file would hold traffic, and can't be forbidden: {error}");
    }
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let file = match arguments.as_slice() {
        [file] if !file.to_string_lossy().starts_with('-') => file,
        [word, socket] if word.as_os_str() == "attach" => {
            return outcome(netproxy::control::attach(socket));
        }
        _ => {
            eprintln!("Usage: netproxy CONFIGURATION.toml\n       netproxy attach CONTROL-SOCKET");
            return ExitCode::from(2);
        }
    };
    let signals = match Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR2]) {
        Ok(signals) => signals,
        Err(error) => {
            eprintln!("netproxy: Cannot take signals: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ends = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        if let Err(error) = signal_hook::flag::register(signal, Arc::clone(&ends)) {
            eprintln!("netproxy: Cannot take signals: {error}");
            return ExitCode::FAILURE;
        }
    }
    outcome(run(file, signals, ends))
}

fn outcome(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("netproxy: {}", error.chain());
            ExitCode::FAILURE
        }
    }
}

fn run(file: &Path, mut signals: Signals, ends: Arc<AtomicBool>) -> Result<()> {
    let Some(proxy) = Proxy::start_program(file, ends)? else {
        // It was only asked whether it can take over.
        return Ok(());
    };
    announce(&proxy)?;
    for signal in signals.forever() {
        match signal {
            SIGHUP => {
                if let Err(error) = Config::load(file).and_then(|config| proxy.reload(config)) {
                    log::error!("The configuration stays as it was: {}", error.chain());
                }
            }
            SIGUSR2 => log::error!("No upgrade: {}", proxy.upgrade().chain()),
            _ => break,
        }
    }
    Ok(())
}

/// Says where clients may connect. Whether anybody reads that does not matter.
fn announce(proxy: &Proxy) -> Result<()> {
    let mut out = std::io::stdout();
    for guest in proxy.list()?.guests {
        for address in guest.listeners {
            let _ = writeln!(out, "{}: {address}", guest.name);
        }
    }
    let _ = writeln!(out, "ready");
    Ok(())
}
