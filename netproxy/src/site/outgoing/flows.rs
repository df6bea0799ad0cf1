//! The flows that a guest has begun: asked of connection tracking, and as bytes for the other site.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::program::run;

/// The most flows of one guest. The rest is left to end.
pub const MAX_FLOWS: usize = 65_536;
/// The format of [`pack`].
const FORMAT: u8 = 1;

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
    pub(super) fn name(self) -> &'static str {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    /// The one that connection tracking shows below.
    const FLOW: Flow = Flow {
        protocol: Protocol::Tcp,
        guest_port: 40000,
        remote: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        remote_port: 443,
    };

    #[test]
    fn flows_are_read_from_connection_tracking() {
        let guest = "10.7.0.5".parse().unwrap();
        let open = "ipv4     2 tcp      6 431999 ESTABLISHED src=10.7.0.5 dst=192.0.2.1 \
                    sport=40000 dport=443 src=192.0.2.1 dst=198.51.100.7 sport=443 dport=40000 \
                    [ASSURED] mark=0 zone=0 use=2";
        assert_eq!(parse(open, guest), Some(FLOW));
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
    fn flows_cross_as_they_are() {
        let mut flows = vec![FLOW];
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
        assert!(unpack(&pack(&vec![FLOW; MAX_FLOWS + 1])).is_err());
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
