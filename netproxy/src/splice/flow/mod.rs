//! One direction of a connection.
//!
//! A flow starts by copying, which is cheaper for messages. When reads keep coming full it
//! changes to splicing, and back when they come small. What its sink does not take yet stays in
//! a [queue]. Nothing is read beyond the flow's limit, so that a slow sink makes its source wait:
//! back-pressure is the kernel's own windows.

mod queue;

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;

use mio::net::TcpStream;
use nix::sys::socket::{MsgFlags, send};

use super::budget::Budget;
use super::pipe::PipePool;
use crate::upgrade::state::FlowState;
use queue::Queue;

/// Reads of at least this are bulk.
const LARGE: usize = 32 * 1024;
/// Reads of less than this are messages.
const SMALL: usize = 8 * 1024;
/// So many bulk reads in a row, and the flow splices.
const BULK_AFTER: u8 = 3;
/// What is read at a time while all connections together hold too much.
const CAREFUL: usize = 16 * 1024;
/// The bytes at the end of a first flight that are written by themselves: less than any MSS.
const LAST: usize = 500;

/// A socket and what is known of it: epoll reports changes only.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub stream: TcpStream,
    pub readable: bool,
    pub writable: bool,
    /// Whether a read that gives less than it could says nothing of what is behind it: an end, an
    /// error, or bytes after urgent ones. A read that finds nothing settles it.
    pub more: bool,
}

impl Endpoint {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            readable: true,
            writable: true,
            more: true,
        }
    }
}

/// How far a direction's end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum End {
    /// The source may send more.
    Open,
    /// The source has ended; the sink is not told before it has everything.
    Seen,
    /// The sink has been told.
    Told,
}

/// Which side failed, and how.
#[derive(Debug)]
pub(crate) enum Failure {
    Source(io::Error),
    Sink(io::Error),
}

/// What a flow needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// An event of one of the sockets.
    Wait,
    /// Another turn, without an event: the budget of this one is spent.
    Again,
}

/// What a thread lends to the flow whose turn it is.
pub(crate) struct Workspace<'a> {
    pub scratch: &'a mut [u8],
    pub pool: &'a mut PipePool,
    pub budget: &'a Budget,
    /// The most bytes that a flow holds.
    pub limit: usize,
    /// The most bytes that a flow moves in one turn.
    pub turn: usize,
}

/// One direction of a connection.
#[derive(Debug)]
pub(crate) struct Flow {
    queue: Queue,
    end: End,
    bulk: u8,
    may_splice: bool,
}

impl Flow {
    pub(crate) fn new() -> Self {
        Self {
            queue: Queue::new(),
            end: End::Open,
            bulk: 0,
            may_splice: true,
        }
    }

    pub(crate) fn end(&self) -> End {
        self.end
    }

    /// Bytes taken from the source that the sink does not have.
    pub(crate) fn queued(&self) -> usize {
        self.queue.length()
    }

    /// Bytes written to sinks so far, those that were written again included.
    pub(crate) fn written(&self) -> u64 {
        self.queue.written()
    }

    /// Bytes given to sinks so far, each of them once.
    pub(crate) fn given(&self) -> u64 {
        self.queue.given()
    }

    /// Bytes that came into the queue so far or went past it, each of them once.
    pub(crate) fn taken(&self) -> u64 {
        self.queue.taken()
    }

    /// The source has ended, as known from elsewhere than a read.
    pub(crate) fn source_ended(&mut self) {
        if self.end == End::Open {
            self.end = End::Seen;
        }
    }

    /// The sink was told of the end, but may not know it any more: it is told again.
    pub(crate) fn tell_again(&mut self) {
        if self.end == End::Told {
            self.end = End::Seen;
        }
    }

    /// Puts bytes behind all others.
    pub(crate) fn push_back(&mut self, data: &[u8], budget: &Budget) {
        self.queue.push_back(data, budget);
    }

