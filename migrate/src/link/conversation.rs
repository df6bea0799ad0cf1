//! Messages over a link: sending and receiving without one holding up the other.
//!
//! ```text
//!           bounded queue                                   bounded queue
//! send() -> frames -> writer thread -> link -> reader thread -> frames -> receive()
//!                         |                        |
//!                  hello first; paces;       notes when the peer
//!                  a sign of life when       was heard last
//!                  there is nothing to send
//! ```
//!
//! A peer that is silent for [`SILENCE`] is lost, whatever its connection says: a cut link shows
//! no end of file. Silence is counted from its hello on, and ends with each byte: a long frame takes
//! its time on a slow link. A sign of life is a pong with number 0, which nobody asked for.
//!
//! Whoever waits may set a deadline for all that it sends and receives
//! ([`Conversation::set_deadline`]): a peer that is alive and gets nowhere must not keep a suspended
//! guest waiting.

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded};

use super::{Counted, Link, Pace};
use crate::error::{Error, Result, chain};
use crate::wire::{
    Agreement, Direction, Frame, FrameReader, FrameWriter, Hello, Message, Role, Tag,
    ToDestination, ToSource, WireError,
};

/// After this long without a word the peer is lost.
pub const SILENCE: Duration = Duration::from_secs(20);

/// A sign of life is sent after this long without anything else.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);

/// Frames that wait for the link, and frames that wait to be handled: their memory is bounded by
/// this many of the longest.
const QUEUE: usize = 4;

/// How often a waiting side looks whether it was cancelled.
const TICK: Duration = Duration::from_millis(100);

/// A frame with its own copy of the payload.
pub struct Received {
    tag: Tag,
    payload: Vec<u8>,
}

impl Received {
    /// What it is.
    pub fn tag(&self) -> Tag {
        self.tag
    }

    /// As the decoders take it.
    pub fn frame(&self) -> Frame<'_> {
        Frame {
            tag: self.tag,
            payload: &self.payload,
        }
    }
}

enum Heard {
    Hello(Hello),
    Frame(Received),
    End(String),
}

/// One end of a link on which messages are exchanged.
pub struct Conversation {
    peer: String,
    role: Role,
    outgoing: Option<Sender<Vec<u8>>>,
    incoming: Receiver<Heard>,
    last_heard: LastHeard,
    written: Arc<AtomicU64>,
    read: Arc<AtomicU64>,
    broken: Arc<Mutex<Option<String>>>,
    cancel: Arc<AtomicBool>,
    deadline: Option<Instant>,
}

/// When the peer was heard last; none before its first byte.
#[derive(Clone, Default)]
struct LastHeard(Arc<Mutex<Option<Instant>>>);

impl LastHeard {
    fn note(&self) {
        if let Ok(mut noted) = self.0.lock() {
            *noted = Some(Instant::now());
        }
    }

    fn silence(&self) -> Duration {
        let noted = self.0.lock().ok().and_then(|noted| *noted);
        noted.map_or(Duration::ZERO, |noted| noted.elapsed())
    }
}

/// A reader that notes when it has read something.
struct Listening<R> {
    inner: R,
    last_heard: LastHeard,
}

impl<R: Read> Read for Listening<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if count > 0 {
            self.last_heard.note();
        }
        Ok(count)
    }
}

impl Conversation {
    /// Starts talking to `peer` over `link` as `role`, at most `rate` bytes a second. Waits end
    /// with [`Error::Cancelled`] once `cancel` is set.
    pub fn start(
        peer: &str,
        link: Link,
        role: Role,
        rate: Option<u64>,
        cancel: Arc<AtomicBool>,
    ) -> Self {
        let (outgoing, frames) = bounded::<Vec<u8>>(QUEUE);
        let (heard, incoming) = bounded(QUEUE);
        let last_heard = LastHeard::default();
        let (written, read) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let broken = Arc::<Mutex<Option<String>>>::default();

        let mut writer = Counted::new(link.writer, Arc::clone(&written));
        let break_reason = Arc::clone(&broken);
        thread::spawn(move || {
            if let Err(error) = write_frames(&mut writer, role, &frames, rate)
                && let Ok(mut broken) = break_reason.lock()
            {
                broken.get_or_insert(chain(&error));
            }
        });
        let mut reader = Counted::new(
            Listening {
                inner: link.reader,
                last_heard: last_heard.clone(),
            },
            Arc::clone(&read),
        );
        thread::spawn(move || {
            // A receiver that is gone needs nothing more.
            let end = |reason| {
                let _ = heard.send(Heard::End(reason));
            };
            match Hello::read(&mut reader) {
                Ok(hello) => {
                    if heard.send(Heard::Hello(hello)).is_err() {
                        return;
                    }
                }
                Err(error) => return end(chain(&error)),
            }
            let direction = match role {
                Role::Source => Direction::ToSource,
                Role::Destination => Direction::ToDestination,
            };
            let mut frames = FrameReader::new(reader, direction);
            loop {
                match frames.read() {
                    Ok(Some(frame)) => {
                        let received = Received {
                            tag: frame.tag,
                            payload: frame.payload.to_vec(),
                        };
                        if is_sign_of_life(&received) {
                            continue;
                        }
                        if heard.send(Heard::Frame(received)).is_err() {
                            return;
                        }
                    }
                    Ok(None) => return end("the connection was closed".into()),
                    Err(error) => return end(chain(&error)),
                }
            }
        });
        Conversation {
            peer: peer.to_owned(),
            role,
            outgoing: Some(outgoing),
            incoming,
            last_heard,
            written,
            read,
            broken,
            cancel,
            deadline: None,
        }
    }

