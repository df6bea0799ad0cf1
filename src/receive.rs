//! `vmshadow receive`: the other end, started by ssh.

use std::io::Write;

use migrate::connections::{Arranged, Expected};
use migrate::directories::Directories;
use migrate::handover::recovery;
use migrate::incoming::{self, Policies};

use crate::cli;
use crate::edge::{self, Detours, Edge, Paths};
use crate::policy;

/// Receives a guest, or says what became of a move.
pub fn run(options: &cli::Receive, directories: &Directories) -> anyhow::Result<()> {
    if let Some(move_id) = &options.ask {
        let (answer, settled) = recovery::answer(directories, move_id)?;
        // An answer that did not arrive must not look like one.
        let mut output = std::io::stdout();
        writeln!(output, "{}", serde_json::to_string(&answer)?)?;
        output.flush()?;
        if let Some(settled) = &settled {
            edge::follow(directories, settled);
        }
        return Ok(());
    }
    if let Some(move_id) = &options.join {
        return incoming::join(directories, move_id).map_err(Into::into);
    }
    // A mistake in it is for the source to hear, as any other reason why the guest can't come.
    let policy = policy::read().map_err(|error| format!("{error:#}"));
    let edge = policy.as_ref().ok().and_then(|policy| policy.edge.clone());
    let paths = Paths::new(directories);
    let detours = Detours::new(directories);
    let arranged = |guest: Expected<'_>| match &edge {
        None => Ok(Arranged::default()),
        Some(edge) => arrange(edge, &paths, &detours, guest).map_err(|error| edge::refused(&error)),
    };
    let mut name = None;
    let mut expect = |guest: Expected<'_>| {
        name = Some(guest.name.to_owned());
        arranged(guest)
    };
    let mut foresee = |name: &str| match &edge {
        None => Ok(None),
        Some(edge) => edge
            .reach(name)
            .map(|_| Some(edge.site.clone()))
            .map_err(|error| edge::refused(&error)),
    };
    let cancel = crate::cancelled()?;
    let policies = policy.map(|policy| Policies {
        site: policy.site,
        shadows: policy.shadows,
        groups: policy.groups,
        direct: policy.direct,
    });
    let received = incoming::receive(
        directories,
        policies.as_ref().map_err(String::clone),
        &mut expect,
        &mut foresee,
        &mut |settled| edge::follow(directories, settled),
        cancel,
    );
    match (&received, name) {
        (Ok(()), Some(name)) => {
            if let Some(edge) = &edge
                && let Err(error) = edge.see_to_arrival(&name)
            {
                log::warn!("Connections to {name} may not have followed: {error:#}");
            }
            if let Err(error) = detours.settle(&name, true) {
                log::warn!("The detour of {name} may end early: {error:#}");
            }
        }
        (Ok(()), None) => {}
        // The guest did not come.
        (Err(_), _) => {
            // Where it can't be told whether there is an edge, paths stay.
            if policies.is_ok() {
                paths.tidy(directories, edge.as_ref());
            }
            detours.tidy(directories);
        }
    }
    received.map_err(Into::into)
}

/// Opens the path to a guest that comes, and says how its own connections are led.
fn arrange(
    edge: &Edge,
    paths: &Paths,
    detours: &Detours,
    guest: Expected<'_>,
) -> anyhow::Result<Arranged> {
    let (name, uuid) = (guest.name, guest.uuid);
    paths.open(edge, name, uuid, guest.configuration, true)?;
    Ok(Arranged {
        site: Some(edge.site.clone()),
        outgoing: edge.lead(name, uuid, detours)?,
    })
}
