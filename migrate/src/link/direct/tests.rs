use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crossbeam_channel::{Receiver, bounded};

use super::listening::NoPorts;
use super::*;
use crate::link::Link;
use crate::wire::{DirectDoor, DirectOffer};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const ENDS: Ends = Ends {
    from: HERE,
    to: HERE,
};

/// How long what must not come is waited for, and how long what must come may take.
const MOMENT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(20);

/// A destination that listens for `most` connections of whoever has that key.
fn listening(key: PublicKey, most: u32) -> (Listener, DirectDoor, Receiver<Link>) {
    let (come, links) = bounded(4);
    let window = MIN_WINDOW;
    let offered = DirectOffer {
        key,
        connections: most,
        window,
    };
    let (listener, door) = listen(&DirectPolicy::default(), ENDS, &offered, come).unwrap();
    (listener, door, links)
}

fn reach(identity: &Identity, door: &DirectDoor) -> Result<(Link, Direct), String> {
    let made = connect(identity, ENDS, door, 1, MIN_WINDOW, None).remove(0);
    made.map_err(|error| crate::error::chain(&error))
}

/// Both ends of a connection; and what keeps it.
fn connected() -> (Link, Link, Direct) {
    let source = Identity::new().unwrap();
    let (_listener, door, links) = listening(source.public(), 1);
    let (near, direct) = reach(&source, &door).unwrap();
    (near, links.recv_timeout(LONG).unwrap(), direct)
}

#[test]
fn bytes_cross_both_ways_at_once_in_pieces_of_any_size() {
    let (near, far, _direct) = connected();
    let bytes: Vec<u8> = (0..5_000_011_u32).map(|at| ((at * 7) >> 3) as u8).collect();
    let pieces = [1, 70_000, 16_384, 3, 300_000, 16_385];
    thread::scope(|scope| {
        for end in [near, far] {
            let (bytes, mut reader, mut writer) = (&bytes, end.reader, end.writer);
            scope.spawn(move || {
                let mut rest = &bytes[..];
                for piece in pieces.iter().cycle() {
                    let (now, later) = rest.split_at(rest.len().min(*piece));
                    writer.write_all(now).unwrap();
                    rest = later;
                    if rest.is_empty() {
                        // Says that this is all.
                        return;
                    }
                }
            });
            scope.spawn(move || {
                let mut come = vec![0; bytes.len()];
                reader.read_exact(&mut come).unwrap();
                assert!(come == *bytes);
                // Whether it hears that this is all depends on how full the socket was.
                let end = reader.read(&mut come).map_err(|error| error.kind());
                assert!(
                    matches!(end, Ok(0) | Err(ErrorKind::UnexpectedEof)),
                    "{end:?}"
                );
            });
        }
    });
}

#[test]
fn a_connection_that_is_dropped_wakes_whoever_reads() {
    let (mut near, mut far, direct) = connected();
    let reading = thread::spawn(move || near.reader.read(&mut [0; 8]));
    thread::sleep(MOMENT);
    drop(direct);
    // It may be an error or the end.
    assert_eq!(reading.join().unwrap().unwrap_or(0), 0);
    assert_eq!(far.reader.read(&mut [0; 8]).unwrap_or(0), 0);
}

