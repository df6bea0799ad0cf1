//! Connections that the guest has begun itself, before and after its move.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use netproxy::site::{Detour, Flow, Side, Tunnel, flows_of};

use crate::world::{EDGE, GUEST, World};

/// The addresses by which the sites reach each other, and as which the guest is seen.
const OUTER: [&str; 2] = ["10.2.1.2", "10.2.2.2"];

/// A server beyond the sites: it says to everybody as whom they came.
struct Server {
    tcp: SocketAddr,
    udp: SocketAddr,
}

impl Server {
    fn start(world: &World) -> Self {
        let (tcp, udp) = world.in_namespace("edge", || {
            let tcp = TcpListener::bind((EDGE, 0)).unwrap();
            (tcp, UdpSocket::bind((EDGE, 0)).unwrap())
        });
        let server = Self {
            tcp: tcp.local_addr().unwrap(),
            udp: udp.local_addr().unwrap(),
        };
        std::thread::spawn(move || {
            for stream in tcp.incoming() {
                std::thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let name = stream.peer_addr().unwrap().ip().to_string();
                    stream.write_all(format!("{name:16}").as_bytes()).unwrap();
                    let mut other = stream.try_clone().unwrap();
                    let _ = std::io::copy(&mut stream, &mut other);
                });
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 100];
            while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(from.ip().to_string().as_bytes(), from);
            }
        });
        server
    }

    /// A new connection of the guest, and as whom it is seen.
    fn connect(&self, world: &World) -> (TcpStream, String) {
        let to = self.tcp;
        let mut stream = world.in_namespace("guest", move || TcpStream::connect(to).unwrap());
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let mut name = [0; 16];
        stream.read_exact(&mut name).unwrap();
        let name = String::from_utf8_lossy(&name).trim().to_owned();
        (stream, name)
    }

    /// As whom a datagram from a socket of the guest is seen.
    fn ask(&self, socket: &UdpSocket) -> String {
        let mut name = [0; 100];
        // Datagrams may be lost; nobody else sends any.
        for _ in 0..100 {
            socket.send_to(b"who am I?", self.udp).unwrap();
            if let Ok(length) = socket.recv(&mut name) {
                return String::from_utf8_lossy(&name[..length]).into_owned();
            }
        }
        panic!("The server does not answer");
    }
}

fn exchange(stream: &mut TcpStream, length: usize) {
    let data: Vec<u8> = (0..length)
        .map(|i| u8::try_from(i % 251).unwrap())
        .collect();
    let mut writer = stream.try_clone().unwrap();
    let sent = data.clone();
    let writing = std::thread::spawn(move || writer.write_all(&sent).unwrap());
    let mut answer = vec![0; length];
    stream.read_exact(&mut answer).unwrap();
    writing.join().unwrap();
    assert!(answer == data);
}

/// What a guest behind masquerading sites needs beside the world as it is.
fn prepare(world: &World) {
    world.in_namespace("edge", || {
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    });
    for (index, site) in ["a", "b"].into_iter().enumerate() {
        let net = index + 1;
        world.ip(site, &format!("route add 10.2.0.0/16 via 10.2.{net}.1"));
        world.in_namespace(site, || {
            let rules = format!(
                "add table ip nat; \
                 add chain ip nat out {{ type nat hook postrouting priority srcnat; }}; \
                 add rule ip nat out ip saddr {GUEST} oifname != lan0 masquerade"
            );
            crate::world::run("nft", &[&rules]);
        });
    }
}

fn detour(side: Side, flows: &[Flow], limit: Duration) -> Detour {
    let outer = OUTER.map(|address| address.parse::<IpAddr>().unwrap());
    let (local, remote) = match side {
        Side::Old => (outer[0], outer[1]),
        Side::New => (outer[1], outer[0]),
    };
    Detour {
        guest: "desktop".into(),
        guest_address: GUEST.parse().unwrap(),
        number: 1,
        side,
        tunnel: Tunnel::Vxlan {
            local,
            remote,
            port: 4789,
        },
        limit,
        flows: flows.to_vec(),
    }
}

fn udp(world: &World) -> UdpSocket {
    let socket = world.in_namespace("guest", || UdpSocket::bind("0.0.0.0:0").unwrap());
    socket
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    socket
}

