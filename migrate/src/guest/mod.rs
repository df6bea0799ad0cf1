//! What the engine needs of a guest.
//!
//! The engine moves pages, types and opaque records. What they mean, and how they are read and
//! restored, is behind two traits: [`Source`] for a guest that leaves and [`Destination`] for one
//! that arrives. [`xen`] has the real ones, [`replay`] those of tests and benchmarks; [`shelf`] is
//! where nothing is to run.
//!
//! ```text
//!            begin          next_dirty, read ...      suspend      next_dirty, read, state
//! Source     ------------------------------------------------------------------------------>
//!                                                      resume at any time, or destroy
//!
//! Destination    start    feed pages ...    restart, feed all again    complete    take over
//!            ------------------------------------------------------------------------------>
//!                                                  discard at any time
//! ```

mod comparer;
pub mod replay;
pub mod shelf;
pub mod xen;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::digest::{Digester, MemoryDigest, PageDigest};
use crate::error::{Error, Result};
use crate::guest::xen::stream::state::{DomainKind, GuestState, StaticData};
use crate::image::Image;
use crate::pages::{MAX_PAGES, PAGE_SIZE, Page, PageSet, PageType};
use crate::report::TrackerKind;
use crate::wire::GuestKind;

/// The first pfn above 4 GiB. Below it a PVH guest has devices and special pages, and none of its
/// ordinary memory in the last part.
pub const FOUR_GIB: u64 = 1 << 20;

/// What kind of guest it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Paravirtualised, 64-bit.
    Pv,
    /// Hardware-assisted, without a device model.
    Pvh,
}

impl Kind {
    /// The most pages of a guest's memory map on a host of so many. It may be larger than the guest,
    /// which can have been ballooned down, but not by any factor: the guest says itself how large it
    /// is, and memory of ours is made for each page. A PVH guest's reaches up to 4 GiB however small
    /// it is.
    #[must_use]
    pub fn most_pages(self, host_pages: u64) -> u64 {
        let most = match self {
            Kind::Pv => host_pages.saturating_mul(4),
            Kind::Pvh => host_pages.saturating_mul(4).max(FOUR_GIB),
        };
        most.min(MAX_PAGES)
    }

    /// What a migration stream calls it.
    #[must_use]
    pub const fn domain_kind(self) -> DomainKind {
        match self {
            Kind::Pv => DomainKind::Pv64,
            Kind::Pvh => DomainKind::Hvm,
        }
    }

    /// Where a guest of `pages` pfns has its memory, but for a few pages, if it may have `most`
    /// pages: what there should be room for. Ranges may be empty.
    #[must_use]
    pub fn memory_ranges(self, pages: u64, most: u64) -> [Range<u64>; 2] {
        match self {
            Kind::Pv => [0..pages, pages..pages],
            Kind::Pvh => {
                let above = pages.min(FOUR_GIB.saturating_add(most));
                [
                    0..pages.min(most).min(FOUR_GIB),
                    FOUR_GIB..above.max(FOUR_GIB),
                ]
            }
        }
    }
}

impl From<Kind> for GuestKind {
    fn from(kind: Kind) -> GuestKind {
        match kind {
            Kind::Pv => GuestKind::Pv,
            Kind::Pvh => GuestKind::Pvh,
        }
    }
}

impl TryFrom<GuestKind> for Kind {
    type Error = Error;

    /// # Errors
    /// [`Error::Refused`] for a kind that can't be moved.
    fn try_from(kind: GuestKind) -> Result<Kind> {
        match kind {
            GuestKind::Pv => Ok(Kind::Pv),
            GuestKind::Pvh => Ok(Kind::Pvh),
            GuestKind::Hvm => Err(Error::Refused(
                "HVM guests, with a device model, can't be taken".into(),
            )),
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::Pv => "pv",
            Kind::Pvh => "pvh",
        })
    }
}

/// What is known of a guest before anything moves, and is true to the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// Its UUID, as text.
    pub uuid: String,
    /// Its kind.
    pub kind: Kind,
    /// One more than the highest pfn: the length of every table of pages.
    pub pages: u64,
    /// Virtual CPUs it may have.
    pub vcpus: u32,
}

/// A page's type and the digest of both its type and its normalised content: what both sites must
/// agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageState {
    /// The page's type.
    pub page_type: PageType,
    /// The digest; for a type without content, that of the type alone.
    pub digest: PageDigest,
}

