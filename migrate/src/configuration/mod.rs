//! What a destination takes of the configuration that a peer sends with a guest.
//!
//! The configuration is libxl's (`libxl_domain_config_to_json`; the fields are in Xen's
//! tools/libs/light/libxl_types.idl). Some of it is as good as root here: programs that run as
//! hotplug scripts, boot loaders or device models, files that are opened, devices that are passed
//! through. So a new document is written, and each field has one of three fates:
//!
//! ```text
//!   peer's document --+-- listed, and its value is possible ----> taken
//!                     |     paths and bridges: by this site's policy
//!                     |     memory: from what the guest really has
//!                     +-- would make another guest of it, -------> refused, by its name
//!                     |   or cannot move
//!                     +-- all else: scripts, programs, ----------> left out, and told
//!                         what belongs to the old host, unknown
//! ```
//!
//! What is left out gets libxl's default, which is this site's own.

mod build;
mod devices;
mod fields;

pub use devices::{keeps_parts_in_memory, need_qemu};

use crate::wire::{GuestKind, Offer, Text};
use fields::Fields;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What this site allows in the configuration of a guest that comes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SitePolicy {
    /// Directories that kernels and ramdisks may be in, and below.
    pub kernel_directories: Vec<String>,
    /// Directories that disks may be in, and below; of files and of block devices.
    pub disk_directories: Vec<String>,
    /// The bridge here for each bridge there.
    pub bridges: BTreeMap<String, String>,
    /// The bridge here for all others. Without one, a guest on an unknown bridge is refused.
    pub default_bridge: Option<String>,
    /// The program that a guest which boots by a boot loader gets here, such as `pygrub`. Without
    /// one it has none, and cannot boot again here.
    pub bootloader: Option<String>,
    /// The address that graphical consoles listen on here.
    pub vnc_listen: String,
}

impl Default for SitePolicy {
    /// Nothing of a peer's is trusted: no directory, no bridge; consoles on this host only.
    fn default() -> Self {
        Self {
            kernel_directories: Vec::new(),
            disk_directories: Vec::new(),
            bridges: BTreeMap::new(),
            default_bridge: None,
            bootloader: None,
            vnc_listen: "127.0.0.1".into(),
        }
    }
}

/// A path of this site's own configuration. It is read by processes that are started in different
/// directories.
///
/// # Errors
/// One that is not absolute.
pub fn absolute_path<'de, D: serde::Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    let path: PathBuf = serde::Deserialize::deserialize(from)?;
    match path.is_absolute() {
        true => Ok(path),
        false => Err(serde::de::Error::custom(format!(
            "{path:?} is no absolute path"
        ))),
    }
}

/// A configuration that this site may give to libxl.
#[derive(Clone, PartialEq)]
pub struct Accepted {
    /// The document, for `libxl_domain_config_from_json`.
    pub configuration: Value,
    /// Names of fields that were set and have been left out, for the user to know.
    pub left_out: Vec<Text>,
}

impl Accepted {
    /// The most pages that the guest may have.
    #[must_use]
    pub fn most_pages(&self) -> u64 {
        let kib = self.configuration.pointer("/b_info/max_memkb");
        kib.and_then(Value::as_u64).unwrap_or(0) / PAGE_KIB
    }
}

/// The memory in KiB that a new domain's balloon is told to come to, where the guest's own was told
/// `told` and has `pages` pages.
///
/// That is what it has, whatever it was meant to have: a restore that gives it less fails half-way.
/// A PVH guest's special pages count, though, among what it has, and not among what its balloon
/// does. Told the sum it would grow by so much with every move; so one that has come to its target
/// keeps it. libxl lets a domain have some more than its target, 1 MiB.
#[must_use]
pub fn balloon_target(kind: GuestKind, told: Option<u64>, pages: u64) -> u64 {
    let has = pages.saturating_mul(PAGE_KIB);
    match told {
        Some(told) if kind != GuestKind::Pv && has.abs_diff(told) <= SPECIAL_KIB => told,
        _ => has,
    }
}

/// KiB in a page.
const PAGE_KIB: u64 = 4;

/// By so much may what a guest has differ from its balloon's target, for special pages.
const SPECIAL_KIB: u64 = 512;

