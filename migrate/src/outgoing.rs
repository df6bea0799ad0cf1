//! Moving a guest away: everything around [`crate::source`].
//!
//! ```text
//! find the guest -> lock -> settle what an earlier move left -> check -> journal -> guardian
//!   -> ssh -> source::run -> guardian and ssh end
//! ```

mod reaching;
pub mod renewal;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use xen_sys::DomId;

use crate::connections::Connections;
use crate::control::{self, Ended, Server, Shared, Watched};
use crate::costs::{Costs, Past};
use crate::digest::{DigestKey, Digester};
use crate::directories::Directories;
use crate::error::{Error, IoContext, Result, chain};
use crate::group::{GroupPolicy, open_group_of};
use crate::guest::xen::checks::{Allowed, Layout, hindrances};
use crate::guest::xen::host::Host;
use crate::guest::{self, Source};
use crate::handover::guardian::Guardian;
use crate::handover::journal::{self, Begin, Journal, Outcome, Role};
use crate::handover::lock::GuestLock;
use crate::handover::recovery::{self, Settled};
use crate::keeper;
use crate::link::ssh::Remote;
use crate::link::{Conversation, Rate};
use crate::pages::PAGE_SIZE;
use crate::report::{Observer, Progress, Report, TrackerKind};
use crate::retry::{self, Attempts, Interruption};
use crate::shadow::{Named, ShadowPolicy, Shadows};
use crate::source::{Move, Plan, run, run_shadow};
use crate::whereabouts::{Left, Whereabouts};
use crate::wire::{
    CpuPolicy, MoveId, Offer, Purpose, Role as WireRole, Text, TscOffer, XenVersion,
};
use reaching::Reached;

/// How long whoever settles an earlier move of the guest may hold its lock.
const LOCKED: Duration = Duration::from_secs(5);

/// So many attempts may lose a link by which pages went directly. The next ones go by ssh: something
/// on the way may end what it doesn't know once it has let it begin.
const DIRECT_ATTEMPTS: u32 = 2;

/// How often a pause looks whether it was cancelled.
const TICK: Duration = Duration::from_millis(100);

/// What the operator asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// The guest: name or domain id.
    pub domain: String,
    /// The other site.
    pub remote: Remote,
    /// When to suspend, and how to prove.
    pub plan: Plan,
    /// What would else hinder the move.
    pub allowed: Allowed,
    /// A tracker to use whatever the hypervisor can.
    pub tracker: Option<TrackerKind>,
    /// At most this many bytes a second.
    pub rate: Option<u64>,
    /// How long a move whose link was lost is tried again without a step forward.
    pub retry: Duration,
    /// Whether the guest is to run there, or only its pages are to be kept.
    pub purpose: Purpose,
    /// What this site keeps of a guest that leaves.
    pub shadows: ShadowPolicy,
    /// Which guests may be built from what others left at the destination.
    pub groups: Vec<GroupPolicy>,
    /// Whether pages may go by connections that don't go through ssh.
    pub direct: bool,
}

/// The outcome of a move: the report, as far as it came, and how it ended.
pub struct Moved {
    /// None where the move was refused before anything was sent.
    pub report: Option<Report>,
    /// How it ended.
    pub result: Result<()>,
    /// Where the move failed: what was seen of the guest here when all was over. None where it was
    /// not even found.
    pub left: Option<Left>,
}

impl Moved {
    fn whereabouts(&self, purpose: Purpose) -> Whereabouts {
        Whereabouts::after(&self.result, purpose, self.left)
    }
}

/// Moves a guest, or sends a shadow of it. Once `cancel` is set it gives up, unless the guest is
/// committed. Where the link is lost before that, it is tried again, with what has arrived. `follow`
/// hears of earlier moves that were settled for it.
pub fn migrate(
    directories: &Directories,
    request: &Request,
    observer: &mut dyn Observer,
    connections: &mut dyn Connections,
    follow: &mut dyn FnMut(&Settled),
    cancel: &Arc<AtomicBool>,
) -> Moved {
    let mut mover = Mover {
        directories,
        observer,
        connections,
        follow,
        cancel,
        began: Instant::now(),
        uuid: None,
        server: None,
        lost_directly: 0,
    };
    let moved = mover.run(request);
    if let Some(server) = mover.server {
        let name = server.shared().facts().domain;
        server.end(ended(&name, request, &moved));
    }
    moved
}

/// What the attempts of one move have in common.
struct Mover<'a> {
    directories: &'a Directories,
    observer: &'a mut dyn Observer,
    connections: &'a mut dyn Connections,
    follow: &'a mut dyn FnMut(&Settled),
    cancel: &'a Arc<AtomicBool>,
    /// When the first of them began.
    began: Instant,
    /// The guest's UUID, as soon as it is known: later attempts are of the same one.
    uuid: Option<String>,
    /// Where the move is watched and steered, also between attempts.
    server: Option<Server>,
    /// Attempts whose link was lost while pages went directly.
    lost_directly: u32,
}

