//! What the hypervisor knows and does of domains (libxenctrl, and the parts of libxenguest that
//! go with it).
//!
//! [`Ctl`] is the handle. Its methods are grouped by subject:
//!
//! | module | subject |
//! |---|---|
//! | `host` | the hypervisor's version, the machine's memory and abilities |
//! | `domain` | a domain's state, memory, clock |
//! | `grants` | frames that other domains write to |
//! | `log_dirty` | which pages a guest has written to |
//! | `page_type` | what the hypervisor uses a page for |
//! | `vcpu` | a vCPU's registers |
//! | `cpu_policy` | what a domain sees of the CPU, and whether a host can offer it |
//! | `hvm` | the state of PVH and HVM domains |

mod buffer;
mod cpu_features;
mod cpu_policy;
mod domain;
mod grants;
mod host;
mod hvm;
mod log_dirty;
mod page_type;
mod vcpu;

use std::cell::RefCell;
use std::ffi::c_int;
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

pub use cpu_policy::{CpuPolicy, GuestKind, Incompatible};
pub use domain::{DomainInfo, ShutdownReason, TscInfo};
pub use host::{PhysicalInfo, Version};
pub use hvm::{MIGRATED_HVM_PARAMS, OnDemand, RING_HVM_PARAMS};
pub use log_dirty::{DirtyBitmap, DirtyStats};
pub use vcpu::{VcpuContext, VcpuInfo};

use crate::log_bridge::LogBridge;
use crate::{DomId, Error, Result, raw};
use buffer::HypercallBuffer;

/// A handle to the hypervisor's control interface.
///
/// `Send` but not `Sync`: each thread opens its own.
pub struct Ctl {
    handle: Arc<Handle>,
    /// Where page types are asked for: one batch, allocated once.
    page_types: RefCell<HypercallBuffer>,
}

impl fmt::Debug for Ctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ctl").finish_non_exhaustive()
    }
}

impl Ctl {
    /// Opens the interface.
    ///
    /// # Errors
    ///
    /// This is no Xen host, no control domain, or this process may not: [`crate::host::probe`]
    /// tells which.
    pub fn open() -> Result<Ctl> {
        let handle = Arc::new(Handle::open()?);
        let page_types = HypercallBuffer::new(&handle, page_type::BATCH * size_of::<u64>())?;
        Ok(Ctl {
            handle,
            page_types: RefCell::new(page_types),
        })
    }

    /// Runs one function of libxc that answers a negative number on failure.
    fn call(
        &self,
        operation: &'static str,
        domain: impl Into<Option<DomId>>,
        function: impl FnOnce(*mut raw::xc_interface) -> c_int,
    ) -> Result<c_int> {
        self.handle.call(operation, domain.into(), function)
    }

    /// Runs a domctl that `fill` has completed, and returns it as the hypervisor left it.
    fn domctl(
        &self,
        operation: &'static str,
        domain: DomId,
        command: u32,
        fill: impl FnOnce(&mut raw::xen_domctl),
    ) -> Result<raw::xen_domctl> {
        let mut domctl = raw::xen_domctl {
            cmd: command,
            domain: domain.as_raw(),
            ..raw::xen_domctl::default()
        };
        fill(&mut domctl);
        // SAFETY: the handle is open; the structure is whole, and whatever buffers it points at
        // are hypercall-safe, as the callers in this module see to.
        self.call(operation, domain, |xch| unsafe {
            raw::xc_domctl(xch, &mut domctl)
        })?;
        Ok(domctl)
    }

    /// For the few functions elsewhere in this crate that need libxc's own handle.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

/// The open interface itself; buffers share it, since they are freed through it.
pub(crate) struct Handle {
    xch: NonNull<raw::xc_interface>,
    log: LogBridge,
}

// SAFETY: libxc's handles are not tied to a thread.
unsafe impl Send for Handle {}
// SAFETY: a handle is shared only between one `Ctl`, which isn't `Sync`, and buffers of that
// `Ctl`, which free themselves through it: the allocator of hypercall buffers has a lock for
// that, and touches nothing else of the handle.
unsafe impl Sync for Handle {}

impl Handle {
    fn open() -> Result<Handle> {
        let log = LogBridge::new();
        // SAFETY: the logger outlives the handle, and serves for the domain builder too, which
        // would open a file of its own otherwise.
        let xch = unsafe { raw::xc_interface_open(log.as_ptr(), log.as_ptr(), 0) };
        let source = io::Error::last_os_error();
        match NonNull::new(xch) {
            Some(xch) => Ok(Handle { xch, log }),
            None => Err(Error::Open {
                interface: "the hypervisor's control interface",
                source,
            }),
        }
    }

    pub(crate) fn call(
        &self,
        operation: &'static str,
        domain: Option<DomId>,
        function: impl FnOnce(*mut raw::xc_interface) -> c_int,
    ) -> Result<c_int> {
        self.log.begin();
        let result = function(self.xch.as_ptr());
        let source = io::Error::last_os_error();
        if result < 0 {
            return Err(Error::Call {
                operation,
                domain,
                detail: self.log.take(),
                source,
            });
        }
        Ok(result)
    }
}

impl Handle {
    /// The errors that libxc logged during the last call, for calls that do not fail by number.
    fn reported(&self) -> String {
        self.log.take()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: it is open, and nobody else has it.
        unsafe { raw::xc_interface_close(self.xch.as_ptr()) };
    }
}
