//! Making domains, stopping them, and letting them go on.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use super::context::c_string;
use super::{DomainConfig, Toolstack};
use crate::{DomId, Error, Result, raw};

/// The version of the stream that we synthesize; libxl's default is the one before.
const STREAM_VERSION: u32 = 2;

/// Operations that take a domain through its life.
impl Toolstack {
    /// Makes a domain and starts its kernel. It is paused.
    ///
    /// # Errors
    ///
    /// There is not enough memory, a device can't be made, the kernel can't be loaded, and so on:
    /// the detail says. Nothing is left of the domain.
    pub fn create(&self, config: &mut DomainConfig) -> Result<DomId> {
        const OPERATION: &str = "create a domain";
        let mut number = 0;
        self.call(OPERATION, None, |context| {
            // SAFETY: the context is open, the configuration whole.
            unsafe {
                raw::libxl_domain_create_new(
                    context,
                    config.as_mut_ptr(),
                    &mut number,
                    ptr::null(),
                    ptr::null(),
                )
            }
        })?;
        domain(OPERATION, number)
    }

    /// Makes a domain, and fills it from a stream: libxl's header, libxc's image, END. The domain
    /// is paused.
    ///
    /// Returns when the stream has ended and the devices are made; so the writer has to be another
    /// thread or process. The domain appears under its name long before: look for it by
    /// [`domain_by_name`](Toolstack::domain_by_name) on another handle.
    ///
    /// # Errors
    ///
    /// The stream is not as it must be or ends early, there is not enough memory, a device can't
    /// be made, and so on: the detail says. libxl destroys what it made, but an operation that was
    /// [aborted](super::Aborter) late can leave the domain.
    pub fn restore(&self, config: &mut DomainConfig, stream: BorrowedFd<'_>) -> Result<DomId> {
        const OPERATION: &str = "restore a domain";
        let mut parameters = raw::libxl_domain_restore_params::default();
        // SAFETY: the structure is whole, and has nothing allocated yet.
        unsafe { raw::libxl_domain_restore_params_init(&mut parameters) };
        parameters.stream_version = STREAM_VERSION;
        let mut number = 0;
        let result = self.call(OPERATION, None, |context| {
            // SAFETY: the context is open, the configuration and the parameters whole; the
            // descriptor is open until we return. -1: no way back to the source.
            unsafe {
                raw::libxl_domain_create_restore(
                    context,
                    config.as_mut_ptr(),
                    &mut number,
                    stream.as_raw_fd(),
                    -1,
                    &parameters,
                    ptr::null(),
                    ptr::null(),
                )
            }
        });
        // SAFETY: it was initialised, and is disposed of once.
        unsafe { raw::libxl_domain_restore_params_dispose(&mut parameters) };
        result?;
        domain(OPERATION, number)
    }

    /// Lets a paused domain run.
    ///
    /// # Errors
    ///
    /// There is no such domain, or the hypervisor refused.
    pub fn unpause(&self, domain: DomId) -> Result<()> {
        self.call("unpause", domain, |context| {
            // SAFETY: the context is open.
            unsafe { raw::libxl_domain_unpause(context, domain.get(), ptr::null()) }
        })
    }

    /// Pauses a domain, which does not notice.
    ///
    /// # Errors
    ///
    /// There is no such domain, or the hypervisor refused.
    pub fn pause(&self, domain: DomId) -> Result<()> {
        self.call("pause", domain, |context| {
            // SAFETY: the context is open.
            unsafe { raw::libxl_domain_pause(context, domain.get(), ptr::null()) }
        })
    }

    /// Asks a guest to suspend itself, and waits until it has: for 60 seconds until it says that
    /// it will, for 60 more until it is suspended.
    ///
    /// # Errors
    ///
    /// The guest did not answer in time; **it may still suspend later**. Or it shut down instead.
    pub fn suspend(&self, domain: DomId) -> Result<()> {
        self.call("suspend", domain, |context| {
            // SAFETY: the context is open.
            unsafe { raw::libxl_domain_suspend_only(context, domain.get(), ptr::null()) }
        })
    }

    /// Lets a suspended guest go on where it is. `cooperative` tells it that the suspend was
    /// cancelled, so that it keeps its devices; every guest since Linux 2.6.24 knows that.
    ///
    /// # Errors
    ///
    /// There is no such domain, it is not suspended, or the hypervisor refused.
    pub fn resume(&self, domain: DomId, cooperative: bool) -> Result<()> {
        self.call("resume", domain, |context| {
            // SAFETY: the context is open.
            unsafe {
                raw::libxl_domain_resume(context, domain.get(), i32::from(cooperative), ptr::null())
            }
        })
    }

