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
//! Pages may be queued before they are encoded: the writer waits for them in their turn. They may
//! also go by connections of their own, each a conversation too (`spreading`); at the other end
//! what comes by them is put in its place before it is received (`gathering`).
//!
//! A peer that is silent for [`SILENCE`] after its hello is lost, whatever its connection says: a
//! cut link shows no end of file. Each byte from it counts. A sign of life is a pong with number
//! 0, which nobody asked for.
//!
//! A destination that fails says so and goes. A source that is busy sending would only see its link
//! end, and take the move up again: so the reader thread notes what was said, and whoever sends looks.

use std::io::{self, IoSlice, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded};

use super::sign_of_life::{LastHeard, Listening};
use super::spreading::Spreading;
use super::{Counted, HeldUp, Link, Pace, Rate};
use crate::bytes::write_all_vectored;
use crate::codec::{Encoding, Sent};
use crate::error::{Error, Result, chain};
use crate::wire::{
    Agreement, Direction, Frame, FrameReader, FrameWriter, Hello, Message, Place, Role, Tag,
    ToDestination, ToSource, WireError,
};

/// After this long without a word the peer is lost.
pub const SILENCE: Duration = Duration::from_secs(20);

/// A sign of life is sent after this long without anything else.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);

/// Frames that wait for the link if nothing else is said, and frames that wait to be handled: their
/// memory is bounded by this many of the longest.
pub const QUEUE: usize = 4;

/// How long the last words may take to be written. Whoever closes then ends: what is still queued
/// would be lost, the reason for a refusal among it.
const FAREWELL: Duration = Duration::from_secs(5);

/// How long a link that has ended may take to bring the peer's last word.
const LAST_WORD: Duration = Duration::from_secs(1);

/// How often is looked whether connections for pages have written what they have.
const MOMENT: Duration = Duration::from_millis(2);

/// How often a waiting side looks whether it was cancelled.
const TICK: Duration = Duration::from_millis(100);

/// A frame with its own copy of the payload.
pub struct Received {
    pub(super) tag: Tag,
    pub(super) payload: Vec<u8>,
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

/// What waits for the link.
pub(super) enum Outgoing {
    Frame(Vec<u8>),
    /// A frame of pages that are being encoded.
    Pages(Encoding),
    /// Asks how many bytes were written before it.
    Mark(Sender<u64>),
    /// From now on this connection takes its part of the batches, until there are no more, or it is
    /// told to stop.
    Share(Share),
}

/// What connections for pages share.
#[derive(Clone)]
pub(super) struct Share {
    pub(super) batches: Receiver<Placed>,
    pub(super) stop: Arc<AtomicBool>,
    /// How many batches were written, by all of them.
    pub(super) written: Arc<AtomicU64>,
}

/// A batch of pages, and where it stands in the stream.
pub(super) struct Placed {
    pub(super) place: Place,
    pub(super) pages: Encoding,
}

pub(super) enum Heard {
    Hello(Hello),
    Frame(Received),
    End(String),
}

/// How a conversation's end listens.
#[derive(Default)]
pub(super) struct Reading {
    /// Frames that may wait to be received.
    pub(super) queue: usize,
    /// What is read is counted into this.
    pub(super) read: Arc<AtomicU64>,
    /// What the first frame after the hello has to be, if it may not be any.
    pub(super) first: Option<Tag>,
}

/// One end of a link on which messages are exchanged.
pub struct Conversation {
    pub(super) peer: String,
    role: Role,
    pub(super) outgoing: Option<Sender<Outgoing>>,
    /// Closes when the writer has ended.
    all_written: Receiver<()>,
    /// Closes when the reader has ended.
    all_read: Receiver<()>,
    /// Why the peer has failed, once it has said so.
    failure: Arc<Mutex<Option<String>>>,
    pub(super) incoming: Receiver<Heard>,
    pub(super) last_heard: LastHeard,
    silence: Duration,
    pub(super) written: Arc<AtomicU64>,
    pub(super) read: Arc<AtomicU64>,
    held_up: HeldUp,
    broken: Arc<Mutex<Option<String>>>,
    pub(super) rate: Rate,
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) hurry: Arc<AtomicBool>,
    deadline: Option<Deadline>,
    /// The connections that carry this one's pages.
    pub(super) spreading: Option<Spreading>,
    /// What was written by connections that carried pages.
    pub(super) written_beside: Vec<Arc<AtomicU64>>,
    /// What puts the pages of other connections in their place ends with this.
    pub(super) gathering: Option<Sender<()>>,
}

