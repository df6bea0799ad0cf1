use std::io::{self, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::wire::ToDestination;

/// One end under test, and the other as bare streams.
fn talk(role: Role, rate: Option<u64>) -> (Conversation, UnixStream, Arc<AtomicBool>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let cancel = Arc::<AtomicBool>::default();
    let link = Link::new(ours.try_clone().unwrap(), ours);
    let conversation = Conversation::start("b", link, role, rate, Arc::clone(&cancel));
    (conversation, theirs, cancel)
}

/// Far enough to be no part of a test.
fn later() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(50)
}

#[test]
fn a_deadline_ends_a_send_that_the_link_holds_up() {
    // Nobody reads at the other end.
    let (mut source, _stalled, _) = talk(Role::Source, None);
    source.set_deadline(Some(soon()));
    let batch = vec![0; 256 << 10];
    let error = loop {
        if let Err(error) = source.send(&ToDestination::Pages(&batch)) {
            break error;
        }
    };
    assert!(matches!(error, Error::Stalled { .. }), "{error:?}");
    // Nor is anything sent after it, though it may be lifted.
    assert!(source.send(&ToDestination::Commit).is_err());
}

#[test]
fn a_deadline_ends_a_receive() {
    let (mut source, _silent, _) = talk(Role::Source, None);
    source.set_deadline(Some(soon()));
    let error = source.receive(later()).err().unwrap();
    assert!(matches!(error, Error::Stalled { .. }), "{error:?}");
    assert!(source.receive_for(Duration::from_secs(3600)).is_err());
}

#[test]
fn a_peer_that_drips_messages_does_not_move_the_deadline() {
    let (mut source, mut peer, _) = talk(Role::Source, None);
    Hello::new(Role::Destination).write(&mut peer).unwrap();
    source.greet(later()).unwrap();
    let dripping = thread::spawn(move || {
        let mut frames = FrameWriter::new(peer);
        while frames.send(&ToSource::CaughtUp).is_ok() {}
    });
    source.set_deadline(Some(soon()));
    let error = loop {
        if let Err(error) = source.receive(later()) {
            break error;
        }
    };
    assert!(matches!(error, Error::Stalled { .. }), "{error:?}");
    drop(source);
    dripping.join().unwrap();
}

/// A writer that takes its time for each byte.
struct Slow(Arc<Mutex<Vec<u8>>>);