#[test]
fn what_was_changed_on_the_way_is_not_read() {
    let source = Identity::new().unwrap();
    let (_listener, door, links) = listening(source.public(), 1);
    // Somebody between the two, who changes what comes once both know one another.
    let between = TcpListener::bind((HERE, 0)).unwrap();
    let port = between.local_addr().unwrap().port();
    let changing = Arc::<AtomicBool>::default();
    let changes = Arc::clone(&changing);
    thread::spawn(move || {
        let (mut near, _) = between.accept().unwrap();
        let mut far = TcpStream::connect((HERE, door.port)).unwrap();
        let (mut back, mut there) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        thread::spawn(move || std::io::copy(&mut back, &mut there));
        let mut bytes = [0; 1000];
        while let Ok(count @ 1..) = near.read(&mut bytes) {
            if changes.load(Ordering::Acquire) {
                bytes[count - 1] ^= 1;
            }
            far.write_all(&bytes[..count]).unwrap();
        }
    });
    let door = DirectDoor { port, ..door };
    let (mut near, _direct) = reach(&source, &door).unwrap();
    let mut far = links.recv_timeout(LONG).unwrap();
    let mut bytes = [0; 4];
    near.writer.write_all(b"true").unwrap();
    far.reader.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"true");
    changing.store(true, Ordering::Release);
    near.writer.write_all(b"true").unwrap();
    let read = far.reader.read_exact(&mut bytes);
    assert_eq!(read.unwrap_err().kind(), ErrorKind::InvalidData);
}

#[test]
fn only_who_has_the_key_comes_in_and_is_answered() {
    let (source, other) = (Identity::new().unwrap(), Identity::new().unwrap());
    let (_listener, door, links) = listening(source.public(), 2);
    // TLS 1.3 lets a client go on before the server has seen its key: the refusal comes to be read.
    if let Ok((mut link, _direct)) = reach(&other, &door) {
        let read = link.reader.read(&mut [0; 8]);
        assert!(read.is_err(), "{read:?}");
    }
    let mut plain = TcpStream::connect((HERE, door.port)).unwrap();
    plain.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    // One that says nothing keeps nobody out.
    let _silent = TcpStream::connect((HERE, door.port)).unwrap();
    assert!(links.recv_timeout(MOMENT).is_err());

    let wrong = DirectDoor {
        key: other.public(),
        ..door
    };
    let refused = reach(&source, &wrong).err().unwrap();
    assert!(refused.contains("certificate"), "{refused}");
    // Who comes from elsewhere is none of the source's.
    let elsewhere = Ends {
        from: IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)),
        to: HERE,
    };
    let made = connect(&source, elsewhere, &door, 1, MIN_WINDOW, None).remove(0);
    assert!(made.is_err());

    let (_link, _direct) = reach(&source, &door).unwrap();
    links.recv_timeout(LONG).unwrap();
}

#[test]
fn nobody_listens_once_all_have_come_or_the_move_is_over() {
    let source = Identity::new().unwrap();
    let (listener, door, links) = listening(source.public(), 1);
    let _connection = reach(&source, &door).unwrap();
    links.recv_timeout(LONG).unwrap();
    // The thread that has handed the link over closes right after that.
    let closed = |door: &DirectDoor| {
        (0..100).any(|_| {
            thread::sleep(Duration::from_millis(20));
            TcpStream::connect((HERE, door.port)).is_err()
        })
    };
    assert!(closed(&door));
    drop(listener);

    let (listener, door, _links) = listening(source.public(), 1);
    drop(listener);
    assert!(closed(&door));
    let refused = reach(&source, &door).err().unwrap();
    assert!(refused.contains("refused"), "{refused}");
}

#[test]
fn a_port_of_the_range_that_is_taken_is_passed_over() {
    let taken = TcpListener::bind((HERE, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let source = Identity::new().unwrap();
    let at = |first, last| {
        let policy = DirectPolicy {
            ports: Some(Ports::try_from((first, last)).unwrap()),
            ..DirectPolicy::default()
        };
        let offered = DirectOffer {
            key: source.public(),
            connections: u32::MAX,
            window: u32::MAX,
        };
        let (come, _) = bounded(1);
        listen(&policy, ENDS, &offered, come).map(|(_listener, door)| door.port)
    };
    let refused = crate::error::chain(&at(port, port).unwrap_err());
    assert!(refused.contains("in use"), "{refused}");
    let other = at(port, port.saturating_add(200)).unwrap();
    assert!(other > port);
    for (first, last) in [(0, 10), (11, 10)] {
        assert_eq!(Ports::try_from((first, last)), Err(NoPorts));
    }
}
