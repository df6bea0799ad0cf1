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
//! Pages may be queued before they are encoded: the writer (`writing`) waits for them in their
//! turn. They may also go by connections of their own, each a conversation too (`spreading`); at
//! the other end what comes by them is put in its place before it is received (`gathering`).
//!
//! A peer that is silent for [`SILENCE`] after its hello is lost, whatever its connection says: a
//! cut link shows no end of file. Each byte from it counts. A sign of life is a pong with number
//! 0, which nobody asked for.
//!
//! A destination that fails says so and goes. A source that is busy sending would only see its link
//! end, and take the move up again: so the reader thread notes what was said, and whoever sends looks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded};

use super::carrier::Worked;
use super::sign_of_life::{LastHeard, Listening};
use super::spreading::Spreading;
use super::writing::{Outgoing, write_frames};
use super::{Counted, HeldUp, Link, Rate};
use crate::codec::{Encoding, Sent};
use crate::error::{Error, Result, chain};
use crate::wire::{
    Agreement, Direction, Frame, FrameReader, FrameWriter, Hello, Message, Role, Tag, ToSource,
    WireError,
};

/// After this long without a word the peer is lost.
pub const SILENCE: Duration = Duration::from_secs(20);

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

pub(super) enum Heard {
    Hello(Hello),
    Frame(Received),
    /// The link was lost, or closed.
    End(String),
    /// The peer said what nobody may say. It would do so again.
    Nonsense(String),
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
    /// None where others work for what is written too.
    worked: Option<Worked>,
    broken: Arc<Mutex<Option<String>>>,
    pub(super) rate: Rate,
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) hurry: Arc<AtomicBool>,
    pub(super) deadline: Option<Deadline>,
    /// The connections that carry this one's pages.
    pub(super) spreading: Option<Spreading>,
    /// What was written by connections that carried pages.
    pub(super) written_beside: Vec<Arc<AtomicU64>>,
    /// What puts the pages of other connections in their place ends with this.
    pub(super) gathering: Option<Sender<()>>,
}

/// When all that is sent and received has to be done.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline {
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
        let worked = Worked::of(link.carrier);
        let working = worked.clone();
        let break_reason = Arc::clone(&broken);
        let hurry = Arc::<AtomicBool>::default();
        let hurried = Arc::clone(&hurry);
        let (writing, all_written) = bounded(0);
        thread::spawn(move || {
            // Dropped when this thread ends.
            let _writing = writing;
            let end = write_frames(
                &mut writer,
                role,
                &frames,
                rate,
                &hurried,
                &holding,
                working.as_ref(),
            );
            if let Err(error) = end
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
                    Err(error @ (WireError::Io(_) | WireError::Truncated)) => {
                        return end(chain(&error));
                    }
                    Err(error) => {
                        let _ = heard.send(Heard::Nonsense(chain(&error)));
                        return;
                    }
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
            worked,
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
    /// wait for it. And the CPU time that it took.
    pub fn sent(&self) -> Sent {
        let held_up = match &self.spreading {
            None => self.held_up.total(),
            Some(spreading) => spreading.held_up(|connection| connection.held_up.total()),
        };
        let beside = self.spreading.iter().flat_map(Spreading::connections);
        Sent {
            bytes: self.bytes().0,
            held_up,
            cpu: beside
                .map(Conversation::own_cpu)
                .chain([self.own_cpu()])
                .sum(),
        }
    }

    /// The CPU time that this connection alone took for writing, if that is all.
    fn own_cpu(&self) -> Option<Duration> {
        self.worked.as_ref().map(Worked::total)
    }

    /// From `deadline` on every send and receive fails with [`Error::Stalled`], whatever the peer
    /// does meanwhile: neither a stalled link nor a peer that only drips messages can make a guest's
    /// silence longer, or the time that the operator gave. It holds for waits that have begun as for
    /// those to come, until it is set anew; `None` lifts it.
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
            _ => Err(self.nonsense("it greeted twice".into())),
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
            Some(_) => Err(self.nonsense("it greeted twice".into())),
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
            Ok(Heard::Nonsense(what)) => Err(self.nonsense(what)),
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

    pub(super) fn nonsense(&self, what: String) -> Error {
        Error::Protocol {
            peer: self.peer.clone(),
            what,
        }
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

#[cfg(test)]
mod tests;
