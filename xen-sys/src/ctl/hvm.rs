//! The state of PVH and HVM domains outside of their memory.

use std::ptr;

use super::Ctl;
use crate::{DomId, Error, Result, raw};

/// The parameters that the stock saver writes (HVM_PARAMS), in its order; those that are 0 are
/// left out.
pub const MIGRATED_HVM_PARAMS: [u32; 16] = [
    raw::HVM_PARAM_STORE_PFN,
    raw::HVM_PARAM_IOREQ_PFN,
    raw::HVM_PARAM_BUFIOREQ_PFN,
    raw::HVM_PARAM_PAGING_RING_PFN,
    raw::HVM_PARAM_MONITOR_RING_PFN,
    raw::HVM_PARAM_SHARING_RING_PFN,
    raw::HVM_PARAM_VM86_TSS_SIZED,
    raw::HVM_PARAM_CONSOLE_PFN,
    raw::HVM_PARAM_ACPI_IOPORTS_LOCATION,
    raw::HVM_PARAM_VIRIDIAN,
    raw::HVM_PARAM_IDENT_PT,
    raw::HVM_PARAM_VM_GENERATION_ID_ADDR,
    raw::HVM_PARAM_IOREQ_SERVER_PFN,
    raw::HVM_PARAM_NR_IOREQ_SERVER_PAGES,
    raw::HVM_PARAM_X87_FIP_WIDTH,
    raw::HVM_PARAM_MCA_CAP,
];

/// The parameters that name guest frames which other domains write to at any time, and which a
/// restore empties: the rings of xenstore, the console and the device model.
pub const RING_HVM_PARAMS: [u32; 4] = [
    raw::HVM_PARAM_STORE_PFN,
    raw::HVM_PARAM_CONSOLE_PFN,
    raw::HVM_PARAM_IOREQ_PFN,
    raw::HVM_PARAM_BUFIOREQ_PFN,
];

/// Memory of a domain that gets its pages only when it touches them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OnDemand {
    /// Guest frames without a page so far. Merely to look at one gives it a page.
    pub entries: u64,
    /// Pages that are put by for them.
    pub cached: u64,
}

/// Operations on PVH and HVM domains.
impl Ctl {
    /// How much of the domain's memory is populated on demand, still. That is how a domain begins
    /// that may have more memory than it is given.
    ///
    /// # Errors
    ///
    /// There is no such domain, it is PV, or the hypervisor refused.
    pub fn on_demand(&self, domain: DomId) -> Result<OnDemand> {
        let mut found = OnDemand::default();
        let mut all = 0;
        self.call("ask for memory populated on demand", domain, |xch| {
            // SAFETY: the handle is open, and the numbers are ours.
            unsafe {
                raw::xc_domain_get_pod_target(
                    xch,
                    domain.get(),
                    &mut all,
                    &mut found.cached,
                    &mut found.entries,
                )
            }
        })?;
        Ok(found)
    }

    /// The state of the virtual hardware, as the record HVM_CONTEXT stores it.
    ///
    /// # Errors
    ///
    /// There is no such domain, it is PV (`EINVAL`), or the hypervisor refused.
    pub fn hvm_context(&self, domain: DomId) -> Result<Vec<u8>> {
        const OPERATION: &str = "fetch the virtual hardware's state";
        let size = self.call(OPERATION, domain, |xch| {
            // SAFETY: without a buffer, the call answers the size.
            unsafe { raw::xc_domain_hvm_getcontext(xch, domain.get(), ptr::null_mut(), 0) }
        })?;
        let mut context = vec![0u8; size.unsigned_abs() as usize];
        let filled = self.call(OPERATION, domain, |xch| {
            // SAFETY: the buffer is as long as said.
            unsafe {
                raw::xc_domain_hvm_getcontext(
                    xch,
                    domain.get(),
                    context.as_mut_ptr(),
                    size.unsigned_abs(),
                )
            }
        })?;
        if filled > size {
            return Err(Error::Unexpected {
                operation: OPERATION,
                domain: Some(domain),
                what: "the hypervisor reports more than the buffer holds".to_owned(),
            });
        }
        context.truncate(filled.unsigned_abs() as usize);
        Ok(context)
    }

    /// A parameter of the domain (`HVM_PARAM_*` in [`raw`]).
    ///
    /// # Errors
    ///
    /// There is no such domain, it is PV, there is no such parameter (`EINVAL`), or the
    /// hypervisor refused.
    pub fn hvm_param(&self, domain: DomId, index: u32) -> Result<u64> {
        let mut value = 0;
        self.call("fetch a parameter of the domain", domain, |xch| {
            // SAFETY: the handle is open.
            unsafe { raw::xc_hvm_param_get(xch, domain.get(), index, &mut value) }
        })?;
        Ok(value)
    }
}
