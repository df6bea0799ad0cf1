//! An edge between the sites: guests on networks of their sites' own, and a netproxy at an address
//! that stays.
//!
//! ```text
//!            10.77.0.0/24, the WAN: xenbr0 of both sites
//!     ┌──────────────────────┬──────────────────────┐
//!  site a 10.77.0.11      edge 10.77.0.30        site b 10.77.0.12
//!     │ 10.7.0.1             10.77.0.X, for clients  │ 10.7.0.1
//!  xenbr1, 10.7.0.0/24    (a namespace at site a)  xenbr1, 10.7.0.0/24
//!     └ guest 10.7.0.X                               └ and here after its move
//! ```
//! Clients ask 10.77.0.X, as they would for a guest on the WAN; whatever the testbed does with a
//! guest goes through the edge then.

use std::fmt::Write;
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::Guest;
use crate::site::{Site, SiteName};
use crate::sites::Testbed;
use crate::{Error, Result};

/// The bridge of a site's own network.
pub const BRIDGE: &str = "xenbr1";

/// The site there; the same at both, as is its MAC address.
pub const GATEWAY: &str = "10.7.0.1";

/// The edge's own address, which guests see.
const SOURCE: &str = "10.77.0.30";

/// What the port of a guest is at its site's address.
const SITE_PORTS: u16 = 20_000;

/// Guests' own connections leave under their site's address.
const MASQUERADE: &str = "nft 'add table ip nat; \
    add chain ip nat out { type nat hook postrouting priority srcnat; }; \
    add rule ip nat out ip saddr 10.7.0.0/24 oifname xenbr0 masquerade'";

/// A server beyond the sites, which tells everybody as whom they came, and echoes.
pub const SERVER: &str = "10.77.0.31:7777";

const SERVE: &str = r"
import socket, threading
listener = socket.create_server(('10.77.0.31', 7777))
def serve(client, name):
    client.sendall((name + '\n').encode())
    while data := client.recv(4096):
        client.sendall(data)
while True:
    client, address = listener.accept()
    threading.Thread(target=serve, args=(client, address[0]), daemon=True).start()
";

const CONFIGURATION: &str = "/etc/netproxy/netproxy.toml";

/// As its unit does: the package's user, two capabilities, and directories that are its own.
/// Only the proxy itself goes on in the background: a shell that waits for it would hold ssh.
const START_PROXY: &str = "install -d -o netproxy -g netproxy -m 750 /run/netproxy || exit 1; \
    capabilities=+net_admin,+net_bind_service; \
    setsid ip netns exec edge setpriv --reuid=netproxy --regid=netproxy --clear-groups \
    --inh-caps=$capabilities --ambient-caps=$capabilities --bounding-set=-all,$capabilities \
    --no-new-privs netproxy /etc/netproxy/netproxy.toml > /var/log/netproxy.log 2>&1 < /dev/null &";

/// How long the proxy may take to start, in emulation.
const START: Duration = Duration::from_secs(120);

/// A netproxy at site a, and the sites' own networks.
pub struct Edge;

impl Edge {
    /// Sets all up for these guests, which are to start at site a. The package has to be installed
    /// at both sites.
    ///
    /// # Errors
    /// When a site refuses.
    pub fn set_up(testbed: &Testbed, guests: &[&Guest]) -> Result<Self> {
        for site in testbed.sites() {
            site.run(&own_network())?;
            site.write(
                "/etc/vmshadow/vmshadow.toml",
                policy(site.name()).as_bytes(),
            )?;
        }
        let site = testbed.site(SiteName::A);
        site.run("mkdir -p /etc/netproxy")?;
        site.write(CONFIGURATION, configuration(guests, false).as_bytes())?;
        site.run(&namespace(guests))?;
        site.run(START_PROXY)?;
        wait_until_ready(site)?;
        Ok(Self)
    }

    /// From now on the guests' own connections leave under their site's address, and are led
    /// through the site where they began after a move. A [`SERVER`] is there for them.
    ///
    /// # Errors
    /// When a site refuses.
    pub fn lead_outgoing(&self, testbed: &Testbed) -> Result<()> {
        for site in testbed.sites() {
            site.run(MASQUERADE)?;
            let policy = policy(site.name()) + &outgoing(site.name());
            site.write("/etc/vmshadow/vmshadow.toml", policy.as_bytes())?;
        }
        let site = testbed.site(SiteName::A);
        site.run("ip -n edge address add 10.77.0.31/24 dev eth0")?;
        site.write("/etc/testbed-server.py", SERVE.as_bytes())?;
        site.run(
            "setsid ip netns exec edge python3 /etc/testbed-server.py > /dev/null 2>&1 < /dev/null &
            for try in $(seq 300); do
                ip netns exec edge ss -Hltn 'sport = :7777' | grep -q . && exit 0
                sleep 0.1
            done
            exit 1",
        )
        .map(drop)
    }

    /// Undoes [`Edge::lead_outgoing`], but for the server.
    ///
    /// # Errors
    /// When a site refuses.
    pub fn leave_outgoing(&self, testbed: &Testbed) -> Result<()> {
        for site in testbed.sites() {
            site.run("nft delete table ip nat")?;
            site.write(
                "/etc/vmshadow/vmshadow.toml",
                policy(site.name()).as_bytes(),
            )?;
        }
        Ok(())
    }

