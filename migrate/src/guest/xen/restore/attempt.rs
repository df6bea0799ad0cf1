//! One attempt at restoring: libxl in a thread, what feeds it in another, and the domain that comes
//! of it.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use xen_sys::DomId;
use xen_sys::toolstack::{Aborter, DomainConfig, Toolstack};

use super::feeding::{Feed, Shared, Work, locked};
use super::{XenDestination, no_restore};
use crate::error::{Error, IoContext, Result, chain};
use crate::guest::Kind;
use crate::handover::lock::XlLock;
use crate::image::Image;
use crate::pages::{PageSet, PageType};
use crate::pipe;

/// How long libxl may take until the new domain is there.
pub(super) const MAKING: Duration = Duration::from_secs(60);

/// How long libxl may take to end a restore whose stream was cut short.
const ENDING: Duration = Duration::from_secs(30);

/// How long to wait for libxl's own reason, where something else has shown that a restore failed.
pub(super) const REASON: Duration = Duration::from_secs(10);

/// How long xl may hold its lock.
const XL_PATIENCE: Duration = Duration::from_secs(60);

/// One attempt at restoring.
pub(super) struct Restore {
    pub(super) shared: Arc<Shared>,
    feeder: thread::JoinHandle<()>,
    restorer: thread::JoinHandle<()>,
    pub(super) ended: Receiver<std::result::Result<DomId, String>>,
    aborter: Aborter,
    /// Pages that the domain may have.
    pub(super) limit: u64,
    /// Pages that the feeder was given.
    pub(super) given: PageSet,
    /// What was given no longer fits: nothing more is, and a new restore has to follow.
    pub(super) stale: bool,
}

impl XenDestination {
    /// Begins one, of a guest that has so many pages.
    pub(super) fn begin(&mut self, populated: u64) -> Result<()> {
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

    pub(super) fn restore(&self) -> Result<&Restore> {
        self.restore.as_ref().ok_or_else(no_restore)
    }

    pub(super) fn work(&self) -> Result<MutexGuard<'_, Work>> {
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

    /// Ends the restore that is under way; libxl destroys its domain.
    pub(super) fn end_restore(&mut self) -> Result<()> {
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
