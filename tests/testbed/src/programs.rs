//! The programs that run in guests and sites, built without shared libraries.

use crate::{Error, Result, process};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The target to build for. To name it keeps these objects apart from those of
/// other builds, which have other flags.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Where the programs are.
pub struct Programs {
    /// Process 1 of a guest.
    pub guest: PathBuf,
    /// What watches a guest from a site.
    pub client: PathBuf,
}

/// Builds the programs, or finds them built.
pub fn build() -> Result<Programs> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace.join("target"), PathBuf::from)
        .join("guest");
    log::debug!("Building the guest's programs");
    process::run(
        Command::new(cargo)
            .current_dir(&workspace)
            .args([
                "build",
                "--quiet",
                "--release",
                "--package",
                "testbed-guest",
            ])
            .args(["--target", TARGET, "--target-dir"])
            .arg(&target)
            .env(
                "RUSTFLAGS",
                "-C target-feature=+crt-static -C strip=symbols",
            )
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .stdin(Stdio::null()),
    )?;
    let built = target.join(TARGET).join("release");
    let programs = Programs {
        guest: built.join("testbed-guest"),
        client: built.join("testbed-client"),
    };
    for path in [&programs.guest, &programs.client] {
        if !path.exists() {
            return Err(Error::Unfit(format!(
                "cargo has not built {}",
                path.display()
            )));
        }
    }
    Ok(programs)
}
