//! Small streams for checkers of the format.

use migrate::guest::xen::stream::record::{CPUID_LEAF_SIZE, MSR_ENTRY_SIZE, VCPU_CONTEXT_SIZE};
use migrate::guest::xen::stream::state::{
    DomainKind, GuestState, HvmState, PvState, PvVcpu, StaticData, TscInfo,
};
use migrate::guest::xen::stream::{Framing, StreamError, StreamPage, StreamWriter};
use migrate::pages::{PAGE_SIZE, PageType, Pfn};
use std::io::Write;

/// Writes the stream of a PV guest that never was: pages of all types up to `max_pfn`, two
/// rounds, two vCPUs.
pub fn write(to: impl Write, framing: Framing, max_pfn: Pfn) -> Result<(), StreamError> {
    let data = StaticData {
        kind: DomainKind::Pv64,
        xen_version: (4, 17),
        cpuid_policy: vec![0; 5 * CPUID_LEAF_SIZE],
        msr_policy: vec![0; 2 * MSR_ENTRY_SIZE],
    };
    let mut writer = StreamWriter::begin(to, framing, &data)?;
    let frames: Vec<Pfn> = (0..=max_pfn / 512).collect();
    // Two rounds: the p2m and some pages come again.
    for round in 1..=2u8 {
        writer.p2m_frames(max_pfn, &frames)?;
        let contents: Vec<_> = (0..=max_pfn)
            .map(|pfn| [pfn as u8 ^ round; PAGE_SIZE])
            .collect();
        let pages: Vec<_> = (0..=max_pfn)
            .zip(&contents)
            .filter(|(pfn, _)| pfn.is_multiple_of(round.into()))
            .map(|(pfn, content)| {
                let page_type = PageType::ALL[pfn as usize % PageType::ALL.len()];
                StreamPage {
                    pfn,
                    page_type,
                    content: page_type.has_data().then_some(content),
                }
            })
            .collect();
        for record in pages.chunks(1024) {
            writer.pages(record)?;
        }
    }
    let vcpus = (0..2)
        .map(|id| PvVcpu {
            id,
            basic: vec![0; VCPU_CONTEXT_SIZE],
            extended: vec![0; 128],
            xsave: vec![0; 832 + 16],
            msrs: vec![0; MSR_ENTRY_SIZE],
        })
        .collect();
    let tsc = TscInfo {
        mode: 0,
        khz: 2_400_000,
        nsec: 1_000_000_000,
        incarnation: 1,
    };
    let shared_info = Box::new([0; PAGE_SIZE]);
    writer.finish(&GuestState::Pv(PvState {
        tsc,
        shared_info,
        vcpus,
    }))?;
    Ok(())
}

/// Writes the stream of a PVH guest that never was: memory up to `max_pfn` with a hole in it, the
/// special pages far above, two rounds.
// The examples and tests that share this file don't need both.
#[allow(dead_code)]
pub fn write_pvh(to: impl Write, framing: Framing, max_pfn: Pfn) -> Result<(), StreamError> {
    const SPECIAL: Pfn = 0xfeff8;
    let data = StaticData {
        kind: DomainKind::Hvm,
        xen_version: (4, 17),
        cpuid_policy: vec![0; 5 * CPUID_LEAF_SIZE],
        msr_policy: vec![0; 2 * MSR_ENTRY_SIZE],
    };
    let mut writer = StreamWriter::begin(to, framing, &data)?;
    for round in 1..=2u8 {
        let content = [round; PAGE_SIZE];
        let pages: Vec<_> = (0..=max_pfn)
            .chain(SPECIAL..SPECIAL + 8)
            .filter(|pfn| pfn.is_multiple_of(round.into()))
            .map(|pfn| {
                let hole = pfn == max_pfn / 2;
                StreamPage {
                    pfn,
                    page_type: if hole {
                        PageType::Invalid
                    } else {
                        PageType::Normal
                    },
                    content: (!hole).then_some(&content),
                }
            })
            .collect();
        for record in pages.chunks(1024) {
            writer.pages(record)?;
        }
    }
    let tsc = TscInfo {
        mode: 0,
        khz: 2_400_000,
        nsec: 1_000_000_000,
        incarnation: 1,
    };
    // The rings of xenstore and the console.
    let params = vec![(1, SPECIAL + 4), (17, SPECIAL + 7)];
    writer.finish(&GuestState::Hvm(HvmState {
        tsc,
        context: vec![0; 4912],
        params,
    }))?;
    Ok(())
}
