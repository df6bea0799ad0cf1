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

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError, bounded};
use xen_sys::DomId;
use xen_sys::ctl::VcpuContext;
use xen_sys::toolstack::{Aborter, DomainConfig, Toolstack};

mod devices;
mod feeding;
mod params;

use devices::{Attaching, DEVICES};
use feeding::{Feed, Shared, Work, locked};
use params::{check_params, rings};

use super::host::Host;
use super::pv::start_info_rings;
use super::stream::state::{GuestState, StaticData};
use super::verify;
use crate::configuration::balloon_target;
use crate::digest::Digester;
use crate::error::{Error, IoContext, Result, chain};
use crate::guest::{Destination, Kind};
use crate::handover::lock::XlLock;
use crate::handover::recovery::incoming_name;
use crate::image::Image;
use crate::pages::{PAGE_SIZE, PageSet, PageType};
use crate::pipe;
use crate::report::rounded;

/// How long libxl may take until the new domain is there.
const MAKING: Duration = Duration::from_secs(60);

/// How long libxl may take to end a restore whose stream was cut short.
const ENDING: Duration = Duration::from_secs(30);

/// How long to wait for libxl's own reason, where something else has shown that a restore failed.
const REASON: Duration = Duration::from_secs(10);

/// How long a guest that goes on is left alone to find its devices.
const FINDING_DEVICES: Duration = Duration::from_secs(1);

/// How long xl may hold its lock.
const XL_PATIENCE: Duration = Duration::from_secs(60);

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

/// One attempt at restoring.
struct Restore {
    shared: Arc<Shared>,
    feeder: thread::JoinHandle<()>,
    restorer: thread::JoinHandle<()>,
    ended: Receiver<std::result::Result<DomId, String>>,
    aborter: Aborter,
    /// Pages that the domain may have.
    limit: u64,
    /// Pages that the feeder was given.
    given: PageSet,
    /// What was given no longer fits: nothing more is, and a new restore has to follow.
    stale: bool,
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

    fn begin(&mut self, populated: u64) -> Result<()> {
        let image = self
            .image
            .clone()
            .ok_or_else(|| Error::Refused("Nothing to restore from".into()))?;
        let mut configuration = self.configuration(populated)?;
        let _lock = XlLock::wait(XL_PATIENCE)?;
        self.check_memory(&mut configuration)?;
        let bare = self
            .host
            .toolstack()
            .config_to_json(&configuration)
            .context(|| "Can't write the guest's configuration")?;
        let restore = self.spawn(image, configuration, populated)?;
        let shown = self.wait_for_domain(&restore);
        self.restore = Some(restore);
        let domid = shown?;
        self.domid = Some(domid);
        self.hold_memory(populated)?;
        match self.attaches_early() {
            true => self.attach_devices(domid, &bare),
            false => Ok(()),
        }
    }

    /// Whether there is memory for the guest now. Nothing is held.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is not.
    pub fn refuse_lack_of_memory(&self) -> Result<()> {
        let mut configuration = self.configuration(self.incoming.populated)?;
        self.check_memory(&mut configuration)
    }

    fn check_memory(&self, configuration: &mut DomainConfig) -> Result<()> {
        let needed = self
            .host
            .toolstack()
            .needed_memory(configuration)
            .context(|| "Can't tell how much memory the guest needs")?;
        let free = self
            .host
            .toolstack()
            .free_memory()
            .context(|| "Can't tell how much memory is free")?;
        // What other domains that are being built have claimed counts as free there.
        let claimed = self
            .host
            .ctl()
            .physical_info()
            .context(|| "Can't read about this host")?
            .outstanding_pages;
        let free = free.saturating_sub(claimed * (PAGE_SIZE as u64 / 1024));
        if needed > free {
            return Err(Error::Refused(format!(
                "Not enough free memory: {} MiB needed, {} MiB free",
                needed.div_ceil(1024),
                free / 1024
            )));
        }
        Ok(())
    }

    fn spawn(
        &self,
        image: Arc<Mutex<Image>>,
        mut configuration: DomainConfig,
        limit: u64,
    ) -> Result<Restore> {
        let (reader, writer) = std::io::pipe().context(|| "Can't make a pipe")?;
        pipe::widen(&writer);
        let shared = Arc::new(Shared::default());
        let given = match self.confirmed {
            true => locked(&image)?.pages_of(PageType::has_data),
            false => {
                let normal = |page_type| page_type == PageType::Normal;
                let known = locked(&image)?.pages_of(normal);
                // A shadow of a time when the guest had more: which of them it still has is known
                // after a round.
                match known.len() <= limit {
                    true => known,
                    false => PageSet::new(known.pages()),
                }
            }
        };
        // More than its domain may have: pages are here that the guest no longer has.
        let stale = given.len() > limit;
        {
            let mut work = locked(&shared.work)?;
            if !stale {
                work.pending = given.clone();
            }
            work.unframed = self.incoming.kind == Kind::Pv;
            work.frames = (!self.frames.is_empty()).then(|| self.frames.clone());
        }
        let (report, ended) = bounded(1);
        // A restore owns its context and its thread.
        let toolstack = Toolstack::open().context(|| "Can't open libxl")?;
        let aborter = toolstack.aborter();
        let restorer = thread::Builder::new()
            .name("restore".into())
            .spawn(move || {
                let result = toolstack
                    .restore(&mut configuration, reader.as_fd())
                    .map_err(|error| chain(&error));
                drop(reader);
                // Nobody listens any more where the move was given up.
                let _ = report.send(result);
            })
            .context(|| "Can't start a thread")?;
        let feeder = {
            let shared = Arc::clone(&shared);
            let feed = Feed {
                image,
                static_data: self
                    .static_data
                    .clone()
                    .ok_or_else(|| Error::Refused("The guest's CPU policy is missing".into()))?,
                max_pfn: self.incoming.pages.saturating_sub(1),
            };
            thread::Builder::new()
                .name("feeder".into())
                .spawn(move || {
                    if let Err(error) = feed.run(&shared, writer)
                        && let Ok(mut work) = shared.work.lock()
                    {
                        work.failed = Some(chain(&error));
                    }
                })
                .context(|| "Can't start a thread")?
        };
        Ok(Restore {
            shared,
            feeder,
            restorer,
            ended,
            aborter,
            limit,
            given,
            stale,
        })
    }

