//! Why a guest can't be moved, found before anything is touched.
//!
//! Each refusal names what is in the way. What only shows later (a device added on the way) is
//! found by comparing [`Layout`]s right before and after the suspend.

use serde_json::Value;
use xen_sys::DomId;

use super::host::{Host, saver_at_work};
use crate::error::{Error, IoContext, Result};

/// What the operator allows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Allowed {
    /// Writable disks: they are shared storage.
    pub disks: bool,
}

/// A guest's configuration, as libxl tells it now.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// libxl's JSON.
    pub configuration: Value,
    /// vCPUs that are online.
    online_vcpus: u32,
}

impl Layout {
    /// Reads it.
    ///
    /// # Errors
    /// What libxl refuses.
    pub fn read(host: &Host, domid: DomId) -> Result<Layout> {
        let doing = || "Can't read the guest's configuration";
        let toolstack = host.toolstack();
        let configuration = toolstack.configuration(domid).context(doing)?;
        let text = toolstack.config_to_json(&configuration).context(doing)?;
        let mut configuration: Value = serde_json::from_str(&text).map_err(|error| {
            Error::Refused(format!("The guest's configuration can't be read: {error}"))
        })?;
        // The balloon's target may change on the way; the pages themselves are followed.
        if let Some(build) = configuration
            .get_mut("b_info")
            .and_then(Value::as_object_mut)
        {
            build.remove("target_memkb");
        }
        let online_vcpus = host.info(domid)?.online_vcpus;
        Ok(Layout {
            configuration,
            online_vcpus,
        })
    }

    /// # Errors
    /// [`Error::Refused`] where the guest is not as it was.
    pub fn unchanged(&self, host: &Host, domid: DomId) -> Result<()> {
        let now = Layout::read(host, domid)?;
        if now == *self {
            return Ok(());
        }
        let what = ["disks", "nics", "pcidevs", "usbdevs", "b_info", "c_info"]
            .into_iter()
            .find(|key| now.configuration.get(key) != self.configuration.get(key))
            .unwrap_or("configuration");
        Err(Error::Refused(format!(
            "The guest's {what} changed on the way; try again"
        )))
    }
}

/// Everything that speaks against moving the guest `domid`, in plain words. Empty: it can go.
///
/// # Errors
/// What Xen refuses.
pub fn hindrances(host: &Host, domid: DomId, allowed: Allowed) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let info = host.info(domid)?;
    if domid == DomId::DOM0 {
        return Ok(vec!["Domain-0 is the host itself".into()]);
    }
    if info.hvm {
        found.push("it is an HVM or PVH guest; only PV guests can be moved".into());
        return Ok(found);
    }
    if info.dying || info.shutdown.is_some() {
        found.push("it does not run".into());
    }
    if info.paused {
        found.push("it is paused, and a paused guest can't suspend".into());
    }
    let width = host
        .ctl()
        .guest_width(domid)
        .context(|| "Can't read the guest's width")?;
    if width != 8 {
        found.push("it is a 32-bit PV guest; only 64-bit ones can be moved".into());
    }
    let name = host.name(domid)?;
    if name.ends_with("--incoming") || name.ends_with("--migratedaway") {
        found.push(format!("{name} is in the middle of another move"));
    }
    if let Some(process) = saver_at_work(domid) {
        found.push(format!("xl is saving or moving it (process {process})"));
    }
    match Layout::read(host, domid) {
        Ok(layout) => found.extend(configured(&layout.configuration, allowed)),
        Err(error) => found.push(crate::error::chain(&error)),
    }
    Ok(found)
}

/// What the configuration itself has that can't be moved.
fn configured(configuration: &Value, allowed: Allowed) -> Vec<String> {
    let mut found = Vec::new();
    let some = |value: Option<&Value>| {
        value
            .and_then(Value::as_array)
            .is_some_and(|list| !list.is_empty())
    };
    for (key, what) in [
        ("pcidevs", "a PCI device is passed through to it"),
        ("usbdevs", "a USB device is passed through to it"),
        ("dtdevs", "a device-tree device is passed through to it"),
        ("p9s", "it has a 9pfs share of this host"),
        ("pvcallsifs", "it uses this host's sockets (pvcalls)"),
        ("vtpms", "it has a virtual TPM, whose state would stay here"),
    ] {
        if some(configuration.get(key)) {
            found.push(what.into());
        }
    }
    let build = configuration.get("b_info");
    if build.is_some_and(|build| some(build.get("vnuma_nodes"))) {
        found.push("it has virtual NUMA nodes, which stock libxl can't restore".into());
    }
    let host_map = build.and_then(|build| build.pointer("/type.pv/e820_host"));
    if host_map.is_some_and(|value| value == "True" || value == &Value::Bool(true)) {
        found.push("it sees this host's memory map (e820_host)".into());
    }
    let writable = configuration
        .get("disks")
        .and_then(Value::as_array)
        .is_some_and(|disks| {
            disks
                .iter()
                .any(|disk| disk.get("readwrite").is_some_and(is_true))
        });
    if writable && !allowed.disks {
        found.push(
            "it has writable disks: with --no-disks you say that they are shared storage, at the \
             same path there"
                .into(),
        );
    }
    found
}

/// libxl writes its numbers and booleans as JSON has them; older ones wrote them as text.
fn is_true(value: &Value) -> bool {
    value == &Value::Bool(true)
        || value.as_i64().is_some_and(|number| number != 0)
        || value == "True"
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_hinders_is_named() {
        let configuration = json!({
            "pcidevs": [{"dev": 1}],
            "disks": [{"readwrite": 1}],
            "b_info": {"type.pv": {"e820_host": true}, "vnuma_nodes": [{}]},
        });
        let found = configured(&configuration, Allowed::default()).join("\n");
        for word in ["PCI", "--no-disks", "e820_host", "NUMA"] {
            assert!(found.contains(word), "{word}: {found}");
        }
    }

    #[test]
    fn shared_and_read_only_disks_do_not_hinder() {
        let shared = json!({"disks": [{"readwrite": 1}]});
        assert!(configured(&shared, Allowed { disks: true }).is_empty());
        let read_only = json!({"disks": [{"readwrite": 0}], "nics": [{}], "pcidevs": []});
        assert!(configured(&read_only, Allowed::default()).is_empty());
    }
}