/// How an attempt is watched and steered: as the one before, by its `server` and with its limits.
fn watched(
    server: &mut Option<Server>,
    directories: &Directories,
    facts: control::Facts,
    request: &Request,
    cancel: &Arc<AtomicBool>,
) -> Result<Shared> {
    if let Some(server) = server {
        server.shared().go_on(facts);
        return Ok(server.shared().clone());
    }
    let rate = Rate::new(request.rate);
    let downtime = request.plan.limits.downtime;
    let shared = Shared::new(facts, rate, downtime, Arc::clone(cancel));
    *server = Some(Server::start(directories, shared.clone())?);
    Ok(shared)
}

impl Mover<'_> {
    fn run(&mut self, request: &Request) -> Moved {
        let mut moved = self.attempts(request);
        let guest = moved.whereabouts(request.purpose);
        if let Some(report) = &mut moved.report {
            report.guest = guest;
        }
        moved
    }

    fn attempts(&mut self, request: &Request) -> Moved {
        let (started, timeout) = (self.began, request.plan.timeout);
        let mut attempts = Attempts::default();
        let mut interruptions: Vec<Interruption> = Vec::new();
        // What the newest attempt that came so far has found out.
        let mut newest = None;
        loop {
            let mut moved = self.attempt(request);
            let pause = moved.result.as_ref().err().and_then(|error| {
                let ended = retry::Ended {
                    error,
                    recalled: moved
                        .report
                        .as_ref()
                        .filter(|report| report.tracker.is_some())
                        .map(|report| report.recalled),
                    runs_here: moved.left == Some(Left::Running),
                };
                attempts.pause(ended, started.elapsed(), timeout, request.retry)
            });
            let (Some(pause), Err(error)) = (pause, &moved.result) else {
                return sum_up(moved, newest, interruptions, started.elapsed());
            };
            if let Some(server) = &self.server {
                server.shared().pause("waiting for the link");
            }
            if moved
                .report
                .as_ref()
                .is_some_and(|report| report.link.direct)
            {
                self.lost_directly += 1;
            }
            self.observer.notice(Progress::Warning(format!(
                "{}. The guest runs here; trying again in {} s",
                chain(error),
                pause.as_secs()
            )));
            interruptions.push(Interruption {
                reason: chain(error),
                at: started.elapsed(),
                wire_bytes: moved.report.as_ref().map_or(0, |report| report.wire_bytes),
            });
            newest = moved.report.take().or(newest);
            let until = Instant::now() + pause;
            while Instant::now() < until && !self.cancel.load(Ordering::Relaxed) {
                thread::sleep(TICK);
            }
            if self.cancel.load(Ordering::Relaxed) {
                moved.result = Err(Error::Cancelled);
                // It ran before the pause.
                if let Some(report) = &newest {
                    moved.left = Some(Left::look_again(&report.uuid));
                }
                return sum_up(moved, newest, interruptions, started.elapsed());
            }
        }
    }

    /// One attempt.
    fn attempt(&mut self, request: &Request) -> Moved {
        match self.prepare_and_move(request) {
            Ok(moved) => moved,
            Err(error) => Moved {
                report: None,
                left: match error {
                    // It is in another worker's hands, who will tell.
                    Error::Busy(_) => None,
                    _ => self.uuid.as_deref().map(Left::look_again),
                },
                result: Err(error),
            },
        }
    }

    fn prepare_and_move(&mut self, request: &Request) -> Result<Moved> {
        let directories = self.directories;
        directories.create()?;
        recovery::settle_all(directories, self.follow);
        let host = Host::open()?;
        let domid = match &self.uuid {
            // Another guest may have its name or number by now.
            Some(uuid) => host.find(uuid)?.ok_or_else(|| {
                Error::Refused(format!("{} is gone from this host", request.domain))
            })?,
            None => find_domain(&host, &request.domain)?,
        };
        let name = host.name(domid)?;
        let uuid = host.uuid_text(&host.info(domid)?);
        self.uuid = Some(uuid.clone());
        let (lock, layout) = claim(directories, &host, domid, &uuid, &name, request.allowed)?;
        let shadows = Shadows::new(directories, request.shadows.clone());
        // A shadow is one pass: there is nothing to log meanwhile.
        let tracker = match request.purpose {
            Purpose::Move | Purpose::DryRun => request.tracker,
            Purpose::Shadow => Some(TrackerKind::Scan),
        };
        // One that has moved before keeps its own: what a site has of it stays comparable.
        let key = shadows.key_for(&uuid)?;
        let mut guest = guest::xen::open(&host, domid, &key, tracker, request.plan.cores())?;
        let named = Named {
            uuid: &uuid,
            name: &name,
            peer: &request.remote.host,
        };
        if let Err(error) = shadows.keep_key(named, &key) {
            log::warn!(
                "What arrives of a move that breaks can't be used again: {}",
                chain(&error)
            );
        }
        let move_id = MoveId::from_random(random()?);
        let digester = Digester::new(&key);
        let offer = offer(&host, &mut *guest, domid, &layout, key, move_id, request)?;
        let mut journal = Journal::create(
            directories,
            Begin {
                domid: Some(domid.get()),
                remote: request.remote.command.clone(),
                directory: request.remote.directory.clone(),
                ..Begin::new(
                    Role::Source,
                    &move_id.to_string(),
                    &name,
                    &uuid,
                    &request.remote.host,
                )?
            },
        )?;
        let journal_path = journal.entry().path.clone();
        let guest_bytes = guest.populated() * PAGE_SIZE as u64;
        let mut costs = Costs::read(directories);
        let facts = control::Facts {
            role: Role::Source,
            move_id: move_id.to_string(),
            domain: name.clone(),
            uuid: uuid.clone(),
            domid: Some(domid.get()),
            peer: request.remote.host.clone(),
            guest_bytes,
        };
        let begun = watched(&mut self.server, directories, facts, request, self.cancel).and_then(
            |control| {
                let guardian = Guardian::start(directories, &journal.entry().path, &name)?;
                Ok((control, guardian, request.remote.connect()?))
            },
        );
        let (control, guardian, (link, session)) = match begun {
            Ok(begun) => begun,
            Err(error) => {
                // Nothing was touched.
                journal.end_and_remove(Outcome::Aborted)?;
                return Err(error);
            }
        };
        let rate = control.rate();
        let peer = Conversation::start_with(
            &request.remote.host,
            link,
            WireRole::Source,
            rate,
            Arc::clone(self.cancel),
            request.plan.queue(),
        );
        let mut observer = Watched {
            observer: self.observer,
            shared: control.clone(),
        };
        let warn = |why| observer.notice(Progress::Warning(why));
        let group = open_group_of(&request.groups, &name, warn);
        let mut unchanged = || {
            layout.unchanged(&host, domid)?;
            layout.flush_disks()
        };
        let mut keep = || keeper::start(directories, &name, &uuid);
        let run = match request.purpose {
            Purpose::Move | Purpose::DryRun => run,
            Purpose::Shadow => run_shadow,
        };
        let mut reached = {
            let direct = request.direct && self.lost_directly < DIRECT_ATTEMPTS;
            Reached::new(&request.remote, move_id, session, direct)
        };
        let (report, result) = run(
            Move {
                guest: &mut *guest,
                digester,
                journal,
                peer,
                observer: &mut observer,
                connections: self.connections,
                plan: request.plan.clone(),
                began: self.began,
                control: control.clone(),
                shadows: &shadows,
                group,
                earlier: costs.earlier(
                    &uuid,
                    &request.remote.host,
                    guest_bytes,
                    if shadows.keep() { guest_bytes } else { 0 },
                ),
                reach: &mut reached,
                unchanged: &mut unchanged,
                keep: &mut keep,
                ask: &mut recovery::ask,
            },
            offer,
        );
        // The others have nothing more to say.
        let mut session = reached.into_first();
        // What ssh says of its end tells more than that the connection was closed.
        let result = result.map_err(|error| match error {
            Error::LinkLost { peer, reason } => Error::LinkLost {
                peer,
                reason: session.reason(reason),
            },
            other => other,
        });
        // Whatever is still mapped keeps the old domain from going away.
        drop(guest);
        // The guardian settles what is left, and needs the lock for it. What may take it long stays its
        // affair, when we have ended: what is in doubt, a guest that could not be made to go on, an old
        // domain that could not be destroyed.
        drop(lock);
        let unsettled = || journal::read(&journal_path).is_ok_and(|entry| entry.outcome.is_none());
        match &result {
            Err(Error::InDoubt { .. } | Error::Unsettled(_)) => guardian.leave(),
            Ok(()) if unsettled() => guardian.leave(),
            _ => guardian.finish(),
        }
        session.finish(Duration::from_secs(10));
        if result.is_ok()
        && request.purpose == Purpose::Move
        // It says nothing of moves without.
        && !request.plan.verify
        && let Err(error) = costs.note(Past::of(&report))
        {
            log::warn!("{}", chain(&error));
        }
        let left = result.as_ref().err().map(|_| Left::look(&host, &uuid));
        Ok(Moved {
            report: Some(report),
            result,
            left,
        })
    }
}

