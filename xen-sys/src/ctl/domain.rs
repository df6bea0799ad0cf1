//! A domain's state, memory and clock.

use std::fmt;

use super::Ctl;
use crate::{DomId, Result, raw};

/// So many domains are asked for at once.
const BATCH: u32 = 64;

/// In place of the highest vCPU's number; the binding gives it a sign that it does not have.
const NO_VCPU: u32 = raw::XEN_INVALID_MAX_VCPU_ID as u32;

/// What the hypervisor says of a domain at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    /// The domain.
    pub domain: DomId,
    /// Its UUID; zero for the control domain.
    pub uuid: [u8; 16],
    /// It is being destroyed; its memory may be mapped by somebody still.
    pub dying: bool,
    /// It has shut down, or suspended, and why.
    pub shutdown: Option<ShutdownReason>,
    /// The toolstack has paused it.
    pub paused: bool,
    /// All its vCPUs wait for an event.
    pub blocked: bool,
    /// One of its vCPUs runs right now.
    pub running: bool,
    /// It is an HVM or PVH domain, else PV.
    pub hvm: bool,
    /// It uses hardware-assisted paging.
    pub hap: bool,
    /// Pages it has.
    pub tot_pages: u64,
    /// Pages it may have.
    pub max_pages: u64,
    /// Pages that are claimed for it and not allocated yet.
    pub outstanding_pages: u64,
    /// Pages it shares with others (memory sharing, not grants).
    pub shared_pages: u64,
    /// Pages that are paged out.
    pub paged_pages: u64,
    /// The machine frame of its shared info page (for HVM: the guest frame).
    pub shared_info_frame: u64,
    /// The CPU time of all its vCPUs, in ns.
    pub cpu_time: u64,
    /// The vCPUs that are online.
    pub online_vcpus: u32,
    /// The highest number of a vCPU; `None` without vCPUs.
    pub max_vcpu_id: Option<u32>,
    /// Its security label; 0 without a security module.
    pub ssidref: u32,
    /// The CPU pool it runs in.
    pub cpupool: u32,
    /// The size of its physical addresses in bits; 0 where it is of no meaning.
    pub physical_address_bits: u8,
}

/// Why a domain has shut down, as it said itself (SHUTDOWN_* in Xen's sched.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShutdownReason {
    /// It was switched off.
    Poweroff,
    /// It wants to start again.
    Reboot,
    /// It is suspended, and can be saved or resumed.
    Suspend,
    /// It crashed.
    Crash,
    /// Its watchdog expired.
    Watchdog,
    /// It wants a new life in the same memory.
    SoftReset,
    /// A reason that this version of Xen's interface does not name.
    Other(u32),
}

impl ShutdownReason {
    /// The reason with this code.
    pub fn from_code(code: u32) -> ShutdownReason {
        match code {
            raw::SHUTDOWN_poweroff => ShutdownReason::Poweroff,
            raw::SHUTDOWN_reboot => ShutdownReason::Reboot,
            raw::SHUTDOWN_suspend => ShutdownReason::Suspend,
            raw::SHUTDOWN_crash => ShutdownReason::Crash,
            raw::SHUTDOWN_watchdog => ShutdownReason::Watchdog,
            raw::SHUTDOWN_soft_reset => ShutdownReason::SoftReset,
            other => ShutdownReason::Other(other),
        }
    }
}

impl fmt::Display for ShutdownReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ShutdownReason::Poweroff => "poweroff",
            ShutdownReason::Reboot => "reboot",
            ShutdownReason::Suspend => "suspend",
            ShutdownReason::Crash => "crash",
            ShutdownReason::Watchdog => "watchdog",
            ShutdownReason::SoftReset => "soft reset",
            ShutdownReason::Other(code) => return write!(f, "reason {code}"),
        })
    }
}

/// How a domain's time-stamp counter behaves, as the record X86_TSC_INFO stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscInfo {
    /// 0 default, 1 always emulated, 2 never emulated, 3 PVRDTSCP.
    pub mode: u32,
    /// The frequency that the domain is shown, in kHz.
    pub khz: u32,
    /// The time since the domain's first start, in ns.
    pub nsec: u64,
    /// How often the domain has moved.
    pub incarnation: u32,
}

