//! The records of the libxc image: their numbers and how long they may be.

/// The records of the libxc image, by their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
#[allow(missing_docs, reason = "the specification's own names")]
pub enum RecordType {
    End = 0x00,
    PageData = 0x01,
    X86PvInfo = 0x02,
    X86PvP2mFrames = 0x03,
    X86PvVcpuBasic = 0x04,
    X86PvVcpuExtended = 0x05,
    X86PvVcpuXsave = 0x06,
    SharedInfo = 0x07,
    X86TscInfo = 0x08,
    HvmContext = 0x09,
    HvmParams = 0x0a,
    Toolstack = 0x0b,
    X86PvVcpuMsrs = 0x0c,
    Verify = 0x0d,
    Checkpoint = 0x0e,
    CheckpointDirtyPfnList = 0x0f,
    StaticDataEnd = 0x10,
    X86CpuidPolicy = 0x11,
    X86MsrPolicy = 0x12,
}

impl RecordType {
    const ALL: [Self; 19] = [
        Self::End,
        Self::PageData,
        Self::X86PvInfo,
        Self::X86PvP2mFrames,
        Self::X86PvVcpuBasic,
        Self::X86PvVcpuExtended,
        Self::X86PvVcpuXsave,
        Self::SharedInfo,
        Self::X86TscInfo,
        Self::HvmContext,
        Self::HvmParams,
        Self::Toolstack,
        Self::X86PvVcpuMsrs,
        Self::Verify,
        Self::Checkpoint,
        Self::CheckpointDirtyPfnList,
        Self::StaticDataEnd,
        Self::X86CpuidPolicy,
        Self::X86MsrPolicy,
    ];

    /// The type with a number, if the specification has one.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// The type's number.
    #[must_use]
    pub const fn number(self) -> u32 {
        self as u32
    }
}

/// Bytes of an `xen_cpuid_leaf_t`.
pub const CPUID_LEAF_SIZE: usize = 24;
/// Bytes of an `xen_msr_entry_t`, and of an `xen_domctl_vcpu_msr_t`.
pub const MSR_ENTRY_SIZE: usize = 16;
/// Bytes of a 64-bit guest's `vcpu_guest_context_t`.
pub const VCPU_CONTEXT_SIZE: usize = 5168;
/// The most bytes of a vCPU's extended context.
pub const MAX_EXTENDED_SIZE: usize = 128;
/// The fewest bytes of a vCPU's XSAVE context.
pub const MIN_XSAVE_SIZE: usize = 16;
/// The most bytes of a vCPU's XSAVE context: all that processors have today fits several times.
pub const MAX_XSAVE_SIZE: usize = 64 << 10;
/// The most vCPUs of a PV guest (`MAX_VIRT_CPUS`).
pub const MAX_VCPUS: u32 = 8192;
/// The most leaves in a CPUID policy, far more than Xen serialises.
pub const MAX_CPUID_LEAVES: usize = 4096;
/// The most entries in an MSR policy or in a vCPU's MSRs.
pub const MAX_MSR_ENTRIES: usize = 1024;
/// The most bytes of an HVM context, far more than Xen's for its largest guests.
pub const MAX_HVM_CONTEXT_SIZE: usize = 8 << 20;
/// The most HVM parameters. Xen has fewer than 64.
pub const MAX_HVM_PARAMS: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_specifications() {
        for (record, number) in RecordType::ALL.into_iter().zip(0..) {
            assert_eq!(record.number(), number);
            assert_eq!(RecordType::from_number(number), Some(record));
        }
        assert_eq!(RecordType::from_number(0x13), None);
    }
}
