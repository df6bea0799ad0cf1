//! What a peer may say of a PVH guest's parameters.

use xen_sys::ctl::{MIGRATED_HVM_PARAMS, RING_HVM_PARAMS};

use crate::error::{Error, Result};

/// A PVH guest's parameters are those that a saver writes, each once: with others a peer could give
/// the new domain powers that its configuration doesn't.
pub(super) fn check_params(params: &[(u64, u64)]) -> Result<()> {
    let mut left: Vec<u32> = MIGRATED_HVM_PARAMS.to_vec();
    for (index, _) in params {
        let place = left.iter().position(|known| u64::from(*known) == *index);
        match place {
            Some(place) => left.swap_remove(place),
            None => {
                return Err(Error::Guest {
                    what: format!("parameter {index} can't be taken"),
                });
            }
        };
    }
    Ok(())
}

/// The pfns of the rings that a PVH guest's parameters name.
pub(super) fn rings(params: &[(u64, u64)]) -> Vec<u64> {
    let names_ring =
        |index: u64| u32::try_from(index).is_ok_and(|index| RING_HVM_PARAMS.contains(&index));
    params
        .iter()
        .filter(|(index, _)| names_ring(*index))
        .map(|(_, pfn)| *pfn)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_parameters_that_a_saver_writes_are_taken() {
        let all: Vec<(u64, u64)> = MIGRATED_HVM_PARAMS
            .iter()
            .map(|index| (u64::from(*index), 0xff000 + u64::from(*index)))
            .collect();
        check_params(&all).unwrap();
        check_params(&[]).unwrap();
        assert!(check_params(&[all[0], all[1], all[0]]).is_err());
        // HVM_PARAM_DM_DOMAIN: who is the device model.
        assert!(check_params(&[(13, 5)]).is_err());
        assert!(check_params(&[(u64::MAX, 0)]).is_err());
    }

    #[test]
    fn the_rings_are_found_among_the_parameters() {
        let [store, console, ..] = RING_HVM_PARAMS.map(u64::from);
        let ident = 12;
        let params = [(store, 0xfeffc), (ident, 0xfeffe000), (console, 0xfefff)];
        assert_eq!(rings(&params), [0xfeffc, 0xfefff]);
    }
}
