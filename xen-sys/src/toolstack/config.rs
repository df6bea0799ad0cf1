//! A domain's configuration.

use std::fmt;
use std::ptr;

use super::context::{Text, c_string, text};
use super::{Disk, Nic, PciDevice, Toolstack};
use crate::ctl::GuestKind;
use crate::{DomId, Error, Result, raw};

/// What libxl needs to know to make a domain, and knows of one that it made.
///
/// Its lasting form is libxl's own JSON. **A peer's JSON is not to be trusted**: it names scripts
/// and programs that run as root here. Take single fields of it.
pub struct DomainConfig {
    config: Box<raw::libxl_domain_config>,
}

// SAFETY: it owns all that it points at.
unsafe impl Send for DomainConfig {}

/// The kind of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DomainKind {
    /// Paravirtualised.
    Pv,
    /// Paravirtualised in a hardware container.
    Pvh,
    /// Fully virtualised, with a device model.
    Hvm,
}

impl DomainKind {
    pub(super) fn from_raw(kind: raw::libxl_domain_type) -> Option<DomainKind> {
        match kind {
            raw::LIBXL_DOMAIN_TYPE_PV => Some(DomainKind::Pv),
            raw::LIBXL_DOMAIN_TYPE_PVH => Some(DomainKind::Pvh),
            raw::LIBXL_DOMAIN_TYPE_HVM => Some(DomainKind::Hvm),
            _ => None,
        }
    }

    /// The kind as far as the CPU is concerned.
    pub fn guest_kind(self) -> GuestKind {
        match self {
            DomainKind::Pv => GuestKind::Pv,
            DomainKind::Pvh | DomainKind::Hvm => GuestKind::Hvm,
        }
    }
}

impl fmt::Display for DomainKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DomainKind::Pv => "PV",
            DomainKind::Pvh => "PVH",
            DomainKind::Hvm => "HVM",
        })
    }
}

/// What is to be done when a domain has shut down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Remove it.
    Destroy,
    /// Remove it, and create it again.
    Restart,
    /// Keep it under another name, and create it again.
    RestartRename,
    /// Keep it.
    Preserve,
    /// Write a core, and remove it.
    CoredumpDestroy,
    /// Write a core, remove it, and create it again.
    CoredumpRestart,
    /// Start it again within its memory.
    SoftReset,
}

impl Action {
    fn from_raw(action: raw::libxl_action_on_shutdown) -> Action {
        match action {
            raw::LIBXL_ACTION_ON_SHUTDOWN_RESTART => Action::Restart,
            raw::LIBXL_ACTION_ON_SHUTDOWN_RESTART_RENAME => Action::RestartRename,
            raw::LIBXL_ACTION_ON_SHUTDOWN_PRESERVE => Action::Preserve,
            raw::LIBXL_ACTION_ON_SHUTDOWN_COREDUMP_DESTROY => Action::CoredumpDestroy,
            raw::LIBXL_ACTION_ON_SHUTDOWN_COREDUMP_RESTART => Action::CoredumpRestart,
            raw::LIBXL_ACTION_ON_SHUTDOWN_SOFT_RESET => Action::SoftReset,
            // Also for a number that this version of libxl does not name: what xl does by default.
            _ => Action::Destroy,
        }
    }
}

impl DomainConfig {
    pub(super) fn empty() -> DomainConfig {
        let mut config = Box::<raw::libxl_domain_config>::default();
        // SAFETY: the structure is whole, and has nothing allocated yet.
        unsafe { raw::libxl_domain_config_init(&mut *config) };
        DomainConfig { config }
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut raw::libxl_domain_config {
        &mut *self.config
    }

    /// Lets libxl choose the number of the domain that is made of this.
    pub(super) fn forget_domain(&mut self) {
        self.config.c_info.domid = 0;
    }

    /// The domain's name.
    pub fn name(&self) -> Option<String> {
        // SAFETY: null or a C string that the configuration owns.
        unsafe { text(self.config.c_info.name) }
    }

    /// The domain's UUID.
    pub fn uuid(&self) -> [u8; 16] {
        self.config.c_info.uuid.uuid
    }

    /// The domain's kind; `None` if it is not set.
    pub fn kind(&self) -> Option<DomainKind> {
        DomainKind::from_raw(self.config.c_info.type_)
    }

    /// The most vCPUs that the domain may have.
    pub fn max_vcpus(&self) -> u32 {
        u32::try_from(self.config.b_info.max_vcpus).unwrap_or(0)
    }

    /// What is to be done when the domain has shut down for this reason; nothing after a suspend.
    pub fn action_on(&self, reason: crate::ctl::ShutdownReason) -> Option<Action> {
        use crate::ctl::ShutdownReason;

        let action = match reason {
            ShutdownReason::Poweroff => self.config.on_poweroff,
            ShutdownReason::Reboot => self.config.on_reboot,
            ShutdownReason::Crash => self.config.on_crash,
            ShutdownReason::Watchdog => self.config.on_watchdog,
            ShutdownReason::SoftReset => self.config.on_soft_reset,
            ShutdownReason::Suspend => return None,
            // As xl does.
            ShutdownReason::Other(_) => return Some(Action::Destroy),
        };
        Some(Action::from_raw(action))
    }

    /// The disks.
    pub fn disks(&self) -> Vec<Disk> {
        // SAFETY: an array of that many.
        unsafe { array(self.config.disks, self.config.num_disks) }
            .map(Disk::from_raw)
            .collect()
    }

    /// The network interfaces.
    pub fn nics(&self) -> Vec<Nic> {
        // SAFETY: an array of that many.
        unsafe { array(self.config.nics, self.config.num_nics) }
            .map(Nic::from_raw)
            .collect()
    }

    /// The PCI devices.
    pub fn pci_devices(&self) -> Vec<PciDevice> {
        // SAFETY: an array of that many.
        unsafe { array(self.config.pcidevs, self.config.num_pcidevs) }
            .map(PciDevice::from_raw)
            .collect()
    }
}

/// The elements of one of libxl's arrays.
///
/// # Safety
///
/// There are that many elements, or none.
pub(super) unsafe fn array<'a, T: 'a>(first: *const T, count: i32) -> impl Iterator<Item = &'a T> {
    let count = if first.is_null() {
        0
    } else {
        usize::try_from(count).unwrap_or(0)
    };
    // SAFETY: as the caller says.
    (0..count).map(move |index| unsafe { &*first.add(index) })
}

