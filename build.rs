//! Makes the command's man pages and shell completions, from the command line's own definition.
//!
//! They go to `OUT_DIR/man` and `OUT_DIR/completions`. The packaging takes them from there: cargo
//! tells it where that is.

use std::path::Path;
use std::{env, fs, io};

use clap::CommandFactory;

#[allow(dead_code, missing_docs)]
#[path = "src/cli.rs"]
mod cli;

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=src/cli.rs");
    println!("cargo:rerun-if-changed=build.rs");
    let Some(out) = env::var_os("OUT_DIR") else {
        return Ok(());
    };
    let out = Path::new(&out);
    let (man, completions) = (out.join("man"), out.join("completions"));
    // What an earlier run has made stays there: no page of a command that is no more.
    for directory in [&man, &completions] {
        if directory.exists() {
            fs::remove_dir_all(directory)?;
        }
        fs::create_dir_all(directory)?;
    }
    let mut command = cli::Cli::command();
    clap_mangen::generate_to(command.clone(), &man)?;
    for shell in [
        clap_complete::Shell::Bash,
        clap_complete::Shell::Zsh,
        clap_complete::Shell::Fish,
    ] {
        clap_complete::generate_to(shell, &mut command, "vmshadow", &completions)?;
    }
    Ok(())
}
