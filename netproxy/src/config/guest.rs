//! `[[guest]]`: where a guest is reached, and by which services.
//!
//! ```text
//!  client ──▶ listen ──▶ the site's address:site_port ── translation ──▶ guest:port
//!                        the guest's own address:port, where it is routed
//! ```
//!
//! All sites of a guest are of one family of addresses, and a port of the guest has one port at the
//! sites that translate: connections are moved as they are, and a site has one way back.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::{Mistake, mistake};
use crate::error::{Error, Result};
use crate::site::{Forward, Translation};

/// What the kernel takes for `mss`, beside 0 for none.
const MSS: RangeInclusive<u16> = 88..=32_767;

/// One guest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct GuestConfig {
    /// Its name.
    pub name: Spanned<String>,
    /// Its own address, the same at every site.
    pub address: IpAddr,
    /// The address of this host that the guest sees. Routing chooses it if not given.
    pub source: Option<IpAddr>,
    /// The largest segment on connections to the guest, for sites with a smaller path MTU: a
    /// connection keeps what it agreed on when it was opened. 0 is as if it was not given.
    pub mss: Option<u16>,
    /// The site where it is at first.
    pub site: Spanned<String>,
    /// The sites where it can be.
    pub sites: BTreeMap<String, Spanned<SiteConfig>>,
    /// Connections to it, in all.
    #[serde(default = "all", skip_serializing_if = "is_all")]
    pub connections: usize,
    /// Its services.
    #[serde(default, rename = "service")]
    pub services: Vec<ServiceConfig>,
}

fn all() -> usize {
    usize::MAX
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_all(connections: &usize) -> bool {
    *connections == all()
}

/// How a guest is reached at a site: `address` or `routed`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SiteConfig {
    /// The site's address, from which it translates to the guest's.
    pub address: Option<IpAddr>,
    /// The guest's own address is routed to the site.
    #[serde(default)]
    pub routed: bool,
    /// A port of the site itself that accepts connections (ssh, for one). An ordinary connection
    /// to it tells the kernel the round trip time ahead of a move.
    pub probe_port: Option<u16>,
    /// The address for that, if it is not `address`.
    pub probe_address: Option<IpAddr>,
}

/// One service of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceConfig {
    /// Its name, for lists and metrics.
    pub name: Spanned<String>,
    /// Where clients connect to.
    pub listen: Vec<Spanned<SocketAddr>>,
    /// The guest's port.
    pub port: Spanned<u16>,
    /// The port at sites that translate; the same as `port` if not given.
    pub site_port: Option<u16>,
    /// Who may connect. Everyone, if not given.
    pub allow: Option<Vec<IpNet>>,
    /// Whether the guest is told the client's address by a PROXY protocol header, version 2.
    #[serde(default)]
    pub proxy_protocol: bool,
}

impl GuestConfig {
    pub(super) fn check(
        &self,
        listeners: &mut BTreeSet<SocketAddr>,
    ) -> std::result::Result<(), Mistake> {
        // Not when it is read: a guest that another program hands over is taken as it is.
        if self.mss.is_some_and(|mss| mss != 0 && !MSS.contains(&mss)) {
            return Err(mistake(
                &self.name,
                format!("An mss is {} to {}, or 0 for none", MSS.start(), MSS.end()),
            ));
        }
        if !self.sites.contains_key(self.site.get_ref()) {
            return Err(mistake(
                &self.site,
                format!("There is no [guest.sites.{}]", self.site.get_ref()),
            ));
        }
        for site in self.sites.values() {
            let settings = site.get_ref();
            let reach = match (settings.address, settings.routed) {
                (Some(address), false) => address,
                (None, true) => self.address,
                _ => {
                    return Err(mistake(
                        site,
                        "A site has either an address, or routed = true",
                    ));
                }
            };
            if self
                .source
                .is_some_and(|source| source.is_ipv4() != reach.is_ipv4())
            {
                return Err(mistake(
                    site,
                    "The source is not of the family of this address",
                ));
            }
            if self.sites.values().any(|other| {
                other.get_ref().address.unwrap_or(self.address).is_ipv4() != reach.is_ipv4()
            }) {
                return Err(mistake(
                    site,
                    "All sites of a guest must be of one family: a connection can't change it",
                ));
            }
        }
        let mut names = BTreeSet::new();
        let mut site_ports = BTreeMap::new();
        for service in &self.services {
            if service.name.get_ref().is_empty() || !names.insert(service.name.get_ref()) {
                return Err(mistake(&service.name, "A service's name must be its own"));
            }
            if *service.port.get_ref() == 0 || service.site_port == Some(0) {
                return Err(mistake(&service.port, "A port can't be 0"));
            }
            // A site has one way to translate what the guest sends from it.
            let site_port = *site_ports
                .entry(*service.port.get_ref())
                .or_insert(service.site_port);
            if site_port != service.site_port {
                return Err(mistake(
                    &service.port,
                    "Another service of this port has another site_port",
                ));
            }
            for listen in &service.listen {
                // Port 0 is any port, and never twice the same.
                if listen.get_ref().port() != 0 && !listeners.insert(*listen.get_ref()) {
                    return Err(mistake(listen, "Another service listens there"));
                }
            }
        }
        Ok(())
    }

