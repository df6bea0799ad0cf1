//! `vmshadow proxy`: what the edge does with guests' connections, and how it reaches guests here.

use anyhow::{Context, bail};
use migrate::directories::Directories;
use migrate::guest::xen::checks::Layout;
use migrate::guest::xen::host::Host;
use migrate::outgoing::find_domain;
use netproxy::Overview;
use netproxy::control::Request;

use crate::cli::{self, ProxyCommand};
use crate::edge::{Edge, Paths};
use crate::policy;

/// Runs one of the subcommands.
pub fn run(options: &cli::Proxy, directories: &Directories) -> anyhow::Result<()> {
    let edge = || {
        policy::read()?.edge.with_context(|| {
            format!(
                "This host has no edge: {} has no [edge] section",
                policy::PATH
            )
        })
    };
    match &options.command {
        ProxyCommand::List { json } => list(&edge()?, *json),
        ProxyCommand::Open { domain } => open(&edge()?, directories, domain),
        // What is here can be taken back without an edge, as after it was taken out of the
        // configuration.
        ProxyCommand::Close { guest } => close(directories, guest),
        ProxyCommand::Arrived { guest } => arrived(&edge()?, guest),
        ProxyCommand::Drain { guest, off } => call(
            &edge()?,
            &Request::Drain {
                guest: guest.clone(),
                on: !off,
            },
        ),
        ProxyCommand::Reload => call(&edge()?, &Request::Reload),
        ProxyCommand::Upgrade => Ok(edge()?.connect()?.upgrade()?),
        ProxyCommand::Metrics => {
            let answer = edge()?.connect()?.call(&Request::Metrics)?;
            let text = answer.get("text").and_then(serde_json::Value::as_str);
            say!("{}", text.context("The edge sent no metrics")?.trim_end());
            Ok(())
        }
    }
}

fn call(edge: &Edge, request: &Request) -> anyhow::Result<()> {
    edge.connect()?.call(request)?;
    Ok(())
}

fn close(directories: &Directories, guest: &str) -> anyhow::Result<()> {
    let said = match Paths::new(directories).close(guest)? {
        true => "closed",
        false => "there was no path",
    };
    say!("{guest}: {said}");
    Ok(())
}

/// Connections that are led to where the guest is not would end.
fn arrived(edge: &Edge, domain: &str) -> anyhow::Result<()> {
    crate::require_xen()?;
    let host = Host::open()?;
    let name = host.name(find_domain(&host, domain)?)?;
    let tally = edge.connect()?.arrived(&name, &edge.site)?;
    say!(
        "{name}: at {} now; {} connections follow, {} can't",
        edge.site,
        tally.connections,
        tally.failed
    );
    Ok(())
}

fn open(edge: &Edge, directories: &Directories, domain: &str) -> anyhow::Result<()> {
    crate::require_xen()?;
    let host = Host::open()?;
    let domid = find_domain(&host, domain)?;
    let name = host.name(domid)?;
    let uuid = host.uuid_text(&host.info(domid)?);
    let configuration = Layout::read(&host, domid)?.document();
    directories.create()?;
    if !Paths::new(directories).open(edge, &name, &uuid, &configuration, false)? {
        bail!("The edge does not know {name}: nothing to open");
    }
    say!("{name}: open to the edge");
    Ok(())
}

fn list(edge: &Edge, json: bool) -> anyhow::Result<()> {
    let mut client = edge.connect()?;
    if json {
        let answer = client.call(&Request::List)?;
        say!("{}", serde_json::to_string_pretty(&answer)?);
        return Ok(());
    }
    say!("{}", table(&client.list()?));
    Ok(())
}

fn table(overview: &Overview) -> String {
    let mut text = format!(
        "{:<24} {:<16} {:>11}  clients at",
        "guest", "site", "connections"
    );
    for guest in &overview.guests {
        let listeners: Vec<String> = guest.listeners.iter().map(ToString::to_string).collect();
        text += &format!(
            "\n{:<24} {:<16} {:>11}  {}{}",
            guest.name,
            guest.site,
            guest.connections,
            listeners.join(" "),
            if guest.draining { " (draining)" } else { "" }
        );
    }
    text
}
