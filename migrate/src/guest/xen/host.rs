//! One Xen host, seen by a process that handles guests on it.

use std::thread;
use std::time::{Duration, Instant};

use xen_sys::DomId;
use xen_sys::ctl::{Ctl, DomainInfo};
use xen_sys::store::Store;
use xen_sys::toolstack::Toolstack;

use crate::error::{Error, IoContext, Result};

/// How long a destroyed domain may take to be gone: its memory is freed page by page.
const DYING: Duration = Duration::from_secs(60);

/// A connection to this host's hypervisor, toolstack and store.
pub struct Host {
    ctl: Ctl,
    toolstack: Toolstack,
    store: Store,
}

impl Host {
    /// Connects.
    ///
    /// # Errors
    /// Where this is no Xen host, or we may not control it.
    pub fn open() -> Result<Host> {
        Ok(Host {
            ctl: Ctl::open().context(|| "Can't reach the hypervisor")?,
            toolstack: Toolstack::open().context(|| "Can't open libxl")?,
            store: Store::open().context(|| "Can't reach xenstore")?,
        })
    }

    /// The hypervisor.
    pub fn ctl(&self) -> &Ctl {
        &self.ctl
    }

    /// libxl.
    pub fn toolstack(&self) -> &Toolstack {
        &self.toolstack
    }

    /// xenstore.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What the hypervisor knows of a domain.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is none.
    pub fn info(&self, domid: DomId) -> Result<DomainInfo> {
        self.ctl
            .domain_info(domid)
            .context(|| "Can't read about the domain")?
            .ok_or_else(|| Error::Refused(format!("There is no domain {domid}")))
    }

    /// A domain's name.
    ///
    /// # Errors
    /// What libxl refuses.
    pub fn name(&self, domid: DomId) -> Result<String> {
        self.toolstack
            .name(domid)
            .ok_or_else(|| Error::Refused(format!("Domain {domid} has no name")))
    }

    /// A domain's UUID as text.
    pub fn uuid_text(&self, info: &DomainInfo) -> String {
        uuid_text(&info.uuid)
    }

    /// The living domain of that UUID.
    ///
    /// # Errors
    /// What Xen refuses.
    pub fn find(&self, uuid: &str) -> Result<Option<DomId>> {
        let domains = self.ctl.domains().context(|| "Can't list domains")?;
        Ok(domains
            .iter()
            .find(|info| !info.dying && uuid_text(&info.uuid) == uuid)
            .map(|info| info.domain))
    }

    /// The living domain of that UUID, if it has that name (or none yet).
    ///
    /// # Errors
    /// What Xen refuses.
    pub fn find_named(&self, uuid: &str, name: &str) -> Result<Option<DomId>> {
        let Some(domid) = self.find(uuid)? else {
            return Ok(None);
        };
        // A domain that is just being made has no name yet.
        let named = self.toolstack.name(domid);
        Ok(named
            .is_none_or(|found| found.is_empty() || found == name)
            .then_some(domid))
    }

    /// Whether the domain is suspended.
    ///
    /// # Errors
    /// As [`Host::info`].
    pub fn is_suspended(&self, domid: DomId) -> Result<bool> {
        Ok(self.info(domid)?.is_suspended())
    }

    /// Ends log-dirty, where it was ours.
    ///
    /// # Errors
    /// What Xen refuses; that there is none is no error.
    pub fn end_log_dirty(&self, domid: DomId, ours: bool) -> Result<()> {
        if !ours {
            return Ok(());
        }
        match self.ctl.log_dirty_off(domid) {
            Err(error)
                if !error.is_not_supported() && !is_invalid(&error) && !error.is_not_found() =>
            {
                Err(error).context(|| "Can't end the tracking of dirty pages")
            }
            _ => Ok(()),
        }
    }

    /// Suspends the domain, and returns once it is.
    ///
    /// # Errors
    /// Where it doesn't in libxl's time (60 s).
    pub fn suspend(&self, domid: DomId) -> Result<()> {
        self.toolstack
            .suspend(domid)
            .context(|| "The guest won't suspend")?;
        if !self.is_suspended(domid)? {
            return Err(Error::Guest {
                what: "shutdown was not a suspend".into(),
            });
        }
        Ok(())
    }

    /// Takes a request to suspend back that the guest has not seen yet. True: it will not suspend
    /// because of it.
    ///
    /// # Errors
    /// What xenstore refuses.
    pub fn withdraw_suspend(&self, domid: DomId) -> Result<bool> {
        if self.is_suspended(domid)? {
            return Ok(false);
        }
        let path = format!("/local/domain/{domid}/control/shutdown");
        self.store
            .transaction(|store| {
                // An empty value: the guest has taken the request and is on its way.
                let asked = store.read(&path)?.is_some_and(|value| value == b"suspend");
                if asked {
                    store.write(&path, "")?;
                }
                Ok(asked)
            })
            .context(|| "Can't take back the request to suspend")
    }

    /// Lets a suspended domain go on as if nothing had happened.
    ///
    /// # Errors
    /// What libxl refuses.
    pub fn resume(&self, domid: DomId) -> Result<()> {
        self.toolstack
            .resume(domid, true)
            .context(|| "Can't resume the guest")
    }

    /// Makes sure that the domain runs, whatever became of a request to suspend it: taken back
    /// where the guest has not seen it, waited for and undone where it has.
    ///
    /// # Errors
    /// What Xen refuses.
    pub fn go_on(&self, domid: DomId) -> Result<()> {
        /// Linux gives up freezing its tasks after 20 s.
        const PATIENCE: Duration = Duration::from_secs(30);
        let withdrawn = self.withdraw_suspend(domid)?;
        let start = Instant::now();
        loop {
            if self.is_suspended(domid)? {
                return self.resume(domid);
            }
            if withdrawn || start.elapsed() > PATIENCE {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Names an arrived domain and lets it run. Runs again without harm.
    ///
    /// # Errors
    /// What libxl refuses.
    pub fn take_over(&self, domid: DomId, incoming: &str, name: &str) -> Result<()> {
        // First what the guest waits for.
        self.toolstack
            .unpause(domid)
            .context(|| "Can't unpause the guest")?;
        if self.name(domid)? == incoming {
            self.toolstack
                .rename(domid, incoming, name)
                .context(|| "Can't give the guest its name")?;
        }
        Ok(())
    }

    /// Destroys the domain, and returns once nothing is left of it.
    ///
    /// # Errors
    /// What libxl refuses.
    pub fn destroy(&self, domid: DomId) -> Result<()> {
        self.toolstack
            .destroy(domid)
            .context(|| format!("Can't destroy domain {domid}"))?;
        let start = Instant::now();
        while self
            .ctl
            .domain_info(domid)
            .context(|| "Can't read about the domain")?
            .is_some()
        {
            if start.elapsed() > DYING {
                return Err(Error::Refused(format!(
                    "Domain {domid} is destroyed but won't go away"
                )));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Whether Xen says that this makes no sense now (EINVAL).
pub(super) fn is_invalid(error: &xen_sys::Error) -> bool {
    error.errno() == Some(nix::libc::EINVAL)
}

/// A UUID as text.
pub fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_uuid_reads_as_xl_prints_it() {
        let bytes: Vec<u8> = (0..16).collect();
        let text = super::uuid_text(bytes.as_slice().try_into().unwrap());
        assert_eq!(text, "00010203-0405-0607-0809-0a0b0c0d0e0f");
    }
}
