//! Streams that know what their bytes should be.
//!
//! Both ends of a stream make the same sequence from a seed, so the receiver sees a lost,
//! doubled or changed byte at its place. What was sent and what came are compared at the end.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use crate::world::World;

/// How one end sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sends {
    /// Nothing, and ends its direction at once.
    Nothing,
    /// As much as it can.
    Bulk,
    /// Messages of up to so many bytes, a few milliseconds apart.
    Messages(usize),
}

/// How one end reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// At once.
    Fast,
    /// With pauses that fill every buffer on the way, down to a zero window.
    Stalling,
}

/// What a connection is for.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub client: (Sends, Reads),
    pub guest: (Sends, Reads),
}

#[derive(Debug)]
struct Plan {
    kind: Kind,
    seed: u64,
    stop: Arc<AtomicBool>,
    /// To the guest, to the client.
    sent: [AtomicU64; 2],
    received: [AtomicU64; 2],
}

static PLANS: LazyLock<Mutex<HashMap<u64, Arc<Plan>>>> = LazyLock::new(Mutex::default);
static NEXT: AtomicU64 = AtomicU64::new(1);

/// xorshift64*: enough to make every position distinct.
pub struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// The bytes of one direction.
struct Sequence {
    noise: Noise,
    rest: Vec<u8>,
}

impl Sequence {
    fn new(seed: u64) -> Self {
        Self {
            noise: Noise::new(seed),
            rest: Vec::new(),
        }
    }

    fn take(&mut self, length: usize) -> Vec<u8> {
        while self.rest.len() < length {
            self.rest
                .extend_from_slice(&self.noise.next().to_le_bytes());
        }
        let rest = self.rest.split_off(length);
        std::mem::replace(&mut self.rest, rest)
    }
}

fn send(stream: &TcpStream, how: Sends, seed: u64, stop: &AtomicBool, sent: &AtomicU64) {
    let mut stream = stream;
    let mut sequence = Sequence::new(seed);
    let mut dice = Noise::new(seed ^ 0xD1CE);
    while how != Sends::Nothing && !stop.load(Ordering::Relaxed) {
        let length = match how {
            Sends::Bulk => 65_536,
            Sends::Messages(most) => 1 + usize::try_from(dice.below(most as u64)).unwrap(),
            Sends::Nothing => 0,
        };
        let bytes = sequence.take(length);
        stream
            .write_all(&bytes)
            .unwrap_or_else(|error| panic!("Sending {how:?}: {error}"));
        sent.fetch_add(length as u64, Ordering::Relaxed);
        if matches!(how, Sends::Messages(_)) {
            std::thread::sleep(Duration::from_micros(dice.below(4000)));
        }
    }
    stream
        .shutdown(Shutdown::Write)
        .unwrap_or_else(|error| panic!("Ending {how:?}: {error}"));
}

fn receive(stream: &TcpStream, how: Reads, seed: u64, received: &AtomicU64) {
    let mut stream = stream;
    let mut sequence = Sequence::new(seed);
    let mut dice = Noise::new(seed ^ 0x5EED);
    let mut buffer = vec![0; 65_536];
    loop {
        let length = stream
            .read(&mut buffer)
            .unwrap_or_else(|error| panic!("Reading: {error}"));
        if length == 0 {
            return;
        }
        let place = received.fetch_add(length as u64, Ordering::Relaxed);
        assert!(
            buffer[..length] == sequence.take(length),
            "Other bytes after byte {place}"
        );
        if how == Reads::Stalling && dice.below(20) == 0 {
            std::thread::sleep(Duration::from_millis(dice.below(400)));
        }
    }
}

