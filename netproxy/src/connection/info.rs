//! What a list of connections says of one.

use std::net::SocketAddr;
use std::time::Instant;

use super::{Connection, Stage, Upstream};

/// One line of a list.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ConnectionInfo {
    /// A number that no other connection of this run has.
    pub id: u64,
    /// The guest.
    pub guest: String,
    /// The service.
    pub service: String,
    /// The client's address.
    pub client: SocketAddr,
    /// The guest's address as the proxy sees it, while there is a connection to it.
    pub upstream: Option<SocketAddr>,
    /// `open`, `connecting`, `waiting`, `held`, `moved`, `unmovable`, `proving` or `closing`.
    pub state: String,
    /// Bytes given to the guest, each of them once.
    pub to_guest: u64,
    /// Bytes given to the client.
    pub to_client: u64,
    /// Bytes that the proxy holds, both directions together.
    pub held: u64,
    /// Seconds since it was accepted.
    pub seconds: f64,
}

impl Connection {
    pub(crate) fn info(&self, now: Instant) -> ConnectionInfo {
        let state = match (&self.stage, &self.upstream) {
            (Stage::Held { .. }, _) => "held",
            (Stage::Moved(_), _) => "moved",
            (Stage::Unmovable(_), _) => "unmovable",
            (Stage::Proving(_), _) => "proving",
            (Stage::Normal, Upstream::Waiting) => "waiting",
            (Stage::Normal, Upstream::Connecting(..)) => "connecting",
            (Stage::Normal, Upstream::Open(_))
                if self.settle_since.is_some() || self.lost.is_some() =>
            {
                "closing"
            }
            (Stage::Normal, Upstream::Open(_)) => "open",
        };
        ConnectionInfo {
            id: self.admission.id,
            guest: self.guest.name.clone(),
            service: self.service.name.get_ref().clone(),
            client: self.client_address,
            upstream: self.upstream_address(),
            state: state.to_owned(),
            to_guest: self.to_guest.given(),
            to_client: self.to_client.given(),
            held: (self.to_guest.queued() + self.to_client.queued()) as u64,
            seconds: now.duration_since(self.opened).as_secs_f64(),
        }
    }
}
