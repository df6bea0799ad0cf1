//! The steps of a guest's move, over all threads, and what happens when its lease is over.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::turn::{Turn, Turns};
use super::{PATIENCE, Proxy, lock};
use crate::config::GuestConfig;
use crate::error::{Error, Result};
use crate::event_loop::{Command, Tally};
use crate::guest::Guest;
use crate::repair;
use crate::retarget::block::Block;
use crate::retarget::late::LATE;
use crate::retarget::lease::{self, Leases, Term};
use crate::retarget::path::{self, Warmth};
use crate::retarget::phase::{Asked, Phase};

/// How long a guest whose move was given up is asked whether it is at the new site already.
const LAST_QUESTION: Duration = Duration::from_secs(1);

impl Proxy {
    /// The turns at a guest's move. Not for who holds one of the locks that come after `moves`.
    pub(super) fn turns_of(&self, guest: &str) -> Arc<Turns> {
        Arc::clone(lock(&self.moves).entry(guest.to_owned()).or_default())
    }

    /// Takes the turn at a guest's move for something.
    fn in_turn<T>(
        &self,
        guest: &str,
        what: impl FnOnce(&Guest, &mut Turn<'_>) -> Result<T>,
    ) -> Result<T> {
        // Nothing is kept of names that nobody has.
        self.guest(guest)?;
        let turns = self.turns_of(guest);
        let mut turn = turns.wait();
        // Again, as there may have been a reload while this waited. Now there is none.
        let known = self.guest(guest)?;
        what(&known, &mut turn)
    }

    /// Warms the path to a site, ahead of a move there.
    ///
    /// # Errors
    /// When there is no such guest or site, its move is past this step, or it is another caller's.
    pub fn prepare(&self, guest: &str, site: &str) -> Result<Warmth> {
        self.prepare_for(guest, site, None, None)
    }

    pub(super) fn prepare_for(
        &self,
        guest: &str,
        site: &str,
        term: Option<Term>,
        by: Option<u64>,
    ) -> Result<Warmth> {
        self.in_turn(guest, |known, turn| {
            refuse_unknown(known, site)?;
            if term.is_none() {
                // It would lead another caller's guest elsewhere, and let everybody do so.
                self.refuse_stranger(guest, by)?;
            }
            repair::probe_permission()?;
            self.prepare_now(known, turn, site, term)
        })
    }

    fn prepare_now(
        &self,
        known: &Guest,
        turn: &mut Turn<'_>,
        site: &str,
        term: Option<Term>,
    ) -> Result<Warmth> {
        let (guest, settings) = (known.name.as_str(), known.settings());
        let next = turn
            .phase()
            .after(guest, &Asked::Prepare(site.to_owned()))?;
        // What comes takes its time, and nothing of it is an error.
        turn.set(next);
        let mut warmth = Warmth::default();
        match settings.probe(site) {
            Some(remote) => match path::probe(remote, settings.source) {
                Ok(time) => warmth.connect_ms = Some(time.as_secs_f64() * 1000.0),
                Err(error) => warmth.warnings.push(error.chain()),
            },
            None => warmth.warnings.push(format!(
                "Site {site} has no probe_port: the round trip time is not known ahead"
            )),
        }
        match self.open_path(guest, &settings, site) {
            Ok(false) => {}
            Ok(true) => {
                warmth.window = true;
                self.shared.mark.store(true, Ordering::Release);
            }
            Err(error) => warmth.warnings.push(error.chain()),
        }
        for warning in &warmth.warnings {
            log::warn!("Preparing {guest} for {site}: {warning}");
        }
        match term {
            Some(term) => self.lend(guest, term),
            None => lock(&self.leases.0).end(guest),
        }
        Ok(warmth)
    }

    /// Freezes all connections of a guest that has been suspended. Returns when everything that
    /// it had sent is in. The move is cancelled if it is not released within `lease`, or
    /// [renewed](Self::renew).
    ///
    /// # Errors
    /// When the guest is unknown, or was not prepared, or by another caller.
    pub fn hold(&self, guest: &str, lease: Duration) -> Result<Tally> {
        self.hold_for(guest, Term::within(lease, Instant::now()), None)
    }

    pub(super) fn hold_for(&self, guest: &str, term: Term, by: Option<u64>) -> Result<Tally> {
        self.in_turn(guest, |_, turn| {
            self.refuse_stranger(guest, by)?;
            self.hold_now(guest, turn, term)
        })
    }

    fn hold_now(&self, guest: &str, turn: &mut Turn<'_>, term: Term) -> Result<Tally> {
        let next = turn.phase().after(guest, &Asked::Hold)?;
        turn.set(next);
        self.lend(guest, term);
        self.tally(|reply| Command::Hold {
            guest: guest.to_owned(),
            grace: self.grace,
            reply,
        })
    }

    /// Makes all connections of a held guest anew, towards the site it was prepared for.
    ///
    /// # Errors
    /// When the guest is unknown or not held, or by another caller.
    pub fn retarget(&self, guest: &str) -> Result<Tally> {
        self.retarget_by(guest, None)
    }

    pub(super) fn retarget_by(&self, guest: &str, by: Option<u64>) -> Result<Tally> {
        self.in_turn(guest, |known, turn| {
            self.refuse_stranger(guest, by)?;
            self.retarget_now(known, turn)
        })
    }

    fn retarget_now(&self, known: &Guest, turn: &mut Turn<'_>) -> Result<Tally> {
        let guest = known.name.as_str();
        let next = turn.phase().after(guest, &Asked::Retarget)?;
        let site = next.destination().unwrap_or_default().to_owned();
        let block = self.block(known, &site)?;
        let tally = self.tally(|reply| Command::Retarget {
            guest: guest.to_owned(),
            site: site.clone(),
            mark: self.mark,
            reply,
        })?;
        drop(block);
        turn.set(next);
        Ok(tally)
    }

    /// Where sockets with the new addresses are still there, they go first, and for a moment the
    /// connection has none: nothing may come in then. Twice the time that they are kept: a thread
    /// that is late to close them does no harm.
    fn block(&self, guest: &Guest, site: &str) -> Result<Option<Block>> {
        let back = lock(&self.left)
            .get(&(guest.name.clone(), site.to_owned()))
            .is_some_and(|left| left.elapsed() < LATE * 2);
        // Of what is open, not of what is configured: the connections of a service that is gone
        // are made anew as well.
        let ways = self.ask_all(|reply| Command::Ways {
            guest: guest.name.clone(),
            site: site.to_owned(),
            reply,
        })?;
        let remotes: BTreeSet<SocketAddr> = ways
            .into_iter()
            .flatten()
            .filter_map(|(from, to)| (back || from == to).then_some(to))
            .collect();
        if remotes.is_empty() {
            return Ok(None);
        }
        let number = self.blocks.fetch_add(1, Ordering::Relaxed);
        Block::new(
            &format!("netproxy_{}_{number}", std::process::id()),
            &remotes,
        )
        .map(Some)
    }

    /// Lets all connections go on at the new site. With a `wait`, one connection of each thread
    /// asks the guest until it answers, at most so long, before anything pending is sent.
    ///
    /// # Errors
    /// When the guest is unknown or not re-targeted, or by another caller.
    pub fn release(&self, guest: &str, wait: Duration) -> Result<Tally> {
        self.release_by(guest, wait, None)
    }

    pub(super) fn release_by(&self, guest: &str, wait: Duration, by: Option<u64>) -> Result<Tally> {
        self.in_turn(guest, |known, turn| {
            self.refuse_stranger(guest, by)?;
            self.release_now(known, turn, wait)
        })
    }

    fn release_now(&self, known: &Guest, turn: &mut Turn<'_>, wait: Duration) -> Result<Tally> {
        let guest = known.name.as_str();
        let phase = turn.phase();
        let next = phase.after(guest, &Asked::Release)?;
        let site = phase.destination().unwrap_or_default().to_owned();
        self.note_left(guest, known.site());
        known.set_site(&site);
        let settings = known.settings();
        let routed = settings
            .sites
            .get(&site)
            .is_some_and(|it| it.get_ref().routed);
        // Of a routed guest the way has changed since the move was prepared.
        if routed && let Err(error) = self.open_path(guest, &settings, &site) {
            log::warn!(
                "The way to {guest}, which will answer late: {}",
                error.chain()
            );
        }
        let within = PATIENCE.saturating_add(wait);
        // Who watches the leases of all guests would wait for the turn, and for that long.
        lock(&self.leases.0).outlast(guest, within, Instant::now());
        let released = self.tally_within(within, |reply| Command::Release {
            guest: guest.to_owned(),
            wait,
            reply,
        });
        if released.is_ok() {
            turn.set(next);
            // After what is urgent.
            self.end_move(guest);
        }
        // Also if a thread has failed: new connections go there by now.
        if let Err(error) = self.remember() {
            // The connections are where they should be; only a restart would not know.
            log::error!(
                "Where {guest} is could not be written down: {}",
                error.chain()
            );
        }
        released
    }

    /// Gives the re-targeted sockets of a guest a route of their own, by the way that its address
    /// at `site` has now. False if there is no such site.
    fn open_path(&self, guest: &str, settings: &GuestConfig, site: &str) -> Result<bool> {
        let Some(remote) = settings.reach(site) else {
            return Ok(false);
        };
        self.paths.open(guest, remote, settings.source)?;
        Ok(true)
    }

    /// Lets all connections go on at the old site.
    ///
    /// The old sockets have waited for answers in vain, longer each time, and would go on waiting.
    /// So frozen ones are made anew too, as for a move that ends where it began.
    ///
    /// # Errors
    /// When the guest is unknown or no move is under way.
    pub fn cancel(&self, guest: &str) -> Result<Tally> {
        self.in_turn(guest, |known, turn| self.cancel_now(known, turn))
    }

    fn cancel_now(&self, known: &Guest, turn: &mut Turn<'_>) -> Result<Tally> {
        let guest = known.name.as_str();
        let phase = turn.phase();
        let next = phase.after(guest, &Asked::Cancel)?;
        if let Phase::Retargeted { to } = &phase {
            // The new sockets stay there for a while, as the old ones do after a release.
            self.note_left(guest, to.clone());
        }
        if !matches!(phase, Phase::Prepared { .. })
            && let Err(error) = self.make_anew(known)
        {
            // They go on as they are, a little later.
            log::warn!("Cancelling the move of {guest}: {}", error.chain());
        }
        let tally = self.tally(|reply| Command::Cancel {
            guest: guest.to_owned(),
            reply,
        })?;
        turn.set(next);
        self.end_move(guest);
        Ok(tally)
    }

    /// The guest runs at `site` now, however it came there: settles whatever is open. New
    /// connections go there, and those that are open are re-targeted, late as it may be. Does
    /// nothing if all is so already.
    ///
    /// # Errors
    /// When there is no such guest or site; or why a step that was left to do failed.
    pub fn arrived(&self, guest: &str, site: &str) -> Result<Tally> {
        self.in_turn(guest, |known, turn| {
            refuse_unknown(known, site)?;
            let known_there = known.site() == site;
            match turn.phase() {
                Phase::Settled if known_there => return Ok(Tally::default()),
                Phase::Settled => {}
                Phase::Retargeted { to } if to == site => {}
                // A move that leads nowhere, or elsewhere.
                open if known_there || open.destination() != Some(site) => {
                    let tally = self.cancel_now(known, turn)?;
                    if known_there {
                        return Ok(tally);
                    }
                }
                _ => {}
            }
            self.take_the_rest(known, turn, site)
        })
    }

    /// Takes all steps that are left of a move to `site`, however far it has come. Nobody else's
    /// come between.
    fn take_the_rest(&self, known: &Guest, turn: &mut Turn<'_>, site: &str) -> Result<Tally> {
        let guest = known.name.as_str();
        if turn.phase() == Phase::Settled {
            repair::probe_permission()?;
            self.prepare_now(known, turn, site, None)?;
        }
        if matches!(turn.phase(), Phase::Prepared { .. }) {
            let term = Term::within(lease::DEFAULT, Instant::now());
            self.hold_now(guest, turn, term)?;
        }
        if matches!(turn.phase(), Phase::Held { .. }) {
            self.retarget_now(known, turn)?;
        }
        self.release_now(known, turn, Duration::ZERO)
    }

    /// The move of a held guest may take until `lease` from now.
    ///
    /// # Errors
    /// When the guest is unknown, or nothing is lent: the move has ended, or its lease has. When it
    /// is another caller's.
    pub fn renew(&self, guest: &str, lease: Duration) -> Result<()> {
        self.renew_by(guest, lease, None)
    }

    pub(super) fn renew_by(&self, guest: &str, lease: Duration, by: Option<u64>) -> Result<()> {
        self.guest(guest)?;
        self.refuse_stranger(guest, by)?;
        let (leases, bell) = &*self.leases;
        if !lock(leases).renew(guest, lease, Instant::now()) {
            return Err(Error::LeaseOver(guest.to_owned()));
        }
        bell.notify_all();
        Ok(())
    }

    /// A move that is tied to a caller is nobody else's to go on with: whoever prepared it last
    /// knows where the guest goes.
    fn refuse_stranger(&self, guest: &str, by: Option<u64>) -> Result<()> {
        match lock(&self.leases.0).may_step(guest, by) {
            true => Ok(()),
            false => Err(Error::Another(guest.to_owned())),
        }
    }

    fn lend(&self, guest: &str, term: Term) {
        let (leases, bell) = &*self.leases;
        lock(leases).grant(guest, term);
        bell.notify_all();
    }

    /// Gives a move up, if its lease is over still: `over` is looked at when nobody else can
    /// take a step of it.
    ///
    /// The caller may have died when the guest ran at the new site already. So a re-targeted one
    /// is asked there for a moment, and goes on there if it answers. Not where both sites are
    /// reached by one address: it would answer from either. Connections go on by that address, and
    /// whoever has the guest says so, if it is not at the old site.
    pub(super) fn give_up(&self, guest: &str, why: &str, over: impl Fn(&Leases) -> bool) {
        let turns = self.turns_of(guest);
        let mut turn = turns.wait();
        if !over(&lock(&self.leases.0)) {
            return;
        }
        let Ok(known) = self.guest(guest) else {
            // There is no move of a guest that nobody knows.
            turn.set(Phase::Settled);
            self.end_move(guest);
            return;
        };
        let ended = self.shared.metrics.leases_ended.get_or_create(&known.label);
        ended.inc();
        let phase = turn.phase();
        let answers = match &phase {
            Phase::Retargeted { to } => {
                let settings = known.settings();
                settings.reach(to) != settings.reach(&known.site()) && self.answers(guest)
            }
            _ => false,
        };
        let (result, site) = if answers {
            let to = phase.destination().unwrap_or_default().to_owned();
            (self.release_now(&known, &mut turn, Duration::ZERO), to)
        } else {
            (self.cancel_now(&known, &mut turn), known.site())
        };
        match result {
            Ok(tally) => log::warn!(
                "{why}: {} connections of {guest} go on at {site}, {} failed",
                tally.connections,
                tally.failed
            ),
            Err(error) => log::error!("{why}: giving up {guest}: {}", error.chain()),
        }
        // Whatever came of it, it is not tried for ever.
        lock(&self.leases.0).end(guest);
    }

    /// Whether a re-targeted guest answers at the new site.
    fn answers(&self, guest: &str) -> bool {
        let until = Instant::now() + LAST_QUESTION;
        loop {
            let ask = |reply| Command::Ask {
                guest: guest.to_owned(),
                reply,
            };
            match self.ask_all(ask) {
                Ok(answers) if answers.contains(&true) => return true,
                Ok(_) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                _ => return false,
            }
        }
    }

    /// Makes the frozen sockets of a guest anew, towards the site where it is.
    fn make_anew(&self, guest: &Guest) -> Result<()> {
        let name = || guest.name.clone();
        let site = guest.site();
        self.tally(|reply| Command::Undo {
            guest: name(),
            reply,
        })?;
        self.open_path(&guest.name, &guest.settings(), &site)?;
        let _block = self.block(guest, &site)?;
        let mark = self.mark;
        self.tally(|reply| Command::Retarget {
            guest: name(),
            site: site.clone(),
            mark,
            reply,
        })?;
        Ok(())
    }

    /// Sockets towards a site are not needed any more, and kept for what comes late.
    fn note_left(&self, guest: &str, site: String) {
        lock(&self.left).insert((guest.to_owned(), site), Instant::now());
    }

    fn end_move(&self, guest: &str) {
        lock(&self.leases.0).end(guest);
        self.paths.close(guest);
    }
}

fn refuse_unknown(guest: &Guest, site: &str) -> Result<()> {
    if guest.settings().sites.contains_key(site) {
        return Ok(());
    }
    let (guest, site) = (guest.name.clone(), site.to_owned());
    Err(Error::UnknownSite { guest, site })
}

/// Starts the thread that waits for leases to end.
pub(super) fn watch(proxy: &Arc<Proxy>) -> Result<JoinHandle<()>> {
    let (weak, shared) = (Arc::downgrade(proxy), Arc::clone(&proxy.leases));
    let wait = move || {
        let (leases, bell) = &*shared;
        let mut lent = lock(leases);
        while !lent.is_closed() {
            let now = Instant::now();
            let due = lent.due(now);
            if due.is_empty() {
                let idle = Duration::from_secs(3600);
                let wait = lent.next().map_or(idle, |at| at - now);
                lent = bell
                    .wait_timeout(lent, wait)
                    .map_or_else(|broken| broken.into_inner().0, |(lent, _)| lent);
                continue;
            }
            drop(lent);
            let Some(proxy) = weak.upgrade() else { return };
            for guest in due {
                proxy.give_up(&guest, "The lease of a move is over", |leases| {
                    leases.due(Instant::now()).contains(&guest)
                });
            }
            drop(proxy);
            lent = lock(leases);
        }
    };
    std::thread::Builder::new()
        .name("leases".into())
        .spawn(wait)
        .map_err(crate::error::system("Starting a thread"))
}

#[cfg(test)]
mod tests {
    use std::sync::PoisonError;

