//! Devices of a guest that arrives: attached while its memory still does, where that can be.

use std::thread;

use xen_sys::DomId;
use xen_sys::toolstack::Toolstack;

use super::XenDestination;
use super::attempt::REASON;
use super::feeding::poisoned;
use crate::configuration::need_qemu;
use crate::error::{Error, IoContext, Result, chain};

/// Devices that are attached while memory still arrives: by the names under which
/// a configuration lists them.
pub(super) const DEVICES: [&str; 2] = ["nics", "disks"];

/// Where libxl keeps a domain's configuration, among the data beside it.
const LIBXL_CONFIGURATION: &str = "libxl-json";

/// Devices on their way to the new domain, while its memory still arrives.
pub(super) type Attaching = thread::JoinHandle<std::result::Result<(), String>>;

impl XenDestination {
    /// Whether devices can be attached while memory still arrives: libxl starts QEMU at the end of a
    /// restore only, and refuses any device before that which comes with such a one.
    pub(super) fn attaches_early(&self) -> bool {
        !need_qemu(&self.incoming.configuration)
    }

    /// Attaches network interfaces and disks while memory still arrives. Their hotplug scripts
    /// take seconds, which libxl would spend after the stream's end: in the guest's silence.
    pub(super) fn attach_devices(&mut self, domid: DomId, bare: &str) -> Result<()> {
        let doing = || "Can't prepare the guest's devices";
        let toolstack = self.host.toolstack();
        // libxl adds a device to the configuration that it keeps; a restore writes it at its end
        // only.
        toolstack
            .store_user_data(domid, LIBXL_CONFIGURATION, with_end(bare).as_slice())
            .context(doing)?;
        let mut whole: serde_json::Value = serde_json::from_str(bare).unwrap_or_default();
        for key in DEVICES {
            whole[key] = self.incoming.configuration[key].clone();
        }
        let whole = whole.to_string();
        let devices = thread::Builder::new()
            .name("devices".into())
            .spawn(move || {
                let attach = || -> std::result::Result<(), xen_sys::Error> {
                    let toolstack = Toolstack::open()?;
                    let mut configuration = toolstack.config_from_json(&whole)?;
                    toolstack.attach_devices(domid, &mut configuration)
                };
                attach().map_err(|error| chain(&error))
            })
            .context(|| "Can't start a thread")?;
        self.devices = Some(devices);
        Ok(())
    }

    /// Waits until the devices are there.
    pub(super) fn devices_attached(&mut self) -> Result<()> {
        match self.devices.take().map(thread::JoinHandle::join) {
            None | Some(Ok(Ok(()))) => Ok(()),
            Some(Ok(Err(reason))) => {
                // A restore that fails takes the domain away from under the devices' scripts.
                let restore = self.restore.as_ref();
                if let Some(Err(why)) = restore.and_then(|it| it.ended.recv_timeout(REASON).ok()) {
                    return Err(Error::Refused(format!("The restore failed: {why}")));
                }
                Err(Error::Refused(format!(
                    "Can't attach the guest's devices: {reason}"
                )))
            }
            Some(Err(_)) => Err(poisoned()),
        }
    }

    /// Tells libxl's own record of the domain of the devices: its restore knew nothing of them.
    pub(super) fn record_devices(&self, domid: DomId) -> Result<()> {
        let doing = || "Can't record the guest's devices";
        let toolstack = self.host.toolstack();
        let kept = toolstack
            .user_data(domid, LIBXL_CONFIGURATION)
            .context(doing)?
            .unwrap_or_default();
        let text = String::from_utf8_lossy(&kept);
        let mut json: serde_json::Value = serde_json::from_str(text.trim_end_matches('\0'))
            .map_err(|error| {
                Error::Refused(format!(
                    "libxl's record of the guest can't be read: {error}"
                ))
            })?;
        for key in DEVICES {
            if let Some(devices) = self.incoming.configuration.get(key) {
                json[key] = devices.clone();
            }
        }
        toolstack
            .store_user_data(
                domid,
                LIBXL_CONFIGURATION,
                with_end(&json.to_string()).as_slice(),
            )
            .context(doing)
    }
}

/// libxl counts the terminating zero among the bytes that it keeps.
fn with_end(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}
