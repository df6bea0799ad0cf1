//! Where each guest is, for a restart.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use super::{Proxy, lock};
use crate::error::Result;
use crate::state_file;

impl Proxy {
    /// Where each guest was, as the file has it.
    pub(super) fn remembered(&self) -> Result<BTreeMap<String, String>> {
        match &self.state {
            Some(path) => state_file::load(path),
            None => Ok(BTreeMap::new()),
        }
    }

    /// Writes down where each guest is.
    pub(super) fn remember(&self) -> Result<()> {
        let Some(path) = &self.state else {
            return Ok(());
        };
        // From before it is collected: else who collected first could store last, and older
        // places with it.
        let _alone = lock(&self.remembering);
        let guests = self
            .shared
            .guests
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let sites = guests
            .iter()
            .map(|(name, guest)| (name.clone(), guest.site()))
            .collect();
        drop(guests);
        state_file::note(path, sites)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::config::Config;

    /// A proxy on an unused directory, with guests `0`, `1`, ... who know the sites `a` and `b`.
    fn configuration(directory: &std::path::Path, guests: usize) -> Config {
        let mut text = format!(
            "version = 1\n[proxy]\nthreads = 1\ncontrol = {:?}\nstate = {:?}\n",
            directory.join("control"),
            directory.join("state.json")
        );
        for guest in 0..guests {
            text.push_str(&format!(
                "[[guest]]\nname = \"{guest}\"\naddress = \"192.0.2.{guest}\"\nsite = \"a\"\n\
                 [guest.sites.a]\nrouted = true\n[guest.sites.b]\nrouted = true\n"
            ));
        }
        Config::parse(&text, "test").unwrap()
    }

    #[test]
    fn guests_that_arrive_at_once_are_all_remembered() {
        const GUESTS: usize = 6;
        let directory = std::env::temp_dir().join(format!("netproxy-all-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let proxy = Proxy::start(configuration(&directory, GUESTS), None).unwrap();
        for round in 0..20 {
            let site = if round % 2 == 0 { "b" } else { "a" };
            let start = Barrier::new(GUESTS);
            std::thread::scope(|scope| {
                for guest in 0..GUESTS {
                    let (proxy, start) = (&proxy, &start);
                    scope.spawn(move || {
                        let guest = proxy.guest(&guest.to_string()).unwrap();
                        start.wait();
                        guest.set_site(site);
                        proxy.remember().unwrap();
                    });
                }
            });
            let sites = proxy.remembered().unwrap();
            assert_eq!(sites.len(), GUESTS);
            assert!(sites.values().all(|its| its == site), "{site}: {sites:?}");
        }
        drop(proxy);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
