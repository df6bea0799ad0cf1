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
use xen_sys::memory::{Access, M2p, StartInfoRings};

use super::leaving::{BATCH, Frame, Leaving};
use super::vcpu;
use crate::digest::DigestKey;
use crate::error::{Error, IoContext, Result, chain};
use crate::guest::xen::p2m::{self, P2mDescription};
use crate::guest::xen::page_table::normalise;
use crate::guest::xen::stream::state::{GuestState, PvState, StaticData};
use crate::guest::{Batch, Dirty, EndedSuspend, Facts, Kind, Moment, PageTable, Source};
use crate::pages::{PAGE_SIZE, Page, PageSet, PageType};
use crate::report::TrackerKind;

/// Bytes of a PV guest's pointers and p2m entries: only 64-bit guests are moved.
const WIDTH: u8 = 8;

/// A frame that can't be mapped: it isn't the guest's.
#[derive(Debug, thiserror::Error)]
#[error("The frame can't be mapped")]
struct Unmapped;

/// A paravirtualised guest on this host.
pub struct PvSource {
    leaving: Leaving,
    m2p: M2p,
    p2m: Vec<u64>,
    p2m_frames: Vec<u64>,
}

impl PvSource {
    /// Takes hold of the running guest `domid`. `key` is the secret of its
    /// digests; `wanted` forces a tracker.
    ///
    /// # Errors
    /// What Xen refuses; [`Error::Guest`] where the guest's p2m can't be followed.
    pub fn open(
        domid: DomId,
        key: &DigestKey,
        wanted: Option<TrackerKind>,
        cores: usize,
    ) -> Result<PvSource> {
        let leaving = Leaving::open(domid, Kind::Pv, key, wanted, cores)?;
        let m2p =
            M2p::map(leaving.host.ctl()).context(|| "Can't map the machine-to-physical table")?;
        let mut source = PvSource {
            leaving,
            m2p,
            p2m: Vec::new(),
            p2m_frames: Vec::new(),
        };
        let (p2m, frames) = source.settled_p2m()?;
        source.leaving.facts.pages = p2m.len() as u64;
        source.p2m = p2m;
        source.p2m_frames = frames;
        Ok(source)
    }

    fn shared_info(&self) -> Result<Box<[u8; PAGE_SIZE]>> {
        let info = self.leaving.host.info(self.leaving.domid)?;
        let mut page = Box::new([0; PAGE_SIZE]);
        self.leaving
            .copy_frame(info.shared_info_frame, &mut page)
            .ok_or_else(|| Error::Guest {
                what: "shared info page can't be mapped".into(),
            })?;
        Ok(page)
    }

    /// The whole p2m as it is now, and the frames that hold it as pfns.
    fn walk_p2m(&self) -> Result<(Vec<u64>, Vec<u64>)> {
        let shared = P2mDescription::parse(&*self.shared_info()?);
        let highest = self.m2p.frames().saturating_sub(1);
        let most = self.leaving.most_pages;
        let walked = p2m::find(&shared, highest, most, |mfn, page| {
            self.leaving.copy_frame(mfn, page).ok_or(Unmapped)
        })
        .map_err(|error| Error::Guest {
            what: format!("p2m can't be followed: {}", chain(&error)),
        })?;
        let mut table = Vec::with_capacity(walked.frames.len() * PAGE_SIZE / WIDTH as usize);
        for frames in walked.frames.chunks(BATCH) {
            let mapping = self
                .leaving
                .memory
                .map(self.leaving.domid, Access::Read, frames)
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
}

impl Source for PvSource {
    fn facts(&self) -> &Facts {
        &self.leaving.facts
    }

    fn static_data(&mut self) -> Result<StaticData> {
        self.leaving.static_data()
    }

    fn begin(&mut self) -> Result<TrackerKind> {
        self.leaving.begin()
    }

    fn next_dirty(&mut self, dirty: &mut PageSet, moment: Moment) -> Result<Dirty> {
        // Clear first, look at the p2m after: what changes in between is dirty next time.
        self.leaving.take_logged(dirty, moment)?;
        self.follow_p2m(dirty)?;
        let logged = self.leaving.has_logged()?;
        let mut named = Dirty::Written;
        if self.leaving.tracker.all_count() || !logged {
            dirty.fill();
            named = Dirty::Everything;
        }
        if moment == Moment::Last {
            for pfn in self.find_rings()?.into_iter().chain(self.find_granted()?) {
                dirty.insert(pfn);
            }
        }
        Ok(named)
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
            self.leaving
                .host
                .ctl()
                .page_types(self.leaving.domid, &mut types)
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
                frames.push(Frame {
                    pfn,
                    frame: mfn,
                    page_type,
                });
            }
        }
        let first = batch.entries.len();
        let to_pfns = |page: &mut Page, level| {
            normalise(page, level, |mfn| self.pfn(mfn)).map_err(|error| error.to_string())
        };
        self.leaving
            .take_all(&frames, to_pfns, known, moment, batch, deferred)?;
        for pfn in holes {
            let hole = self.leaving.hole(pfn);
            if known.get(pfn) == Some(hole.state) {
                batch.unchanged += 1;
            } else {
                batch.entries.push(hole);
            }
        }
        batch.entries[first..].sort_by_key(|entry| entry.pfn);
        Ok(())
    }