    /// From now on guests are reached by their own addresses, as in a routed overlay. They have to
    /// be at `at`, and whoever moves one has to change the route: [`Edge::route`].
    ///
    /// # Errors
    /// When the proxy does not take it, or site a refuses.
    pub fn reach_by_routes(
        &self,
        testbed: &Testbed,
        guests: &[&Guest],
        at: SiteName,
    ) -> Result<()> {
        for guest in guests {
            self.route(testbed, guest, at)?;
        }
        let site = testbed.site(SiteName::A);
        site.write(CONFIGURATION, configuration(guests, true).as_bytes())?;
        site.run("vmshadow proxy reload").map(drop)
    }

    /// Routes a guest's own address to a site.
    ///
    /// # Errors
    /// When site a refuses.
    pub fn route(&self, testbed: &Testbed, guest: &Guest, to: SiteName) -> Result<()> {
        let route = format!(
            "ip -n edge route replace {} via {} src {SOURCE}",
            guest.own_address(),
            to.address()
        );
        testbed.site(SiteName::A).run(&route).map(drop)
    }

    /// What the proxy has said.
    ///
    /// # Errors
    /// When the site can't be reached.
    pub fn log(&self, testbed: &Testbed) -> Result<String> {
        testbed.site(SiteName::A).run("cat /var/log/netproxy.log")
    }
}

fn wait_until_ready(site: &Site) -> Result<()> {
    let started = Instant::now();
    loop {
        let log = site.run("cat /var/log/netproxy.log 2>/dev/null || true")?;
        if log.lines().any(|line| line == "ready") {
            return Ok(());
        }
        if started.elapsed() > START {
            let what = "the edge is ready".to_owned();
            return Err(Error::Timeout { what, log });
        }
        thread::sleep(Duration::from_millis(300));
    }
}

/// A site's own network, and the way between it and the WAN.
fn own_network() -> String {
    format!(
        "ip link add {BRIDGE} address 00:16:3e:07:00:01 type bridge stp_state 0 forward_delay 0 && \
         ip address add {GATEWAY}/24 dev {BRIDGE} && ip link set {BRIDGE} up && \
         sysctl -q -w net.ipv4.ip_forward=1"
    )
}

/// The edge's host: a network namespace on the WAN.
fn namespace(guests: &[&Guest]) -> String {
    let mut script = format!(
        "ip netns add edge && ip link add edge0 type veth peer name eth0 netns edge && \
         ip link set edge0 master xenbr0 up && ip -n edge link set lo up && \
         ip -n edge link set eth0 up && ip -n edge address add {SOURCE}/24 dev eth0"
    );
    for guest in guests {
        // Infallible for strings.
        let _ = write!(
            script,
            " && ip -n edge address add {}/24 dev eth0",
            guest.address()
        );
    }
    script
}

/// A site's configuration.
fn policy(site: SiteName) -> String {
    let host = match site {
        SiteName::A => String::new(),
        SiteName::B => format!("host = \"{}\"\n", SiteName::A.address()),
    };
    format!(
        "[site]\nkernel_directories = [\"/\"]\ndisk_directories = [\"/\"]\n\
         bridges = {{ {BRIDGE} = \"{BRIDGE}\" }}\n\n[edge]\nsite = \"{site}\"\n{host}"
    )
}

/// What a site does for guests' own connections.
fn outgoing(site: SiteName) -> String {
    format!(
        "\n[edge.outgoing]\nlimit = \"1h\"\n\
         sites.{}.vxlan = {{ local = \"{}\", remote = \"{}\", port = 4789 }}\n",
        site.other(),
        site.address(),
        site.other().address()
    )
}

/// The proxy's configuration. `routed`: guests are reached by their own addresses.
fn configuration(guests: &[&Guest], routed: bool) -> String {
    let mut text = "version = 1\n".to_owned();
    for guest in guests {
        let _ = write!(
            text,
            "\n[[guest]]\nname = \"{}\"\naddress = \"{}\"\nsource = \"{SOURCE}\"\nsite = \"a\"\n",
            guest.name,
            guest.own_address()
        );
        for site in [SiteName::A, SiteName::B] {
            let reach = match routed {
                true => "routed = true\nprobe_address",
                false => "address",
            };
            let _ = write!(
                text,
                "[guest.sites.{site}]\n{reach} = \"{}\"\nprobe_port = 22\n",
                site.address()
            );
        }
        for (name, port) in guest.services() {
            let _ = write!(
                text,
                "[[guest.service]]\nname = \"{name}\"\nlisten = [\"{}:{port}\"]\nport = {port}\n\
                 site_port = {}\n",
                guest.address(),
                SITE_PORTS + port
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_guest_has_an_address_at_the_edge() {
        let guest = Guest {
            behind_edge: true,
            ..Guest::new("g1", 101)
        };
        let text = configuration(&[&guest], false);
        assert!(text.contains("address = \"10.7.0.101\""), "{text}");
        assert!(text.contains("listen = [\"10.77.0.101:7000\"]"), "{text}");
        assert!(text.contains("site_port = 27000"), "{text}");
        let routed = configuration(&[&guest], true);
        assert!(routed.contains("routed = true\nprobe_address = \"10.77.0.12\""));
        assert!(namespace(&[&guest]).contains("add 10.77.0.101/24"));
        assert!(policy(SiteName::B).contains("host = \"10.77.0.11\""));
        assert!(outgoing(SiteName::B).contains("sites.a.vxlan = { local = \"10.77.0.12\""));
        assert!(!policy(SiteName::A).contains("host"));
        assert!(guest.config().contains("bridge=xenbr1"));
        assert!(guest.config().contains("testbed.gateway=10.7.0.1 "));
    }
}
