//! Why a guest can't be moved, found before anything is touched.
//!
//! Each refusal names what is in the way. What only shows later (a device added on the way) is
//! found by comparing [`Layout`]s right before and after the suspend.

use std::fs::File;

use serde_json::Value;
use xen_sys::DomId;
use xen_sys::toolstack::DomainKind;

use super::host::Host;
use super::savers::saver_at_work;
use crate::configuration::keeps_parts_in_memory;
use crate::error::{Error, IoContext, Result};

/// Why an HVM guest can't be moved.
pub const HVM: &str = "it is an HVM guest, whose device model (QEMU) can't be moved; only PV and \
                       PVH guests can";

/// What the operator allows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Allowed {
    /// Writable disks: they are shared storage.
    pub disks: bool,
}

/// A guest's configuration, as libxl tells it now.
#[derive(Debug, Clone)]
pub struct Layout {
    /// libxl's JSON, but for what follows.
    configuration: Value,
    /// The balloon's target in KiB, which may change at any time.
    target: Option<Value>,
    /// The share of the processors, which we change ourselves where the guest has to be slowed
    /// down.
    scheduling: Option<Value>,
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
        // These may change on the way; the pages themselves are followed.
        let (mut target, mut scheduling) = (None, None);
        if let Some(build) = configuration
            .get_mut("b_info")
            .and_then(Value::as_object_mut)
        {
            target = build.remove("target_memkb");
            scheduling = build.remove("sched_params");
        }
        let online_vcpus = host.info(domid)?.online_vcpus;
        Ok(Layout {
            configuration,
            target,
            scheduling,
            online_vcpus,
        })
    }

    /// libxl's JSON, for the other site.
    pub fn document(&self) -> Value {
        let mut document = self.configuration.clone();
        if let Some(build) = document.get_mut("b_info").and_then(Value::as_object_mut) {
            let apart = [
                ("target_memkb", &self.target),
                ("sched_params", &self.scheduling),
            ];
            for (field, value) in apart {
                if let Some(value) = value {
                    build.insert(field.to_owned(), value.clone());
                }
            }
        }
        document
    }

    /// Sees to it that what was written to the guest's disks is on them: of a file the host's cache
    /// may hold it, where another host does not see it, and write it much later.
    ///
    /// # Errors
    /// [`Error::Io`] where that fails.
    pub fn flush_disks(&self) -> Result<()> {
        let disks = self.configuration.get("disks").and_then(Value::as_array);
        for disk in disks.into_iter().flatten() {
            let writable = disk.get("readwrite").is_some_and(is_true);
            if let (true, Some(path)) = (writable, disk.get("pdev_path").and_then(Value::as_str)) {
                File::open(path)
                    .and_then(|disk| disk.sync_all())
                    .context(|| format!("Can't flush the guest's disk {path}"))?;
            }
        }
        Ok(())
    }

    /// # Errors
    /// [`Error::Refused`] where the guest is not as it was.
    pub fn unchanged(&self, host: &Host, domid: DomId) -> Result<()> {
        let now = Layout::read(host, domid)?;
        if now.configuration == self.configuration && now.online_vcpus == self.online_vcpus {
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
    let kind = host.kind(domid)?;
    if kind == DomainKind::Hvm {
        found.push(HVM.into());
        return Ok(found);
    }
    if info.dying || info.shutdown.is_some() {
        found.push("it does not run".into());
    }
    if info.paused {
        found.push("it is paused, and a paused guest can't suspend".into());
    }
    if kind == DomainKind::Pv {
        let width = host
            .ctl()
            .guest_width(domid)
            .context(|| "Can't read the guest's width")?;
        if width != 8 {
            found.push("it is a 32-bit PV guest; only 64-bit ones can be moved".into());
        }
    } else {
        let on_demand = host
            .ctl()
            .on_demand(domid)
            .context(|| "Can't read how the guest's memory is populated")?;
        // To look at such a page gives it one: Xen crashes a guest for which none is left.
        if on_demand.entries > on_demand.cached {
            found.push(
                "it was started with less memory than it may have (memory below maxmem), and its \
                 balloon has not given up the rest yet (populate on demand)"
                    .into(),
            );
        }
        if info.shared_pages > 0 || info.paged_pages > 0 {
            found.push("pages of it are shared with other guests, or paged out".into());
        }
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
    let says = |pointer: &str| {
        build
            .and_then(|build| build.pointer(pointer))
            .is_some_and(is_true)
    };
    if says("/type.pvh/pvshim") {
        found.push("it is a PV guest in a PVH container (pvshim)".into());
    }
    if says("/nested_hvm") {
        found.push("it may run guests of its own by hardware (nestedhvm)".into());
    }
    if build
        .and_then(|build| build.get("altp2m"))
        .is_some_and(|value| value != "disabled")
    {
        found.push("it has alternative views of its memory (altp2m)".into());
    }
    let host_map = build.and_then(|build| build.pointer("/type.pv/e820_host"));
    if host_map.is_some_and(|value| value == "True" || value == &Value::Bool(true)) {
        found.push("it sees this host's memory map (e820_host)".into());
    }
    let disks = configuration.get("disks").and_then(Value::as_array);
    let mut written = disks
        .into_iter()
        .flatten()
        .filter(|disk| disk.get("readwrite").is_some_and(is_true))
        .peekable();
    let writable = written.peek().is_some();
    let format = |disk: &Value| {
        disk.get("format")
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    if let Some(format) = written
        .filter_map(format)
        .find(|format| keeps_parts_in_memory(format))
    {
        found.push(format!(
            "it writes to a disk of format {format}, of which QEMU keeps parts in memory"
        ));
    }
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
        let configuration = json!({
            "b_info": {"type.pvh": {"pvshim": "True"}, "nested_hvm": "True", "altp2m": "mixed"},
        });
        let found = configured(&configuration, Allowed::default()).join("\n");
        for word in ["pvshim", "nestedhvm", "altp2m"] {
            assert!(found.contains(word), "{word}: {found}");
        }
    }

    #[test]
    fn what_libxl_writes_for_every_pvh_guest_does_not_hinder() {
        let configuration = json!({
            "b_info": {"type.pvh": {"pvshim": "False"}, "nested_hvm": "False", "altp2m": "disabled"},
        });
        assert!(configured(&configuration, Allowed::default()).is_empty());
    }

    #[test]
    fn shared_and_read_only_disks_do_not_hinder() {
        let shared = json!({"disks": [{"readwrite": 1}]});
        assert!(configured(&shared, Allowed { disks: true }).is_empty());
        let read_only = json!({"disks": [{"readwrite": 0}], "nics": [{}], "pcidevs": []});
        assert!(configured(&read_only, Allowed::default()).is_empty());
    }
}
