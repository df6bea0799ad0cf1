//! A real guest moves between two real Xen sites: what must hold, and what happens when it is
//! broken on purpose.
//!
//! `make test` runs it, with the Debian package in `VMSHADOW_DEB`. A test has its sites for itself;
//! one that passes leaves them to the next. Every move runs in verify mode: all memory is compared
//! at both sites.
#![allow(clippy::unwrap_used)]

mod broken;
mod changes;
mod control;
mod desktop;
mod disks;
mod empty;
mod hostile;
mod keeper;
mod moves;
mod oracle;
mod packaged;
mod refused;
mod scene;
mod shadows;
mod through_an_edge;
