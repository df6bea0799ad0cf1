//! The hypervisor and the machine.

use std::ffi::{CStr, c_char};
use std::fmt;
use std::ptr;

use super::Ctl;
use crate::{Result, raw};

/// The running hypervisor's version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// 4 in "4.17.7-pre".
    pub major: u32,
    /// 17 in "4.17.7-pre".
    pub minor: u32,
    /// ".7-pre" in "4.17.7-pre".
    pub extra: String,
    /// The kinds of guests, as in "xen-3.0-x86_64 hvm-3.0-x86_64".
    pub capabilities: String,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}{}", self.major, self.minor, self.extra)
    }
}

/// The machine's memory and what its hypervisor can do with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PhysicalInfo {
    /// Pages of the machine.
    pub total_pages: u64,
    /// Pages that no domain has.
    pub free_pages: u64,
    /// Free pages that are claimed for a domain that is being built.
    pub outstanding_pages: u64,
    /// Pages of dead domains that are not wiped yet; they will be free.
    pub scrub_pages: u64,
    /// CPUs that are online.
    pub cpus: u32,
    /// The CPUs' frequency in kHz.
    pub cpu_khz: u32,
    /// PV guests can run.
    pub pv: bool,
    /// HVM guests can run.
    pub hvm: bool,
    /// Hardware-assisted paging for HVM and PVH guests; log-dirty works with it.
    pub hap: bool,
    /// Shadow paging: without it, there is no log-dirty for PV guests.
    pub shadow: bool,
}

/// Operations on the host.
impl Ctl {
    /// The running hypervisor's version.
    ///
    /// # Errors
    ///
    /// The hypervisor refused.
    pub fn version(&self) -> Result<Version> {
        const OPERATION: &str = "ask for the hypervisor's version";
        let version = self.call(OPERATION, None, |xch| {
            // SAFETY: this command takes no argument.
            unsafe { raw::xc_version(xch, raw::XENVER_version as i32, ptr::null_mut()) }
        })?;
        let mut extra: raw::xen_extraversion_t = [0; 16];
        self.call(OPERATION, None, |xch| {
            let argument = ptr::from_mut(&mut extra).cast();
            // SAFETY: the argument is of the command's type.
            unsafe { raw::xc_version(xch, raw::XENVER_extraversion as i32, argument) }
        })?;
        let mut capabilities: raw::xen_capabilities_info_t = [0; 1024];
        self.call(OPERATION, None, |xch| {
            let argument = ptr::from_mut(&mut capabilities).cast();
            // SAFETY: the argument is of the command's type.
            unsafe { raw::xc_version(xch, raw::XENVER_capabilities as i32, argument) }
        })?;
        let version = version.unsigned_abs();
        Ok(Version {
            major: version >> 16,
            minor: version & 0xffff,
            extra: text(&extra),
            capabilities: text(&capabilities).trim().to_owned(),
        })
    }

    /// The machine's memory and abilities.
    ///
    /// # Errors
    ///
    /// The hypervisor refused.
    pub fn physical_info(&self) -> Result<PhysicalInfo> {
        let mut info = raw::xc_physinfo_t::default();
        self.call("ask for the machine's memory", None, |xch| {
            // SAFETY: the handle is open, and the structure is whole.
            unsafe { raw::xc_physinfo(xch, &mut info) }
        })?;
        let has = |capability: u32| info.capabilities & capability != 0;
        Ok(PhysicalInfo {
            total_pages: info.total_pages,
            free_pages: info.free_pages,
            outstanding_pages: info.outstanding_pages,
            scrub_pages: info.scrub_pages,
            cpus: info.nr_cpus,
            cpu_khz: info.cpu_khz,
            pv: has(raw::XEN_SYSCTL_PHYSCAP_pv),
            hvm: has(raw::XEN_SYSCTL_PHYSCAP_hvm),
            hap: has(raw::XEN_SYSCTL_PHYSCAP_hap),
            shadow: has(raw::XEN_SYSCTL_PHYSCAP_shadow),
        })
    }
}

/// The text of a character array, which ends at its first zero or its end.
fn text(characters: &[c_char]) -> String {
    let bytes: Vec<u8> = characters.iter().map(|&c| c as u8).chain([0]).collect();
    CStr::from_bytes_until_nul(&bytes)
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_ends_at_zero_or_at_the_end() {
        assert_eq!(text(&[b'a' as c_char, 0, b'b' as c_char]), "a");
        assert_eq!(text(&[b'a' as c_char, b'b' as c_char]), "ab");
        assert_eq!(text(&[]), "");
    }
}