impl Drop for DomainConfig {
    fn drop(&mut self) {
        // SAFETY: it was initialised, and is disposed of once.
        unsafe { raw::libxl_domain_config_dispose(&mut *self.config) };
    }
}

impl fmt::Debug for DomainConfig {
    // Configurations can hold passwords (VNC, SPICE): not for logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DomainConfig")
            .field("name", &self.name())
            .finish_non_exhaustive()
    }
}

/// Operations on configurations.
impl Toolstack {
    /// A domain's configuration as of now, with what was changed since it was made: devices,
    /// memory, vCPUs.
    ///
    /// # Errors
    ///
    /// There is no such domain, or it was not made by libxl.
    pub fn configuration(&self, domain: DomId) -> Result<DomainConfig> {
        let mut config = DomainConfig::empty();
        self.call("fetch the configuration", domain, |context| {
            // SAFETY: the context is open, the configuration empty.
            unsafe {
                raw::libxl_retrieve_domain_configuration(
                    context,
                    domain.get(),
                    config.as_mut_ptr(),
                    ptr::null(),
                )
            }
        })?;
        config.forget_domain();
        Ok(config)
    }

    /// The configuration of libxl's JSON.
    ///
    /// # Errors
    ///
    /// It is no configuration, or has fields that this version of libxl does not know.
    pub fn config_from_json(&self, json: &str) -> Result<DomainConfig> {
        let json = c_string(json, "domain configuration")?;
        let mut config = DomainConfig::empty();
        self.call("read a domain's configuration", None, |context| {
            // SAFETY: the context is open, the configuration empty, the text a C string.
            unsafe {
                raw::libxl_domain_config_from_json(context, config.as_mut_ptr(), json.as_ptr())
            }
        })?;
        config.forget_domain();
        Ok(config)
    }

    /// libxl's JSON of a configuration.
    ///
    /// # Errors
    ///
    /// There is no memory.
    pub fn config_to_json(&self, config: &DomainConfig) -> Result<String> {
        let config = ptr::from_ref(&*config.config).cast_mut();
        // SAFETY: the context is open; the function only reads the configuration, though it does
        // not say so. The answer comes from malloc.
        let json = unsafe { Text::new(raw::libxl_domain_config_to_json(self.as_ptr(), config)) };
        json.map(|json| json.to_owned())
            .ok_or_else(|| Error::Unexpected {
                operation: "write a domain's configuration",
                domain: None,
                what: "libxl returned nothing".to_owned(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::ShutdownReason;

    #[test]
    fn an_empty_configuration_has_nothing() {
        let config = DomainConfig::empty();
        assert_eq!(config.name(), None);
        assert_eq!(config.kind(), None);
        assert!(config.disks().is_empty());
        assert!(config.nics().is_empty());
        assert!(config.pci_devices().is_empty());
    }

    #[test]
    fn actions_are_those_of_the_configuration() {
        let mut config = DomainConfig::empty();
        config.config.on_reboot = raw::LIBXL_ACTION_ON_SHUTDOWN_RESTART;
        config.config.on_crash = raw::LIBXL_ACTION_ON_SHUTDOWN_PRESERVE;
        config.config.on_poweroff = raw::LIBXL_ACTION_ON_SHUTDOWN_DESTROY;
        assert_eq!(
            config.action_on(ShutdownReason::Reboot),
            Some(Action::Restart)
        );
        assert_eq!(
            config.action_on(ShutdownReason::Crash),
            Some(Action::Preserve)
        );
        assert_eq!(
            config.action_on(ShutdownReason::Poweroff),
            Some(Action::Destroy)
        );
        assert_eq!(config.action_on(ShutdownReason::Suspend), None);
        assert_eq!(
            config.action_on(ShutdownReason::Other(9)),
            Some(Action::Destroy)
        );
    }
}
