//! A PVH guest that leaves.
//!
//! ```text
//! gfn = pfn     0 ....... RAM ....... | hole ... | special pages | hole | RAM above 4 GiB ...
//!                   which of them have a page: asked of the hypervisor, in each round anew
//! ```
//!
//! The hypervisor translates for it, so there is nothing to normalise: a page crosses as it is, and
//! the guest's own tables mean the same at both sites. Its table of frames belongs to the
//! hypervisor. What of it is the guest's memory [`presence`](super::presence) finds out.
//!
//! A guest that was started with less memory than it may have gets some of its pages only when they
//! are touched. To look at one gives it the page, which was put by for it.
//!
//! Log-dirty works by hardware-assisted paging, on every hypervisor that can run such a guest. It
//! has two gaps:
//!
//! - What dom0 writes through a mapping of its own isn't logged, as with PV guests.
//! - A page that was just put in place is writable until the log is read the next time: what the
//!   guest writes to it isn't logged. So a balloon that moved makes everything dirty, and once more
//!   the next time: it may have moved after the log was read.

use std::time::Duration;

use xen_sys::DomId;
use xen_sys::ctl::{MIGRATED_HVM_PARAMS, RING_HVM_PARAMS};
use xen_sys::store::{Store, Watch};

use super::leaving::{BATCH, Frame, Leaving};
use super::presence::{self, Presence};
use crate::digest::DigestKey;
use crate::error::{Error, IoContext, Result};
use crate::guest::xen::stream::state::{GuestState, HvmState, StaticData};
use crate::guest::{Batch, Dirty, EndedSuspend, Facts, Kind, Moment, PageTable, Source};
use crate::pages::{PageSet, PageType, Pfn};
use crate::report::TrackerKind;

/// How long a watch that was set may take to say so.
const FIRST_EVENT: Duration = Duration::from_secs(1);

/// A PVH guest on this host.
pub struct PvhSource {
    leaving: Leaving,
    presence: Presence,
    unlogged: Unlogged,
    /// Tells when its balloon is given another target.
    target: Watch,
}

impl PvhSource {
    /// Takes hold of the running guest `domid`. `key` is the secret of its digests; `wanted`
    /// forces a tracker.
    ///
    /// # Errors
    /// What Xen refuses; [`Error::Guest`] where its memory is larger than any guest's may be.
    pub fn open(
        domid: DomId,
        key: &DigestKey,
        wanted: Option<TrackerKind>,
        cores: usize,
    ) -> Result<PvhSource> {
        let mut leaving = Leaving::open(domid, Kind::Pvh, key, wanted, cores)?;
        let pages = leaving
            .host
            .ctl()
            .nr_gpfns(domid)
            .context(|| "Can't read the guest's size")?;
        if pages > leaving.most_pages {
            return Err(Error::Guest {
                what: format!("memory reaches up to frame {pages:#x}"),
            });
        }
        leaving.facts.pages = pages;
        let target = Store::open()
            .and_then(|store| store.watch(&target_of(domid), "target"))
            .context(|| "Can't watch the guest's balloon")?;
        // The first event tells that it is watched, and nothing of the balloon.
        target
            .wait(Some(FIRST_EVENT))
            .context(|| "Can't watch the guest's balloon")?;
        let mut source = PvhSource {
            leaving,
            presence: Presence::nothing(pages),
            unlogged: Unlogged::default(),
            target,
        };
        source.follow(&mut PageSet::new(pages))?;
        Ok(source)
    }

    /// Looks again where it has pages; what came or went is dirty. True: its balloon has moved, or
    /// may have.
    fn follow(&mut self, dirty: &mut PageSet) -> Result<bool> {
        // A target that was changed and changed back leaves no other trace.
        let mut asked = false;
        while self
            .target
            .wait(Some(Duration::ZERO))
            .context(|| "Can't watch the guest's balloon")?
            .is_some()
        {
            asked = true;
        }
        let (host, domid) = (&self.leaving.host, self.leaving.domid);
        let pages = self.leaving.facts.pages;
        let owned = host.info(domid)?.tot_pages;
        let found = self
            .presence
            .look(owned, |pfns| presence::ask(host, domid, pfns))?;
        if found.len() < owned {
            // What it owns and does not have in place is no matter; what it put beyond is.
            let reach = host
                .ctl()
                .nr_gpfns(domid)
                .context(|| "Can't read the guest's size")?;
            if reach > pages {
                return Err(Error::Guest {
                    what: "memory map grew on the way; try again".into(),
                });
            }
        }
        let moved = presence::difference(self.presence.pages(), &found);
        dirty.union_with(&moved);
        self.presence.set(found);
        Ok(asked || !moved.is_empty())
    }

    /// The rings of xenstore and the console: dom0 writes to them through mappings of its own.
    fn find_rings(&self) -> Result<Vec<Pfn>> {
        RING_HVM_PARAMS
            .into_iter()
            .map(|param| self.param(param))
            .collect()
    }

    fn param(&self, param: u32) -> Result<u64> {
        self.leaving
            .host
            .ctl()
            .hvm_param(self.leaving.domid, param)
            .context(|| "Can't read the guest's parameters")
    }
}

/// Whether pages may be written to that the log does not see: those that came since it was read.
/// For how many more looks everything is dirty.
#[derive(Default)]
struct Unlogged(u8);