/// What is known of every page of a guest, by pfn: 17 bytes a page, all that grows with the guest.
#[derive(Debug, Clone)]
pub struct PageTable {
    types: Vec<PageType>,
    digests: Vec<PageDigest>,
}

impl PageTable {
    /// Nothing is known of `pages` pages.
    pub fn new(pages: u64) -> Self {
        PageTable {
            types: vec![PageType::Invalid; pages as usize],
            digests: vec![PageDigest::UNKNOWN; pages as usize],
        }
    }

    /// What is known of `pfn`; nothing of one out of range.
    pub fn get(&self, pfn: u64) -> Option<PageState> {
        let index = usize::try_from(pfn).ok()?;
        let (page_type, digest) = (*self.types.get(index)?, *self.digests.get(index)?);
        (digest != PageDigest::UNKNOWN).then_some(PageState { page_type, digest })
    }

    /// `pfn` is known to be `state` now. Out of range: nothing happens.
    pub fn set(&mut self, pfn: u64, state: PageState) {
        let index = pfn as usize;
        if let (Some(page_type), Some(digest)) =
            (self.types.get_mut(index), self.digests.get_mut(index))
        {
            *page_type = state.page_type;
            *digest = state.digest;
        }
    }

    /// Nothing is known of `pfn` any more. Out of range: nothing happens.
    pub fn forget(&mut self, pfn: u64) {
        let unknown = PageState {
            page_type: PageType::Invalid,
            digest: PageDigest::UNKNOWN,
        };
        self.set(pfn, unknown);
    }

    /// The number of pages.
    pub fn pages(&self) -> u64 {
        self.types.len() as u64
    }

    /// The pages of which something is known.
    pub fn known(&self) -> PageSet {
        let mut known = PageSet::new(self.pages());
        known.extend((0..self.pages()).filter(|pfn| self.get(*pfn).is_some()));
        known
    }

    /// The digest of the whole memory.
    pub fn digest(&self, digester: &Digester) -> MemoryDigest {
        digester.memory(&self.types, &self.digests)
    }
}

/// One page of a [`Batch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchEntry {
    /// Which page.
    pub pfn: u64,
    /// What it is.
    pub state: PageState,
    /// Its content.
    pub content: Found,
}

/// What was found in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Its type has no content.
    Nothing,
    /// Zeros only.
    Zero,
    /// What [`Batch::content`] has in this slot.
    Slot(usize),
}

/// Pages that were read, copied once, typed and digested from the copy.
#[derive(Debug, Default)]
pub struct Batch {
    /// The pages that changed, by ascending pfn.
    pub entries: Vec<BatchEntry>,
    /// As much as was ever needed; the slots in use come first.
    contents: Vec<u8>,
    slots: usize,
    /// How many pages were looked at and are as they were known.
    pub unchanged: u64,
}

impl Batch {
    /// Empties it; the memory is kept.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.slots = 0;
        self.unchanged = 0;
    }

    /// Room for one more page's content: its slot and the bytes to fill, which hold something else
    /// before.
    pub fn new_slot(&mut self) -> (usize, &mut Page) {
        let slot = self.slots;
        self.slots += 1;
        let needed = self.slots * PAGE_SIZE;
        if self.contents.len() < needed {
            self.contents.resize(needed, 0);
        }
        let (pages, _) = self.contents.as_chunks_mut::<PAGE_SIZE>();
        (slot, &mut pages[slot])
    }

    /// Gives the newest slot back: its page turned out not to be needed.
    pub fn drop_slot(&mut self) {
        self.slots = self.slots.saturating_sub(1);
    }

    /// The content in `slot`.
    pub fn content(&self, slot: usize) -> Option<&Page> {
        self.in_use().get(slot)
    }

    /// The contents in neighbouring slots.
    pub fn contents(&self, slots: Range<usize>) -> Option<&[Page]> {
        self.in_use().get(slots)
    }

    fn in_use(&self) -> &[Page] {
        &self.contents.as_chunks::<PAGE_SIZE>().0[..self.slots]
    }
}

/// When dirty pages are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// The guest runs.
    Live,
    /// It is suspended; this is the last time.
    Last,
}

/// What those pages are that were named as dirty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dirty {
    /// Written since they were asked for last.
    Written,
    /// All that the guest has: which of them have changed only looking at them tells.
    Everything,
}

/// A guest that leaves.
///
/// Dropping it unmaps everything: a page that stays mapped keeps a destroyed domain around.
pub trait Source {
    /// What is fixed.
    fn facts(&self) -> &Facts;