/// Every rule, routing rule, route and device of a site. What IPv6 does by itself, in its own
/// time, is left out.
fn everything(world: &World, site: &str) -> String {
    let devices = world.in_namespace(site, || {
        let links = crate::world::run("ip", &["-brief", "link"]);
        let names = links.lines().filter_map(|line| line.split(' ').next());
        names.collect::<Vec<_>>().join(" ")
    });
    world.rules(site)
        + &world.in_namespace(site, || {
            crate::world::run("ip", &["-4", "route", "show", "table", "all"])
        })
        + &devices
}

#[test]
fn old_flows_leave_by_the_old_site_and_new_ones_by_the_new() {
    let world = World::new(Duration::from_millis(4));
    prepare(&world);
    let server = Server::start(&world);
    let before = ["a", "b"].map(|site| everything(&world, site));
    let (mut stream, name) = server.connect(&world);
    assert_eq!(name, OUTER[0]);
    exchange(&mut stream, 100_000);
    let socket = udp(&world);
    assert_eq!(server.ask(&socket), OUTER[0]);
    // The move.
    world.place(None);
    let flows = world.in_namespace("a", || flows_of(GUEST.parse().unwrap()).unwrap());
    let of = |port: u16| flows.iter().filter(|flow| flow.guest_port == port).count();
    assert_eq!(of(stream.local_addr().unwrap().port()), 1);
    assert_eq!(of(socket.local_addr().unwrap().port()), 1);
    let hour = Duration::from_secs(3600);
    for (site, side) in [("b", Side::New), ("a", Side::Old)] {
        let detour = detour(side, &flows, hour);
        world.in_namespace(site, move || {
            detour.apply().unwrap();
            // Again, as after a crash: it replaces itself.
            detour.apply().unwrap();
            assert!(!detour.is_over());
        });
    }
    world.place(Some("b"));
    exchange(&mut stream, 1_000_000);
    assert_eq!(server.ask(&socket), OUTER[0]);
    // What begins now is seen as the new site.
    let (mut new, name) = server.connect(&world);
    assert_eq!(name, OUTER[1]);
    exchange(&mut new, 100_000);
    assert_eq!(server.ask(&udp(&world)), OUTER[1]);
    // And back again: no detour is needed where it all began.
    world.place(None);
    for (site, side) in [("b", Side::New), ("a", Side::Old)] {
        let detour = detour(side, &flows, hour);
        world.in_namespace(site, move || {
            detour.remove().unwrap();
            detour.remove().unwrap();
            assert!(detour.is_over());
        });
    }
    world.place(Some("a"));
    exchange(&mut stream, 100_000);
    assert_eq!(["a", "b"].map(|site| everything(&world, site)), before);
}

#[test]
fn a_detour_ends_by_itself() {
    let world = World::new(Duration::from_millis(4));
    prepare(&world);
    let server = Server::start(&world);
    let socket = udp(&world);
    assert_eq!(server.ask(&socket), OUTER[0]);
    world.place(None);
    let flows = world.in_namespace("a", || flows_of(GUEST.parse().unwrap()).unwrap());
    for (site, side) in [("b", Side::New), ("a", Side::Old)] {
        let detour = detour(side, &flows, Duration::from_secs(1));
        world.in_namespace(site, move || detour.apply().unwrap());
    }
    world.place(Some("b"));
    crate::edge::wait_until(|| {
        ["a", "b"].iter().all(|site| {
            let detour = detour(Side::New, &[], Duration::from_secs(1));
            world.in_namespace(site, move || detour.is_over())
        })
    });
    // It leaves as any new one, though nobody has removed anything.
    assert_eq!(server.ask(&socket), OUTER[1]);
}

/// The edge and the site b reach each other by IPv6 as well.
fn of_both_families() -> World {
    let world = World::new(Duration::from_millis(4));
    world.ip("edge", "-6 address add fd00:2::1/64 dev to-b nodad");
    world.ip("b", "-6 address add fd00:2::2/64 dev up0 nodad");
    world
}

