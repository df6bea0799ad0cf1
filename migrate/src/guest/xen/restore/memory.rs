//! This host's memory, for a guest that arrives: whether there is enough, and held once there is.

use std::thread;
use std::time::{Duration, Instant};

use xen_sys::DomId;
use xen_sys::toolstack::DomainConfig;

use super::XenDestination;
use super::attempt::MAKING;
use crate::error::{Error, IoContext, Result};
use crate::guest::Kind;
use crate::guest::xen::host::is_invalid;
use crate::pages::PAGE_SIZE;

impl XenDestination {
    /// Whether there is memory for the guest now. Nothing is held.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is not.
    pub fn refuse_lack_of_memory(&self) -> Result<()> {
        let mut configuration = self.configuration(self.incoming.populated)?;
        self.check_memory(&mut configuration)
    }

    pub(super) fn check_memory(&self, configuration: &mut DomainConfig) -> Result<()> {
        let needed = self
            .host
            .toolstack()
            .needed_memory(configuration)
            .context(|| "Can't tell how much memory the guest needs")?;
        let free = self
            .host
            .toolstack()
            .free_memory()
            .context(|| "Can't tell how much memory is free")?;
        // What other domains that are being built have claimed counts as free there.
        let claimed = self
            .host
            .ctl()
            .physical_info()
            .context(|| "Can't read about this host")?
            .outstanding_pages;
        let free = free.saturating_sub(claimed * (PAGE_SIZE as u64 / 1024));
        if needed > free {
            return Err(Error::Refused(format!(
                "Not enough free memory: {} MiB needed, {} MiB free",
                needed.div_ceil(1024),
                free / 1024
            )));
        }
        Ok(())
    }

    /// Claims the domain's memory: what is free now may be gone when it is needed.
    pub(super) fn hold_memory(&self, populated: u64) -> Result<()> {
        let Some(domid) = self.domid else {
            return Ok(());
        };
        let start = Instant::now();
        loop {
            match self.host.ctl().claim_pages(domid, populated) {
                Ok(()) => return Ok(()),
                Err(error) if is_invalid(&error) && start.elapsed() < MAKING => {
                    // It has them all already, or libxl has not set its limit yet.
                    if self.host.info(domid)?.tot_pages >= populated {
                        return Ok(());
                    }
                    thread::sleep(Duration::from_millis(20));
                }
                Err(error) if error.is_out_of_memory() => {
                    return Err(Error::Refused("Not enough free memory".into()));
                }
                Err(error) => return Err(error).context(|| "Can't hold the guest's memory"),
            }
        }
    }

    /// A new domain has all pages that its page tables have ever named. The guest must not have more
    /// than it had: it believes that it gave them away.
    pub(super) fn refuse_surplus(&self, domid: DomId) -> Result<()> {
        let (there, here) = (self.host.info(domid)?.tot_pages, self.pages_here()?);
        match self.incoming.kind {
            Kind::Pv if there > here => Err(Error::Guest {
                what: format!(
                    "memory shrank on the way: {} pages too many; try again",
                    there - here
                ),
            }),
            _ => Ok(()),
        }
    }
}
