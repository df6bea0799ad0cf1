//! Two real Xen sites in QEMU, for the end-to-end tests.
//!
//! ```text
//!   this machine
//!   ├─ QEMU (software emulation) ── Xen ── dom0, site a, 10.77.0.11 ─┐
//!   │    eth0 <── ssh by a port on loopback        guests' bridge ── eth1
//!   │                                                                │ the WAN: a socket in
//!   │                                                                │ the run directory,
//!   │                                                                │ shaped by netem
//!   ├─ QEMU (software emulation) ── Xen ── dom0, site b, 10.77.0.12 ─┘
//!   └─ supervisor: a shell that starts both QEMUs, and ends them and the run
//!      directory when whoever started it ends
//! ```
//!
//! The hypervisors, dom0s and toolstacks are Debian's own. No privileges and no
//! virtualisation of this machine are used, but building the disk images takes
//! root (see [`image`]). They are built once and cached; a run writes to overlays
//! in its run directory, which goes when it ends.
//!
//! ```no_run
//! use testbed::{Guest, Hypervisor, Options, SiteName, Testbed};
//!
//! # fn main() -> testbed::Result<()> {
//! let testbed = Testbed::up(&Options { hypervisor: Hypervisor::Release, ..Options::default() })?;
//! let guest = Guest { run: vec!["rewrite 8".into()], ..Guest::new("g1", 101) };
//! testbed.start_guest(SiteName::A, &guest)?;
//! let watch = testbed.watch(SiteName::A, &guest)?;
//! testbed.site(SiteName::A).run("xl migrate g1 10.77.0.12")?;
//! watch.finish()?.intact().expect("the guest noticed nothing");
//! # Ok(())
//! # }
//! ```

pub mod edge;
pub mod guest;
pub mod image;
pub mod initramfs;
pub mod link;
mod pause;
mod process;
mod programs;
mod qemu;
mod run;
mod site;
mod sites;
mod tools;
mod watch;

pub use edge::{Edge, SERVER};
pub use guest::{Guest, Kind};
pub use image::Hypervisor;
pub use link::Link;
pub use pause::Pause;
pub use run::{RunDirectory, sweep};
pub use site::{Site, SiteName, proxy_package};
pub use sites::{Options, Testbed};
pub use testbed_guest as protocol;
pub use watch::Watching;

use std::path::PathBuf;

/// Why the testbed could not do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory of this machine.
    #[error("{}", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// A program could not be started.
    #[error("Can't start {program}")]
    Start {
        /// Its name.
        program: String,
        /// What went wrong.
        source: std::io::Error,
    },
    /// A command ended with a failure.
    #[error("{command}: {status}\n{output}")]
    Command {
        /// The command, as given.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it printed, most often the reason.
        output: String,
    },
    /// Something did not happen in time.
    #[error("Timed out: {what}\n{log}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// The end of the log that may tell why.
        log: String,
    },
    /// A QEMU ended by itself.
    #[error("QEMU of site {site} ended\n{log}")]
    Ended {
        /// Which one.
        site: SiteName,
        /// What it printed.
        log: String,
    },
    /// No testbed of this name is up.
    #[error("No testbed {0} is up")]
    NotUp(String),
    /// A testbed of this name is up already.
    #[error("Testbed {0} is up already")]
    Up(String),
    /// This machine lacks something.
    #[error("{0}")]
    Unfit(String),
    /// An answer of QEMU, of the guest, or of a site that makes no sense.
    #[error("Odd answer from {from}: {answer}")]
    Answer {
        /// Who gave it.
        from: String,
        /// The answer.
        answer: String,
    },
}

/// The result of what the testbed does.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// For `map_err` on anything about a file.
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}
