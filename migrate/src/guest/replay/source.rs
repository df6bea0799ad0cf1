//! A replayed guest that leaves.

use std::sync::Arc;

use super::site::{Call, Site, Watch};
use crate::digest::{DigestKey, Digester, PageDigest};
use crate::error::{Error, Result};
use crate::guest::comparer::Comparer;
use crate::guest::xen::stream::record::VCPU_CONTEXT_SIZE;
use crate::guest::xen::stream::state::{
    DomainKind, GuestState, PvState, PvVcpu, StaticData, TscInfo,
};
use crate::guest::{
    Batch, BatchEntry, Dirty, EndedSuspend, Facts, Found, Moment, PageState, PageTable, RESUMED,
    Source,
};
use crate::pages::{PAGE_SIZE, Page, PageSet, PageType, is_zero};
use crate::report::TrackerKind;

/// Entries of a p2m in one of its frames.
const P2M_ENTRIES: u64 = 512;

/// The guest of a site, as an engine that moves it away sees it.
pub struct ReplaySource {
    site: Arc<Site>,
    facts: Facts,
    digester: Digester,
    comparer: Comparer,
    /// The digest of an ordinary page of zeros.
    zero: PageDigest,
    tracker: TrackerKind,
    started: bool,
    suspended: bool,
    p2m_frames: Vec<u64>,
    watch: Arc<Watch>,
}

impl ReplaySource {
    /// Takes hold of the guest at `site`, on so many `cores`. `watch` is told of each call, and may
    /// let it fail.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is none.
    pub fn open(
        site: &Arc<Site>,
        key: &DigestKey,
        tracker: TrackerKind,
        cores: usize,
        watch: Arc<Watch>,
    ) -> Result<Self> {
        let facts = site.with_guest(|guest| Ok(guest.facts.clone()))?;
        let digester = Digester::new(key);
        Ok(ReplaySource {
            site: Arc::clone(site),
            p2m_frames: (0..facts.pages.div_ceil(P2M_ENTRIES)).collect(),
            facts,
            zero: digester.zero(PageType::Normal),
            digester,
            comparer: Comparer::new(cores),
            tracker,
            started: false,
            suspended: false,
            watch,
        })
    }
}

impl Source for ReplaySource {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn static_data(&mut self) -> Result<StaticData> {
        Ok(StaticData {
            kind: DomainKind::Pv64,
            xen_version: (4, 17),
            cpuid_policy: Vec::new(),
            msr_policy: Vec::new(),
        })
    }

    fn begin(&mut self) -> Result<TrackerKind> {
        (self.watch)(Call::Begin)?;
        if self.tracker == TrackerKind::LogDirty {
            self.site.with_guest(|guest| {
                guest.begin_log();
                Ok(())
            })?;
        }
        Ok(self.tracker)
    }

    fn next_dirty(&mut self, dirty: &mut PageSet, moment: Moment) -> Result<Dirty> {
        (self.watch)(Call::NextDirty)?;
        let whole = self.site.with_guest(|guest| {
            if moment == Moment::Live {
                guest.go_on();
            }
            Ok(guest.take_log(dirty))
        })?;
        let all = !whole || !self.started || self.tracker == TrackerKind::Scan;
        self.started = true;
        if all {
            dirty.fill();
            return Ok(Dirty::Everything);
        }
        Ok(Dirty::Written)
    }

    fn p2m_frames(&self) -> &[u64] {
        &self.p2m_frames
    }

    fn populated(&self) -> u64 {
        let populated = self.site.with_guest(|guest| Ok(guest.memory().populated()));
        populated.unwrap_or_default()
    }

