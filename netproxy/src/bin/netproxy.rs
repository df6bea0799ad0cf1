//! Runs the proxy of a configuration file until SIGTERM or SIGINT; SIGHUP reads the file again.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use netproxy::config::Config;
use netproxy::{Proxy, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let mut arguments = std::env::args_os().skip(1);
    let (Some(file), None) = (arguments.next(), arguments.next()) else {
        eprintln!("Usage: netproxy CONFIGURATION.toml");
        return ExitCode::from(2);
    };
    let file = PathBuf::from(file);
    let signals = match Signals::new([SIGTERM, SIGINT, SIGHUP]) {
        Ok(signals) => signals,
        Err(error) => {
            eprintln!("netproxy: Cannot take signals: {error}");
            return ExitCode::FAILURE;
        }
    };
    match run(&file, signals) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("netproxy: {}", error.chain());
            ExitCode::FAILURE
        }
    }
}

fn run(file: &Path, mut signals: Signals) -> Result<()> {
    let proxy = Proxy::start(Config::load(file)?, Some(file.to_owned()))?;
    for guest in proxy.list()?.guests {
        for address in guest.listeners {
            println!("{}: {address}", guest.name);
        }
    }
    println!("ready");
    for signal in signals.forever() {
        if signal != SIGHUP {
            break;
        }
        if let Err(error) = Config::load(file).and_then(|config| proxy.reload(config)) {
            log::error!("The configuration stays as it was: {}", error.chain());
        }
    }
    Ok(())
}
