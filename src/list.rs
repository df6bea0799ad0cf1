//! `vmshadow list`

use migrate::directories::Directories;
use migrate::error::Error;
use migrate::guest::Kind;
use migrate::guest::xen::checks::{Allowed, hindrances};
use migrate::guest::xen::foretell_tracker;
use migrate::guest::xen::host::Host;
use migrate::handover::journal::{self, Begin, Entry, Journals, Role};
use migrate::handover::lock::GuestLock;
use migrate::handover::recovery::{Action, action};
use migrate::report::TrackerKind;
use serde::Serialize;
use xen_sys::DomId;
use xen_sys::toolstack::DomainKind;

use crate::cli;

/// One guest.
#[derive(Debug, Serialize)]
struct Guest {
    name: String,
    /// None of one that is not here, but has a move that is open.
    domid: Option<u32>,
    uuid: String,
    kind: String,
    memory_mib: u64,
    vcpus: u32,
    state: &'static str,
    tracker: Option<TrackerKind>,
    hindrances: Vec<String>,
    open_moves: Vec<String>,
}

/// A move that has not ended, and what to do about it. Its journal knows the guest by the name that
/// it had where the move began.
fn open_move(directories: &Directories, entry: &Entry) -> String {
    let Begin {
        role,
        name,
        peer,
        uuid,
        ..
    } = &entry.begin;
    let way = match role {
        Role::Source => "to",
        Role::Destination => "from",
    };
    let phase = entry.phase;
    match GuestLock::take(directories, uuid, name) {
        Err(Error::Busy(_)) => {
            format!("a move {way} {peer} is at work; see: vmshadow status {name}")
        }
        _ => format!("a move {way} {peer} is open ({phase:?}); run: vmshadow resolve {name}"),
    }
}

/// Prints every guest, and every move that is open.
pub fn run(options: &cli::List) -> anyhow::Result<()> {
    crate::require_xen()?;
    let host = Host::open()?;
    let directories = Directories::default();
    let Journals {
        entries: mut open,
        unreadable,
    } = journal::list(&directories)?;
    for error in &unreadable {
        tell!(
            "Warning: A move may be open here whose journal can't be read: {}",
            migrate::error::chain(error)
        );
    }
    open.retain(|entry| action(entry) != Action::Nothing);
    let open_moves = |uuid: &str| -> Vec<String> {
        let own = open.iter().filter(|entry| entry.begin.uuid == uuid);
        own.map(|entry| open_move(&directories, entry)).collect()
    };
    let mut guests = Vec::new();
    for info in host.ctl().domains()? {
        if info.domain == DomId::DOM0 || info.dying {
            continue;
        }
        let uuid = host.uuid_text(&info);
        // A domain that goes may have lost its configuration.
        let kind = host.kind(info.domain).ok();
        let movable = match kind {
            Some(DomainKind::Pv) => Some(Kind::Pv),
            Some(DomainKind::Pvh) => Some(Kind::Pvh),
            None | Some(DomainKind::Hvm) => None,
        };
        let tracker = movable.map(|kind| foretell_tracker(&host, &info, kind, None));
        guests.push(Guest {
            name: host.name(info.domain).unwrap_or_else(|_| "(null)".into()),
            domid: Some(info.domain.get()),
            kind: kind.map_or_else(|| "?".into(), |kind| kind.to_string().to_lowercase()),
            memory_mib: info.tot_pages >> 8,
            vcpus: info.online_vcpus,
            state: match (&info.shutdown, info.paused) {
                (Some(_), _) if info.is_suspended() => "suspended",
                (Some(_), _) => "shut down",
                (None, true) => "paused",
                (None, false) => "running",
            },
            tracker: tracker.transpose()?,
            hindrances: hindrances(&host, info.domain, Allowed::default())
                .unwrap_or_else(|error| vec![migrate::error::chain(&error)]),
            open_moves: open_moves(&uuid),
            uuid,
        });
    }
    // A guest that has gone with its host may have a move that is in doubt.
    for entry in &open {
        let begin = &entry.begin;
        if guests.iter().all(|guest| guest.uuid != begin.uuid) {
            guests.push(Guest {
                name: begin.name.clone(),
                domid: None,
                uuid: begin.uuid.clone(),
                kind: "?".into(),
                memory_mib: 0,
                vcpus: 0,
                state: "not here",
                tracker: None,
                hindrances: vec!["it is not here".into()],
                open_moves: open_moves(&begin.uuid),
            });
        }
    }
    if options.json {
        say!("{}", serde_json::to_string_pretty(&guests)?);
        return Ok(());
    }
    say!(
        "{:24} {:>5} {:>4} {:>8} {:>5} {:10} {:10} Can be moved",
        "Name",
        "ID",
        "Kind",
        "MiB",
        "VCPUs",
        "State",
        "Tracker"
    );
    for guest in guests {
        say!(
            "{:24} {:>5} {:>4} {:>8} {:>5} {:10} {:10} {}",
            guest.name,
            guest.domid.map(|id| id.to_string()).unwrap_or_default(),
            guest.kind,
            guest.memory_mib,
            guest.vcpus,
            guest.state,
            guest
                .tracker
                .map(|tracker| tracker.to_string())
                .unwrap_or_default(),
            if guest.hindrances.is_empty() {
                "yes".to_owned()
            } else {
                guest.hindrances.join("; ")
            },
        );
        for open in guest.open_moves {
            say!("    {open}");
        }
    }
    Ok(())
}
