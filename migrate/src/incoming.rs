//! Taking a guest in: everything around [`crate::destination`].
//!
//! `vmshadow receive`, started by ssh from the other site: its standard input and output are the
//! link. Of what the other site says of the guest only listed fields are taken.
//!
//! ```text
//! hello <-> hello -> offer -> settle what earlier moves left -> checks -> accept or refuse
//! ```
//!
//! All that may take its time comes after the hello: from then on signs of life go out.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde_json::Value;
use xen_sys::ctl::{CpuPolicy, GuestKind as CpuKind};

use crate::configuration::{SitePolicy, accept};
use crate::connections::{Arranged, Expect, Expected, Foresee};
use crate::control::{self, Ended, Server, Shared, Status};
use crate::destination::{Prepared, Sharing, Willing, run};
use crate::digest::Digester;
use crate::directories::Directories;
use crate::error::{Error, IoContext, Result, chain};
use crate::group::{GroupPolicy, group_of};
use crate::guest::Destination;
use crate::guest::Kind;
use crate::guest::shelf::Shelf;
use crate::guest::xen::host::Host;
use crate::guest::xen::restore::{Incoming, XenDestination};
use crate::handover::guardian::Guardian;
use crate::handover::journal::{Begin, Journal, Role};
use crate::handover::lock::GuestLock;
use crate::handover::recovery::{self, Settled, incoming_name};
use crate::keeper;
use crate::link::direct::{DirectPolicy, Ends};
use crate::link::door::{self, Door};
use crate::link::{Conversation, Expecting, Link, Rate};
use crate::outgoing::random;
use crate::pages::PAGE_SIZE;
use crate::pipe;
use crate::shadow::{ShadowPolicy, Shadows};
use crate::whereabouts::Whereabouts;
use crate::wire::{JoinToken, MoveId, Offer, Purpose, Role as WireRole, Text, XenVersion};

/// How long whoever settles an earlier move of the guest may hold its lock.
const LOCKED: Duration = Duration::from_secs(5);

/// What this site has to say about guests that come.
#[derive(Debug, Clone, Default)]
pub struct Policies {
    /// What it takes of their configuration.
    pub site: SitePolicy,
    /// What it keeps of them when they leave again.
    pub shadows: ShadowPolicy,
    /// Which of them may be built from what others left here.
    pub groups: Vec<GroupPolicy>,
    /// Whether their pages may come by connections that don't go through ssh.
    pub direct: DirectPolicy,
}

/// Receives one guest over standard input and output. `expect` is called once it is accepted,
/// `foresee` where it is only asked whether it would be, `follow` for each earlier move that is
/// settled before. Where there are no policies that can be read, the source is told why.
///
/// # Errors
/// Whatever failed; the source was told, and nothing of the guest is left here. Where this is no
/// host that can receive, [`Error::Refused`] says what is missing.
pub fn receive(
    directories: &Directories,
    policies: std::result::Result<&Policies, String>,
    expect: &mut Expect<'_>,
    foresee: &mut Foresee<'_>,
    follow: &mut dyn FnMut(&Settled),
    cancel: Arc<AtomicBool>,
) -> Result<()> {
    directories.create()?;
    // Quick, and told in words: whoever looks at this end alone should see it too.
    let ready = policies.and_then(|policies| match xen_sys::host::probe().missing {
        Some(missing) => Err(chain(&missing)),
        None => Ok(policies),
    });
    let peer = sshd_says(0).unwrap_or_else(|| "the source".into());
    pipe::widen(io::stdin());
    let link = Link::new(io::stdin(), io::stdout());
    let rate = Rate::default();
    let stop = Arc::clone(&cancel);
    let conversation =
        Conversation::start(&peer, link, WireRole::Destination, rate.clone(), cancel);
    let mut server = None;
    let mut purpose = Purpose::Move;
    let mut take = |offer: &Offer| match &ready {
        Err(missing) => Err(Error::Refused(missing.clone())),
        Ok(policies) => {
            purpose = offer.purpose;
            // An earlier attempt for the same guest may be among it.
            recovery::settle_all(directories, follow);
            let control = control(&peer, offer, rate.clone(), Arc::clone(&stop));
            prepare(
                directories,
                policies,
                expect,
                &peer,
                offer,
                control,
                &mut server,
            )
        }
    };
    let mut judge = |offer: &Offer| match &ready {
        Err(missing) => Err(Error::Refused(missing.clone())),
        Ok(policies) => would_take(directories, policies, foresee, offer),
    };
    let result = run(conversation, &mut take, &mut judge);
    if let Some(server) = server {
        let status = server.shared().status();
        server.end(ended(&status, &peer, purpose, &result));
    }
    match (result, ready) {
        (Err(_), Err(missing)) => Err(Error::Refused(missing)),
        (result, _) => result,
    }
}

