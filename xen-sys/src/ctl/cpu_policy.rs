//! What a domain sees of the CPU: CPUID leaves and model-specific registers.

use std::fmt;
use std::io;
use std::ptr::{self, NonNull};

use super::{Ctl, cpu_features};
use crate::{DomId, Error, Result, raw};

/// A domain's CPU policy, as the records X86_CPUID_POLICY and X86_MSR_POLICY store it.
#[derive(Clone)]
pub struct CpuPolicy {
    leaves: Vec<raw::xen_cpuid_leaf_t>,
    msrs: Vec<raw::xen_msr_entry_t>,
}

/// The kind of a domain, as far as it changes what it may see of the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestKind {
    /// Paravirtualised.
    Pv,
    /// In a hardware container: HVM and PVH.
    Hvm,
}

/// The host can't offer what the domain was promised.
#[derive(Debug, thiserror::Error)]
pub enum Incompatible {
    /// Something in the policy exceeds the host.
    #[error("This host's CPU or hypervisor lacks what the guest uses ({detail})")]
    Exceeds {
        /// Which leaf or register, as libxc reports it, or the features' names.
        detail: String,
    },
    /// The policy could not be compared.
    #[error("The CPU policies can't be compared")]
    Call(#[source] Error),
}

impl From<Error> for Incompatible {
    fn from(error: Error) -> Incompatible {
        Incompatible::Call(error)
    }
}

/// The most entries of either kind that are taken from outside; real policies have some hundred.
const MOST_ENTRIES: usize = 4096;

impl CpuPolicy {
    /// Bytes of a CPUID leaf.
    pub const LEAF_SIZE: usize = size_of::<raw::xen_cpuid_leaf_t>();
    /// Bytes of a model-specific register.
    pub const MSR_SIZE: usize = size_of::<raw::xen_msr_entry_t>();

    /// The policy of the bodies of the two records.
    ///
    /// # Errors
    ///
    /// A length is no multiple of its entry's, or absurd.
    pub fn from_bytes(leaves: &[u8], msrs: &[u8]) -> Result<CpuPolicy> {
        Ok(CpuPolicy {
            leaves: entries(leaves, "CPUID policy")?,
            msrs: entries(msrs, "MSR policy")?,
        })
    }

    /// The CPUID leaves, 24 bytes each.
    pub fn leaf_bytes(&self) -> &[u8] {
        bytes(&self.leaves)
    }

    /// The model-specific registers, 16 bytes each.
    pub fn msr_bytes(&self) -> &[u8] {
        bytes(&self.msrs)
    }
}

impl PartialEq for CpuPolicy {
    fn eq(&self, other: &CpuPolicy) -> bool {
        self.leaf_bytes() == other.leaf_bytes() && self.msr_bytes() == other.msr_bytes()
    }
}

impl Eq for CpuPolicy {}

impl fmt::Debug for CpuPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuPolicy")
            .field("leaves", &self.leaves.len())
            .field("msrs", &self.msrs.len())
            .finish()
    }
}

/// The two structures that a policy is made of: integers without padding, so any bytes are one.
trait Entry: Copy {}
impl Entry for raw::xen_cpuid_leaf_t {}
impl Entry for raw::xen_msr_entry_t {}

fn entries<E: Entry>(bytes: &[u8], what: &str) -> Result<Vec<E>> {
    let chunks = bytes.chunks_exact(size_of::<E>());
    if !chunks.remainder().is_empty() || chunks.len() > MOST_ENTRIES {
        return Err(Error::argument(format!("{what} of {} bytes", bytes.len())));
    }
    // SAFETY: each chunk is as long as the entry, and any bytes are one.
    Ok(chunks
        .map(|chunk| unsafe { ptr::read_unaligned(chunk.as_ptr().cast()) })
        .collect())
}

fn bytes<E: Entry>(entries: &[E]) -> &[u8] {
    // SAFETY: the entries have no padding, and may be read as bytes.
    unsafe { std::slice::from_raw_parts(entries.as_ptr().cast(), size_of_val(entries)) }
}

/// libxc's own form of a policy, which only it can take apart.
struct Parsed(NonNull<raw::xc_cpu_policy_t>);

impl Parsed {
    fn new() -> Result<Parsed> {
        // SAFETY: takes nothing, and answers null when there is no memory.
        let policy = unsafe { raw::xc_cpu_policy_init() };
        NonNull::new(policy).map(Parsed).ok_or_else(|| {
            Error::os(
                "allocate a CPU policy",
                None,
                io::Error::from_raw_os_error(libc::ENOMEM),
            )
        })
    }

    fn as_ptr(&self) -> *mut raw::xc_cpu_policy_t {
        self.0.as_ptr()
    }
}

impl Drop for Parsed {
    fn drop(&mut self) {
        // SAFETY: it came from `xc_cpu_policy_init`, and is freed once.
        unsafe { raw::xc_cpu_policy_destroy(self.as_ptr()) };
    }
}

