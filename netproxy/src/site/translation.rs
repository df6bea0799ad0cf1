//! Stateless translation in nftables.
//!
//! Both directions are rewritten without connection tracking. Tracked translation does not
//! survive a move: the old site keeps an entry for days and answers the guest's connections with
//! resets when it comes back, and the new one may refuse what it has not seen begin.
//!
//! The rules match the addresses of the edges: for everybody else, they are not there.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::nftables::{self, address_type, family, removal, replacement};

/// One port of the site that stands for a port of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Forward {
    /// The site's port.
    pub site_port: u16,
    /// The guest's port.
    pub guest_port: u16,
}

/// The translation for one guest at one site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Translation {
    /// The guest's name; the table is named after it.
    pub guest: String,
    /// The site's address.
    pub site_address: IpAddr,
    /// The guest's own address.
    pub guest_address: IpAddr,
    /// The edges that may use it: the `source` of their configurations.
    pub edges: Vec<IpAddr>,
    /// The ports.
    pub forwards: Vec<Forward>,
}

impl Translation {
    /// The family and name of its table.
    #[must_use]
    pub fn table(&self) -> String {
        nftables::table(family(self.site_address), "inwards", &self.guest)
    }

    fn check(&self) -> Result<()> {
        let four = self.site_address.is_ipv4();
        let others = self.edges.iter().chain([&self.guest_address]);
        if self.guest.is_empty() || self.edges.is_empty() || self.forwards.is_empty() {
            return Err(Error::Config(
                "A translation needs a guest, an edge and a port".into(),
            ));
        }
        if others.into_iter().any(|address| address.is_ipv4() != four) {
            return Err(Error::Config(
                "All addresses of a translation are of one family".into(),
            ));
        }
        Ok(())
    }

    /// The rules, as `nft -f` reads them: the table as a whole, replacing one of its name in the
    /// same transaction.
    #[must_use]
    pub fn rules(&self) -> String {
        let (site, guest) = (self.site_address, self.guest_address);
        let ip = family(site);
        let edges = self
            .edges
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", ");
        let mut inwards = String::new();
        let mut untracked = String::new();
        let mut outwards = String::new();
        for Forward {
            site_port,
            guest_port,
        } in &self.forwards
        {
            inwards.push_str(&format!(
                "    {ip} saddr @edges {ip} daddr {site} tcp dport {site_port} notrack \
                 {ip} daddr set {guest} tcp dport set {guest_port}\n"
            ));
            untracked.push_str(&format!(
                "    {ip} saddr {guest} tcp sport {guest_port} {ip} daddr @edges notrack\n"
            ));
            outwards.push_str(&format!(
                "    {ip} saddr {guest} tcp sport {guest_port} {ip} daddr @edges \
                 {ip} saddr set {site} tcp sport set {site_port}\n"
            ));
        }
        let kind = address_type(site);
        let contents = format!(
            "  set edges {{\n    type {kind}\n    elements = {{ {edges} }}\n  }}\n  \
               chain inwards {{\n    type filter hook prerouting priority raw; policy accept;\n\
             {inwards}{untracked}  }}\n  \
               chain outwards {{\n    type filter hook postrouting priority raw; policy accept;\n\
             {outwards}  }}\n"
        );
        replacement(&self.table(), &contents)
    }

    /// Sets the rules in this host's kernel, in one transaction.
    ///
    /// # Errors
    /// When the translation makes no sense, or with what `nft` said.
    pub fn apply(&self) -> Result<()> {
        self.check()?;
        nftables::load(&self.rules())
    }

    /// Removes them. That they were not there is no error.
    ///
    /// # Errors
    /// With what `nft` said.
    pub fn remove(&self) -> Result<()> {
        nftables::load(&removal(&self.table()))
    }

    /// Whether a table of its name is there.
    #[must_use]
    pub fn is_applied(&self) -> bool {
        nftables::list("table", &self.table()).is_ok()
    }
}

/// Whether this host passes packets on, without which a translation leads nowhere.
#[must_use]
pub fn forwards_packets(address: IpAddr) -> bool {
    let file = if address.is_ipv4() {
        "/proc/sys/net/ipv4/ip_forward"
    } else {
        "/proc/sys/net/ipv6/conf/all/forwarding"
    };
    std::fs::read_to_string(file).is_ok_and(|text| text.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translation() -> Translation {
        Translation {
            guest: "my desktop".into(),
            site_address: "198.51.100.7".parse().unwrap(),
            guest_address: "10.7.0.5".parse().unwrap(),
            edges: vec!["192.0.2.1".parse().unwrap()],
            forwards: vec![Forward {
                site_port: 15900,
                guest_port: 5900,
            }],
        }
    }

    #[test]
    fn rules_of_both_directions() {
        let rules = translation().rules();
        assert!(rules.contains("table ip vmshadow_inwards_my_20desktop {"));
        assert!(rules.contains("elements = { 192.0.2.1 }"));
        assert!(rules.contains(
            "ip saddr @edges ip daddr 198.51.100.7 tcp dport 15900 notrack \
             ip daddr set 10.7.0.5 tcp dport set 5900\n"
        ));
        assert!(rules.contains(
            "ip saddr 10.7.0.5 tcp sport 5900 ip daddr @edges \
             ip saddr set 198.51.100.7 tcp sport set 15900\n"
        ));
    }

    #[test]
    fn names_do_not_meet() {
        let (mut one, mut two) = (translation(), translation());
        one.guest = "a b".into();
        two.guest = "a_b".into();
        assert_ne!(one.table(), two.table());
    }

    #[test]
    fn nonsense_is_refused() {
        for spoil in [
            (|t| t.edges.clear()) as fn(&mut Translation),
            |t| t.forwards.clear(),
            |t| t.guest.clear(),
            |t| t.guest_address = "2001:db8::1".parse().unwrap(),
        ] {
            let mut bad = translation();
            spoil(&mut bad);
            assert!(matches!(bad.apply(), Err(Error::Config(_))));
        }
    }
}