/// A part of what sshd says of the connection that it started this process for: the address that it
/// came from, its port, the address that it came to, its port.
fn sshd_says(part: usize) -> Option<String> {
    let text = std::env::var("SSH_CONNECTION").ok()?;
    text.split_whitespace().nth(part).map(str::to_owned)
}

/// Passes standard input and output on to the worker that receives `move_id` here: one more
/// connection of that move.
///
/// # Errors
/// Where there is none.
pub fn join(directories: &Directories, move_id: &str) -> Result<()> {
    let move_id: MoveId = move_id
        .parse()
        .map_err(|error| Error::Refused(chain(&error)))?;
    let own = |stream: BorrowedFd<'_>| {
        let stream = stream.try_clone_to_owned();
        stream
            .map(File::from)
            .context(|| "Can't take over a standard stream")
    };
    pipe::widen(io::stdin());
    // Without buffers of ours between them and the worker.
    let (input, output) = (own(io::stdin().as_fd())?, own(io::stdout().as_fd())?);
    door::join(directories, move_id, input, output)
}

/// How a guest's arrival is watched, and given up.
fn control(peer: &str, offer: &Offer, rate: Rate, cancel: Arc<AtomicBool>) -> Shared {
    Shared::new(
        control::Facts {
            role: Role::Destination,
            move_id: offer.move_id.to_string(),
            domain: offer.name.clone(),
            uuid: offer.uuid.clone(),
            domid: None,
            peer: peer.to_owned(),
            guest_bytes: offer.populated_pages * PAGE_SIZE as u64,
        },
        rate,
        Duration::ZERO,
        cancel,
    )
}

/// What those hear who wait for the end of a move. Whoever fails after the commit may own the guest.
fn ended(status: &Status, peer: &str, purpose: Purpose, result: &Result<()>) -> Ended {
    let name = &status.domain;
    let (guest, what) = match result {
        Ok(()) if purpose == Purpose::Shadow => {
            (Whereabouts::Source, format!("A shadow of {name} is here"))
        }
        Ok(()) => (Whereabouts::Destination, format!("{name} runs here")),
        Err(error) if status.committed => (
            Whereabouts::Unknown,
            format!(
                "{name} may be here; run: vmshadow resolve {name}: {}",
                chain(error)
            ),
        ),
        Err(error) => (
            Whereabouts::Source,
            format!("{name} did not come, and {peer} has it: {}", chain(error)),
        ),
    };
    Ended::of(result, purpose, guest, what)
}

fn prepare(
    directories: &Directories,
    policies: &Policies,
    expect: &mut Expect<'_>,
    peer: &str,
    offer: &Offer,
    control: Shared,
    server: &mut Option<Server>,
) -> Result<Prepared> {
    let lock = GuestLock::wait(directories, &offer.uuid, &offer.name, LOCKED)?;
    let Judged {
        configuration,
        guest,
        ranges,
        shadows,
        xen,
        mut warnings,
    } = judge(directories, policies, offer)?;
    let memory = directories
        .incoming()
        .join(format!("{}.memory", offer.move_id));
    let journal = Journal::create(
        directories,
        Begin {
            memory: Some(memory.clone()),
            ..Begin::new(
                Role::Destination,
                &offer.move_id.to_string(),
                &offer.name,
                &offer.uuid,
                peer,
            )?
        },
    )?;
    let guardian = Guardian::start(directories, &journal.entry().path, &offer.name)?;
    *server = Some(Server::start(directories, control.clone())?);
    let (guest, arranged): (Box<dyn Destination>, _) = match guest {
        // What comes to be a shadow pushes none away.
        None => (Box::new(Shelf), Arranged::default()),
        Some(guest) => {
            let arranged = expect(Expected {
                name: &offer.name,
                uuid: &offer.uuid,
                configuration: &configuration,
            })?;
            if let Err(error) = shadows.make_room_for_guest(
                &offer.uuid,
                &offer.digest_key,
                &ranges,
                &directories.incoming(),
            ) {
                log::warn!("{}", chain(&error));
            }
            (Box::new(guest), arranged)
        }
    };
    let (image, shadow) = shadows.image(
        &offer.uuid,
        offer.pages,
        &offer.digest_key,
        &ranges,
        &memory,
    )?;
    let sharing = sharing(policies, &shadows, offer, &mut warnings);
    let (door, expecting) = match offer.connections {
        0 => (None, None),
        _ => match door(directories, &policies.direct, offer, &mut warnings) {
            Ok((door, expecting)) => (Some(door), Some(expecting)),
            // All of it goes by one connection then.
            Err(error) => {
                log::warn!("{}", chain(&error));
                (None, None)
            }
        },
    };
    let (directories, name, uuid) = (directories.clone(), offer.name.clone(), offer.uuid.clone());
    Ok(Prepared {
        guest,
        journal,
        image,
        shadow,
        shadows,
        digester: Digester::new(&offer.digest_key),
        xen,
        warnings,
        arranged,
        keep: Box::new(move || keeper::start(&directories, &name, &uuid)),
        ended: Box::new(move || {
            drop(door);
            drop(lock);
            // It finds the end in the journal, or what is left to do.
            guardian.finish();
        }),
        control,
        sharing,
        expecting,
    })
}

