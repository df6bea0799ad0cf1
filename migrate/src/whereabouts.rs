//! Where a guest is when a move of it is over.

use serde::{Deserialize, Serialize};
use xen_sys::ctl::ShutdownReason;

use crate::error::{Error, Result, chain};
use crate::guest::xen::host::{Host, of_uuid};
use crate::wire::Purpose;

/// What is seen of a guest at this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// It runs.
    Running,
    /// Its operator has paused it.
    Paused,
    /// It is suspended.
    Suspended,
    /// It has stopped by itself.
    Stopped(ShutdownReason),
    /// There is no such domain.
    Gone,
    /// The hypervisor could not be asked.
    Unseen,
}

impl std::fmt::Display for Left {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Left::Running => f.write_str("runs here"),
            Left::Paused => f.write_str("is paused here"),
            Left::Suspended => f.write_str("is suspended here"),
            Left::Stopped(reason) => write!(f, "has stopped here ({reason})"),
            Left::Gone => f.write_str("is gone from this host"),
            Left::Unseen => f.write_str("can't be looked at here"),
        }
    }
}

impl Left {
    pub(crate) fn look(host: &Host, uuid: &str) -> Left {
        let domains = match host.ctl().domains() {
            Ok(domains) => domains,
            Err(error) => {
                log::error!("{}", chain(&error));
                return Left::Unseen;
            }
        };
        match of_uuid(&domains, uuid) {
            None => Left::Gone,
            Some(info) => match info.shutdown {
                Some(ShutdownReason::Suspend) => Left::Suspended,
                Some(reason) => Left::Stopped(reason),
                None if info.paused => Left::Paused,
                None => Left::Running,
            },
        }
    }

    /// As [`Left::look`], with another look at the host.
    pub(crate) fn look_again(uuid: &str) -> Left {
        Host::open().map_or(Left::Unseen, |host| Left::look(&host, uuid))
    }
}

/// Where a guest is, as scripts are told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Whereabouts {
    /// At the source. It runs there, unless its operator has paused it.
    Source,
    /// At the destination.
    Destination,
    /// At the source, and could not be made to go on.
    Suspended,
    /// At the source, where it has stopped by itself.
    Stopped,
    /// Not at the source any more, and not by this move: it has ended, or was moved by another.
    Gone,
    /// That can't be told here; for one that may run at the destination only that can.
    #[default]
    Unknown,
}

impl Whereabouts {
    /// After a move that ended so at its source, where `left` was seen of the guest if it failed.
    #[must_use]
    pub fn after(result: &Result<()>, purpose: Purpose, left: Option<Left>) -> Self {
        match (result, left) {
            (Ok(()), _) if purpose == Purpose::Move => Self::Destination,
            // It never left.
            (Ok(()), _) => Self::Source,
            (Err(Error::InDoubt { .. }), _) | (Err(_), None | Some(Left::Unseen)) => Self::Unknown,
            (Err(_), Some(Left::Running | Left::Paused)) => Self::Source,
            (Err(_), Some(Left::Suspended)) => Self::Suspended,
            (Err(_), Some(Left::Stopped(_))) => Self::Stopped,
            (Err(_), Some(Left::Gone)) => Self::Gone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_after_each_end() {
        let doubt = || Err(Error::InDoubt { peer: "b".into() });
        let failed = || Err(Error::Cancelled);
        for (result, purpose, left, expected) in [
            (Ok(()), Purpose::Move, None, "destination"),
            (Ok(()), Purpose::Shadow, None, "source"),
            (failed(), Purpose::Move, Some(Left::Running), "source"),
            (failed(), Purpose::Move, Some(Left::Paused), "source"),
            (failed(), Purpose::Shadow, Some(Left::Running), "source"),
            (failed(), Purpose::Move, Some(Left::Suspended), "suspended"),
            (failed(), Purpose::Move, Some(Left::Gone), "gone"),
            (failed(), Purpose::Move, Some(Left::Unseen), "unknown"),
            // Another worker has it.
            (failed(), Purpose::Move, None, "unknown"),
            // Whatever is seen here: the other host may have it.
            (doubt(), Purpose::Move, Some(Left::Suspended), "unknown"),
            (doubt(), Purpose::Move, None, "unknown"),
        ] {
            let guest = Whereabouts::after(&result, purpose, left);
            let told = serde_json::to_value(guest).unwrap();
            assert_eq!(told, expected, "{result:?}, {purpose:?}, {left:?}");
        }
        let stopped = Some(Left::Stopped(ShutdownReason::Poweroff));
        let guest = Whereabouts::after(&failed(), Purpose::Move, stopped);
        assert_eq!(guest, Whereabouts::Stopped);
    }
}
