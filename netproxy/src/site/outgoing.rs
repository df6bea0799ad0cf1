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

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::program::run;

/// The most flows of one guest. The rest is left to end.
pub const MAX_FLOWS: usize = 65_536;
/// With the number of a guest added: marks, routing tables, and network numbers of VXLAN.
const MARK: u32 = 0x766d_0000;
const TABLE: u32 = 770_000;
const NETWORK: u32 = 0x76_0000;

/// The protocols whose flows are known by ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// One flow that the guest began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Flow {
    /// Its protocol.
    pub protocol: Protocol,
    /// The guest's port.
    pub guest_port: u16,
    /// The other end's address.
    pub remote: IpAddr,
    /// The other end's port.
    pub remote_port: u16,
}

/// The format of [`pack`].
const FORMAT: u8 = 1;

/// Flows as bytes, for the other site.
#[must_use]
pub fn pack(flows: &[Flow]) -> Vec<u8> {
    let mut bytes = vec![FORMAT];
    for flow in flows {
        bytes.push(match flow.protocol {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
        });
        bytes.extend(flow.guest_port.to_be_bytes());
        bytes.extend(flow.remote_port.to_be_bytes());
        match flow.remote {
            IpAddr::V4(address) => {
                bytes.push(4);
                bytes.extend(address.octets());
            }
            IpAddr::V6(address) => {
                bytes.push(6);
                bytes.extend(address.octets());
            }
        }
    }
    bytes
}

/// What [`pack`] made, from whoever it comes.
///
/// # Errors
/// [`Error::Config`] when it is something else, or more than [`MAX_FLOWS`].
pub fn unpack(bytes: &[u8]) -> Result<Vec<Flow>> {
    let broken = || Error::Config("The other site's list of flows makes no sense".into());
    let (version, mut rest) = bytes.split_first().ok_or_else(broken)?;
    if *version != FORMAT {
        return Err(broken());
    }
    let mut flows = Vec::new();
    while let Some((head, tail)) = rest.split_first_chunk::<6>() {
        let [protocol, g1, g2, r1, r2, family] = *head;
        let (remote, tail) = match family {
            4 => tail
                .split_first_chunk::<4>()
                .map(|(octets, tail)| (IpAddr::from(*octets), tail)),
            6 => tail
                .split_first_chunk::<16>()
                .map(|(octets, tail)| (IpAddr::from(*octets), tail)),
            _ => None,
        }
        .ok_or_else(broken)?;
        let protocol = match protocol {
            6 => Protocol::Tcp,
            17 => Protocol::Udp,
            _ => return Err(broken()),
        };
        if flows.len() == MAX_FLOWS {
            return Err(broken());
        }
        flows.push(Flow {
            protocol,
            guest_port: u16::from_be_bytes([g1, g2]),
            remote,
            remote_port: u16::from_be_bytes([r1, r2]),
        });
        rest = tail;
    }
    if rest.is_empty() {
        Ok(flows)
    } else {
        Err(broken())
    }
}

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

/// The flows that a guest has begun at this site and that are open still. To be asked when it is
/// suspended. At most [`MAX_FLOWS`].
///
/// # Errors
/// When this host tracks no connections, or does not show them.
pub fn flows_of(guest_address: IpAddr) -> Result<Vec<Flow>> {
    // Of this thread: its network namespace may be another one than the process's.
    let table = match std::fs::read_to_string("/proc/thread-self/net/nf_conntrack") {
        Ok(text) => text,
        Err(_) => run("conntrack", &["-L", "-o", "extended"], "")?,
    };
    let mut flows: Vec<Flow> = table
        .lines()
        .filter_map(|line| parse(line, guest_address))
        .collect();
    flows.sort_unstable();
    flows.dedup();
    flows.truncate(MAX_FLOWS);
    Ok(flows)
}