/// Plays one end until both directions have ended.
fn play(stream: &TcpStream, plan: &Arc<Plan>, as_client: bool) {
    let (own, towards) = if as_client {
        (plan.kind.client, 0)
    } else {
        (plan.kind.guest, 1)
    };
    let other = stream.try_clone().unwrap();
    let theirs = Arc::clone(plan);
    let reader = std::thread::Builder::new()
        .stack_size(256 * 1024)
        .spawn(move || {
            let from = 1 - towards;
            receive(
                &other,
                own.1,
                theirs.seed + from as u64,
                &theirs.received[from],
            );
        })
        .unwrap();
    send(
        stream,
        own.0,
        plan.seed + towards as u64,
        &plan.stop,
        &plan.sent[towards],
    );
    reader
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// The guest's server: plays its part of the plan whose number the client sends first.
pub fn serve(world: &World, port: u16) {
    let listener = world.in_namespace("guest", move || {
        let listener = TcpListener::bind(("0.0.0.0", port)).unwrap();
        // For a thousand clients at once.
        socket2::SockRef::from(&listener).listen(4096).unwrap();
        // As most guests, whatever this host goes by. A guest that is not suspended while it is away
        // goes on sending, and BBR takes what comes of that for a link of some bytes a second, for
        // minutes.
        setsockopt(&listener, sockopt::TcpCongestion, &"cubic".into()).unwrap();
        listener
    });
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            std::thread::Builder::new()
                .stack_size(128 * 1024)
                .spawn(move || {
                    let mut number = [0; 8];
                    if (&stream).read_exact(&mut number).is_err() {
                        return;
                    }
                    match u64::from_le_bytes(number) {
                        0 => echo(&stream),
                        number => {
                            let plan = Arc::clone(&PLANS.lock().unwrap()[&number]);
                            play(&stream, &plan, false);
                        }
                    }
                })
                .unwrap();
        }
    });
}

fn echo(stream: &TcpStream) {
    let mut stream = stream;
    let mut buffer = vec![0; 16_384];
    while let Ok(length) = stream.read(&mut buffer) {
        if length == 0 || stream.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = stream.shutdown(Shutdown::Write);
}

/// A connection at work.
pub struct Running {
    plan: Arc<Plan>,
    thread: JoinHandle<()>,
}

/// Starts a connection from the client's namespace.
pub fn start(world: &World, to: SocketAddr, kind: Kind) -> Running {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let plan = Arc::new(Plan {
        kind,
        seed: number * 1000,
        stop: Arc::default(),
        sent: Default::default(),
        received: Default::default(),
    });
    PLANS.lock().unwrap().insert(number, Arc::clone(&plan));
    let client = Arc::clone(&plan);
    let thread = world.spawn("client", move || {
        let stream = TcpStream::connect(to).unwrap();
        (&stream).write_all(&number.to_le_bytes()).unwrap();
        play(&stream, &client, true);
    });
    Running { plan, thread }
}

impl Running {
    /// Waits until something more has come in each direction in which something is sent. How often
    /// the guest's segments were lost in a row is forgotten then: here it sends at all times, where
    /// a suspended one would not, and waits longer after each.
    pub fn goes_on(&self) {
        let received = || [0, 1].map(|at| self.plan.received[at].load(Ordering::Relaxed));
        let sends = [self.plan.kind.client.0, self.plan.kind.guest.0];
        let before = received();
        let limit = std::time::Instant::now() + Duration::from_secs(150);
        while (0..2).any(|at| sends[at] != Sends::Nothing && received()[at] == before[at]) {
            if std::time::Instant::now() >= limit {
                crate::world::show_sockets();
                panic!("A stream stands still: {:?}", self.plan);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it and compares. Returns the bytes carried.
    pub fn finish(self) -> u64 {
        self.plan.stop.store(true, Ordering::Relaxed);
        let limit = std::time::Instant::now() + Duration::from_secs(60);
        while !self.thread.is_finished() {
            if std::time::Instant::now() >= limit {
                crate::world::show_sockets();
                panic!("A stream is stuck: {:?}", self.plan);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let Self { plan, thread } = self;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // The guest's end may be a moment later.
        for direction in [0, 1] {
            let sent = plan.sent[direction].load(Ordering::Relaxed);
            while plan.received[direction].load(Ordering::Relaxed) < sent {
                assert!(
                    std::time::Instant::now() < limit,
                    "Bytes are missing: {:?}",
                    plan
                );
                std::thread::sleep(Duration::from_millis(10));
            }
            assert_eq!(plan.received[direction].load(Ordering::Relaxed), sent);
        }
        plan.received
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .sum()
    }
}
