//! How this site leads the edge's packets to a guest, and what is remembered of it.
//!
//! ```text
//!                  open                             close
//! no path ─────────────────────▶ path ───────────────────────▶ no path
//!           /run/vmshadow/paths/NAME.json, written first, removed last
//! ```

use std::net::IpAddr;

use migrate::directories::Directories;
use netproxy::control::Reach;
use netproxy::site::{Neighbour, Translation, forwards_packets};
use serde::{Deserialize, Serialize};

use super::Edge;
use super::records::{Records, present_or_expected};

/// The format of the file. In version 1 each path had a translation.
const VERSION: u32 = 2;

/// The paths of this site.
pub struct Paths {
    records: Records,
}

/// A path that is there.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    uuid: String,
    /// Whether a move has opened it: then it ends with the guest's presence.
    by_move: bool,
    /// None where the guest's own address is routed here.
    translation: Option<Translation>,
    neighbour: Option<Entry>,
}

impl Record {
    /// Takes back what `now` has not replaced.
    fn remove_beside(&self, now: &Record) -> anyhow::Result<()> {
        let table = |record: &Record| record.translation.as_ref().map(Translation::table);
        if let Some(translation) = &self.translation
            && table(self) != table(now)
        {
            translation.remove()?;
        }
        let place = |record: &Record| {
            let entry = record.neighbour.as_ref();
            entry.map(|entry| (entry.address, entry.device.clone()))
        };
        if let Some(entry) = &self.neighbour
            && place(self) != place(now)
        {
            entry.neighbour().remove()?;
        }
        Ok(())
    }
}

/// A neighbour entry.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    address: IpAddr,
    mac: [u8; 6],
    device: String,
}

impl Entry {
    fn neighbour(&self) -> Neighbour {
        Neighbour {
            address: self.address,
            mac: self.mac,
            device: self.device.clone(),
        }
    }
}

impl Paths {
    /// The paths of the host with these directories.
    pub fn new(directories: &Directories) -> Self {
        Paths {
            records: Records::new(directories, "paths", 1..=VERSION),
        }
    }

    /// Leads the edge's packets to a guest, of which `configuration` says where its interface is.
    /// False where the edge does not know it.
    ///
    /// # Errors
    /// Where the edge can't be reached, or the kernel's tools refuse.
    pub fn open(
        &self,
        edge: &Edge,
        guest: &str,
        uuid: &str,
        configuration: &serde_json::Value,
        by_move: bool,
    ) -> anyhow::Result<bool> {
        let Some(reach) = edge.reach(guest)? else {
            return Ok(false);
        };
        let Reach {
            address,
            translation,
        } = reach;
        if !forwards_packets(address) {
            log::warn!("This host does not forward packets: set net.ipv4.ip_forward=1");
        }
        let record = Record {
            version: VERSION,
            uuid: uuid.to_owned(),
            by_move,
            neighbour: interface(configuration).map(|(mac, device)| Entry {
                address,
                mac,
                device,
            }),
            translation,
        };
        let before = self.records.read::<Record>(guest)?;
        self.records.write(guest, &record)?;
        // In place of the ones that are there: without them this host would answer the edge's
        // packets itself, with resets.
        if let Some(translation) = &record.translation {
            translation.apply()?;
        }
        if let Some(entry) = &record.neighbour {
            entry.neighbour().apply()?;
        }
        if let Some(before) = before {
            before.remove_beside(&record)?;
        }
        Ok(true)
    }

    /// Whether there is a path to a guest.
    ///
    /// # Errors
    /// What is written down can't be read.
    pub fn is_open(&self, guest: &str) -> anyhow::Result<bool> {
        Ok(self.records.read::<Record>(guest)?.is_some())
    }

    /// Takes the path to a guest back. True if there was one.
    ///
    /// # Errors
    /// What the kernel's tools refuse.
    pub fn close(&self, guest: &str) -> anyhow::Result<bool> {
        let Some(record) = self.records.read::<Record>(guest)? else {
            return Ok(false);
        };
        if let Some(translation) = &record.translation {
            translation.remove()?;
        }
        if let Some(entry) = &record.neighbour {
            entry.neighbour().remove()?;
        }
        self.records.forget(guest)?;
        Ok(true)
    }

