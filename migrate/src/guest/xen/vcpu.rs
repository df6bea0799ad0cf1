//! The state of a PV guest's virtual CPUs, as the restoring side wants it.
//!
//! For each vCPU that is online: its basic context with every machine frame turned into a pfn,
//! then what Xen has of extended, xsave and MSR state. Machine frames are in vCPU 0's rdx
//! (start_info, by the suspend hypercall's convention), the GDT's frames, CR3, and CR1 (the
//! user-mode page tables of a 64-bit guest).

use xen_sys::DomId;
use xen_sys::ctl::Ctl;

use super::stream::state::PvVcpu;
use crate::error::{Error, IoContext, Result};

/// Entries of a GDT that belong to the guest; above them are Xen's.
const GUEST_GDT_ENTRIES: u64 = 14 * 512;

/// The control register that holds the kernel's page tables.
const KERNEL_TABLES: usize = 3;

/// The control register in whose place Xen keeps the user-mode page tables.
const USER_TABLES: usize = 1;

/// The state of vCPU `id`; `None` where it is offline. `pfn` translates a machine frame.
///
/// # Errors
/// What Xen refuses; [`Error::Guest`] for a frame that isn't the guest's.
pub fn state(
    ctl: &Ctl,
    domid: DomId,
    id: u32,
    pfn: impl Fn(u64) -> Option<u64>,
) -> Result<Option<PvVcpu>> {
    let doing = || format!("Can't read the state of vCPU {id}");
    if !ctl.vcpu_info(domid, id).context(doing)?.online {
        return Ok(None);
    }
    let bad = |what: &str| Error::Guest {
        what: format!("vCPU {id} has a bad {what}"),
    };
    let mut context = ctl.vcpu_context(domid, id).context(doing)?;
    if id == 0 {
        let start_info = pfn(context.rdx()).ok_or_else(|| bad("start_info"))?;
        context.set_rdx(start_info);
    }
    let entries = context.gdt_entries();
    if entries > GUEST_GDT_ENTRIES {
        return Err(bad("GDT"));
    }
    for index in 0..entries.div_ceil(512) as usize {
        let frame = context
            .gdt_frame(index)
            .and_then(&pfn)
            .ok_or_else(|| bad("GDT frame"))?;
        context.set_gdt_frame(index, frame);
    }
    let control = |number| context.control_register(number).unwrap_or(0);
    let (kernel, user) = (control(KERNEL_TABLES), control(USER_TABLES));
    let frame = pfn(kernel >> 12).ok_or_else(|| bad("CR3"))?;
    context.set_control_register(KERNEL_TABLES, frame << 12);
    if user != 0 {
        let frame = pfn(user >> 12).ok_or_else(|| bad("CR1"))?;
        // Bit 0 says that there is one.
        context.set_control_register(USER_TABLES, frame << 12 | 1);
    }
    Ok(Some(PvVcpu {
        id,
        basic: context.as_bytes().to_vec(),
        extended: ctl.vcpu_extended(domid, id).context(doing)?,
        xsave: ctl.vcpu_xsave(domid, id).context(doing)?,
        msrs: ctl.vcpu_msrs(domid, id).context(doing)?,
    }))
}
