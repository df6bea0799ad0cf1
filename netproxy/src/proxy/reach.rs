//! How a guest is reached at a site.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::Proxy;
use crate::control::Reach;
use crate::error::Result;
use crate::event_loop::Command;
use crate::site::{Forward, Translation};

impl Proxy {
    /// How a guest is reached at a site, and what the site has to do for that.
    pub(super) fn reach(&self, guest: &str, site: &str) -> Result<Reach> {
        let settings = self.guest(guest)?.settings();
        let mut translation = settings.translation(site)?;
        if let Some(translation) = &mut translation {
            self.add_what_is_open(translation)?;
        }
        Ok(Reach {
            address: settings.address,
            translation,
        })
    }

    /// Connections of services that are not configured any more have to be reached as well.
    fn add_what_is_open(&self, translation: &mut Translation) -> Result<()> {
        let open: BTreeSet<Forward> = self
            .ask_all(|reply| Command::Forwards {
                guest: translation.guest.clone(),
                reply,
            })?
            .into_iter()
            .flatten()
            .collect();
        for forward in open {
            let mut known = translation.forwards.iter();
            if known.any(|known| known.guest_port == forward.guest_port) {
                continue;
            }
            let at = SocketAddr::new(translation.site_address, forward.site_port);
            if self
                .shared
                .is_anothers(at, &translation.guest, forward.guest_port)
            {
                log::warn!(
                    "Connections to port {} of {} can't follow it: another service has {at} now",
                    forward.guest_port,
                    translation.guest
                );
                continue;
            }
            translation.forwards.push(forward);
        }
        Ok(())
    }
}
