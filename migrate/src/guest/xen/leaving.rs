//! What all guests that leave have in common: their host, how their pages are copied and digested,
//! how they are suspended and let go.
//!
//! ```text
//!              frames        mapped        in place: as before? ----> unchanged   on all cores
//! kind of guest -----> take -------> page -- zeros? ----------------> zero
//!    ^                                  \--- copied once, normalised,
//!    +---- how a table is normalised ------- digested --------------> content
//! ```

use xen_sys::DomId;
use xen_sys::memory::{Access, ForeignMemory, Mapping};

use super::host::{Asked, Host, SUSPENDING};
use super::savers::refuse_saver;
use super::tracker::Tracker;
use crate::digest::{DigestKey, Digester, PageDigest};
use crate::error::{Error, IoContext, Result};
use crate::guest::comparer::Comparer;
use crate::guest::xen::stream::state::{StaticData, TscInfo};
use crate::guest::{
    Batch, BatchEntry, EndedSuspend, Facts, Found, Kind, Moment, PageState, PageTable, RESUMED,
};
use crate::pages::{PAGE_SIZE, Page, PageSet, PageType, is_zero};
use crate::report::TrackerKind;

/// The hypervisor's limit for one look-up of page types, and ours for one mapping.
pub const BATCH: usize = 1024;

/// A guest on this host that leaves.
pub(super) struct Leaving {
    pub host: Host,
    pub memory: ForeignMemory,
    pub domid: DomId,
    /// `pages` is known once the kind of guest has found it out.
    pub facts: Facts,
    pub tracker: Tracker,
    /// The most pages that its memory map may have.
    pub most_pages: u64,
    digester: Digester,
    comparer: Comparer,
    /// The digest of an ordinary page of zeros.
    zero: PageDigest,
    /// The request to suspend.
    asked: Asked,
}

/// A page that has content: where to map it, and what it is.
pub(super) struct Frame {
    pub pfn: u64,
    /// As [`ForeignMemory::map`] wants it for this kind of guest.
    pub frame: u64,
    pub page_type: PageType,
}

enum Taken {
    Unchanged,
    Changed,
    /// It is on its way in or out, or a table that can't be translated while the guest runs.
    Unreadable(String),
}

impl Leaving {
    /// Takes hold of the running guest `domid`. `key` is the secret of its digests; `wanted`
    /// forces a tracker. Pages are compared on so many `cores`.
    ///
    /// # Errors
    /// What Xen refuses.
    pub fn open(
        domid: DomId,
        kind: Kind,
        key: &DigestKey,
        wanted: Option<TrackerKind>,
        cores: usize,
    ) -> Result<Leaving> {
        let host = Host::open()?;
        let memory = ForeignMemory::open().context(|| "Can't map guests' memory")?;
        let info = host.info(domid)?;
        let physical = host
            .ctl()
            .physical_info()
            .context(|| "Can't read about this host")?;
        let facts = Facts {
            name: host.name(domid)?,
            uuid: host.uuid_text(&info),
            kind,
            pages: 0,
            vcpus: info.max_vcpu_id.map_or(0, |id| id + 1),
        };
        let digester = Digester::new(key);
        Ok(Leaving {
            tracker: Tracker::new(domid, wanted),
            most_pages: kind.most_pages(physical.total_pages),
            host,
            memory,
            domid,
            facts,
            zero: digester.zero(PageType::Normal),
            digester,
            comparer: Comparer::new(cores),
            asked: Asked::No,
        })
    }

    /// What comes before any page.
    pub fn static_data(&self) -> Result<StaticData> {
        let ctl = self.host.ctl();
        let policy = ctl
            .cpu_policy(self.domid)
            .context(|| "Can't read the guest's CPU policy")?;
        let version = ctl.version().context(|| "Can't read Xen's version")?;
        Ok(StaticData {
            kind: self.facts.kind.domain_kind(),
            xen_version: (version.major, version.minor),
            cpuid_policy: policy.leaf_bytes().to_vec(),
            msr_policy: policy.msr_bytes().to_vec(),
        })
    }

    /// The guest's clock.
    pub fn tsc(&self) -> Result<TscInfo> {
        let tsc = self
            .host
            .ctl()
            .tsc_info(self.domid)
            .context(|| "Can't read the guest's TSC")?;
        Ok(TscInfo {
            mode: tsc.mode,
            khz: tsc.khz,
            nsec: tsc.nsec,
            incarnation: tsc.incarnation,
        })
    }

    /// Starts tracking dirty pages.
    pub fn begin(&mut self) -> Result<TrackerKind> {
        self.tracker.begin(&self.host, &self.facts)
    }

    /// What the hypervisor has logged since the last time goes into `dirty`, and is forgotten
    /// there. Look where pages are only after it: what changes in between is dirty next time.
    ///
    /// # Errors
    /// What Xen refuses; [`Error::Busy`] where a stock tool is at work on the guest. It takes the
    /// log over, and what is read there then it would miss.
    pub fn take_logged(&mut self, dirty: &mut PageSet, moment: Moment) -> Result<()> {
        refuse_saver(self.domid)?;
        self.tracker
            .take_logged(&self.host, self.facts.pages, dirty, moment)
    }

    /// Whether what was logged is all. If not, every page may be dirty.
    ///
    /// # Errors
    /// What Xen refuses; [`Error::Busy`] where a stock tool has begun meanwhile: it suspends the
    /// guest, and lets it go on or destroys it, when it likes.
    pub fn has_logged(&mut self) -> Result<bool> {
        let lost = self.tracker.lost_to_others()?;
        let was_off = self.tracker.turn_on(&self.host)?;
        Ok(!lost && !was_off)
    }

