//! A paravirtualised guest that leaves.
//!
//! ```text
//! vCPU, page tables: mfns          on the wire: pfns          restored: mfns of the new host
//!        |                               ^
//!        +--- m2p: mfn -> pfn -----------+
//!        +--- p2m: pfn -> mfn  (checks it, and finds pages to map)
//! ```
//!
//! A PV guest knows machine frames. What leaves is normalised: every frame number becomes a pfn.
//! The guest's own p2m says where its pages are; it may change while the guest runs, so it is
//! walked again each time dirty pages are asked for, and a page that moved is dirty.
//!
//! Nothing stays mapped between calls: a mapped page keeps a destroyed domain, or a page that was
//! ballooned out, from going away.

use std::thread;
use std::time::Duration;

use xen_sys::DomId;
use xen_sys::ctl::DirtyBitmap;
use xen_sys::memory::{Access, ForeignMemory, M2p, Mapping};

use super::host::{Host, SUSPENDING};
use super::vcpu;
use crate::digest::{DigestKey, Digester, PageDigest};
use crate::error::{Error, IoContext, Result, chain};
use crate::guest::xen::p2m::{self, P2mDescription};
use crate::guest::xen::page_table::normalise;
use crate::guest::xen::stream::state::{DomainKind, GuestState, PvState, StaticData, TscInfo};
use crate::guest::{Batch, BatchEntry, Facts, Found, Kind, Moment, PageState, PageTable, Source};
use crate::pages::{MAX_PAGES, PAGE_SIZE, Page, PageSet, PageType, is_zero};
use crate::report::TrackerKind;

/// The hypervisor's limit for one look-up of page types, and ours for one mapping.
pub const BATCH: usize = 1024;

/// Bytes of a PV guest's pointers and p2m entries: only 64-bit guests are moved.
const WIDTH: u8 = 8;

/// Where start_info (xen/xen.h) names the frame of the xenstore ring.
const START_INFO_STORE: usize = 56;

/// Where start_info names the frame of the console ring.
const START_INFO_CONSOLE: usize = 72;

/// A frame that can't be mapped: it isn't the guest's.
#[derive(Debug, thiserror::Error)]
#[error("The frame can't be mapped")]
struct Unmapped;

/// A paravirtualised guest on this host.
pub struct PvSource {
    host: Host,
    memory: ForeignMemory,
    m2p: M2p,
    domid: DomId,
    facts: Facts,
    digester: Digester,
    /// The digest of an ordinary page of zeros.
    zero: PageDigest,
    wanted: Option<TrackerKind>,
    log_dirty: Option<DirtyBitmap>,
    scanning: bool,
    started: bool,
    /// Whether the guest was asked to suspend and has not done it.
    suspending: bool,
    p2m: Vec<u64>,
    p2m_frames: Vec<u64>,
}

impl PvSource {
    /// Takes hold of the running guest `domid`. `key` is the secret of its
    /// digests; `wanted` forces a tracker.
    ///
    /// # Errors
    /// What Xen refuses; [`Error::Guest`] where the guest's p2m can't be followed.
    pub fn open(domid: DomId, key: &DigestKey, wanted: Option<TrackerKind>) -> Result<PvSource> {
        let host = Host::open()?;
        let memory = ForeignMemory::open().context(|| "Can't map guests' memory")?;
        let m2p = M2p::map(host.ctl()).context(|| "Can't map the machine-to-physical table")?;
        let info = host.info(domid)?;
        let name = host.name(domid)?;
        let digester = Digester::new(key);
        let facts = Facts {
            name,
            uuid: host.uuid_text(&info),
            kind: Kind::Pv,
            pages: 0,
            vcpus: info.max_vcpu_id.map_or(0, |id| id + 1),
        };
        let mut source = PvSource {
            host,
            memory,
            m2p,
            domid,
            facts,
            zero: digester.zero(PageType::Normal),
            digester,
            wanted,
            log_dirty: None,
            scanning: false,
            started: false,
            suspending: false,
            p2m: Vec::new(),
            p2m_frames: Vec::new(),
        };
        let (p2m, frames) = source.settled_p2m()?;
        source.facts.pages = p2m.len() as u64;
        source.p2m = p2m;
        source.p2m_frames = frames;
        Ok(source)
    }

    /// The guest's domain id.
    pub fn domid(&self) -> DomId {
        self.domid
    }

