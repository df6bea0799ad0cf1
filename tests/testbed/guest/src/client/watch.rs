//! Watching a guest from outside.
//!
//! Three threads run until stdin ends: one holds an echo connection and checks
//! each byte, one pings, one reads the counter. What they find is a
//! [`testbed_guest::Watch`].

use serde_json::Value;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use testbed_guest::{CONTROL_PORT, CounterWatch, ECHO_PORT, EchoWatch, PingWatch, Status, Watch};

/// Between two bytes, and between two pings.
const INTERVAL: Duration = Duration::from_millis(50);
/// Between two readings of the counter.
const READING: Duration = Duration::from_millis(250);
/// How long the end of a watch waits for bytes on their way.
const LINGER: Duration = Duration::from_secs(10);

/// The longest time without an event.
struct Gap {
    start: Instant,
    last: Instant,
    longest: Duration,
    at: Duration,
}

impl Gap {
    fn new(start: Instant) -> Self {
        Self {
            start,
            last: start,
            longest: Duration::ZERO,
            at: Duration::ZERO,
        }
    }

    /// An event, or the end of the watch.
    fn event(&mut self, now: Instant) {
        let gap = now.duration_since(self.last);
        if gap > self.longest {
            self.longest = gap;
            self.at = self.last.duration_since(self.start);
        }
        self.last = now;
    }
}

/// What the threads share.
struct Shared {
    address: Ipv4Addr,
    start: Instant,
    stop: AtomicBool,
    /// Parts that have seen the guest.
    working: AtomicU8,
}

impl Shared {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn works(&self) {
        if self.working.fetch_add(1, Ordering::SeqCst) == 2 {
            println!("watching");
        }
    }

    fn connect(&self, port: u16) -> io::Result<TcpStream> {
        let target = SocketAddr::from((self.address, port));
        let stream = TcpStream::connect_timeout(&target, Duration::from_secs(10))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(INTERVAL))?;
        Ok(stream)
    }
}

/// Watches until stdin ends, and prints the report.
pub fn run(address: Ipv4Addr) -> Result<(), String> {
    let shared = Shared {
        address,
        start: Instant::now(),
        stop: AtomicBool::new(false),
        working: AtomicU8::new(0),
    };
    let watch = thread::scope(|scope| {
        let echo = scope.spawn(|| watch_echo(&shared));
        let ping = scope.spawn(|| watch_ping(&shared));
        let counter = scope.spawn(|| watch_counter(&shared));
        let mut rest = Vec::new();
        let ended = io::stdin().read_to_end(&mut rest);
        shared.stop.store(true, Ordering::SeqCst);
        ended.map_err(|error| error.to_string())?;
        Ok::<_, String>(Watch {
            echo: echo.join().map_err(|_| "The echo thread died")?,
            ping: ping.join().map_err(|_| "The ping thread died")?,
            counter: counter.join().map_err(|_| "The counter thread died")?,
            seconds: shared.start.elapsed().as_secs_f64(),
        })
    })?;
    println!(
        "{}",
        serde_json::to_string(&watch).map_err(|error| error.to_string())?
    );
    Ok(())
}

/// The byte at a place of the echo stream.
fn byte_at(place: u64) -> u8 {
    // A period that is prime, so that a shift by any power of two shows.
    u8::try_from(place % 251).unwrap_or_default()
}

fn watch_echo(shared: &Shared) -> EchoWatch {
    let mut watch = EchoWatch::default();
    let mut gap = Gap::new(Instant::now());
    if let Err(error) = echo(shared, &mut watch, &mut gap) {
        watch.error = Some(error.to_string());
    }
    watch.alive = watch.error.is_none() && watch.received == watch.sent;
    watch.longest_gap = gap.longest.as_secs_f64();
    watch.gap_at = gap.at.as_secs_f64();
    watch
}

fn echo(shared: &Shared, watch: &mut EchoWatch, gap: &mut Gap) -> io::Result<()> {
    let mut stream = shared.connect(ECHO_PORT)?;
    *gap = Gap::new(shared.start);
    gap.last = Instant::now();
    let mut sent_at = None::<Instant>;
    let mut stopped_at = None::<Instant>;
    loop {
        if stopped_at.is_none() && shared.stopped() {
            stopped_at = Some(Instant::now());
        }
        match stopped_at {
            // All is back, or it will never be.
            Some(stopped) if watch.received == watch.sent || stopped.elapsed() > LINGER => {
                gap.event(Instant::now());
                return Ok(());
            }
            None if sent_at.is_none_or(|sent| sent.elapsed() >= INTERVAL) => {
                stream.write_all(&[byte_at(watch.sent)])?;
                watch.sent += 1;
                sent_at = Some(Instant::now());
            }
            _ => {}
        }
        let mut buffer = [0; 256];
        match stream.read(&mut buffer) {
            Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof)),
            Ok(length) => {
                gap.event(Instant::now());
                for byte in buffer.iter().take(length) {
                    if *byte != byte_at(watch.received) || watch.received == watch.sent {
                        let words = format!("Byte {} is wrong", watch.received);
                        return Err(io::Error::new(ErrorKind::InvalidData, words));
                    }
                    watch.received += 1;
                    if watch.received == 1 {
                        shared.works();
                    }
                }
            }
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error),
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

