//! The rule that stands in while a connection has no socket.
//!
//! Where the guest's own address is routed, the new socket has the same addresses as the old one,
//! so the old one has to go first. A segment that comes between would be answered with a reset.
//! A table of nftables drops it. The table is owned by a netlink socket, and the kernel removes
//! it with that.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::nftables::{self, family};
use crate::program::Tethered;

/// Drops what comes from some addresses, as long as it lives.
#[derive(Debug)]
pub(crate) struct Block {
    _nft: Tethered,
}

impl Block {
    /// Blocks segments from `remotes` until dropped. Returns once the kernel has the rules.
    pub(crate) fn new(name: &str, remotes: &BTreeSet<SocketAddr>) -> Result<Self> {
        let nft = Tethered::nft(&rules(name, remotes))?;
        let deadline = Instant::now() + Duration::from_secs(5);
        // The table is made in one step with its chain and rules.
        while nftables::list("table", &format!("inet {name}")).is_err() {
            if Instant::now() > deadline {
                return Err(Error::Program {
                    program: "nft".into(),
                    message: "the rules that hold segments back do not appear".into(),
                });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(Self { _nft: nft })
    }
}

/// One command, on one line: it is carried out as a whole.
fn rules(name: &str, remotes: &BTreeSet<SocketAddr>) -> String {
    let drops: String = remotes
        .iter()
        .map(|remote| {
            let (address, port) = (remote.ip(), remote.port());
            format!(
                "{} saddr {address} tcp sport {port} drop; ",
                family(address)
            )
        })
        .collect();
    format!(
        "table inet {name} {{ flags owner; \
         chain held {{ type filter hook prerouting priority raw; {drops}}}; }}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_has_its_rule() {
        let remotes = [
            "10.7.0.5:5900".parse().unwrap(),
            "[2001:db8::5]:22".parse().unwrap(),
        ]
        .into();
        let rules = rules("held_7", &remotes);
        assert!(rules.contains("ip saddr 10.7.0.5 tcp sport 5900 drop; "));
        assert!(rules.contains("ip6 saddr 2001:db8::5 tcp sport 22 drop; "));
        assert_eq!(rules.lines().count(), 1);
    }
}
