//! Obeys `on_reboot`, `on_poweroff`, `on_crash` and `on_watchdog` for a guest whose `xl` monitor
//! is gone.
//!
//! The `xl` process that created a domain ends when it sees it suspend. After an arrival, and
//! after a move that failed once the guest was suspended, a keeper takes its place: one process a
//! guest, found by the guest's UUID through reboots.
//!
//! ```text
//! wait -> suspended                 wait again: somebody moves it
//!      -> gone                      end
//!      -> poweroff, reboot, crash   destroy, restart or preserve, as the configuration says
//! ```

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use xen_sys::DomId;
use xen_sys::ctl::ShutdownReason;
use xen_sys::toolstack::{Action, DomainConfig, LifeEvent, LifeWatch, Toolstack};

use crate::directories::Directories;
use crate::error::{Error, IoContext, Result, chain};
use crate::guest::xen::host::Host;
use crate::handover::guardian::{log_file, name_process};
use crate::handover::journal::{self, Entry};
use crate::handover::lock::XlLock;

/// The name that `ps` shows.
pub const PROCESS_NAME: &str = "vmshadow-keeper";

/// How often a suspended guest is looked at: it goes on, or goes away, when its move ends.
const SUSPENDED_TICK: Duration = Duration::from_millis(200);

/// How long xl may hold its lock: it waits for memory.
const XL_PATIENCE: Duration = Duration::from_secs(120);

/// Starts the keeper of a guest; one that is there already stays the only one.
///
/// # Errors
/// [`crate::Error::Io`].
pub fn start(directories: &Directories, name: &str, uuid: &str) -> Result<()> {
    use std::os::unix::process::CommandExt;
    // A keeper without a log is better than none.
    let log = log_file(directories, name).map_or_else(
        |error| {
            log::warn!("{}", chain(&error));
            Stdio::null()
        },
        Stdio::from,
    );
    Command::new("/proc/self/exe")
        .arg0(PROCESS_NAME)
        .arg("keeper")
        .arg(uuid)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .current_dir("/")
        .process_group(0)
        .spawn()
        .context(|| "Can't start the keeper")?;
    Ok(())
}

/// The keeper itself: `vmshadow keeper UUID`. Returns when the guest is gone for good.
///
/// # Errors
/// What Xen refuses.
pub fn run(directories: &Directories, uuid: &str) -> Result<()> {
    name_process(PROCESS_NAME);
    let Some(_lock) = only_one(directories, uuid)? else {
        log::info!("There is a keeper already");
        return Ok(());
    };
    let host = Host::open()?;
    let Some(mut domid) = host.find(uuid)? else {
        log::info!("The guest is gone");
        return Ok(());
    };
    log::info!("Keeping {} (domain {domid})", host.name(domid)?);
    while let Some(next) = keep(&host, directories, uuid, domid)? {
        domid = next;
    }
    log::info!("The guest needs no keeper any more");
    Ok(())
}

/// Watches one domain until it is gone, and obeys. The domain that took its place, if one did.
fn keep(host: &Host, directories: &Directories, uuid: &str, domid: DomId) -> Result<Option<DomId>> {
    let doing = || "Can't watch the guest";
    // A watch owns its context.
    let toolstack = Toolstack::open().context(doing)?;
    let mut watch = LifeWatch::new(toolstack, domid).context(doing)?;
    loop {
        match watch.wait(None).context(doing)? {
            None => {}
            Some(LifeEvent::Death) => return Ok(None),
            Some(LifeEvent::Shutdown(ShutdownReason::Suspend)) => {
                if !wait_out_suspend(host, domid)? {
                    return Ok(None);
                }
                watch.rearm().context(doing)?;
            }
            Some(LifeEvent::Shutdown(reason)) => {
                if let Some(percent) = own_cap(directories, uuid)
                    && let Err(error) = host.set_cpu_cap(domid, percent)
                {
                    log::error!("{}", chain(&error));
                }
                return obey(host, domid, reason);
            }
        }
    }
}