/// When all that is sent and received has to be done.
#[derive(Debug, Clone, Copy)]
struct Deadline {
    at: Instant,
    /// From when it was set.
    allowed: Duration,
}

impl Conversation {
    /// Starts talking to `peer` over `link` as `role`, at most `rate` bytes a second, which may
    /// change on the way. Waits end with [`Error::Cancelled`] once `cancel` is set.
    pub fn start(
        peer: &str,
        link: Link,
        role: Role,
        rate: impl Into<Rate>,
        cancel: Arc<AtomicBool>,
    ) -> Self {
        Self::start_with(peer, link, role, rate, cancel, QUEUE)
    }

    /// As [`Conversation::start`], with room for `queue` frames that wait for the link.
    pub fn start_with(
        peer: &str,
        link: Link,
        role: Role,
        rate: impl Into<Rate>,
        cancel: Arc<AtomicBool>,
        queue: usize,
    ) -> Self {
        Self::begin(
            peer,
            link,
            role,
            rate.into(),
            cancel,
            queue,
            Reading {
                queue: QUEUE,
                ..Reading::default()
            },
        )
    }

    /// With room for `queue` frames that wait for the link.
    pub(super) fn begin(
        peer: &str,
        link: Link,
        role: Role,
        rate: Rate,
        cancel: Arc<AtomicBool>,
        queue: usize,
        reading: Reading,
    ) -> Self {
        let kept_rate = rate.clone();
        let (outgoing, frames) = bounded::<Outgoing>(queue);
        let (heard, incoming) = bounded(reading.queue);
        let Reading { read, first, .. } = reading;
        let last_heard = LastHeard::default();
        let written = Arc::<AtomicU64>::default();
        let broken = Arc::<Mutex<Option<String>>>::default();

        let mut writer = Counted::new(link.writer, Arc::clone(&written));
        let held_up = HeldUp::default();
        let holding = held_up.clone();
        let break_reason = Arc::clone(&broken);
        let hurry = Arc::<AtomicBool>::default();
        let hurried = Arc::clone(&hurry);
        let (writing, all_written) = bounded(0);
        thread::spawn(move || {
            // Dropped when this thread ends.
            let _writing = writing;
            if let Err(error) = write_frames(&mut writer, role, &frames, rate, &hurried, &holding)
                && let Ok(mut broken) = break_reason.lock()
            {
                broken.get_or_insert(chain(&error));
            }
        });
        let reader = Counted::new(link.reader, Arc::clone(&read));
        let noted = last_heard.clone();
        let failure = Arc::<Mutex<Option<String>>>::default();
        let failed = Arc::clone(&failure);
        let (reading, all_read) = bounded(0);
        let mut reader = Listening::new(reader, last_heard.clone());
        thread::spawn(move || {
            // Dropped when this thread ends.
            let _reading: Sender<()> = reading;
            // A receiver that is gone needs nothing more.
            let end = |reason| {
                let _ = heard.send(Heard::End(reason));
            };
            match Hello::read(&mut reader) {
                Ok(hello) => {
                    noted.begin(Instant::now());
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
            let mut frames = FrameReader::new(reader, direction).beginning_with(first);
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
                        if received.tag == Tag::Failed
                            && let Ok(ToSource::Failed(reason)) = ToSource::decode(received.frame())
                            && let Ok(mut failed) = failed.lock()
                        {
                            *failed = Some(reason.to_string());
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
            all_written,
            all_read,
            failure,
            incoming,
            last_heard,
            silence: SILENCE,
            written,
            read,
            held_up,
            broken,
            rate: kept_rate,
            cancel,
            hurry,
            deadline: None,
            spreading: None,
            written_beside: Vec::new(),
            gathering: None,
        }
    }

    /// The other side, as messages name it.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The most bytes a second that are sent now, if there is a limit.
    pub fn limit(&self) -> Option<u64> {
        self.rate.get()
    }

    /// Bytes written to the link, and read from it, by all of its connections.
    pub fn bytes(&self) -> (u64, u64) {
        (
            self.written.load(Ordering::Relaxed) + self.bytes_beside(),
            self.read.load(Ordering::Relaxed),
        )
    }

    /// Of the bytes written, those by connections that carried pages alone.
    pub fn bytes_beside(&self) -> u64 {
        let beside = self.written_beside.iter();
        beside.map(|bytes| bytes.load(Ordering::Relaxed)).sum()
    }

    /// Bytes written to the link, and how long that took: the rate of the link, as long as frames
    /// wait for it.
    pub fn sent(&self) -> Sent {
        let held_up = match &self.spreading {
            None => self.held_up.total(),
            Some(spreading) => spreading.held_up(|connection| connection.held_up.total()),
        };
        Sent {
            bytes: self.bytes().0,
            held_up,
        }
    }

    /// From `deadline` on every send and receive fails with [`Error::Stalled`], whatever the peer
    /// does meanwhile: while a guest is silent, neither a stalled link nor a peer that only drips
    /// messages can make it longer. It holds for waits that have begun as for those to come, until
    /// it is set anew; `None` lifts it.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline.map(|at| Deadline {
            at,
            allowed: at.saturating_duration_since(Instant::now()),
        });
    }

    /// From now on no wait is cancelled. Nor is a rate kept: all that is still to be said is
    /// short, and must not wait for what was queued before it to be paid.
    pub fn ignore_cancel(&mut self) {
        self.cancel = Arc::default();
        self.hurry.store(true, Ordering::Relaxed);
    }

    /// Waits for the peer's hello and agrees on a version.
    ///
    /// # Errors
    /// [`Error::Wire`] where there is no common version, [`Error::LinkLost`],
    /// [`Error::Cancelled`], [`Error::Stalled`].
    pub fn greet(&mut self, deadline: Instant) -> Result<Agreement> {
        match self.hear(deadline)? {
            Heard::Hello(hello) => Ok(Hello::new(self.role).agree(&hello)?),
            _ => Err(self.lost("it did not greet".into())),
        }
    }

    /// Queues a message; waits while the link is busy.
    ///
    /// # Errors
    /// [`Error::LinkLost`], [`Error::Cancelled`], [`Error::Stalled`].
    pub fn send(&mut self, message: &impl Message) -> Result<()> {
        let mut frame = Vec::new();
        if let Some(spreading) = &mut self.spreading
            && let Some(after) = spreading.before(message.tag())
        {
            FrameWriter::new(&mut frame).send(&after)?;
        }
        FrameWriter::new(&mut frame).send(message)?;
        self.queue(Outgoing::Frame(frame))
    }

    /// Queues a batch of pages that may still be under way; waits while the link is busy.
    ///
    /// # Errors
    /// As [`Conversation::send`].
    pub fn send_pages(&mut self, pages: Encoding) -> Result<()> {
        let Some(spreading) = &mut self.spreading else {
            return self.queue(Outgoing::Pages(pages));
        };
        let mut waiting = spreading.place(pages);
        loop {
            self.check()?;
            let Some(spreading) = &self.spreading else {
                return Err(self.lost("the link was closed".into()));
            };
            match spreading.queue.send_timeout(waiting, self.patience(TICK)) {
                Ok(()) => return Ok(()),
                Err(SendTimeoutError::Timeout(unsent)) => waiting = unsent,
                Err(SendTimeoutError::Disconnected(_)) => return Err(self.end_reason()),
            }
        }
    }

    /// The bytes that will have been written when all that is queued so far is: received once they
    /// are.
    ///
    /// # Errors
    /// As [`Conversation::send`].
    pub fn mark(&mut self) -> Result<Receiver<u64>> {
        let (mark, written) = bounded(1);
        self.queue(Outgoing::Mark(mark))?;
        Ok(written)
    }

    /// Waits until all that is queued so far is written.
    ///
    /// # Errors
    /// As [`Conversation::send`].
    pub fn flush(&mut self) -> Result<()> {
        let written = self.mark()?;
        loop {
            match written.recv_timeout(self.patience(TICK)) {
                Ok(_) => break,
                Err(RecvTimeoutError::Timeout) => self.check()?,
                Err(RecvTimeoutError::Disconnected) => return Err(self.end_reason()),
            }
        }
        while self.spreading.as_ref().is_some_and(Spreading::is_behind) {
            self.check()?;
            thread::sleep(self.patience(MOMENT));
        }
        Ok(())
    }

    fn queue(&mut self, mut waiting: Outgoing) -> Result<()> {
        loop {
            self.check()?;
            let Some(outgoing) = &self.outgoing else {
                return Err(self.lost("the link was closed".into()));
            };
            match outgoing.send_timeout(waiting, self.patience(TICK)) {
                Ok(()) => return Ok(()),
                Err(SendTimeoutError::Timeout(unsent)) => waiting = unsent,
                Err(SendTimeoutError::Disconnected(_)) => return Err(self.end_reason()),
            }
        }
    }

    /// The next frame, waited for until `deadline`. After it there is none, not even one that has
    /// come: messages that tell of progress must not put off the end of a wait.
    ///
    /// # Errors
    /// [`Error::LinkLost`] also where `deadline` passes, [`Error::Cancelled`], and
    /// [`Error::Stalled`] where the one of [`Conversation::set_deadline`] does.
    pub fn receive(&mut self, deadline: Instant) -> Result<Received> {
        match self.hear(deadline)? {
            Heard::Frame(received) => Ok(received),
            Heard::Hello(_) | Heard::End(_) => Err(self.lost("it greeted twice".into())),
        }
    }

    /// The next frame if one comes within `patience`.
    ///
    /// # Errors
    /// [`Error::LinkLost`], [`Error::Cancelled`], [`Error::Stalled`].
    pub fn receive_for(&mut self, patience: Duration) -> Result<Option<Received>> {
        match self.hear_for(patience)? {
            None => Ok(None),
            Some(Heard::Frame(received)) => Ok(Some(received)),
            Some(_) => Err(self.lost("it greeted twice".into())),
        }
    }

    /// Sends what is queued, as far as the link takes it within a few seconds, and closes the
    /// writing direction. The peer sees an end of file.
    pub fn close(&mut self) {
        self.end_spreading();
        self.gathering = None;
        self.hurry.store(true, Ordering::Relaxed);
        self.outgoing = None;
        // Nothing is ever sent: this returns when the writer has ended, or is given up.
        let _: std::result::Result<(), _> = self.all_written.recv_timeout(self.patience(FAREWELL));
    }

    fn hear(&mut self, deadline: Instant) -> Result<Heard> {
        loop {
            if Instant::now() >= deadline {
                // The reason that this end has for it comes first.
                self.interrupted()?;
                return Err(self.lost("no answer in time".into()));
            }
            if let Some(heard) = self.hear_for(TICK)? {
                return Ok(heard);
            }
        }
    }

    fn hear_for(&mut self, patience: Duration) -> Result<Option<Heard>> {
        // Also where a message is there already: who always has one to handle is told as well.
        self.interrupted()?;
        match self.incoming.recv_timeout(self.patience(patience)) {
            Ok(Heard::End(reason)) => Err(self.lost(reason)),
            Ok(heard) => {
                // While the queue was full nothing was read: what the peer said meanwhile is
                // still on its way to us.
                self.last_heard.note(Instant::now());
                Ok(Some(heard))
            }
            Err(RecvTimeoutError::Disconnected) => Err(self.end_reason()),
            Err(RecvTimeoutError::Timeout) => self.check().map(|()| None),
        }
    }

    /// How long to wait at most, of `wanted`.
    fn patience(&self, wanted: Duration) -> Duration {
        self.deadline.map_or(wanted, |deadline| {
            wanted.min(deadline.at.saturating_duration_since(Instant::now()))
        })
    }

    /// What ends a wait from this side.
    fn interrupted(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        match self.deadline {
            Some(deadline) if Instant::now() >= deadline.at => Err(Error::Stalled {
                peer: self.peer.clone(),
                allowed: deadline.allowed,
            }),
            _ => Ok(()),
        }
    }

    fn check(&self) -> Result<()> {
        self.interrupted()?;
        if let Some(failed) = self.peer_failed() {
            return Err(failed);
        }
        self.check_connection()?;
        match &self.spreading {
            Some(spreading) => spreading.check().map_err(|ended| self.last_word_or(ended)),
            None => Ok(()),
        }
    }

    /// What the peer has said of its failure.
    fn peer_failed(&self) -> Option<Error> {
        let said = self.failure.lock().ok()?.clone();
        said.map(|reason| Error::PeerFailed {
            peer: self.peer.clone(),
            reason,
        })
    }

    /// Why the peer has failed, where it still says so; else what was seen of it.
    fn last_word_or(&self, seen: Error) -> Error {
        if self.role == Role::Source {
            // Nothing is ever sent: this returns when the reader has ended, or is given up.
            let _: std::result::Result<(), _> =
                self.all_read.recv_timeout(self.patience(LAST_WORD));
        }
        self.peer_failed().unwrap_or(seen)
    }

    /// Whether this connection, of all, still is one.
    pub(super) fn check_connection(&self) -> Result<()> {
        if self.broken.lock().is_ok_and(|broken| broken.is_some()) {
            return Err(self.end_reason());
        }
        // What is queued was heard: a slow handler is not a silent peer.
        match self.last_heard.silent_for(Instant::now()) {
            Some(silent) if silent > self.silence && self.incoming.is_empty() => {
                return Err(self.lost(format!("nothing heard for {} s", silent.as_secs())));
            }
            _ => {}
        }
        Ok(())
    }

    fn end_reason(&self) -> Error {
        let broken = self.broken.lock().ok().and_then(|broken| broken.clone());
        let seen = self.lost(broken.unwrap_or_else(|| "the connection was closed".into()));
        self.last_word_or(seen)
    }

    pub(super) fn lost(&self, reason: String) -> Error {
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
    frames: &Receiver<Outgoing>,
    rate: Rate,
    hurry: &AtomicBool,
    held_up: &HeldUp,
) -> std::result::Result<(), WireError> {
    Hello::new(role).write(&mut *writer)?;
    let mut sign_of_life = Vec::new();
    match role {
        Role::Source => FrameWriter::new(&mut sign_of_life).send(&ToDestination::Pong(0))?,
        Role::Destination => FrameWriter::new(&mut sign_of_life).send(&ToSource::Pong(0))?,
    }
    let mut paced = Paced {
        writer,
        pace: Pace::new(rate),
        hurry,
        held_up,
    };
    loop {
        match frames.recv_timeout(SIGN_OF_LIFE) {
            Ok(Outgoing::Frame(frame)) => paced.write(&[], &frame)?,
            Ok(Outgoing::Pages(pages)) => {
                let batch = paced.encoded(&pages, &sign_of_life)?;
                paced.write(&Tag::Pages.header(batch.len())?, &batch)?;
            }
            Ok(Outgoing::Share(share)) => {
                while !share.stop.load(Ordering::Relaxed) {
                    match share.batches.recv_timeout(SIGN_OF_LIFE) {
                        Ok(Placed { place, pages }) => {
                            let batch = paced.encoded(&pages, &sign_of_life)?;
                            let place = place.to_bytes();
                            let header = Tag::Batch.header(place.len() + batch.len())?;
                            paced.write(&[&header[..], &place[..]].concat(), &batch)?;
                            share.written.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(RecvTimeoutError::Timeout) => paced.write(&[], &sign_of_life)?,
                        Err(RecvTimeoutError::Disconnected) => break,
                    }
                }
            }
            Ok(Outgoing::Mark(mark)) => {
                // Whoever asked may have ended.
                let _ = mark.send(paced.writer.count());
            }
            Err(RecvTimeoutError::Timeout) => paced.write(&[], &sign_of_life)?,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// Writes in slices, below a rate.
struct Paced<'a, W> {
    writer: &'a mut W,
    pace: Pace,
    hurry: &'a AtomicBool,
    held_up: &'a HeldUp,
}

impl<W: Write> Paced<'_, W> {
    /// Waits until pages are encoded.
    fn encoded(&mut self, pages: &Encoding, sign_of_life: &[u8]) -> io::Result<Vec<u8>> {
        loop {
            match pages.recv_timeout(SIGN_OF_LIFE) {
                Ok(batch) => return Ok(batch),
                Err(RecvTimeoutError::Timeout) => self.write(&[], sign_of_life)?,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other("Pages were not encoded"));
                }
            }
        }
    }

    /// Writes `header` and `rest`, the first slice of the one with the other.
    fn write(&mut self, header: &[u8], mut rest: &[u8]) -> io::Result<()> {
        let mut header = header;
        while !rest.is_empty() || !header.is_empty() {
            // Anew each time: another rate may hold by now.
            let (slice, left) = rest.split_at(self.pace.slice().min(rest.len()));
            rest = left;
            let _held_up = self.held_up.begin();
            let mut both = [IoSlice::new(header), IoSlice::new(slice)];
            write_all_vectored(self.writer, &mut both)?;
            self.writer.flush()?;
            self.pace.wait(header.len() + slice.len(), self.hurry);
            header = &[];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    /// One end under test, and the other as bare streams.
    fn talk(role: Role, rate: Option<u64>) -> (Conversation, UnixStream, Arc<AtomicBool>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let cancel = Arc::<AtomicBool>::default();
        let link = Link {
            reader: Box::new(ours.try_clone().unwrap()),
            writer: Box::new(ours),
        };
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

    #[test]
    fn the_last_words_are_written_when_it_is_closed() {
        let written = Arc::<Mutex<Vec<u8>>>::default();
        let (reader, _open) = io::pipe().unwrap();
        let link = Link {
            reader: Box::new(reader),
            writer: Box::new(Slow(Arc::clone(&written))),
        };
        let mut source = Conversation::start("b", link, Role::Source, None, Arc::default());
        let reason = crate::wire::Text::new(&"because ".repeat(50));
        source.send(&ToDestination::Abort(reason.clone())).unwrap();
        source.close();
        let written = written.lock().unwrap();
        assert!(written.ends_with(reason.as_str().as_bytes()));
    }

    #[test]
    fn what_is_written_and_what_holds_it_up_are_counted_together() {
        let written = Arc::<Mutex<Vec<u8>>>::default();
        let (reader, _open) = io::pipe().unwrap();
        let link = Link {
            reader: Box::new(reader),
            writer: Box::new(Slow(Arc::clone(&written))),
        };
        let mut source = Conversation::start("b", link, Role::Source, None, Arc::default());
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
        let written = Arc::<Mutex<Vec<u8>>>::default();
        let (reader, _open) = io::pipe().unwrap();
        let link = Link {
            reader: Box::new(reader),
            writer: Box::new(Slow(Arc::clone(&written))),
        };
        let mut source = Conversation::start("b", link, Role::Source, None, Arc::default());
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
}