    fn wait_for_domain(&self, restore: &Restore) -> Result<DomId> {
        let start = Instant::now();
        loop {
            if let Some(domid) = self.host.find(&self.incoming.uuid)? {
                return Ok(domid);
            }
            if let Ok(result) = restore.ended.try_recv() {
                let reason = result.err().unwrap_or_else(|| "it ended at once".into());
                return Err(Error::Refused(format!("Can't make the domain: {reason}")));
            }
            if start.elapsed() > MAKING {
                return Err(Error::Refused("libxl doesn't make the domain".into()));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Claims the domain's memory: what is free now may be gone when it is needed.
    fn hold_memory(&self, populated: u64) -> Result<()> {
        let Some(domid) = self.domid else {
            return Ok(());
        };
        let start = Instant::now();
        loop {
            match self.host.ctl().claim_pages(domid, populated) {
                Ok(()) => return Ok(()),
                Err(error) if super::host::is_invalid(&error) && start.elapsed() < MAKING => {
                    // It has them all already, or libxl has not set its limit yet.
                    if self.host.info(domid)?.tot_pages >= populated {
                        return Ok(());
                    }
                    thread::sleep(Duration::from_millis(20));
                }
                Err(error) if error.is_out_of_memory() => {
                    return Err(Error::Refused("Not enough free memory".into()));
                }
                Err(error) => return Err(error).context(|| "Can't hold the guest's memory"),
            }
        }
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

    /// A new domain has all pages that its page tables have ever named. The guest must not have more
    /// than it had: it believes that it gave them away.
    fn refuse_surplus(&self, domid: DomId) -> Result<()> {
        let (there, here) = (self.host.info(domid)?.tot_pages, self.pages_here()?);
        match self.incoming.kind {
            Kind::Pv if there > here => Err(Error::Guest {
                what: format!(
                    "memory shrank on the way: {} pages too many; try again",
                    there - here
                ),
            }),
            _ => Ok(()),
        }
    }

    /// How many pages of the guest are in the image.
    fn pages_here(&self) -> Result<u64> {
        let image = self.image.as_ref().ok_or_else(no_restore)?;
        Ok(locked(image)?.pages_of(PageType::has_data).len())
    }

    fn restore(&self) -> Result<&Restore> {
        self.restore.as_ref().ok_or_else(no_restore)
    }

    fn work(&self) -> Result<MutexGuard<'_, Work>> {
        let restore = self.restore()?;
        let work = locked(&restore.shared.work)?;
        if let Some(reason) = &work.failed {
            // libxl knows better why than a broken pipe.
            let why = match restore.ended.recv_timeout(REASON) {
                Ok(Err(error)) => error,
                _ => reason.clone(),
            };
            return Err(Error::Refused(format!("The restore failed: {why}")));
        }
        Ok(work)
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

    /// Ends the restore that is under way; libxl destroys its domain.
    fn end_restore(&mut self) -> Result<()> {
        // First the devices: their scripts must not meet a domain that goes away under them.
        if let Err(error) = self.devices_attached() {
            log::info!("{}", chain(&error));
        }
        let Some(restore) = self.restore.take() else {
            return Ok(());
        };
        if let Ok(mut work) = restore.shared.work.lock() {
            work.stop = true;
        }
        restore.shared.wake.notify_all();
        // A stream that ends too early ends the restore by itself, if libxl is at the stream.
        if restore.ended.recv_timeout(ENDING) == Err(RecvTimeoutError::Timeout) {
            log::warn!("libxl goes on restoring; aborting it");
            if let Err(error) = restore.aborter.abort() {
                log::error!("{}", chain(&error));
            }
        }
        for thread in [restore.feeder, restore.restorer] {
            if thread.join().is_err() {
                log::error!("A thread of the restore failed");
            }
        }
        self.completing = None;
        if let Some(domid) = self.domid.take()
            && self.host.find(&self.incoming.uuid)? == Some(domid)
        {
            self.host.destroy(domid)?;
        }
        Ok(())
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
        if let Some(domid) = self.domid {
            self.host.wait_for_devices(domid, FINDING_DEVICES);
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