    /// Puts bytes in front of all others: they were written before, and are to be written again.
    pub(crate) fn push_front(&mut self, bytes: Vec<u8>, budget: &Budget) {
        self.queue.push_front(bytes, budget);
    }

    /// Writes bytes that are in front of all others, so that the kernel sends them to the last one
    /// if the window takes them just so. What it does not take is put in front of the queue.
    ///
    /// The last few are a record of their own, and so is what is before them. A segment of more
    /// than one MSS that just fills the window could else be kept until the window grows, and one
    /// that was cut too large for it would be kept for certain.
    pub(crate) fn write_apart(&mut self, mut bytes: Vec<u8>, sink: &TcpStream, budget: &Budget) {
        let flags = MsgFlags::MSG_EOR | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let last = bytes.len().saturating_sub(LAST);
        let mut start = 0;
        while start < bytes.len() {
            let end = if start < last { last } else { bytes.len() };
            let part = bytes.get(start..end).unwrap_or(&[]);
            match send(sink.as_raw_fd(), part, flags) {
                Ok(written @ 1..) => start += written,
                // An error is met again by the next turn.
                _ => break,
            }
        }
        // They were written before, as what is put in front.
        self.queue.note_written_again(start);
        bytes.drain(..start);
        self.push_front(bytes, budget);
    }

    /// Drops what is queued.
    pub(crate) fn clear(&mut self, pool: &mut PipePool, budget: &Budget) {
        self.queue.clear(pool, budget);
    }

    /// Puts it down for the next program.
    pub(crate) fn pack(self, budget: &Budget) -> FlowState {
        FlowState {
            end: self.end,
            bulk: self.bulk,
            may_splice: self.may_splice,
            written: self.queue.written(),
            given: Some(self.queue.given()),
            again: self.queue.again(),
            segments: self.queue.pack(budget),
        }
    }

    /// Takes up what was put down.
    pub(crate) fn unpack(state: FlowState, pool: &mut PipePool, budget: &Budget) -> Self {
        Self {
            end: state.end,
            bulk: state.bulk,
            may_splice: state.may_splice,
            queue: Queue::unpack(state, pool, budget),
        }
    }

    /// Moves what can be moved. A side that is `None` is not to be touched now: without a sink,
    /// the flow still reads up to its limit.
    pub(crate) fn pump(
        &mut self,
        source: Option<&mut Endpoint>,
        mut sink: Option<&mut Endpoint>,
        work: &mut Workspace<'_>,
    ) -> Result<(Turn, usize), Failure> {
        let carried = self.carry(source, sink.as_deref_mut(), work)?;
        if carried.0 == Turn::Wait
            && self.end == End::Seen
            && self.queue.length() == 0
            && let Some(sink) = sink
        {
            match sink.stream.shutdown(std::net::Shutdown::Write) {
                // Reset meanwhile: the read side says so.
                Err(error) if error.kind() != io::ErrorKind::NotConnected => {
                    return Err(Failure::Sink(error));
                }
                _ => self.end = End::Told,
            }
        }
        Ok(carried)
    }

    /// The same, but the sink is not told of an end.
    pub(crate) fn carry(
        &mut self,
        mut source: Option<&mut Endpoint>,
        mut sink: Option<&mut Endpoint>,
        work: &mut Workspace<'_>,
    ) -> Result<(Turn, usize), Failure> {
        let mut moved = 0;
        loop {
            let out = match sink.as_deref_mut() {
                Some(sink) => self.queue.write(sink, work).map_err(Failure::Sink)?,
                None => 0,
            };
            moved += out;
            if moved >= work.turn {
                return Ok((Turn::Again, moved));
            }
            let taken = match source.as_deref_mut() {
                Some(source) if source.readable && self.end == End::Open => {
                    self.take(source, sink.as_deref_mut(), work)?
                }
                _ => 0,
            };
            moved += taken;
            if out == 0 && taken == 0 {
                return Ok((Turn::Wait, moved));
            }
        }
    }