/// What of other guests can be shared with the one that is offered.
fn sharing(
    policies: &Policies,
    shadows: &Shadows,
    offer: &Offer,
    warnings: &mut Vec<String>,
) -> Option<Sharing> {
    group_of(&policies.groups, &offer.name)?
        .open()
        .and_then(|group| Sharing::with(shadows, group, &offer.uuid))
        .unwrap_or_else(|error| {
            warnings.push(format!("Nothing is shared: {}", chain(&error)));
            None
        })
}

/// What was found of an offer that this host can take.
struct Judged {
    /// What this site takes of the guest's configuration.
    configuration: Value,
    /// The guest to be; none where only a shadow comes.
    guest: Option<XenDestination>,
    /// Pages that its memory may have.
    ranges: [Range<u64>; 2],
    shadows: Shadows,
    xen: XenVersion,
    warnings: Vec<String>,
}

/// Looks at all that may speak against the guest, and makes nothing: neither does a dry run, nor a
/// move that is refused. Memory and room may be gone when they are taken.
fn judge(directories: &Directories, policies: &Policies, offer: &Offer) -> Result<Judged> {
    let kind = Kind::try_from(offer.kind)?;
    let shadow_only = offer.purpose == Purpose::Shadow;
    if shadow_only && !policies.shadows.keep {
        return Err(Error::Refused("This site keeps no shadows".into()));
    }
    let host = &Host::open()?;
    let physical = host
        .ctl()
        .physical_info()
        .context(|| "Can't read about this host")?;
    refuse_oversize(
        kind,
        offer.pages,
        offer.populated_pages,
        physical.total_pages,
    )?;
    let accepted = accept(offer, &policies.site).map_err(|error| Error::Refused(chain(&error)))?;
    recovery::refuse_open_moves(directories, &offer.uuid, &offer.name)?;
    refuse_conflicts(host, offer)?;
    check_cpu(host, offer, kind)?;
    let xen = xen_version(host)?;
    let mut warnings = warnings(host, &xen, offer)?;
    if !accepted.left_out.is_empty() {
        let names: Vec<String> = accepted.left_out.iter().map(ToString::to_string).collect();
        warnings.push(format!(
            "The destination leaves out of the configuration: {}",
            names.join(", ")
        ));
    }
    warnings.extend(missing_files(&accepted.configuration).map(|path| {
        format!("The destination has no {path}: once it reboots the guest can't start again there")
    }));
    let ranges = kind.memory_ranges(offer.pages, accepted.most_pages());
    let shadows = Shadows::new(directories, policies.shadows.clone());
    let configuration = accepted.configuration;
    let guest = match shadow_only {
        true => None,
        false => {
            let guest = XenDestination::new(
                Incoming {
                    name: offer.name.clone(),
                    uuid: offer.uuid.clone(),
                    kind,
                    configuration: configuration.clone(),
                    pages: offer.pages,
                    populated: offer.populated_pages,
                },
                Digester::new(&offer.digest_key),
            )?;
            guest.refuse_lack_of_memory()?;
            refuse_lack_of_room(directories, &shadows, offer, &ranges)?;
            Some(guest)
        }
    };
    Ok(Judged {
        configuration,
        guest,
        ranges,
        shadows,
        xen,
        warnings,
    })
}

