//! The proxy on the loopback interface: all that needs no privileges.
#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use netproxy::config::Config;
use netproxy::control::{Client, Request};
use netproxy::{Error, Proxy};

/// A guest that echoes. Returns its address.
fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut other = stream.try_clone().unwrap();
                let _ = std::io::copy(&mut stream, &mut other);
                let _ = other.shutdown(Shutdown::Write);
            });
        }
    });
    address
}

struct Setup {
    proxy: Arc<Proxy>,
    directory: PathBuf,
    guest: SocketAddr,
}

impl Setup {
    fn text(&self, limits: &str, service: &str, listen: &str) -> String {
        text(&self.directory, self.guest, limits, service, listen)
    }

    fn new(limits: &str, service: &str) -> Self {
        Self::with(echo_server(), limits, service, r#""127.0.0.1:0""#)
    }

    fn with(guest: SocketAddr, limits: &str, service: &str, listen: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory =
            std::env::temp_dir().join(format!("netproxy-lo-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let text = text(&directory, guest, limits, service, listen);
        let file = directory.join("proxy.toml");
        std::fs::write(&file, &text).unwrap();
        let proxy = Proxy::start(Config::load(&file).unwrap(), Some(file)).unwrap();
        Self {
            proxy,
            directory,
            guest,
        }
    }

    fn address(&self) -> SocketAddr {
        self.proxy.list().unwrap().guests[0].listeners[0]
    }

    fn connect(&self) -> TcpStream {
        connect_from("127.0.0.1", self.address()).unwrap()
    }

    fn control(&self) -> PathBuf {
        self.directory.join("control")
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn text(
    directory: &std::path::Path,
    guest: SocketAddr,
    limits: &str,
    service: &str,
    listen: &str,
) -> String {
    format!(
        "version = 1\n[proxy]\ncontrol = {:?}\nthreads = 2\nmetrics = \"127.0.0.1:0\"\n\
         [limits]\n{limits}\n\
         [[guest]]\nname = \"g\"\naddress = \"127.0.0.1\"\nsite = \"a\"\n\
         [guest.sites.a]\naddress = {:?}\n\
         [[guest.service]]\nname = \"echo\"\nlisten = [{listen}]\nport = {}\n{service}\n",
        directory.join("control").display().to_string(),
        guest.ip().to_string(),
        guest.port(),
    )
}

fn exchange(stream: &mut TcpStream, data: &[u8]) {
    stream.write_all(data).unwrap();
    let mut answer = vec![0; data.len()];
    stream.read_exact(&mut answer).unwrap();
    assert!(answer == data);
}

/// All of these words, and the reset after them.
fn hears_last_words(setup: &Setup, stream: &mut TcpStream, words: &[u8]) {
    let mut heard = vec![0; words.len()];
    stream.read_exact(&mut heard).unwrap();
    assert!(heard == words);
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    wait_until(|| setup.proxy.open() == 0);
}

/// Whether a newcomer is turned away: it sees a reset or an end before any byte. The reset may come
/// while it still connects.
fn refused(setup: &Setup) -> bool {
    let Ok(mut stream) = connect_from("127.0.0.1", setup.address()) else {
        return true;
    };
    let _ = stream.write_all(b"?");
    !matches!(stream.read(&mut [0; 1]), Ok(1))
}

fn wait_until(mut what: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !what() {
        assert!(Instant::now() < limit, "It did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn bytes_pass_both_ways_and_ends_too() {
    let setup = Setup::new("", "");
    let mut stream = setup.connect();
    for size in [1, 64, 1000, 16_384] {
        exchange(&mut stream, &vec![7; size]);
    }
    let data: Vec<u8> = (0..20_000_000_u32)
        .map(|i| u8::try_from(i % 251).unwrap())
        .collect();
    let mut writer = stream.try_clone().unwrap();
    let sent = data.clone();
    let thread = std::thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert!(got == data);
    thread.join().unwrap();
    wait_until(|| setup.proxy.open() == 0);
    let counted = format!(
        "netproxy_to_client_bytes_total{{guest=\"g\"}} {}",
        17_449 + data.len()
    );
    assert!(
        setup.proxy.metrics().contains(&counted),
        "{}",
        setup.proxy.metrics()
    );
}

#[test]
fn what_comes_after_urgent_bytes_arrives_with_them() {
    let setup = Setup::new("", "");
    let mut stream = setup.connect();
    exchange(&mut stream, b"hello");
    // A read ends before each of them, with more behind it. They themselves are out of band, and
    // have no place in the stream.
    for round in 0..20 {
        stream.write_all(b"before").unwrap();
        socket2::SockRef::from(&stream)
            .send_out_of_band(b"!")
            .unwrap();
        stream.write_all(b"after").unwrap();
        let mut answer = [0; 11];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"beforeafter", "round {round}");
    }
}

#[test]
fn urgent_bytes_do_not_stop_bulk() {
    let setup = Setup::new("", "");
    let mut stream = setup.connect();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let part = vec![7; 4 << 20];
    let mut answer = vec![0; part.len() * 2];
    for round in 0..5 {
        std::thread::scope(|scope| {
            let mut writer = stream.try_clone().unwrap();
            let part = &part;
            scope.spawn(move || {
                writer.write_all(part).unwrap();
                socket2::SockRef::from(&writer)
                    .send_out_of_band(b"!")
                    .unwrap();
                writer.write_all(part).unwrap();
            });
            let heard = stream.read_exact(&mut answer);
            assert!(heard.is_ok(), "round {round}: {heard:?}");
        });
        assert!(answer.iter().all(|byte| *byte == 7), "round {round}");
    }
}

#[test]
fn a_guest_that_speaks_and_ends_at_once_is_heard() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            stream.unwrap().write_all(b"busy").unwrap();
        }
    });
    let setup = Setup::with(address, "", "", r#""127.0.0.1:0""#);
    for _ in 0..100 {
        let mut words = String::new();
        setup.connect().read_to_string(&mut words).unwrap();
        assert_eq!(words, "busy");
    }
}

#[test]
fn clients_come_by_either_family() {
    let setup = Setup::with(echo_server(), "", "", r#""127.0.0.1:0", "[::1]:0""#);
    let listeners = setup.proxy.list().unwrap().guests[0].listeners.clone();
    assert!(listeners.iter().any(SocketAddr::is_ipv4) && listeners.iter().any(SocketAddr::is_ipv6));
    for address in listeners {
        exchange(&mut TcpStream::connect(address).unwrap(), b"hello");
    }
}

#[test]
fn the_guest_is_told_who_the_client_is() {
    let setup = Setup::new("", "proxy_protocol = true");
    let mut stream = setup.connect();
    stream.write_all(b"hello").unwrap();
    // The echo gives the header back.
    let mut answer = [0; 33];
    stream.read_exact(&mut answer).unwrap();
    let own = stream.local_addr().unwrap();
    let expected = netproxy::proxy_protocol::header(own, setup.address());
    assert_eq!(answer[..28], expected);
    assert_eq!(&answer[28..], b"hello");
}

#[test]
fn a_guest_that_does_not_answer_is_a_reset_to_the_client() {
    // Bound, so that nobody else is given the port, and not listening.
    let closed = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    closed.bind(&any.into()).unwrap();
    let address = closed.local_addr().unwrap().as_socket().unwrap();
    let setup = Setup::with(address, "", "", r#""127.0.0.1:0""#);
    assert!(refused(&setup));
    wait_until(|| {
        setup
            .proxy
            .metrics()
            .contains("connect_failures_total{guest=\"g\"} 1")
    });
}

#[test]
fn limits_refuse_the_newcomer_only() {
    let setup = Setup::new("connections = 2", "");
    let (mut one, mut two) = (setup.connect(), setup.connect());
    exchange(&mut one, b"1");
    exchange(&mut two, b"2");
    assert!(refused(&setup));
    exchange(&mut one, b"still here");
    drop(two);
    wait_until(|| setup.proxy.open() == 1);
    exchange(&mut setup.connect(), b"room again");
}

/// A client with an address of its own.
fn connect_from(from: &str, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    let from: SocketAddr = format!("{from}:0").parse().unwrap();
    socket.bind(&from.into())?;
    socket.connect(&to.into())?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    Ok(stream)
}

#[test]
fn a_flood_from_one_client_leaves_room_for_others() {
    let setup = Setup::new("connections_per_client = 10", "");
    let address = setup.address();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let floods: Vec<_> = (0..2)
        .map(|_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let mut open = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    // What is refused is reset, some of it while it still connects. What was let in
                    // stays: each loop is listed at a moment of its own, so of connections that come
                    // and go a listing may show more than there ever were at once.
                    open.extend(connect_from("127.0.0.2", address));
                    open.truncate(100);
                }
            })
        })
        .collect();
    for _ in 0..20 {
        exchange(&mut connect_from("127.0.0.3", address).unwrap(), b"served");
        let open = setup.proxy.list().unwrap().connections;
        let of_flood = open
            .iter()
            .filter(|c| c.client.ip().to_string() == "127.0.0.2");
        let of_flood = of_flood.count();
        assert!(of_flood <= 10, "{of_flood} of the flood");
    }
    stop.store(true, Ordering::Relaxed);
    floods.into_iter().for_each(|flood| flood.join().unwrap());
    wait_until(|| setup.proxy.open() == 0);
    let metrics = setup.proxy.metrics();
    assert!(metrics.contains("refused_total{reason=\"client_limit\"}"));
}

#[test]
fn many_clients_that_do_not_read_hold_no_more_than_all_may() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let limits = "buffer = \"128KiB\"\nbuffer_total = \"512KiB\"";
    let setup = Setup::with(
        listener.local_addr().unwrap(),
        limits,
        "",
        r#""127.0.0.1:0""#,
    );
    let mut pairs: Vec<(TcpStream, TcpStream)> = (0..30)
        .map(|_| (setup.connect(), listener.accept().unwrap().0))
        .collect();
    for (_, guest) in &mut pairs {
        guest.set_nonblocking(true).unwrap();
    }
    // Until nobody takes any more.
    let mut quiet = 0;
    while quiet < 20 {
        let wrote = pairs
            .iter_mut()
            .any(|(_, guest)| guest.write(&[0; 65_536]).is_ok());
        quiet = if wrote { 0 } else { quiet + 1 };
        std::thread::sleep(Duration::from_millis(2));
    }
    let metrics = setup.proxy.metrics();
    let line = metrics
        .lines()
        .find(|line| line.starts_with("netproxy_buffered_bytes "))
        .unwrap();
    let buffered: usize = line.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(buffered <= (512 << 10) + (16 << 10) * 2, "{buffered}");
    // One that reads is served all the same, and in full.
    let (mut client, mut guest) = (setup.connect(), listener.accept().unwrap().0);
    let data: Vec<u8> = (0..3_000_000_u32)
        .map(|i| u8::try_from(i % 249).unwrap())
        .collect();
    let sent = data.clone();
    let writing = std::thread::spawn(move || guest.write_all(&sent).unwrap());
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    writing.join().unwrap();
    assert!(got == data);
}