    fn cpu_cap(&mut self) -> Result<Option<u32>> {
        self.leaving.host.cpu_cap(self.leaving.domid)
    }

    fn set_cpu_cap(&mut self, percent: u32) -> Result<()> {
        self.leaving.host.set_cpu_cap(self.leaving.domid, percent)
    }

    fn restore_cpu_cap(&mut self, percent: u32) -> Result<()> {
        let leaving = &self.leaving;
        leaving.host.restore_cpu_cap(&leaving.facts.uuid, percent)
    }

    fn suspend(&mut self) -> Result<()> {
        self.leaving.suspend()
    }

    fn final_state(&mut self) -> Result<GuestState> {
        let (ctl, domid) = (self.leaving.host.ctl(), self.leaving.domid);
        let tsc = self.leaving.tsc()?;
        let vcpus = (0..self.leaving.facts.vcpus)
            .filter_map(|id| vcpu::state(ctl, domid, id, |mfn| self.pfn(mfn)).transpose())
            .collect::<Result<_>>()?;
        Ok(GuestState::Pv(PvState {
            tsc,
            shared_info: self.shared_info()?,
            vcpus,
        }))
    }

    fn confirm(&mut self) -> Result<()> {
        self.leaving.confirm()
    }

    fn end_tracking(&mut self) -> Result<()> {
        self.leaving.tracker.end(&self.leaving.host)
    }

    fn end_suspend(&mut self) -> Result<EndedSuspend> {
        self.leaving.end_suspend()
    }

    fn resume(&mut self) -> Result<()> {
        self.leaving.host.resume(self.leaving.domid)
    }

    fn destroy(&mut self) -> Result<()> {
        self.leaving.host.destroy(self.leaving.domid)
    }
}

impl PvSource {
    /// Pages that backends write to.
    fn find_granted(&self) -> Result<Vec<u64>> {
        let frames = self.leaving.granted()?;
        Ok(frames.into_iter().filter_map(|mfn| self.pfn(mfn)).collect())
    }

    /// start_info, which vCPU 0 holds while suspended, and the console and xenstore rings that it
    /// names: dom0 writes to the rings through mappings that log-dirty doesn't see.
    fn find_rings(&self) -> Result<Vec<u64>> {
        let bad = |what: &str| Error::Guest {
            what: what.to_owned(),
        };
        let context = self
            .leaving
            .host
            .ctl()
            .vcpu_context(self.leaving.domid, 0)
            .context(|| "Can't read the state of vCPU 0")?;
        let mfn = context.rdx();
        let start_info = self
            .pfn(mfn)
            .ok_or_else(|| bad("start_info is not in its memory"))?;
        let mut page = [0; PAGE_SIZE];
        self.leaving
            .copy_frame(mfn, &mut page)
            .ok_or_else(|| bad("start_info can't be mapped"))?;
        let mut pages = vec![start_info];
        pages.extend(
            start_info_rings(&page)
                .into_iter()
                .filter(|pfn| *pfn < self.leaving.facts.pages),
        );
        Ok(pages)
    }
}

/// The pfns of the xenstore and the console ring, as start_info of a suspended guest names them.
pub(super) fn start_info_rings(page: &Page) -> [u64; 2] {
    let rings = StartInfoRings::parse(page);
    [rings.store, rings.console]
}
