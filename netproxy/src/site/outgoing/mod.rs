//! The guest's own outgoing connections, after it has moved.
//!
//! ```text
//!  before   guest ──▶ old site ── masquerade ──▶ server
//!
//!  after    guest ──▶ new site ── mark ── tunnel ──▶ old site ── masquerade ──▶ server   old flows
//!           guest ◀── new site ◀───────── tunnel ── mark ── old site ◀───────── server
//!
//!           guest ──▶ new site ── its own way ──▶ server                                new flows
//! ```
//!
//! A server knows a flow of the guest by the address of the site where it began. So the old site
//! goes on translating what began there, and the sites send it to each other through a tunnel.
//! What is old can't be told from what passes (UDP has no first packet), so the old site's
//! connection tracking is asked at the suspend ([`flows_of`]).
//!
//! All of it is the kernel's: a set of nftables whose elements expire, a mark, a routing rule, a
//! tunnel. When the time is over no packet is marked any more, with or without anybody to clean
//! up. At the new site the old flows are not tracked, so that its own masquerading does not meet
//! them; a firewall there has to let untracked packets of the guest pass.
//!
//! Only the last move counts: flows from an earlier one end, unless the guest goes back to where
//! they began.

mod flows;
mod rules;

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::nftables::{self, family, removal};
use crate::program::{ip, ip_option};

pub use flows::{Flow, MAX_FLOWS, Protocol, flows_of, pack, unpack};

/// With the number of a guest added: marks, routing tables, and network numbers of VXLAN.
const MARK: u32 = 0x766d_0000;
const TABLE: u32 = 770_000;
const NETWORK: u32 = 0x76_0000;
/// Before the main table, as the whole point is to go another way.
const PRIORITY: u32 = 7_770;

/// Which side of the detour a site is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Where the flows began.
    Old,
    /// Where the guest is now.
    New,
}

/// The tunnel between the sites.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Tunnel {
    /// A device that is there already: WireGuard, IPsec, GRE, a private line. It has to take
    /// packets from and to any address: `rp_filter` is 0, or is 2 and it has an address itself.
    Device {
        /// Its name.
        name: String,
        /// The other site's address on it, unless the device leads to one other end only.
        gateway: Option<IpAddr>,
    },
    /// A VXLAN of its own, over UDP. It hides nothing: for networks that can be trusted, or for
    /// what would cross the Internet in the clear anyhow.
    Vxlan {
        /// This site's address.
        local: IpAddr,
        /// The other site's address. Nobody else may send into the tunnel.
        remote: IpAddr,
        /// The UDP port, the same at both sites; 4789 is the registered one.
        port: u16,
    },
}

/// The detour of a guest's old flows, as one of the two sites has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detour {
    /// The guest's name; the table is named after it.
    pub guest: String,
    /// Its own address.
    pub guest_address: IpAddr,
    /// A number that the guest has at both sites, and no other guest with a detour.
    pub number: u16,
    /// Which side this site is.
    pub side: Side,
    /// The tunnel, as this site sees it.
    pub tunnel: Tunnel,
    /// How long flows are led around.
    pub limit: Duration,
    /// The flows.
    pub flows: Vec<Flow>,
}

impl Detour {
    /// The number that a guest with this address has at every site: guests of one network differ
    /// in it, up to 65,536 of them.
    #[must_use]
    pub fn number_of(guest_address: IpAddr) -> u16 {
        let low = match guest_address {
            IpAddr::V4(address) => {
                let [.., high, low] = address.octets();
                [high, low]
            }
            IpAddr::V6(address) => {
                let [.., high, low] = address.octets();
                [high, low]
            }
        };
        u16::from_be_bytes(low)
    }

    /// The family and name of its table.
    #[must_use]
    pub fn table(&self) -> String {
        nftables::table(family(self.guest_address), "outgoing", &self.guest)
    }

    fn mark(&self) -> u32 {
        MARK + u32::from(self.number)
    }

    fn routing_table(&self) -> u32 {
        TABLE + u32::from(self.number)
    }

    /// The number of its VXLAN.
    fn network(&self) -> u32 {
        NETWORK + u32::from(self.number)
    }

    fn device(&self) -> String {
        match &self.tunnel {
            Tunnel::Device { name, .. } => name.clone(),
            Tunnel::Vxlan { .. } => self.own_device(),
        }
    }

    /// The name of a VXLAN that is made for it.
    fn own_device(&self) -> String {
        format!("vmshadow{}", self.number)
    }

    fn check(&self) -> Result<()> {
        let refused = |why: &str| Err(Error::Config(format!("A detour {why}")));
        let four = self.guest_address.is_ipv4();
        if self.guest.is_empty() || self.limit.as_secs() == 0 {
            return refused("needs a guest, and a limit of a second at least");
        }
        if self.flows.len() > MAX_FLOWS {
            return refused("has too many flows");
        }
        if self.flows.iter().any(|flow| flow.remote.is_ipv4() != four) {
            return refused("is of one family");
        }
        match &self.tunnel {
            Tunnel::Device { name, gateway } => {
                let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
                if !(1..=15).contains(&name.len())
                    || name.starts_with('-')
                    || !name.bytes().all(known)
                {
                    return refused("goes through a device with another kind of name");
                }
                if gateway.is_some_and(|gateway| gateway.is_ipv4() != four) {
                    return refused("is of one family");
                }
            }
            Tunnel::Vxlan { local, remote, .. } => {
                if local.is_ipv4() != remote.is_ipv4() {
                    return refused("has a tunnel between two families");
                }
            }
        }
        Ok(())
    }