/// Tunnels of other guests come from other sites, to the same port. The sites may reach each other
/// by another family than the guest's.
#[test]
fn a_detour_guards_its_own_network_only() {
    let world = of_both_families();
    let before = everything(&world, "b");
    for (family, [edge, local, remote]) in [
        ("ip", ["10.2.2.1", OUTER[1], OUTER[0]]),
        ("ip6", ["fd00:2::1", "fd00:2::2", "fd00:1::2"]),
    ] {
        // Those that nobody but the other site may send into, and somebody else's.
        let (own, others) = (0x76_0001_u32, 0x76_0002_u32);
        let mut detour = detour(Side::New, &[], Duration::from_secs(60));
        detour.tunnel = Tunnel::Vxlan {
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
            port: 4789,
        };
        let made = detour.clone();
        world.in_namespace("b", move || {
            made.apply().unwrap();
            let counted = [("own", own), ("others", others)].map(|(name, network)| {
                format!(
                    "add counter {family} seen {name}; add rule {family} seen after \
                     udp dport 4789 @th,96,24 {network} counter name {name}; "
                )
            });
            let rules = format!(
                "add table {family} seen; \
                 add chain {family} seen after {{ type filter hook input priority 0; }}; {}{}",
                counted[0], counted[1]
            );
            crate::world::run("nft", &[&rules]);
        });
        world.in_namespace("edge", move || {
            let socket = UdpSocket::bind((edge, 0)).unwrap();
            for network in [own, others] {
                let mut packet = vec![8, 0, 0, 0];
                packet.extend((network << 8).to_be_bytes());
                socket.send_to(&packet, (local, 4789)).unwrap();
            }
        });
        let seen = |name: &'static str| {
            let text = world.in_namespace("b", move || {
                crate::world::run("nft", &["list", "counter", family, "seen", name])
            });
            text.contains("packets 1 ")
        };
        // The second one was sent after the first.
        crate::edge::wait_until(|| seen("others"));
        assert!(!seen("own"), "{family}");
        world.in_namespace("b", move || {
            detour.remove().unwrap();
            crate::world::run("nft", &["delete", "table", family, "seen"]);
        });
        assert_eq!(everything(&world, "b"), before);
    }
}

/// Half a detour is worse than none.
#[test]
fn a_detour_that_can_not_be_made_leaves_nothing() {
    let world = World::new(Duration::from_millis(4));
    let before = everything(&world, "a");
    let mut detour = detour(Side::Old, &[], Duration::from_secs(60));
    detour.tunnel = Tunnel::Device {
        name: "nowhere0".into(),
        gateway: None,
    };
    world.in_namespace("a", move || {
        let error = detour.apply().unwrap_err().to_string();
        assert!(error.contains("nowhere0"), "{error}");
    });
    assert_eq!(everything(&world, "a"), before);
}

/// A move that was never settled went through another tunnel: nothing of that stays behind.
#[test]
fn a_detour_replaces_one_with_another_tunnel() {
    let world = of_both_families();
    let before = everything(&world, "b");
    let vxlan = |local: &str, remote: &str| Tunnel::Vxlan {
        local: local.parse().unwrap(),
        remote: remote.parse().unwrap(),
        port: 4789,
    };
    let device = Tunnel::Device {
        name: "up0".into(),
        gateway: Some("10.2.2.1".parse().unwrap()),
    };
    let (four, six) = (vxlan(OUTER[1], OUTER[0]), vxlan("fd00:2::2", "fd00:1::2"));
    for (first, second) in [
        (&four, &device),
        (&six, &device),
        (&four, &six),
        (&six, &four),
    ] {
        let of = |tunnel: &Tunnel| Detour {
            tunnel: tunnel.clone(),
            ..detour(Side::New, &[], Duration::from_secs(60))
        };
        let apply = |tunnel: &Tunnel| {
            let detour = of(tunnel);
            world.in_namespace("b", move || detour.apply().unwrap());
        };
        let remove = || {
            let detour = of(second);
            world.in_namespace("b", move || detour.remove().unwrap());
            assert_eq!(everything(&world, "b"), before);
        };
        apply(second);
        let alone = everything(&world, "b");
        remove();
        apply(first);
        apply(second);
        assert_eq!(everything(&world, "b"), alone, "{first:?} {second:?}");
        remove();
    }
}
