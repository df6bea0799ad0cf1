//! The pages that a PV domain is born with, and the tree that describes its p2m.
//!
//! ```text
//!   shared_info.pfn_to_mfn_frame_list_list --> ROOT --> LISTS[0] --> p2m frames 0 to 511
//!                                                       LISTS[1] --> p2m frames 512 to 1023 ...
//! ```
//! The toolstack finds all by mfn, and a move gives each page another one: the builder of the new
//! domain changes page tables, p2m and start_info, and the rest is ours.

use crate::hypercall::{Reason, map, shutdown};
use crate::ring::{ConsolePage, StorePage};
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// Entries in a frame of the p2m and in a list.
const PER_FRAME: usize = 512;
/// Lists: each is for 1 GiB.
const LISTS_COUNT: usize = 8;
/// A page-table entry that is present, writable, accessed and dirty.
const ENTRY_FLAGS: u64 = 0x63;

/// What the builder tells, and each resume tells anew: `start_info` of Xen's public/xen.h.
#[repr(C)]
pub struct StartInfo {
    magic: [u8; 32],
    pages: AtomicU64,
    shared_info: AtomicU64,
    flags: AtomicU32,
    store_mfn: AtomicU64,
    store_port: AtomicU32,
    console_mfn: AtomicU64,
    console_port: AtomicU32,
    page_table: u64,
    page_table_frames: u64,
    p2m: u64,
}

/// The page shared with the hypervisor: `shared_info` of Xen's public/xen.h.
#[repr(C)]
struct SharedInfo {
    pending: AtomicU8,
    masked: AtomicU8,
    vcpus: [AtomicU8; 2046],
    port_pending: [AtomicU64; 64],
    port_masked: [AtomicU64; 64],
    wall_clock: [AtomicU32; 4],
    max_pfn: AtomicU64,
    frame_list_list: AtomicU64,
}
const _: () = assert!(core::mem::offset_of!(SharedInfo, max_pfn) == 3088);
const _: () = assert!(core::mem::offset_of!(StartInfo, p2m) == 104);

/// A page of the image, for other uses than Rust's.
#[repr(C, align(4096))]
struct Frame([AtomicU64; PER_FRAME]);

impl Frame {
    const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; PER_FRAME])
    }
}

/// Where shared_info is mapped, over this page.
static WINDOW: Frame = Frame::new();
static ROOT: Frame = Frame::new();
static LISTS: [Frame; LISTS_COUNT] = [const { Frame::new() }; LISTS_COUNT];

/// The address of a page of ours or the builder's is its pfn, times 4096.
fn pfn<T>(of: *const T) -> u64 {
    of as u64 >> 12
}

/// The domain as this kernel finds it.
pub struct Machine {
    start_info: &'static StartInfo,
    p2m: &'static [AtomicU64],
    store_pfn: u64,
    console_pfn: u64,
}

impl Machine {
    /// Takes hold of what the builder left.
    ///
    /// # Safety
    /// `start_info` is what the builder gave, and this is called once.
    pub unsafe fn new(start_info: *mut StartInfo) -> Self {
        // SAFETY: the builder mapped start_info and the p2m for as long as the domain lives.
        // Whoever else changes them does so while it is suspended.
        let (start_info, p2m) = unsafe {
            let start_info = &*start_info;
            let pages = start_info.pages.load(Ordering::Relaxed) as usize;
            let p2m = start_info.p2m as *const AtomicU64;
            (start_info, core::slice::from_raw_parts(p2m, pages))
        };
        let find = |mfn: &AtomicU64| {
            let mfn = mfn.load(Ordering::Relaxed);
            p2m.iter()
                .position(|entry| entry.load(Ordering::Relaxed) == mfn)
                .unwrap_or_else(|| shutdown(Reason::Crash)) as u64
        };
        let machine = Self {
            start_info,
            p2m,
            store_pfn: find(&start_info.store_mfn),
            console_pfn: find(&start_info.console_mfn),
        };
        machine.map_shared_info();
        machine.describe_p2m();
        machine
    }

    /// How many pages there are.
    pub fn pages(&self) -> usize {
        self.p2m.len()
    }