/// What a guest of this configuration boots by, of which there is nothing here. It can arrive all the
/// same.
fn missing_files(configuration: &Value) -> impl Iterator<Item = &str> {
    ["/b_info/kernel", "/b_info/ramdisk"]
        .into_iter()
        .filter_map(|field| configuration.pointer(field)?.as_str())
        .filter(|path| !Path::new(path).exists())
}

/// The answer to a dry run: as if the guest came now.
fn would_take(
    directories: &Directories,
    policies: &Policies,
    foresee: &mut Foresee<'_>,
    offer: &Offer,
) -> Result<Willing> {
    let Judged {
        shadows,
        xen,
        mut warnings,
        ..
    } = judge(directories, policies, offer)?;
    let site = foresee(&offer.name)?;
    let sharing = sharing(policies, &shadows, offer, &mut warnings);
    let mut willing = Willing::new(offer, xen, &warnings, shadows, sharing);
    willing.acceptance.edge_site = site.as_deref().map(Text::new);
    Ok(willing)
}

/// The disk must have room for what the guest has, with what the shadows of others would give back.
fn refuse_lack_of_room(
    directories: &Directories,
    shadows: &Shadows,
    offer: &Offer,
    ranges: &[Range<u64>],
) -> Result<()> {
    let directory = directories.incoming();
    let (needed, free) =
        shadows.room_for_guest(&offer.uuid, &offer.digest_key, ranges, &directory)?;
    if free < needed {
        return Err(Error::Refused(format!(
            "Not enough room in {}: {} MiB needed, {} MiB free",
            directory.display(),
            needed >> 20,
            free >> 20
        )));
    }
    Ok(())
}

/// Where connections for pages can join the move, and what they have to know.
fn door(
    directories: &Directories,
    policy: &DirectPolicy,
    offer: &Offer,
    warnings: &mut Vec<String>,
) -> Result<(Door, Expecting)> {
    let token = JoinToken::new(random()?);
    let (mut door, links) = Door::open(directories, offer.move_id)?;
    // The way that ssh has come, another connection may as well.
    let address = |part| sshd_says(part).and_then(|address| address.parse().ok());
    let direct = match (&offer.direct, address(0), address(2)) {
        (Some(offered), Some(from), Some(to)) if policy.accept => {
            let listening = door.listen(policy, Ends { from, to }, offered);
            listening.map_or_else(
                |error| {
                    warnings.push(format!("Pages go by ssh: {}", chain(&error)));
                    None
                },
                Some,
            )
        }
        _ => None,
    };
    let expecting = Expecting {
        token,
        links,
        direct,
    };
    Ok((door, expecting))
}

/// What is kept of each page is made before the restore finds that there is no room.
fn refuse_oversize(kind: Kind, pages: u64, populated: u64, host_pages: u64) -> Result<()> {
    if populated <= host_pages && pages <= kind.most_pages(host_pages) {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "Not enough memory: the guest has {} MiB, and {} MiB at most; this host has {} MiB in all",
        populated >> 8,
        pages >> 8,
        host_pages >> 8
    )))
}

fn refuse_conflicts(host: &Host, offer: &Offer) -> Result<()> {
    let doing = || "Can't look for domains of that name";
    for name in [offer.name.clone(), incoming_name(&offer.name)] {
        if host
            .toolstack()
            .domain_by_name(&name)
            .context(doing)?
            .is_some()
        {
            return Err(Error::Refused(format!("There is a domain {name} already")));
        }
    }
    if let Some(domid) = host.find(&offer.uuid)? {
        return Err(Error::Refused(format!(
            "Domain {domid} has the guest's UUID already"
        )));
    }
    Ok(())
}

/// libxl applies the CPU policy when the restore begins, and just fails: say why beforehand.
fn check_cpu(host: &Host, offer: &Offer, kind: Kind) -> Result<()> {
    let kind = match kind {
        Kind::Pv => CpuKind::Pv,
        Kind::Pvh => CpuKind::Hvm,
    };
    let offered = &offer.cpu_policy;
    let policy =
        CpuPolicy::from_bytes(&offered.leaves, &offered.msrs).context(|| "Bad CPU policy")?;
    host.ctl()
        .cpu_policy_compatible(&policy, kind)
        .map_err(|error| Error::Refused(format!("This host's CPU doesn't suit the guest: {error}")))
}

