//! The connections that a guest has begun itself: led through the site where they began, for a
//! time, where the configuration says so.
//!
//! ```text
//!  source, guest suspended                       destination
//!  flows of connection tracking ──── wire ─────▶ detour, its side
//!  detour, this side                             before the guest runs
//!        └─ /run/vmshadow/outgoing/NAME.json: what is set up, and what was before
//!                 moved: that ends            stayed: it is set up again
//! ```
//! One detour a guest and site: only the last move counts.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use migrate::connections::Lead;
use migrate::directories::Directories;
use netproxy::config::Period;
use netproxy::site::{Detour, Flow, Side, Tunnel, unpack_flows};
use serde::{Deserialize, Serialize};

use super::Edge;
use super::records::{Records, present_or_expected};

/// The format of the file.
const VERSION: u32 = 1;

/// The longest time for which old connections may be led around.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// `[edge.outgoing]` of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// How long old connections are led around.
    #[serde(default = "default_limit", deserialize_with = "limit")]
    limit: Period,
    /// The tunnel to each other site, by its name at the edge. Guests that move from or to a site
    /// that is not here lose their own connections, where those are translated.
    sites: BTreeMap<String, Tunnel>,
}

fn default_limit() -> Period {
    Period(Duration::from_secs(3600))
}

fn limit<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Period, D::Error> {
    let period = Period::deserialize(from)?;
    if (Duration::from_secs(1)..=LONGEST).contains(&period.0) {
        Ok(period)
    } else {
        Err(serde::de::Error::custom("it is 1 s to 24 h"))
    }
}

impl Settings {
    /// Whether there is a tunnel to that site.
    pub fn leads_to(&self, site: &str) -> bool {
        self.sites.contains_key(site)
    }

    /// This site's side of the detour of a guest that goes to `site`, or comes from there.
    pub fn detour(
        &self,
        guest: &str,
        address: IpAddr,
        side: Side,
        site: &str,
        flows: Vec<Flow>,
    ) -> Option<Detour> {
        Some(Detour {
            guest: guest.to_owned(),
            guest_address: address,
            number: Detour::number_of(address),
            side,
            tunnel: self.sites.get(site)?.clone(),
            limit: self.limit.0,
            flows,
        })
    }
}

impl Edge {
    /// How the own connections of a guest that comes are led through the site that it leaves. None
    /// where they are not.
    ///
    /// # Errors
    /// Where the edge can't be reached.
    pub fn lead(&self, guest: &str, uuid: &str, detours: &Detours) -> anyhow::Result<Option<Lead>> {
        let Some(settings) = &self.outgoing else {
            return Ok(None);
        };
        let mut client = self.connect()?;
        let Some(known) = self.look_up(&mut client, guest)? else {
            return Ok(None);
        };
        let from = known.site;
        if !settings.leads_to(&from) {
            return Ok(None);
        }
        let address = client.reach(guest, &self.site)?.address;
        let (settings, detours) = (settings.clone(), detours.clone());
        let (guest, uuid) = (guest.to_owned(), uuid.to_owned());
        Ok(Some(Box::new(move |bytes: Vec<u8>| {
            let (settings, detours) = (settings.clone(), detours.clone());
            let (guest, uuid, from) = (guest.clone(), uuid.clone(), from.clone());
            thread::spawn(move || {
                let set = unpack_flows(&bytes).map_err(Into::into).and_then(|flows| {
                    // What is of the other family can't be the guest's.
                    anyhow::ensure!(
                        flows
                            .iter()
                            .all(|flow| flow.remote.is_ipv4() == address.is_ipv4()),
                        "The other site's list of flows makes no sense"
                    );
                    match settings.detour(&guest, address, Side::New, &from, flows) {
                        Some(detour) => detours.set(&uuid, detour),
                        None => Ok(()),
                    }
                });
                if let Err(error) = set {
                    log::warn!("The own connections of {guest} may end: {error:#}");
                }
            })
        })))
    }
}

/// What is set up at this site for guests' own connections.
#[derive(Clone)]
pub struct Detours {
    records: Records,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    uuid: String,
    /// None where a guest goes or comes that has no connections of its own.
    detour: Option<Detour>,
    side: Side,
    /// What there was before the move under way.
    before: Option<Detour>,
    /// Whether it is not known yet how the move ends.
    open: bool,
}

impl Detours {
    /// The detours of the host with these directories.
    pub fn new(directories: &Directories) -> Self {
        Detours {
            records: Records::new(directories, "outgoing", VERSION..=VERSION),
        }
    }

    fn record(&self, guest: &str) -> anyhow::Result<Option<Record>> {
        self.records.read(guest)
    }

    /// Sets one up for a move under way, in place of what the guest has here.
    ///
    /// # Errors
    /// What the kernel's tools refuse; then it has none.
    pub fn set(&self, uuid: &str, detour: Detour) -> anyhow::Result<()> {
        let guest = detour.guest.clone();
        for other in self.records.names()? {
            let number = self.record(&other)?.and_then(|record| record.detour);
            anyhow::ensure!(
                other == guest || number.is_none_or(|other| other.number != detour.number),
                "The addresses of {guest} and {other} end alike: only one can have a detour"
            );
        }
        let before = self.record(&guest)?.and_then(|record| match record.open {
            true => record.before,
            false => record.detour,
        });
        let side = detour.side;
        let detour = (!detour.flows.is_empty()).then_some(detour);
        let record = Record {
            version: VERSION,
            uuid: uuid.to_owned(),
            detour,
            side,
            before,
            open: true,
        };
        self.records.write(&guest, &record)?;
        if let Some(before) = &record.before {
            before.remove()?;
        }
        match &record.detour {
            Some(detour) => Ok(detour.apply()?),
            None => Ok(()),
        }
    }

