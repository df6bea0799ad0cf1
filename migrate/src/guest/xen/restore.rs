//! A guest that arrives, restored by stock libxl.
//!
//! ```text
//! image ----> feeder thread ----> pipe ----> libxl_domain_create_restore (restore thread)
//!               ^    libxl stream 2 / libxc image 3                 |
//!  changed() ---+  PAGE_DATA as often as there is time              v
//!  complete() -----  TSC, vCPUs or virtual hardware, END      the domain, paused
//! ```
//!
//! The restore begins with the move: pages are in the domain before the guest is suspended, and
//! what comes in the silence is the last delta alone. A pfn may be fed again and again. What it
//! can't do is take a page back, and the domain can't have more pages than its limit. When a page
//! that was fed becomes a hole, or more pages come than fit (a balloon that moved), nothing more is
//! fed; at the round's end this restore is ended (libxl destroys the domain) and a new one fed from
//! the image.
//!
//! An image that was a shadow is fed from the start too, but for its page tables: they may point at
//! pages that the guest no longer has, and the restore would make those. They wait for the first
//! round's end, when the image is the guest as it was not long ago.
//!
//! `attempt` is one such restore with its threads, `feeding` what goes into it, `memory` what this
//! host has for it, and `devices` those that are attached meanwhile.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::TryRecvError;
use xen_sys::DomId;
use xen_sys::ctl::VcpuContext;
use xen_sys::toolstack::DomainConfig;

mod attempt;
mod devices;
mod feeding;
mod memory;
mod params;

use attempt::Restore;
use devices::{Attaching, DEVICES};
use feeding::locked;
use params::{check_params, rings};

use super::host::Host;
use super::pv::start_info_rings;
use super::reconnecting;
use super::stream::state::{GuestState, StaticData};
use super::verify;
use crate::configuration::balloon_target;
use crate::digest::Digester;
use crate::error::{Error, IoContext, Result, chain};
use crate::guest::{Destination, Kind};
use crate::handover::recovery::incoming_name;
use crate::image::Image;
use crate::pages::{PAGE_SIZE, PageType};
use crate::report::rounded;

/// How long a guest that goes on is left alone to find its devices. No longer: it has no keeper
/// yet.
const FINDING_DEVICES: Duration = Duration::from_secs(5);

/// What is to be restored.
#[derive(Debug, Clone)]
pub struct Incoming {
    /// The guest's name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// Its kind.
    pub kind: Kind,
    /// Its configuration: only fields that this site takes of a peer.
    pub configuration: serde_json::Value,
    /// One more than its highest pfn.
    pub pages: u64,
    /// Pages it has.
    pub populated: u64,
}

/// A guest on its way into this host.
pub struct XenDestination {
    host: Host,
    incoming: Incoming,
    digester: Digester,
    image: Option<Arc<Mutex<Image>>>,
    static_data: Option<StaticData>,
    frames: Vec<u64>,
    /// Pages that the guest has in this round.
    populated: u64,
    /// A round has come to its end: what the image holds is the guest's.
    confirmed: bool,
    /// Pages that the restore writes itself: known once the guest's state is.
    rewritten: Vec<u64>,
    restore: Option<Restore>,
    domid: Option<DomId>,
    completing: Option<Instant>,
    devices: Option<Attaching>,
}

impl XenDestination {
    /// Prepares; nothing is made yet.
    ///
    /// # Errors
    /// Where Xen can't be reached.
    pub fn new(incoming: Incoming, digester: Digester) -> Result<Self> {
        Ok(XenDestination {
            host: Host::open()?,
            incoming,
            digester,
            image: None,
            static_data: None,
            frames: Vec::new(),
            populated: 0,
            confirmed: false,
            rewritten: Vec::new(),
            restore: None,
            domid: None,
            completing: None,
            devices: None,
        })
    }