/// Reads a line of connection tracking:
/// `ipv4 2 tcp 6 431999 ESTABLISHED src=… dst=… sport=… dport=… src=…`, the first four being those
/// of the direction in which it began.
fn parse(line: &str, guest: IpAddr) -> Option<Flow> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let protocol = match *words.get(2)? {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    if words
        .iter()
        .any(|word| matches!(*word, "TIME_WAIT" | "CLOSE"))
    {
        return None;
    }
    let first = |key: &str| words.iter().find_map(|word| word.strip_prefix(key));
    let source: IpAddr = first("src=")?.parse().ok()?;
    (source == guest).then_some(())?;
    Some(Flow {
        protocol,
        guest_port: first("sport=")?.parse().ok()?,
        remote: first("dst=")?.parse().ok()?,
        remote_port: first("dport=")?.parse().ok()?,
    })
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

    fn family(&self) -> &'static str {
        if self.guest_address.is_ipv4() {
            "ip"
        } else {
            "ip6"
        }
    }

    /// The family and name of its table.
    #[must_use]
    pub fn table(&self) -> String {
        format!(
            "{} {}",
            self.family(),
            super::table_name("outgoing", &self.guest)
        )
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

    /// The rules, as `nft -f` reads them: each table as a whole, replacing one of its name in the
    /// same transaction.
    #[must_use]
    pub fn rules(&self) -> String {
        let (table, ip, guest) = (self.table(), self.family(), self.guest_address);
        let kind = if ip == "ip" { "ipv4_addr" } else { "ipv6_addr" };
        let mark = MARK + u32::from(self.number);
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
        replacement(&table, &format!("{old}{chains}")) + &self.guard()
    }

    /// The table that keeps everybody but the other site out of the tunnel: its family, that of
    /// the tunnel's own packets, and its name.
    fn guard_table(&self, family: &str) -> String {
        format!("{family} {}", super::table_name("guard", &self.guest))
    }

    /// The rules of that table. None where the tunnel is somebody else's.
    fn guard(&self) -> String {
        let Tunnel::Vxlan { remote, port, .. } = &self.tunnel else {
            return String::new();
        };
        let ip = if remote.is_ipv4() { "ip" } else { "ip6" };
        let table = self.guard_table(ip);
        // Only of this guest's network: others may come from other sites.
        let network = NETWORK + u32::from(self.number);
        replacement(
            &table,
            &format!(
                "  chain guard {{\n    type filter hook input priority raw; policy accept;\n\
                 \x20   udp dport {port} @th,96,24 {network} {ip} saddr != {remote} drop\n  }}\n"
            ),
        )
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
        run("nft", &["-f", "-"], &self.rules())?;
        let family = if self.guest_address.is_ipv4() {
            "-4"
        } else {
            "-6"
        };
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
        let table = TABLE + u32::from(self.number);
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
        let mark = MARK + u32::from(self.number);
        ip(&format!(
            "{family} rule add fwmark {mark:#x} lookup {table} priority {}",
            PRIORITY
        ))
    }

    /// Makes the VXLAN, and gives the other end's address on it.
    fn make_tunnel(
        &self,
        device: &str,
        local: IpAddr,
        remote: IpAddr,
        port: u16,
    ) -> Result<String> {
        let network = NETWORK + u32::from(self.number);
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
        let family = if self.guest_address.is_ipv4() {
            "-4"
        } else {
            "-6"
        };
        let mark = MARK + u32::from(self.number);
        let table = TABLE + u32::from(self.number);
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
        run("nft", &["-f", "-"], &removal).map(drop)
    }

    /// Whether no flow is led around any more: it can be [removed](Self::remove).
    #[must_use]
    pub fn is_over(&self) -> bool {
        let table = self.table();
        let mut arguments = vec!["list", "set"];
        arguments.extend(table.split(' '));
        arguments.push("old");
        run("nft", &arguments, "").map_or(true, |text| !text.contains("elements"))
    }
}

/// A table's removal, whether it is there or not, as `nft -f` reads it.
fn removal(table: &str) -> String {
    format!("add table {table}\ndelete table {table}\n")
}

/// A table as a whole, in place of one of its name.
fn replacement(table: &str, contents: &str) -> String {
    format!("{}table {table} {{\n{contents}}}\n", removal(table))
}

/// Before the main table, as the whole point is to go another way.
const PRIORITY: u32 = 7_770;

