//! A guest's move, as whoever moves the guest drives it.

use std::time::Duration;

use super::Client;
use crate::error::Result;
use crate::event_loop::Tally;
use crate::retarget::lease;
use crate::retarget::path::Warmth;

/// The part of the proxy in a guest's move, from its preparation to its end.
///
/// ```text
///            mover of the guest                          proxy
///  last rounds:  Move::prepare ────────────────────────▶ path to the new site warmed
///  guest suspended:  hold ─────────────────────────────▶ its connections frozen
///  downtime:  retarget ────────────────────────────────▶ each socket made anew
///  guest runs at the new site, its vif connected:
///             release ─────────────────────────────────▶ all go on there
///  or, any time before:  back, or dropped ─────────────▶ all go on at the old site
/// ```
///
/// It is tied to the process that holds it: if that dies, or drops it, the proxy gives the move
/// up by itself. Should nobody notice its death, as when a whole host is cut off, so does the end
/// of the hold's lease, which a longer move [renews](Self::renew). A re-targeted guest that answers
/// at the new site is then not sent back, where that has an address of its own. After a commit whose release did not come through,
/// [`Client::arrived`] settles it.
///
/// Each step returns within the time it is given, or fails with [`Error::Timeout`]; then nothing
/// is left but to drop it. A step that failed costs connections at worst, never the guest: go
/// on with the guest's move or not, as suits the guest.
///
/// [`Error::Timeout`]: crate::Error::Timeout
///
/// ```no_run
/// # fn move_the_guest() {}
/// # fn main() -> netproxy::Result<()> {
/// use netproxy::control::{Client, Move};
/// use std::{path::Path, time::Duration};
///
/// let client = Client::connect(Path::new("/run/netproxy/netproxy.sock"))?;
/// let (mut connections, warmth) =
///     Move::prepare(client, "desktop", "dublin", Duration::from_secs(10))?;
/// warmth.warnings.iter().for_each(|warning| eprintln!("{warning}"));
/// // The guest is suspended.
/// connections.hold(Duration::from_secs(1))?;
/// connections.retarget(Duration::from_secs(5))?;
/// // It runs at the new site, and can be reached.
/// let tally = connections.release(Duration::ZERO, Duration::from_secs(5))?;
/// println!("{} connections went along, {} did not", tally.connections, tally.failed);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Move {
    client: Client,
    guest: String,
    site: String,
}

impl Move {
    /// Warms the path of `guest` to `site`. What could not be warmed is in the warnings, and
    /// makes the stall longer.
    ///
    /// # Errors
    /// As [`Client::call`]; refused if the proxy knows no such guest or site, or if another move
    /// of the guest has got further than this step.
    pub fn prepare(
        mut client: Client,
        guest: &str,
        site: &str,
        within: Duration,
    ) -> Result<(Self, Warmth)> {
        client.set_patience(within)?;
        let warmth = client.prepare_tied(guest, site)?;
        let (guest, site) = (guest.to_owned(), site.to_owned());
        let prepared = Self {
            client,
            guest,
            site,
        };
        Ok((prepared, warmth))
    }

    /// The guest.
    #[must_use]
    pub fn guest(&self) -> &str {
        &self.guest
    }

    /// The site where it goes.
    #[must_use]
    pub fn site(&self) -> &str {
        &self.site
    }

    /// The guest has been suspended: freezes its connections. Not before: what it sends would be
    /// lost, and its TCP would wait for its own timeout. Takes half a round trip, until all that
    /// it had sent is in.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn hold(&mut self, within: Duration) -> Result<Tally> {
        self.client.set_patience(within)?;
        self.client.hold_tied(&self.guest, lease::DEFAULT)
    }

    /// What is held, or made anew, may wait for [`lease::DEFAULT`] more.
    ///
    /// # Errors
    /// As [`Client::call`]; refused when the lease is over.
    pub fn renew(&mut self, within: Duration) -> Result<()> {
        self.client.set_patience(within)?;
        self.client.renew(&self.guest, lease::DEFAULT)
    }

    /// Makes the connections anew, towards the new site. Nothing is sent yet.
    ///
    /// # Errors
    /// As [`Client::call`]; refused if the guest is not held.
    pub fn retarget(&mut self, within: Duration) -> Result<Tally> {
        self.client.set_patience(within)?;
        self.client.retarget(&self.guest)
    }

    /// The guest runs at the new site: the connections go on there. With a `wait`, the proxy asks
    /// the guest until it answers, at most so long, before it sends what is pending: for who can't
    /// tell when the guest's interface is connected.
    ///
    /// # Errors
    /// As [`Client::call`]. The guest is at the new site all the same: [`Client::arrived`] settles
    /// it later.
    pub fn release(mut self, wait: Duration, within: Duration) -> Result<Tally> {
        self.client.set_patience(within.saturating_add(wait))?;
        self.client.release(&self.guest, wait)
    }

    /// The guest stays where it is: the connections go on there.
    ///
    /// # Errors
    /// As [`Client::call`]. The proxy takes them back by itself then, as this is dropped.
    pub fn back(mut self, within: Duration) -> Result<Tally> {
        self.client.set_patience(within)?;
        self.client.cancel(&self.guest)
    }
}