    /// What comes before any page and never changes: the CPU policy.
    ///
    /// # Errors
    /// What Xen refuses.
    fn static_data(&mut self) -> Result<StaticData>;

    /// Starts tracking dirty pages and says how.
    ///
    /// # Errors
    /// What Xen refuses; [`crate::Error::Busy`] where another tool tracks them.
    fn begin(&mut self) -> Result<TrackerKind>;

    /// Adds to `dirty` every page that may have changed since the last call, and says what they are;
    /// the first call adds all. Then looks again where pages are, since that may have changed too.
    ///
    /// # Errors
    /// What Xen refuses, or a guest whose tables make no sense.
    fn next_dirty(&mut self, dirty: &mut PageSet, moment: Moment) -> Result<Dirty>;

    /// Every page that may have content, as of the last [`Source::next_dirty`]: what a first round
    /// takes.
    fn everything(&self) -> PageSet {
        PageSet::full(self.facts().pages)
    }

    /// The frames that hold the guest's own physical-to-machine table, as pfns; none where the
    /// hypervisor has that table.
    fn p2m_frames(&self) -> &[u64];

    /// Pages the guest has now, holes left out.
    fn populated(&self) -> u64;

    /// Reads `pfns` (at most 1,024, ascending). What differs from `known` goes into `batch`;
    /// what can't be read while the guest runs goes into `deferred`.
    ///
    /// # Errors
    /// What Xen refuses. After the suspend a page that can't be read is an error.
    fn read(
        &mut self,
        pfns: &[u64],
        known: &PageTable,
        moment: Moment,
        batch: &mut Batch,
        deferred: &mut PageSet,
    ) -> Result<()>;

    /// The most processor time that the guest may use, in percent of one CPU; zero: as much as
    /// there is. None where that can't be bounded.
    ///
    /// # Errors
    /// What Xen refuses.
    fn cpu_cap(&mut self) -> Result<Option<u32>>;

    /// Sets what [`Source::cpu_cap`] returns. Harmless where the guest is gone.
    ///
    /// # Errors
    /// What Xen refuses.
    fn set_cpu_cap(&mut self, percent: u32) -> Result<()>;

    /// As [`Source::set_cpu_cap`], where the guest has its own share again; also of one that has
    /// rebooted since, which takes what was set along.
    ///
    /// # Errors
    /// What Xen refuses.
    fn restore_cpu_cap(&mut self, percent: u32) -> Result<()>;

    /// Suspends the guest, and returns once it is. Where it fails the guest runs, or will be made
    /// to by [`Source::resume`].
    ///
    /// # Errors
    /// A guest that won't suspend in time.
    fn suspend(&mut self) -> Result<()>;

    /// After the suspend: what the guest is besides its memory.
    ///
    /// # Errors
    /// What Xen refuses.
    fn final_state(&mut self) -> Result<GuestState>;

    /// Makes sure that the guest is still as it was suspended, right before it is handed over: while
    /// the destination restored it another tool may have let it go on.
    ///
    /// # Errors
    /// [`Error::Refused`](crate::error::Error::Refused) where it runs;
    /// [`Error::Busy`](crate::error::Error::Busy) where a stock tool is at work on it.
    fn confirm(&mut self) -> Result<()>;

    /// Ends the tracking of dirty pages. Harmless when there is none.
    ///
    /// # Errors
    /// What Xen refuses.
    fn end_tracking(&mut self) -> Result<()>;

    /// Takes a suspend that is still pending back, and says what became of it.
    ///
    /// # Errors
    /// What Xen refuses.
    fn end_suspend(&mut self) -> Result<EndedSuspend>;

    /// Lets a suspended guest go on here.
    ///
    /// # Errors
    /// What Xen refuses.
    fn resume(&mut self) -> Result<()>;

    /// Destroys what the guest left here.
    ///
    /// # Errors
    /// What Xen refuses.
    fn destroy(&mut self) -> Result<()>;
}

/// What became of a request to suspend that nobody needs any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndedSuspend {
    /// It was too late to take it back: the guest is suspended.
    Suspended,
    /// The guest was suspended, and is not any more.
    GoesOn,
    /// The guest won't suspend because of it, or is gone.
    WillNot,
    /// The guest has taken the request, and may suspend yet.
    MayCome,
}

/// What is told of a guest that may suspend when nobody waits for it any more.
pub(crate) const MAY_SUSPEND: &str =
    "The guest has taken the request to suspend, and may suspend yet";

