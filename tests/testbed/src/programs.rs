//! The programs that run in guests and sites, built without shared libraries.

use crate::{Error, Result, process};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The target to build for. To name it keeps these objects apart from those of
/// other builds, which have other flags.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    /// Process 1 of a guest.
    pub guest: PathBuf,
    /// What watches a guest from a site.
    pub client: PathBuf,
    /// The kernel of an empty guest.
    pub empty: PathBuf,
}

/// How programs without shared libraries are made.
const STATIC: [&str; 2] = ["-Ctarget-feature=+crt-static", "-Cstrip=symbols"];

/// How a kernel is made: at addresses of its own, of nothing but what is in it.
const KERNEL: [&str; 6] = [
    "-Crelocation-model=static",
    "-Crelro-level=off",
    "-Clink-arg=-nostdlib",
    "-Clink-arg=-static",
    "-Clink-arg=-no-pie",
    "-Clink-arg=-Wl,--build-id=none",
];

/// Builds the programs, or finds them built.
pub fn build() -> Result<Programs> {
    log::debug!("Building the guest's programs");
    let guest = build_package("testbed-guest", "guest", &STATIC.map(str::to_owned), &[])?;
    let script = workspace().join("tests/testbed/empty-guest/guest.ld");
    let flags: Vec<String> = STATIC
        .into_iter()
        .chain(KERNEL)
        .map(str::to_owned)
        .chain([format!("-Clink-arg=-Wl,-T,{}", script.display())])
        .collect();
    let settings = [
        "profile.release.panic=\"abort\"",
        "profile.release.lto=true",
    ];
    let empty = build_package("testbed-empty-guest", "empty-guest", &flags, &settings)?;
    let programs = Programs {
        guest: guest.join("testbed-guest"),
        client: guest.join("testbed-client"),
        empty: empty.join("testbed-empty-guest"),
    };
    for path in [&programs.guest, &programs.client, &programs.empty] {
        if !path.exists() {
            return Err(Error::Unfit(format!(
                "cargo has not built {}",
                path.display()
            )));
        }
    }
    Ok(programs)
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Builds a package into a target directory of its own, with these flags for rustc and settings
/// for cargo. Where its programs are.
fn build_package(
    package: &str,
    directory: &str,
    flags: &[String],
    settings: &[&str],
) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), PathBuf::from)
        .join(directory);
    let mut build = Command::new(cargo);
    build
        .current_dir(workspace())
        .args(["build", "--quiet", "--release", "--package", package])
        .args(["--target", TARGET, "--target-dir"])
        .arg(&target)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .stdin(Stdio::null());
    for setting in settings {
        build.args(["--config", setting]);
    }
    process::run(&mut build)?;
    Ok(target.join(TARGET).join("release"))
}