    /// The address by which the guest is reached while it is at `site`.
    #[must_use]
    pub fn reach(&self, site: &str) -> Option<IpAddr> {
        let site = self.sites.get(site)?.get_ref();
        Some(site.address.unwrap_or(self.address))
    }

    /// Where a service of the guest is reached while the guest is at `site`.
    #[must_use]
    pub fn upstream(&self, site: &str, service: &ServiceConfig) -> Option<SocketAddr> {
        let forward = self.forward(service);
        let port = match self.sites.get(site)?.get_ref().address {
            Some(_) => forward.site_port,
            None => forward.guest_port,
        };
        Some(SocketAddr::new(self.reach(site)?, port))
    }

    /// The services that are reached at `at` while the guest is at one of its sites.
    pub(crate) fn reached_at(&self, at: SocketAddr) -> impl Iterator<Item = &ServiceConfig> {
        // Most sites are elsewhere: that is cheaper to see than where each service is.
        let sites = self.sites.keys().filter(move |site| {
            let reach = self.reach(site);
            reach.is_some_and(|reach| reach == at.ip())
        });
        let services = sites.flat_map(|site| self.services.iter().map(move |it| (site, it)));
        services
            .filter(move |(site, service)| self.upstream(site, service) == Some(at))
            .map(|(_, service)| service)
    }

    /// The port of sites that translate for a service, which may be one that is not named any more.
    /// A site has one way back for a port of the guest, so that is the one of who has it now.
    pub(crate) fn forward(&self, service: &ServiceConfig) -> Forward {
        let guest_port = *service.port.get_ref();
        let mut named = self.services.iter();
        let named = named.find(|own| *own.port.get_ref() == guest_port);
        Forward {
            site_port: named.unwrap_or(service).site_port.unwrap_or(guest_port),
            guest_port,
        }
    }

    /// What `site` has to translate so that the guest is reached there. None where the guest's own
    /// address is routed.
    ///
    /// # Errors
    /// [`Error::UnknownSite`]; [`Error::Config`] if the configuration does not say by which
    /// address (`source`) this host is known there.
    pub fn translation(&self, site: &str) -> Result<Option<Translation>> {
        let guest = self.name.get_ref().clone();
        let Some(settings) = self.sites.get(site) else {
            let site = site.to_owned();
            return Err(Error::UnknownSite { guest, site });
        };
        let Some(site_address) = settings.get_ref().address else {
            return Ok(None);
        };
        let Some(edge) = self.source else {
            return Err(Error::Config(format!(
                "Guest {guest} has no `source`: its sites can't tell this host from others"
            )));
        };
        let mut forwards: Vec<Forward> = Vec::new();
        for service in &self.services {
            let forward = self.forward(service);
            if !forwards.contains(&forward) {
                forwards.push(forward);
            }
        }
        Ok(Some(Translation {
            guest,
            site_address,
            guest_address: self.address,
            edges: vec![edge],
            forwards,
        }))
    }

    /// Where to connect to learn the round trip time to a site, if the configuration says.
    #[must_use]
    pub fn probe(&self, site: &str) -> Option<SocketAddr> {
        let site = self.sites.get(site)?.get_ref();
        Some(SocketAddr::new(
            site.probe_address.or(site.address)?,
            site.probe_port?,
        ))
    }
}