    /// The configuration with this attempt's memory and the name of an incoming guest, without the
    /// devices that are attached beforehand.
    fn configuration(&self, populated: u64) -> Result<DomainConfig> {
        let mut json = self.incoming.configuration.clone();
        json["c_info"]["name"] = incoming_name(&self.incoming.name).into();
        let build = &mut json["b_info"];
        let told = build["target_memkb"].as_u64();
        let target = balloon_target(self.incoming.kind.into(), told, populated);
        let most = build["max_memkb"].as_u64().unwrap_or(0).max(target);
        build["target_memkb"] = target.into();
        build["max_memkb"] = most.into();
        if self.attaches_early()
            && let Some(json) = json.as_object_mut()
        {
            for key in DEVICES {
                json.remove(key);
            }
        }
        self.host
            .toolstack()
            .config_from_json(&json.to_string())
            .context(|| "Bad configuration of the guest")
    }

    /// Feeds what the image held from the start and the source did not send anew.
    fn feed_held_back(&mut self) -> Result<()> {
        let Some(image) = &self.image else {
            return Ok(());
        };
        let mut held = locked(image)?.pages_of(PageType::has_data);
        held.difference_with(&self.restore()?.given);
        self.changed(&held.iter().collect::<Vec<_>>())
    }

    /// How many pages of the guest are in the image.
    fn pages_here(&self) -> Result<u64> {
        let image = self.image.as_ref().ok_or_else(no_restore)?;
        Ok(locked(image)?.pages_of(PageType::has_data).len())
    }

    /// What a restore writes itself: the rings of xenstore and the console; of a PV guest
    /// start_info too, which names them, and the p2m.
    fn find_rewritten(&self, state: &GuestState) -> Result<Vec<u64>> {
        let mut pages = self.frames.clone();
        let state = match state {
            GuestState::Pv(state) => state,
            GuestState::Hvm(state) => return Ok(rings(&state.params)),
        };
        let first = state.vcpus.first().map(|vcpu| vcpu.basic.as_slice());
        let context = first
            .and_then(|basic| basic.try_into().ok())
            .map(VcpuContext::from_bytes);
        if let (Some(context), Some(image)) = (context, &self.image) {
            // By the suspend's convention vCPU 0 holds start_info in rdx.
            let start_info = context.rdx();
            pages.push(start_info);
            if let Some(page) = locked(image)?.content(start_info) {
                pages.extend(start_info_rings(page));
            }
        }
        Ok(pages)
    }
}

fn no_restore() -> Error {
    Error::Refused("There is no restore".into())
}

impl Destination for XenDestination {
    fn start(&mut self, image: Arc<Mutex<Image>>, static_data: StaticData) -> Result<()> {
        self.image = Some(image);
        self.static_data = Some(static_data);
        self.begin(self.incoming.populated)
    }

    fn begin_round(&mut self, frames: &[u64], populated: u64) -> Result<bool> {
        if populated > self.incoming.pages {
            return Err(Error::Guest {
                what: "memory is larger than was offered".into(),
            });
        }
        let wanted = match self.incoming.kind {
            Kind::Pv => self.incoming.pages.div_ceil(PAGE_SIZE as u64 / 8),
            Kind::Pvh => 0,
        };
        if frames.len() as u64 != wanted || frames.iter().any(|pfn| *pfn >= self.incoming.pages) {
            return Err(Error::Guest {
                what: "p2m frames don't fit its memory".into(),
            });
        }
        self.populated = populated;
        let moved = frames != self.frames;
        self.frames = frames.to_vec();
        if populated > self.restore()?.limit {
            self.end_restore()?;
            self.begin(populated)?;
            return Ok(true);
        }
        if moved {
            self.work()?.frames = Some(frames.to_vec());
            self.restore()?.shared.wake.notify_all();
        }
        Ok(false)
    }

    fn changed(&mut self, pfns: &[u64]) -> Result<()> {
        let restore = self.restore.as_mut().ok_or_else(no_restore)?;
        for pfn in pfns {
            restore.given.insert(*pfn);
        }
        restore.stale |= restore.given.len() > restore.limit;
        if restore.stale {
            return Ok(());
        }
        let mut work = self.work()?;
        for pfn in pfns {
            work.pending.insert(*pfn);
        }
        drop(work);
        self.restore()?.shared.wake.notify_all();
        Ok(())
    }