/// The processor time that the guest has by itself, where a move has slowed it down: what it is
/// started anew with is read from the domain that has stopped.
fn own_cap(directories: &Directories, uuid: &str) -> Option<u32> {
    let journals = journal::list(directories)
        .inspect_err(|error| log::warn!("{}", chain(error)))
        .ok()?;
    let slowed = |entry: &Entry| entry.begin.uuid == uuid && entry.outcome.is_none();
    journals
        .entries
        .iter()
        .find(|entry| slowed(entry))
        .and_then(|entry| entry.cap)
}

/// Waits until a suspended domain goes on (true) or is gone (false).
fn wait_out_suspend(host: &Host, domid: DomId) -> Result<bool> {
    loop {
        match host
            .ctl()
            .domain_info(domid)
            .context(|| "Can't watch the guest")?
        {
            None => return Ok(false),
            Some(info) if info.dying => return Ok(false),
            Some(info) if !info.is_suspended() => return Ok(true),
            Some(_) => thread::sleep(SUSPENDED_TICK),
        }
    }
}

/// Does what the guest's configuration asks for. The domain to keep from now on, if there is one.
fn obey(host: &Host, domid: DomId, reason: ShutdownReason) -> Result<Option<DomId>> {
    let toolstack = host.toolstack();
    let name = host.name(domid)?;
    let mut configuration = toolstack
        .configuration(domid)
        .context(|| "Can't read the guest's configuration")?;
    let action = configuration.action_on(reason).unwrap_or(Action::Destroy);
    log::info!("{name} stopped ({reason}): {action:?}");
    if matches!(action, Action::CoredumpDestroy | Action::CoredumpRestart) {
        let path = format!("/var/lib/xen/dump/{name}");
        // xl goes on as well: the guest is more than its core.
        if let Err(error) = toolstack.core_dump(domid, &path) {
            log::error!("Can't write {path}: {}", chain(&error));
        }
    }
    match action {
        Action::Preserve => Ok(None),
        Action::Destroy | Action::CoredumpDestroy => {
            host.destroy(domid)?;
            Ok(None)
        }
        Action::Restart | Action::CoredumpRestart => {
            // A page that somebody still has mapped keeps the old domain; the guest comes up all the
            // same.
            if let Err(error) = host.destroy(domid) {
                log::error!("{}", chain(&error));
            }
            start_again(toolstack, &mut configuration).map(Some)
        }
        Action::RestartRename => {
            let suffix = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs();
            toolstack
                .preserve(
                    domid,
                    &mut configuration,
                    &format!("-{suffix}"),
                    crate::outgoing::random()?,
                )
                .context(|| "Can't keep the old domain")?;
            start_again(toolstack, &mut configuration).map(Some)
        }
        // libxl does this by a way of its own, which needs the domain's console as xl holds it.
        Action::SoftReset => Err(Error::Refused(format!(
            "{name} asks for a soft reset, which only xl can do"
        ))),
    }
}

fn start_again(toolstack: &Toolstack, configuration: &mut DomainConfig) -> Result<DomId> {
    let doing = || "Can't start the guest again";
    // As xl does: two creations must not count on the same free memory.
    let _lock = loop {
        match XlLock::wait(XL_PATIENCE) {
            // As while xl receives a guest. The one that is kept here must not stay down for it.
            Err(Error::Busy(why)) => log::warn!("{why}; waiting"),
            other => break other?,
        }
    };
    let domid = toolstack.create(configuration).context(doing)?;
    toolstack.unpause(domid).context(doing)?;
    log::info!("Started again as domain {domid}");
    Ok(domid)
}

fn only_one(directories: &Directories, uuid: &str) -> Result<Option<File>> {
    let path = directories.runtime.join(format!("{uuid}.keeper"));
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .context(|| format!("Can't open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => {
            Err(error).context(|| format!("Can't lock {}", path.display()))
        }
    }
}