    /// The other side, as messages name it.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Bytes written to the link, and read from it.
    pub fn bytes(&self) -> (u64, u64) {
        (
            self.written.load(Ordering::Relaxed),
            self.read.load(Ordering::Relaxed),
        )
    }

    /// From now on no wait is cancelled.
    pub fn ignore_cancel(&mut self) {
        self.cancel = Arc::default();
    }

    /// From now on sending and receiving fail once it is later than this. `None`: no more.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// Waits for the peer's hello and agrees on a version.
    ///
    /// # Errors
    /// [`Error::Wire`] where there is no common version, [`Error::LinkLost`],
    /// [`Error::Cancelled`].
    pub fn greet(&mut self, deadline: Instant) -> Result<Agreement> {
        match self.hear(deadline)? {
            Heard::Hello(hello) => Ok(Hello::new(self.role).agree(&hello)?),
            _ => Err(self.lost("it did not greet".into())),
        }
    }

    /// Queues a message; waits while the link is busy.
    ///
    /// # Errors
    /// [`Error::LinkLost`], [`Error::Cancelled`].
    pub fn send(&mut self, message: &impl Message) -> Result<()> {
        let mut frame = Vec::new();
        FrameWriter::new(&mut frame).send(message)?;
        loop {
            self.check()?;
            let Some(outgoing) = &self.outgoing else {
                return Err(self.lost("the link was closed".into()));
            };
            match outgoing.send_timeout(frame, TICK) {
                Ok(()) => return Ok(()),
                Err(SendTimeoutError::Timeout(unsent)) => frame = unsent,
                Err(SendTimeoutError::Disconnected(_)) => return Err(self.end_reason()),
            }
        }
    }

    /// The next frame, waited for until `deadline`. After it there is none, not even one that has
    /// come: messages that tell of progress must not put off the end of a wait.
    ///
    /// # Errors
    /// [`Error::LinkLost`] also where the deadline passes, [`Error::Cancelled`].
    pub fn receive(&mut self, deadline: Instant) -> Result<Received> {
        self.check_time(Some(deadline))?;
        match self.hear(deadline)? {
            Heard::Frame(received) => Ok(received),
            Heard::Hello(_) | Heard::End(_) => Err(self.lost("it greeted twice".into())),
        }
    }

    /// The next frame if one comes within `patience`.
    ///
    /// # Errors
    /// [`Error::LinkLost`], [`Error::Cancelled`].
    pub fn receive_for(&mut self, patience: Duration) -> Result<Option<Received>> {
        match self.hear_for(patience)? {
            None => Ok(None),
            Some(Heard::Frame(received)) => Ok(Some(received)),
            Some(_) => Err(self.lost("it greeted twice".into())),
        }
    }

    /// Sends what is queued and closes the writing direction. The peer sees an end of file.
    pub fn close(&mut self) {
        self.outgoing = None;
    }

    fn hear(&mut self, deadline: Instant) -> Result<Heard> {
        loop {
            if let Some(heard) = self.hear_for(TICK)? {
                return Ok(heard);
            }
            self.check_time(Some(deadline))?;
        }
    }

    fn check_time(&self, deadline: Option<Instant>) -> Result<()> {
        match deadline {
            Some(deadline) if Instant::now() >= deadline => {
                Err(self.lost("no answer in time".into()))
            }
            _ => Ok(()),
        }
    }

    fn hear_for(&mut self, patience: Duration) -> Result<Option<Heard>> {
        self.check_time(self.deadline)?;
        match self.incoming.recv_timeout(patience) {
            Ok(Heard::End(reason)) => Err(self.lost(reason)),
            Ok(heard) => Ok(Some(heard)),
            Err(RecvTimeoutError::Disconnected) => Err(self.end_reason()),
            Err(RecvTimeoutError::Timeout) => self.check().map(|()| None),
        }
    }

