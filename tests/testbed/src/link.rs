//! The WAN between the sites: netem on each site's WAN interface.
//!
//! Each site delays what it sends by half of the round trip, limits its rate, and
//! loses some. The queue holds 200 ms at the given rate beyond the delay, as a
//! router's would; what doesn't fit is lost.

use serde::{Deserialize, Serialize};

/// What the WAN is like. The default is a link without limits.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Link {
    /// Round-trip time in milliseconds.
    pub rtt_ms: f64,
    /// Rate each way, in Mbit/s.
    pub mbit: Option<f64>,
    /// Packets lost each way, in percent.
    pub loss_percent: f64,
}

/// Bytes of a frame on the wire, for the length of the queue.
const FRAME: f64 = 1514.0;
/// How long a packet may wait in the queue.
const QUEUE_SECONDS: f64 = 0.2;

impl Link {
    /// The command that gives a site's side of the WAN this shape, whatever shape
    /// it had.
    #[must_use]
    pub fn command(&self) -> String {
        let delay_ms = self.rtt_ms / 2.0;
        // 1,000 packets is netem's own default. Without a rate the link is as fast
        // as the emulation: 1 Gbit/s is far above that.
        let mbit = self.mbit.unwrap_or(1000.0);
        let seconds = delay_ms / 1000.0 + QUEUE_SECONDS;
        let limit = (mbit * 1e6 / 8.0 * seconds / FRAME).ceil().max(1000.0);
        let mut command =
            format!("tc qdisc replace dev eth1 root netem limit {limit} delay {delay_ms}ms");
        if let Some(mbit) = self.mbit {
            command.push_str(&format!(" rate {}kbit", (mbit * 1000.0).round()));
        }
        if self.loss_percent > 0.0 {
            command.push_str(&format!(" loss {}%", self.loss_percent));
        }
        command
    }
}

/// The command that loses all that a site sends, and keeps the interface up: a
/// cut somewhere in the middle, of which neither side is told.
pub const CUT: &str = "tc qdisc replace dev eth1 root netem loss 100%";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_becomes_netem_arguments() {
        let link = Link {
            rtt_ms: 40.0,
            mbit: Some(50.0),
            loss_percent: 0.5,
        };
        assert_eq!(
            link.command(),
            "tc qdisc replace dev eth1 root netem limit 1000 delay 20ms rate 50000kbit loss 0.5%"
        );
        let fast = Link {
            mbit: Some(400.0),
            ..link
        };
        assert!(fast.command().contains("limit 7266 "), "{}", fast.command());
        assert!(!Link::default().command().contains("rate"));
    }
}
