//! What a move left of its guest at this site: what recovery sees of it and does to it.

use std::fmt::Display;

use xen_sys::DomId;

use super::incoming_name;
use crate::directories::Directories;
use crate::error::Result;
use crate::guest::EndedSuspend;
use crate::guest::xen::host::{Asked, Host};
use crate::handover::journal::{self, Begin};
use crate::keeper;

/// The guest of one move at a site: a real one, or one that is replayed.
pub(crate) trait Here {
    /// What names a domain.
    type Domain: Copy + Display;

    /// The living domain that is the guest, also while it arrives.
    fn find(&self) -> Result<Option<Self::Domain>>;

    /// The domain that arrives, while it has the name of one.
    fn find_incoming(&self) -> Result<Option<Self::Domain>>;

    /// Whether the domain is the one that the move began with.
    fn is_left(&self, domid: Self::Domain) -> Result<bool>;

    /// Whether it is suspended.
    fn is_suspended(&self, domid: Self::Domain) -> Result<bool>;

    /// Gives the guest its processor time back, in whichever domain it is by now.
    fn restore_cpu_cap(&self, percent: u32) -> Result<()>;

    /// Ends a request to suspend, whatever became of it.
    fn end_suspend(&self, domid: Self::Domain, asked: Asked) -> Result<EndedSuspend>;

    /// Starts the guest's keeper; one that is there stays the only one.
    fn keep(&self) -> Result<()>;

    /// Lets it go on that is suspended.
    fn resume(&self, domid: Self::Domain) -> Result<()>;

    /// Ends log-dirty, where it may be on.
    fn end_log_dirty(&self, domid: Self::Domain) -> Result<()>;

    /// Destroys a domain.
    fn destroy(&self, domid: Self::Domain) -> Result<()>;

    /// Lets it run that has arrived, and names it. Runs again without harm.
    fn take_over(&self, domid: Self::Domain) -> Result<()>;

    /// Names it that has arrived, where it has no name of its own yet.
    fn name_arrived(&self, domid: Self::Domain);
}

/// A real guest at this host.
pub(super) struct OnXen<'a> {
    host: Host,
    directories: &'a Directories,
    begin: &'a Begin,
}

impl<'a> OnXen<'a> {
    pub fn open(directories: &'a Directories, begin: &'a Begin) -> Result<OnXen<'a>> {
        Ok(OnXen {
            host: Host::open()?,
            directories,
            begin,
        })
    }
}

impl Here for OnXen<'_> {
    type Domain = DomId;

    fn find(&self) -> Result<Option<DomId>> {
        self.host.find(&self.begin.uuid)
    }

    fn find_incoming(&self) -> Result<Option<DomId>> {
        let Begin { uuid, name, .. } = self.begin;
        self.host.find_named(uuid, &incoming_name(name))
    }

    fn is_left(&self, domid: DomId) -> Result<bool> {
        let Begin {
            domid: left,
            boot_id,
            ..
        } = self.begin;
        Ok(*left == Some(domid.get()) && *boot_id == journal::boot_id()?)
    }

    fn is_suspended(&self, domid: DomId) -> Result<bool> {
        self.host.is_suspended(domid)
    }

    fn restore_cpu_cap(&self, percent: u32) -> Result<()> {
        self.host.restore_cpu_cap(&self.begin.uuid, percent)
    }

    fn end_suspend(&self, domid: DomId, asked: Asked) -> Result<EndedSuspend> {
        self.host.end_suspend(domid, asked)
    }

    fn keep(&self) -> Result<()> {
        keeper::start(self.directories, &self.begin.name, &self.begin.uuid)
    }

    fn resume(&self, domid: DomId) -> Result<()> {
        self.host.resume(domid)
    }

    fn end_log_dirty(&self, domid: DomId) -> Result<()> {
        self.host.end_log_dirty(domid, true)
    }

    fn destroy(&self, domid: DomId) -> Result<()> {
        self.host.destroy(domid)
    }

    fn take_over(&self, domid: DomId) -> Result<()> {
        let name = &self.begin.name;
        self.host.take_over(domid, &incoming_name(name), name)
    }

    fn name_arrived(&self, domid: DomId) {
        let name = &self.begin.name;
        self.host.name_arrived(domid, &incoming_name(name), name);
    }
}