/// How a move ended, in one report of all its attempts: what the last one has found out, else the
/// `newest` before it.
fn sum_up(
    mut moved: Moved,
    newest: Option<Report>,
    interruptions: Vec<Interruption>,
    took: Duration,
) -> Moved {
    if moved.report.is_none() {
        // What it has sent is among the interruptions.
        moved.report = newest.map(|report| Report {
            wire_bytes: 0,
            ..report
        });
    }
    let Some(report) = &mut moved.report else {
        return moved;
    };
    if !interruptions.is_empty() {
        report.took = took;
    }
    if let Err(error) = &moved.result {
        report.outcome = Report::failed(error);
    }
    report.wire_bytes += interruptions.iter().map(|one| one.wire_bytes).sum::<u64>();
    report.interruptions = interruptions;
    moved
}

/// The domain of a name, a number or a UUID.
///
/// # Errors
/// [`Error::Refused`] where there is none.
pub fn find_domain(host: &Host, domain: &str) -> Result<DomId> {
    let none = || Error::Refused(format!("There is no domain {domain:?} here"));
    let domid = match domain.parse::<DomId>() {
        Ok(domid) => domid,
        Err(_) => host
            .toolstack()
            .domain_by_name(domain)
            .context(|| "Can't look the domain up")?
            .map_or_else(
                || host.find(&domain.to_ascii_lowercase()),
                |it| Ok(Some(it)),
            )?
            .ok_or_else(none)?,
    };
    match host
        .ctl()
        .domain_info(domid)
        .context(|| "Can't read about the domain")?
    {
        Some(info) if !info.dying => Ok(domid),
        _ => Err(none()),
    }
}