    /// Sets it up, replacing what is there of an earlier one of the guest.
    ///
    /// # Errors
    /// When it makes no sense, or with what `ip` or `nft` said. Then nothing of it is left.
    pub fn apply(&self) -> Result<()> {
        self.check()?;
        self.remove()?;
        let result = self.set_up();
        if result.is_err() {
            // What went wrong first is what counts.
            let _ = self.remove();
        }
        result
    }

    fn set_up(&self) -> Result<()> {
        nftables::load(&self.rules())?;
        let family = ip_option(self.guest_address);
        let (mark, table) = (self.mark(), self.routing_table());
        let device = self.device();
        let via = match &self.tunnel {
            Tunnel::Device { gateway, .. } => gateway.map(|gateway| gateway.to_string()),
            Tunnel::Vxlan {
                local,
                remote,
                port,
            } => Some(self.make_tunnel(&device, *local, *remote, *port)?),
        };
        let mut route = format!("{family} route replace default ");
        if let Some(via) = via {
            route.push_str(&format!("via {via} "));
        }
        route.push_str(&format!("dev {device} table {table}"));
        if let Tunnel::Vxlan { remote, .. } = &self.tunnel {
            route.push_str(" onlink");
            // The tunnel's own packets inherit the mark, and would be sent into the tunnel.
            if remote.is_ipv4() == self.guest_address.is_ipv4() {
                ip(&format!(
                    "{family} route replace throw {remote} table {table}"
                ))?;
            }
        }
        ip(&route)?;
        ip(&format!(
            "{family} rule add fwmark {mark:#x} lookup {table} priority {PRIORITY}"
        ))
        .map(drop)
    }

    /// Makes the VXLAN, and gives the other end's address on it.
    fn make_tunnel(
        &self,
        device: &str,
        local: IpAddr,
        remote: IpAddr,
        port: u16,
    ) -> Result<String> {
        let network = self.network();
        let (own, other) = match self.side {
            Side::Old => (1, 2),
            Side::New => (2, 1),
        };
        let mac = |end: u8| {
            let [high, low] = self.number.to_be_bytes();
            format!("02:76:6d:{high:02x}:{low:02x}:{end:02x}")
        };
        let four = self.guest_address.is_ipv4();
        let gateway = if four {
            format!("169.254.118.{other}")
        } else {
            format!("fe80::766d:{other}")
        };
        ip(&format!(
            "link add {device} address {} type vxlan id {network} local {local} remote {remote} \
             dstport {port} nolearning",
            mac(own)
        ))?;
        ip(&format!("link set {device} up"))?;
        ip(&format!(
            "neigh replace {gateway} lladdr {} dev {device} nud permanent",
            mac(other)
        ))?;
        // What comes through it has addresses from everywhere. A device without an address of
        // its own would take none of them, whatever the filter says.
        if four {
            ip(&format!(
                "address add 169.254.118.{own}/32 dev {device} scope link"
            ))?;
        }
        let filter = format!("/proc/sys/net/ipv4/conf/{device}/rp_filter");
        std::fs::write(&filter, "2").map_err(|source| Error::File {
            path: filter.into(),
            source,
        })?;
        Ok(gateway)
    }

    /// Takes it away, with whatever tunnel it was made. That it was not there is no error.
    ///
    /// # Errors
    /// With what `nft` said.
    pub fn remove(&self) -> Result<()> {
        let family = ip_option(self.guest_address);
        let (mark, table) = (self.mark(), self.routing_table());
        while ip(&format!(
            "{family} rule del fwmark {mark:#x} lookup {table}"
        ))
        .is_ok()
        {}
        let _ = ip(&format!("{family} route flush table {table}"));
        // Whatever its tunnel is now: the one before may have had another.
        let own = self.own_device();
        if !matches!(&self.tunnel, Tunnel::Device { name, .. } if *name == own) {
            let _ = ip(&format!("link del {own}"));
        }
        // A kernel without IPv6 has none of its tables, and takes nothing that names one.
        let six = std::path::Path::new("/proc/sys/net/ipv6").exists();
        let families = ["ip", "ip6"].into_iter().take(1 + usize::from(six));
        let guards = families.map(|family| self.guard_table(family));
        let tables = std::iter::once(self.table()).chain(guards);
        let removal: String = tables.map(|table| removal(&table)).collect();
        nftables::load(&removal)
    }

    /// Whether no flow is led around any more: it can be [removed](Self::remove).
    #[must_use]
    pub fn is_over(&self) -> bool {
        nftables::list("set", &format!("{} old", self.table()))
            .map_or(true, |text| !text.contains("elements"))
    }
}

#[cfg(test)]
mod tests;
