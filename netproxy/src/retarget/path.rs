//! The path to the new site, warmed ahead of a move.
//!
//! A new socket starts with what the kernel knows of the destination. Two things are told to it:
//!
//! - the round trip time, by one ordinary connection to any port of the site that accepts: the
//!   kernel keeps it in tcp_metrics. Without it the first timeout is seconds away;
//! - an initial congestion window that takes all that may be in flight, by a route in a table of
//!   its own, which only marked sockets use. Nobody else's routes are touched.
//!
//! Rule and routes go some time after the last move that needs them, or with this process, however it
//! ends. Not right after it: what takes them away would have processors that streams wait for.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use crate::error::{Result, system};
use crate::program::{Tethered, ip, ip_option, run};

/// Segments of the first flight: 17 MB at an MSS of 1,460, four times what a connection has to send
/// at the most on Debian (`net.ipv4.tcp_wmem`).
const INITIAL_WINDOW: &str = "12000";
/// How long the ordinary connection may take.
const PROBE: Duration = Duration::from_secs(3);
/// How long the routes stay when nobody needs them any more.
const STAYING: Duration = Duration::from_secs(2);

/// What warming a path gave.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Warmth {
    /// How long the ordinary connection took to open, in milliseconds; about one round trip.
    pub connect_ms: Option<f64>,
    /// Whether new sockets get the large initial window.
    pub window: bool,
    /// What is not as it should be. The move works all the same, with a longer stall.
    pub warnings: Vec<String>,
}

/// The routes that are there for moves under way.
#[derive(Debug)]
pub(crate) struct Paths {
    mark: u32,
    table: u32,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// Guests that need the routes.
    users: BTreeSet<String>,
    tether: Option<Tethered>,
    /// How often they were needed.
    opened: u64,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Deserialize)]
struct RouteGet {
    dev: String,
    gateway: Option<String>,
    prefsrc: Option<String>,
}

impl Paths {
    /// Also removes what an earlier run left, should both it and its helper have been killed.
    pub(crate) fn new(mark: u32, table: u32) -> Self {
        let paths = Self {
            mark,
            table,
            state: Arc::default(),
        };
        let _ = run("/bin/sh", &["-c", &paths.removal()], "");
        paths
    }

    fn rule(&self) -> String {
        format!(
            "fwmark {:#x} lookup {t} priority {t}",
            self.mark,
            t = self.table
        )
    }

    fn removal(&self) -> String {
        let (rule, table) = (self.rule(), self.table);
        ["-4", "-6"]
            .map(|family| {
                format!(
                    "while ip {family} rule del {rule} 2>/dev/null; do :; done; \
                     ip {family} route flush table {table} 2>/dev/null; "
                )
            })
            .concat()
    }

    /// Gives `guest` a route with a large initial window to `remote`.
    pub(crate) fn open(&self, guest: &str, remote: IpAddr, source: Option<IpAddr>) -> Result<()> {
        let mut state = lock(&self.state);
        let family = ip_option(remote);
        if state.tether.is_none() {
            // First what takes it away, then what is to be taken away.
            state.tether = Some(Tethered::finally(&self.removal())?);
            for family in ["-4", "-6"] {
                // A host without IPv6 has no such rules, and needs none.
                let added = ip(&format!("{family} rule add {}", self.rule()));
                if family == "-4" || remote.is_ipv6() {
                    added?;
                }
            }
        }
        state.users.insert(guest.to_owned());
        state.opened += 1;
        let mut question = format!("{family} -j route get {remote}");
        if let Some(source) = source {
            question.push_str(&format!(" from {source}"));
        }
        let routes: Vec<RouteGet> = serde_json::from_str(&ip(&question)?).unwrap_or_default();
        let Some(route) = routes.first() else {
            return Err(crate::Error::Program {
                program: "ip".into(),
                message: format!("no route to {remote}"),
            });
        };
        let mut own = format!("{family} route replace {remote}");
        if let Some(gateway) = &route.gateway {
            own.push_str(&format!(" via {gateway}"));
        }
        own.push_str(&format!(" dev {}", route.dev));
        let source = source.map(|source| source.to_string());
        if let Some(source) = source.as_ref().or(route.prefsrc.as_ref()) {
            own.push_str(&format!(" src {source}"));
        }
        own.push_str(&format!(" table {} initcwnd {INITIAL_WINDOW}", self.table));
        ip(&own).map(drop)
    }

    /// `guest` needs no routes any more.
    pub(crate) fn close(&self, guest: &str) {
        let mut state = lock(&self.state);
        state.users.remove(guest);
        if !state.users.is_empty() || state.tether.is_none() {
            return;
        }
        let opened = state.opened;
        drop(state);
        let kept = Arc::clone(&self.state);
        let later = thread::Builder::new().name("paths".into()).spawn(move || {
            thread::sleep(STAYING);
            let mut state = lock(&kept);
            if state.users.is_empty() && state.opened == opened {
                state.tether = None;
            }
        });
        if let Err(error) = later {
            log::debug!("Routes go at once: {error}");
            lock(&self.state).tether = None;
        }
    }
}

impl Drop for Paths {
    fn drop(&mut self) {
        lock(&self.state).tether = None;
    }
}

/// Makes an ordinary connection, so that the kernel learns the round trip time.
pub(crate) fn probe(remote: SocketAddr, source: Option<IpAddr>) -> Result<Duration> {
    let failed = || system("The connection that measures the round trip time");
    let socket = Socket::new(
        Domain::for_address(remote),
        Type::STREAM,
        Some(Protocol::TCP),
    )
    .map_err(failed())?;
    if let Some(source) = source {
        socket
            .bind(&SocketAddr::new(source, 0).into())
            .map_err(failed())?;
    }
    let start = Instant::now();
    socket
        .connect_timeout(&remote.into(), PROBE)
        .map_err(failed())?;
    Ok(start.elapsed())
}
