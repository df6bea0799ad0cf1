//! The edge: a proxy that keeps clients' connections while guests move between sites.
//!
//! ```text
//!  vmshadow migrate ──── departure: hold, retarget, release ────▶ netproxy, here or by ssh
//!  vmshadow receive ──── what does this site have to translate? ─▶
//!        ├── path: translation and neighbour entry, in this host's kernel
//!        ├── outgoing: the guest's own connections, through the site where they began
//!        └── records: what both have set up, for whoever has to take it back
//! ```

mod departure;
mod outgoing;
mod path;
mod records;

pub use departure::Departure;
pub use outgoing::Detours;
pub use path::Paths;

use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use migrate::configuration::absolute_path;
use migrate::directories::Directories;
use migrate::handover::journal::Role;
use migrate::handover::recovery::{Place, Settled};
use netproxy::GuestInfo;
use netproxy::control::{Client, Reach};
use netproxy::retarget::phase::Phase;
use netproxy::site::Translation;
use serde::Deserialize;

use crate::policy;

/// How long the edge may take to answer: ssh, across a WAN.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long the source's worker may take to let connections go on, once the guest has arrived.
const RELEASING: Duration = Duration::from_secs(40);

/// How long the edge may take to follow: the destination waits for the source's worker first.
const FOLLOWING: Duration = RELEASING.saturating_add(Duration::from_secs(20));

/// How often it is looked whether the edge has followed.
const LOOK: Duration = Duration::from_millis(500);

/// `[edge]` of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Edge {
    /// What the edge calls this site.
    pub site: String,
    /// The host where the proxy runs, reached by ssh with a key: `[user@]host`. This one, if not
    /// given.
    pub host: Option<String>,
    /// The command that stands for ssh.
    #[serde(default = "default_ssh", deserialize_with = "command")]
    pub ssh: Vec<String>,
    /// The proxy's control socket.
    #[serde(default = "default_control", deserialize_with = "absolute_path")]
    pub control: PathBuf,
    /// What becomes of connections that guests have begun themselves; nothing is done for them, if
    /// not given.
    pub outgoing: Option<outgoing::Settings>,
}

fn default_ssh() -> Vec<String> {
    vec!["ssh".into()]
}

fn default_control() -> PathBuf {
    "/run/netproxy/netproxy.sock".into()
}

/// A command whose program is found wherever it is started: guardians are elsewhere than whoever
/// began a move.
fn command<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let command = Vec::<String>::deserialize(from)?;
    let wrong = match command.first() {
        None => "It is empty".to_owned(),
        Some(program) if program.contains('/') && !program.starts_with('/') => {
            format!("{program:?} is neither a name nor an absolute path")
        }
        Some(_) => return Ok(command),
    };
    Err(serde::de::Error::custom(wrong))
}

impl Edge {
    /// Connects to the proxy.
    ///
    /// # Errors
    /// Where it can't be reached; over ssh that may show in the first call.
    pub fn connect(&self) -> anyhow::Result<Client> {
        let client = match &self.host {
            None => Client::connect(&self.control),
            Some(host) => Client::through(&mut self.remote_command(host)?),
        };
        let mut client = client.with_context(|| self.unreachable())?;
        client.set_patience(PATIENCE)?;
        Ok(client)
    }

    /// What leads to the proxy of another host. One that has gone without a word is noticed as soon as
    /// by the link of a move.
    fn remote_command(&self, host: &str) -> anyhow::Result<Command> {
        // `ssh` reads a host that begins with a dash as an option.
        anyhow::ensure!(!host.starts_with('-'), "{host:?} is no host");
        let (program, options) = self
            .ssh
            .split_first()
            .context("The ssh of the edge is empty")?;
        let mut command = Command::new(program);
        command
            .args(options)
            .args(["-oBatchMode=yes", "-oConnectTimeout=10"])
            .args(["-oServerAliveInterval=5", "-oServerAliveCountMax=3"])
            .args([host, "netproxy", "attach"])
            .arg(&self.control);
        Ok(command)
    }

