//! Domains as libxl sees them: what `xl` does, as functions.
//!
//! | module | subject |
//! |---|---|
//! | `context` | the handle itself, and ending an operation from another thread |
//! | `config` | a domain's configuration |
//! | `domains` | names, lists, the data kept beside a domain, memory |
//! | `lifecycle` | create, restore, suspend, resume, pause, destroy |
//! | `scheduling` | how much processor time a domain may use |
//! | `devices` | a domain's disks, network interfaces, PCI devices |
//! | `events` | waiting for a domain's end |
//!
//! Operations block until they are done, and some run for as long as a guest takes to answer (60
//! seconds for a suspend) or a stream lasts: those belong on a thread with a [`Toolstack`] of its
//! own. libxl forks helpers and runs hotplug scripts; it reaps its own children and no others, for
//! which it owns the signal SIGCHLD from the first [`Toolstack`] on.

mod config;
mod context;
mod devices;
mod domains;
mod events;
mod lifecycle;
mod scheduling;

pub use config::{Action, DomainConfig, DomainKind};
pub use context::{Aborter, Toolstack};
pub use devices::{Disk, Nic, PciDevice};
pub use domains::DomainSummary;
pub use events::{LifeEvent, LifeWatch};
