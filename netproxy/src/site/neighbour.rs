//! A permanent neighbour entry for a guest.
//!
//! A guest that arrives is not known by the site's ARP yet, and a lost first question costs a
//! second. The entry is set ahead, at the new site, and removed at the old one. The guest in its
//! turn has to find the same gateway MAC at both sites: give the bridges the same address.

use std::net::IpAddr;

use crate::error::{Error, Result};
use crate::program::run;

/// Where a guest's address is found on a local network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The guest's address.
    pub address: IpAddr,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The bridge or interface that leads to it.
    pub device: String,
}

impl Neighbour {
    fn text(&self) -> (String, String) {
        let mac = self.mac.map(|byte| format!("{byte:02x}")).join(":");
        (self.address.to_string(), mac)
    }

    /// Sets the entry, replacing another one.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn apply(&self) -> Result<()> {
        let (address, mac) = self.text();
        let device = &self.device;
        let arguments = [
            "neigh",
            "replace",
            &address,
            "lladdr",
            &mac,
            "dev",
            device,
            "nud",
            "permanent",
        ];
        run("ip", &arguments, "").map(drop)
    }

    /// Removes the entry. That there was none is no error, nor that its device is gone, and the
    /// entry with it.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn remove(&self) -> Result<()> {
        let address = self.address.to_string();
        let gone = |message: &str| {
            message.contains("No such file") || message.contains("Cannot find device")
        };
        match run("ip", &["neigh", "del", &address, "dev", &self.device], "") {
            Err(Error::Program { message, .. }) if gone(&message) => Ok(()),
            result => result.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_whose_device_is_gone_is_gone_too() {
        let neighbour = Neighbour {
            address: "192.0.2.7".parse().unwrap(),
            mac: [0, 22, 62, 0, 0, 1],
            device: "nowhere0".into(),
        };
        assert!(neighbour.apply().is_err());
        neighbour.remove().unwrap();
    }
}
