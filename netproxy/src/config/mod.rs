//! The configuration: a TOML file, checked as a whole before anything uses it.
//!
//! ```toml
//! version = 1
//!
//! [proxy]
//! control = "/run/netproxy/netproxy.sock"
//! state = "/var/lib/netproxy/netproxy.json"   # where each guest is; survives a restart
//! metrics = "127.0.0.1:9464"
//!
//! [limits]
//! connections = 20000
//!
//! [[guest]]
//! name = "desktop"
//! address = "10.7.0.5"         # the guest's own, the same at every site
//! source = "192.0.2.1"         # the edge's address that the guest sees
//! site = "frankfurt"           # where it is at first
//!
//! [guest.sites.frankfurt]
//! address = "198.51.100.7"     # answers for the guest, by a translation
//! probe_port = 22              # any port of the site itself that accepts
//!
//! [guest.sites.dublin]
//! routed = true                # or: the guest's own address is routed to this site
//!
//! [[guest.service]]
//! name = "vnc"
//! listen = ["0.0.0.0:5900", "[::]:5900"]
//! port = 5900                  # the guest's
//! site_port = 15900            # the sites', where they translate
//! allow = ["203.0.113.0/24"]
//! ```
//!
//! Errors name the line. What the file does not say has the default of the field here.

mod limits;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::error::{Error, Result};
use crate::site::{Forward, Translation};

pub use limits::{ByteSize, Limits, Period};

/// The version of the file's format.
pub const VERSION: u32 = 1;

/// What the kernel takes for `mss`, beside 0 for none.
const MSS: RangeInclusive<u16> = 88..=32_767;

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The format's version: 1.
    pub version: Spanned<u32>,
    /// The program itself.
    #[serde(default)]
    pub proxy: ProxySettings,
    /// Limits of all and of one.
    #[serde(default)]
    pub limits: Limits,
    /// The guests whose services are offered.
    #[serde(default, rename = "guest")]
    pub guests: Vec<GuestConfig>,
}

/// What concerns the program itself. Only read at the start.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProxySettings {
    /// Threads that carry connections; 0 is one for each core.
    pub threads: usize,
    /// The control socket.
    pub control: PathBuf,
    /// The file that keeps where each guest is. Without it, a restart goes by `site` again.
    pub state: Option<PathBuf>,
    /// Where Prometheus may ask for metrics, over HTTP. Nowhere if not given.
    pub metrics: Option<SocketAddr>,
    /// Pipes for splicing, in all. 0: everything is copied.
    pub pipes: usize,
    /// The size of a pipe in bytes.
    pub pipe_size: ByteSize,
    /// Marks sockets at a re-target, so that `table` routes them with a large initial congestion
    /// window. Any number that nothing else on this host uses.
    pub mark: u32,
    /// The routing table used for that, and the priority of the rule.
    pub table: u32,
    /// The longest time to keep receiving after a hold was asked for.
    pub grace: Period,
}

impl Default for ProxySettings {
    fn default() -> Self {
        Self {
            threads: 0,
            control: "/run/netproxy/netproxy.sock".into(),
            state: None,
            metrics: None,
            pipes: 64,
            pipe_size: ByteSize(1 << 20),
            mark: 0x766d_7368,
            table: 7_760,
            grace: Period(Duration::from_millis(250)),
        }
    }
}

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

/// A mistake and the place of it in the text.
struct Mistake {
    at: usize,
    message: String,
}

