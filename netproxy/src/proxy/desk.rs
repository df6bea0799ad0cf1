//! Where the control socket's requests are answered.

use std::os::unix::net::UnixStream;
use std::sync::Weak;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Proxy, lock};
use crate::control::{Attendant, Request};
use crate::error::{Error, Result, system};
use crate::retarget::lease::Term;

/// The proxy, as the control socket sees it.
pub(super) struct Desk(pub Weak<Proxy>);

impl Attendant for Desk {
    fn request(
        &self,
        caller: u64,
        stream: &UnixStream,
        request: Request,
    ) -> std::result::Result<serde_json::Value, String> {
        let proxy = self.0.upgrade().ok_or("The proxy is ending")?;
        proxy
            .carry_out(caller, stream, request)
            .map_err(|error| error.chain())
    }

    fn closed(&self, caller: u64) {
        let Some(proxy) = self.0.upgrade() else {
            return;
        };
        let guests = lock(&proxy.leases.0).of(caller);
        for guest in guests {
            proxy.give_up(&guest, "The caller of a move has gone", |leases| {
                leases.of(caller).contains(&guest)
            });
        }
    }
}

impl Proxy {
    fn carry_out(
        &self,
        caller: u64,
        stream: &UnixStream,
        request: Request,
    ) -> Result<serde_json::Value> {
        fn value(result: impl Serialize) -> Result<serde_json::Value> {
            serde_json::to_value(result).map_err(|error| Error::Protocol(error.to_string()))
        }
        let nothing = || Ok(serde_json::json!({}));
        match request {
            Request::List => value(self.list()?),
            Request::Prepare { guest, site, tied } => {
                let term = tied.then(|| Term::of(caller, Instant::now()));
                value(self.prepare_for(&guest, &site, term, Some(caller))?)
            }
            Request::Hold {
                guest,
                lease_ms,
                tied,
            } => {
                let limit = Duration::from_millis(lease_ms);
                let term = Term::within(limit, Instant::now());
                let term = if tied { term.tied_to(caller) } else { term };
                value(self.hold_for(&guest, term, Some(caller))?)
            }
            Request::Renew { guest, lease_ms } => {
                self.renew_by(&guest, Duration::from_millis(lease_ms), Some(caller))?;
                nothing()
            }
            Request::Retarget { guest } => value(self.retarget_by(&guest, Some(caller))?),
            Request::Release { guest, wait_ms } => {
                let wait = Duration::from_millis(wait_ms);
                value(self.release_by(&guest, wait, Some(caller))?)
            }
            Request::Cancel { guest } => value(self.cancel(&guest)?),
            Request::Arrived { guest, site } => value(self.arrived(&guest, &site)?),
            Request::Translation { guest, site } => value(self.reach(&guest, &site)?),
            Request::Drain { guest, on } => {
                self.drain(guest.as_deref(), on)?;
                nothing()
            }
            Request::Reload => {
                self.reload_file()?;
                nothing()
            }
            Request::Upgrade => {
                let caller = stream
                    .try_clone()
                    .map_err(system("The control socket"))?
                    .into();
                // The next program answers, if there is one.
                Err(self.upgrade_for(Some(caller)))
            }
            Request::Metrics => Ok(serde_json::json!({ "text": self.metrics() })),
        }
    }
}