/// Operations on CPU policies.
impl Ctl {
    /// What the domain sees of the CPU.
    ///
    /// # Errors
    ///
    /// There is no such domain, or the hypervisor refused.
    pub fn cpu_policy(&self, domain: DomId) -> Result<CpuPolicy> {
        const OPERATION: &str = "fetch the CPU policy";
        let parsed = Parsed::new()?;
        self.call(OPERATION, domain, |xch| {
            // SAFETY: the handle is open, the policy allocated.
            failed(unsafe { raw::xc_cpu_policy_get_domain(xch, domain.get(), parsed.as_ptr()) })
        })?;
        self.serialised(OPERATION, &parsed)
    }

    /// The policy as its entries.
    fn serialised(&self, operation: &'static str, parsed: &Parsed) -> Result<CpuPolicy> {
        let (mut leaf_count, mut msr_count) = (0, 0);
        self.call(operation, None, |xch| {
            // SAFETY: the handle is open.
            unsafe { raw::xc_cpu_policy_get_size(xch, &mut leaf_count, &mut msr_count) }
        })?;
        let mut leaves = vec![raw::xen_cpuid_leaf_t::default(); leaf_count as usize];
        let mut msrs = vec![raw::xen_msr_entry_t::default(); msr_count as usize];
        self.call(operation, None, |xch| {
            // SAFETY: the arrays have as much room as the counts say, and the counts come back as
            // what was filled.
            failed(unsafe {
                raw::xc_cpu_policy_serialise(
                    xch,
                    parsed.as_ptr(),
                    leaves.as_mut_ptr(),
                    &mut leaf_count,
                    msrs.as_mut_ptr(),
                    &mut msr_count,
                )
            })
        })?;
        leaves.truncate(leaf_count as usize);
        msrs.truncate(msr_count as usize);
        Ok(CpuPolicy { leaves, msrs })
    }

    /// Whether this host can offer a guest what the policy promises it: compares with the most
    /// that its hypervisor can give to guests of that kind. Stricter than the hypervisor, which
    /// takes features away without a word.
    ///
    /// # Errors
    ///
    /// It can't, or the policy could not be read.
    pub fn cpu_policy_compatible(
        &self,
        policy: &CpuPolicy,
        kind: GuestKind,
    ) -> std::result::Result<(), Incompatible> {
        const OPERATION: &str = "compare CPU policies";
        let index = match kind {
            GuestKind::Pv => raw::XEN_SYSCTL_cpu_policy_pv_max,
            GuestKind::Hvm => raw::XEN_SYSCTL_cpu_policy_hvm_max,
        };
        let host = Parsed::new()?;
        self.call(OPERATION, None, |xch| {
            // SAFETY: the handle is open, the policy allocated.
            failed(unsafe { raw::xc_cpu_policy_get_system(xch, index, host.as_ptr()) })
        })?;
        let guest = Parsed::new()?;
        self.call(OPERATION, None, |xch| {
            let count = policy.leaves.len() as u32;
            // SAFETY: there are as many leaves as said; they are only read, and checked.
            failed(unsafe {
                raw::xc_cpu_policy_update_cpuid(xch, guest.as_ptr(), policy.leaves.as_ptr(), count)
            })
        })?;
        self.call(OPERATION, None, |xch| {
            let count = policy.msrs.len() as u32;
            // SAFETY: there are as many registers as said; they are only read, and checked.
            failed(unsafe {
                raw::xc_cpu_policy_update_msrs(xch, guest.as_ptr(), policy.msrs.as_ptr(), count)
            })
        })?;
        let mut compatible = false;
        self.call(OPERATION, None, |xch| {
            // SAFETY: the handle is open, both policies are whole.
            compatible =
                unsafe { raw::xc_cpu_policy_is_compatible(xch, host.as_ptr(), guest.as_ptr()) };
            0
        })?;
        if !compatible {
            return Err(Incompatible::Exceeds {
                detail: self.handle.reported(),
            });
        }
        let host = self.serialised(OPERATION, &host)?;
        match cpu_features::lacks(&policy.leaves, &host.leaves) {
            None => Ok(()),
            Some(lack) => Err(Incompatible::Exceeds {
                detail: lack.to_string(),
            }),
        }
    }
}

/// These functions fail with any number but 0.
fn failed(result: i32) -> i32 {
    if result == 0 { 0 } else { -1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_survives_its_bytes() {
        let leaves: Vec<u8> = (0..48).collect();
        let msrs: Vec<u8> = (100..148).collect();
        let policy = CpuPolicy::from_bytes(&leaves, &msrs).unwrap();
        assert_eq!(policy.leaf_bytes(), leaves);
        assert_eq!(policy.msr_bytes(), msrs);
        assert_eq!(format!("{policy:?}"), "CpuPolicy { leaves: 2, msrs: 3 }");
    }

    #[test]
    fn lengths_are_checked() {
        assert!(CpuPolicy::from_bytes(&[], &[]).is_ok());
        assert!(CpuPolicy::from_bytes(&[0; 23], &[]).is_err());
        assert!(CpuPolicy::from_bytes(&[], &[0; 17]).is_err());
        assert!(CpuPolicy::from_bytes(&vec![0; 24 * 4097], &[]).is_err());
    }
}
