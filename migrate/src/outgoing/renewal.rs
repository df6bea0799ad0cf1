//! A shadow that is sent once, or again and again: for who watches and steers it, it is one move.
//!
//! ```text
//! pass -> pause -> pass -> pause -> ...        one control socket, one set of limits
//! ```
//!
//! A cancel ends it in a pause too, and limits that were set hold for all passes that follow.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::{Moved, Mover, Request, TICK, ended};
use crate::connections::Untouched;
use crate::control::{Ended, Outcome, Server};
use crate::directories::Directories;
use crate::handover::recovery::Settled;
use crate::report::Observer;
use crate::whereabouts::Whereabouts;

/// The passes of a shadow.
pub struct Renewal<'a> {
    directories: &'a Directories,
    request: &'a Request,
    /// The pause after each pass. Without, there is one pass.
    every: Option<Duration>,
    cancel: &'a Arc<AtomicBool>,
    /// The guest's UUID, once it is known: all passes are of the same one.
    uuid: Option<String>,
    /// None before the first pass, and when all is over.
    server: Option<Server>,
}

impl<'a> Renewal<'a> {
    /// Nothing is sent yet. Once `cancel` is set it ends.
    #[must_use]
    pub fn new(
        directories: &'a Directories,
        request: &'a Request,
        every: Option<Duration>,
        cancel: &'a Arc<AtomicBool>,
    ) -> Self {
        Renewal {
            directories,
            request,
            every,
            cancel,
            uuid: None,
            server: None,
        }
    }

    /// Sends what the other site has not: see [`super::migrate`]. One that fails is the last.
    pub fn pass(&mut self, observer: &mut dyn Observer, follow: &mut dyn FnMut(&Settled)) -> Moved {
        let mut mover = Mover {
            directories: self.directories,
            observer,
            connections: &mut Untouched,
            follow,
            cancel: self.cancel,
            began: Instant::now(),
            uuid: self.uuid.take(),
            server: self.server.take(),
            lost_directly: 0,
        };
        let moved = mover.run(self.request);
        (self.uuid, self.server) = (mover.uuid, mover.server);
        if self.every.is_none() || moved.result.is_err() {
            let request = self.request;
            self.end(|name| ended(name, request, &moved));
        }
        moved
    }

    /// Waits until the next pass. False: there is none.
    pub fn wait(&mut self) -> bool {
        let Some(every) = self.every else {
            return false;
        };
        if let Some(server) = &self.server {
            server.shared().pause("waiting for the next time");
        }
        let until = Instant::now() + every;
        while Instant::now() < until && !self.cancel.load(Ordering::Relaxed) {
            thread::sleep(TICK);
        }
        if !self.cancel.load(Ordering::Relaxed) {
            return true;
        }
        let peer = &self.request.remote.host;
        self.end(|name| Ended {
            outcome: Outcome::Cancelled,
            // It never left.
            guest: Whereabouts::Source,
            what: format!("{peer} has a shadow of {name}, which is not renewed any more"),
        });
        false
    }

    /// Tells those who wait for the end how it came, by the guest's name.
    fn end(&mut self, how: impl FnOnce(&str) -> Ended) {
        if let Some(server) = self.server.take() {
            let name = server.shared().facts().domain;
            server.end(how(&name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::watched;
    use super::*;
    use crate::control::{Bandwidth, Change, Facts, find};
    use crate::guest::xen::checks::Allowed;
    use crate::handover::journal::Role;
    use crate::link::ssh::Remote;
    use crate::shadow::ShadowPolicy;
    use crate::source::Plan;
    use crate::wire::Purpose;

    fn request() -> Request {
        Request {
            domain: "g1".into(),
            remote: Remote::new("ssh", "b", "vmshadow").unwrap(),
            plan: Plan::default(),
            allowed: Allowed::default(),
            tracker: None,
            rate: Some(1_000_000),
            retry: Duration::ZERO,
            purpose: Purpose::Shadow,
            shadows: ShadowPolicy::default(),
            groups: Vec::new(),
            direct: true,
        }
    }

    fn facts(move_id: &str) -> Facts {
        Facts {
            role: Role::Source,
            move_id: move_id.into(),
            domain: "g1".into(),
            uuid: "10000000-0000-4000-8000-000000000001".into(),
            domid: Some(101),
            peer: "b".into(),
            guest_bytes: 96 << 20,
        }
    }

    #[test]
    fn it_is_steered_and_given_up_between_passes_too() {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::under(root.path());
        directories.create().unwrap();
        let (request, cancel) = (request(), Arc::default());
        let every = Some(Duration::from_millis(1));
        let mut renewal = Renewal::new(&directories, &request, every, &cancel);
        let begin = |renewal: &mut Renewal<'_>, move_id| {
            let server = &mut renewal.server;
            watched(server, &directories, facts(move_id), &request, &cancel).unwrap()
        };
        begin(&mut renewal, "first");
        assert!(renewal.wait());
        let mut at = find(&directories, "g1").unwrap().remove(0);
        assert!(at.status.waiting);
        let limit = Change {
            bandwidth: Some(Bandwidth::of_bytes(Some(2_000_000))),
            downtime_ms: None,
        };
        at.client.set(limit).unwrap();
        let next = begin(&mut renewal, "next");
        assert_eq!(next.rate().get(), Some(2_000_000));
        assert_eq!(next.facts().move_id, "next");

        renewal.every = Some(Duration::from_secs(3600));
        let cancelling = thread::spawn(move || at.client.cancel());
        assert!(!renewal.wait());
        let ended = cancelling.join().unwrap().unwrap();
        assert_eq!(ended.outcome, Outcome::Cancelled);
        assert!(
            ended.what.contains("b has a shadow of g1"),
            "{}",
            ended.what
        );
        assert!(find(&directories, "g1").is_err());
    }
}
