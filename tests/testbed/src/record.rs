//! `testbed record`: real guests' memory over time, for benchmarks that replay it.

use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;
use testbed::{Guest, Hypervisor, Options, SiteName, Testbed, image};

/// What the guests have, in MiB.
const MEMORY: u32 = 256;

/// How long a guest does what it does before it is recorded.
const WARM: Duration = Duration::from_secs(20);

/// Records a guest in each of `states` for `seconds`, into the cache.
pub fn record(seconds: u32, states: &[String]) -> Result<()> {
    let program: PathBuf = std::env::var_os("VMSHADOW_RECORDER")
        .context("VMSHADOW_RECORDER names no program: run this by make")?
        .into();
    let directory = image::recordings()?;
    fs::create_dir_all(&directory)
        .with_context(|| format!("Can't make {}", directory.display()))?;
    // With shadow paging: what is dirty is logged.
    let testbed = Testbed::up(&Options {
        hypervisor: Hypervisor::Release,
        ..Options::default()
    })?;
    let site = testbed.site(SiteName::A);
    site.put(&program, "/tmp/record", 0o755)?;
    for state in states {
        let run = match state.as_str() {
            "idle" => Vec::new(),
            "edit" | "build" | "browse" => vec![state.clone()],
            other => anyhow::bail!("Guests don't {other}: idle, edit, build, browse"),
        };
        let guest = Guest {
            memory_mib: MEMORY,
            run,
            ..Guest::new("recorded", 101)
        };
        testbed.start_guest(SiteName::A, &guest)?;
        thread::sleep(WARM);
        let draft = directory.join(format!("{state}.{}", std::process::id()));
        let to =
            File::create(&draft).with_context(|| format!("Can't write {}", draft.display()))?;
        let status = site
            .command(&format!("/tmp/record recorded {seconds} {state}"))
            .stdout(to)
            .status()
            .context("Can't start ssh")?;
        ensure!(status.success(), "The recorder ended: {status}");
        let errors = testbed.status(SiteName::A, &guest)?.errors;
        ensure!(errors.none(), "The guest noticed something: {errors:?}");
        testbed.stop_guest("recorded")?;
        let path = directory.join(format!("{state}.recording"));
        fs::rename(&draft, &path).with_context(|| format!("Can't write {}", path.display()))?;
        eprintln!("{}", path.display());
    }
    testbed.down()?;
    Ok(())
}
