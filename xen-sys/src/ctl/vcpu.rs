//! A vCPU's state.

use std::fmt;
use std::mem::MaybeUninit;
use std::ptr;

use super::Ctl;
use super::buffer::HypercallBuffer;
use crate::{DomId, Error, Result, raw};

/// What the scheduler says of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuInfo {
    /// The guest has brought it up; only these have a state to move.
    pub online: bool,
    /// It waits for an event.
    pub blocked: bool,
    /// It runs right now.
    pub running: bool,
    /// The CPU time that it has had, in ns.
    pub cpu_time: u64,
    /// The physical CPU that it was last on.
    pub cpu: u32,
}

/// The registers of a vCPU of a 64-bit PV guest: Xen's `vcpu_guest_context`, 5,168 bytes, as the
/// record X86_PV_VCPU_BASIC stores it.
///
/// As fetched, frames in it are machine frames; the stream wants pfns in their place.
#[derive(Clone, PartialEq, Eq)]
pub struct VcpuContext {
    // Bytes, not the structure: it has gaps, and a gap's bytes get lost when a structure is moved.
    bytes: Box<[u8; VcpuContext::SIZE]>,
}

/// Where the fields are that are read or changed on a move.
mod offset {
    use std::mem::offset_of;

    use crate::raw::{cpu_user_regs_x86_64, vcpu_guest_context_x86_64};

    pub(super) const RDX: usize = offset_of!(vcpu_guest_context_x86_64, user_regs)
        + offset_of!(cpu_user_regs_x86_64, __bindgen_anon_13);
    pub(super) const GDT_FRAMES: usize = offset_of!(vcpu_guest_context_x86_64, gdt_frames);
    pub(super) const GDT_ENTRIES: usize = offset_of!(vcpu_guest_context_x86_64, gdt_ents);
    pub(super) const CONTROL_REGISTERS: usize = offset_of!(vcpu_guest_context_x86_64, ctrlreg);
}

impl VcpuContext {
    /// The size of the structure in bytes.
    pub const SIZE: usize = size_of::<raw::vcpu_guest_context_x86_64_t>();
    /// The most frames that a global descriptor table has.
    pub const GDT_FRAMES: usize = 16;
    /// The control registers that the structure has room for.
    pub const CONTROL_REGISTERS: usize = 8;

    /// A context of its bytes.
    pub fn from_bytes(bytes: &[u8; VcpuContext::SIZE]) -> VcpuContext {
        VcpuContext {
            bytes: Box::new(*bytes),
        }
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; VcpuContext::SIZE] {
        &self.bytes
    }

    /// The register rdx: of a suspended guest's vCPU 0, the frame of its start info page.
    pub fn rdx(&self) -> u64 {
        self.word(offset::RDX)
    }

    /// Sets the register rdx.
    pub fn set_rdx(&mut self, value: u64) {
        self.set_word(offset::RDX, value);
    }

    /// A control register, 0 to 7; `None` beyond.
    ///
    /// 3 is the address of the kernel's page tables, 1 that of the user's, in a format of Xen's
    /// own.
    pub fn control_register(&self, number: usize) -> Option<u64> {
        (number < VcpuContext::CONTROL_REGISTERS)
            .then(|| self.word(offset::CONTROL_REGISTERS + 8 * number))
    }

    /// Sets a control register; does nothing beyond 7.
    pub fn set_control_register(&mut self, number: usize, value: u64) {
        if number < VcpuContext::CONTROL_REGISTERS {
            self.set_word(offset::CONTROL_REGISTERS + 8 * number, value);
        }
    }

    /// How many entries the global descriptor table has, 512 to a frame. From the guest: check
    /// it before use.
    pub fn gdt_entries(&self) -> u64 {
        self.word(offset::GDT_ENTRIES)
    }

    /// A frame of the global descriptor table, 0 to 15; `None` beyond.
    pub fn gdt_frame(&self, number: usize) -> Option<u64> {
        (number < VcpuContext::GDT_FRAMES).then(|| self.word(offset::GDT_FRAMES + 8 * number))
    }

    /// Sets a frame of the global descriptor table; does nothing beyond 15.
    pub fn set_gdt_frame(&mut self, number: usize, frame: u64) {
        if number < VcpuContext::GDT_FRAMES {
            self.set_word(offset::GDT_FRAMES + 8 * number, frame);
        }
    }

