//! What all threads know together: the guests, the limits, the counts.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use prometheus_client::metrics::counter::Counter;

use crate::config::{GuestConfig, Limits};
use crate::metrics::{Metrics, OfGuest, Refusal, Refused};
use crate::splice::Budget;

/// A guest as the proxy knows it.
#[derive(Debug)]
pub(crate) struct Guest {
    pub name: String,
    pub label: OfGuest,
    /// Counters that are touched with every message, looked up once.
    pub to_guest: Counter,
    pub to_client: Counter,
    settings: RwLock<Arc<GuestConfig>>,
    site: RwLock<String>,
    open: AtomicUsize,
    draining: AtomicBool,
}

impl Guest {
    pub(crate) fn new(settings: Arc<GuestConfig>, site: String, metrics: &Metrics) -> Self {
        let name = settings.name.get_ref().clone();
        let label = OfGuest {
            guest: name.clone(),
        };
        Self {
            to_guest: metrics.to_guest.get_or_create(&label).clone(),
            to_client: metrics.to_client.get_or_create(&label).clone(),
            label,
            name,
            settings: RwLock::new(settings),
            site: RwLock::new(site),
            open: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
        }
    }

    pub(crate) fn settings(&self) -> Arc<GuestConfig> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn set_settings(&self, settings: Arc<GuestConfig>) {
        *self
            .settings
            .write()
            .unwrap_or_else(PoisonError::into_inner) = settings;
    }

    /// The site where it is.
    pub(crate) fn site(&self) -> String {
        self.site
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn set_site(&self, site: &str) {
        site.clone_into(&mut self.site.write().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Whether new connections are refused so that the last one ends some day.
    pub(crate) fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Ordering::Relaxed);
    }

    pub(crate) fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
}

/// What all threads share.
#[derive(Debug)]
pub(crate) struct Shared {
    limits: RwLock<Arc<Limits>>,
    pub guests: RwLock<BTreeMap<String, Arc<Guest>>>,
    pub metrics: Metrics,
    pub budget: Budget,
    pub mark: AtomicBool,
    next_id: AtomicU64,
    open: AtomicUsize,
    /// By what [`one_client`] makes of their addresses.
    clients: Mutex<HashMap<IpAddr, usize>>,
}

/// What counts as one client: an IPv4 address, or the 64 bits of an IPv6 network. Whoever has one
/// IPv6 address mostly has all of its network, and could come from another one each time.
fn one_client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = address.to_bits() & (u128::MAX << 64);
            Ipv6Addr::from_bits(network).into()
        }
        four => four,
    }
}