    /// Frames that dom0's backends keep mapped for writing, the rings of devices above all: what
    /// they write there log-dirty doesn't see. They may write once more after the suspend, which
    /// is no change of the guest's: it makes its rings anew when it goes on.
    pub fn granted(&self) -> Result<Vec<u64>> {
        self.host
            .ctl()
            .frames_mapped_writable(self.domid)
            .context(|| "Can't read what the guest has granted")
    }

    /// Copies one frame.
    pub fn copy_frame(&self, frame: u64, into: &mut Page) -> Option<()> {
        let mapping = self.memory.map_page(self.domid, Access::Read, frame).ok()?;
        mapping.copy_page(0, into).then_some(())
    }

    /// Takes pages that have content into `batch`, where they are not as they were. `normalise`
    /// makes the content of a page table one that holds at both sites.
    pub fn take_all(
        &self,
        frames: &[Frame],
        normalise: impl Fn(&mut Page, u8) -> std::result::Result<(), String>,
        known: &PageTable,
        moment: Moment,
        batch: &mut Batch,
        deferred: &mut PageSet,
    ) -> Result<()> {
        if frames.is_empty() {
            return Ok(());
        }
        let numbers: Vec<u64> = frames.iter().map(|frame| frame.frame).collect();
        let mapping = self
            .memory
            .map(self.domid, Access::Read, &numbers)
            .context(|| "Can't map the guest's memory")?;
        // In place this can only answer "unchanged": the guest may write while it is read.
        let digester = &self.digester;
        let is_known = |index: usize| known.get(frames[index].pfn).is_some();
        let same = self.comparer.same(frames.len(), is_known, |index| {
            let Frame { pfn, page_type, .. } = frames[index];
            page_type.table_level().is_none()
                && known.get(pfn).is_some_and(|before| {
                    let now = mapping.with_page(index, |page| digester.page(page_type, page));
                    now == Some(before.digest)
                })
        });
        for ((index, frame), same) in frames.iter().enumerate().zip(same) {
            if same {
                batch.unchanged += 1;
                continue;
            }
            match self.take(&mapping, index, frame, &normalise, known, batch) {
                Taken::Unchanged => batch.unchanged += 1,
                Taken::Changed => {}
                Taken::Unreadable(why) if moment == Moment::Last => {
                    let Frame { pfn, page_type, .. } = frame;
                    let what = format!("page {pfn:#x} ({page_type:?}) can't be read: {why}");
                    return Err(Error::Guest { what });
                }
                Taken::Unreadable(_) => {
                    deferred.insert(frame.pfn);
                }
            }
        }
        Ok(())
    }

    /// Takes one page that has content into `batch`, if its copy is not as it was.
    fn take(
        &self,
        mapping: &Mapping,
        index: usize,
        frame: &Frame,
        normalise: impl Fn(&mut Page, u8) -> std::result::Result<(), String>,
        known: &PageTable,
        batch: &mut Batch,
    ) -> Taken {
        let Frame { pfn, page_type, .. } = *frame;
        let before = known.get(pfn);
        let level = page_type.table_level();
        // Half of most guests. As with a copy, what is written meanwhile is dirty next time.
        if level.is_none() && mapping.with_page(index, is_zero) == Some(true) {
            let state = PageState {
                page_type,
                digest: self.zero,
            };
            batch.entries.push(BatchEntry {
                pfn,
                state,
                content: Found::Zero,
            });
            return Taken::Changed;
        }
        let (slot, page) = batch.new_slot();
        if !mapping.copy_page(index, page) {
            batch.drop_slot();
            return Taken::Unreadable("it can't be mapped".into());
        }
        if let Some(level) = level
            && let Err(why) = normalise(page, level)
        {
            batch.drop_slot();
            return Taken::Unreadable(why);
        }
        let state = PageState {
            page_type,
            digest: self.digester.page(page_type, page),
        };
        if before == Some(state) {
            batch.drop_slot();
            return Taken::Unchanged;
        }
        batch.entries.push(BatchEntry {
            pfn,
            state,
            content: Found::Slot(slot),
        });
        Taken::Changed
    }

    /// A pfn that has no page, as an entry of a batch.
    pub fn hole(&self, pfn: u64) -> BatchEntry {
        BatchEntry {
            pfn,
            state: PageState {
                page_type: PageType::Invalid,
                digest: self.digester.hole(PageType::Invalid),
            },
            content: Found::Nothing,
        }
    }

    /// Suspends the guest, and returns once it is.
    pub fn suspend(&mut self) -> Result<()> {
        let suspended = self.host.suspend(self.domid);
        self.asked = match &suspended {
            Ok(()) => Asked::Done,
            Err(Error::Xen { .. }) => Asked::Waiting(SUSPENDING),
            // Nothing was asked, or libxl has taken it back.
            Err(_) => Asked::No,
        };
        suspended
    }

    /// Makes sure that the guest is suspended still, and in nobody else's hands.
    ///
    /// # Errors
    /// [`Error::Refused`], [`Error::Busy`]; what Xen refuses.
    pub fn confirm(&self) -> Result<()> {
        refuse_saver(self.domid)?;
        match self.host.is_suspended(self.domid)? {
            true => Ok(()),
            false => Err(Error::Refused(RESUMED.into())),
        }
    }

    /// Takes a suspend that is still pending back.
    pub fn end_suspend(&self) -> Result<EndedSuspend> {
        self.host.end_suspend(self.domid, self.asked)
    }
}

const _: () = assert!(PAGE_SIZE == 4096, "A frame is a page");