    fn word(&self, offset: usize) -> u64 {
        let bytes = self.bytes.get(offset..).and_then(<[u8]>::first_chunk);
        bytes.copied().map_or(0, u64::from_le_bytes)
    }

    fn set_word(&mut self, offset: usize, value: u64) {
        if let Some(bytes) = self
            .bytes
            .get_mut(offset..)
            .and_then(<[u8]>::first_chunk_mut)
        {
            *bytes = value.to_le_bytes();
        }
    }
}

impl fmt::Debug for VcpuContext {
    // Registers are guest data: not for logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuContext").finish_non_exhaustive()
    }
}

/// Operations on vCPUs.
impl Ctl {
    /// What the scheduler says of a vCPU.
    ///
    /// # Errors
    ///
    /// There is no such domain (`ESRCH`), no such vCPU (`EINVAL`, `ESRCH`), or the hypervisor
    /// refused.
    pub fn vcpu_info(&self, domain: DomId, vcpu: u32) -> Result<VcpuInfo> {
        let mut info = raw::xc_vcpuinfo_t::default();
        self.call("ask for a vCPU's state", domain, |xch| {
            // SAFETY: the handle is open, and the structure is whole.
            unsafe { raw::xc_vcpu_getinfo(xch, domain.get(), vcpu, &mut info) }
        })?;
        Ok(VcpuInfo {
            online: info.online != 0,
            blocked: info.blocked != 0,
            running: info.running != 0,
            cpu_time: info.cpu_time,
            cpu: info.cpu,
        })
    }

    /// A vCPU's registers. Of meaning for 64-bit guests only: see
    /// [`guest_width`](Ctl::guest_width).
    ///
    /// # Errors
    ///
    /// There is no such domain or vCPU, the vCPU was never up (`ENODATA`), or the hypervisor
    /// refused.
    pub fn vcpu_context(&self, domain: DomId, vcpu: u32) -> Result<VcpuContext> {
        let mut context = Box::new(MaybeUninit::<raw::vcpu_guest_context_any_t>::zeroed());
        self.call("fetch a vCPU's registers", domain, |xch| {
            // SAFETY: the handle is open, and the union has room for every form.
            unsafe { raw::xc_vcpu_getcontext(xch, domain.get(), vcpu, context.as_mut_ptr()) }
        })?;
        // SAFETY: the union holds at least as many bytes (the layout test sees to it), which were
        // zeroed before they were filled. A copy of bytes keeps those in gaps.
        let bytes = unsafe { ptr::read(context.as_ptr().cast::<[u8; VcpuContext::SIZE]>()) };
        Ok(VcpuContext::from_bytes(&bytes))
    }

    /// A vCPU's extended state (system call entries, machine checks), as the record
    /// X86_PV_VCPU_EXTENDED stores it after the vCPU's number; empty if there is none.
    ///
    /// # Errors
    ///
    /// There is no such domain or vCPU, or the hypervisor refused.
    pub fn vcpu_extended(&self, domain: DomId, vcpu: u32) -> Result<Vec<u8>> {
        const OPERATION: &str = "fetch a vCPU's extended state";
        let domctl = self.domctl(
            OPERATION,
            domain,
            raw::XEN_DOMCTL_get_ext_vcpucontext,
            |domctl| {
                domctl.u.ext_vcpucontext.vcpu = vcpu;
            },
        )?;
        // SAFETY: this is the member that the command uses, and it is plain data.
        let size = unsafe { domctl.u.ext_vcpucontext.size } as usize;
        // SAFETY: the whole union as bytes, which were zeroed before they were filled.
        let bytes = unsafe { domctl.u.pad };
        match bytes.get(..size) {
            Some(bytes) => Ok(bytes.to_vec()),
            None => Err(too_much(OPERATION, domain)),
        }
    }