    /// The guest's move has ended, and it is here or not: what was set up for the move stays, or
    /// what was before is set up again.
    ///
    /// # Errors
    /// What the kernel's tools refuse.
    pub fn settle(&self, guest: &str, here: bool) -> anyhow::Result<()> {
        let Some(mut record) = self.record(guest)?.filter(|record| record.open) else {
            return Ok(());
        };
        let moved = (record.side == Side::New) == here;
        let before = record.before.take();
        if !moved {
            if let Some(detour) = &record.detour {
                detour.remove()?;
            }
            if let Some(before) = &before {
                before.apply()?;
            }
            record.detour = before;
        }
        record.open = false;
        match record.detour {
            Some(_) => self.records.write(guest, &record),
            None => self.records.forget(guest),
        }
    }

    /// Takes away what is over, and what was set up for guests that did not come. What can't be
    /// done is logged.
    pub fn tidy(&self, directories: &Directories) {
        self.tidy_but(|| present_or_expected(directories));
    }

    /// `wanted` says which guests are here, or may come.
    fn tidy_but(&self, wanted: impl Fn() -> anyhow::Result<Vec<String>>) {
        let names = match self.records.names() {
            Ok(names) => names,
            Err(error) => {
                log::warn!("Detours of guests that are gone may be left: {error:#}");
                return;
            }
        };
        for name in names {
            if let Err(error) = self.tidy_one(&name, &wanted) {
                log::warn!("The detour of {name} may be left: {error:#}");
            }
        }
    }

    fn tidy_one(
        &self,
        name: &str,
        wanted: impl Fn() -> anyhow::Result<Vec<String>>,
    ) -> anyhow::Result<()> {
        let Some(record) = self.record(name)? else {
            return Ok(());
        };
        if record.open {
            // How a guest's leaving ends is for its journal to tell.
            if record.side == Side::New && !wanted()?.contains(&record.uuid) {
                self.settle(name, false)?;
            }
        } else if let Some(detour) = record.detour.filter(Detour::is_over) {
            detour.remove()?;
            self.records.forget(name)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "limit = \"10m\"\n\
        sites.dublin.vxlan = { local = \"192.0.2.1\", remote = \"192.0.2.2\", port = 4789 }\n\
        sites.oslo.device = { name = \"wg0\" }\n";

    #[test]
    fn each_site_has_its_tunnel() {
        let settings: Settings = toml::from_str(TEXT).unwrap();
        let address = "10.7.0.5".parse().unwrap();
        let to = |site| settings.detour("g1", address, Side::Old, site, Vec::new());
        let dublin = to("dublin").unwrap();
        assert_eq!(dublin.limit, Duration::from_secs(600));
        assert!(matches!(dublin.tunnel, Tunnel::Vxlan { port: 4789, .. }));
        assert!(matches!(
            to("oslo").unwrap().tunnel,
            Tunnel::Device { gateway: None, .. }
        ));
        assert!(to("rome").is_none() && !settings.leads_to("rome"));
    }

    #[test]
    fn its_time_is_bounded_and_mistakes_are_named() {
        for (from, to) in [
            ("10m", "25h"),
            ("10m", "0"),
            ("port", "prt"),
            ("wg0\"", "wg0\", gatewy = \"10.0.0.1\""),
        ] {
            let text = TEXT.replacen(from, to, 1);
            assert!(toml::from_str::<Settings>(&text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_move_that_fails_leaves_what_was_before() {
        let root = tempfile::tempdir().unwrap();
        let detours = Detours::new(&Directories::under(root.path()));
        let settings: Settings = toml::from_str(TEXT).unwrap();
        let address = "10.7.0.5".parse().unwrap();
        // Without flows nothing of the kernel is touched.
        let none = settings.detour("g1", address, Side::Old, "oslo", Vec::new());
        detours.set("uuid", none.clone().unwrap()).unwrap();
        assert_eq!(detours.records.names().unwrap(), ["g1"]);
        detours.settle("g1", true).unwrap();
        assert!(detours.records.names().unwrap().is_empty());
        detours.set("uuid", none.unwrap()).unwrap();
        detours.settle("g1", false).unwrap();
        detours.settle("g1", false).unwrap();
        assert!(detours.records.names().unwrap().is_empty());
        assert!(detours.settle("../x", true).is_err());
    }

    #[test]
    fn each_detour_is_tidied_by_itself() {
        let root = tempfile::tempdir().unwrap();
        let detours = Detours::new(&Directories::under(root.path()));
        let settings: Settings = toml::from_str(TEXT).unwrap();
        let address = "10.7.0.5".parse().unwrap();
        // Without flows nothing of the kernel is touched.
        for (name, uuid) in [("gone", "gone"), ("here", "here")] {
            let none = settings.detour(name, address, Side::New, "oslo", Vec::new());
            detours.set(uuid, none.unwrap()).unwrap();
        }
        for number in 0..5 {
            let name = format!("bad{number}");
            detours.records.write(&name, &()).unwrap();
        }
        detours.tidy_but(|| Ok(vec!["here".into()]));
        let mut left = detours.records.names().unwrap();
        left.sort();
        assert_eq!(left, ["bad0", "bad1", "bad2", "bad3", "bad4", "here"]);
    }
}
