//! The program itself: its privileges, its end in the middle of a move, its successor.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use netproxy::config::Config;
use netproxy::control::Client;

use crate::edge::{
    Edge, LEASE, configuration, echoing, exchange, exchange_all, exchange_with, hears,
    many_echoing, wait_until,
};
use crate::streams::{all_kinds, one_of_each};
use crate::traffic::serve;
use crate::world;
use crate::world::World;

/// A directory of one test: the program's configuration, and where it is asked.
struct Place {
    directory: std::path::PathBuf,
    control: std::path::PathBuf,
    file: std::path::PathBuf,
}

impl Place {
    fn new(world: &World, name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("netproxy-{name}-{}", world.ns("x")));
        std::fs::create_dir_all(&directory).unwrap();
        let control = directory.join("control");
        let file = directory.join("proxy.toml");
        let text = configuration(&control.display().to_string(), "", false);
        std::fs::write(&file, text).unwrap();
        Self {
            directory,
            control,
            file,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Runs the program in the edge's namespace; returns when it is ready.
fn start_program(world: &World, file: &std::path::Path) -> std::process::Child {
    let file = file.to_owned();
    let mut child = world.in_namespace("edge", move || {
        std::process::Command::new(env!("CARGO_BIN_EXE_netproxy"))
            .arg(file)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    });
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while line != "ready\n" {
        line.clear();
        let read = std::io::BufRead::read_line(&mut lines, &mut line).unwrap();
        assert!(read > 0, "The program ended before it was ready");
    }
    child
}

#[test]
fn an_ordinary_user_with_one_capability_is_enough() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let place = Place::new(&world, "user");
    std::os::unix::fs::chown(&place.directory, Some(65534), Some(65534)).unwrap();
    // The program itself must be reachable for that user.
    let program = place.directory.join("netproxy");
    std::fs::copy(env!("CARGO_BIN_EXE_netproxy"), &program).unwrap();
    let words = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let capability = [
        "--inh-caps=+net_admin",
        "--ambient-caps=+net_admin",
        "--bounding-set=-all,+net_admin",
    ];
    let (path, binary) = (place.file.clone(), program.clone());
    let mut child = world.in_namespace("edge", move || {
        std::process::Command::new(words[0])
            .args(&words[1..])
            .args(capability)
            .arg(binary)
            .arg(path)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap()
    });
    wait_until(|| Client::connect(&place.control).is_ok());
    let mut stream = echoing(&world);
    exchange(&mut stream, b"before");
    let mut client = Client::connect(&place.control).unwrap();
    // There and back: the way back needs a rule too.
    for to in ["b", "a"] {
        let warmth = client.prepare("desktop", to).unwrap();
        assert!(warmth.warnings.is_empty(), "{warmth:?}");
        world.place(None);
        stream.write_all(b"under way").unwrap();
        client.hold("desktop", LEASE).unwrap();
        assert_eq!(client.retarget("desktop").unwrap().connections, 1);
        world.place(Some(to));
        assert_eq!(
            client
                .release("desktop", Duration::ZERO)
                .unwrap()
                .connections,
            1
        );
        hears(&mut stream, b"under way");
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Nobody is turned away: it is not counted as that.
#[test]
fn clients_wait_while_there_are_no_descriptors() {
    let world = World::new(Duration::from_millis(1));
    serve(&world, 5900);
    let place = Place::new(&world, "few");
    let mut child = start_program(&world, &place.file);
    let mut client = Client::connect(&place.control).unwrap();
    client.list().unwrap();
    let id = child.id().to_string();
    let limit = |descriptors: usize| {
        let limit = format!("--nofile={descriptors}:");
        world::run("prlimit", &["--pid", &id, &limit]);
    };
    let open = std::fs::read_dir(format!("/proc/{id}/fd")).unwrap().count();
    limit(open);
    let mut stream = echoing(&world);
    let mut metrics = || {
        let answer = client.call(&netproxy::control::Request::Metrics).unwrap();
        answer["text"].as_str().unwrap().to_owned()
    };
    // It is tried again.
    wait_until(|| metrics().contains("netproxy_accept_pauses_total 3"));
    assert!(!metrics().contains("netproxy_refused_total{"));
    limit(open + 100);
    exchange(&mut stream, b"served");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn killed_in_the_middle_nothing_is_left_behind() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let place = Place::new(&world, "kill");
    let rules = world.rules("edge");
    for steps in 0..4 {
        world.place(Some("a"));
        let mut child = start_program(&world, &place.file);
        let mut stream = echoing(&world);
        exchange(&mut stream, b"before");
        let mut client = Client::connect(&place.control).unwrap();
        let warmth = client.prepare("desktop", "b").unwrap();
        assert!(warmth.window, "{warmth:?}");
        assert_ne!(world.rules("edge"), rules, "A move has a routing rule");
        if steps > 0 {
            world.place(None);
            client.hold("desktop", LEASE).unwrap();
        }
        if steps > 1 {
            client.retarget("desktop").unwrap();
        }
        if steps > 2 {
            world.place(Some("b"));
            client.release("desktop", Duration::ZERO).unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        wait_until(|| world.rules("edge") == rules);
        let table = world.in_namespace("edge", || {
            world::run("ip", &["route", "show", "table", "all"])
        });
        assert!(!table.contains("initcwnd"), "{table}");
    }
}

/// Another program takes over between the moves, when some connections are not proved yet and old
/// sockets are kept still; during a move it may not.
#[test]
fn upgrades_between_moves() {
    let world = World::new(Duration::from_millis(8));
    serve(&world, 5900);
    let place = Place::new(&world, "upgrade");
    let rules = world.rules("edge");
    let mut child = start_program(&world, &place.file);
    let streams = one_of_each(&world, &all_kinds());
    let connect = || Client::connect(&place.control).unwrap();
    wait_until(|| connect().list().unwrap().connections.len() == streams.len());
    for round in 0..12 {
        let to = if round % 2 == 0 { "b" } else { "a" };
        let mut client = connect();
        client.prepare("desktop", to).unwrap();
        world.place(None);
        client.hold("desktop", LEASE).unwrap();
        let refused = client.upgrade().unwrap_err().to_string();
        assert!(refused.contains("desktop"), "{refused}");
        assert_eq!(client.retarget("desktop").unwrap().failed, 0);
        world.place(Some(to));
        let released = client.release("desktop", Duration::ZERO).unwrap();
        assert_eq!(released.failed, 0);
        client.upgrade().unwrap();
        assert_eq!(connect().list().unwrap().guests[0].site, to);
        std::thread::sleep(Duration::from_millis(40));
    }
    for stream in streams {
        assert!(stream.finish() > 0);
    }
    wait_until(|| world.rules("edge") == rules);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// On the way back soon after, sockets with the same addresses have to go first, and a rule stands
/// in for them. The program is killed while that rule is there.
#[test]
fn killed_while_sockets_are_replaced_nothing_is_left_behind() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let place = Place::new(&world, "replaced");
    let write = |name: &str, text: &dyn Fn(&str) -> String| {
        let control = place.directory.join(format!("{name}.control"));
        let file = place.directory.join(format!("{name}.toml"));
        std::fs::write(&file, text(&control.display().to_string())).unwrap();
        (file, control)
    };
    // Another proxy on the same edge, with another guest, who lives with the client.
    let (other, _) = write("other", &|control| {
        format!(
            "version = 1\n[proxy]\ncontrol = {control:?}\nmark = 7\ntable = 7\n[[guest]]\n\
             name = \"other\"\naddress = \"10.1.0.2\"\nsite = \"a\"\n[guest.sites.a]\n\
             routed = true\n[[guest.service]]\nname = \"echo\"\n\
             listen = [\"10.1.0.1:5901\"]\nport = 7000\n"
        )
    });
    let listener = world.in_namespace("client", || {
        std::net::TcpListener::bind("10.1.0.2:7000").unwrap()
    });
    let mut bystander = start_program(&world, &other);
    let mut outer = world.in_namespace("client", || TcpStream::connect("10.1.0.1:5901").unwrap());
    let (mut inner, _) = listener.accept().unwrap();
    exchange_with(&mut outer, &mut inner, b"before");

    let (file, control) = write("proxy", &|control| configuration(control, "", false));
    let rules = world.rules("edge");
    for _ in 0..3 {
        world.place(Some("a"));
        let mut child = start_program(&world, &file);
        let mut streams = many_echoing(&world, 300);
        exchange_all(&mut streams, b"before");
        let mut client = Client::connect(&control).unwrap();
        client.prepare("desktop", "b").unwrap();
        world.place(None);
        client.hold("desktop", LEASE).unwrap();
        client.retarget("desktop").unwrap();
        world.place(Some("b"));
        client.release("desktop", Duration::ZERO).unwrap();
        exchange_all(&mut streams, b"there");
        world.place(None);
        // The rule is there for a moment only, and may be missed.
        let replacing = loop {
            client.prepare("desktop", "a").unwrap();
            client.hold("desktop", LEASE).unwrap();
            let mut caller = Client::connect(&control).unwrap();
            let replacing = std::thread::spawn(move || caller.retarget("desktop"));
            let blocks = || {
                let tables = world.in_namespace("edge", || world::run("nft", &["list", "tables"]));
                tables.contains("inet netproxy_")
            };
            let mut seen = false;
            while !seen && !replacing.is_finished() {
                seen = blocks();
            }
            if seen {
                break replacing;
            }
            replacing.join().unwrap().unwrap();
            client.cancel("desktop").unwrap();
        };
        child.kill().unwrap();
        child.wait().unwrap();
        let _ = replacing.join().unwrap();
        wait_until(|| world.rules("edge") == rules);
        exchange_with(&mut outer, &mut inner, b"still there");
    }
    bystander.kill().unwrap();
    bystander.wait().unwrap();
}

/// A socket that is made anew in its place is gone for a moment, and a rule stands in for it, also
/// when the configuration does not name its service any more.
#[test]
fn a_service_that_is_gone_has_a_rule_for_its_connections() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    let edge = Edge::new(&world, "");
    let mut streams = many_echoing(&world, 100);
    exchange_all(&mut streams, b"before");
    let text = configuration(&edge.control.display().to_string(), "", false)
        .replace("vnc", "other")
        .replace(":5900", ":5901")
        .replace("5900", "5902");
    let proxy = Arc::clone(edge.proxy.as_ref().unwrap());
    world.in_namespace("edge", move || {
        proxy.reload(Config::parse(&text, "test").unwrap()).unwrap();
    });
    let (stop, seen) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let (stopped, saw) = (Arc::clone(&stop), Arc::clone(&seen));
    let looking = world.spawn("edge", move || {
        while !stopped.load(Ordering::Relaxed) {
            let rules = world::run("nft", &["list", "ruleset"]);
            if rules.contains("table inet netproxy_") && rules.contains("sport 15900") {
                saw.store(true, Ordering::Relaxed);
            }
        }
    });
    let mut control = edge.client();
    // The rule is there for a moment only, and may be missed.
    for _ in 0..100 {
        control.prepare("desktop", "b").unwrap();
        control.hold("desktop", LEASE).unwrap();
        assert_eq!(control.cancel("desktop").unwrap().failed, 0);
        exchange_all(&mut streams, b"as ever");
        if seen.load(Ordering::Relaxed) {
            break;
        }
    }
    stop.store(true, Ordering::Relaxed);
    looking.join().unwrap();
    assert!(seen.load(Ordering::Relaxed), "There was no rule");
}

/// Of one service nothing is left in the configuration, and of the other the sites' port is another
/// one: what is open of both follows the guest.
#[test]
fn a_service_that_is_gone_or_changed_moves_on() {
    const OTHER: &str = "10.1.0.1:5901";
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    serve(&world, 5901);
    let edge = Edge::new(&world, "");
    let reload = |text: String| {
        let proxy = Arc::clone(edge.proxy.as_ref().unwrap());
        world.in_namespace("edge", move || {
            proxy.reload(Config::parse(&text, "test").unwrap()).unwrap();
        });
    };
    let translate = |site: &str| {
        let translation = edge.client().reach("desktop", site).unwrap().translation;
        world.in_namespace(site, move || translation.unwrap().apply().unwrap());
    };
    let both = configuration(&edge.control.display().to_string(), "", false);
    let services = both.find("[[guest.service]]").unwrap();
    let other = |port: u16| {
        format!(
            "[[guest.service]]\nname = \"other\"\nlisten = [{OTHER:?}]\nport = 5901\n\
             site_port = {port}\n"
        )
    };
    reload(format!("{both}{}", other(15901)));
    translate("a");
    let mut gone = echoing(&world);
    let mut changed = world.in_namespace("client", || {
        let mut stream = TcpStream::connect(OTHER).unwrap();
        let limit = Some(Duration::from_secs(30));
        stream.set_read_timeout(limit).unwrap();
        stream.write_all(&0_u64.to_le_bytes()).unwrap();
        stream
    });
    exchange(&mut gone, b"before");
    exchange(&mut changed, b"before");
    reload(format!("{}{}", &both[..services], other(15911)));
    // Given up, they are where they were.
    let mut control = edge.client();
    control.prepare("desktop", "b").unwrap();
    control.hold("desktop", LEASE).unwrap();
    assert_eq!(control.cancel("desktop").unwrap().failed, 0);
    exchange(&mut gone, b"as ever");
    exchange(&mut changed, b"as ever");
    translate("b");
    control.prepare("desktop", "b").unwrap();
    world.place(None);
    control.hold("desktop", LEASE).unwrap();
    control.retarget("desktop").unwrap();
    world.place(Some("b"));
    let tally = control.release("desktop", Duration::ZERO).unwrap();
    assert_eq!((tally.connections, tally.failed), (2, 0));
    exchange(&mut gone, b"after");
    exchange(&mut changed, b"after");
}

/// The sites lead the port of a service that is gone to somebody else: what is open of it has no
/// way any more, and says nothing there. Where it is it goes on.
#[test]
fn a_service_whose_place_is_taken_does_not_move_to_another() {
    let world = World::new(Duration::from_millis(4));
    serve(&world, 5900);
    for of_another in [true, false] {
        world.place(Some("a"));
        let edge = Edge::new(&world, "");
        let mut stream = echoing(&world);
        exchange(&mut stream, b"before");
        let text = configuration(&edge.control.display().to_string(), "", false);
        let services = text.find("[[guest.service]]").unwrap();
        let service = "[[guest.service]]\nname = \"x\"\nlisten = [\"10.1.0.1:5901\"]\n\
                       port = 5902\nsite_port = 15900\n";
        let mut taken = text[..services].to_owned();
        if of_another {
            let guest = text[text.find("[[guest]]").unwrap()..services].to_owned();
            let guest = guest.replace("desktop", "other");
            taken.push_str(&guest.replace(crate::world::GUEST, "10.7.0.6"));
        }
        taken.push_str(service);
        let proxy = Arc::clone(edge.proxy.as_ref().unwrap());
        world.in_namespace("edge", move || {
            proxy
                .reload(Config::parse(&taken, "test").unwrap())
                .unwrap();
        });
        let mut control = edge.client();
        control.prepare("desktop", "b").unwrap();
        control.hold("desktop", LEASE).unwrap();
        assert_eq!(control.cancel("desktop").unwrap().failed, 0);
        exchange(&mut stream, b"as ever");
        control.prepare("desktop", "b").unwrap();
        world.place(None);
        control.hold("desktop", LEASE).unwrap();
        stream.write_all(b"not for others").unwrap();
        let tally = control.retarget("desktop").unwrap();
        assert_eq!((tally.connections, tally.failed), (0, 1));
        // Who answers there gets none of it.
        world.place(Some("b"));
        let tally = control.release("desktop", Duration::ZERO).unwrap();
        assert_eq!((tally.connections, tally.failed), (0, 1));
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert_eq!(edge.metric("netproxy_retargets_total"), 0);
    }
}