    /// Takes back what moves have opened for guests that did not come, or are gone, unless the edge
    /// has yet to follow them. What can't be done is logged.
    pub fn tidy(&self, directories: &Directories, edge: Option<&Edge>) {
        self.tidy_but(|| present_or_expected(directories), edge);
    }

    /// `wanted` says which guests are here, or may come.
    fn tidy_but(&self, wanted: impl Fn() -> anyhow::Result<Vec<String>>, edge: Option<&Edge>) {
        let names = match self.records.names() {
            Ok(names) => names,
            Err(error) => {
                log::warn!("Paths to guests that are gone may be left: {error:#}");
                return;
            }
        };
        for name in names {
            let gone = || {
                let record = self.records.read::<Record>(&name)?;
                let Some(record) = record.filter(|record| record.by_move) else {
                    return Ok(false);
                };
                Ok::<_, anyhow::Error>(!wanted()?.contains(&record.uuid))
            };
            let left = |error| log::warn!("The path to {name} may be left: {error:#}");
            match gone() {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    left(error);
                    continue;
                }
            }
            match edge.map(|edge| edge.needs_path(&name)).transpose() {
                Ok(Some(true)) => {
                    log::info!("The path to {name} stays until the edge has followed");
                    continue;
                }
                Ok(_) => {}
                Err(error) => {
                    // It says no more of the others.
                    left(error);
                    return;
                }
            }
            // Again, as the edge takes its time: the guest may be on its way here meanwhile.
            match gone() {
                Ok(true) => drop(self.close(&name).map_err(left)),
                Ok(false) => {}
                Err(error) => left(error),
            }
        }
    }
}

/// The guest's first interface: its MAC address, and the bridge that leads to it.
fn interface(configuration: &serde_json::Value) -> Option<([u8; 6], String)> {
    let nic = configuration.get("nics")?.get(0)?;
    let mut mac = [0; 6];
    let mut bytes = nic.get("mac")?.as_str()?.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(bytes.next()?, 16).ok()?;
    }
    let bridge = nic.get("bridge")?.as_str()?;
    (bytes.next().is_none() && !bridge.is_empty()).then(|| (mac, bridge.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Neither what can't be read nor a bridge that is gone keeps the other paths.
    #[test]
    fn each_path_is_tidied_by_itself() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::new(&Directories::under(root.path()));
        let record = |uuid: &str, by_move| {
            json!({
                "version": VERSION, "uuid": uuid, "by_move": by_move, "translation": null,
                "neighbour": {
                    "address": "192.0.2.7", "mac": [0, 22, 62, 0, 0, 1], "device": "nowhere0"
                },
            })
        };
        for number in 0..5 {
            let write = |name: &str, record| paths.records.write(name, &record).unwrap();
            write(&format!("bad{number}"), json!({}));
            write(&format!("gone{number}"), record("gone", true));
        }
        paths.records.write("here", &record("here", true)).unwrap();
        paths
            .records
            .write("by-hand", &record("by hand", false))
            .unwrap();
        paths.tidy_but(|| Ok(vec!["here".into()]), None);
        let mut left = paths.records.names().unwrap();
        left.sort();
        assert_eq!(
            left,
            ["bad0", "bad1", "bad2", "bad3", "bad4", "by-hand", "here"]
        );
    }

    #[test]
    fn the_first_interface_counts() {
        let nic = |mac: &str, bridge: &str| json!({ "nics": [{ "mac": mac, "bridge": bridge }] });
        assert_eq!(
            interface(&nic("00:16:3e:4d:00:65", "xenbr1")),
            Some(([0, 0x16, 0x3e, 0x4d, 0, 0x65], "xenbr1".into()))
        );
        for odd in [
            nic("00:16:3e:4d:00", "b"),
            nic("00:16:3e:4d:00:65:66", "b"),
            nic("00:16:3e:4d:00:6x", "b"),
            nic("00:16:3e:4d:00:65", ""),
            json!({ "nics": [] }),
            json!({}),
        ] {
            assert_eq!(interface(&odd), None, "{odd}");
        }
    }
}
