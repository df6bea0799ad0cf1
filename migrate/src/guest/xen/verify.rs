//! The verify mode at the destination: the restored domain's own pages against the image.
//!
//! ```text
//! restored p2m: pfn -> frame --map, copy, normalise, digest--> equal to the image's digest?
//! ```
//!
//! A PV guest's restored page tables hold this host's machine frames; normalised again they must be
//! what the source sent. A PVH guest's frames are its pfns, and nothing is normalised.

use std::collections::HashMap;

use xen_sys::DomId;
use xen_sys::memory::{Access, ForeignMemory, M2p};

use super::host::Host;
use super::leaving::BATCH;
use super::page_table::normalise;
use super::presence::{self, Presence};
use crate::digest::Digester;
use crate::error::{Error, IoContext, Result};
use crate::guest::Kind;
use crate::image::Image;
use crate::pages::{PAGE_SIZE, PageSet, PageType};

const NO_FRAME: u64 = u64::MAX;

/// A paused domain that was restored.
pub(super) struct Restored<'a> {
    pub host: &'a Host,
    pub domid: DomId,
    pub kind: Kind,
    /// The pfns of its own p2m, if it has one.
    pub p2m_frames: &'a [u64],
    /// The pfns that a restore writes itself.
    pub rewritten: &'a [u64],
}

impl Restored<'_> {
    /// Compares every page with `image`, but for those that were rewritten.
    ///
    /// # Errors
    /// [`Error::Verify`] that names the first pages that differ.
    pub fn compare(&self, image: &Image, digester: &Digester) -> Result<()> {
        let memory = ForeignMemory::open().context(|| "Can't map guests' memory")?;
        let table = image.table();
        match self.kind {
            Kind::Pv => {
                let m2p = M2p::map(self.host.ctl())
                    .context(|| "Can't map the machine-to-physical table")?;
                let frames = find_frames(
                    self.host,
                    self.domid,
                    &memory,
                    &m2p,
                    self.p2m_frames,
                    table.pages(),
                )?;
                let translate = |mfn: u64| {
                    let pfn = m2p.pfn_of(mfn)?;
                    (frames.get(pfn as usize) == Some(&mfn)).then_some(pfn)
                };
                let frame = |pfn: u64| {
                    let frame = frames.get(pfn as usize).copied();
                    frame.filter(|mfn| *mfn != NO_FRAME)
                };
                self.compare_frames(&memory, image, digester, frame, translate)
            }
            Kind::Pvh => {
                let owned = self.host.info(self.domid)?.tot_pages;
                let found = Presence::of(table.known())
                    .look(owned, |pfns| presence::ask(self.host, self.domid, pfns))?;
                let frame = |pfn: u64| found.contains(pfn).then_some(pfn);
                self.compare_frames(&memory, image, digester, frame, |_| None)
            }
        }
    }

    /// `frame` says what to map for a pfn; `translate` turns frames in page tables into pfns.
    fn compare_frames(
        &self,
        memory: &ForeignMemory,
        image: &Image,
        digester: &Digester,
        frame: impl Fn(u64) -> Option<u64>,
        translate: impl Fn(u64) -> Option<u64>,
    ) -> Result<()> {
        let (host, domid, table) = (self.host, self.domid, image.table());
        let mut different = Vec::new();
        let mut compared = 0u64;
        let mut wanted = PageSet::full(table.pages());
        for pfn in self.rewritten {
            wanted.remove(*pfn);
        }
        let (mut cursor, mut batch) = (0, Vec::with_capacity(BATCH));
        while wanted.take_batch(&mut cursor, BATCH, &mut batch) > 0 {
            let mut present = Vec::with_capacity(batch.len());
            for pfn in &batch {
                let wanted = table.get(*pfn).filter(|state| state.page_type.has_data());
                match (wanted, frame(*pfn)) {
                    (Some(state), Some(mfn)) => present.push((*pfn, mfn, state)),
                    (None, None) => {}
                    _ => different.push(*pfn),
                }
            }
            batch.clear();
            let mfns: Vec<u64> = present.iter().map(|(_, mfn, _)| *mfn).collect();
            if mfns.is_empty() {
                continue;
            }
            let mut types = mfns.clone();
            host.ctl()
                .page_types(domid, &mut types)
                .context(|| "Can't read the types of pages")?;
            let mapping = memory
                .map(domid, Access::Read, &mfns)
                .context(|| "Can't map the guest's memory")?;
            let mut page = [0; PAGE_SIZE];
            for (index, (pfn, _, state)) in present.iter().enumerate() {
                compared += 1;
                let page_type = types
                    .get(index)
                    .and_then(|raw| PageType::from_page_frame_info(*raw).ok());
                let same_type = page_type.is_some_and(|found| same_type(found, state.page_type));
                let same = mapping.copy_page(index, &mut page)
                    && same_type
                    && match state.page_type.table_level() {
                        Some(level) => normalise(&mut page, level, &translate).is_ok(),
                        None => true,
                    }
                    && digester.page(state.page_type, &page) == state.digest;
                if !same {
                    different.push(*pfn);
                }
            }
        }
        if different.is_empty() {
            log::info!("{compared} restored pages are what was sent");
            return Ok(());
        }
        let shown: Vec<String> = different
            .iter()
            .take(8)
            .map(|pfn| format!("{pfn:#x}"))
            .collect();
        Err(Error::Verify(format!(
            "{} of {compared} restored pages differ, {} among them",
            different.len(),
            shown.join(", ")
        )))
    }
}

