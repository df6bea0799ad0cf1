//! Where a 64-bit PV guest keeps its p2m: the table of the mfn of each pfn.
//!
//! The guest tells in the page that it shares with Xen. There are two forms, and a kernel may
//! offer both; the second is used where it is there:
//!
//! ```text
//!   tree     pfn_to_mfn_frame_list_list --> list of lists (1 frame)
//!                                             --> lists (up to 512)
//!                                               --> p2m frames            512 entries each
//!
//!   linear   p2m_cr3 --> page tables --> p2m_vaddr ... , one array: the L1 entries that map it
//!                                               --> p2m frames            512 entries each
//! ```
//!
//! All of it is the guest's, and may change while it is read: every number is checked before it
//! is used, and the work is bounded by the guest's highest pfn, which the caller bounds. What is
//! found are mfns; whether they are pages of the guest's is checked when they are translated.

pub use xen_sys::memory::P2mDescription;

use crate::guest::xen::page_table::{PRESENT, SUPERPAGE, frame};
use crate::pages::{Mfn, PAGE_SIZE, Page, Pfn};

/// Entries in a frame of the p2m, and in a page table.
pub const ENTRIES_PER_FRAME: u64 = 512;

/// What a p2m holds for a pfn without a page.
pub const INVALID_ENTRY: u64 = u64::MAX;

/// The highest pfn that the tree form can describe.
const MAX_TREE_PFN: Pfn = ENTRIES_PER_FRAME * ENTRIES_PER_FRAME * ENTRIES_PER_FRAME - 1;

/// Addresses that belong to Xen.
const XEN_START: u64 = 0xffff_8000_0000_0000;
const XEN_END: u64 = 0xffff_87ff_ffff_ffff;
/// The bits of an address that page tables translate.
const ADDRESS_MASK: u64 = 0x0000_ffff_ffff_ffff;

/// Where the p2m is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct P2mFrames {
    /// The highest pfn that it describes. It is lower than what the guest says when the p2m's end
    /// is all placeholders.
    pub max_pfn: Pfn,
    /// The frames that hold the entries 0 to `max_pfn`, in order.
    pub frames: Vec<Mfn>,
    /// For the linear form, the count of changes under which it was found. When the count is
    /// another now, the frames may be others too.
    pub generation: Option<u64>,
}

/// A p2m that cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum P2mError<E> {
    /// The guest says that it has no page, or more than it may have.
    #[error("Guest's number of pages {0:#x} is not possible")]
    Pages(u64),
    /// The guest has more pages than the tree form can describe.
    #[error("Guest's number of pages {0:#x} is too large for its p2m tree")]
    TreeTooSmall(u64),
    /// The linear form is not at an address that it can have.
    #[error("Guest's p2m at {0:#x} is not possible")]
    Address(u64),
    /// A frame's number is not one.
    #[error("Guest's p2m refers to frame {0:#x}, which is not possible")]
    Frame(Mfn),
    /// An entry of a page table does not map a table or a page.
    #[error("Guest's p2m is not mapped at {0:#x}")]
    NotMapped(u64),
    /// The guest is changing the mappings now. The next try may succeed.
    #[error("Guest's p2m is being changed")]
    Changing,
    /// A frame could not be read.
    #[error("Guest's p2m cannot be read")]
    Read(#[source] E),
}

/// Finds the p2m.
///
/// `max_mfn` is the host's highest mfn, `max_pages` the most pages that the caller accepts, and
/// `read` copies one of the guest's frames. It is called once for each table or list: for 512
/// frames of the p2m about once.
///
/// # Errors
/// Fails when something of what the guest says is not possible, or a frame cannot be read.
pub fn find<E>(
    guest: &P2mDescription,
    max_mfn: Mfn,
    max_pages: u64,
    read: impl FnMut(Mfn, &mut Page) -> Result<(), E>,
) -> Result<P2mFrames, P2mError<E>> {
    if guest.pages == 0 || guest.pages > max_pages {
        return Err(P2mError::Pages(guest.pages));
    }
    let mut tables = Tables {
        max_mfn,
        read,
        page: [0; PAGE_SIZE],
        current: None,
    };
    if guest.cr3 == 0 {
        tables.walk_tree(guest)
    } else {
        tables.walk_linear(guest)
    }
}

/// Turns the mfns of the p2m's frames to pfns. `pfn_of` answers only for frames of the guest's.
///
/// # Errors
/// Fails with the first mfn that is no page of the guest's.
pub fn frames_to_pfns(
    frames: &[Mfn],
    mut pfn_of: impl FnMut(Mfn) -> Option<Pfn>,
) -> Result<Vec<Pfn>, Mfn> {
    frames.iter().map(|mfn| pfn_of(*mfn).ok_or(*mfn)).collect()
}

/// Reads entries of tables and lists, each once as long as neighbours are asked for.
struct Tables<R> {
    max_mfn: Mfn,
    read: R,
    page: Page,
    current: Option<Mfn>,
}

