//! One Xen host, seen by a process that handles guests on it.

use std::thread;
use std::time::{Duration, Instant};

use xen_sys::DomId;
use xen_sys::ctl::{Ctl, DomainInfo, ShutdownReason};
use xen_sys::store::Store;
use xen_sys::toolstack::{DomainKind, Toolstack};

use super::savers::{refuse_saver, saver_at_work};
use crate::error::{Error, IoContext, Result, chain};
use crate::guest::EndedSuspend;

/// How long a destroyed domain may take to be gone: its memory is freed page by page.
const DYING: Duration = Duration::from_secs(60);

/// How long a toolstack may take to start a guest again that has stopped.
const RESTARTING: Duration = Duration::from_secs(15);

/// How long a guest that has taken a request to suspend may take to do it, or to give up: Linux
/// tries for 20 s to freeze its tasks.
pub const SUSPENDING: Duration = Duration::from_secs(60);

/// What is known of a request to suspend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// None was made that the guest could have taken.
    No,
    /// The guest may have taken it, and is waited for that long.
    Waiting(Duration),
    /// The guest was suspended.
    Done,
}

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

    /// A domain's kind.
    ///
    /// # Errors
    /// What libxl refuses; [`Error::Refused`] where it can't tell.
    pub fn kind(&self, domid: DomId) -> Result<DomainKind> {
        // The hypervisor doesn't tell PVH from HVM: only the configuration does.
        if !self.info(domid)?.hvm {
            return Ok(DomainKind::Pv);
        }
        self.toolstack
            .configuration(domid)
            .context(|| "Can't read the guest's configuration")?
            .kind()
            .ok_or_else(|| Error::Refused(format!("Domain {domid} is of no known kind")))
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
        Ok(of_uuid(&domains, uuid).map(|info| info.domain))
    }

    /// The living domain of that UUID that has that name (or none yet).
    ///
    /// # Errors
    /// What Xen refuses.
    pub fn find_named(&self, uuid: &str, name: &str) -> Result<Option<DomId>> {
        let domains = self.ctl.domains().context(|| "Can't list domains")?;
        Ok(domains
            .iter()
            .filter(|info| !info.dying && uuid_text(&info.uuid) == uuid)
            .map(|info| info.domain)
            // A domain that is just being made has no name yet.
            .find(|domid| {
                self.toolstack
                    .name(*domid)
                    .is_none_or(|found| found.is_empty() || found == name)
            }))
    }

    /// Whether the domain is suspended.
    ///
    /// # Errors
    /// As [`Host::info`].
    pub fn is_suspended(&self, domid: DomId) -> Result<bool> {
        Ok(self.info(domid)?.is_suspended())
    }

    /// Ends log-dirty, where it was ours. A stock tool that moves the guest meanwhile has taken it
    /// over: without it, that tool would find nothing dirty, and leave behind what the guest writes.
    /// It ends it by itself.
    ///
    /// # Errors
    /// What Xen refuses; that there is none is no error.
    pub fn end_log_dirty(&self, domid: DomId, ours: bool) -> Result<()> {
        if !ours || saver_at_work(domid).is_some() {
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

    /// The most processor time that the domain may use, in percent of one CPU; zero: as much as
    /// there is. None where its scheduler knows no such bound.
    ///
    /// # Errors
    /// What libxl refuses.
    pub fn cpu_cap(&self, domid: DomId) -> Result<Option<u32>> {
        self.toolstack
            .cpu_cap(domid)
            .context(|| "Can't read the guest's share of the processors")
    }

    /// Sets what [`Host::cpu_cap`] returns; for a moment there is no cap at all. Harmless where there
    /// is no such domain any more.
    ///
    /// # Errors
    /// What libxl refuses.
    pub fn set_cpu_cap(&self, domid: DomId, percent: u32) -> Result<()> {
        let gone = |_: &xen_sys::Error| matches!(self.ctl.domain_info(domid), Ok(None));
        // What a domain has used too much of its old cap it owes to credit2, and pays the longer the
        // lower the new one is. Without a cap it owes nothing.
        let lifted = match percent {
            0 => Ok(()),
            _ => self.toolstack.set_cpu_cap(domid, 0),
        };
        match lifted.and_then(|()| self.toolstack.set_cpu_cap(domid, percent)) {
            Err(error) if gone(&error) => Ok(()),
            other => other.context(|| "Can't set the guest's share of the processors"),
        }
    }

    /// As [`Host::set_cpu_cap`], of the guest in whichever domain it is by now. One that reboots
    /// takes what is set along: its toolstack reads that with the configuration, and sets it while
    /// it builds the new domain, which is paused until that is done.
    ///
    /// # Errors
    /// What Xen refuses.
    pub fn restore_cpu_cap(&self, uuid: &str, percent: u32) -> Result<()> {
        let start = Instant::now();
        loop {
            if let Some(domid) = self.find(uuid)? {
                let info = self
                    .ctl
                    .domain_info(domid)
                    .context(|| "Can't read about the domain")?;
                let stays = |info: DomainInfo| {
                    let ended = info.shutdown.is_some() && !info.is_suspended();
                    !info.dying && !info.paused && !ended
                };
                // Only what is set after it was seen so is the last to be set.
                self.set_cpu_cap(domid, percent)?;
                if info.is_some_and(stays) {
                    return Ok(());
                }
            }
            if start.elapsed() > RESTARTING {
                log::info!("The guest has stopped, or is paused; nothing is left to be sped up");
                return Ok(());
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Suspends the domain, and returns once it is.
    ///
    /// # Errors
    /// Where it doesn't in libxl's time (60 s), where it ends meanwhile, and where somebody else
    /// has suspended it.
    pub fn suspend(&self, domid: DomId) -> Result<()> {
        refuse_saver(domid)?;
        let stopped = |info: &DomainInfo| match info.shutdown {
            Some(ShutdownReason::Suspend) => "is suspended already".to_owned(),
            Some(reason) => format!("has stopped by itself ({reason})"),
            None => "has not answered the request to suspend".to_owned(),
        };
        let info = self.info(domid)?;
        if info.shutdown.is_some() {
            return Err(Error::Busy(format!("The guest {}", stopped(&info))));
        }
        self.toolstack
            .suspend(domid)
            .context(|| "The guest won't suspend")?;
        // libxl takes its request back after 60 s without an answer, and calls that a success.
        let info = self.info(domid)?;
        if info.is_suspended() {
            Ok(())
        } else {
            Err(Error::Busy(format!("The guest {}", stopped(&info))))
        }
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
    /// What libxl refuses; [`Error::Busy`] where another tool has suspended it.
    pub fn resume(&self, domid: DomId) -> Result<()> {
        refuse_saver(domid)?;
        self.toolstack
            .resume(domid, true)
            .context(|| "Can't resume the guest")
    }

    /// Ends a request to suspend, whatever became of it: takes it back where the guest has not
    /// seen it, and where it has waits for the suspend.
    ///
    /// # Errors
    /// What Xen refuses. [`Error::Busy`] where the guest is paused and may suspend as soon as it
    /// goes on.
    pub fn end_suspend(&self, domid: DomId, asked: Asked) -> Result<EndedSuspend> {
        let look = || {
            self.ctl
                .domain_info(domid)
                .context(|| "Can't read about the domain")
        };
        if look()?.is_none() {
            return Ok(EndedSuspend::WillNot);
        }
        // One that is done with is no longer there to be taken back; another tool's may be.
        let withdrawn = asked != Asked::Done && self.withdraw_suspend(domid)?;
        let start = Instant::now();
        loop {
            let Some(info) = look()? else {
                return Ok(EndedSuspend::WillNot);
            };
            let asked = match asked {
                // One that can't have seen it is not waited for.
                _ if withdrawn => Asked::No,
                Asked::Waiting(patience) => {
                    Asked::Waiting(patience.saturating_sub(start.elapsed()))
                }
                other => other,
            };
            if let Some(ended) = ended_suspend(&info, asked) {
                return ended;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Names an arrived domain and lets it run. Runs again without harm.
    ///
    /// # Errors
    /// What libxl refuses. That it can't have its name is logged only: it runs.
    pub fn take_over(&self, domid: DomId, incoming: &str, name: &str) -> Result<()> {
        // First what the guest waits for. Xen refuses to unpause what runs already.
        if self.info(domid)?.paused {
            self.toolstack
                .unpause(domid)
                .context(|| "Can't unpause the guest")?;
        }
        self.name_arrived(domid, incoming, name);
        Ok(())
    }

    /// Gives an arrived domain its own name, if it still has that of an incoming one.
    pub fn name_arrived(&self, domid: DomId, incoming: &str, name: &str) {
        if self
            .toolstack
            .name(domid)
            .is_some_and(|found| found != incoming)
        {
            return;
        }
        if let Err(error) = self.toolstack.rename(domid, incoming, name) {
            log::error!(
                "Domain {domid} keeps the name {incoming}: {}",
                chain(&error)
            );
        }
    }

    /// Destroys the domain, and returns once nothing is left of it.
    ///
    /// # Errors
    /// What libxl refuses.
    pub fn destroy(&self, domid: DomId) -> Result<()> {
        let there = || {
            self.ctl
                .domain_info(domid)
                .map(|info| info.is_some())
                .context(|| "Can't read about the domain")
        };
        match self.toolstack.destroy(domid) {
            // Somebody else was faster.
            Err(_) if !there()? => return Ok(()),
            other => other.context(|| format!("Can't destroy domain {domid}"))?,
        }
        let start = Instant::now();
        while there()? {
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

/// What became of a request to suspend, by what is seen of the domain. None: it is to be waited for
/// still.
fn ended_suspend(info: &DomainInfo, asked: Asked) -> Option<Result<EndedSuspend>> {
    match asked {
        _ if info.is_suspended() => Some(Ok(EndedSuspend::Suspended)),
        Asked::Done => Some(Ok(EndedSuspend::GoesOn)),
        _ if info.shutdown.is_some() => Some(Ok(EndedSuspend::WillNot)),
        Asked::No => Some(Ok(EndedSuspend::WillNot)),
        Asked::Waiting(left) if !left.is_zero() => None,
        Asked::Waiting(_) if info.paused => Some(Err(Error::Busy(
            "The guest is paused, and may suspend as soon as it is unpaused".into(),
        ))),
        Asked::Waiting(_) => Some(Ok(EndedSuspend::MayCome)),
    }
}

/// Whether Xen says that this makes no sense now (EINVAL).
pub(super) fn is_invalid(error: &xen_sys::Error) -> bool {
    error.errno() == Some(nix::libc::EINVAL)
}

/// The domain of that UUID, if there is one. Of several the one that runs or is suspended: a domain
/// that was kept after it has ended (`on_crash = "rename-restart"`) has another name and, for libxl,
/// another UUID, but not for the hypervisor.
pub(crate) fn of_uuid<'a>(domains: &'a [DomainInfo], uuid: &str) -> Option<&'a DomainInfo> {
    let own = |info: &&DomainInfo| !info.dying && uuid_text(&info.uuid) == uuid;
    let has_ended = |info: &&DomainInfo| info.shutdown.is_some() && !info.is_suspended();
    domains.iter().filter(own).min_by_key(has_ended)
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
    use super::*;

    fn domain(id: u32, shutdown: Option<ShutdownReason>) -> DomainInfo {
        DomainInfo {
            domain: DomId::new(id).unwrap(),
            uuid: [7; 16],
            dying: false,
            shutdown,
            paused: false,
            blocked: false,
            running: false,
            hvm: false,
            hap: false,
            tot_pages: 0,
            max_pages: 0,
            outstanding_pages: 0,
            shared_pages: 0,
            paged_pages: 0,
            shared_info_frame: 0,
            cpu_time: 0,
            online_vcpus: 1,
            max_vcpu_id: None,
            ssidref: 0,
            cpupool: 0,
            physical_address_bits: 0,
        }
    }

    #[test]
    fn of_several_domains_of_a_uuid_the_one_that_has_not_ended_is_the_guest() {
        use ShutdownReason::{Crash, Suspend};
        let uuid = uuid_text(&[7; 16]);
        let found = |domains: &[DomainInfo]| of_uuid(domains, &uuid).map(|info| info.domain.get());
        assert_eq!(found(&[]), None);
        assert_eq!(found(&[domain(3, Some(Crash))]), Some(3));
        assert_eq!(found(&[domain(3, Some(Crash)), domain(4, None)]), Some(4));
        let suspended = domain(4, Some(Suspend));
        assert_eq!(found(&[domain(3, Some(Crash)), suspended]), Some(4));
        let dying = DomainInfo {
            dying: true,
            ..domain(4, None)
        };
        assert_eq!(found(&[domain(3, Some(Crash)), dying]), Some(3));
        assert_eq!(of_uuid(&[domain(3, None)], &uuid_text(&[8; 16])), None);
    }

    /// One that comes when nobody waits any more would hold the guest for good.
    #[test]
    fn a_suspend_that_was_taken_and_did_not_come_may_come_yet() {
        use Asked::{Done, No, Waiting};
        use EndedSuspend::{GoesOn, MayCome, Suspended, WillNot};
        let (some, no_more) = (Waiting(Duration::from_secs(1)), Waiting(Duration::ZERO));
        let look = |info: &DomainInfo, asked| {
            ended_suspend(info, asked).map(|ended| ended.map_err(|_| ()))
        };
        let runs = domain(1, None);
        assert_eq!(look(&runs, some), None);
        assert_eq!(look(&runs, no_more), Some(Ok(MayCome)));
        assert_eq!(look(&runs, No), Some(Ok(WillNot)));
        assert_eq!(look(&runs, Done), Some(Ok(GoesOn)));
        let paused = DomainInfo {
            paused: true,
            ..runs
        };
        assert_eq!(look(&paused, no_more), Some(Err(())));
        assert_eq!(look(&paused, Done), Some(Ok(GoesOn)));
        let suspended = domain(1, Some(ShutdownReason::Suspend));
        let crashed = domain(1, Some(ShutdownReason::Crash));
        for asked in [No, some, no_more] {
            assert_eq!(look(&suspended, asked), Some(Ok(Suspended)));
            assert_eq!(look(&crashed, asked), Some(Ok(WillNot)));
        }
        assert_eq!(look(&suspended, Done), Some(Ok(Suspended)));
        // It is a keeper's to see to that.
        assert_eq!(look(&crashed, Done), Some(Ok(GoesOn)));
    }

    #[test]
    fn a_uuid_reads_as_xl_prints_it() {
        let bytes: Vec<u8> = (0..16).collect();
        let text = super::uuid_text(bytes.as_slice().try_into().unwrap());
        assert_eq!(text, "00010203-0405-0607-0809-0a0b0c0d0e0f");
    }
}