impl Unlogged {
    /// The log was read, and then it was seen whether pages had `moved`. True: everything is dirty.
    fn note(&mut self, moved: bool, moment: Moment) -> bool {
        let before = self.0 > 0;
        self.0 = match moment {
            Moment::Live => self.0.saturating_sub(1).max(moved.into()),
            // Who is suspended writes no more.
            Moment::Last => 0,
        };
        before || moved
    }

    /// A page was not where it was seen. It may have come back until that is looked at again, also
    /// after the log was read.
    fn missed(&mut self, moment: Moment) {
        if moment == Moment::Live {
            self.0 = 2;
        }
    }
}

/// Where xenstore has what a guest's balloon should come to.
fn target_of(domid: DomId) -> String {
    format!("/local/domain/{domid}/memory/target")
}

impl Source for PvhSource {
    fn facts(&self) -> &Facts {
        &self.leaving.facts
    }

    fn static_data(&mut self) -> Result<StaticData> {
        self.leaving.static_data()
    }

    fn begin(&mut self) -> Result<TrackerKind> {
        // Of a guest that has yet to map its grant table it can't be told, not even later, with the
        // guest suspended.
        self.leaving.granted()?;
        self.leaving.begin()
    }

    fn next_dirty(&mut self, dirty: &mut PageSet, moment: Moment) -> Result<Dirty> {
        self.leaving.take_logged(dirty, moment)?;
        let moved = self.follow(dirty)?;
        let unlogged = self.unlogged.note(moved, moment);
        let logged = self.leaving.has_logged()?;
        let mut named = Dirty::Written;
        if self.leaving.tracker.all_count() || unlogged || !logged {
            dirty.union_with(self.presence.pages());
            named = Dirty::Everything;
        }
        if moment == Moment::Last {
            for pfn in self
                .find_rings()?
                .into_iter()
                .chain(self.leaving.granted()?)
            {
                if self.presence.pages().contains(pfn) {
                    dirty.insert(pfn);
                }
            }
        }
        Ok(named)
    }

    fn everything(&self) -> PageSet {
        self.presence.pages().clone()
    }

    fn p2m_frames(&self) -> &[u64] {
        &[]
    }

    fn populated(&self) -> u64 {
        self.presence.pages().len()
    }

    fn read(
        &mut self,
        pfns: &[u64],
        known: &PageTable,
        moment: Moment,
        batch: &mut Batch,
        deferred: &mut PageSet,
    ) -> Result<()> {
        debug_assert!(pfns.len() <= BATCH);
        let (there, mut holes): (Vec<u64>, Vec<u64>) = pfns
            .iter()
            .partition(|pfn| self.presence.pages().contains(**pfn));
        let mut types = there.clone();
        if !types.is_empty() {
            self.leaving
                .host
                .ctl()
                .page_types(self.leaving.domid, &mut types)
                .context(|| "Can't read the types of pages")?;
        }
        let mut frames = Vec::with_capacity(there.len());
        for (pfn, raw) in there.into_iter().zip(types) {
            let page_type = PageType::from_page_frame_info(raw).map_err(|error| Error::Guest {
                what: format!("page {pfn:#x}: {error}"),
            })?;
            match page_type {
                PageType::Normal => frames.push(Frame {
                    pfn,
                    frame: pfn,
                    page_type,
                }),
                // Its page went after it was looked for.
                PageType::Invalid => {
                    self.unlogged.missed(moment);
                    holes.push(pfn);
                }
                other => {
                    let what = format!("page {pfn:#x} is of type {other}");
                    return Err(Error::Guest { what });
                }
            }
        }
        let first = batch.entries.len();
        let as_it_is = |_: &mut _, _| Ok(());
        self.leaving
            .take_all(&frames, as_it_is, known, moment, batch, deferred)?;
        for pfn in holes {
            let hole = self.leaving.hole(pfn);
            // A pfn of which nothing was said is a hole at the destination too.
            if known.get(pfn).is_none_or(|known| known == hole.state) {
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
        let tsc = self.leaving.tsc()?;
        let context = self
            .leaving
            .host
            .ctl()
            .hvm_context(self.leaving.domid)
            .context(|| "Can't read the state of the virtual hardware")?;
        let mut params = Vec::with_capacity(MIGRATED_HVM_PARAMS.len());
        for param in MIGRATED_HVM_PARAMS {
            let value = self.param(param)?;
            // What is zero is zero in a new domain.
            if value != 0 {
                params.push((u64::from(param), value));
            }
        }
        Ok(GuestState::Hvm(HvmState {
            tsc,
            context,
            params,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_came_are_looked_at_until_the_log_sees_them() {
        use Moment::{Last, Live};
        let mut unlogged = Unlogged::default();
        assert!(!unlogged.note(false, Live));
        assert!(unlogged.note(true, Live));
        // It may have come between the reading of the log and the look.
        assert!(unlogged.note(false, Live));
        assert!(!unlogged.note(false, Live));
        unlogged.missed(Live);
        assert!(unlogged.note(false, Live));
        assert!(unlogged.note(false, Live));
        assert!(!unlogged.note(false, Live));
        // What was read once after the suspend is right.
        assert!(unlogged.note(true, Last));
        unlogged.missed(Last);
        assert!(!unlogged.note(false, Live));
    }
}