fn watch_ping(shared: &Shared) -> PingWatch {
    let mut watch = PingWatch::default();
    let mut gap = Gap::new(shared.start);
    if let Err(error) = ping(shared, &mut watch, &mut gap) {
        watch.error = Some(error.to_string());
        shared.works();
    }
    watch.longest_silence = gap.longest.as_secs_f64();
    watch.silence_at = gap.at.as_secs_f64();
    watch
}

fn ping(shared: &Shared, watch: &mut PingWatch, gap: &mut Gap) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
    let peer = SockAddr::from(SocketAddr::from((shared.address, 0)));
    let identifier = (std::process::id() & 0xffff) as u16;
    let mut due = Instant::now();
    let mut buffer = [0; 1500];
    while !shared.stopped() {
        let now = Instant::now();
        if now >= due {
            let sequence = (watch.sent & 0xffff) as u16;
            // Unreachable for a while is silence, not the end of the watch.
            if socket
                .send_to(&echo_request(identifier, sequence), &peer)
                .is_ok()
            {
                watch.sent += 1;
            }
            due = (due + INTERVAL).max(now);
        }
        let wait = due
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        socket.set_read_timeout(Some(wait))?;
        match (&socket).read(&mut buffer) {
            Ok(length) => {
                let packet = buffer.get(..length).unwrap_or_default();
                if is_reply(packet, shared.address, identifier) {
                    if watch.received == 0 {
                        gap.last = Instant::now();
                        shared.works();
                    }
                    watch.received += 1;
                    gap.event(Instant::now());
                }
            }
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error),
        }
    }
    gap.event(Instant::now());
    Ok(())
}

/// An ICMP echo request (RFC 792) without data.
fn echo_request(identifier: u16, sequence: u16) -> [u8; 8] {
    let [i0, i1] = identifier.to_be_bytes();
    let [s0, s1] = sequence.to_be_bytes();
    let sum = 0x0800 + u32::from(identifier) + u32::from(sequence);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let [c0, c1] = (!(sum as u16)).to_be_bytes();
    [8, 0, c0, c1, i0, i1, s0, s1]
}

/// Whether an IPv4 packet is an echo reply to us.
fn is_reply(packet: &[u8], from: Ipv4Addr, identifier: u16) -> bool {
    let header = packet.first().map_or(0, |byte| usize::from(byte & 0xf) * 4);
    packet.get(12..16) == Some(&from.octets()[..])
        && packet.get(header) == Some(&0)
        && packet.get(header + 4..header + 6) == Some(&identifier.to_be_bytes()[..])
}

fn watch_counter(shared: &Shared) -> CounterWatch {
    let mut watch = CounterWatch::default();
    if let Err(error) = count(shared, &mut watch) {
        watch.error = Some(error.to_string());
    }
    watch
}

fn count(shared: &Shared, watch: &mut CounterWatch) -> io::Result<()> {
    let mut stream = shared.connect(CONTROL_PORT)?;
    let mut answers = BufReader::new(stream.try_clone()?);
    let mut boot = None::<String>;
    while !shared.stopped() {
        stream.write_all(b"status\n")?;
        let mut line = String::new();
        while !line.ends_with('\n') {
            match answers.read_line(&mut line) {
                Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof)),
                Ok(_) => {}
                // The guest may be on its way. At the end it is given up.
                Err(error) if is_timeout(&error) && !shared.stopped() => {}
                Err(error) if is_timeout(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        let status: Value = serde_json::from_str(&line)?;
        let status: Status = serde_json::from_value(status)?;
        if watch.readings == 0 {
            watch.first = status.counter;
            shared.works();
        } else if status.counter < watch.last {
            watch.steps_back += 1;
        }
        if boot.as_ref().is_some_and(|boot| *boot != status.boot_id) {
            watch.reboots += 1;
        }
        boot = Some(status.boot_id);
        watch.last = status.counter;
        watch.errors = status.errors;
        watch.readings += 1;
        thread::sleep(READING);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_carry_the_right_checksum() {
        for (identifier, sequence) in [(0, 0), (0xffff, 0xffff), (0x1234, 7)] {
            let request = echo_request(identifier, sequence);
            let sum: u32 = request
                .chunks(2)
                .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])))
                .sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        }
    }

    #[test]
    fn only_replies_to_us_count() {
        let guest = Ipv4Addr::new(10, 77, 0, 101);
        let mut packet = vec![
            0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1, 0, 0, 10, 77, 0, 101, 10, 77, 0, 11,
        ];
        packet.extend([0, 0, 0, 0, 0x12, 0x34, 0, 1]);
        assert!(is_reply(&packet, guest, 0x1234));
        assert!(!is_reply(&packet, guest, 0x1235));
        assert!(!is_reply(&packet, Ipv4Addr::new(10, 77, 0, 102), 0x1234));
        assert!(!is_reply(&packet[..24], guest, 0x1234));
        packet[20] = 8;
        assert!(!is_reply(&packet, guest, 0x1234));
    }

    #[test]
    fn the_longest_gap_is_kept() {
        let start = Instant::now();
        let mut gap = Gap::new(start);
        for second in [1, 2, 5, 6] {
            gap.event(start + Duration::from_secs(second));
        }
        assert_eq!(
            (gap.longest, gap.at),
            (Duration::from_secs(3), Duration::from_secs(2))
        );
    }
}
