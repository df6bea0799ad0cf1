//! The connections of a guest that leaves: what [`migrate`] says when, told to the proxy.

use std::net::IpAddr;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, anyhow};
use migrate::connections::{Connections, Kept};
use migrate::directories::Directories;
use netproxy::control::{Client, Move};
use netproxy::site::{Side, flows_of, pack_flows};

use super::outgoing::Settings;
use super::{Detours, Edge, refused};

/// How long warming the path may take, while the guest runs.
const PREPARE: Duration = Duration::from_secs(20);

/// How long a step may take, while it is silent.
const STEP: Duration = Duration::from_secs(20);

/// How often a hold is renewed, while the guest crosses.
const RENEWAL: Duration = Duration::from_secs(30);

/// How long the guest may take to answer at the other site: until its interface is connected.
const REACHED: Duration = Duration::from_secs(20);

/// The connections of one guest at the edge.
pub struct Departure {
    edge: Edge,
    guest: String,
    uuid: String,
    detours: Detours,
    state: State,
    /// Where its own connections are to be led, if they are: the site, and the guest's address.
    outgoing: Option<(String, IpAddr)>,
    /// This site's part of that, under way.
    leading: Option<JoinHandle<()>>,
}

enum State {
    /// The edge does not know the guest, or the move has not come so far.
    Idle,
    /// They could follow to this site.
    Accepted { client: Client, site: String },
    /// The path there is warm.
    Prepared(Move),
    /// They are frozen and made anew, in the background.
    Moving { site: String, steps: Steps },
}

/// The steps while the guest is suspended, under way; then the hold is renewed until it ends.
struct Steps {
    thread: JoinHandle<(Move, netproxy::Result<()>)>,
    /// Ends the renewing when dropped.
    crossing: Sender<()>,
}

impl Steps {
    fn begin(mut connections: Move) -> Self {
        let (crossing, crossed) = mpsc::channel();
        let thread = thread::spawn(move || {
            let stepped = connections
                .hold(STEP)
                .and_then(|_| connections.retarget(STEP))
                .map(drop);
            while stepped.is_ok() && crossed.recv_timeout(RENEWAL) == Err(RecvTimeoutError::Timeout)
            {
                // If that fails, so does the release, which knows what to do.
                if let Err(error) = connections.renew(STEP) {
                    log::warn!("{}", error.chain());
                    break;
                }
            }
            (connections, stepped)
        });
        Self { thread, crossing }
    }

    fn end(self) -> thread::Result<(Move, netproxy::Result<()>)> {
        drop(self.crossing);
        self.thread.join()
    }
}

impl Departure {
    /// The connections of `guest`, by its name and UUID.
    pub fn new(edge: Edge, guest: &str, uuid: &str, directories: &Directories) -> Self {
        Departure {
            edge,
            guest: guest.to_owned(),
            uuid: uuid.to_owned(),
            detours: Detours::new(directories),
            state: State::Idle,
            outgoing: None,
            leading: None,
        }
    }

    /// What was set up for its own connections stays, or is as before.
    fn settle_outgoing(&mut self, here: bool) {
        if self.leading.take().is_some_and(|work| work.join().is_err()) {
            log::error!("Leading the guest's own connections ended by a panic");
        }
        if let Err(error) = self.detours.settle(&self.guest, here) {
            log::warn!("The detour of {} may be wrong: {error:#}", self.guest);
        }
    }

    fn take(&mut self) -> State {
        std::mem::replace(&mut self.state, State::Idle)
    }

    fn accept(&mut self, site: Option<&str>) -> anyhow::Result<()> {
        let mut client = self.edge.connect()?;
        let Some(known) = self.edge.look_up(&mut client, &self.guest)? else {
            log::info!("The edge does not know {}", self.guest);
            return Ok(());
        };
        let now = known.site;
        if now != self.edge.site {
            return Err(anyhow!(
                "The edge has {} at the site {now}, and this is {}; run: vmshadow proxy arrived {}",
                self.guest,
                self.edge.site,
                self.guest
            ));
        }
        let site = site.context("The destination does not say what the edge calls it")?;
        if site == now {
            return Err(anyhow!(
                "The destination calls itself {site} at the edge, and so does this host"
            ));
        }
        // It knows the site, or says so.
        let reach = client.reach(&self.guest, site)?;
        let leads = |settings: &Settings| settings.leads_to(site);
        if self.edge.outgoing.as_ref().is_some_and(leads) {
            self.outgoing = Some((site.to_owned(), reach.address));
        }
        self.state = State::Accepted {
            client,
            site: site.to_owned(),
        };
        Ok(())
    }