/// Does not show values: there may be passwords among them.
impl std::fmt::Debug for Accepted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accepted")
            .field("left_out", &self.left_out)
            .finish_non_exhaustive()
    }
}

/// A configuration that cannot be taken. The text is a field's name, like `disks[0].format`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigurationError {
    /// The field has to be there.
    #[error("Configuration lacks {0}")]
    Missing(Text),
    /// The field's value is not one that it can have.
    #[error("Configuration has a bad value in {0}")]
    Malformed(Text),
    /// A guest with this cannot move.
    #[error("A guest with {0} cannot move")]
    Unsupported(Text),
    /// This site's policy does not allow the value.
    #[error("This site does not allow {value:?} in {field}")]
    NotAllowed {
        /// The field.
        field: Text,
        /// Its value.
        value: Text,
    },
    /// The field contradicts the offer that the configuration came with.
    #[error("Configuration contradicts the offer in {0}")]
    Contradiction(Text),
}

/// Writes the configuration that a guest gets here, from the one that came in its offer.
///
/// Paths are judged by their text alone: whoever opens one has to make sure that it leads where
/// it says.
///
/// # Errors
/// Fails with the first field that is not possible, not allowed, or that a guest cannot move with.
pub fn accept(offer: &Offer, policy: &SitePolicy) -> Result<Accepted, ConfigurationError> {
    let root = Fields::root(&offer.configuration)?;
    let mut document = Map::new();

    document.insert("c_info".into(), create_info(&root, offer)?);
    document.insert("b_info".into(), build::build_info(&root, offer, policy)?);
    for (name, accept) in devices::ACCEPTED {
        let devices = root
            .objects(name, devices::MAX)?
            .iter()
            .map(|device| accept(device, policy))
            .collect::<Result<Vec<_>, _>>()?;
        if !devices.is_empty() {
            document.insert((*name).into(), devices.into());
        }
    }
    for name in [
        "on_poweroff",
        "on_reboot",
        "on_watchdog",
        "on_crash",
        "on_soft_reset",
    ] {
        // libxl leaves out what is its own default, "destroy".
        let action = root.choice(name, ACTIONS)?.unwrap_or("destroy");
        document.insert(name.into(), action.into());
    }
    // Any other kind of device, of this or of later versions of libxl.
    root.refuse_other_lists()?;
    let left_out = root.left_out();
    Ok(Accepted {
        configuration: document.into(),
        left_out,
    })
}

const ACTIONS: &[&str] = &[
    "destroy",
    "restart",
    "restart_rename",
    "preserve",
    "coredump_destroy",
    "coredump_restart",
    "soft_reset",
];

fn create_info(root: &Fields<'_>, offer: &Offer) -> Result<Value, ConfigurationError> {
    let info = root
        .object("c_info")?
        .ok_or_else(|| root.missing("c_info"))?;
    let kind = match offer.kind {
        GuestKind::Pv => "pv",
        GuestKind::Pvh => "pvh",
        GuestKind::Hvm => return Err(info.unsupported("type")),
    };
    if info.choice("type", &["pv", "pvh", "hvm"])? != Some(kind) {
        return Err(info.contradiction("type"));
    }
    if info.string("name")? != Some(&offer.name) {
        return Err(info.contradiction("name"));
    }
    if !info
        .string("uuid")?
        .is_some_and(|uuid| uuid.eq_ignore_ascii_case(&offer.uuid))
    {
        return Err(info.contradiction("uuid"));
    }
    info.refuse_true("driver_domain")?;
    if !matches!(
        info.choice(
            "passthrough",
            &["default", "disabled", "enabled", "sync_pt", "share_pt"]
        )?,
        None | Some("default" | "disabled")
    ) {
        return Err(info.unsupported("passthrough"));
    }
    // What belongs to the old host.
    for field in [
        "domid",
        "poolid",
        "pool_name",
        "run_hotplug_scripts",
        "ssidref",
    ] {
        info.ignore(field);
    }
    let mut taken = Map::new();
    info.take_defbools(&["hap", "oos"], &mut taken)?;
    taken.insert("type".into(), kind.into());
    taken.insert("name".into(), offer.name.as_str().into());
    taken.insert("uuid".into(), offer.uuid.to_ascii_lowercase().into());
    taken.insert("domid".into(), json!(0));
    Ok(taken.into())
}

#[cfg(test)]
mod tests;