    fn mfn(&self, pfn: u64) -> u64 {
        match self.p2m.get(pfn as usize) {
            Some(mfn) => mfn.load(Ordering::Relaxed),
            None => shutdown(Reason::Crash),
        }
    }

    /// The mfn of start_info.
    pub fn start_info_mfn(&self) -> u64 {
        self.mfn(pfn(self.start_info))
    }

    /// The xenstore ring.
    pub fn store_page(&self) -> &'static StorePage {
        // SAFETY: the builder mapped this page at its pfn, and it is all atomics.
        unsafe { &*((self.store_pfn << 12) as *const StorePage) }
    }

    /// The console ring.
    pub fn console_page(&self) -> &'static ConsolePage {
        // SAFETY: the builder mapped this page at its pfn, and it is all atomics.
        unsafe { &*((self.console_pfn << 12) as *const ConsolePage) }
    }

    /// The event channel of the xenstore ring.
    pub fn store_port(&self) -> u32 {
        self.start_info.store_port.load(Ordering::Relaxed)
    }

    /// The event channel of the console ring.
    pub fn console_port(&self) -> u32 {
        self.start_info.console_port.load(Ordering::Relaxed)
    }

    fn shared_info(&self) -> &SharedInfo {
        // SAFETY: mapped there, but between `before_suspend` and `after_suspend`.
        unsafe { &*(&raw const WINDOW).cast() }
    }

    fn map_shared_info(&self) {
        let entry = self.start_info.shared_info.load(Ordering::Relaxed) | ENTRY_FLAGS;
        // SAFETY: the window is used for nothing else.
        if !unsafe { map((&raw const WINDOW) as u64, entry) } {
            shutdown(Reason::Crash);
        }
        // No event handler is registered.
        self.shared_info().masked.store(1, Ordering::Relaxed);
    }

    /// Fills the lists. As data of ours, they keep the mfns of the domain before.
    fn describe_p2m(&self) {
        let frames = self.p2m.len().div_ceil(PER_FRAME);
        if frames > LISTS_COUNT * PER_FRAME {
            shutdown(Reason::Crash);
        }
        let first = pfn(self.p2m.as_ptr());
        let entries = LISTS.iter().flat_map(|list| &list.0);
        for (frame, entry) in (first..first + frames as u64).zip(entries) {
            entry.store(self.mfn(frame), Ordering::Relaxed);
        }
        let lists = LISTS.iter().take(frames.div_ceil(PER_FRAME));
        for (list, entry) in lists.zip(&ROOT.0) {
            entry.store(self.mfn(pfn(list)), Ordering::Relaxed);
        }
        let shared = self.shared_info();
        shared
            .max_pfn
            .store(self.p2m.len() as u64, Ordering::Relaxed);
        shared
            .frame_list_list
            .store(self.mfn(pfn(&raw const ROOT)), Ordering::Release);
    }

    /// Leaves nothing that the toolstack could not carry over: it turns pfns in start_info to
    /// the new domain's mfns, and shared_info is not one of this domain's pages.
    pub fn before_suspend(&self) {
        self.start_info
            .store_mfn
            .store(self.store_pfn, Ordering::Relaxed);
        self.start_info
            .console_mfn
            .store(self.console_pfn, Ordering::Relaxed);
        // SAFETY: nobody holds the shared_info now.
        unsafe { map((&raw const WINDOW) as u64, 0) };
    }

    /// Takes hold of the domain again, the old one or a new one.
    pub fn after_suspend(&self, cancelled: bool) {
        if cancelled {
            let (store, console) = (self.mfn(self.store_pfn), self.mfn(self.console_pfn));
            self.start_info.store_mfn.store(store, Ordering::Relaxed);
            self.start_info
                .console_mfn
                .store(console, Ordering::Relaxed);
        }
        self.map_shared_info();
        self.describe_p2m();
    }

    /// Takes the port's pending mark away.
    pub fn clear(&self, port: u32) {
        if let Some(word) = self.shared_info().port_pending.get(port as usize / 64) {
            word.fetch_and(!(1 << (port % 64)), Ordering::SeqCst);
        }
    }
}