    /// Takes bytes from the source once. Returns how many; 0 when there is nothing more to do
    /// before an event.
    fn take(
        &mut self,
        source: &mut Endpoint,
        sink: Option<&mut Endpoint>,
        work: &mut Workspace<'_>,
    ) -> Result<usize, Failure> {
        let flows = self.queue.is_empty() && sink.as_ref().is_some_and(|sink| sink.writable);
        if self.may_splice && self.bulk >= BULK_AFTER {
            if flows && let Some(pipe) = work.pool.lease() {
                self.queue.push_pipe(pipe);
            }
            if self.queue.last_pipe().is_some() {
                return self.splice_in(source, work);
            }
        }
        let wanted = if flows {
            let careful = if work.budget.room() < work.limit {
                CAREFUL
            } else {
                work.limit
            };
            careful.min(work.scratch.len())
        } else {
            let room = work
                .limit
                .saturating_sub(self.queue.length())
                .min(work.budget.room());
            room.min(work.scratch.len())
        };
        if wanted == 0 {
            return Ok(0);
        }
        let Some(scratch) = work.scratch.get_mut(..wanted) else {
            return Ok(0);
        };
        let taken = match source.stream.read(scratch) {
            Ok(0) => {
                self.end = End::Seen;
                return Ok(0);
            }
            Ok(taken) => taken,
            Err(error) => return would_block(error, source),
        };
        // What comes after the last byte is an event.
        source.readable = taken == wanted || source.more;
        self.judge(taken);
        let data = scratch.get(..taken).unwrap_or(&[]);
        let mut given = 0;
        if flows && let Some(sink) = sink {
            match sink.stream.write(data) {
                Ok(written) => given = written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => sink.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::Sink(error)),
            }
            self.queue.note_written(given);
        }
        self.push_back(data.get(given..).unwrap_or(&[]), work.budget);
        Ok(taken)
    }

    fn splice_in(
        &mut self,
        source: &mut Endpoint,
        work: &mut Workspace<'_>,
    ) -> Result<usize, Failure> {
        let Some(pipe) = self.queue.last_pipe() else {
            return Ok(0);
        };
        let was_empty = pipe.filled() == 0;
        let result = pipe.fill(&source.stream);
        let taken = match result {
            Ok(taken) => taken,
            // The pipe may be what is full: that says nothing of the source.
            Err(ref error) if error.kind() == io::ErrorKind::WouldBlock && !was_empty => 0,
            Err(error) => {
                let result = if error.raw_os_error() == Some(libc::EINVAL) {
                    // This socket can't be spliced: copy.
                    self.may_splice = false;
                    Ok(1)
                } else if error.kind() == io::ErrorKind::WouldBlock && source.more {
                    // Splicing does not come past urgent bytes: the next read copies.
                    self.bulk = BULK_AFTER - 1;
                    Ok(1)
                } else {
                    would_block(error, source)
                };
                self.queue.drop_empty_pipe(work.pool);
                return result;
            }
        };
        if taken == 0 {
            if was_empty {
                self.end = End::Seen;
                self.queue.drop_empty_pipe(work.pool);
            } else if result.is_ok() {
                self.end = End::Seen;
            }
            return Ok(0);
        }
        self.queue.note_spliced(taken);
        self.judge(taken);
        Ok(taken)
    }

    /// Learns from the size of a read whether this is bulk.
    fn judge(&mut self, taken: usize) {
        if taken >= LARGE {
            self.bulk = self.bulk.saturating_add(1).min(2 * BULK_AFTER);
        } else if taken < SMALL {
            self.bulk = self.bulk.saturating_sub(1);
        }
    }
}

fn would_block(error: io::Error, source: &mut Endpoint) -> Result<usize, Failure> {
    match error.kind() {
        io::ErrorKind::WouldBlock => {
            source.readable = false;
            source.more = false;
            Ok(0)
        }
        io::ErrorKind::Interrupted => Ok(1),
        _ => Err(Failure::Source(error)),
    }
}

#[cfg(test)]
mod tests;
