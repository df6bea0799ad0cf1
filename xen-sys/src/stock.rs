//! The stock saver and the stock walk of the p2m: what our own is compared with in tests.
//!
//! Never called where a guest is at stake. The stock code checks itself with `assert`, which ends
//! the process, so it belongs in a process of its own.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use crate::ctl::Ctl;
use crate::{DomId, Error, Result, raw};

/// A PV guest's p2m, as libxenguest walks it.
#[derive(Clone, PartialEq, Eq)]
pub struct StockP2m {
    /// Bytes of the guest's machine word.
    pub guest_width: u32,
    /// Levels of the guest's page tables.
    pub page_table_levels: u32,
    /// The entry of each pfn as the guest wrote it: a machine frame, or one of the patterns that
    /// mean "none".
    pub entries: Vec<u64>,
    /// The type of each pfn, in the form of [`Ctl::page_types`].
    pub types: Vec<u64>,
}

impl fmt::Debug for StockP2m {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StockP2m")
            .field("pages", &self.entries.len())
            .finish_non_exhaustive()
    }
}

/// Writes the libxc image of a domain that is suspended already; its header, its records, END.
///
/// Turns log-dirty off in the end, whoever has turned it on.
///
/// # Errors
///
/// The domain is not suspended, can't be saved, or the image can't be written.
pub fn save(ctl: &Ctl, domain: DomId, to: BorrowedFd<'_>) -> Result<()> {
    let mut callbacks = raw::save_callbacks {
        suspend: Some(is_suspended),
        switch_qemu_logdirty: Some(nothing_to_switch),
        ..Default::default()
    };
    // Not live: the saver asks for the suspend before it sends the first page.
    let flags = 0;
    ctl.handle()
        .call("save the stock way", Some(domain), |xch| {
            // SAFETY: the handle and the descriptor are open; the callbacks that a plain save uses
            // are set, and outlive the call. -1: no way back from the destination.
            unsafe {
                raw::xc_domain_save(
                    xch,
                    to.as_raw_fd(),
                    domain.get(),
                    flags,
                    &mut callbacks,
                    raw::XC_STREAM_PLAIN,
                    -1,
                )
            }
        })?;
    Ok(())
}

/// The caller has suspended the domain; the saver looks for itself.
unsafe extern "C" fn is_suspended(_data: *mut c_void) -> c_int {
    1
}

/// Only asked for live.
unsafe extern "C" fn nothing_to_switch(_domain: u32, _enable: u32, _data: *mut c_void) -> c_int {
    0
}

/// Reads the p2m of a 64-bit PV guest the stock way.
///
/// # Errors
///
/// There is no such domain, it is not a 64-bit PV guest, or its p2m can't be mapped.
pub fn p2m(ctl: &Ctl, domain: DomId) -> Result<StockP2m> {
    const OPERATION: &str = "read the p2m the stock way";
    let mut info = raw::xc_domain_meminfo::default();
    ctl.handle().call(OPERATION, Some(domain), |xch| {
        // SAFETY: the handle is open, the structure zeroed as the function demands.
        unsafe { raw::xc_map_domain_meminfo(xch, domain.get(), &mut info) }
    })?;
    let wide = info.guest_width == 8;
    let count = if wide {
        usize::try_from(info.p2m_size).unwrap_or(0)
    } else {
        0
    };
    // SAFETY: both tables have that many entries; of a guest of 8-byte words, each entry is a
    // u64. They are copied before they are unmapped.
    let (entries, types) = unsafe { (copy(info.p2m_table, count), copy(info.pfn_type, count)) };
    ctl.handle().call(OPERATION, Some(domain), |xch| {
        // SAFETY: it was filled by the matching function, and is unmapped once.
        unsafe { raw::xc_unmap_domain_meminfo(xch, &mut info) }
    })?;
    if !wide {
        return Err(Error::Unexpected {
            operation: OPERATION,
            domain: Some(domain),
            what: format!("the guest's words have {} bytes", info.guest_width),
        });
    }
    Ok(StockP2m {
        guest_width: info.guest_width,
        page_table_levels: info.pt_levels,
        entries,
        types,
    })
}

/// # Safety
///
/// There are that many entries.
unsafe fn copy(entries: *const u64, count: usize) -> Vec<u64> {
    // SAFETY: as the caller says. Volatile, since the guest may run.
    (0..count)
        .map(|index| unsafe { ptr::read_volatile(entries.add(index)) })
        .collect()
}
