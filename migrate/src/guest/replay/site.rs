//! A site in this process: where guests run, leave and arrive.
//!
//! ```text
//!   site                          under its own directory: journals, locks, memory on its way
//!     guest     runs, or is suspended
//!     incoming  arrives, paused: outlives the worker that made it, as a domain does
//!     left      the memory of the guest that was destroyed here last
//! ```
//!
//! [`Site::settle`] is what a guardian does: [`recovery`] itself settles what a journal tells of.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::guest::Guest;
use super::memory::Memory;
use crate::directories::Directories;
use crate::error::{Error, Result};
use crate::group::Group;
use crate::guest::xen::host::Asked;
use crate::guest::xen::stream::state::GuestState;
use crate::guest::{EndedSuspend, Moment};
use crate::handover::journal::{self, Entry, Journal, Outcome, Role};
use crate::handover::lock::GuestLock;
use crate::handover::recovery::{self, Here, LateSuspend, Owner};

/// The domain that runs here, or is suspended.
const GUEST: u32 = 1;

/// The domain that arrives.
const INCOMING: u32 = 2;

/// How long a worker of the same move is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is asked of a guest, or of what surrounds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Call {
    // At the source.
    Begin,
    NextDirty,
    Read(Moment),
    CpuCap,
    SetCpuCap,
    Suspend,
    FinalState,
    EndTracking,
    EndSuspend,
    Resume,
    Destroy,
    Ask,
    // At the destination.
    Start,
    BeginRound,
    Changed,
    EndRound,
    Behind,
    Complete,
    Completed,
    Verify,
    Confirm,
    TakeOver,
    Discard,
    // At either.
    Keep,
}

/// Is told of each call before it is carried out, and may let it fail.
pub type Watch = dyn Fn(Call) -> Result<()> + Send + Sync;

/// A guest that arrives.
#[derive(Debug)]
pub struct Incoming {
    pub(super) name: String,
    pub(super) memory: Memory,
    pub(super) state: Option<GuestState>,
}

/// A site.
#[derive(Debug)]
pub struct Site {
    /// Journals, locks, and memory on its way.
    pub directories: Directories,
    domains: Mutex<Domains>,
    group: Mutex<Option<Group>>,
}

#[derive(Debug, Default)]
struct Domains {
    guest: Option<Guest>,
    incoming: Option<Incoming>,
    left: Option<Memory>,
    state: Option<GuestState>,
    keepers: u32,
}