impl DomainInfo {
    fn from_raw(info: &raw::xc_domaininfo_t) -> Option<DomainInfo> {
        let has = |flag: u32| info.flags & flag != 0;
        let reason = (info.flags >> raw::XEN_DOMINF_shutdownshift) & raw::XEN_DOMINF_shutdownmask;
        Some(DomainInfo {
            domain: DomId::new(u32::from(info.domain))?,
            uuid: info.handle,
            dying: has(raw::XEN_DOMINF_dying),
            shutdown: has(raw::XEN_DOMINF_shutdown).then(|| ShutdownReason::from_code(reason)),
            paused: has(raw::XEN_DOMINF_paused),
            blocked: has(raw::XEN_DOMINF_blocked),
            running: has(raw::XEN_DOMINF_running),
            hvm: has(raw::XEN_DOMINF_hvm_guest),
            hap: has(raw::XEN_DOMINF_hap),
            tot_pages: info.tot_pages,
            max_pages: info.max_pages,
            outstanding_pages: info.outstanding_pages,
            shared_pages: info.shr_pages,
            paged_pages: info.paged_pages,
            shared_info_frame: info.shared_info_frame,
            cpu_time: info.cpu_time,
            online_vcpus: info.nr_online_vcpus,
            max_vcpu_id: (info.max_vcpu_id != NO_VCPU).then_some(info.max_vcpu_id),
            ssidref: info.ssidref,
            cpupool: info.cpupool,
            physical_address_bits: info.gpaddr_bits,
        })
    }

    /// It is suspended: shut down for that reason, and not dying.
    pub fn is_suspended(&self) -> bool {
        !self.dying && self.shutdown == Some(ShutdownReason::Suspend)
    }
}

/// Operations on domains.
impl Ctl {
    /// A domain's state; `None` if there is no such domain.
    ///
    /// # Errors
    ///
    /// The hypervisor refused.
    pub fn domain_info(&self, domain: DomId) -> Result<Option<DomainInfo>> {
        // The call answers the first domain from that number on.
        let infos = self.domains_from(domain.get(), 1)?;
        Ok(infos.into_iter().find(|info| info.domain == domain))
    }

    /// All domains, by number. Not a snapshot: long lists are fetched in parts.
    ///
    /// # Errors
    ///
    /// The hypervisor refused.
    pub fn domains(&self) -> Result<Vec<DomainInfo>> {
        let mut domains: Vec<DomainInfo> = Vec::new();
        loop {
            let first = domains.last().map_or(0, |last| last.domain.get() + 1);
            let batch = self.domains_from(first, BATCH)?;
            let complete = batch.len() < BATCH as usize;
            domains.extend(batch);
            if complete {
                return Ok(domains);
            }
        }
    }

    fn domains_from(&self, first: u32, count: u32) -> Result<Vec<DomainInfo>> {
        let mut infos = vec![raw::xc_domaininfo_t::default(); count as usize];
        let found = self.call("list domains", None, |xch| {
            // SAFETY: there is room for as many as are asked for.
            unsafe { raw::xc_domain_getinfolist(xch, first, count, infos.as_mut_ptr()) }
        })?;
        infos.truncate(found.unsigned_abs() as usize);
        Ok(infos.iter().filter_map(DomainInfo::from_raw).collect())
    }

    /// Bytes of a guest's machine word: 4 or 8.
    ///
    /// # Errors
    ///
    /// There is no such domain, or the hypervisor refused.
    pub fn guest_width(&self, domain: DomId) -> Result<u32> {
        let mut width = 0;
        self.call("ask for the guest's word size", domain, |xch| {
            // SAFETY: the handle is open. The function answers 1 when it fails.
            -unsafe { raw::xc_domain_get_guest_width(xch, domain.get(), &mut width) }.abs()
        })?;
        Ok(width)
    }

    /// The highest guest frame number: for PV as the guest itself wrote it to its shared info,
    /// so not to be trusted as a size.
    ///
    /// # Errors
    ///
    /// There is no such domain, or the hypervisor refused.
    pub fn max_gpfn(&self, domain: DomId) -> Result<u64> {
        let mut frame = 0;
        self.call("ask for the highest frame", domain, |xch| {
            // SAFETY: the handle is open.
            unsafe { raw::xc_domain_maximum_gpfn(xch, domain.get(), &mut frame) }
        })?;
        Ok(frame)
    }

