//! Guests' states for property tests.

use super::record::{MAX_HVM_PARAMS, VCPU_CONTEXT_SIZE};
use super::state::{DomainKind, GuestState, HvmState, PvState, PvVcpu, TscInfo};
use crate::pages::PAGE_SIZE;
use proptest::prelude::*;

fn bytes(length: usize) -> impl Strategy<Value = Vec<u8>> + Clone {
    any::<u8>().prop_map(move |byte| vec![byte; length])
}

fn tsc() -> impl Strategy<Value = TscInfo> {
    any::<(u32, u32, u64, u32)>().prop_map(|(mode, khz, nsec, incarnation)| TscInfo {
        mode,
        khz,
        nsec,
        incarnation,
    })
}

fn vcpus() -> impl Strategy<Value = Vec<PvVcpu>> {
    let some = prop_oneof![bytes(0), bytes(16), bytes(32), bytes(128)].boxed();
    let vcpu = (
        1u32..4,
        bytes(VCPU_CONTEXT_SIZE),
        some.clone(),
        some.clone(),
        some,
    );
    proptest::collection::vec(vcpu, 1..5).prop_map(|vcpus| {
        let mut next = 0;
        vcpus
            .into_iter()
            .map(|(step, basic, extended, xsave, msrs)| {
                let id = next;
                next += step;
                PvVcpu {
                    id,
                    basic,
                    extended,
                    xsave,
                    msrs,
                }
            })
            .collect()
    })
}

/// States of guests of all kinds.
pub(crate) fn states() -> impl Strategy<Value = GuestState> {
    prop_oneof![
        (tsc(), any::<u8>(), vcpus()).prop_map(|(tsc, byte, vcpus)| {
            GuestState::Pv(PvState {
                tsc,
                shared_info: Box::new([byte; PAGE_SIZE]),
                vcpus,
            })
        }),
        (tsc(), bytes(100), any::<Vec<(u64, u64)>>()).prop_map(|(tsc, context, mut params)| {
            params.truncate(MAX_HVM_PARAMS);
            GuestState::Hvm(HvmState {
                tsc,
                context,
                params,
            })
        }),
    ]
}

pub(crate) fn kind_of(state: &GuestState) -> DomainKind {
    match state {
        GuestState::Pv(_) => DomainKind::Pv64,
        GuestState::Hvm(_) => DomainKind::Hvm,
    }
}