#[test]
fn a_guest_that_does_not_even_refuse_is_given_up() {
    // Who comes now hears nothing.
    let (listener, _first) = busy_guest();
    let guest = listener.local_addr().unwrap();
    let setup = Setup::with(guest, "connect = \"300ms\"", "", r#""127.0.0.1:0""#);
    assert!(refused(&setup));
    wait_until(|| setup.proxy.open() == 0);
}

#[test]
fn one_that_has_half_ended_does_not_stay_for_ever() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let setup = Setup::with(
        listener.local_addr().unwrap(),
        "half_closed = \"50ms\"",
        "",
        r#""127.0.0.1:0""#,
    );
    let client = setup.connect();
    let (mut guest, _) = listener.accept().unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    // The guest hears of that, and says nothing.
    assert_eq!(guest.read(&mut [0]).unwrap(), 0);
    wait_until(|| setup.proxy.open() == 0);
    let metrics = setup.proxy.metrics();
    assert!(metrics.contains("timeouts_total{guest=\"g\"} 1"));
}

/// However long it was silent before.
#[test]
fn an_answer_to_an_end_has_its_time() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let setup = Setup::with(
        listener.local_addr().unwrap(),
        "half_closed = \"2s\"",
        "",
        r#""127.0.0.1:0""#,
    );
    let mut client = setup.connect();
    let (mut guest, _) = listener.accept().unwrap();
    client.write_all(b"before").unwrap();
    guest.read_exact(&mut [0; 6]).unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.read(&mut [0]).unwrap(), 0);
    std::thread::sleep(Duration::from_millis(200));
    guest.write_all(b"answer").unwrap();
    drop(guest);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"answer");
    wait_until(|| setup.proxy.open() == 0);
    assert!(!setup.proxy.metrics().contains("timeouts_total{"));
}

