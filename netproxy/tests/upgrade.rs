//! Another program takes over, connections and all: on the loopback interface, unprivileged.
#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use netproxy::control::{Client, Request};
use netproxy::{Error, Overview};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Held while a program is written, and while one is started: a process that is forked while the
/// file is open for writing keeps it so until it runs its own program, and a file that is being
/// written can't be run.
static PROGRAMS: Mutex<()> = Mutex::new(());

/// The program under a path of its own, where another one can be put in its place.
struct Program {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
    directory: PathBuf,
    guest: SocketAddr,
}

impl Program {
    fn start(guest: SocketAddr) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory =
            std::env::temp_dir().join(format!("netproxy-up-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let writing = PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner);
        std::fs::copy(env!("CARGO_BIN_EXE_netproxy"), directory.join("netproxy")).unwrap();
        configure(&directory, guest, r#""127.0.0.1:0""#);
        let mut child = Command::new(directory.join("netproxy"))
            .arg(directory.join("proxy.toml"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        drop(writing);
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut program = Self {
            child,
            lines,
            directory,
            guest,
        };
        program.wait_until_ready();
        program
    }

    /// It says so each time it has started or taken over.
    fn wait_until_ready(&mut self) {
        assert!(self.lines.any(|line| line.unwrap() == "ready"));
    }

    fn client(&self) -> Client {
        Client::connect(&self.directory.join("control")).unwrap()
    }

    fn overview(&self) -> Overview {
        self.client().list().unwrap()
    }

    fn address(&self) -> SocketAddr {
        self.overview().guests[0].listeners[0]
    }

    fn upgrade(&mut self) {
        self.client().upgrade().unwrap();
        self.wait_until_ready();
    }

    /// Puts a script where the program is.
    fn replace_by(&self, script: &str) {
        let _writing = PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner);
        let (new, path) = (self.directory.join("new"), self.directory.join("netproxy"));
        std::fs::write(&new, script).unwrap();
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(new, path).unwrap();
    }

    fn restore(&self) {
        let _writing = PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner);
        let new = self.directory.join("new");
        std::fs::copy(env!("CARGO_BIN_EXE_netproxy"), &new).unwrap();
        std::fs::rename(new, self.directory.join("netproxy")).unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    fn connect(&self) -> TcpStream {
        connect(self.address())
    }

    fn ignores_broken_pipes(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        let ignored = u64::from_str_radix(ignored.unwrap().trim(), 16).unwrap();
        ignored >> (Signal::SIGPIPE as i32 - 1) & 1 == 1
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn configure(directory: &Path, guest: SocketAddr, listen: &str) {
    let control = directory.join("control");
    let text = format!(
        "version = 1\n[proxy]\ncontrol = {control:?}\nthreads = 2\n\
         [[guest]]\nname = \"g\"\naddress = \"127.0.0.1\"\nsite = \"a\"\n\
         [guest.sites.a]\nrouted = true\n\
         [[guest.service]]\nname = \"echo\"\nlisten = [{listen}]\nport = {}\n",
        guest.port(),
    );
    std::fs::write(directory.join("proxy.toml"), text).unwrap();
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    stream
}

fn exchange(stream: &mut TcpStream, data: &[u8]) {
    stream.write_all(data).unwrap();
    let mut answer = vec![0; data.len()];
    stream.read_exact(&mut answer).unwrap();
    assert!(answer == data);
}

fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A guest that echoes.
fn echo_server() -> SocketAddr {
    let (listener, address) = listen();
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

fn bytes(length: u32) -> Vec<u8> {
    (0..length)
        .map(|i| u8::try_from((i ^ (i >> 9)) % 251).unwrap())
        .collect()
}

#[test]
fn connections_go_on_in_the_new_program() {
    let mut program = Program::start(echo_server());
    let (mut idle, mut second) = (program.connect(), program.connect());
    exchange(&mut idle, b"before");
    exchange(&mut second, b"before");
    // One that ended its own direction has bytes to come still.
    let mut half = program.connect();
    exchange(&mut half, b"before");
    // Bulk through pipes, to a reader that stops now and then.
    let bulk = program.connect();
    let data = bytes(60_000_000);
    let (mut writer, sent) = (bulk.try_clone().unwrap(), data.clone());
    let writing = std::thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let reading = std::thread::spawn(move || {
        let (mut got, mut bulk, mut part) = (Vec::new(), bulk, vec![0; 1 << 16]);
        loop {
            let length = bulk.read(&mut part).unwrap();
            if length == 0 {
                return got;
            }
            if got.len() / (1 << 20) != (got.len() + length) / (1 << 20) {
                std::thread::sleep(Duration::from_millis(10));
            }
            got.extend_from_slice(&part[..length]);
        }
    });
    // Clients who come while nobody accepts wait in the listeners' queues.
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, address) = (Arc::clone(&stop), program.address());
    let coming = std::thread::spawn(move || {
        let mut count = 0;
        while !stopped.load(Ordering::Relaxed) {
            exchange(&mut connect(address), b"hello");
            count += 1;
        }
        count
    });
    let before = program.overview();
    for round in 0..8 {
        if round % 2 == 0 {
            program.upgrade();
        } else {
            program.signal(Signal::SIGUSR2);
            program.wait_until_ready();
        }
        exchange(&mut idle, format!("round {round}").as_bytes());
        if round == 4 {
            half.write_all(b"last words").unwrap();
            half.shutdown(Shutdown::Write).unwrap();
        }
    }
    stop.store(true, Ordering::Relaxed);
    assert!(coming.join().unwrap() > 0);
    let mut rest = Vec::new();
    half.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"last words");
    assert!(reading.join().unwrap() == data);
    writing.join().unwrap();
    exchange(&mut second, b"after");
    // What a list shows goes on too.
    let after = program.overview();
    for stream in [&idle, &second] {
        let client = stream.local_addr().unwrap();
        let find = |overview: &Overview| {
            let mut all = overview.connections.iter();
            let found = all.find(|connection| connection.client == client).unwrap();
            (found.id, found.to_guest, found.seconds)
        };
        let (was, is) = (find(&before), find(&after));
        assert_eq!(was.0, is.0);
        assert!(is.1 > was.1 && is.2 > was.2);
    }
    assert!(program.child.try_wait().unwrap().is_none());
}

/// Whoever lists the guests again and again does so also while the next program is asked whether
/// it can take over, and while all is put down.
#[test]
fn lists_do_not_stop_an_upgrade() {
    let mut program = Program::start(echo_server());
    let mut stream = program.connect();
    exchange(&mut stream, b"before");
    let stop = Arc::new(AtomicBool::new(false));
    let lists: Vec<_> = (0..3)
        .map(|_| {
            let (control, stop) = (program.directory.join("control"), Arc::clone(&stop));
            std::thread::spawn(move || {
                let (mut client, mut answers) = (None, 0);
                while !stop.load(Ordering::Relaxed) {
                    let mut own = client.take().or_else(|| Client::connect(&control).ok());
                    // Its connection ends with the program before.
                    if let Some(Ok(overview)) = own.as_mut().map(Client::list) {
                        assert_eq!(overview.guests.len(), 1);
                        answers += 1;
                        client = own;
                    }
                }
                answers
            })
        })
        .collect();
    for round in 0..10 {
        program.upgrade();
        exchange(&mut stream, format!("round {round}").as_bytes());
    }
    stop.store(true, Ordering::Relaxed);
    for list in lists {
        assert!(list.join().unwrap() > 0);
    }
    exchange(&mut program.connect(), b"after");
}

/// Whoever asks for a new configuration again and again does so also between the two programs.
#[test]
fn a_signal_that_comes_in_between_ends_nothing() {
    let mut program = Program::start(echo_server());
    let mut client = program.connect();
    for _ in 0..10 {
        program.signal(Signal::SIGUSR2);
        for _ in 0..100 {
            program.signal(Signal::SIGHUP);
            std::thread::sleep(Duration::from_micros(300));
        }
        program.wait_until_ready();
        exchange(&mut client, b"still there");
    }
    assert!(program.child.try_wait().unwrap().is_none());
}

#[test]
fn what_nobody_reads_is_handed_over_too() {
    let (listener, guest) = listen();
    let mut program = Program::start(guest);
    let mut client = program.connect();
    let (mut inner, _) = listener.accept().unwrap();
    inner
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    // Until every buffer on the way is full, pipes included.
    let data = bytes(40_000_000);
    let mut sent = 0;
    while let Ok(length) = inner.write(&data[sent..(sent + 100_000).min(data.len())]) {
        sent += length;
    }
    let held = program.overview().connections[0].held;
    assert!(held > 0);
    program.upgrade();
    program.upgrade();
    assert!(program.overview().connections[0].held >= held);
    inner.shutdown(Shutdown::Write).unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert!(got == data[..sent]);
    // The other direction as ever.
    client.write_all(b"goes on").unwrap();
    let mut answer = [0; 7];
    inner.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"goes on");
}

#[test]
fn the_new_program_reads_the_configuration_anew() {
    let mut program = Program::start(echo_server());
    let mut stream = program.connect();
    let first = program.address();
    exchange(&mut stream, b"before");
    configure(
        &program.directory,
        program.guest,
        r#""127.0.0.1:0", "127.0.0.2:0""#,
    );
    program.upgrade();
    let listeners = program.overview().guests[0].listeners.clone();
    assert!(listeners.len() == 2 && listeners.contains(&first));
    for address in listeners {
        exchange(&mut connect(address), b"hello");
    }
    exchange(&mut stream, b"after");
    // Nothing happens with a wrong one, and the line is named.
    std::fs::write(
        program.directory.join("proxy.toml"),
        "version = 1\n\nnonsense = 2\n",
    )
    .unwrap();
    let error = program.client().upgrade().unwrap_err().to_string();
    assert!(error.contains("proxy.toml:3:"), "{error}");
    exchange(&mut stream, b"as ever");
    exchange(&mut program.connect(), b"as ever");
}

/// What the program before knew of it is not forgotten: its connections are its own still.
#[test]
fn a_guest_that_was_removed_before_an_upgrade_can_be_named_again() {
    let mut program = Program::start(echo_server());
    let mut stream = program.connect();
    exchange(&mut stream, b"before");
    let file = program.directory.join("proxy.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let reload = |program: &Program, text: &str| {
        std::fs::write(&file, text).unwrap();
        program.client().call(&Request::Reload).unwrap();
    };
    reload(&program, &text[..text.find("[[guest]]").unwrap()]);
    program.upgrade();
    assert!(program.overview().guests.is_empty());
    reload(&program, &text);
    assert_eq!(program.overview().guests[0].connections, 1);
    exchange(&mut stream, b"after");
}

/// The new program names it before its threads have taken up a single connection.
#[test]
fn a_guest_can_be_named_again_by_the_upgrade_itself() {
    let mut program = Program::start(echo_server());
    let file = program.directory.join("proxy.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let mut streams: Vec<_> = (0..20).map(|_| program.connect()).collect();
    for _ in 0..5 {
        streams.iter_mut().for_each(|it| exchange(it, b"before"));
        std::fs::write(&file, &text[..text.find("[[guest]]").unwrap()]).unwrap();
        program.client().call(&Request::Reload).unwrap();
        std::fs::write(&file, &text).unwrap();
        program.upgrade();
        assert_eq!(program.overview().guests[0].connections, streams.len());
    }
    streams.iter_mut().for_each(|it| exchange(it, b"after"));
}

/// A client that has said more than its guest has taken, and has reset since. Returns the guest's
/// end, and what was said.
fn last_words(program: &Program, listener: &TcpListener) -> (TcpStream, Vec<u8>) {
    let mut client = program.connect();
    let (inner, _) = listener.accept().unwrap();
    inner
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    client
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    // Until every buffer on the way is full.
    let mut data = bytes(40_000_000);
    let mut sent = 0;
    while let Ok(length) = client.write(&data[sent..(sent + 100_000).min(data.len())]) {
        sent += length;
    }
    data.truncate(sent);
    socket2::SockRef::from(&client)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(client);
    while program.overview().connections[0].state != "closing" {
        std::thread::sleep(Duration::from_millis(10));
    }
    (inner, data)
}

/// What a client had said before it reset is the guest's in the next program too.
#[test]
fn last_words_are_handed_over() {
    let (listener, guest) = listen();
    let mut program = Program::start(guest);
    let (mut inner, words) = last_words(&program, &listener);
    let known = program.overview().connections[0].to_guest;
    program.upgrade();
    assert_eq!(program.overview().connections[0].state, "closing");
    let (mut got, mut part) = (Vec::new(), vec![0; 1 << 16]);
    let end = loop {
        match inner.read(&mut part) {
            Ok(length @ 1..) => got.extend_from_slice(&part[..length]),
            end => break end,
        }
    };
    // What the client's own kernel had not sent yet is lost with it.
    assert!(got.len() as u64 > known && got == words[..got.len()]);
    let error = end.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// An older program waits for the end of a move with those whose clients it is told to be lost, and
/// for ever if there is none.
#[test]
fn an_older_program_finds_out_by_itself_who_is_lost() {
    let (listener, guest) = listen();
    let program = Program::start(guest);
    let _inner = last_words(&program, &listener);
    program.replace_by(
        "#!/bin/sh\n\
         if [ \"$NETPROXY_UPGRADE\" = check ]\n\
         then cat >/dev/null; echo netproxy takes over state version 1\n\
         else cat /proc/self/fd/$NETPROXY_UPGRADE >${0%/*}/seen; mv ${0%/*}/seen ${0%/*}/state\n\
         fi\n",
    );
    // Nobody answers any more.
    let _ = program.client().upgrade();
    let file = program.directory.join("state");
    while !file.exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let state = std::fs::read(file).unwrap();
    let state = String::from_utf8_lossy(&state);
    assert!(state.contains("\"client_lost\":false"));
}

#[test]
fn a_program_that_can_not_take_over_is_given_nothing() {
    let mut program = Program::start(echo_server());
    let mut stream = program.connect();
    exchange(&mut stream, b"before");
    let answer = "echo netproxy takes over state version";
    for (script, why) in [
        ("#!/bin/sh\nexit 1\n".to_owned(), "can't take over"),
        ("#!/bin/sh\ncat >/dev/null\n".to_owned(), "can't take over"),
        (format!("#!/bin/sh\n{answer} 999\n"), "can't take over"),
        ("no program".to_owned(), "Exec format"),
        // It says that it can, and is gone when it should: all was put down by then.
        (
            format!("#!/bin/sh\n{answer} 1\nrm \"$0\"\n"),
            "No such file",
        ),
    ] {
        program.replace_by(&script);
        let error = program.client().upgrade().unwrap_err();
        assert!(
            matches!(&error, Error::Refused(message) if message.contains(why)),
            "{script}: {error}"
        );
        exchange(&mut stream, b"goes on");
        exchange(&mut program.connect(), b"new ones too");
        assert!(program.ignores_broken_pipes());
    }
    program.restore();
    program.upgrade();
    exchange(&mut stream, b"after");
}

#[test]
fn one_that_is_to_end_makes_way_for_nobody() {
    let mut program = Program::start(echo_server());
    let asked = program.directory.join("asked");
    // In the place of this one it would be no success.
    program.replace_by(&format!(
        "#!/bin/sh\n[ \"$NETPROXY_UPGRADE\" = check ] || exit 1\n\
         touch {}\nsleep 1\necho netproxy takes over state version 1\n",
        asked.display()
    ));
    program.signal(Signal::SIGUSR2);
    while !asked.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    program.signal(Signal::SIGTERM);
    assert!(program.child.wait().unwrap().success());
}