fn mistake<T>(spanned: &Spanned<T>, message: impl fmt::Display) -> Mistake {
    Mistake {
        at: spanned.span().start,
        message: message.to_string(),
    }
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`Error::File`] when it can't be read, [`Error::Config`] with the line when it is wrong.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::File {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Reads and checks text; `name` is its name in errors.
    ///
    /// # Errors
    /// [`Error::Config`] with the line.
    pub fn parse(text: &str, name: &str) -> Result<Self> {
        let fail = |at: Option<usize>, message: &str| {
            let place = match at {
                Some(at) => format!("{name}:{}", line_of(text, at)),
                None => name.to_owned(),
            };
            Error::Config(format!("{place}: {message}"))
        };
        let config: Self = toml::from_str(text)
            .map_err(|error| fail(error.span().map(|span| span.start), error.message()))?;
        config
            .check()
            .map_err(|mistake| fail(Some(mistake.at), &mistake.message))?;
        Ok(config)
    }

    fn check(&self) -> std::result::Result<(), Mistake> {
        if *self.version.get_ref() != VERSION {
            return Err(mistake(
                &self.version,
                format!(
                    "Version {} is not known; this is version 1",
                    self.version.get_ref()
                ),
            ));
        }
        self.limits.check()?;
        let mut names = BTreeSet::new();
        let mut listeners = BTreeSet::new();
        // Where each guest's ports are reached, and what is behind them.
        let mut reached: BTreeMap<SocketAddr, (&str, u16)> = BTreeMap::new();
        for guest in &self.guests {
            if guest.name.get_ref().is_empty() || !names.insert(guest.name.get_ref()) {
                return Err(mistake(&guest.name, "A guest's name must be its own"));
            }
            guest.check(&mut listeners)?;
            let name = guest.name.get_ref().as_str();
            for (site, service) in guest
                .sites
                .keys()
                .flat_map(|site| guest.services.iter().map(move |service| (site, service)))
            {
                let Some(at) = guest.upstream(site, service) else {
                    continue;
                };
                let behind = (name, *service.port.get_ref());
                if *reached.entry(at).or_insert(behind) != behind {
                    return Err(mistake(
                        &service.port,
                        format!(
                            "At site {site} another service is reached by {at}: \
                             give each its own site_port"
                        ),
                    ));
                }
            }
        }
        Ok(())
    }
}