    /// The beginning of an error.
    fn unreachable(&self) -> String {
        format!(
            "The edge at {} can't be reached",
            self.host.as_deref().unwrap_or("this host")
        )
    }

    /// What the edge knows of the guest; none where it does not know it.
    ///
    /// # Errors
    /// Where the edge can't be reached.
    pub fn look_up(&self, client: &mut Client, guest: &str) -> anyhow::Result<Option<GuestInfo>> {
        let overview = client.list().with_context(|| self.unreachable())?;
        Ok(overview.guests.into_iter().find(|it| it.name == guest))
    }

    /// How the edge reaches the guest here; none where it does not know it.
    ///
    /// # Errors
    /// Where the edge can't be reached, does not know this site, or makes no sense.
    pub fn reach(&self, guest: &str) -> anyhow::Result<Option<Reach>> {
        let mut client = self.connect()?;
        if self.look_up(&mut client, guest)?.is_none() {
            return Ok(None);
        }
        let reach = client.reach(guest, &self.site)?;
        // It may only say how its own packets get to the guest that was asked for.
        let answers = |of: &Translation| of.guest == guest && of.guest_address == reach.address;
        anyhow::ensure!(
            reach.translation.as_ref().is_none_or(answers),
            "The edge answers for another guest"
        );
        Ok(Some(reach))
    }

    /// Tells the edge that the guest is here, whatever was before. Nothing is said of a guest that
    /// it does not know.
    ///
    /// # Errors
    /// Where the edge can't be reached.
    pub fn claim(&self, guest: &str) -> anyhow::Result<()> {
        let mut client = self.connect()?;
        if self.look_up(&mut client, guest)?.is_some() {
            client.arrived(guest, &self.site)?;
        }
        Ok(())
    }

    /// After the guest has arrived here: waits until the edge has it here, which the source's
    /// worker sees to. Tells the edge itself where that is dead, or knows of no edge.
    ///
    /// # Errors
    /// Where the edge can't be reached.
    pub fn see_to_arrival(&self, guest: &str) -> anyhow::Result<()> {
        let mut client = self.connect()?;
        let over = |known: &GuestInfo| known.site == self.site || known.phase == Phase::Settled;
        let look = || self.look_up(&mut client, guest);
        let known = watch(look, over, RELEASING, || {})?;
        if known.is_some_and(|known| known.site != self.site) {
            client.arrived(guest, &self.site)?;
        }
        Ok(())
    }

    /// Whether a path to a guest that is not here may still be needed: the edge has connections of it
    /// here, or is at work on them.
    ///
    /// # Errors
    /// Where the edge can't be reached.
    fn needs_path(&self, guest: &str) -> anyhow::Result<bool> {
        let known = self.look_up(&mut self.connect()?, guest)?;
        Ok(known.is_some_and(|known| {
            known.site == self.site && (known.connections > 0 || known.phase != Phase::Settled)
        }))
    }

    /// After the guest has left: waits until the edge has it elsewhere, and says by `waits` that it
    /// has to. Where this site's worker could not see to that, the destination does.
    ///
    /// # Errors
    /// Where the edge can't be reached, or does not follow.
    fn see_off(&self, guest: &str, waits: impl FnOnce()) -> anyhow::Result<()> {
        let over = |known: &GuestInfo| known.site != self.site;
        let mut client = self.connect()?;
        let look = || self.look_up(&mut client, guest);
        let known = watch(look, over, FOLLOWING, waits)?;
        anyhow::ensure!(
            known.is_none_or(|known| known.site != self.site),
            "The edge still has {guest} at {}",
            self.site
        );
        Ok(())
    }
}

/// Looks at a guest until it is `over`, for so long at most; `waits` is called where the first look
/// does not show that. Gives what was known of it at the end.
fn watch<T>(
    mut look: impl FnMut() -> anyhow::Result<Option<T>>,
    over: impl Fn(&T) -> bool,
    patience: Duration,
    waits: impl FnOnce(),
) -> anyhow::Result<Option<T>> {
    let start = Instant::now();
    let mut waits = Some(waits);
    loop {
        let known = look()?;
        if known.as_ref().is_none_or(&over) || start.elapsed() > patience {
            return Ok(known);
        }
        if let Some(waits) = waits.take() {
            waits();
        }
        thread::sleep(LOOK);
    }
}