    /// This guest's host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    fn shared_info(&self) -> Result<Box<[u8; PAGE_SIZE]>> {
        let info = self.host.info(self.domid)?;
        let mut page = Box::new([0; PAGE_SIZE]);
        self.copy_frame(info.shared_info_frame, &mut page)
            .ok_or_else(|| Error::Guest {
                what: "shared info page can't be mapped".into(),
            })?;
        Ok(page)
    }

    fn copy_frame(&self, mfn: u64, into: &mut [u8; PAGE_SIZE]) -> Option<()> {
        let mapping = self.memory.map_page(self.domid, Access::Read, mfn).ok()?;
        mapping.copy_page(0, into).then_some(())
    }

    /// The whole p2m as it is now, and the frames that hold it as pfns.
    fn walk_p2m(&self) -> Result<(Vec<u64>, Vec<u64>)> {
        let shared = P2mDescription::parse(&*self.shared_info()?);
        let highest = self.m2p.frames().saturating_sub(1);
        let walked = p2m::find(&shared, highest, MAX_PAGES, |mfn, page| {
            self.copy_frame(mfn, page).ok_or(Unmapped)
        })
        .map_err(|error| Error::Guest {
            what: format!("p2m can't be followed: {}", chain(&error)),
        })?;
        let mut table = Vec::with_capacity(walked.frames.len() * PAGE_SIZE / WIDTH as usize);
        for frames in walked.frames.chunks(BATCH) {
            let mapping = self
                .memory
                .map(self.domid, Access::Read, frames)
                .context(|| "Can't map the guest's p2m")?;
            let mut page = [0; PAGE_SIZE];
            for index in 0..frames.len() {
                if !mapping.copy_page(index, &mut page) {
                    return Err(Error::Guest {
                        what: "p2m can't be mapped".into(),
                    });
                }
                table.extend(
                    page.as_chunks::<8>()
                        .0
                        .iter()
                        .map(|entry| u64::from_le_bytes(*entry)),
                );
            }
        }
        table.truncate(walked.max_pfn as usize + 1);
        let frames = p2m::frames_to_pfns(&walked.frames, |mfn| {
            self.m2p.pfn_of(mfn).filter(|pfn| *pfn <= walked.max_pfn)
        })
        .map_err(|mfn| Error::Guest {
            what: format!("p2m lies outside of its memory ({mfn:#x})"),
        })?;
        Ok((table, frames))
    }

    /// The p2m of a guest that may be changing it right now: a walk that meets a change is tried
    /// again.
    fn settled_p2m(&self) -> Result<(Vec<u64>, Vec<u64>)> {
        const ATTEMPTS: u32 = 10;
        for _ in 1..ATTEMPTS {
            match self.walk_p2m() {
                Err(Error::Guest { what }) => log::debug!("The guest's {what}"),
                other => return other,
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.walk_p2m()
    }

    /// Looks again where pages are. What moved, came or went is dirty.
    fn follow_p2m(&mut self, dirty: &mut PageSet) -> Result<()> {
        let (p2m, frames) = self.settled_p2m()?;
        if p2m.len() != self.p2m.len() {
            return Err(Error::Guest {
                what: "memory map grew on the way; try again".into(),
            });
        }
        for (pfn, (new, old)) in p2m.iter().zip(&self.p2m).enumerate() {
            if new != old {
                dirty.insert(pfn as u64);
            }
        }
        self.p2m = p2m;
        self.p2m_frames = frames;
        Ok(())
    }

    /// The machine frame of `pfn`, if it has one that exists.
    fn mfn(&self, pfn: u64) -> Option<u64> {
        let mfn = self.p2m.get(pfn as usize).copied()?;
        (mfn < self.m2p.frames()).then_some(mfn)
    }

    /// The pfn of `mfn`, where both tables agree on it.
    fn pfn(&self, mfn: u64) -> Option<u64> {
        let pfn = self.m2p.pfn_of(mfn)?;
        (self.p2m.get(pfn as usize) == Some(&mfn)).then_some(pfn)
    }

    /// Starts log-dirty if the hypervisor can. `None`: it can't, for this guest or at all.
    fn try_log_dirty(&mut self) -> Result<Option<DirtyBitmap>> {
        let host = &self.host;
        match host.ctl().log_dirty_enable(self.domid) {
            Ok(()) => {}
            Err(error) if error.is_not_supported() || error.is_out_of_memory() => {
                log::info!("No log-dirty for {}: {error}", self.facts.name);
                return Ok(None);
            }
            // Enabled already (EINVAL), or another paging operation is under way (EBUSY).
            Err(error) if error.is_busy() || super::host::is_invalid(&error) => {
                return Err(Error::Busy(format!(
                    "Another tool is tracking the memory of {}",
                    self.facts.name
                )));
            }
            Err(error) => return Err(error).context(|| "Can't track dirty pages"),
        }
        match host.ctl().dirty_bitmap(self.facts.pages) {
            Ok(bitmap) => Ok(Some(bitmap)),
            Err(error) => {
                host.end_log_dirty(self.domid, true)?;
                Err(error).context(|| "Can't track dirty pages")
            }
        }
    }

    /// Takes one page that has content into `batch`, if it is not as it was.
    fn take(
        &self,
        mapping: &Mapping,
        index: usize,
        pfn: u64,
        page_type: PageType,
        known: &PageTable,
        batch: &mut Batch,
    ) -> Taken {
        let before = known.get(pfn);
        let level = page_type.table_level();
        if let (None, Some(before)) = (level, before) {
            // In place this can only answer "unchanged": the guest may write while it is read.
            let now = mapping.with_page(index, |page| self.digester.page(page_type, page));
            if now == Some(before.digest) {
                return Taken::Unchanged;
            }
        }
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
            && let Err(error) = normalise(page, level, |mfn| self.pfn(mfn))
        {
            batch.drop_slot();
            return Taken::Unreadable(error.to_string());
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
}

enum Taken {
    Unchanged,
    Changed,
    /// It is on its way in or out, or a table that can't be translated while the guest runs.
    Unreadable(String),
}

impl Source for PvSource {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn static_data(&mut self) -> Result<StaticData> {
        let ctl = self.host.ctl();
        let policy = ctl
            .cpu_policy(self.domid)
            .context(|| "Can't read the guest's CPU policy")?;
        let version = ctl.version().context(|| "Can't read Xen's version")?;
        Ok(StaticData {
            kind: DomainKind::Pv64,
            xen_version: (version.major, version.minor),
            cpuid_policy: policy.leaf_bytes().to_vec(),
            msr_policy: policy.msr_bytes().to_vec(),
        })
    }

    fn begin(&mut self) -> Result<TrackerKind> {
        if self.wanted != Some(TrackerKind::Scan) {
            self.log_dirty = self.try_log_dirty()?;
        }
        match (&self.log_dirty, self.wanted) {
            (Some(_), _) => Ok(TrackerKind::LogDirty),
            (None, Some(TrackerKind::LogDirty)) => Err(Error::Refused(
                "This hypervisor can't log the dirty pages of a PV guest (no shadow paging)".into(),
            )),
            (None, _) => {
                self.scanning = true;
                Ok(TrackerKind::Scan)
            }
        }
    }

    fn next_dirty(&mut self, dirty: &mut PageSet, moment: Moment) -> Result<()> {
        // Clear first, look at the p2m after: what changes in between is dirty next time.
        if let Some(bitmap) = &mut self.log_dirty {
            let last = moment == Moment::Last;
            self.host
                .ctl()
                .log_dirty_clean(self.domid, bitmap, last)
                .context(|| "Can't read the dirty pages")?;
            dirty.union_with(&PageSet::from_words(bitmap.words(), self.facts.pages));
        }
        self.follow_p2m(dirty)?;
        // A stock saver that started meanwhile takes log-dirty mode over, and what was dirty with
        // it; it suspends the guest, and lets it go on or destroys it, when it likes.
        self.host.refuse_saver(self.domid)?;
        if self.scanning || !self.started {
            dirty.fill();
        }
        self.started = true;
        if moment == Moment::Last {
            for pfn in self.find_rings()?.into_iter().chain(self.find_granted()?) {
                dirty.insert(pfn);
            }
        }
        Ok(())
    }

    fn p2m_frames(&self) -> &[u64] {
        &self.p2m_frames
    }

    fn populated(&self) -> u64 {
        self.p2m
            .iter()
            .filter(|mfn| **mfn < self.m2p.frames())
            .count() as u64
    }

    fn read(
        &mut self,
        pfns: &[u64],
        known: &PageTable,
        moment: Moment,
        batch: &mut Batch,
        deferred: &mut PageSet,
    ) -> Result<()> {
        let mut pages: Vec<(u64, u64)> = Vec::with_capacity(pfns.len());
        let mut holes = Vec::new();
        for pfn in pfns {
            match self.mfn(*pfn) {
                Some(mfn) => pages.push((*pfn, mfn)),
                None => holes.push(*pfn),
            }
        }
        let mut types: Vec<u64> = pages.iter().map(|(_, mfn)| *mfn).collect();
        if !types.is_empty() {
            self.host
                .ctl()
                .page_types(self.domid, &mut types)
                .context(|| "Can't read the types of pages")?;
        }
        let mut frames = Vec::with_capacity(pages.len());
        for ((pfn, mfn), raw) in pages.into_iter().zip(types) {
            let page_type = PageType::from_page_frame_info(raw).map_err(|error| Error::Guest {
                what: format!("page {pfn:#x}: {error}"),
            })?;
            if !page_type.has_data() {
                holes.push(pfn);
            } else if self.m2p.pfn_of(mfn) != Some(pfn) {
                // The page is on its way in or out.
                if moment == Moment::Last {
                    let what = format!("page {pfn:#x} is not where its p2m says");
                    return Err(Error::Guest { what });
                }
                deferred.insert(pfn);
            } else {
                frames.push((pfn, mfn, page_type));
            }
        }
        let first = batch.entries.len();
        if !frames.is_empty() {
            let mfns: Vec<u64> = frames.iter().map(|(_, mfn, _)| *mfn).collect();
            let mapping = self
                .memory
                .map(self.domid, Access::Read, &mfns)
                .context(|| "Can't map the guest's memory")?;
            for (index, (pfn, _, page_type)) in frames.iter().enumerate() {
                match self.take(&mapping, index, *pfn, *page_type, known, batch) {
                    Taken::Unchanged => batch.unchanged += 1,
                    Taken::Changed => {}
                    Taken::Unreadable(why) if moment == Moment::Last => {
                        let what = format!("page {pfn:#x} ({page_type:?}) can't be read: {why}");
                        return Err(Error::Guest { what });
                    }
                    Taken::Unreadable(_) => {
                        deferred.insert(*pfn);
                    }
                }
            }
        }
        for pfn in holes {
            let state = PageState {
                page_type: PageType::Invalid,
                digest: self.digester.hole(PageType::Invalid),
            };
            if known.get(pfn) == Some(state) {
                batch.unchanged += 1;
            } else {
                batch.entries.push(BatchEntry {
                    pfn,
                    state,
                    content: Found::Nothing,
                });
            }
        }
        batch.entries[first..].sort_by_key(|entry| entry.pfn);
        Ok(())
    }

    fn suspend(&mut self) -> Result<()> {
        self.suspending = true;
        self.host.suspend(self.domid)?;
        self.suspending = false;
        Ok(())
    }

    fn final_state(&mut self) -> Result<GuestState> {
        let ctl = self.host.ctl();
        let tsc = ctl
            .tsc_info(self.domid)
            .context(|| "Can't read the guest's TSC")?;
        let vcpus = (0..self.facts.vcpus)
            .filter_map(|id| vcpu::state(ctl, self.domid, id, |mfn| self.pfn(mfn)).transpose())
            .collect::<Result<_>>()?;
        Ok(GuestState::Pv(PvState {
            tsc: TscInfo {
                mode: tsc.mode,
                khz: tsc.khz,
                nsec: tsc.nsec,
                incarnation: tsc.incarnation,
            },
            shared_info: self.shared_info()?,
            vcpus,
        }))
    }

    fn end_tracking(&mut self) -> Result<()> {
        match self.log_dirty.take() {
            Some(_) => self.host.end_log_dirty(self.domid, true),
            None => Ok(()),
        }
    }

    fn end_suspend(&mut self) -> Result<bool> {
        let patience = if self.suspending {
            SUSPENDING
        } else {
            Duration::ZERO
        };
        self.host.end_suspend(self.domid, patience)
    }

    fn resume(&mut self) -> Result<()> {
        self.host.resume(self.domid)
    }

    fn destroy(&mut self) -> Result<()> {
        self.host.destroy(self.domid)
    }
}

impl PvSource {
    /// Pages that dom0's backends keep mapped for writing, the rings of devices above all: what they
    /// write there log-dirty doesn't see either. They may write once more after the suspend, which
    /// is no change of the guest's: it makes its rings anew when it goes on.
    fn find_granted(&self) -> Result<Vec<u64>> {
        let frames = self
            .host
            .ctl()
            .frames_mapped_writable(self.domid)
            .context(|| "Can't read what the guest has granted")?;
        Ok(frames.into_iter().filter_map(|mfn| self.pfn(mfn)).collect())
    }

    /// start_info, which vCPU 0 holds while suspended, and the console and xenstore rings that it
    /// names: dom0 writes to the rings through mappings that log-dirty doesn't see.
    fn find_rings(&self) -> Result<Vec<u64>> {
        let bad = |what: &str| Error::Guest {
            what: what.to_owned(),
        };
        let context = self
            .host
            .ctl()
            .vcpu_context(self.domid, 0)
            .context(|| "Can't read the state of vCPU 0")?;
        let mfn = context.rdx();
        let start_info = self
            .pfn(mfn)
            .ok_or_else(|| bad("start_info is not in its memory"))?;
        let mut page = [0; PAGE_SIZE];
        self.copy_frame(mfn, &mut page)
            .ok_or_else(|| bad("start_info can't be mapped"))?;
        let mut pages = vec![start_info];
        pages.extend(
            start_info_rings(&page)
                .into_iter()
                .filter(|pfn| *pfn < self.facts.pages),
        );
        Ok(pages)
    }
}

/// The pfns of the xenstore and the console ring, as start_info of a suspended guest names them.
pub(super) fn start_info_rings(page: &Page) -> [u64; 2] {
    [START_INFO_STORE, START_INFO_CONSOLE].map(|offset| {
        page.get(offset..)
            .and_then(<[u8]>::first_chunk)
            .map_or(u64::MAX, |word| u64::from_le_bytes(*word))
    })
}
