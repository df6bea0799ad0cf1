//! What the stream holds of a guest besides its memory: what never changes, and what the vCPUs
//! were at when the guest was suspended.

use super::record::{
    CPUID_LEAF_SIZE, MAX_CPUID_LEAVES, MAX_EXTENDED_SIZE, MAX_HVM_CONTEXT_SIZE, MAX_HVM_PARAMS,
    MAX_MSR_ENTRIES, MAX_VCPUS, MAX_XSAVE_SIZE, MIN_XSAVE_SIZE, MSR_ENTRY_SIZE, RecordType,
    VCPU_CONTEXT_SIZE,
};
use crate::bytes::{Bytes, Malformed};
use crate::pages::{PAGE_SIZE, Page};
use std::fmt;

/// State of a guest that does not hold together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// A record's length is not what its type asks for.
    #[error("{0:?} record has a wrong length of {1} bytes")]
    Length(RecordType, usize),
    /// A record stands where this kind of guest has none.
    #[error("{0:?} record does not belong there")]
    Misplaced(RecordType),
    /// A record came a second time.
    #[error("{0:?} record came twice")]
    Repeated(RecordType),
    /// A record is missing.
    #[error("{0:?} record is missing")]
    Missing(RecordType),
    /// A vCPU's number is beyond any guest's.
    #[error("No guest has a vCPU {0}")]
    NoSuchVcpu(u32),
    /// Words that have to be zero are not, or bytes are missing or too many.
    #[error("Guest state is malformed")]
    Malformed,
}

impl From<Malformed> for StateError {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

/// The kinds of guest that a stream tells apart. A PVH guest is an HVM guest here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainKind {
    /// A paravirtualised guest of 64 bits, with page tables of four levels.
    Pv64,
    /// A paravirtualised guest of 32 bits with PAE.
    Pv32,
    /// A guest with hardware-assisted paging.
    Hvm,
}

impl DomainKind {
    /// Bytes of a pointer, and levels of its page tables, for PV guests.
    #[must_use]
    pub const fn width_and_levels(self) -> Option<(u8, u8)> {
        match self {
            Self::Pv64 => Some((8, 4)),
            Self::Pv32 => Some((4, 3)),
            Self::Hvm => None,
        }
    }

    /// Pfns in one frame of a PV guest's p2m.
    #[must_use]
    pub const fn pfns_per_frame(self) -> Option<u64> {
        match self {
            Self::Pv64 => Some(512),
            Self::Pv32 => Some(1024),
            Self::Hvm => None,
        }
    }
}

/// What stays the same from the stream's first byte to its last.
#[derive(Clone, PartialEq, Eq)]
pub struct StaticData {
    /// The kind of the guest.
    pub kind: DomainKind,
    /// The Xen that it was saved on, major and minor.
    pub xen_version: (u32, u32),
    /// Its CPUID policy: an array of `xen_cpuid_leaf_t`. Left out of the stream when empty.
    pub cpuid_policy: Vec<u8>,
    /// Its MSR policy: an array of `xen_msr_entry_t`. Left out of the stream when empty.
    pub msr_policy: Vec<u8>,
}

impl fmt::Debug for StaticData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StaticData")
            .field("kind", &self.kind)
            .field("xen_version", &self.xen_version)
            .field("leaves", &(self.cpuid_policy.len() / CPUID_LEAF_SIZE))
            .field("msrs", &(self.msr_policy.len() / MSR_ENTRY_SIZE))
            .finish()
    }
}

impl StaticData {
    /// Checks the lengths of the policies.
    ///
    /// # Errors
    /// Fails when one is not an array of its entries, or longer than any.
    pub fn check(&self) -> Result<(), StateError> {
        check_array(
            RecordType::X86CpuidPolicy,
            self.cpuid_policy.len(),
            CPUID_LEAF_SIZE,
            MAX_CPUID_LEAVES,
        )?;
        check_array(
            RecordType::X86MsrPolicy,
            self.msr_policy.len(),
            MSR_ENTRY_SIZE,
            MAX_MSR_ENTRIES,
        )
    }
}

