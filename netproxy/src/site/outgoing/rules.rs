//! What a detour asks of nftables: the old flows, and what is done to their packets.
//!
//! ```text
//!  new site   from the guest ── mark, untracked ──▶ by the mark into the tunnel
//!             to the guest ──── untracked
//!  old site   to the guest ──── mark ─────────────▶ by the mark into the tunnel
//!
//!  either     into the VXLAN ── dropped, unless the other site sends it
//! ```
//!
//! The guest's table has the flows as elements that expire: after the last one nothing is marked.
//! The guard of the VXLAN is a table of its own, as that may be of another family.

use super::{Detour, Side, Tunnel};
use crate::nftables::{self, address_type, family, replacement};

impl Detour {
    /// The rules, as `nft -f` reads them: each table as a whole, replacing one of its name in the
    /// same transaction.
    #[must_use]
    pub fn rules(&self) -> String {
        let guest = self.guest_address;
        let (ip, kind, mark) = (family(guest), address_type(guest), self.mark());
        let seconds = self.limit.as_secs();
        let elements: Vec<String> = self
            .flows
            .iter()
            .map(|flow| {
                format!(
                    "{} . {} . {} . {} timeout {seconds}s",
                    flow.protocol.name(),
                    flow.guest_port,
                    flow.remote,
                    flow.remote_port
                )
            })
            .collect();
        let elements = if elements.is_empty() {
            String::new()
        } else {
            format!("    elements = {{ {} }}\n", elements.join(",\n      "))
        };
        let from =
            format!("{ip} saddr {guest} meta l4proto . th sport . {ip} daddr . th dport @old");
        let to = format!("{ip} daddr {guest} meta l4proto . th dport . {ip} saddr . th sport @old");
        let chains = match self.side {
            Side::New => format!(
                "  chain leave {{\n    type filter hook prerouting priority raw; policy accept;\n\
                 \x20   {from} meta mark set {mark:#x} notrack\n\
                 \x20   {to} notrack\n  }}\n"
            ),
            // After connection tracking has put the guest's address back into the answer.
            Side::Old => format!(
                "  chain leave {{\n    type filter hook prerouting priority dstnat + 5; policy accept;\n\
                 \x20   {to} meta mark set {mark:#x}\n  }}\n"
            ),
        };
        let old = format!(
            "  set old {{\n    type inet_proto . inet_service . {kind} . inet_service\n    \
             flags timeout\n{elements}  }}\n"
        );
        replacement(&self.table(), &format!("{old}{chains}")) + &self.guard()
    }

    /// The table that keeps everybody but the other site out of the tunnel: its family, that of
    /// the tunnel's own packets, and its name.
    pub(super) fn guard_table(&self, family: &str) -> String {
        nftables::table(family, "guard", &self.guest)
    }

    /// The rules of that table. None where the tunnel is somebody else's.
    fn guard(&self) -> String {
        let Tunnel::Vxlan { remote, port, .. } = &self.tunnel else {
            return String::new();
        };
        let ip = family(*remote);
        // Only of this guest's network: others may come from other sites.
        let network = self.network();
        replacement(
            &self.guard_table(ip),
            &format!(
                "  chain guard {{\n    type filter hook input priority raw; policy accept;\n\
                 \x20   udp dport {port} @th,96,24 {network} {ip} saddr != {remote} drop\n  }}\n"
            ),
        )
    }
}