impl Write for Slow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        thread::sleep(TICK / 100);
        let count = bytes.len().min(16);
        self.0.lock().unwrap().extend(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A source whose link is slow, what was written to it, and what keeps it open.
fn on_a_slow_link() -> (Conversation, Arc<Mutex<Vec<u8>>>, io::PipeWriter) {
    let written = Arc::<Mutex<Vec<u8>>>::default();
    let (reader, open) = io::pipe().unwrap();
    let link = Link::new(reader, Slow(Arc::clone(&written)));
    let source = Conversation::start("b", link, Role::Source, None, Arc::default());
    (source, written, open)
}

#[test]
fn the_last_words_are_written_when_it_is_closed() {
    let (mut source, written, _open) = on_a_slow_link();
    let reason = crate::wire::Text::new(&"because ".repeat(50));
    source.send(&ToDestination::Abort(reason.clone())).unwrap();
    source.close();
    let written = written.lock().unwrap();
    assert!(written.ends_with(reason.as_str().as_bytes()));
}

#[test]
fn what_is_written_and_what_holds_it_up_are_counted_together() {
    let (mut source, written, _open) = on_a_slow_link();
    source.send(&ToDestination::Pages(&[7; 400])).unwrap();
    source.close();
    let sent = source.sent();
    assert_eq!(sent.bytes, written.lock().unwrap().len() as u64);
    // The frame alone is more than 400 bytes, in writes of 16.
    assert!(sent.held_up >= 25 * (TICK / 100));
}

#[test]
fn a_rate_counts_as_what_the_link_takes() {
    let (mut source, peer, _) = talk(Role::Source, Some(10_000));
    drop(thread::spawn(move || io::copy(&mut &peer, &mut io::sink())));
    source.send(&ToDestination::Pages(&[7; 3000])).unwrap();
    while source.bytes().0 < 3000 {
        thread::sleep(TICK / 10);
    }
    // 0.3 s at this rate, less a burst and the pause after the last piece.
    assert!(source.sent().held_up >= Duration::from_millis(100));
}

#[test]
fn a_lifted_deadline_holds_no_more() {
    let (mut source, mut peer, _) = talk(Role::Source, None);
    source.set_deadline(Some(Instant::now()));
    assert!(source.greet(later()).is_err());
    source.set_deadline(None);
    Hello::new(Role::Destination).write(&mut peer).unwrap();
    source.greet(later()).unwrap();
    FrameWriter::new(&mut peer)
        .send(&ToSource::Running)
        .unwrap();
    let received = source.receive(later()).unwrap();
    assert_eq!(received.tag(), Tag::Running);
}

#[test]
fn silence_counts_from_the_hello_on() {
    let (mut source, mut peer, _) = talk(Role::Source, None);
    source.silence = Duration::ZERO;
    for _ in 0..3 {
        assert!(
            source
                .receive_for(Duration::from_millis(1))
                .unwrap()
                .is_none()
        );
    }
    Hello::new(Role::Destination).write(&mut peer).unwrap();
    source.greet(later()).unwrap();
    let error = source.receive(later()).err().unwrap();
    assert!(error.to_string().contains("nothing heard"), "{error}");
}

/// Whoever sends all the time does not take a peer that gives up for a link that breaks.
#[test]
fn the_last_word_of_a_peer_reaches_who_only_sends() {
    for reads in [false, true] {
        let (mut source, mut peer, _) = talk(Role::Source, None);
        Hello::new(Role::Destination).write(&mut peer).unwrap();
        source.greet(later()).unwrap();
        let last = ToSource::Failed(crate::wire::Text::new("The disk is full"));
        FrameWriter::new(&mut peer).send(&last).unwrap();
        let _reading = reads.then(|| {
            let peer = peer.try_clone().unwrap();
            thread::spawn(move || io::copy(&mut &peer, &mut io::sink()))
        });
        if !reads {
            drop(peer);
        }
        let batch = vec![0; 256 << 10];
        let error = loop {
            if let Err(error) = source.send(&ToDestination::Pages(&batch)) {
                break error;
            }
        };
        assert!(matches!(error, Error::PeerFailed { .. }), "{error:?}");
    }
}

#[test]
fn what_was_flushed_is_written() {
    let (mut source, written, _open) = on_a_slow_link();
    source.send(&ToDestination::Pages(&[7; 1600])).unwrap();
    source.flush().unwrap();
    assert!(written.lock().unwrap().len() > 1600);
}

#[test]
fn a_low_rate_delays_no_farewell() {
    use std::io::Read;
    // At this rate the first frame alone would take a day.
    let (mut source, mut peer, _) = talk(Role::Source, Some(1));
    source
        .send(&ToDestination::Pages(&vec![7; 100_000]))
        .unwrap();
    assert_eq!(Hello::read(&mut peer).unwrap().role, Role::Source);
    // A part of it is a sign of life.
    let mut start = vec![0; 200_000];
    let count = peer.read(&mut start).unwrap();
    assert!((1..=512).contains(&count), "{count}");
    source.ignore_cancel();
    source
        .send(&ToDestination::Abort(crate::wire::Text::new("enough")))
        .unwrap();
    let mut frames = FrameReader::new(
        io::Cursor::new(start[..count].to_vec()).chain(peer),
        Direction::ToDestination,
    );
    assert_eq!(frames.read().unwrap().unwrap().tag, Tag::Pages);
    assert_eq!(frames.read().unwrap().unwrap().tag, Tag::Abort);
}

#[test]
fn what_comes_too_late_does_not_count() {
    let (mut source, mut peer, _) = talk(Role::Source, None);
    Hello::new(Role::Destination).write(&mut peer).unwrap();
    source.greet(later()).unwrap();
    FrameWriter::new(&mut peer)
        .send(&ToSource::Running)
        .unwrap();
    let error = source.receive(Instant::now()).err().unwrap();
    assert!(error.to_string().contains("in time"), "{error}");
    assert_eq!(source.receive(later()).unwrap().tag(), Tag::Running);
}

#[test]
fn a_peer_that_never_stops_talking_does_not_hold_up_a_cancel() {
    let (mut destination, mut peer, cancel) = talk(Role::Destination, None);
    Hello::new(Role::Source).write(&mut peer).unwrap();
    destination.greet(later()).unwrap();
    FrameWriter::new(&mut peer)
        .send(&ToDestination::Ping(1))
        .unwrap();
    cancel.store(true, Ordering::Relaxed);
    let error = destination.receive(later()).err().unwrap();
    assert!(matches!(error, Error::Cancelled), "{error:?}");
}