/// The time stamp counter as the guest sees it, as from `xc_domain_get_tsc_info`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TscInfo {
    /// One of Xen's `TSC_MODE_*`.
    pub mode: u32,
    /// Its frequency in kHz.
    pub khz: u32,
    /// The guest's time in nanoseconds.
    pub nsec: u64,
    /// How often the guest has moved.
    pub incarnation: u32,
}

/// A vCPU of a PV guest, with every mfn rewritten to a pfn.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PvVcpu {
    /// Its number.
    pub id: u32,
    /// `vcpu_guest_context_t`.
    pub basic: Vec<u8>,
    /// From get_ext_vcpucontext. May be empty.
    pub extended: Vec<u8>,
    /// From getvcpuextstate. May be empty.
    pub xsave: Vec<u8>,
    /// From get_vcpu_msrs: an array of `xen_domctl_vcpu_msr_t`. May be empty.
    pub msrs: Vec<u8>,
}

impl fmt::Debug for PvVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PvVcpu")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// What a suspended PV guest is besides its memory.
#[derive(Clone, PartialEq, Eq)]
pub struct PvState {
    /// Its time stamp counter.
    pub tsc: TscInfo,
    /// The page that it shares with Xen.
    pub shared_info: Box<Page>,
    /// Its online vCPUs, in ascending order; the first is 0.
    pub vcpus: Vec<PvVcpu>,
}

impl fmt::Debug for PvState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PvState")
            .field("tsc", &self.tsc)
            .field("vcpus", &self.vcpus.len())
            .finish_non_exhaustive()
    }
}

/// What a suspended HVM or PVH guest is besides its memory.
#[derive(Clone, PartialEq, Eq)]
pub struct HvmState {
    /// Its time stamp counter.
    pub tsc: TscInfo,
    /// From `xc_domain_hvm_getcontext`.
    pub context: Vec<u8>,
    /// Parameters that are not zero, by their indexes.
    pub params: Vec<(u64, u64)>,
}

impl fmt::Debug for HvmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HvmState")
            .field("tsc", &self.tsc)
            .field("context", &self.context.len())
            .field("params", &self.params.len())
            .finish()
    }
}

/// What a suspended guest is besides its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestState {
    /// Of a PV guest.
    Pv(PvState),
    /// Of an HVM or PVH guest.
    Hvm(HvmState),
}