impl GuestConfig {
    fn check(&self, listeners: &mut BTreeSet<SocketAddr>) -> std::result::Result<(), Mistake> {
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

/// The number of the line that holds byte `at`.
fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"
version = 1
[limits]
buffer = "64KiB"
idle = "5m"
connect = 3
[[guest]]
name = "desktop"
address = "10.7.0.5"
source = "192.0.2.1"
site = "a"
[guest.sites.a]
address = "198.51.100.7"
probe_port = 22
[guest.sites.b]
routed = true
[[guest.service]]
name = "vnc"
listen = ["0.0.0.0:5900", "[::]:5900"]
port = 5900
site_port = 15900
allow = ["203.0.113.0/24"]
"#;

    fn error(text: &str) -> String {
        Config::parse(text, "proxy.toml").unwrap_err().to_string()
    }

    #[test]
    fn a_whole_file() {
        let config = Config::parse(GOOD, "proxy.toml").unwrap();
        assert_eq!(config.limits.buffer, ByteSize(65536));
        assert_eq!(config.limits.idle, Period(Duration::from_secs(300)));
        assert_eq!(config.limits.connect, Period(Duration::from_secs(3)));
        let guest = &config.guests[0];
        let service = &guest.services[0];
        assert_eq!(
            guest.upstream("a", service),
            "198.51.100.7:15900".parse().ok()
        );
        assert_eq!(guest.upstream("b", service), "10.7.0.5:5900".parse().ok());
        assert_eq!(guest.upstream("c", service), None);
        assert_eq!(guest.probe("a"), "198.51.100.7:22".parse().ok());
        assert_eq!(guest.probe("b"), None);
    }

    #[test]
    fn a_site_is_told_what_to_translate() {
        let config = Config::parse(GOOD, "proxy.toml").unwrap();
        let mut guest = config.guests[0].clone();
        let translation = guest.translation("a").unwrap().unwrap();
        assert_eq!(translation.edges, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(
            translation.forwards,
            [Forward {
                site_port: 15900,
                guest_port: 5900
            }]
        );
        assert_eq!(guest.translation("b").unwrap(), None);
        assert!(matches!(
            guest.translation("c"),
            Err(Error::UnknownSite { .. })
        ));
        guest.source = None;
        assert!(matches!(guest.translation("a"), Err(Error::Config(_))));
    }

    #[test]
    fn errors_name_the_line() {
        let swap = |from: &str, to: &str| error(&GOOD.replace(from, to));
        assert_eq!(
            swap("version = 1", "version = 2"),
            "proxy.toml:2: Version 2 is not known; this is version 1"
        );
        assert!(swap("64KiB", "64 KB").starts_with("proxy.toml:4: a size is"));
        assert!(swap("\"5m\"", "\"5 days\"").starts_with("proxy.toml:5: a time is"));
        assert_eq!(
            swap("site = \"a\"", "site = \"z\""),
            "proxy.toml:11: There is no [guest.sites.z]"
        );
        assert!(swap("routed = true", "routed = false").starts_with("proxy.toml:15: A site has"));
        assert!(swap("[::]:5900", "0.0.0.0:5900").starts_with("proxy.toml:19: Another"));
        assert!(swap("port = 5900", "port = 0").starts_with("proxy.toml:20: A port"));
        assert!(swap("203.0.113.0/24", "here").starts_with("proxy.toml:22: "));
        assert!(swap("idle =", "idel =").starts_with("proxy.toml:5: unknown field"));
        assert!(swap("192.0.2.1", "2001:db8::1").starts_with("proxy.toml:12: The source"));
        assert!(swap("name = \"vnc\"", "name = \"\"").starts_with("proxy.toml:18: A service"));
        let mss = error(&GOOD.replace("site = \"a\"", "site = \"a\"\nmss = 80"));
        assert!(mss.starts_with("proxy.toml:8: An mss"), "{mss}");
    }

    #[test]
    fn what_is_reached_by_one_port_of_a_site_is_one_service() {
        let guest = &GOOD[GOOD.find("[[guest]]").unwrap()..];
        let second = guest
            .replace("\"desktop\"", "\"other\"")
            .replace("10.7.0.5", "10.7.0.6")
            .replace(":5900", ":5901");
        let both = |second: &str| Config::parse(&format!("{GOOD}{second}"), "proxy.toml");
        both(&second.replace("15900", "15901")).unwrap();
        let refused = both(&second).unwrap_err().to_string();
        assert!(
            refused.contains("reached by 198.51.100.7:15900"),
            "{refused}"
        );

        let service = "[[guest.service]]\nname = \"too\"\nlisten = []\nport = 5900\n";
        both(&format!("{service}site_port = 15900\n")).unwrap();
        let refused = both(service).unwrap_err().to_string();
        assert!(refused.contains("another site_port"), "{refused}");
        let refused =
            both(&format!("{service}site_port = 15900\n").replace("port = 5900", "port = 22"));
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("reached by"), "{refused}");
    }

    #[test]
    fn the_example_in_the_documentation_is_valid() {
        let source = include_str!("mod.rs");
        let example: String = source
            .lines()
            .map_while(|line| line.strip_prefix("//!"))
            .skip_while(|line| !line.contains("```toml"))
            .skip(1)
            .take_while(|line| !line.contains("```"))
            .map(|line| format!("{line}\n"))
            .collect();
        assert!(example.contains("[[guest.service]]"));
        Config::parse(&example, "example").unwrap();
        let guide = include_str!("../../../docs/guide/proxy.md");
        let mut parts = guide.split("```toml\n").skip(1);
        let example = parts.next().unwrap().split("```").next().unwrap();
        Config::parse(example, "guide").unwrap();
        let example = include_str!("../../../packaging/netproxy/netproxy.toml");
        Config::parse(example, "example").unwrap();
        let limits = example.replace("\n#[", "\n[").replace("\n#c", "\nc");
        let limits = Config::parse(&limits, "example").unwrap().limits;
        assert_eq!(limits, Limits::default());
    }

    proptest! {
        #[test]
        fn any_text_gives_an_answer(text in ".{0,200}", cut in 0_usize..500) {
            let _ = Config::parse(&text, "x");
            let _ = Config::parse(GOOD.get(..cut).unwrap_or(GOOD), "x");
        }
    }
}
