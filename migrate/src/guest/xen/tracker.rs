//! Which pages changed: what the hypervisor logs, or all of them.
//!
//! ```text
//! begin --> log-dirty: each time what was logged since the last time
//!       \-> scan:      each time everything; what is unchanged shows by its digest
//! ```

use xen_sys::DomId;
use xen_sys::ctl::{DirtyBitmap, DomainInfo};

use super::host::{Host, is_invalid};
use super::savers::{Savers, Seen, refuse, refuse_saver, saver_at_work};
use crate::error::{Error, IoContext, Result};
use crate::guest::{Facts, Kind, Moment};
use crate::pages::PageSet;
use crate::report::TrackerKind;

/// What a guest will have for a tracker: found without tracking it. With hardware-assisted paging the
/// hypervisor can always log dirty pages. `wanted` leaves no choice.
///
/// # Errors
/// What Xen refuses; [`Error::Refused`] where log-dirty is wanted and not there.
pub fn foretell_tracker(
    host: &Host,
    info: &DomainInfo,
    kind: Kind,
    wanted: Option<TrackerKind>,
) -> Result<TrackerKind> {
    let physical = host.ctl().physical_info();
    let physical = physical.context(|| "Can't ask what this host is able to do")?;
    choose(wanted, info.hap || physical.shadow, kind)
}

/// Log-dirty where the hypervisor `logs`, else a scan.
fn choose(wanted: Option<TrackerKind>, logs: bool, kind: Kind) -> Result<TrackerKind> {
    match (wanted, logs) {
        (Some(TrackerKind::Scan), _) | (None, false) => Ok(TrackerKind::Scan),
        (_, true) => Ok(TrackerKind::LogDirty),
        (Some(TrackerKind::LogDirty), false) => Err(Error::Refused(match kind {
            Kind::Pv => "This hypervisor can't log the dirty pages of a PV guest (no shadow \
                         paging)"
                .into(),
            Kind::Pvh => "This hypervisor can't log the guest's dirty pages".into(),
        })),
    }
}

/// The tracker of one guest.
pub(super) struct Tracker {
    domid: DomId,
    wanted: Option<TrackerKind>,
    log_dirty: Option<DirtyBitmap>,
    savers: Option<Savers>,
    scanning: bool,
    started: bool,
}

impl Tracker {
    /// Tracks nothing yet. `wanted` leaves no choice.
    pub fn new(domid: DomId, wanted: Option<TrackerKind>) -> Tracker {
        Tracker {
            domid,
            wanted,
            log_dirty: None,
            savers: None,
            scanning: false,
            started: false,
        }
    }

    /// Starts log-dirty where the hypervisor can, else a scan.
    ///
    /// # Errors
    /// What Xen refuses; [`Error::Busy`] where another tool tracks the guest; [`Error::Refused`]
    /// where log-dirty is wanted and not there.
    pub fn begin(&mut self, host: &Host, facts: &Facts) -> Result<TrackerKind> {
        if self.wanted != Some(TrackerKind::Scan) {
            // First: none is to come and go unseen.
            self.savers = Some(Savers::watch(self.domid));
            self.log_dirty = self.try_log_dirty(host, facts)?;
        }
        if self.log_dirty.is_none() {
            self.savers = None;
        }
        let chosen = choose(self.wanted, self.log_dirty.is_some(), facts.kind)?;
        self.scanning = chosen == TrackerKind::Scan;
        Ok(chosen)
    }