impl GuestState {
    /// Calls `write` with each record and the two halves of its body, in the order that the
    /// stream has them. Records without content are left out.
    ///
    /// # Errors
    /// Fails when the state does not hold together, before the first record is written, or with
    /// what `write` returns.
    pub fn write_records<E: From<StateError>>(
        &self,
        mut write: impl FnMut(RecordType, &[u8], &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.check()?;
        let tsc = match self {
            Self::Pv(state) => state.tsc,
            Self::Hvm(state) => state.tsc,
        };
        let mut body = Vec::with_capacity(24);
        body.extend(tsc.mode.to_le_bytes());
        body.extend(tsc.khz.to_le_bytes());
        body.extend(tsc.nsec.to_le_bytes());
        body.extend(tsc.incarnation.to_le_bytes());
        body.extend([0; 4]);
        write(RecordType::X86TscInfo, &body, &[])?;

        match self {
            Self::Pv(state) => {
                write(RecordType::SharedInfo, &*state.shared_info, &[])?;
                for vcpu in &state.vcpus {
                    let mut head = [0; 8];
                    head[..4].copy_from_slice(&vcpu.id.to_le_bytes());
                    for (record, body) in vcpu.parts() {
                        if !body.is_empty() {
                            write(record, &head, body)?;
                        }
                    }
                }
            }
            Self::Hvm(state) => {
                write(RecordType::HvmContext, &state.context, &[])?;
                if !state.params.is_empty() {
                    let mut body = Vec::with_capacity(8 + state.params.len() * 16);
                    // Their number was checked.
                    body.extend((state.params.len() as u64).to_le_bytes());
                    for (index, value) in &state.params {
                        body.extend(index.to_le_bytes());
                        body.extend(value.to_le_bytes());
                    }
                    write(RecordType::HvmParams, &body, &[])?;
                }
            }
        }
        Ok(())
    }

    /// Checks lengths, and that what has to be there is.
    ///
    /// # Errors
    /// Fails on the first that is wrong.
    pub fn check(&self) -> Result<(), StateError> {
        match self {
            Self::Pv(state) => {
                if state.vcpus.first().is_none_or(|vcpu| vcpu.id != 0) {
                    return Err(StateError::Missing(RecordType::X86PvVcpuBasic));
                }
                if !state.vcpus.windows(2).all(|pair| pair[0].id < pair[1].id) {
                    return Err(StateError::Repeated(RecordType::X86PvVcpuBasic));
                }
                state.vcpus.iter().try_for_each(PvVcpu::check)
            }
            Self::Hvm(state) => {
                check_length(
                    RecordType::HvmContext,
                    state.context.len(),
                    1..=MAX_HVM_CONTEXT_SIZE,
                )?;
                check_length(
                    RecordType::HvmParams,
                    state.params.len(),
                    0..=MAX_HVM_PARAMS,
                )
            }
        }
    }
}

impl PvVcpu {
    fn parts(&self) -> [(RecordType, &[u8]); 4] {
        [
            (RecordType::X86PvVcpuBasic, &self.basic),
            (RecordType::X86PvVcpuExtended, &self.extended),
            (RecordType::X86PvVcpuXsave, &self.xsave),
            (RecordType::X86PvVcpuMsrs, &self.msrs),
        ]
    }

    fn check(&self) -> Result<(), StateError> {
        if self.id >= MAX_VCPUS {
            return Err(StateError::NoSuchVcpu(self.id));
        }
        if self.basic.is_empty() {
            return Err(StateError::Missing(RecordType::X86PvVcpuBasic));
        }
        for (record, body) in self.parts() {
            if !body.is_empty() {
                check_vcpu_record(record, body.len())?;
            }
        }
        Ok(())
    }
}

/// Checks the length of a vCPU's record, its head of 8 bytes not counted.
fn check_vcpu_record(record: RecordType, length: usize) -> Result<(), StateError> {
    match record {
        RecordType::X86PvVcpuBasic => {
            check_length(record, length, VCPU_CONTEXT_SIZE..=VCPU_CONTEXT_SIZE)
        }
        RecordType::X86PvVcpuExtended => check_length(record, length, 1..=MAX_EXTENDED_SIZE),
        RecordType::X86PvVcpuXsave => check_length(record, length, MIN_XSAVE_SIZE..=MAX_XSAVE_SIZE),
        RecordType::X86PvVcpuMsrs => check_array(record, length, MSR_ENTRY_SIZE, MAX_MSR_ENTRIES),
        _ => Err(StateError::Misplaced(record)),
    }
}

fn check_length(
    record: RecordType,
    length: usize,
    allowed: std::ops::RangeInclusive<usize>,
) -> Result<(), StateError> {
    if allowed.contains(&length) {
        Ok(())
    } else {
        Err(StateError::Length(record, length))
    }
}

fn check_array(
    record: RecordType,
    length: usize,
    entry: usize,
    most: usize,
) -> Result<(), StateError> {
    if length.is_multiple_of(entry) && length / entry <= most {
        Ok(())
    } else {
        Err(StateError::Length(record, length))
    }
}

/// Puts a guest's state together from records in any order.
#[derive(Debug, Default)]
pub struct GuestStateBuilder {
    tsc: Option<TscInfo>,
    shared_info: Option<Box<Page>>,
    vcpus: Vec<PvVcpu>,
    context: Option<Vec<u8>>,
    params: Option<Vec<(u64, u64)>>,
}

impl GuestStateBuilder {
    /// A builder that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a record. It holds no more than the record does.
    ///
    /// # Errors
    /// Fails when the record is malformed, came before, or is none of a guest's state.
    pub fn add(&mut self, record: RecordType, body: &[u8]) -> Result<(), StateError> {
        let mut from = Bytes::new(body);
        match record {
            RecordType::X86TscInfo => {
                check_length(record, body.len(), 24..=24)?;
                let tsc = TscInfo {
                    mode: from.u32()?,
                    khz: from.u32()?,
                    nsec: from.u64()?,
                    incarnation: from.u32()?,
                };
                put(record, &mut self.tsc, tsc)
            }
            RecordType::SharedInfo => {
                let page: &Page = body
                    .try_into()
                    .map_err(|_| StateError::Length(record, body.len()))?;
                put(record, &mut self.shared_info, Box::new(*page))
            }
            RecordType::HvmContext => {
                check_length(record, body.len(), 1..=MAX_HVM_CONTEXT_SIZE)?;
                put(record, &mut self.context, body.to_vec())
            }
            RecordType::HvmParams => {
                let count = from.u32()? as usize;
                from.u32()?;
                check_length(record, count, 0..=MAX_HVM_PARAMS)?;
                check_length(record, from.rest().len(), count * 16..=count * 16)?;
                let params = (0..count)
                    .map(|_| Ok((from.u64()?, from.u64()?)))
                    .collect::<Result<_, Malformed>>()?;
                put(record, &mut self.params, params)
            }
            _ => self.add_vcpu(record, body),
        }
    }