impl Site {
    /// A site without a guest. All it keeps on disk is under `root`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new(root: &Path) -> Result<Arc<Site>> {
        let directories = Directories::under(root);
        directories.create()?;
        Ok(Arc::new(Site {
            directories,
            domains: Mutex::default(),
            group: Mutex::default(),
        }))
    }

    /// A thread that was ended with the lock in hand leaves nothing half done here.
    fn domains(&self) -> MutexGuard<'_, Domains> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the site's guests are in this trust group.
    pub fn join(&self, group: Group) {
        *self.group.lock().unwrap_or_else(PoisonError::into_inner) = Some(group);
    }

    pub(super) fn group(&self) -> Option<Group> {
        let group = self.group.lock().unwrap_or_else(PoisonError::into_inner);
        group.clone()
    }

    /// From now on `guest` is here.
    pub fn start(&self, guest: Guest) {
        self.domains().guest = Some(guest);
    }

    /// Does something with the guest.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is none; what `with` returns.
    pub fn with_guest<T>(&self, with: impl FnOnce(&mut Guest) -> Result<T>) -> Result<T> {
        let mut domains = self.domains();
        let guest = domains.guest.as_mut();
        with(guest.ok_or_else(|| Error::Refused("There is no guest here".into()))?)
    }

    /// Whether a guest runs here.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.domains().guest.as_ref().is_some_and(Guest::runs)
    }

    /// Whether anything of a guest is here: one that runs or is suspended, or one on its way in.
    #[must_use]
    pub fn has_any(&self) -> bool {
        let domains = self.domains();
        domains.guest.is_some() || domains.incoming.is_some()
    }

    /// The memory of the guest that was destroyed here last.
    #[must_use]
    pub fn left(&self) -> Option<Memory> {
        self.domains().left.clone()
    }

    /// What the guest that arrived here last was besides its memory.
    #[must_use]
    pub fn arrived_state(&self) -> Option<GuestState> {
        self.domains().state.clone()
    }

    /// How many keepers were started here.
    #[must_use]
    pub fn keepers(&self) -> u32 {
        self.domains().keepers
    }

    pub(super) fn keep(&self) {
        self.domains().keepers += 1;
    }

    pub(super) fn destroy(&self) -> Result<()> {
        let mut domains = self.domains();
        let guest = domains.guest.take();
        domains.left = guest.map(|guest| guest.memory().clone());
        Ok(())
    }

    pub(super) fn begin_incoming(&self, incoming: Incoming) -> Result<()> {
        self.domains().incoming = Some(incoming);
        Ok(())
    }

    pub(super) fn with_incoming<T>(
        &self,
        with: impl FnOnce(&mut Incoming) -> Result<T>,
    ) -> Result<T> {
        let mut domains = self.domains();
        let incoming = domains.incoming.as_mut();
        with(incoming.ok_or_else(|| Error::Refused("No guest arrives here".into()))?)
    }

    /// What has arrived runs from now on. Runs again without harm.
    pub(super) fn take_over(&self) -> Result<()> {
        let mut domains = self.domains();
        if let Some(incoming) = domains.incoming.take() {
            domains.guest = Some(Guest::idle(&incoming.name, incoming.memory));
            domains.state = incoming.state;
        }
        Ok(())
    }

    pub(super) fn discard(&self) -> Result<()> {
        self.domains().incoming = None;
        Ok(())
    }

    /// Settles the move whose journal is at `path`, as a guardian does when its worker is gone.
    /// `ask` asks the other site who owns the guest.
    ///
    /// # Errors
    /// [`Error::InDoubt`], [`Error::Io`].
    pub fn settle(
        &self,
        path: &Path,
        ask: &mut dyn FnMut(&Entry) -> Result<Owner>,
    ) -> Result<Entry> {
        let begin = journal::read(path)?.begin;
        let _lock = GuestLock::wait(&self.directories, &begin.uuid, &begin.name, PATIENCE)?;
        let mut journal = Journal::open(path)?;
        recovery::carry_out(&mut journal, LateSuspend::IsWaitedFor, ask, || Ok(self))?;
        Ok(journal.entry().clone())
    }

    /// What this destination answers when a source asks about a move: who owns the guest.
    ///
    /// # Errors
    /// As [`Site::settle`].
    pub fn answer(&self, asked: &Entry) -> Result<Owner> {
        let found = journal::find(&self.directories, &asked.begin.move_id, Role::Destination)?;
        let Some(entry) = found else {
            return Ok(Owner::Unknown);
        };
        match self
            .settle(&entry.path, &mut |_| Ok(Owner::Unknown))?
            .outcome
        {
            Some(Outcome::Moved) => Ok(Owner::Destination),
            Some(Outcome::Aborted) => Ok(Owner::Source),
            None => Err(Error::Busy("The move is still under way".into())),
        }
    }
}

impl Here for &Site {
    type Domain = u32;

    fn find(&self) -> Result<Option<u32>> {
        let domains = self.domains();
        Ok(match (&domains.guest, &domains.incoming) {
            (Some(_), _) => Some(GUEST),
            (None, Some(_)) => Some(INCOMING),
            (None, None) => None,
        })
    }

    fn find_incoming(&self) -> Result<Option<u32>> {
        Ok(self.domains().incoming.as_ref().map(|_| INCOMING))
    }

    fn is_left(&self, domid: u32) -> Result<bool> {
        Ok(domid == GUEST)
    }

    fn is_suspended(&self, domid: u32) -> Result<bool> {
        Ok(domid == GUEST && !self.runs())
    }

    fn restore_cpu_cap(&self, percent: u32) -> Result<()> {
        if let Some(guest) = &mut self.domains().guest {
            guest.set_cpu_cap(percent);
        }
        Ok(())
    }

    /// A guest here suspends at once or not at all.
    fn end_suspend(&self, domid: u32, asked: Asked) -> Result<EndedSuspend> {
        Ok(match (self.is_suspended(domid)?, asked) {
            (true, _) => EndedSuspend::Suspended,
            (false, Asked::Done) => EndedSuspend::GoesOn,
            (false, _) => EndedSuspend::WillNot,
        })
    }

    fn keep(&self) -> Result<()> {
        Site::keep(self);
        Ok(())
    }

    fn resume(&self, _domid: u32) -> Result<()> {
        self.with_guest(|guest| {
            guest.resume();
            Ok(())
        })
    }

    fn end_log_dirty(&self, _domid: u32) -> Result<()> {
        self.with_guest(|guest| {
            guest.end_log();
            Ok(())
        })
    }

    fn destroy(&self, domid: u32) -> Result<()> {
        match domid == INCOMING {
            true => self.discard(),
            false => Site::destroy(self),
        }
    }

    fn take_over(&self, _domid: u32) -> Result<()> {
        Site::take_over(self)
    }

    fn name_arrived(&self, _domid: u32) {}
}