    /// Waits for the steps, and releases the connections at the new site.
    fn release(&self, site: &str, steps: Steps) -> anyhow::Result<Kept> {
        let released = steps
            .end()
            .map_err(|_| anyhow!("A step of the move at the edge has panicked"))
            .and_then(|(connections, stepped)| {
                stepped?;
                Ok(connections.release(REACHED, STEP)?)
            });
        let tally = match released {
            Ok(tally) => tally,
            Err(error) => {
                log::warn!("{error:#}");
                // Late is better than never: the proxy takes along what is still open.
                self.edge
                    .connect()
                    .and_then(|mut client| Ok(client.arrived(&self.guest, site)?))
                    .with_context(|| {
                        format!(
                            "The edge still has {} here; run at the destination: \
                             vmshadow proxy arrived {}",
                            self.guest, self.guest
                        )
                    })?
            }
        };
        Ok(Kept {
            kept: tally.connections as u64,
            closed: tally.failed as u64,
        })
    }
}

impl Connections for Departure {
    fn accepted(&mut self, site: Option<&str>) -> migrate::error::Result<()> {
        self.accept(site).map_err(|error| {
            refused(&error.context(format!(
                "Connections to {} could not follow (--no-edge leaves them)",
                self.guest
            )))
        })
    }

    fn prepare(&mut self) -> migrate::error::Result<()> {
        let State::Accepted { client, site } = self.take() else {
            return Ok(());
        };
        let (prepared, warmth) =
            Move::prepare(client, &self.guest, &site, PREPARE).map_err(|error| {
                refused(&anyhow!(error).context("The edge can't prepare for the move"))
            })?;
        for warning in warmth.warnings {
            log::warn!("{warning}");
        }
        self.state = State::Prepared(prepared);
        Ok(())
    }

    fn suspended(&mut self) {
        let State::Prepared(connections) = self.take() else {
            return;
        };
        self.state = State::Moving {
            site: connections.site().to_owned(),
            steps: Steps::begin(connections),
        };
    }

    fn outgoing(&mut self) -> Option<Vec<u8>> {
        let (site, address) = self.outgoing.take()?;
        let flows = match flows_of(address) {
            Ok(flows) => flows,
            Err(error) => {
                log::warn!(
                    "The own connections of {} end: {}",
                    self.guest,
                    error.chain()
                );
                return None;
            }
        };
        let bytes = pack_flows(&flows);
        let settings = self.edge.outgoing.as_ref()?;
        let detour = settings.detour(&self.guest, address, Side::Old, &site, flows)?;
        let (detours, uuid) = (self.detours.clone(), self.uuid.clone());
        self.leading = Some(thread::spawn(move || {
            let guest = detour.guest.clone();
            if let Err(error) = detours.set(&uuid, detour) {
                log::warn!("The own connections of {guest} may end: {error:#}");
            }
        }));
        Some(bytes)
    }

    fn moved(&mut self) -> Option<migrate::error::Result<Kept>> {
        self.settle_outgoing(false);
        let State::Moving { site, steps } = self.take() else {
            return None;
        };
        Some(self.release(&site, steps).map_err(|error| refused(&error)))
    }

    fn stayed(&mut self) {
        self.settle_outgoing(true);
        // Dropped before its end, the proxy takes everything back by itself.
        if let State::Moving { steps, .. } = self.take()
            && let Ok((connections, _)) = steps.end()
            && let Err(error) = connections.back(STEP)
        {
            log::warn!("{}", error.chain());
        }
    }
}