    fn read(
        &mut self,
        pfns: &[u64],
        known: &PageTable,
        moment: Moment,
        batch: &mut Batch,
        deferred: &mut PageSet,
    ) -> Result<()> {
        (self.watch)(Call::Read(moment))?;
        let (digester, zero) = (&self.digester, self.zero);
        let comparer = &self.comparer;
        self.site.with_guest(|guest| {
            guest.go_on();
            let memory = guest.memory();
            let is_known = |at: usize| known.get(pfns[at]).is_some();
            let same = comparer.same(pfns.len(), is_known, |at| {
                let (page, before) = (memory.page(pfns[at]), known.get(pfns[at]));
                let (Some((page_type, content)), Some(before)) = (page, before) else {
                    return false;
                };
                page_type.has_data()
                    && page_type.table_level().is_none()
                    && content.look(|page| digester.page(page_type, page)) == before.digest
            });
            for (pfn, same) in pfns.iter().zip(same) {
                let Some((page_type, content)) = guest.memory().page(*pfn) else {
                    let what = format!("page {pfn:#x} is beyond its memory");
                    return Err(Error::Guest { what });
                };
                if !guest.can_be_read(*pfn) {
                    deferred.insert(*pfn);
                    continue;
                }
                if same {
                    batch.unchanged += 1;
                    continue;
                }
                let before = known.get(*pfn);
                let taken = if page_type.has_data() {
                    content.look(|page| take(page, page_type, before, digester, zero, batch))
                } else {
                    let digest = digester.hole(page_type);
                    let state = PageState { page_type, digest };
                    (before != Some(state)).then_some((state, Found::Nothing))
                };
                match taken {
                    None => batch.unchanged += 1,
                    Some((state, content)) => batch.entries.push(BatchEntry {
                        pfn: *pfn,
                        state,
                        content,
                    }),
                }
            }
            Ok(())
        })
    }

    fn cpu_cap(&mut self) -> Result<Option<u32>> {
        (self.watch)(Call::CpuCap)?;
        self.site.with_guest(|guest| Ok(Some(guest.cpu_cap())))
    }

    fn set_cpu_cap(&mut self, percent: u32) -> Result<()> {
        (self.watch)(Call::SetCpuCap)?;
        self.site.with_guest(|guest| {
            guest.set_cpu_cap(percent);
            Ok(())
        })
    }

    fn restore_cpu_cap(&mut self, percent: u32) -> Result<()> {
        self.set_cpu_cap(percent)
    }

    fn suspend(&mut self) -> Result<()> {
        (self.watch)(Call::Suspend)?;
        self.site.with_guest(|guest| {
            guest.suspend();
            Ok(())
        })?;
        self.suspended = true;
        Ok(())
    }

    fn final_state(&mut self) -> Result<GuestState> {
        (self.watch)(Call::FinalState)?;
        Ok(state_of(self.facts.pages))
    }

    fn confirm(&mut self) -> Result<()> {
        match self.site.with_guest(|guest| Ok(guest.runs()))? {
            false => Ok(()),
            true => Err(Error::Refused(RESUMED.into())),
        }
    }

    fn end_tracking(&mut self) -> Result<()> {
        (self.watch)(Call::EndTracking)?;
        self.site.with_guest(|guest| {
            guest.end_log();
            Ok(())
        })
    }

    fn end_suspend(&mut self) -> Result<EndedSuspend> {
        (self.watch)(Call::EndSuspend)?;
        self.site.with_guest(|guest| {
            Ok(match guest.runs() {
                true if self.suspended => EndedSuspend::GoesOn,
                true => EndedSuspend::WillNot,
                false => EndedSuspend::Suspended,
            })
        })
    }

    fn resume(&mut self) -> Result<()> {
        (self.watch)(Call::Resume)?;
        self.site.with_guest(|guest| {
            guest.resume();
            Ok(())
        })
    }

    fn destroy(&mut self) -> Result<()> {
        (self.watch)(Call::Destroy)?;
        self.site.destroy()
    }
}

/// What a page is, where it is not as it was: the same work, in the same order, as for a real one.
fn take(
    page: &Page,
    page_type: PageType,
    before: Option<PageState>,
    digester: &Digester,
    zero: PageDigest,
    batch: &mut Batch,
) -> Option<(PageState, Found)> {
    let table = page_type.table_level().is_some();
    let state = |digest| PageState { page_type, digest };
    if !table && is_zero(page) {
        let zero = if page_type == PageType::Normal {
            zero
        } else {
            digester.zero(page_type)
        };
        return Some((state(zero), Found::Zero));
    }
    let (slot, copy) = batch.new_slot();
    copy.copy_from_slice(page);
    let now = state(digester.page(page_type, copy));
    if before == Some(now) {
        batch.drop_slot();
        return None;
    }
    Some((now, Found::Slot(slot)))
}

/// What a suspended guest of so many pages is besides its memory.
pub(super) fn state_of(pages: u64) -> GuestState {
    GuestState::Pv(PvState {
        tsc: TscInfo {
            mode: 0,
            khz: 2_000_000,
            nsec: pages,
            incarnation: 1,
        },
        shared_info: Box::new([0x5a; PAGE_SIZE]),
        vcpus: vec![PvVcpu {
            id: 0,
            basic: vec![0xa5; VCPU_CONTEXT_SIZE],
            ..PvVcpu::default()
        }],
    })
}
