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

mod guest;
mod limits;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use crate::error::{Error, Result};

pub use guest::{GuestConfig, ServiceConfig, SiteConfig};
pub use limits::{ByteSize, Limits, Period};

/// The version of the file's format.
pub const VERSION: u32 = 1;

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
        let fail = |line: Option<usize>, message: &str| {
            let place = match line {
                Some(line) => format!("{name}:{line}"),
                None => name.to_owned(),
            };
            Error::Config(format!("{place}: {message}"))
        };
        let config: Self = toml::from_str(text).map_err(|error| {
            let (line, message) = explain(text, &error);
            fail(line, &message)
        })?;
        config
            .check()
            .map_err(|mistake| fail(Some(line_of(text, mistake.at)), &mistake.message))?;
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

/// The line of a text at which reading it ended, where that is known, and why, in one line.
#[must_use]
pub fn explain(text: &str, error: &toml::de::Error) -> (Option<usize>, String) {
    let line = error.span().map(|span| line_of(text, span.start));
    (line, error.message().trim_end().replace('\n', ": "))
}

/// The number of the line that holds byte `at`.
fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests;