/// Takes hold of a guest that may be moved, and reads what it is made of.
///
/// # Errors
/// [`Error::Busy`] where another worker has it; [`Error::Refused`] where a move of it is open, or
/// something of it can't be moved.
pub(crate) fn claim(
    directories: &Directories,
    host: &Host,
    domid: DomId,
    uuid: &str,
    name: &str,
    allowed: Allowed,
) -> Result<(GuestLock, Layout)> {
    let lock = GuestLock::wait(directories, uuid, name, LOCKED)?;
    recovery::refuse_open_moves(directories, uuid, name)?;
    let hindrances = hindrances(host, domid, allowed)?;
    if !hindrances.is_empty() {
        return Err(Error::Refused(format!(
            "{name} can't be moved: {}",
            hindrances.join("; ")
        )));
    }
    Ok((lock, Layout::read(host, domid)?))
}

/// What those hear who wait for the end of a move.
fn ended(name: &str, request: &Request, moved: &Moved) -> Ended {
    let (peer, result) = (&request.remote.host, &moved.result);
    let what = match (result, moved.left) {
        (Ok(()), _) if request.purpose == Purpose::Shadow => {
            format!("{peer} has a shadow of {name}, which was not moved")
        }
        (Ok(()), _) => format!("{name} has moved to {peer}"),
        (Err(Error::InDoubt { .. }), _) => {
            format!("{name} is suspended here and may run at {peer}: only {peer} knows")
        }
        (Err(error), Some(left)) => format!("{name} was not moved and {left}: {}", chain(error)),
        (Err(error), None) => format!("{name} was not moved: {}", chain(error)),
    };
    let guest = moved.whereabouts(request.purpose);
    Ended::of(result, request.purpose, guest, what)
}

pub(crate) fn offer(
    host: &Host,
    guest: &mut dyn Source,
    domid: DomId,
    layout: &Layout,
    key: DigestKey,
    move_id: MoveId,
    request: &Request,
) -> Result<Offer> {
    let data = guest.static_data()?;
    let facts = guest.facts();
    let version = host
        .ctl()
        .version()
        .context(|| "Can't read Xen's version")?;
    let tsc = host
        .ctl()
        .tsc_info(domid)
        .context(|| "Can't read the guest's TSC")?;
    Ok(Offer {
        move_id,
        name: facts.name.clone(),
        uuid: facts.uuid.clone(),
        kind: facts.kind.into(),
        pages: facts.pages,
        populated_pages: guest.populated(),
        vcpus: facts.vcpus,
        configuration: layout.document(),
        cpu_policy: CpuPolicy {
            leaves: data.cpuid_policy,
            msrs: data.msr_policy,
        },
        tsc: TscOffer {
            mode: tsc.mode,
            khz: tsc.khz,
        },
        xen: XenVersion {
            major: version.major,
            minor: version.minor,
            extra: Text::new(&version.extra),
        },
        digest_key: key,
        verify: request.plan.verify,
        purpose: request.purpose,
        // They depend on the link, which is not known yet.
        connections: 0,
        direct: None,
    })
}

/// Random bytes of the kernel's.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    use std::io::Read;
    let mut bytes = [0; N];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context(|| "Can't read random numbers")?;
    Ok(bytes)
}
