//! Log-dirty: the hypervisor notes which pages a guest writes to.
//!
//! ```text
//!  enable ──► [clean]* ──► suspend ──► clean (final) ──► off
//! ```
//!
//! - It is one mode of the domain, not of the caller: two users destroy each other's bits.
//! - *Clean* hands the bits out **once**. What was cleaned and got lost on the way (a process
//!   killed, a page not sent) is known to nobody: start again from all pages.
//! - It does not see what other domains write by grants and foreign mappings.
//! - A PV guest needs shadow paging for it, which newer hypervisors are built without.

use std::fmt;
use std::ptr;

use super::Ctl;
use super::buffer::HypercallBuffer;
use crate::{DomId, Error, PAGE_SIZE, Result, raw};

/// The hypervisor clears its bits by the page of bits, also those of it that it was not asked
/// for; so a bitmap is always so many bits long, or a multiple.
const GRANULE: u64 = 8 * PAGE_SIZE as u64;

/// The bits that the hypervisor hands out: bit `pfn % 64` of word `pfn / 64` says that the page
/// was written to.
pub struct DirtyBitmap {
    buffer: HypercallBuffer,
    bits: u64,
}

/// How busy the guest was since the last clean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirtyStats {
    /// Writes that were caught (shadow paging only).
    pub fault_count: u32,
    /// Pages that were marked dirty.
    pub dirty_count: u32,
}

impl DirtyBitmap {
    /// All words; those past the pages that were asked for are in use too, when the guest's
    /// memory has grown meanwhile.
    pub fn words(&self) -> &[u64] {
        self.buffer.words()
    }

    /// How many pages it covers: a multiple of 32,768.
    pub fn pages(&self) -> u64 {
        self.bits
    }

    /// Whether the page is marked; pages that it does not cover are not.
    pub fn contains(&self, pfn: u64) -> bool {
        usize::try_from(pfn / 64)
            .ok()
            .and_then(|word| self.words().get(word))
            .is_some_and(|word| word & (1 << (pfn % 64)) != 0)
    }
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("pages", &self.bits)
            .finish_non_exhaustive()
    }
}

/// Operations on dirty pages.
impl Ctl {
    /// A bitmap for [`log_dirty_clean`](Ctl::log_dirty_clean) that covers at least so many pages.
    ///
    /// # Errors
    ///
    /// There is not enough memory.
    pub fn dirty_bitmap(&self, pages: u64) -> Result<DirtyBitmap> {
        let bits = pages.max(1).checked_next_multiple_of(GRANULE);
        let bytes = bits.and_then(|bits| usize::try_from(bits / 8).ok());
        let (Some(bits), Some(bytes)) = (bits, bytes) else {
            return Err(Error::argument(format!("number of pages {pages}")));
        };
        Ok(DirtyBitmap {
            buffer: HypercallBuffer::new(&self.handle, bytes)?,
            bits,
        })
    }

    /// Starts to note dirty pages; all count as clean at first.
    ///
    /// # Errors
    ///
    /// - [`is_not_supported`](Error::is_not_supported): a PV guest, and a hypervisor without
    ///   shadow paging;
    /// - [`is_out_of_memory`](Error::is_out_of_memory): no memory for shadow page tables;
    /// - `EINVAL`: it is on already, or the domain has PCI devices.
    pub fn log_dirty_enable(&self, domain: DomId) -> Result<()> {
        self.shadow_control(
            "enable log-dirty",
            domain,
            raw::XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY,
        )
    }

    /// Stops to note dirty pages.
    ///
    /// # Errors
    ///
    /// It is not on (`EINVAL`), there is no such domain, or the hypervisor refused.
    pub fn log_dirty_off(&self, domain: DomId) -> Result<()> {
        self.shadow_control("end log-dirty", domain, raw::XEN_DOMCTL_SHADOW_OP_OFF)
    }

