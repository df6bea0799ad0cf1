//! A domain's devices.

use std::ffi::c_int;
use std::fmt;

use super::Toolstack;
use super::config::array;
use super::context::text;
use crate::{DomId, raw};

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// What the guest calls it: "xvda".
    pub vdev: String,
    /// Where its content is: a file, a block device, or what the script makes of it.
    pub path: Option<String>,
    /// The format: "raw", "qcow2".
    pub format: &'static str,
    /// What serves it: "phy" (the kernel), "qdisk" (QEMU); "unknown" until libxl has chosen.
    pub backend: &'static str,
    /// The domain that serves it.
    pub backend_domain: u32,
    /// The hotplug script, if it is not the usual one.
    pub script: Option<String>,
    /// The guest may write to it.
    pub writable: bool,
    /// It is a CD drive.
    pub cdrom: bool,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Its number within the domain.
    pub id: i32,
    /// Its address.
    pub mac: [u8; 6],
    /// The bridge it is attached to.
    pub bridge: Option<String>,
    /// The name of its end in the backend's domain, if one was chosen.
    pub interface: Option<String>,
    /// The addresses that were written down for it.
    pub ip: Option<String>,
    /// The hotplug script.
    pub script: Option<String>,
    /// The domain that serves it.
    pub backend_domain: u32,
}

/// A PCI device of the host that the domain has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciDevice {
    /// The PCI segment.
    pub segment: i32,
    /// The bus.
    pub bus: u8,
    /// The device on the bus.
    pub device: u8,
    /// The function of the device.
    pub function: u8,
}

impl fmt::Display for PciDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PciDevice {
            segment,
            bus,
            device,
            function,
        } = self;
        write!(f, "{segment:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

impl Disk {
    /// Of a structure whose strings are null or C strings, as in all that libxl hands out.
    pub(super) fn from_raw(disk: &raw::libxl_device_disk) -> Disk {
        let format = match disk.format {
            raw::LIBXL_DISK_FORMAT_RAW => "raw",
            raw::LIBXL_DISK_FORMAT_QCOW => "qcow",
            raw::LIBXL_DISK_FORMAT_QCOW2 => "qcow2",
            raw::LIBXL_DISK_FORMAT_VHD => "vhd",
            raw::LIBXL_DISK_FORMAT_QED => "qed",
            raw::LIBXL_DISK_FORMAT_EMPTY => "empty",
            _ => "unknown",
        };
        let backend = match disk.backend {
            raw::LIBXL_DISK_BACKEND_PHY => "phy",
            raw::LIBXL_DISK_BACKEND_TAP => "tap",
            raw::LIBXL_DISK_BACKEND_QDISK => "qdisk",
            _ => "unknown",
        };
        // SAFETY: libxl's strings, which live as long as the structure.
        let (vdev, path, script) =
            unsafe { (text(disk.vdev), text(disk.pdev_path), text(disk.script)) };
        Disk {
            vdev: vdev.unwrap_or_default(),
            path,
            format,
            backend,
            backend_domain: disk.backend_domid,
            script,
            writable: disk.readwrite != 0,
            cdrom: disk.is_cdrom != 0,
        }
    }
}

impl Nic {
    /// Of a structure whose strings are null or C strings, as in all that libxl hands out.
    pub(super) fn from_raw(nic: &raw::libxl_device_nic) -> Nic {
        // SAFETY: libxl's strings, which live as long as the structure.
        let (bridge, interface, ip, script) = unsafe {
            (
                text(nic.bridge),
                text(nic.ifname),
                text(nic.ip),
                text(nic.script),
            )
        };
        Nic {
            id: nic.devid,
            mac: nic.mac,
            bridge,
            interface,
            ip,
            script,
            backend_domain: nic.backend_domid,
        }
    }
}

impl PciDevice {
    pub(super) fn from_raw(device: &raw::libxl_device_pci) -> PciDevice {
        PciDevice {
            segment: device.domain,
            bus: device.bus,
            device: device.dev,
            function: device.func,
        }
    }
}

/// Operations on devices. libxl does not tell an empty list from one that it could not fetch.
impl Toolstack {
    /// The disks that a domain has now.
    pub fn disks(&self, domain: DomId) -> Vec<Disk> {
        let mut count: c_int = 0;
        // SAFETY: the context is open. The answer is an array of that many, or null.
        unsafe {
            let list = raw::libxl_device_disk_list(self.as_ptr(), domain.get(), &mut count);
            let disks = array(list, count).map(Disk::from_raw).collect();
            if !list.is_null() {
                raw::libxl_device_disk_list_free(list, count);
            }
            disks
        }
    }

    /// The network interfaces that a domain has now.
    pub fn nics(&self, domain: DomId) -> Vec<Nic> {
        let mut count: c_int = 0;
        // SAFETY: the context is open. The answer is an array of that many, or null.
        unsafe {
            let list = raw::libxl_device_nic_list(self.as_ptr(), domain.get(), &mut count);
            let nics = array(list, count).map(Nic::from_raw).collect();
            if !list.is_null() {
                raw::libxl_device_nic_list_free(list, count);
            }
            nics
        }
    }

    /// The PCI devices that a domain has now.
    pub fn pci_devices(&self, domain: DomId) -> Vec<PciDevice> {
        let mut count: c_int = 0;
        // SAFETY: the context is open. The answer is an array of that many, or null.
        unsafe {
            let list = raw::libxl_device_pci_list(self.as_ptr(), domain.get(), &mut count);
            let devices = array(list, count).map(PciDevice::from_raw).collect();
            if !list.is_null() {
                raw::libxl_device_pci_list_free(list, count);
            }
            devices
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_structures_are_read() {
        let disk = Disk::from_raw(&raw::libxl_device_disk::default());
        assert_eq!(
            (disk.vdev.as_str(), disk.path, disk.format),
            ("", None, "unknown")
        );
        assert_eq!(
            Nic::from_raw(&raw::libxl_device_nic::default()).bridge,
            None
        );
    }

    #[test]
    fn strings_of_libxl_are_copied() {
        let raw = raw::libxl_device_disk {
            vdev: c"xvda".as_ptr().cast_mut(),
            pdev_path: c"/srv/disk.img".as_ptr().cast_mut(),
            format: raw::LIBXL_DISK_FORMAT_QCOW2,
            backend: raw::LIBXL_DISK_BACKEND_QDISK,
            readwrite: 1,
            ..Default::default()
        };
        let disk = Disk::from_raw(&raw);
        assert_eq!(
            (disk.vdev.as_str(), disk.path.as_deref()),
            ("xvda", Some("/srv/disk.img"))
        );
        assert_eq!(
            (disk.format, disk.backend, disk.writable),
            ("qcow2", "qdisk", true)
        );
    }

    #[test]
    fn pci_devices_are_shown_as_everywhere() {
        let device = PciDevice {
            segment: 0,
            bus: 3,
            device: 0x1f,
            function: 7,
        };
        assert_eq!(device.to_string(), "0000:03:1f.7");
    }
}