    fn end_round(&mut self, vanished: bool) -> Result<bool> {
        // The guest isn't suspended before this: hotplug is no part of its silence.
        self.devices_attached()?;
        let first = !std::mem::replace(&mut self.confirmed, true);
        let restore = self.restore.as_mut().ok_or_else(no_restore)?;
        restore.stale |= vanished;
        // A page that the guest gave away before it was read is in the new domain all the same, where
        // a page table that was fed still names it.
        restore.stale |= self.incoming.kind == Kind::Pv && self.populated < restore.limit;
        if !restore.stale {
            if first {
                self.feed_held_back()?;
            }
            return Ok(false);
        }
        // The guest's size is told as soon as it is known, in the middle of a round too. Which
        // pages it gave up comes with the next one: what began now would be given too many.
        if self.pages_here()? > self.populated {
            return Ok(false);
        }
        self.end_restore()?;
        self.begin(self.populated)?;
        Ok(true)
    }

    fn behind(&mut self) -> Result<u64> {
        let work = self.work()?;
        Ok(work.pending.len() + work.feeding)
    }

    fn complete(&mut self, state: GuestState) -> Result<()> {
        if let GuestState::Hvm(state) = &state {
            check_params(&state.params)?;
        }
        if self.restore()?.stale {
            return Err(Error::Guest {
                what: format!(
                    "{} pages of it came, and it was said to have {}",
                    self.pages_here()?,
                    self.populated
                ),
            });
        }
        self.rewritten = self.find_rewritten(&state)?;
        self.work()?.tail = Some(state);
        self.completing = Some(Instant::now());
        self.restore()?.shared.wake.notify_all();
        Ok(())
    }

    fn completed(&mut self) -> Result<Option<Vec<(String, f64)>>> {
        let restore = self.restore()?;
        let domid = match restore.ended.try_recv() {
            Ok(Ok(domid)) => domid,
            Ok(Err(reason)) => return Err(Error::Refused(format!("The restore failed: {reason}"))),
            Err(TryRecvError::Empty) => return Ok(None),
            Err(TryRecvError::Disconnected) => {
                return Err(Error::Refused("The restore failed".into()));
            }
        };
        self.refuse_surplus(domid)?;
        let restore = self.restore()?;
        let mut parts = Vec::new();
        let fed = locked(&restore.shared.work)?.fed;
        self.domid = Some(domid);
        self.devices_attached()?;
        if self.attaches_early() {
            self.record_devices(domid)?;
        }
        if let (Some(fed), Some(since)) = (fed, self.completing) {
            parts.push(("feed".into(), rounded(fed - since)));
            parts.push(("libxl after the stream".into(), rounded(fed.elapsed())));
        }
        // What was claimed and not used is free again.
        if let Err(error) = self.host.ctl().claim_pages(domid, 0) {
            log::warn!("Can't release a claim: {error}");
        }
        Ok(Some(parts))
    }

    fn verify(&mut self) -> Result<()> {
        let (Some(domid), Some(image)) = (self.domid, &self.image) else {
            return Err(Error::Refused("There is nothing to verify".into()));
        };
        verify::Restored {
            host: &self.host,
            domid,
            kind: self.incoming.kind,
            p2m_frames: &self.frames,
            rewritten: &self.rewritten,
        }
        .compare(&*locked(image)?, &self.digester)
    }

    fn confirm(&mut self) -> Result<()> {
        let domid = self
            .domid
            .ok_or_else(|| Error::Refused("There is no guest".into()))?;
        let info = self.host.info(domid)?;
        if info.dying || info.shutdown.is_some() || !info.paused {
            return Err(Error::Refused(format!(
                "The restored guest (domain {domid}) was not left alone"
            )));
        }
        Ok(())
    }

    fn take_over(&mut self) -> Result<()> {
        let domid = self
            .domid
            .ok_or_else(|| Error::Refused("There is no guest".into()))?;
        self.host.take_over(
            domid,
            &incoming_name(&self.incoming.name),
            &self.incoming.name,
        )
    }

    fn find_devices(&mut self) {
        if let Some(domid) = self.domid
            && let Err(error) = reconnecting::wait_for_devices(domid, FINDING_DEVICES)
        {
            log::warn!("{}", chain(&error));
        }
    }

    fn discard(&mut self) -> Result<()> {
        self.end_restore()?;
        let incoming = incoming_name(&self.incoming.name);
        if let Some(domid) = self.host.find_named(&self.incoming.uuid, &incoming)? {
            self.host.destroy(domid)?;
        }
        Ok(())
    }
}