    /// Fetches the dirty pages **and forgets them**.
    ///
    /// `last` asks for the pages too that the hypervisor itself has mapped writably, which can
    /// be dirty at any time (PVH and HVM): for the round after the suspend.
    ///
    /// # Errors
    ///
    /// - [`is_out_of_memory`](Error::is_out_of_memory): the hypervisor could not note a page;
    ///   log-dirty is of no more use until it is turned off and on;
    /// - [`is_busy`](Error::is_busy): another such operation was preempted and goes on first.
    pub fn log_dirty_clean(
        &self,
        domain: DomId,
        bitmap: &mut DirtyBitmap,
        last: bool,
    ) -> Result<DirtyStats> {
        let mode = if last {
            raw::XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL
        } else {
            0
        };
        self.fetch(
            "fetch dirty pages",
            domain,
            raw::XEN_DOMCTL_SHADOW_OP_CLEAN,
            bitmap,
            mode,
        )
    }

    /// Looks at the dirty pages without forgetting them.
    ///
    /// # Errors
    ///
    /// As [`log_dirty_clean`](Ctl::log_dirty_clean).
    pub fn log_dirty_peek(&self, domain: DomId, bitmap: &mut DirtyBitmap) -> Result<DirtyStats> {
        self.fetch(
            "look at dirty pages",
            domain,
            raw::XEN_DOMCTL_SHADOW_OP_PEEK,
            bitmap,
            0,
        )
    }

    /// Only how many pages are dirty, which costs next to nothing.
    ///
    /// # Errors
    ///
    /// As [`log_dirty_clean`](Ctl::log_dirty_clean).
    pub fn log_dirty_stats(&self, domain: DomId) -> Result<DirtyStats> {
        let (stats, _) = self.shadow_op(
            "count dirty pages",
            domain,
            raw::xen_domctl_shadow_op {
                op: raw::XEN_DOMCTL_SHADOW_OP_PEEK,
                dirty_bitmap: raw::__guest_handle_uint8 { p: ptr::null_mut() },
                ..Default::default()
            },
        )?;
        Ok(stats)
    }

    fn fetch(
        &self,
        operation: &'static str,
        domain: DomId,
        op: u32,
        bitmap: &mut DirtyBitmap,
        mode: u32,
    ) -> Result<DirtyStats> {
        let (stats, pages) = self.shadow_op(
            operation,
            domain,
            raw::xen_domctl_shadow_op {
                op,
                mode,
                dirty_bitmap: raw::__guest_handle_uint8 {
                    p: bitmap.buffer.as_mut_ptr(),
                },
                pages: bitmap.bits,
                ..Default::default()
            },
        )?;
        if pages != bitmap.bits {
            return Err(Error::Unexpected {
                operation,
                domain: Some(domain),
                what: format!("asked for {} pages, got {pages}", bitmap.bits),
            });
        }
        Ok(stats)
    }

    /// Returns the statistics, and how many pages the hypervisor answered for.
    fn shadow_op(
        &self,
        operation: &'static str,
        domain: DomId,
        shadow_op: raw::xen_domctl_shadow_op,
    ) -> Result<(DirtyStats, u64)> {
        let domctl = self.domctl(operation, domain, raw::XEN_DOMCTL_shadow_op, |domctl| {
            domctl.u.shadow_op = shadow_op;
        })?;
        // SAFETY: this is the member that the command uses, and it is plain data.
        let answer = unsafe { domctl.u.shadow_op };
        let stats = DirtyStats {
            fault_count: answer.stats.fault_count,
            dirty_count: answer.stats.dirty_count,
        };
        Ok((stats, answer.pages))
    }

    fn shadow_control(&self, operation: &'static str, domain: DomId, op: u32) -> Result<()> {
        self.call(operation, domain, |xch| {
            // SAFETY: the handle is open; the memory size, which is null, is of no meaning here.
            unsafe { raw::xc_shadow_control(xch, domain.get(), op, ptr::null_mut(), 0) }
        })?;
        Ok(())
    }
}