    /// Starts log-dirty if the hypervisor can. `None`: it can't, for this guest or at all.
    fn try_log_dirty(&self, host: &Host, facts: &Facts) -> Result<Option<DirtyBitmap>> {
        let mut enabled = host.ctl().log_dirty_enable(self.domid);
        let is_on = matches!(&enabled, Err(error) if is_invalid(error));
        if is_on && saver_at_work(self.domid).is_none() {
            // A saver that was killed leaves it so. Nobody else needs it.
            log::warn!("The log of dirty pages of {} was left on", facts.name);
            enabled = host
                .ctl()
                .log_dirty_off(self.domid)
                .and_then(|()| host.ctl().log_dirty_enable(self.domid));
        }
        match enabled {
            Ok(()) => {}
            Err(error) if error.is_not_supported() || error.is_out_of_memory() => {
                log::info!("No log-dirty for {}: {error}", facts.name);
                return Ok(None);
            }
            // Enabled already (EINVAL), or another paging operation is under way (EBUSY).
            Err(error) if error.is_busy() || is_invalid(&error) => {
                return Err(Error::Busy(format!(
                    "Another tool is tracking the memory of {}",
                    facts.name
                )));
            }
            Err(error) => return Err(error).context(|| "Can't track dirty pages"),
        }
        match host.ctl().dirty_bitmap(facts.pages) {
            Ok(bitmap) => Ok(Some(bitmap)),
            Err(error) => {
                host.end_log_dirty(self.domid, true)?;
                Err(error).context(|| "Can't track dirty pages")
            }
        }
    }

    /// What was logged since the last time goes into `dirty`, and is forgotten by the hypervisor.
    ///
    /// # Errors
    /// What Xen refuses.
    pub fn take_logged(
        &mut self,
        host: &Host,
        pages: u64,
        dirty: &mut PageSet,
        moment: Moment,
    ) -> Result<()> {
        if let Some(bitmap) = &mut self.log_dirty {
            host.ctl()
                .log_dirty_clean(self.domid, bitmap, moment == Moment::Last)
                .context(|| "Can't read the dirty pages")?;
            dirty.union_with(&PageSet::from_words(bitmap.words(), pages));
        }
        Ok(())
    }

    /// Whether another tool may have come and gone since this was asked last, and with it what was
    /// logged for us.
    ///
    /// # Errors
    /// [`Error::Busy`] where one is at work.
    pub fn lost_to_others(&mut self) -> Result<bool> {
        let Some(savers) = &mut self.savers else {
            return refuse_saver(self.domid).map(|()| false);
        };
        let Seen { at_work, gone } = savers.look();
        refuse(at_work)?;
        if gone {
            log::info!("Another tool may have taken the log of dirty pages");
        }
        Ok(gone)
    }

    /// Turns the log on where it is off; whether it was. Another tool that took it over has turned it
    /// off at its end, and of a log that is off the hypervisor hands out that nothing is dirty. To be
    /// asked while no other tool is at work.
    ///
    /// # Errors
    /// What Xen refuses.
    pub fn turn_on(&self, host: &Host) -> Result<bool> {
        if self.log_dirty.is_none() {
            return Ok(false);
        }
        match host.ctl().log_dirty_enable(self.domid) {
            Err(error) if is_invalid(&error) => Ok(false),
            Err(error) => Err(error).context(|| "Can't track dirty pages"),
            Ok(()) => {
                log::warn!("Another tool has ended the log of dirty pages: it is begun anew");
                Ok(true)
            }
        }
    }

    /// Whether every page has to be looked at this time: always in a scan, else the first time.
    pub fn all_count(&mut self) -> bool {
        !std::mem::replace(&mut self.started, true) || self.scanning
    }

    /// Ends it. Harmless when there is none.
    ///
    /// # Errors
    /// What Xen refuses.
    pub fn end(&mut self, host: &Host) -> Result<()> {
        match self.log_dirty.take() {
            Some(_) => host.end_log_dirty(self.domid, true),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hypervisor_and_the_operator_choose() {
        use TrackerKind::{LogDirty, Scan};
        for kind in [Kind::Pv, Kind::Pvh] {
            let chosen = |wanted, logs| choose(wanted, logs, kind).ok();
            assert_eq!(chosen(None, true), Some(LogDirty));
            assert_eq!(chosen(None, false), Some(Scan));
            assert_eq!(chosen(Some(Scan), true), Some(Scan));
            assert_eq!(chosen(Some(LogDirty), true), Some(LogDirty));
            // No move would come of it, so nothing is foretold of one.
            assert_eq!(chosen(Some(LogDirty), false), None);
        }
    }
}