    fn add_vcpu(&mut self, record: RecordType, body: &[u8]) -> Result<(), StateError> {
        let mut from = Bytes::new(body);
        // Another record than a vCPU's is an error whatever is in it.
        if check_vcpu_record(record, 0) == Err(StateError::Misplaced(record)) {
            return Err(StateError::Misplaced(record));
        }
        let id = from.u32()?;
        from.u32()?;
        let content = from.rest();
        // Xen 4.6 to 4.8 wrote such.
        if content.is_empty() {
            return Ok(());
        }
        check_vcpu_record(record, content.len())?;
        if id >= MAX_VCPUS {
            return Err(StateError::NoSuchVcpu(id));
        }
        let at = match self.vcpus.binary_search_by_key(&id, |vcpu| vcpu.id) {
            Ok(at) => at,
            Err(at) => {
                self.vcpus.insert(
                    at,
                    PvVcpu {
                        id,
                        ..PvVcpu::default()
                    },
                );
                at
            }
        };
        let vcpu = &mut self.vcpus[at];
        let place = match record {
            RecordType::X86PvVcpuBasic => &mut vcpu.basic,
            RecordType::X86PvVcpuExtended => &mut vcpu.extended,
            RecordType::X86PvVcpuXsave => &mut vcpu.xsave,
            _ => &mut vcpu.msrs,
        };
        if !place.is_empty() {
            return Err(StateError::Repeated(record));
        }
        *place = content.to_vec();
        Ok(())
    }

