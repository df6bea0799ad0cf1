//! How this site leads the edge's packets to a guest, and what is remembered of it.
//!
//! ```text
//!                  open                             close
//! no path ─────────────────────▶ path ───────────────────────▶ no path
//!           /run/vmshadow/paths/NAME.json, written first, removed last
//! ```
//! The file says what is to be taken back, whoever has set it and however it ended. It and the
//! kernel's rules both end with a reboot.

use std::fs;
use std::io::{ErrorKind, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use migrate::directories::Directories;
use migrate::guest::xen::host::Host;
use migrate::handover::journal;
use migrate::handover::recovery::{Action, action};
use netproxy::control::Reach;
use netproxy::site::{Neighbour, Translation, forwards_packets};
use serde::{Deserialize, Serialize};

use super::Edge;

/// The format of the file. In version 1 each path had a translation.
const VERSION: u32 = 2;

/// The paths of this site.
pub struct Paths {
    directory: PathBuf,
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
            directory: directories.runtime.join("paths"),
        }
    }

    fn file(&self, guest: &str) -> anyhow::Result<PathBuf> {
        anyhow::ensure!(
            !guest.is_empty() && !guest.starts_with('.') && !guest.contains(['/', '\0']),
            "{guest:?} is no name of a guest"
        );
        Ok(self.directory.join(format!("{guest}.json")))
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
        let mut client = edge.connect()?;
        if edge.whereabouts(&mut client, guest)?.is_none() {
            return Ok(false);
        }
        let Reach {
            address,
            translation,
        } = client.reach(guest, &edge.site)?;
        // The edge may only say how its own packets get to the guest that was asked for.
        let answers = |of: &Translation| of.guest == guest && of.guest_address == address;
        anyhow::ensure!(
            translation.as_ref().is_none_or(answers),
            "The edge answers for another guest"
        );
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
        self.close(guest)?;
        self.write(guest, &record)?;
        if let Some(translation) = &record.translation {
            translation.apply()?;
        }
        if let Some(entry) = &record.neighbour {
            entry.neighbour().apply()?;
        }
        Ok(true)
    }

    /// Takes the path to a guest back. True if there was one.
    ///
    /// # Errors
    /// What the kernel's tools refuse.
    pub fn close(&self, guest: &str) -> anyhow::Result<bool> {
        let path = self.file(guest)?;
        let Some(record) = read(&path)? else {
            return Ok(false);
        };
        if let Some(translation) = &record.translation {
            translation.remove()?;
        }
        if let Some(entry) = &record.neighbour {
            entry.neighbour().remove()?;
        }
        fs::remove_file(&path).with_context(|| format!("Can't remove {}", path.display()))?;
        Ok(true)
    }

    /// Takes back what moves have opened for guests that did not come, or are gone. What can't be
    /// done is logged.
    pub fn tidy(&self, directories: &Directories) {
        if let Err(error) = self.try_to_tidy(directories) {
            log::warn!("Paths to guests that are gone may be left: {error:#}");
        }
    }

    fn try_to_tidy(&self, directories: &Directories) -> anyhow::Result<()> {
        let names = self.names()?;
        if names.is_empty() {
            return Ok(());
        }
        let wanted = present_or_expected(directories)?;
        for name in names {
            let Some(record) = read(&self.file(&name)?)? else {
                continue;
            };
            if record.by_move && !wanted.contains(&record.uuid) {
                self.close(&name)?;
            }
        }
        Ok(())
    }

    fn names(&self) -> anyhow::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            names.extend(name.strip_suffix(".json").map(str::to_owned));
        }
        Ok(names)
    }

    fn write(&self, guest: &str, record: &Record) -> anyhow::Result<()> {
        let path = self.file(guest)?;
        let write = || {
            fs::create_dir_all(&self.directory)?;
            let new = self.directory.join(format!(".{guest}.new"));
            fs::File::create(&new)?.write_all(&serde_json::to_vec(record)?)?;
            fs::rename(new, &path)
        };
        write().with_context(|| format!("Can't write {}", path.display()))
    }
}

/// The UUIDs of the guests that are here, or that a move may still bring.
pub(super) fn present_or_expected(directories: &Directories) -> anyhow::Result<Vec<String>> {
    let host = Host::open()?;
    let domains = host.ctl().domains()?;
    let here = domains
        .iter()
        .filter(|info| !info.dying)
        .map(|info| host.uuid_text(info));
    let expected = journal::list(directories)?
        .into_iter()
        .filter(|entry| action(entry) != Action::Nothing)
        .map(|entry| entry.begin.uuid);
    Ok(here.chain(expected).collect())
}

fn read(path: &Path) -> anyhow::Result<Option<Record>> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.with_context(|| format!("Can't read {}", path.display()))?,
    };
    let record: Record =
        serde_json::from_slice(&text).with_context(|| format!("Bad {}", path.display()))?;
    if !(1..=VERSION).contains(&record.version) {
        return Err(anyhow!("{} is of another version", path.display()));
    }
    Ok(Some(record))
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

    #[test]
    fn names_stay_in_their_directory() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::new(&Directories::under(root.path()));
        for name in ["", "..", "../x", "a/b", ".x"] {
            assert!(paths.close(name).is_err(), "{name}");
        }
        assert!(!paths.close("g1").unwrap());
        assert!(paths.names().unwrap().is_empty());
    }

    #[test]
    fn a_record_of_another_version_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::new(&Directories::under(root.path()));
        let record = Record {
            version: VERSION + 1,
            uuid: String::new(),
            by_move: true,
            translation: None,
            neighbour: None,
        };
        paths.write("g1", &record).unwrap();
        assert_eq!(paths.names().unwrap(), ["g1"]);
        let error = paths.close("g1").unwrap_err();
        assert!(error.to_string().ends_with("of another version"), "{error}");
    }
}