/// With no time at all for what is left to say, who ends ends both.
#[test]
fn one_end_is_the_end_where_nothing_is_waited_for() {
    let setup = Setup::new("half_closed = 0", "");
    let mut ends = setup.connect();
    let mut stays = setup.connect();
    exchange(&mut ends, b"before");
    exchange(&mut stays, b"before");
    ends.shutdown(Shutdown::Write).unwrap();
    wait_until(|| setup.proxy.open() == 1);
    exchange(&mut stays, b"after");
}

#[test]
fn a_buffer_may_be_as_small_as_it_likes() {
    let setup = Setup::new("buffer = 1", "");
    exchange(&mut setup.connect(), &[7; 3000]);
}

#[test]
fn an_mss_of_0_is_none() {
    let setup = Setup::new("", "");
    let text = setup.text("", "", r#""127.0.0.1:0""#);
    let text = text.replace("site = \"a\"\n", "site = \"a\"\nmss = 0\n");
    setup
        .proxy
        .reload(Config::parse(&text, "x").unwrap())
        .unwrap();
    exchange(&mut setup.connect(), b"hello");
}

#[test]
fn a_slow_client_is_served_for_as_long_as_it_takes() {
    let setup = Setup::new("idle = \"2s\"", "");
    let mut slow = setup.connect();
    for byte in 0..60 {
        exchange(&mut slow, &[byte]);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(setup.proxy.open(), 1);
}

#[test]
fn only_those_the_configuration_names_get_through() {
    let setup = Setup::new("", "allow = [\"192.0.2.0/24\"]");
    assert!(refused(&setup));
    assert!(
        setup
            .proxy
            .metrics()
            .contains("refused_total{reason=\"not_allowed\"} 1")
    );
}

#[test]
fn a_silent_connection_ends() {
    let setup = Setup::new("idle = \"1s\"", "");
    let mut stream = setup.connect();
    exchange(&mut stream, b"hello");
    assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
    wait_until(|| setup.proxy.open() == 0);
}

#[test]
fn a_client_that_does_not_read_holds_no_more_than_its_share() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let guest = listener.local_addr().unwrap();
    let setup = Setup::with(guest, "buffer = \"64KiB\"", "", r#""127.0.0.1:0""#);
    let client = setup.connect();
    let (mut at_guest, _) = listener.accept().unwrap();
    at_guest
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    // Until every buffer on the way is full.
    while at_guest.write(&[0; 65_536]).is_ok() {}
    let held = setup.proxy.list().unwrap().connections[0].held;
    // The bound of bytes, or one pipe.
    assert!(held <= (1 << 20) + (64 << 10), "{held}");
    // Others are served.
    let other = setup.connect();
    let (mut second, _) = listener.accept().unwrap();
    second.write_all(b"x").unwrap();
    (&other).read_exact(&mut [0]).unwrap();
    drop(client);
}

#[test]
fn a_reset_reaches_the_other_side() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let setup = Setup::with(listener.local_addr().unwrap(), "", "", r#""127.0.0.1:0""#);
    let mut client = setup.connect();
    let (guest, _) = listener.accept().unwrap();
    socket2::SockRef::from(&guest)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(guest);
    let error = client.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// What the kernel has taken of a side that is then reset is not lost, however slow the other is.
#[test]
fn what_was_sent_before_a_reset_arrives() {
    const LENGTH: usize = 1 << 20;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let setup = Setup::with(listener.local_addr().unwrap(), "", "", r#""127.0.0.1:0""#);
    let data: Vec<u8> = (0..LENGTH)
        .map(|i| u8::try_from(i % 251).unwrap())
        .collect();
    for from_client in [true, false] {
        let (client, guest) = (setup.connect(), listener.accept().unwrap().0);
        let (mut from, mut to) = match from_client {
            true => (client, guest),
            false => (guest, client),
        };
        // Closed with this unread, it resets.
        to.write_all(b"unread").unwrap();
        wait_until(|| from.peek(&mut [0; 6]).unwrap() == 6);
        from.write_all(&data).unwrap();
        wait_until(|| netproxy::repair::unacknowledged(&from).unwrap() == 0);
        drop(from);
        // The proxy hears of it before anything is read.
        std::thread::sleep(Duration::from_millis(100));
        hears_last_words(&setup, &mut to, &data);
    }
}

/// Mostly the proxy sees the words and the reset at once.
#[test]
fn a_word_just_before_a_reset_arrives() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let setup = Setup::with(listener.local_addr().unwrap(), "", "", r#""127.0.0.1:0""#);
    for round in 0..200_u32 {
        let (client, guest) = (setup.connect(), listener.accept().unwrap().0);
        let (mut from, mut to) = match round % 2 {
            0 => (client, guest),
            _ => (guest, client),
        };
        to.write_all(b"unread").unwrap();
        wait_until(|| from.peek(&mut [0; 6]).unwrap() == 6);
        from.write_all(&round.to_le_bytes()).unwrap();
        drop(from);
        let mut got = [0; 4];
        to.read_exact(&mut got).unwrap();
        assert_eq!(got, round.to_le_bytes());
    }
}

/// A guest that takes nobody yet: its queue is full until the first one is taken out of it.
fn busy_guest() -> (TcpListener, TcpStream) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    socket.bind(&any.into()).unwrap();
    socket.listen(0).unwrap();
    let first = TcpStream::connect(socket.local_addr().unwrap().as_socket().unwrap()).unwrap();
    (socket.into(), first)
}

/// The time for last words begins when there is somebody to hear them.
#[test]
fn last_words_wait_for_a_guest_that_is_connected_late() {
    let (listener, _first) = busy_guest();
    let setup = Setup::with(
        listener.local_addr().unwrap(),
        "linger = \"3s\"",
        "",
        r#""127.0.0.1:0""#,
    );
    let mut client = setup.connect();
    let words: Vec<u8> = (0..200_000_u32)
        .map(|i| u8::try_from(i % 251).unwrap())
        .collect();
    client.write_all(&words).unwrap();
    wait_until(|| {
        let connections = setup.proxy.list().unwrap().connections;
        connections.iter().any(|it| it.held == words.len() as u64)
    });
    socket2::SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(client);
    std::thread::sleep(Duration::from_millis(3500));
    drop(listener.accept().unwrap());
    let (mut guest, _) = listener.accept().unwrap();
    hears_last_words(&setup, &mut guest, &words);
}

/// What the proxy itself says of a client is nothing that the guest has to hear.
#[test]
fn who_resets_without_a_word_is_gone_at_once() {
    let (listener, _first) = busy_guest();
    for service in ["", "proxy_protocol = true"] {
        let setup = Setup::with(
            listener.local_addr().unwrap(),
            "connect = \"1h\"",
            service,
            r#""127.0.0.1:0""#,
        );
        let client = setup.connect();
        wait_until(|| setup.proxy.open() == 1);
        socket2::SockRef::from(&client)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(client);
        wait_until(|| setup.proxy.open() == 0);
    }
}

/// Nobody waits for ever for one who does not read.
#[test]
fn who_does_not_read_keeps_a_broken_connection_for_no_longer_than_the_limit() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let limits = "linger = \"200ms\"";
    let setup = Setup::with(
        listener.local_addr().unwrap(),
        limits,
        "",
        r#""127.0.0.1:0""#,
    );
    let _client = setup.connect();
    let (mut guest, _) = listener.accept().unwrap();
    guest.set_nonblocking(true).unwrap();
    // Until nobody takes any more.
    for _ in 0..100 {
        while guest.write(&[0; 65_536]).is_ok() {}
        std::thread::sleep(Duration::from_millis(2));
    }
    let reset = socket2::SockRef::from(&guest).set_linger(Some(Duration::ZERO));
    reset.unwrap();
    drop(guest);
    wait_until(|| setup.proxy.open() == 0);
}

#[test]
fn draining_refuses_and_keeps() {
    let setup = Setup::new("", "");
    let mut stream = setup.connect();
    exchange(&mut stream, b"before");
    let mut control = Client::connect(&setup.control()).unwrap();
    control
        .call(&Request::Drain {
            guest: Some("g".into()),
            on: true,
        })
        .unwrap();
    assert!(refused(&setup));
    exchange(&mut stream, b"goes on");
    control
        .call(&Request::Drain {
            guest: None,
            on: false,
        })
        .unwrap();
    exchange(&mut setup.connect(), b"again");
}

#[test]
fn a_reload_keeps_connections_and_a_bad_file_changes_nothing() {
    let setup = Setup::new("", "");
    let mut stream = setup.connect();
    exchange(&mut stream, b"before");
    let first = setup.address();
    let file = setup.directory.join("proxy.toml");
    let mut control = Client::connect(&setup.control()).unwrap();
    std::fs::write(&file, "version = 1\nnonsense = 2\n").unwrap();
    let error = control.call(&Request::Reload).unwrap_err().to_string();
    assert!(error.contains("proxy.toml:2:"), "{error}");
    exchange(&mut setup.connect(), b"as it was");
    // The same listener, with another rule.
    let same = r#""127.0.0.1:0""#;
    std::fs::write(&file, setup.text("", "allow = [\"192.0.2.0/24\"]", same)).unwrap();
    control.call(&Request::Reload).unwrap();
    assert_eq!(setup.address(), first);
    assert!(refused(&setup));
    exchange(&mut stream, b"goes on");
    // Another listener instead.
    std::fs::write(&file, setup.text("", "", r#""127.0.0.2:0""#)).unwrap();
    control.call(&Request::Reload).unwrap();
    assert_ne!(setup.address(), first);
    exchange(&mut setup.connect(), b"new place");
    wait_until(|| TcpStream::connect(first).is_err());
    exchange(&mut stream, b"goes on");
}

/// Its connections are its own still, and count.
#[test]
fn a_guest_that_is_named_again_is_the_same_one() {
    let setup = Setup::new("", "");
    let text = setup.text("", "", r#""127.0.0.1:0""#);
    let guest = text.find("[[guest]]").unwrap();
    let limited = text.replace("site = \"a\"\n", "site = \"a\"\nconnections = 2\n");
    let reload = |text: &str| setup.proxy.reload(Config::parse(text, "x").unwrap());
    let mut stream = setup.connect();
    exchange(&mut stream, b"before");
    setup.proxy.drain(Some("g"), true).unwrap();
    reload(&text[..guest]).unwrap();
    assert!(setup.proxy.list().unwrap().guests.is_empty());
    reload(&limited).unwrap();
    let open = || setup.proxy.list().unwrap().guests[0].connections;
    assert_eq!(open(), 1);
    let mut second = setup.connect();
    exchange(&mut second, b"room for one");
    assert!(refused(&setup));
    drop(stream);
    wait_until(|| open() == 1);
    exchange(&mut setup.connect(), b"room again");
}

/// What is open of a service that is gone follows its guest too, unless its port is another's now.
#[test]
fn sites_translate_for_connections_of_services_that_are_gone() {
    let setup = Setup::new("", "");
    let plain = setup.text("", "", r#""127.0.0.1:0""#);
    let plain = plain.replace("site = \"a\"\n", "site = \"a\"\nsource = \"127.0.0.1\"\n");
    let guest = plain.find("[[guest]]").unwrap();
    let service = plain.find("[[guest.service]]").unwrap();
    let b = "[guest.sites.b]\naddress = \"127.0.0.9\"\n";
    let with = |services: &str| {
        let text = format!("{}{b}{services}", &plain[..service]);
        setup
            .proxy
            .reload(Config::parse(&text, "x").unwrap())
            .unwrap();
    };
    let mut stream = setup.connect();
    exchange(&mut stream, b"before");
    let port = setup.guest.port();
    let other = "[[guest.service]]\nname = \"other\"\nlisten = []\nport = 7\n";
    let mut control = Client::connect(&setup.control()).unwrap();
    let mut forwards = || {
        let translation = control.reach("g", "b").unwrap().translation.unwrap();
        let ports = translation.forwards.iter();
        ports
            .map(|forward| (forward.site_port, forward.guest_port))
            .collect::<Vec<_>>()
    };
    // Another port of the sites: a site has one way back.
    let moved = format!("{}site_port = 9\n", &plain[service..]);
    with(&moved);
    assert_eq!(forwards(), [(9, port)]);
    with(other);
    assert_eq!(forwards(), [(7, 7), (port, port)]);
    with(&format!("{other}site_port = {port}\n"));
    assert_eq!(forwards(), [(port, 7)]);
    let second = plain[guest..service].replace("\"g\"", "\"second\"");
    with(&format!("{other}{second}{b}{other}site_port = {port}\n"));
    assert_eq!(forwards(), [(7, 7)]);
    with(other);
    drop(stream);
    wait_until(|| setup.proxy.open() == 0);
    assert_eq!(forwards(), [(7, 7)]);
}

/// Each looks at what the other one holds.
#[test]
fn lists_and_reloads_do_not_wait_for_each_other_for_ever() {
    let setup = Setup::new("", "");
    let text = setup.text("", "", r#""127.0.0.1:0""#);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let lists: Vec<_> = (0..2)
        .map(|_| {
            let (proxy, stop) = (Arc::clone(&setup.proxy), Arc::clone(&stop));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(proxy.list().unwrap().guests.len(), 1);
                }
            })
        })
        .collect();
    for _ in 0..20 {
        let (proxy, text) = (Arc::clone(&setup.proxy), text.clone());
        let reloads = std::thread::spawn(move || {
            for _ in 0..100 {
                proxy.reload(Config::parse(&text, "x").unwrap()).unwrap();
            }
        });
        wait_until(|| reloads.is_finished());
        reloads.join().unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    wait_until(|| lists.iter().all(std::thread::JoinHandle::is_finished));
    lists.into_iter().for_each(|list| list.join().unwrap());
    exchange(&mut setup.connect(), b"as ever");
}

#[test]
fn control_is_for_its_owner_and_speaks_one_version() {
    let setup = Setup::new("", "");
    let mode = std::fs::metadata(setup.control())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let stream = UnixStream::connect(setup.control()).unwrap();
    let mut reader = BufReader::new(&stream);
    let mut ask = |line: &str| {
        (&stream).write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        reader.read_line(&mut answer).unwrap();
        answer
    };
    assert!(ask("{\"version\":1,\"command\":\"list\"}\n").contains("\"ok\":true"));
    assert!(ask("{\"version\":2,\"command\":\"list\"}\n").contains("is not spoken here"));
    assert!(ask("nonsense\n").contains("\"ok\":false"));
    assert!(ask(&"x".repeat(70_000)).contains("at most"));
    let mut again = Client::connect(&setup.control()).unwrap();
    assert!(matches!(
        again.prepare("nobody", "a"),
        Err(Error::Refused(message)) if message.contains("nobody")
    ));
}

#[test]
fn a_second_proxy_does_not_take_the_control_socket() {
    let setup = Setup::new("", "");
    let config = Config::parse(&setup.text("", "", r#""127.0.0.1:0""#), "x").unwrap();
    assert!(matches!(
        Proxy::start(config, None),
        Err(Error::File { .. })
    ));
    assert!(Client::connect(&setup.control()).unwrap().list().is_ok());
}

/// A request that trickles in holds up the next one for no longer than it may take itself.
#[test]
fn a_slow_request_for_metrics_does_not_keep_others_waiting() {
    let setup = Setup::new("", "");
    let address = setup.proxy.metrics_address().unwrap();
    let mut slow = TcpStream::connect(address).unwrap();
    slow.write_all(b"G").unwrap();
    std::thread::spawn(move || {
        // For longer than the other one waits, but not for ever: the proxy's end waits too.
        for _ in 0..100 {
            if slow.write_all(b"x").is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    let mut other = TcpStream::connect(address).unwrap();
    other
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    other.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    other.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("200 OK"), "{answer}");
}