fn xen_version(host: &Host) -> Result<XenVersion> {
    let version = host
        .ctl()
        .version()
        .context(|| "Can't read Xen's version")?;
    Ok(XenVersion {
        major: version.major,
        minor: version.minor,
        extra: Text::new(&version.extra),
    })
}

/// What doesn't hinder the move and still should be known.
fn warnings(host: &Host, ours: &XenVersion, offer: &Offer) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    if *ours != offer.xen {
        warnings.push(format!(
            "The destination runs Xen {}.{}{}, this host {}.{}{}",
            ours.major, ours.minor, ours.extra, offer.xen.major, offer.xen.minor, offer.xen.extra
        ));
    }
    let khz = host
        .ctl()
        .physical_info()
        .context(|| "Can't read about this host")?
        .cpu_khz;
    // In the default mode a guest whose clock ran at another rate traps on each reading of it.
    if offer.tsc.mode == 0 && khz.abs_diff(offer.tsc.khz) > offer.tsc.khz / 1000 {
        warnings.push(format!(
            "The destination's CPU runs at {khz} kHz and the guest's clock at {} kHz: reading it \
             will be slow there",
            offer.tsc.khz
        ));
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Outcome;
    use serde_json::json;

    #[test]
    fn where_the_guest_is_is_told_at_the_end() {
        let shared = Shared::new(
            control::Facts {
                role: Role::Destination,
                move_id: "1".into(),
                domain: "g1".into(),
                uuid: "2".into(),
                domid: None,
                peer: "a".into(),
                guest_bytes: 0,
            },
            Rate::default(),
            Duration::ZERO,
            Arc::default(),
        );
        let told = |result, purpose| ended(&shared.status(), "a", purpose, &result);
        let failed = || Err(Error::Cancelled);
        let before = told(failed(), Purpose::Move);
        assert_eq!(before.guest, Whereabouts::Source);
        assert!(before.what.contains("a has it"), "{before:?}");
        let kept = told(Ok(()), Purpose::Shadow);
        assert_eq!(
            (kept.guest, kept.outcome),
            (Whereabouts::Source, Outcome::Kept)
        );
        // Whether it has come to be its own, the journal says.
        assert!(shared.commit());
        let after = told(failed(), Purpose::Move);
        assert_eq!(after.guest, Whereabouts::Unknown);
        assert!(after.what.contains("vmshadow resolve g1"), "{after:?}");
        assert_eq!(told(Ok(()), Purpose::Move).guest, Whereabouts::Destination);
    }

    #[test]
    fn what_a_guest_boots_by_and_is_not_here_is_named() {
        let boots_by = |kernel: Value, ramdisk: Value| {
            let configuration = json!({ "b_info": { "kernel": kernel, "ramdisk": ramdisk } });
            missing_files(&configuration).map(str::to_owned).collect()
        };
        let missing: Vec<String> = boots_by(json!("/no/kernel"), json!("/proc/self/exe"));
        assert_eq!(missing, ["/no/kernel"]);
        let missing: Vec<String> = boots_by(Value::Null, Value::Null);
        assert!(missing.is_empty());
    }

    #[test]
    fn a_guest_larger_than_the_machine_is_refused() {
        let gib = 1 << 18;
        let refused =
            |pages, populated| refuse_oversize(Kind::Pv, pages, populated, 4 * gib).is_err();
        assert!(!refused(4 * gib, 4 * gib));
        assert!(refused(4 * gib + 1, 4 * gib + 1));
        // Ballooned down from more than the machine has.
        assert!(!refused(16 * gib, gib));
        assert!(refused(16 * gib + 4, gib));
        // The most that the protocol can say.
        assert!(refused(crate::pages::MAX_PAGES, 1));
    }

    #[test]
    fn a_small_pvh_guest_fits_a_small_machine() {
        let gib = 1 << 18;
        let refused =
            |pages, populated| refuse_oversize(Kind::Pvh, pages, populated, gib / 2).is_err();
        assert!(!refused(4 * gib - 4096, gib / 8));
        assert!(refused(4 * gib + 1, gib / 8));
        assert!(refused(4 * gib, gib));
    }
}