    /// A vCPU's floating point and vector state, as the record X86_PV_VCPU_XSAVE stores it after
    /// the vCPU's number; empty if there is none.
    ///
    /// # Errors
    ///
    /// There is no such domain or vCPU, or the hypervisor refused.
    pub fn vcpu_xsave(&self, domain: DomId, vcpu: u32) -> Result<Vec<u8>> {
        const OPERATION: &str = "fetch a vCPU's vector state";
        const COMMAND: u32 = raw::XEN_DOMCTL_getvcpuextstate;
        let query = self.domctl(OPERATION, domain, COMMAND, |domctl| {
            domctl.u.vcpuextstate.vcpu = vcpu;
        })?;
        // SAFETY: this is the member that the command uses, and it is plain data.
        let query = unsafe { query.u.vcpuextstate };
        if query.xfeature_mask == 0 || query.size == 0 {
            return Ok(Vec::new());
        }
        let mut buffer = self.buffer(OPERATION, domain, query.size)?;
        let handle = raw::__guest_handle_uint64 {
            p: buffer.as_mut_ptr(),
        };
        let answer = self.domctl(OPERATION, domain, COMMAND, |domctl| {
            domctl.u.vcpuextstate = raw::xen_domctl_vcpuextstate {
                buffer: handle,
                ..query
            };
        })?;
        // SAFETY: as above.
        let size = unsafe { answer.u.vcpuextstate.size };
        buffer.filled(OPERATION, size)
    }

    /// A vCPU's model-specific registers, 16 bytes each, as the record X86_PV_VCPU_MSRS stores
    /// them after the vCPU's number; empty if there are none. PV only.
    ///
    /// # Errors
    ///
    /// There is no such domain or vCPU, it is not PV (`EINVAL`), or the hypervisor refused.
    pub fn vcpu_msrs(&self, domain: DomId, vcpu: u32) -> Result<Vec<u8>> {
        const OPERATION: &str = "fetch a vCPU's model-specific registers";
        const COMMAND: u32 = raw::XEN_DOMCTL_get_vcpu_msrs;
        const SIZE: u64 = size_of::<raw::xen_domctl_vcpu_msr_t>() as u64;
        let query = self.domctl(OPERATION, domain, COMMAND, |domctl| {
            domctl.u.vcpu_msrs.vcpu = vcpu;
        })?;
        // SAFETY: this is the member that the command uses, and it is plain data.
        let query = unsafe { query.u.vcpu_msrs };
        if query.msr_count == 0 {
            return Ok(Vec::new());
        }
        let mut buffer = self.buffer(OPERATION, domain, u64::from(query.msr_count) * SIZE)?;
        let handle = raw::__guest_handle_xen_domctl_vcpu_msr_t {
            p: buffer.as_mut_ptr(),
        };
        let answer = self.domctl(OPERATION, domain, COMMAND, |domctl| {
            domctl.u.vcpu_msrs = raw::xen_domctl_vcpu_msrs {
                msrs: handle,
                ..query
            };
        })?;
        // SAFETY: as above.
        let count = unsafe { answer.u.vcpu_msrs.msr_count };
        buffer.filled(OPERATION, u64::from(count) * SIZE)
    }

    fn buffer(
        &self,
        operation: &'static str,
        domain: DomId,
        bytes: u64,
    ) -> Result<HypercallBuffer> {
        // No state of a vCPU is anywhere near this: a mistake, not a reason to allocate.
        const MOST: u64 = 16 << 20;
        match usize::try_from(bytes) {
            Ok(size) if bytes <= MOST => HypercallBuffer::new(&self.handle, size),
            _ => Err(too_much(operation, domain)),
        }
    }
}

fn too_much(operation: &'static str, domain: DomId) -> Error {
    Error::Unexpected {
        operation,
        domain: Some(domain),
        what: "the hypervisor reports an impossible size".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_survives_its_bytes() {
        let bytes: [u8; VcpuContext::SIZE] = std::array::from_fn(|i| (i % 251) as u8);
        assert_eq!(VcpuContext::from_bytes(&bytes).as_bytes(), &bytes);
    }

    #[test]
    fn fields_are_where_the_stream_has_them() {
        let mut context = VcpuContext::from_bytes(&[0; VcpuContext::SIZE]);
        context.set_rdx(0x1111_2222_3333_4444);
        context.set_control_register(3, 0x5555);
        context.set_control_register(8, 1);
        context.set_gdt_frame(15, 0x7777);
        context.set_gdt_frame(16, 1);
        assert_eq!(context.rdx(), 0x1111_2222_3333_4444);
        assert_eq!(context.control_register(3), Some(0x5555));
        assert_eq!(context.control_register(8), None);
        assert_eq!(context.gdt_frame(15), Some(0x7777));
        assert_eq!(context.gdt_frame(16), None);
        assert_eq!(context.gdt_entries(), 0);

        let again = VcpuContext::from_bytes(context.as_bytes());
        assert_eq!(again, context);
        assert!(!format!("{again:?}").contains("5555"));
    }
}
