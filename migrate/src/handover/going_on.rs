//! How a guest goes on here whose move was given up, whoever gives it up.
//!
//! ```text
//! it is suspended       journal: resuming -> keeper -> resume -> the keeper again, if it failed
//! it was suspended      journal: resuming -> keeper
//! it won't suspend      nothing
//! it may suspend yet    the move stays open
//! ```
//!
//! The record tells whoever comes after a crash that the request to suspend is done with. Whether
//! the guest has been resumed since, Xen tells.

use crate::error::{Error, Result, chain};
use crate::guest::{EndedSuspend, MAY_SUSPEND};

/// Lets the guest go on, under a keeper where it was suspended: `xl`'s monitor ends then. `record`
/// writes into the journal that it is about to be resumed, or was.
///
/// # Errors
/// [`Error::Busy`] where it may suspend yet: whoever comes then has to find the journal. What
/// `keep` and `resume` return.
pub(crate) fn go_on(
    ended: EndedSuspend,
    record: impl FnOnce() -> Result<()>,
    mut keep: impl FnMut() -> Result<()>,
    resume: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let recorded = || {
        // A full disk must not hold the guest, which is this site's either way.
        if let Err(error) = record() {
            log::warn!("{}", chain(&error));
        }
    };
    match ended {
        EndedSuspend::Suspended => {
            recorded();
            // First the keeper: it is to see all that the guest does.
            let kept = keep();
            resume()?;
            // What it lacked may be there by now.
            kept.or_else(|_| keep())
        }
        EndedSuspend::GoesOn => {
            recorded();
            keep()
        }
        EndedSuspend::WillNot => Ok(()),
        EndedSuspend::MayCome => Err(Error::Busy(MAY_SUSPEND.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// What is done, in order, where the steps named in `fail` fail the first time.
    fn done(ended: EndedSuspend, fail: &[&'static str]) -> (Vec<&'static str>, bool) {
        let steps = RefCell::new(Vec::new());
        let step = |name: &'static str| {
            let first = !steps.borrow().contains(&name);
            steps.borrow_mut().push(name);
            match first && fail.contains(&name) {
                true => Err(Error::Refused("It can't be done".into())),
                false => Ok(()),
            }
        };
        let went = go_on(ended, || step("record"), || step("keep"), || step("resume"));
        let done = went.is_ok();
        (steps.into_inner(), done)
    }

    #[test]
    fn a_suspended_guest_is_resumed_once_that_is_recorded_and_it_has_a_keeper() {
        let suspended = |fail| done(EndedSuspend::Suspended, fail);
        assert_eq!(suspended(&[]), (vec!["record", "keep", "resume"], true));
        // Nothing of this keeps it from going on.
        let all = vec!["record", "keep", "resume", "keep"];
        assert_eq!(suspended(&["record", "keep"]), (all, true));
        // Whoever tries again starts one anew.
        let failed = vec!["record", "keep", "resume"];
        assert_eq!(suspended(&["resume"]), (failed, false));
    }

    #[test]
    fn one_that_was_suspended_has_a_keeper_and_one_that_was_not_needs_none() {
        let goes_on = |fail| done(EndedSuspend::GoesOn, fail);
        assert_eq!(goes_on(&[]), (vec!["record", "keep"], true));
        assert_eq!(goes_on(&["record"]), (vec!["record", "keep"], true));
        assert_eq!(goes_on(&["keep"]), (vec!["record", "keep"], false));
        assert_eq!(done(EndedSuspend::WillNot, &[]), (vec![], true));
        assert_eq!(done(EndedSuspend::MayCome, &[]), (vec![], false));
    }
}