/// Where each page of the domain is, by the p2m that the restore wrote into the domain's memory.
/// Where the p2m itself is nobody says: the hypervisor's table is searched for frames that name its
/// pfns, and the hypervisor says which of them are this domain's.
fn find_frames(
    host: &Host,
    domid: DomId,
    memory: &ForeignMemory,
    m2p: &M2p,
    p2m_frames: &[u64],
    pages: u64,
) -> Result<Vec<u64>> {
    let mut wanted = PageSet::new(pages);
    for pfn in p2m_frames {
        wanted.insert(*pfn);
    }
    let candidates: Vec<(u64, u64)> = (0..m2p.frames())
        .filter_map(|mfn| Some((m2p.pfn_of(mfn)?, mfn)))
        .filter(|(pfn, _)| wanted.contains(*pfn))
        .collect();
    let mut types: Vec<u64> = candidates.iter().map(|(_, mfn)| *mfn).collect();
    host.ctl()
        .page_types(domid, &mut types)
        .context(|| "Can't read the types of pages")?;
    let found: HashMap<u64, u64> = candidates
        .into_iter()
        .zip(types)
        .filter(|(_, raw)| PageType::from_page_frame_info(*raw).is_ok_and(PageType::has_data))
        .map(|(candidate, _)| candidate)
        .collect();
    let p2m: Vec<u64> = p2m_frames
        .iter()
        .map(|pfn| {
            let frame = found.get(pfn).copied();
            frame.ok_or_else(|| Error::Verify(format!("The restored p2m lacks page {pfn:#x}")))
        })
        .collect::<Result<_>>()?;
    let mut frames = Vec::with_capacity(pages as usize);
    for chunk in p2m.chunks(BATCH) {
        let mapping = memory
            .map(domid, Access::Read, chunk)
            .context(|| "Can't map the restored p2m")?;
        let mut page = [0; PAGE_SIZE];
        for index in 0..chunk.len() {
            if !mapping.copy_page(index, &mut page) {
                return Err(Error::Verify("The restored p2m can't be read".into()));
            }
            let entries = page.as_chunks::<8>().0;
            frames.extend(entries.iter().map(|entry| u64::from_le_bytes(*entry)));
        }
    }
    frames.resize(pages as usize, NO_FRAME);
    // Both tables must agree. Holes, and what is another's, are no frames in the p2m.
    for (pfn, mfn) in frames.iter_mut().enumerate() {
        if m2p.pfn_of(*mfn) != Some(pfn as u64) {
            *mfn = NO_FRAME;
        }
    }
    Ok(frames)
}

/// A table that is only reached through another need not show the same pin.
fn same_type(found: PageType, wanted: PageType) -> bool {
    found == wanted
        || (found.table_level() == wanted.table_level() && wanted.table_level().is_some())
}