    /// How many guest frames there are: [`max_gpfn`](Ctl::max_gpfn) + 1.
    ///
    /// # Errors
    ///
    /// There is no such domain, or the hypervisor refused.
    pub fn nr_gpfns(&self, domain: DomId) -> Result<u64> {
        let mut frames = 0;
        self.call("ask for the number of frames", domain, |xch| {
            // SAFETY: the handle is open.
            unsafe { raw::xc_domain_nr_gpfns(xch, domain.get(), &mut frames) }
        })?;
        Ok(frames)
    }

    /// How the domain's time-stamp counter behaves.
    ///
    /// # Errors
    ///
    /// There is no such domain, or the hypervisor refused.
    pub fn tsc_info(&self, domain: DomId) -> Result<TscInfo> {
        let mut info = TscInfo {
            mode: 0,
            khz: 0,
            nsec: 0,
            incarnation: 0,
        };
        self.call("ask for the guest's clock", domain, |xch| {
            // SAFETY: the handle is open.
            unsafe {
                raw::xc_domain_get_tsc_info(
                    xch,
                    domain.get(),
                    &mut info.mode,
                    &mut info.nsec,
                    &mut info.khz,
                    &mut info.incarnation,
                )
            }
        })?;
        Ok(info)
    }

    /// Claims so many pages in all for the domain (those it has already count), so that nobody
    /// else gets them; 0 ends the claim. Does nothing on a hypervisor without claims.
    ///
    /// # Errors
    ///
    /// Not so many pages are free (`ENOMEM`), there is no such domain, or the hypervisor refused.
    pub fn claim_pages(&self, domain: DomId, pages: u64) -> Result<()> {
        self.call("claim memory", domain, |xch| {
            // SAFETY: the handle is open.
            unsafe { raw::xc_domain_claim_pages(xch, domain.get(), pages) }
        })?;
        Ok(())
    }

    /// Pauses the domain: its vCPUs do not run until it is unpaused as often.
    ///
    /// # Errors
    ///
    /// There is no such domain, or the hypervisor refused.
    pub fn pause(&self, domain: DomId) -> Result<()> {
        self.call("pause", domain, |xch| {
            // SAFETY: the handle is open.
            unsafe { raw::xc_domain_pause(xch, domain.get()) }
        })?;
        Ok(())
    }

    /// Takes one [`pause`](Ctl::pause) back.
    ///
    /// # Errors
    ///
    /// There is no such domain, it is not paused, or the hypervisor refused.
    pub fn unpause(&self, domain: DomId) -> Result<()> {
        self.call("unpause", domain, |xch| {
            // SAFETY: the handle is open.
            unsafe { raw::xc_domain_unpause(xch, domain.get()) }
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suspended() -> raw::xc_domaininfo_t {
        raw::xc_domaininfo_t {
            domain: 7,
            flags: raw::XEN_DOMINF_shutdown
                | raw::XEN_DOMINF_hap
                | (raw::SHUTDOWN_suspend << raw::XEN_DOMINF_shutdownshift),
            max_vcpu_id: 1,
            ..Default::default()
        }
    }

    #[test]
    fn flags_are_decoded() {
        let info = DomainInfo::from_raw(&suspended()).unwrap();
        assert_eq!(info.shutdown, Some(ShutdownReason::Suspend));
        assert!(info.is_suspended() && info.hap);
        assert!(!info.hvm && !info.dying && !info.paused && !info.blocked && !info.running);
        assert_eq!(info.max_vcpu_id, Some(1));
    }

    #[test]
    fn a_reason_counts_only_with_its_flag() {
        let mut raw = suspended();
        raw.flags &= !raw::XEN_DOMINF_shutdown;
        let info = DomainInfo::from_raw(&raw).unwrap();
        assert_eq!(info.shutdown, None);
        assert!(!info.is_suspended());
    }

    #[test]
    fn a_dying_domain_is_not_suspended() {
        let mut raw = suspended();
        raw.flags |= raw::XEN_DOMINF_dying;
        assert!(!DomainInfo::from_raw(&raw).unwrap().is_suspended());
    }

    #[test]
    fn a_domain_without_vcpus_has_no_highest() {
        let raw = raw::xc_domaininfo_t {
            max_vcpu_id: u32::MAX,
            ..suspended()
        };
        assert_eq!(DomainInfo::from_raw(&raw).unwrap().max_vcpu_id, None);
    }

    #[test]
    fn unknown_reasons_keep_their_code() {
        assert_eq!(ShutdownReason::from_code(42), ShutdownReason::Other(42));
        assert_eq!(ShutdownReason::Other(42).to_string(), "reason 42");
    }
}