/// A guest that has left is not reached here any more, once the edge has followed it: before that
/// this host would answer the edge's packets itself, with resets. `edge` is none where nobody follows;
/// `waits` is called where it has not followed yet.
///
/// # Errors
/// Where that can't be told, and the path stays; or what the kernel's tools refuse.
pub fn close_path_behind(
    directories: &Directories,
    edge: Option<&Edge>,
    guest: &str,
    waits: impl FnOnce(),
) -> anyhow::Result<()> {
    let paths = Paths::new(directories);
    if let Some(edge) = edge
        && paths.is_open(guest)?
    {
        edge.see_off(guest, waits)
            .with_context(|| format!("Run later: vmshadow proxy close {guest}"))?;
    }
    paths.close(guest).map(drop)
}

/// After a move was settled: the edge follows the guest, and the path to it is here or not. What
/// can't be done is logged.
pub fn follow(directories: &Directories, settled: &Settled) {
    let name = &settled.name;
    let paths = Paths::new(directories);
    let detours = Detours::new(directories);
    let here = match settled.place {
        Place::Here => Some(true),
        Place::There => Some(false),
        Place::Nowhere | Place::NotHere => None,
    };
    if let Some(here) = here
        && let Err(error) = detours.settle(name, here)
    {
        log::warn!("The detour of {name} may be wrong: {error:#}");
    }
    let edge = policy::read().map(|policy| policy.edge);
    let result = match (settled.role, settled.place, &edge) {
        // It did not come: the edge has never had it here.
        (Role::Destination, Place::There, _) => paths.close(name).map(drop),
        (_, Place::There | Place::NotHere, Ok(edge)) => {
            close_path_behind(directories, edge.as_ref(), name, || {})
        }
        (_, Place::Here, Ok(Some(edge))) => edge.claim(name),
        _ => Ok(()),
    };
    if let Err(error) = result {
        log::warn!("Connections to {name} may not have followed: {error:#}");
    }
    match edge {
        Ok(edge) => paths.tidy(directories, edge.as_ref()),
        Err(error) => log::warn!("Whether there is an edge can't be told: {error:#}"),
    }
    detours.tidy(directories);
}

/// The engine's error for a failure at the edge.
pub fn refused(error: &anyhow::Error) -> migrate::Error {
    migrate::Error::Refused(format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_told_once_and_only_where_it_is_needed() {
        let count = |looks: &[Option<u32>]| {
            let (mut looks, mut told) = (looks.iter().copied(), 0);
            let look = || Ok(looks.next().flatten());
            let known = watch(look, |it| *it == 2, RELEASING, || told += 1).unwrap();
            (known, told)
        };
        assert_eq!(count(&[Some(2)]), (Some(2), 0));
        assert_eq!(count(&[None]), (None, 0));
        assert_eq!(count(&[Some(1), Some(1), Some(2)]), (Some(2), 1));
    }

    #[test]
    fn another_host_is_reached_by_ssh_and_given_up_when_it_is_silent() {
        let edge: Edge = toml::from_str(
            "site = \"a\"\nssh = [\"ssh\", \"-p\", \"2222\"]\ncontrol = \"/run/x\"\n",
        )
        .unwrap();
        let command = edge.remote_command("edge.example.org").unwrap();
        let all: Vec<_> = command.get_args().map(|it| it.to_string_lossy()).collect();
        assert_eq!(command.get_program(), "ssh");
        assert_eq!(
            all.join(" "),
            "-p 2222 -oBatchMode=yes -oConnectTimeout=10 -oServerAliveInterval=5 \
             -oServerAliveCountMax=3 edge.example.org netproxy attach /run/x"
        );
        assert!(edge.remote_command("-oProxyCommand=x").is_err());
    }
}