fn ip(line: &str) -> Result<()> {
    run("ip", &line.split_whitespace().collect::<Vec<_>>(), "").map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn detour(side: Side) -> Detour {
        Detour {
            guest: "desktop".into(),
            guest_address: "10.7.0.5".parse().unwrap(),
            number: 3,
            side,
            tunnel: Tunnel::Vxlan {
                local: "198.51.100.7".parse().unwrap(),
                remote: "203.0.113.9".parse().unwrap(),
                port: 4789,
            },
            limit: Duration::from_secs(3600),
            flows: vec![Flow {
                protocol: Protocol::Tcp,
                guest_port: 40000,
                remote: "192.0.2.1".parse().unwrap(),
                remote_port: 443,
            }],
        }
    }

    #[test]
    fn flows_are_read_from_connection_tracking() {
        let guest = "10.7.0.5".parse().unwrap();
        let open = "ipv4     2 tcp      6 431999 ESTABLISHED src=10.7.0.5 dst=192.0.2.1 \
                    sport=40000 dport=443 src=192.0.2.1 dst=198.51.100.7 sport=443 dport=40000 \
                    [ASSURED] mark=0 zone=0 use=2";
        assert_eq!(parse(open, guest), Some(detour(Side::Old).flows[0]));
        let other = open.replacen("src=10.7.0.5", "src=10.7.0.6", 1);
        assert_eq!(parse(&other, guest), None);
        assert_eq!(
            parse(&open.replace("ESTABLISHED", "TIME_WAIT"), guest),
            None
        );
        let udp = "ipv4     2 udp      17 27 src=10.7.0.5 dst=192.0.2.1 sport=5 dport=53 \
                   [UNREPLIED] src=192.0.2.1 dst=198.51.100.7 sport=53 dport=5 mark=0 use=2";
        assert_eq!(parse(udp, guest).unwrap().protocol, Protocol::Udp);
        let ping = "ipv4     2 icmp     1 29 src=10.7.0.5 dst=192.0.2.1 type=8 code=0 id=2";
        assert_eq!(parse(ping, guest), None);
    }

    #[test]
    fn each_side_marks_its_direction() {
        let new = detour(Side::New).rules();
        assert!(new.contains("tcp . 40000 . 192.0.2.1 . 443 timeout 3600s"));
        assert!(new.contains(
            "ip saddr 10.7.0.5 meta l4proto . th sport . ip daddr . th dport @old \
             meta mark set 0x766d0003 notrack"
        ));
        let old = detour(Side::Old).rules();
        assert!(old.contains(
            "ip daddr 10.7.0.5 meta l4proto . th dport . ip saddr . th sport @old \
             meta mark set 0x766d0003\n"
        ));
        assert!(!old.contains("notrack"), "The old site goes on translating");
        let guard = format!(
            "udp dport 4789 @th,96,24 {} ip saddr != 203.0.113.9 drop",
            NETWORK + 3
        );
        assert!(old.contains(&guard));
        assert!(old.contains("table ip vmshadow_guard_desktop {"));
        let mut six = detour(Side::Old);
        six.tunnel = Tunnel::Vxlan {
            local: "2001:db8::7".parse().unwrap(),
            remote: "2001:db8::9".parse().unwrap(),
            port: 4789,
        };
        let six = six.rules();
        assert!(six.contains("table ip vmshadow_outgoing_desktop {"));
        assert!(six.contains("table ip6 vmshadow_guard_desktop {"));
        assert!(six.contains("ip6 saddr != 2001:db8::9 drop"));
        let mut none = detour(Side::New);
        none.flows.clear();
        assert!(!none.rules().contains("elements"));
    }

    #[test]
    fn nonsense_is_refused() {
        for spoil in [
            (|d| d.guest.clear()) as fn(&mut Detour),
            |d| d.limit = Duration::from_millis(10),
            |d| d.flows[0].remote = "2001:db8::1".parse().unwrap(),
            |d| d.flows = vec![d.flows[0]; MAX_FLOWS + 1],
            |d| {
                d.tunnel = Tunnel::Device {
                    name: "wg0 table main".into(),
                    gateway: None,
                }
            },
            |d| {
                d.tunnel = Tunnel::Vxlan {
                    local: "10.0.0.1".parse().unwrap(),
                    remote: "2001:db8::1".parse().unwrap(),
                    port: 1,
                }
            },
        ] {
            let mut bad = detour(Side::New);
            spoil(&mut bad);
            assert!(matches!(bad.apply(), Err(Error::Config(_))));
        }
    }

    #[test]
    fn flows_cross_as_they_are() {
        let mut flows = detour(Side::Old).flows;
        flows.push(Flow {
            protocol: Protocol::Udp,
            guest_port: 1,
            remote: "2001:db8::1".parse().unwrap(),
            remote_port: 65535,
        });
        let bytes = pack(&flows);
        assert_eq!(unpack(&bytes).unwrap(), flows);
        assert_eq!(unpack(&pack(&[])).unwrap(), []);
        assert!(unpack(&[]).is_err());
        assert!(unpack(&bytes[..bytes.len() - 1]).is_err());
        assert!(unpack(&[2]).is_err());
        assert!(unpack(&pack(&vec![flows[0]; MAX_FLOWS + 1])).is_err());
        assert_eq!(Detour::number_of("10.7.1.2".parse().unwrap()), 0x102);
        assert_eq!(Detour::number_of("fd00::7".parse().unwrap()), 7);
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(flows) = unpack(&bytes) {
                prop_assert_eq!(pack(&flows), bytes);
            }
        }

        #[test]
        fn any_line_gives_an_answer(line in ".{0,200}") {
            let _ = parse(&line, "10.7.0.5".parse().unwrap());
        }
    }
}
