//! Which step of a move may follow which: a value, without any connection.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Where a guest's move is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "lowercase")]
pub enum Phase {
    /// No move is under way.
    #[default]
    Settled,
    /// The way to the site is warm.
    Prepared {
        /// Where the guest will go.
        to: String,
    },
    /// Nothing goes to the guest, nothing comes from it.
    Held {
        /// Where the guest goes.
        to: String,
    },
    /// All sockets point to the new site and are silent.
    Retargeted {
        /// Where the guest goes.
        to: String,
    },
}

/// A step that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// Warm the path to this site.
    Prepare(String),
    /// Freeze.
    Hold,
    /// Make the sockets anew.
    Retarget,
    /// Go on at the new site.
    Release,
    /// Go on at the old site.
    Cancel,
}

impl Asked {
    fn name(&self) -> &'static str {
        match self {
            Self::Prepare(_) => "prepare",
            Self::Hold => "hold",
            Self::Retarget => "retarget",
            Self::Release => "release",
            Self::Cancel => "cancel",
        }
    }
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Self::Settled => "not being moved",
            Self::Prepared { .. } => "prepared",
            Self::Held { .. } => "held",
            Self::Retargeted { .. } => "re-targeted",
        }
    }

    /// The site of the move, if there is one.
    #[must_use]
    pub fn destination(&self) -> Option<&str> {
        match self {
            Self::Settled => None,
            Self::Prepared { to } | Self::Held { to } | Self::Retargeted { to } => Some(to),
        }
    }

    /// The phase after a step. A guest may be prepared again, for another site too.
    ///
    /// # Errors
    /// [`Error::OutOfOrder`] when the step can't come now.
    pub fn after(&self, guest: &str, asked: &Asked) -> Result<Self> {
        match (self, asked) {
            (Self::Settled | Self::Prepared { .. }, Asked::Prepare(to)) => {
                Ok(Self::Prepared { to: to.clone() })
            }
            (Self::Prepared { to }, Asked::Hold) => Ok(Self::Held { to: to.clone() }),
            (Self::Held { to }, Asked::Retarget) => Ok(Self::Retargeted { to: to.clone() }),
            (Self::Retargeted { .. }, Asked::Release)
            | (
                Self::Prepared { .. } | Self::Held { .. } | Self::Retargeted { .. },
                Asked::Cancel,
            ) => Ok(Self::Settled),
            _ => Err(Error::OutOfOrder {
                guest: guest.to_owned(),
                phase: self.name(),
                asked: asked.name(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(steps: &[Asked]) -> Result<Phase> {
        steps
            .iter()
            .try_fold(Phase::Settled, |phase, step| phase.after("g", step))
    }

    #[test]
    fn the_whole_way() {
        let b = || Asked::Prepare("b".into());
        let all = [b(), Asked::Hold, Asked::Retarget, Asked::Release];
        assert_eq!(run(&all).unwrap(), Phase::Settled);
        assert_eq!(run(&all[..3]).unwrap().destination(), Some("b"));
        assert_eq!(
            run(&[b(), Asked::Prepare("c".into())])
                .unwrap()
                .destination(),
            Some("c")
        );
    }

    #[test]
    fn every_phase_of_a_move_can_be_cancelled() {
        let steps = [Asked::Prepare("b".into()), Asked::Hold, Asked::Retarget];
        for end in 1..=3 {
            let mut some = steps[..end].to_vec();
            some.push(Asked::Cancel);
            assert_eq!(run(&some).unwrap(), Phase::Settled);
        }
        assert!(run(&[Asked::Cancel]).is_err());
    }

    #[test]
    fn no_step_is_left_out() {
        for wrong in [
            vec![Asked::Hold],
            vec![Asked::Prepare("b".into()), Asked::Retarget],
            vec![Asked::Prepare("b".into()), Asked::Hold, Asked::Release],
            vec![
                Asked::Prepare("b".into()),
                Asked::Hold,
                Asked::Prepare("c".into()),
            ],
        ] {
            let error = run(&wrong).unwrap_err();
            assert!(matches!(error, Error::OutOfOrder { .. }), "{error}");
        }
        assert_eq!(
            run(&[Asked::Hold]).unwrap_err().to_string(),
            "Guest g is not being moved: hold is not possible now"
        );
    }
}