/// What is told of a guest that was suspended, and is not any more.
pub(crate) const RESUMED: &str = "Another tool let the suspended guest go on";

/// A guest that arrives.
///
/// Dropping it before [`Destination::take_over`] leaves whatever was made: call
/// [`Destination::discard`].
pub trait Destination {
    /// Begins to take pages out of `image`: makes the domain, and holds the memory it needs.
    ///
    /// # Errors
    /// Where there is not enough memory, or libxl refuses.
    fn start(&mut self, image: Arc<Mutex<Image>>, static_data: StaticData) -> Result<()>;

    /// A round begins: the frames that hold the guest's own physical-to-machine table, as pfns,
    /// and how many pages it has. Starts over from the image where they no longer fit. True if it
    /// did.
    ///
    /// # Errors
    /// [`crate::Error::Guest`] for frames beyond the guest; as [`Destination::start`].
    fn begin_round(&mut self, frames: &[u64], populated: u64) -> Result<bool>;

    /// Pages of the image that are new, or changed.
    ///
    /// # Errors
    /// Where the restore has ended.
    fn changed(&mut self, pfns: &[u64]) -> Result<()>;

    /// A round has arrived; `vanished` says that some pages became holes: starts over from the
    /// image, since what was fed can't be taken back. True if it did.
    ///
    /// # Errors
    /// As [`Destination::start`].
    fn end_round(&mut self, vanished: bool) -> Result<bool>;

    /// How many pages of the image have yet to be given to the restore.
    ///
    /// # Errors
    /// Where the restore has ended.
    fn behind(&mut self) -> Result<u64>;

    /// All pages are in the image: gives the restore what comes last. Doesn't wait.
    ///
    /// # Errors
    /// Where the restore has ended.
    fn complete(&mut self, state: GuestState) -> Result<()>;

    /// Whether the restore is complete; then the domain is there, paused. With the seconds of
    /// each of its parts.
    ///
    /// # Errors
    /// Where the restore failed.
    fn completed(&mut self) -> Result<Option<Vec<(String, f64)>>>;

    /// Compares the restored domain's pages with the image, but for those that a restore rewrites.
    ///
    /// # Errors
    /// [`crate::Error::Verify`].
    fn verify(&mut self) -> Result<()>;

    /// Looks once more: the restored domain is there, and has not run.
    ///
    /// # Errors
    /// Where it is gone, or runs.
    fn confirm(&mut self) -> Result<()>;

    /// Lets the guest run under its name.
    ///
    /// # Errors
    /// What libxl refuses.
    fn take_over(&mut self) -> Result<()>;

    /// Waits until the guest, which runs again, has found its devices: for some seconds at the
    /// most. What this site does meanwhile takes the processor from just what the guest waits for.
    fn find_devices(&mut self) {}

    /// Ends the restore and destroys the domain. Harmless when there is none.
    ///
    /// # Errors
    /// What libxl refuses.
    fn discard(&mut self) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_with_a_device_model_is_not_taken() {
        for kind in [Kind::Pv, Kind::Pvh] {
            assert_eq!(Kind::try_from(GuestKind::from(kind)).unwrap(), kind);
        }
        let refused = Kind::try_from(GuestKind::Hvm).unwrap_err();
        assert!(refused.to_string().contains("device model"), "{refused}");
    }

    #[test]
    fn room_is_reserved_for_memory_and_not_for_holes() {
        const MIB: u64 = 256;
        let ranges = |pages, most| Kind::Pvh.memory_ranges(pages, most);
        assert_eq!(Kind::Pv.memory_ranges(7, 3), [0..7, 7..7]);
        // The special pages lie below 4 GiB.
        assert_eq!(
            ranges(0xff000, 128 * MIB),
            [0..128 * MIB, FOUR_GIB..FOUR_GIB]
        );
        let large = 6 << 18;
        assert_eq!(
            ranges(FOUR_GIB + large - 0xf0000, large),
            [0..FOUR_GIB, FOUR_GIB..FOUR_GIB + large - 0xf0000]
        );
        // A guest that has mapped something far up.
        assert_eq!(
            ranges(1 << 28, 128 * MIB),
            [0..128 * MIB, FOUR_GIB..FOUR_GIB + 128 * MIB]
        );
        assert_eq!(ranges(10, u64::MAX), [0..10, FOUR_GIB..FOUR_GIB]);
    }
}