impl Shared {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            budget: Budget::new(limits.buffer_total.0),
            limits: RwLock::new(Arc::new(limits)),
            guests: RwLock::new(BTreeMap::new()),
            metrics: Metrics::new(),
            mark: AtomicBool::new(false),
            next_id: AtomicU64::new(1),
            open: AtomicUsize::new(0),
            clients: Mutex::new(HashMap::new()),
        }
    }

    pub(crate) fn limits(&self) -> Arc<Limits> {
        Arc::clone(&self.limits.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn set_limits(&self, limits: Limits) {
        self.budget.set_limit(limits.buffer_total.0);
        *self.limits.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(limits);
    }

    pub(crate) fn guest(&self, name: &str) -> Option<Arc<Guest>> {
        self.guests
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    /// Whether a configured service is reached at `at` that is not the one of this guest's port.
    pub(crate) fn is_anothers(&self, at: SocketAddr, guest: &str, port: u16) -> bool {
        let guests = self.guests.read().unwrap_or_else(PoisonError::into_inner);
        let ports = |settings: &GuestConfig| -> Vec<u16> {
            let services = settings.reached_at(at);
            services.map(|service| *service.port.get_ref()).collect()
        };
        // Its own first: no configuration has two at one place, and with many connections this is
        // asked often.
        if let Some(own) = guests.get(guest) {
            let ports = ports(&own.settings());
            if !ports.is_empty() {
                return ports.iter().any(|own| *own != port);
            }
        }
        let mut others = guests.values();
        others.any(|other| !ports(&other.settings()).is_empty())
    }

    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Counts a new connection of `client`, unless a limit says no.
    pub(crate) fn admit(
        self: &Arc<Self>,
        guest: &Arc<Guest>,
        client: IpAddr,
    ) -> Result<Admission, Refusal> {
        let limits = self.limits();
        if guest.draining() {
            return Err(Refusal::draining);
        }
        if self.open.load(Ordering::Relaxed) >= limits.connections {
            return Err(Refusal::total_limit);
        }
        if guest.open() >= guest.settings().connections {
            return Err(Refusal::guest_limit);
        }
        let client = one_client(client);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let open = clients.get(&client).copied().unwrap_or(0);
        if open >= limits.connections_per_client {
            return Err(Refusal::client_limit);
        }
        clients.insert(client, open + 1);
        drop(clients);
        self.open.fetch_add(1, Ordering::Relaxed);
        guest.open.fetch_add(1, Ordering::Relaxed);
        self.metrics.accepted.get_or_create(&guest.label).inc();
        self.metrics.open.get_or_create(&guest.label).inc();
        Ok(Admission {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            shared: Arc::clone(self),
            guest: Arc::clone(guest),
            client,
        })
    }

    /// Counts a connection that was taken over: it has its place already.
    pub(crate) fn readmit(
        self: &Arc<Self>,
        id: u64,
        guest: &Arc<Guest>,
        client: IpAddr,
    ) -> Admission {
        let client = one_client(client);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        *clients.entry(client).or_insert(0) += 1;
        drop(clients);
        self.open.fetch_add(1, Ordering::Relaxed);
        guest.open.fetch_add(1, Ordering::Relaxed);
        self.metrics.open.get_or_create(&guest.label).inc();
        Admission {
            id,
            shared: Arc::clone(self),
            guest: Arc::clone(guest),
            client,
        }
    }

    /// The number of the next connection.
    pub(crate) fn next_id(&self) -> u64 {
        self.next_id.load(Ordering::Relaxed)
    }

    /// Goes on counting connections where another program was.
    pub(crate) fn set_next_id(&self, id: u64) {
        self.next_id.store(id, Ordering::Relaxed);
    }

    pub(crate) fn count_refusal(&self, reason: Refusal) {
        self.metrics
            .refused
            .get_or_create(&Refused { reason })
            .inc();
    }
}

/// A connection's place in the counts; dropping it gives the place back.
#[derive(Debug)]
pub(crate) struct Admission {
    pub id: u64,
    shared: Arc<Shared>,
    guest: Arc<Guest>,
    client: IpAddr,
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.shared.open.fetch_sub(1, Ordering::Relaxed);
        self.guest.open.fetch_sub(1, Ordering::Relaxed);
        self.shared
            .metrics
            .open
            .get_or_create(&self.guest.label)
            .dec();
        let mut clients = self
            .shared
            .clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = clients.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn guest(limit: usize) -> Arc<Guest> {
        let text = format!(
            "version = 1\n[[guest]]\nname = \"g\"\naddress = \"10.0.0.1\"\nsite = \"a\"\n\
             connections = {limit}\n[guest.sites.a]\nrouted = true\n"
        );
        let config = Config::parse(&text, "x").unwrap();
        Arc::new(Guest::new(
            Arc::new(config.guests[0].clone()),
            "a".into(),
            &Metrics::new(),
        ))
    }

    #[test]
    fn each_limit_refuses_and_an_end_makes_room() {
        let limits = Limits {
            connections: 3,
            connections_per_client: 2,
            ..Limits::default()
        };
        let shared = Arc::new(Shared::new(limits));
        let (first, second) = (guest(10), guest(1));
        let [a, b, c] = ["192.0.2.1", "192.0.2.2", "192.0.2.3"].map(|ip| ip.parse().unwrap());
        let _one = shared.admit(&first, a).unwrap();
        let two = shared.admit(&first, a).unwrap();
        assert_eq!(shared.admit(&first, a).unwrap_err(), Refusal::client_limit);
        let _three = shared.admit(&second, b).unwrap();
        assert_eq!(shared.admit(&first, c).unwrap_err(), Refusal::total_limit);
        drop(two);
        assert_eq!(shared.admit(&second, c).unwrap_err(), Refusal::guest_limit);
        first.set_draining(true);
        assert_eq!(shared.admit(&first, c).unwrap_err(), Refusal::draining);
        first.set_draining(false);
        let four = shared.admit(&first, c).unwrap();
        assert_eq!((shared.open(), first.open()), (3, 2));
        assert_eq!(four.id, 4);
    }

    #[test]
    fn what_is_reached_at_one_place_is_one_service() {
        let guest = |name: &str, address: &str, site_port: u16| {
            format!(
                "[[guest]]\nname = {name:?}\naddress = {address:?}\nsite = \"a\"\n\
                 [guest.sites.a]\naddress = \"198.51.100.7\"\n[guest.sites.b]\nrouted = true\n\
                 [[guest.service]]\nname = \"s\"\nlisten = []\nport = 5900\n\
                 site_port = {site_port}\n"
            )
        };
        let text = format!(
            "version = 1\n{}{}",
            guest("one", "10.0.0.1", 15900),
            guest("two", "10.0.0.2", 15901)
        );
        let shared = Shared::new(Limits::default());
        for settings in Config::parse(&text, "x").unwrap().guests {
            let guest = Guest::new(Arc::new(settings), "a".into(), &shared.metrics);
            let mut guests = shared.guests.write().unwrap();
            guests.insert(guest.name.clone(), Arc::new(guest));
        }
        let anothers =
            |at: &str, guest: &str, port| shared.is_anothers(at.parse().unwrap(), guest, port);
        for (at, of_one, of_two) in [
            ("198.51.100.7:15900", false, true),
            ("198.51.100.7:15901", true, false),
            ("10.0.0.1:5900", false, true),
            ("198.51.100.7:5900", false, false),
            ("10.0.0.3:5900", false, false),
        ] {
            assert_eq!(anothers(at, "one", 5900), of_one, "{at}");
            assert_eq!(anothers(at, "two", 5900), of_two, "{at}");
        }
        // Another port of the same guest, and a guest that is not named any more.
        assert!(anothers("198.51.100.7:15900", "one", 5901));
        assert!(anothers("198.51.100.7:15900", "gone", 5900));
        assert!(!anothers("198.51.100.7:5901", "gone", 5900));
    }

    #[test]
    fn all_addresses_of_an_ipv6_network_are_one_client() {
        let limits = Limits {
            connections_per_client: 1,
            ..Limits::default()
        };
        let shared = Arc::new(Shared::new(limits));
        let guest = guest(10);
        let admit = |client: &str| shared.admit(&guest, client.parse().unwrap());
        let one = admit("2001:db8:0:1::1").unwrap();
        for same in ["2001:db8:0:1::2", "2001:db8:0:1:ffff:ffff:ffff:ffff"] {
            assert_eq!(admit(same).unwrap_err(), Refusal::client_limit);
        }
        let _other = admit("2001:db8:0:2::1").unwrap();
        drop(one);
        let _again = admit("2001:db8:0:1::2").unwrap();
        let _four = admit("192.0.2.1").unwrap();
        assert_eq!(
            admit("::ffff:192.0.2.1").unwrap_err(),
            Refusal::client_limit
        );
        let _next = admit("192.0.2.2").unwrap();
    }
}