impl<E, R: FnMut(Mfn, &mut Page) -> Result<(), E>> Tables<R> {
    fn entry(&mut self, table: Mfn, index: u64) -> Result<u64, P2mError<E>> {
        if self.current != Some(table) {
            self.current = None;
            (self.read)(table, &mut self.page).map_err(P2mError::Read)?;
            self.current = Some(table);
        }
        let (entries, _) = self.page.as_chunks::<8>();
        Ok(u64::from_le_bytes(
            entries[(index % ENTRIES_PER_FRAME) as usize],
        ))
    }

    fn check(&self, mfn: Mfn) -> Result<Mfn, P2mError<E>> {
        if mfn == 0 || mfn > self.max_mfn {
            Err(P2mError::Frame(mfn))
        } else {
            Ok(mfn)
        }
    }

    fn walk_tree(&mut self, guest: &P2mDescription) -> Result<P2mFrames, P2mError<E>> {
        const PER_LIST: u64 = ENTRIES_PER_FRAME * ENTRIES_PER_FRAME;
        let mut max_pfn = guest.pages - 1;
        if max_pfn > MAX_TREE_PFN {
            return Err(P2mError::TreeTooSmall(guest.pages));
        }
        let root = self.check(guest.frame_list_list)?;
        let mut lists = Vec::new();
        for index in 0..=max_pfn / PER_LIST {
            let list = self.entry(root, index)?;
            lists.push(self.check(list)?);
        }
        // A kernel whose memory ends early fills the rest with one list of placeholders. If it
        // were not that, pfns would share their entries, which moving would break. The first such
        // list is kept, as the stock saver does.
        let unlike_last = lists.iter().rposition(|list| Some(list) != lists.last());
        lists.truncate(unlike_last.map_or(1, |at| at + 2));
        max_pfn = max_pfn.min(lists.len() as u64 * PER_LIST - 1);

        let mut frames = Vec::new();
        for index in 0..=max_pfn / ENTRIES_PER_FRAME {
            let list = lists[(index / ENTRIES_PER_FRAME) as usize];
            let frame = self.entry(list, index)?;
            frames.push(self.check(frame)?);
        }
        Ok(P2mFrames {
            max_pfn,
            frames,
            generation: None,
        })
    }

    fn walk_linear(&mut self, guest: &P2mDescription) -> Result<P2mFrames, P2mError<E>> {
        if !guest.generation.is_multiple_of(2) {
            return Err(P2mError::Changing);
        }
        let mut max_pfn = guest.pages - 1;
        let start = guest.address;
        let mut frames = max_pfn / ENTRIES_PER_FRAME + 1;
        let end = last_address(start, frames).ok_or(P2mError::Address(start))?;
        if !is_canonical(start)
            || !is_canonical(end)
            || !start.is_multiple_of(PAGE_SIZE as u64)
            || (start <= XEN_END && end >= XEN_START)
        {
            return Err(P2mError::Address(start));
        }

        // From level to level: the tables that map the whole of it, from left to right.
        let root = self.check(guest.cr3 >> 12)?;
        let mut tables = vec![root];
        for level in (1..=4u32).rev() {
            let shift = 12 + 9 * (level - 1);
            let first = (start & ADDRESS_MASK) >> shift;
            // Frames that were cut off are not looked for.
            let end = last_address(start, frames).ok_or(P2mError::Address(start))?;
            let last = (end & ADDRESS_MASK) >> shift;
            let mut next = Vec::new();
            for index in first..=last {
                let table =
                    tables[(index / ENTRIES_PER_FRAME - first / ENTRIES_PER_FRAME) as usize];
                let entry = self.entry(table, index)?;
                if entry & PRESENT == 0 || (level > 1 && entry & SUPERPAGE != 0) {
                    return Err(P2mError::NotMapped(sign_extend(index << shift)));
                }
                next.push(self.check(frame(entry))?);
            }
            if level == 2 {
                frames = frames.min(used_frames(&next, start));
                max_pfn = max_pfn.min(frames * ENTRIES_PER_FRAME - 1);
            }
            tables = next;
        }
        Ok(P2mFrames {
            max_pfn,
            frames: tables,
            generation: Some(guest.generation),
        })
    }
}

/// How many frames of the p2m are mapped by L1 tables before the end, where all are the same.
///
/// As in the tree, two tables that are the same can only be placeholders for what is not there.
/// The stock saver leaves all of them out; if all tables are the same, it leaves them in.
fn used_frames(l1_tables: &[Mfn], start: u64) -> u64 {
    let unlike_last = l1_tables
        .iter()
        .rposition(|table| Some(table) != l1_tables.last());
    match unlike_last {
        Some(at) if at + 2 < l1_tables.len() => {
            // The first table may map frames from its middle on.
            let skipped = (start / PAGE_SIZE as u64) % ENTRIES_PER_FRAME;
            (at as u64 + 1) * ENTRIES_PER_FRAME - skipped
        }
        _ => u64::MAX,
    }
}

fn last_address(start: u64, frames: u64) -> Option<u64> {
    start.checked_add(frames.checked_mul(PAGE_SIZE as u64)? - 1)
}

const fn sign_extend(address: u64) -> u64 {
    ((address << 16).cast_signed() >> 16).cast_unsigned()
}

const fn is_canonical(address: u64) -> bool {
    sign_extend(address) == address
}

#[cfg(test)]
mod tests;