    use super::*;
    use crate::config::Config;

    /// A proxy on a directory of its own, with the guest `g`, who knows the sites `a` and `b`.
    fn with_proxy(name: &str, test: impl FnOnce(&Proxy)) {
        let directory =
            std::env::temp_dir().join(format!("netproxy-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let text = format!(
            "version = 1\n[proxy]\nthreads = 1\ncontrol = {:?}\n\
             [[guest]]\nname = \"g\"\naddress = \"192.0.2.1\"\nsite = \"a\"\n\
             [guest.sites.a]\nrouted = true\n[guest.sites.b]\nrouted = true\n",
            directory.join("control"),
        );
        test(&Proxy::start(Config::parse(&text, "test").unwrap(), None).unwrap());
        std::fs::remove_dir_all(&directory).unwrap();
    }

    fn forget_guests(proxy: &Proxy) {
        let guests = proxy.shared.guests.write();
        guests.unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Else nobody could end a move that is nobody's, and there were no reload any more.
    #[test]
    fn a_guest_that_is_removed_while_a_step_waits_is_not_moved() {
        with_proxy("waits", |proxy| {
            let turns = proxy.turns_of("g");
            let turn = turns.wait();
            std::thread::scope(|scope| {
                let steps = [
                    scope.spawn(|| proxy.prepare("g", "b").map(drop)),
                    scope.spawn(|| proxy.arrived("g", "b").map(drop)),
                ];
                // Time to come to the turn.
                std::thread::sleep(Duration::from_millis(100));
                forget_guests(proxy);
                drop(turn);
                for step in steps {
                    let refused = step.join().unwrap();
                    assert!(
                        matches!(refused, Err(Error::UnknownGuest(_))),
                        "{refused:?}"
                    );
                }
            });
            assert_eq!(turns.phase(), Phase::Settled);
        });
    }

    #[test]
    fn the_move_of_a_guest_that_nobody_knows_ends_with_its_lease() {
        with_proxy("unknown", |proxy| {
            let turns = proxy.turns_of("g");
            turns.wait().set(Phase::Prepared { to: "b".into() });
            forget_guests(proxy);
            proxy.give_up("g", "It is over", |_| true);
            assert_eq!(turns.phase(), Phase::Settled);
        });
    }
}