    fn check(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        if self.broken.lock().is_ok_and(|broken| broken.is_some()) {
            return Err(self.end_reason());
        }
        self.check_time(self.deadline)?;
        // What is queued was heard: a slow handler is not a silent peer.
        let silence = self.last_heard.silence();
        if silence > SILENCE && self.incoming.is_empty() {
            return Err(self.lost(format!("nothing heard for {} s", silence.as_secs())));
        }
        Ok(())
    }

    fn end_reason(&self) -> Error {
        let broken = self.broken.lock().ok().and_then(|broken| broken.clone());
        self.lost(broken.unwrap_or_else(|| "the connection was closed".into()))
    }

    fn lost(&self, reason: String) -> Error {
        Error::LinkLost {
            peer: self.peer.clone(),
            reason,
        }
    }
}

fn is_sign_of_life(received: &Received) -> bool {
    matches!(received.tag, Tag::SourcePong | Tag::DestinationPong)
        && received.payload.iter().all(|byte| *byte == 0)
}

fn write_frames(
    writer: &mut Counted<Box<dyn Write + Send>>,
    role: Role,
    frames: &Receiver<Vec<u8>>,
    rate: Option<u64>,
) -> std::result::Result<(), WireError> {
    Hello::new(role).write(&mut *writer)?;
    let mut sign_of_life = Vec::new();
    match role {
        Role::Source => FrameWriter::new(&mut sign_of_life).send(&ToDestination::Pong(0))?,
        Role::Destination => FrameWriter::new(&mut sign_of_life).send(&ToSource::Pong(0))?,
    }
    let mut pace = Pace::new(rate);
    loop {
        let frame = match frames.recv_timeout(SIGN_OF_LIFE) {
            Ok(frame) => frame,
            Err(RecvTimeoutError::Timeout) => sign_of_life.clone(),
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        // In pieces: at a low rate the peer hears a little all the time.
        for piece in frame.chunks(pace.piece()) {
            writer.write_all(piece)?;
            writer.flush()?;
            pace.wait(piece.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair(rate: Option<u64>) -> (Conversation, Conversation) {
        let (one, other) = UnixStream::pair().unwrap();
        let talk = |stream: UnixStream, role, rate| {
            let link = Link {
                reader: Box::new(stream.try_clone().unwrap()),
                writer: Box::new(stream),
            };
            Conversation::start("peer", link, role, rate, Arc::default())
        };
        let mut pair = (
            talk(one, Role::Source, rate),
            talk(other, Role::Destination, None),
        );
        let soon = Instant::now() + Duration::from_secs(60);
        pair.0.greet(soon).unwrap();
        pair.1.greet(soon).unwrap();
        pair
    }

    fn lost(result: Result<impl Sized>, word: &str) {
        match result {
            Err(Error::LinkLost { reason, .. }) if reason.contains(word) => {}
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("It is not lost"),
        }
    }

    #[test]
    fn a_deadline_ends_every_wait() {
        let (mut source, mut destination) = pair(None);
        let later = Instant::now() + Duration::from_secs(3600);
        source.set_deadline(Some(Instant::now()));
        destination.send(&ToSource::Pong(1)).unwrap();
        lost(source.receive(later), "in time");
        lost(source.send(&ToDestination::Ping(1)), "in time");
        lost(source.receive_for(Duration::ZERO), "in time");
        source.set_deadline(None);
        assert_eq!(source.receive(later).unwrap().tag(), Tag::DestinationPong);
        source.send(&ToDestination::Ping(1)).unwrap();
    }

    /// A destination that goes on telling how far it is, and gets nowhere.
    #[test]
    fn what_comes_too_late_does_not_count() {
        let (mut source, mut destination) = pair(None);
        destination.send(&ToSource::Running).unwrap();
        lost(source.receive(Instant::now()), "in time");
    }

    #[test]
    fn a_capped_link_still_shows_life() {
        // A frame that takes a minute, in pieces of a tenth of a second.
        let (mut source, destination) = pair(Some(100_000));
        source
            .send(&ToDestination::Pages(&vec![1; 1 << 20]))
            .unwrap();
        let start = Instant::now();
        let (_, before) = destination.bytes();
        while destination.bytes().1 < before + 30_000 {
            assert!(start.elapsed() < Duration::from_secs(60));
            thread::sleep(Duration::from_millis(10));
        }
        assert!(destination.incoming.is_empty(), "It is whole already");
        assert!(destination.last_heard.silence() < SILENCE);
    }
}