    /// Asks a guest to shut down; does not wait.
    ///
    /// # Errors
    ///
    /// There is no such domain, or it can't be asked.
    pub fn shutdown(&self, domain: DomId) -> Result<()> {
        self.call("shut down", domain, |context| {
            // SAFETY: the context is open.
            unsafe { raw::libxl_domain_shutdown(context, domain.get(), ptr::null()) }
        })
    }

    /// Ends a domain at once, and removes it with its devices.
    ///
    /// # Errors
    ///
    /// There is no such domain, or something of it could not be removed.
    pub fn destroy(&self, domain: DomId) -> Result<()> {
        self.call("destroy", domain, |context| {
            // SAFETY: the context is open.
            unsafe { raw::libxl_domain_destroy(context, domain.get(), ptr::null()) }
        })
    }

    /// Adds the configuration's network interfaces and disks to a domain that has none yet, with
    /// their hotplug scripts; the domain may be paused, or still in the making.
    ///
    /// libxl reads and writes the configuration that it keeps beside the domain (user data
    /// `libxl-json`): it must be there, which it is not before a creation or restore has ended.
    ///
    /// # Errors
    ///
    /// A device can't be made or its script fails; those before it stay.
    pub fn attach_devices(&self, domain: DomId, config: &mut DomainConfig) -> Result<()> {
        let config = config.as_mut_ptr();
        // SAFETY: the configuration is whole, and its arrays as long as it says.
        let (nics, disks) = unsafe {
            (
                elements((*config).nics, (*config).num_nics),
                elements((*config).disks, (*config).num_disks),
            )
        };
        for nic in nics {
            self.call("attach a network interface", domain, |context| {
                // SAFETY: the context is open, and the pointer leads to an element of the array.
                unsafe { raw::libxl_device_nic_add(context, domain.get(), nic, ptr::null()) }
            })?;
        }
        for disk in disks {
            self.call("attach a disk", domain, |context| {
                // SAFETY: the context is open, and the pointer leads to an element of the array.
                unsafe { raw::libxl_device_disk_add(context, domain.get(), disk, ptr::null()) }
            })?;
        }
        Ok(())
    }

    /// Writes a domain's memory to a file, as `xl dump-core` does.
    ///
    /// # Errors
    ///
    /// There is no such domain, or no room for the file.
    pub fn core_dump(&self, domain: DomId, file: &str) -> Result<()> {
        let file = c_string(file, "file name")?;
        self.call("dump the memory", domain, |context| {
            // SAFETY: the context is open, the name a C string.
            unsafe {
                raw::libxl_domain_core_dump(context, domain.get(), file.as_ptr(), ptr::null())
            }
        })
    }

    /// Keeps a domain that has shut down: under its name with `suffix`, and another UUID in
    /// xenstore, so that it can be started anew beside it. For the hypervisor it keeps the UUID that
    /// it has.
    ///
    /// # Errors
    ///
    /// There is no such domain, or a domain of the new name.
    pub fn preserve(
        &self,
        domain: DomId,
        config: &mut DomainConfig,
        suffix: &str,
        uuid: [u8; 16],
    ) -> Result<()> {
        let suffix = c_string(suffix, "suffix of a name")?;
        self.call("preserve", domain, |context| {
            // SAFETY: the context is open, the configuration whole, the suffix a C string.
            unsafe {
                raw::libxl_domain_preserve(
                    context,
                    domain.get(),
                    &mut (*config.as_mut_ptr()).c_info,
                    suffix.as_ptr(),
                    raw::libxl_uuid { uuid },
                )
            }
        })
    }
}

fn domain(operation: &'static str, number: u32) -> Result<DomId> {
    DomId::new(number).ok_or_else(|| Error::Unexpected {
        operation,
        domain: None,
        what: format!("libxl made domain {number}"),
    })
}

/// The addresses of the elements of one of libxl's arrays.
///
/// # Safety
///
/// There are that many elements at `first`, or `count` is not positive.
unsafe fn elements<T>(first: *mut T, count: std::ffi::c_int) -> Vec<*mut T> {
    let count = usize::try_from(count).unwrap_or(0);
    // SAFETY: the caller says so.
    (0..count)
        .map(|index| unsafe { first.add(index) })
        .collect()
}