    /// The state of a guest of that kind.
    ///
    /// # Errors
    /// Fails when something is missing, or belongs to the other kind.
    pub fn finish(self, kind: DomainKind) -> Result<GuestState, StateError> {
        let tsc = self
            .tsc
            .ok_or(StateError::Missing(RecordType::X86TscInfo))?;
        let state = if kind == DomainKind::Hvm {
            if self.shared_info.is_some() {
                return Err(StateError::Misplaced(RecordType::SharedInfo));
            }
            if !self.vcpus.is_empty() {
                return Err(StateError::Misplaced(RecordType::X86PvVcpuBasic));
            }
            GuestState::Hvm(HvmState {
                tsc,
                context: self
                    .context
                    .ok_or(StateError::Missing(RecordType::HvmContext))?,
                params: self.params.unwrap_or_default(),
            })
        } else {
            if self.context.is_some() || self.params.is_some() {
                return Err(StateError::Misplaced(RecordType::HvmContext));
            }
            GuestState::Pv(PvState {
                tsc,
                shared_info: self
                    .shared_info
                    .ok_or(StateError::Missing(RecordType::SharedInfo))?,
                vcpus: self.vcpus,
            })
        };
        state.check()?;
        Ok(state)
    }
}

fn put<T>(record: RecordType, place: &mut Option<T>, value: T) -> Result<(), StateError> {
    if place.is_some() {
        return Err(StateError::Repeated(record));
    }
    *place = Some(value);
    Ok(())
}

const _: () = assert!(PAGE_SIZE == 4096, "SHARED_INFO is one page");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::xen::stream::samples;
    use proptest::prelude::*;

    fn records(state: &GuestState) -> Vec<(RecordType, Vec<u8>)> {
        let mut records = Vec::new();
        state
            .write_records(|record, head, body| {
                records.push((record, [head, body].concat()));
                Ok::<_, StateError>(())
            })
            .unwrap();
        records
    }

    fn build(
        records: &[(RecordType, Vec<u8>)],
        kind: DomainKind,
    ) -> Result<GuestState, StateError> {
        let mut builder = GuestStateBuilder::new();
        for (record, body) in records {
            builder.add(*record, body)?;
        }
        builder.finish(kind)
    }

    #[test]
    fn debug_shows_no_register() {
        let vcpu = PvVcpu {
            id: 3,
            basic: vec![0xaa; VCPU_CONTEXT_SIZE],
            ..PvVcpu::default()
        };
        let shown = format!("{vcpu:?}");
        assert!(!shown.contains("170"), "{shown}");
    }

    proptest! {
        #[test]
        fn state_comes_back_from_its_records(state in samples::states()) {
            let kind = samples::kind_of(&state);
            let written = records(&state);
            prop_assert_eq!(build(&written, kind), Ok(state.clone()));
            // In any order, but none twice.
            let reversed: Vec<_> = written.iter().rev().cloned().collect();
            prop_assert_eq!(build(&reversed, kind), Ok(state));
            for record in &written {
                let mut twice = written.clone();
                twice.push(record.clone());
                prop_assert!(matches!(build(&twice, kind), Err(StateError::Repeated(_))));
            }
        }

        #[test]
        fn a_record_of_another_length_is_refused(state in samples::states()) {
            let written = records(&state);
            for (record, body) in &written {
                if *record == RecordType::HvmContext {
                    continue;
                }
                let shorter = &body[..body.len() - 1];
                let longer = [body.as_slice(), &[0; MAX_EXTENDED_SIZE]].concat();
                let mut builder = GuestStateBuilder::new();
                if !matches!(record, RecordType::X86PvVcpuExtended | RecordType::X86PvVcpuXsave) {
                    prop_assert!(builder.add(*record, shorter).is_err());
                }
                if !matches!(record, RecordType::X86PvVcpuMsrs | RecordType::X86PvVcpuXsave) {
                    prop_assert!(builder.add(*record, &longer).is_err());
                }
            }
        }

        #[test]
        fn needed_records_are_missed(state in samples::states()) {
            let kind = samples::kind_of(&state);
            let written = records(&state);
            for without in [
                RecordType::X86TscInfo,
                RecordType::SharedInfo,
                RecordType::X86PvVcpuBasic,
                RecordType::HvmContext,
            ] {
                let mut rest = written.clone();
                rest.retain(|(record, _)| *record != without);
                if rest.len() < written.len() {
                    prop_assert!(matches!(build(&rest, kind), Err(StateError::Missing(_))));
                }
            }
            let other = if kind == DomainKind::Hvm { DomainKind::Pv64 } else { DomainKind::Hvm };
            prop_assert!(matches!(build(&written, other), Err(StateError::Misplaced(_))));
        }
    }
}
