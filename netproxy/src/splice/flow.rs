//! One direction of a connection.
//!
//! A flow starts by copying, which is cheaper for messages. When reads keep coming full it
//! changes to splicing, and back when they come small. What its sink does not take yet stays in
//! a queue of segments: pipes and bytes, in the order in which they came. Nothing is read beyond
//! the flow's limit, so that a slow sink makes its source wait: back-pressure is the kernel's
//! own windows.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use mio::net::TcpStream;
use nix::sys::socket::{MsgFlags, send};

use super::pipe::{Pipe, PipePool};
use crate::upgrade::state::{FlowState, Handed, SegmentState};

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
}

impl Endpoint {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            readable: true,
            writable: true,
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

/// What all connections together hold in bytes.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    held: AtomicUsize,
    limit: AtomicUsize,
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            held: AtomicUsize::new(0),
            limit: AtomicUsize::new(limit),
        }
    }

    pub(crate) fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    fn room(&self) -> usize {
        self.limit
            .load(Ordering::Relaxed)
            .saturating_sub(self.held())
    }

    fn take(&self, bytes: usize) {
        self.held.fetch_add(bytes, Ordering::Relaxed);
    }

    fn release(&self, bytes: usize) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }
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

#[derive(Debug)]
enum Segment {
    Bytes { bytes: Vec<u8>, start: usize },
    Pipe(Pipe),
}

/// One direction of a connection.
#[derive(Debug)]
pub(crate) struct Flow {
    queue: VecDeque<Segment>,
    queued: usize,
    end: End,
    bulk: u8,
    may_splice: bool,
    written: u64,
    /// Those that were written for the first time.
    given: u64,
    /// The bytes in front that were written before.
    again: usize,
}

impl Flow {
    pub(crate) fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            queued: 0,
            end: End::Open,
            bulk: 0,
            may_splice: true,
            written: 0,
            given: 0,
            again: 0,
        }
    }

    pub(crate) fn end(&self) -> End {
        self.end
    }

    /// Bytes taken from the source that the sink does not have.
    pub(crate) fn queued(&self) -> usize {
        self.queued
    }

    /// Bytes written to sinks so far, those that were written again included.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Bytes given to sinks so far, each of them once.
    pub(crate) fn given(&self) -> u64 {
        self.given
    }

    /// Bytes that came into the queue so far or went past it, each of them once.
    pub(crate) fn taken(&self) -> u64 {
        self.given + self.queued.saturating_sub(self.again) as u64
    }

    fn note_written(&mut self, bytes: usize) {
        let again = bytes.min(self.again);
        self.again -= again;
        self.given += (bytes - again) as u64;
        self.written += bytes as u64;
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
        if data.is_empty() {
            return;
        }
        budget.take(data.len());
        self.queued += data.len();
        if let Some(Segment::Bytes { bytes, start }) = self.queue.back_mut() {
            if *start > bytes.len() / 2 {
                bytes.drain(..*start);
                *start = 0;
            }
            bytes.extend_from_slice(data);
        } else {
            self.queue.push_back(Segment::Bytes {
                bytes: data.to_vec(),
                start: 0,
            });
        }
    }

    /// Puts bytes in front of all others: they were written before, and are to be written again.
    pub(crate) fn push_front(&mut self, bytes: Vec<u8>, budget: &Budget) {
        if bytes.is_empty() {
            return;
        }
        budget.take(bytes.len());
        self.queued += bytes.len();
        self.again += bytes.len();
        self.queue.push_front(Segment::Bytes { bytes, start: 0 });
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
        self.written += start as u64;
        bytes.drain(..start);
        self.push_front(bytes, budget);
    }

    /// Drops what is queued.
    pub(crate) fn clear(&mut self, pool: &mut PipePool, budget: &Budget) {
        for segment in self.queue.drain(..) {
            match segment {
                Segment::Bytes { bytes, start } => budget.release(bytes.len() - start),
                Segment::Pipe(pipe) => pool.give_back(pipe),
            }
        }
        self.queued = 0;
        self.again = 0;
    }

    /// Puts it down for the next program.
    pub(crate) fn pack(self, budget: &Budget) -> FlowState {
        let segment = |segment| match segment {
            Segment::Bytes { mut bytes, start } => {
                bytes.drain(..start);
                budget.release(bytes.len());
                SegmentState::Bytes {
                    length: bytes.len() as u64,
                    bytes,
                }
            }
            Segment::Pipe(pipe) => {
                let (reader, writer, capacity, filled) = pipe.into_parts();
                SegmentState::Pipe {
                    reader: Handed(reader),
                    writer: Handed(writer),
                    capacity,
                    filled,
                }
            }
        };
        FlowState {
            end: self.end,
            bulk: self.bulk,
            may_splice: self.may_splice,
            written: self.written,
            given: Some(self.given),
            again: self.again,
            segments: self.queue.into_iter().map(segment).collect(),
        }
    }

    /// Takes up what was put down.
    pub(crate) fn unpack(state: FlowState, pool: &mut PipePool, budget: &Budget) -> Self {
        let mut flow = Self {
            queue: VecDeque::new(),
            queued: 0,
            end: state.end,
            bulk: state.bulk,
            may_splice: state.may_splice,
            written: state.written,
            given: state.given.unwrap_or(state.written),
            again: state.again,
        };
        for segment in state.segments {
            match segment {
                SegmentState::Bytes { bytes, .. } => {
                    budget.take(bytes.len());
                    flow.queued += bytes.len();
                    flow.queue.push_back(Segment::Bytes { bytes, start: 0 });
                }
                SegmentState::Pipe {
                    reader,
                    writer,
                    capacity,
                    filled,
                } => {
                    pool.adopt();
                    flow.queued += filled;
                    let pipe = Pipe::adopted(reader.0, writer.0, capacity, filled);
                    flow.queue.push_back(Segment::Pipe(pipe));
                }
            }
        }
        flow
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
            && self.queued == 0
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
                Some(sink) => self.write_queue(sink, work).map_err(Failure::Sink)?,
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

    /// Writes queued segments until the sink is full or nothing is left.
    fn write_queue(&mut self, sink: &mut Endpoint, work: &mut Workspace<'_>) -> io::Result<usize> {
        let mut total = 0;
        while sink.writable && total < work.turn {
            let more = self.queue.len() > 1;
            let Some(front) = self.queue.front_mut() else {
                break;
            };
            let (result, done) = match front {
                Segment::Bytes { bytes, start } => {
                    let result = sink.stream.write(bytes.get(*start..).unwrap_or(&[]));
                    if let Ok(written) = result {
                        *start += written;
                        work.budget.release(written);
                    }
                    (result, *start >= bytes.len())
                }
                Segment::Pipe(pipe) => {
                    let result = pipe.drain(&sink.stream, more);
                    (result, pipe.filled() == 0)
                }
            };
            match result {
                Ok(written) => {
                    total += written;
                    self.queued = self.queued.saturating_sub(written);
                    self.note_written(written);
                    if written == 0 && !done {
                        sink.writable = false;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => sink.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if done && let Some(Segment::Pipe(pipe)) = self.queue.pop_front() {
                work.pool.give_back(pipe);
            }
        }
        if self.queue.is_empty() && self.queue.capacity() > 4 {
            self.queue = VecDeque::new();
        }
        Ok(total)
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
                self.queue.push_back(Segment::Pipe(pipe));
            }
            if let Some(Segment::Pipe(_)) = self.queue.back() {
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
                .saturating_sub(self.queued)
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
        // `readable` stays: only a read that finds nothing, or an end, settles it.
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
            self.note_written(given);
        }
        self.push_back(data.get(given..).unwrap_or(&[]), work.budget);
        Ok(taken)
    }

    fn splice_in(
        &mut self,
        source: &mut Endpoint,
        work: &mut Workspace<'_>,
    ) -> Result<usize, Failure> {
        let Some(Segment::Pipe(pipe)) = self.queue.back_mut() else {
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
                } else {
                    would_block(error, source)
                };
                self.drop_empty_pipe(work);
                return result;
            }
        };
        if taken == 0 {
            if was_empty {
                self.end = End::Seen;
                self.drop_empty_pipe(work);
            } else if result.is_ok() {
                self.end = End::Seen;
            }
            return Ok(0);
        }
        self.queued += taken;
        self.judge(taken);
        Ok(taken)
    }

    fn drop_empty_pipe(&mut self, work: &mut Workspace<'_>) {
        if let Some(Segment::Pipe(pipe)) = self.queue.pop_back() {
            if pipe.filled() == 0 {
                work.pool.give_back(pipe);
            } else {
                self.queue.push_back(Segment::Pipe(pipe));
            }
        }
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
            Ok(0)
        }
        io::ErrorKind::Interrupted => Ok(1),
        _ => Err(Failure::Source(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream as StdStream};

    fn pair() -> (StdStream, Endpoint) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let outer = StdStream::connect(listener.local_addr().unwrap()).unwrap();
        let (inner, _) = listener.accept().unwrap();
        inner.set_nonblocking(true).unwrap();
        (outer, Endpoint::new(TcpStream::from_std(inner)))
    }

    struct Bench {
        scratch: Vec<u8>,
        pool: PipePool,
        budget: Budget,
        limit: usize,
    }

    impl Bench {
        fn new(pipes: usize, limit: usize) -> Self {
            Self {
                scratch: vec![0; 1 << 16],
                pool: PipePool::new(pipes, 1 << 17),
                budget: Budget::new(1 << 24),
                limit,
            }
        }

        fn work(&mut self) -> Workspace<'_> {
            Workspace {
                scratch: &mut self.scratch,
                pool: &mut self.pool,
                budget: &self.budget,
                limit: self.limit,
                turn: 1 << 20,
            }
        }
    }

    /// Sends `length` bytes through a flow, splicing or not, with a slow reader, and compares.
    fn carry(pipes: usize, length: usize) {
        let (mut from, mut source) = pair();
        let (to, mut sink) = pair();
        let sent: Vec<u8> = (0..length)
            .map(|i| u8::try_from(i * 7 % 253).unwrap())
            .collect();
        let expected = sent.clone();
        let writer = std::thread::spawn(move || {
            from.write_all(&sent).unwrap();
            from.shutdown(std::net::Shutdown::Write).unwrap();
            from
        });
        let reader = std::thread::spawn(move || {
            let mut to = to;
            let mut got = Vec::new();
            to.read_to_end(&mut got).unwrap();
            got
        });
        let mut bench = Bench::new(pipes, 1 << 16);
        let mut flow = Flow::new();
        while flow.end() != End::Told {
            // No event loop here: try both sides each time.
            source.readable = true;
            sink.writable = true;
            flow.pump(Some(&mut source), Some(&mut sink), &mut bench.work())
                .unwrap();
            std::thread::yield_now();
        }
        assert!(reader.join().unwrap() == expected);
        writer.join().unwrap();
        assert_eq!(bench.budget.held(), 0);
        assert_eq!(flow.written(), length as u64);
    }

    #[test]
    fn all_bytes_arrive_copied_or_spliced() {
        carry(0, 3_000_000);
        carry(1, 30_000_000);
        carry(1, 10);
        carry(1, 0);
    }

    #[test]
    fn without_a_sink_no_more_than_the_limit_is_taken() {
        let (mut from, mut source) = pair();
        from.write_all(&[1; 100_000]).unwrap();
        let mut bench = Bench::new(1, 5_000);
        let mut flow = Flow::new();
        for _ in 0..100 {
            source.readable = true;
            flow.pump(Some(&mut source), None, &mut bench.work())
                .unwrap();
        }
        assert_eq!(flow.queued(), 5_000);
        assert_eq!(bench.budget.held(), 5_000);
        flow.clear(&mut bench.pool, &bench.budget);
        assert_eq!(bench.budget.held(), 0);
    }

    #[test]
    fn what_is_put_in_front_goes_first() {
        let (mut to, mut sink) = pair();
        let mut bench = Bench::new(0, 100);
        let mut flow = Flow::new();
        flow.push_back(b"second", &bench.budget);
        flow.push_front(b"first ".to_vec(), &bench.budget);
        flow.push_back(b" third", &bench.budget);
        assert_eq!((flow.queued(), flow.taken()), (18, 12));
        flow.source_ended();
        flow.pump(None, Some(&mut sink), &mut bench.work()).unwrap();
        assert_eq!(flow.end(), End::Told);
        let mut got = String::new();
        to.read_to_string(&mut got).unwrap();
        assert_eq!(got, "first second third");
        // What is in front was counted before.
        assert_eq!((flow.written(), flow.given()), (18, 12));
        assert_eq!(flow.taken(), 12);
    }

    #[test]
    fn what_the_kernel_does_not_take_apart_stays_in_front() {
        let (mut to, mut sink) = pair();
        let mut bench = Bench::new(0, 100);
        let mut flow = Flow::new();
        flow.push_back(b"the end", &bench.budget);
        let first: Vec<u8> = (0..30_000_000_u32)
            .map(|i| u8::try_from(i % 241).unwrap())
            .collect();
        flow.write_apart(first.clone(), &sink.stream, &bench.budget);
        // No window takes all of that.
        assert!(flow.written() > 0 && flow.queued() > 7);
        assert_eq!(flow.written() as usize + flow.queued(), first.len() + 7);
        flow.source_ended();
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            to.read_to_end(&mut got).unwrap();
            got
        });
        while flow.end() != End::Told {
            sink.writable = true;
            flow.pump(None, Some(&mut sink), &mut bench.work()).unwrap();
            std::thread::yield_now();
        }
        let got = reader.join().unwrap();
        assert!(got[..first.len()] == first && &got[first.len()..] == b"the end");
    }

    #[test]
    fn a_reset_is_a_failure_of_its_side() {
        let (from, mut source) = pair();
        let (_to, mut sink) = pair();
        socket2::SockRef::from(&from)
            .set_linger(Some(std::time::Duration::ZERO))
            .unwrap();
        drop(from);
        let mut bench = Bench::new(0, 100);
        let mut flow = Flow::new();
        // The reset takes its time.
        let failure = loop {
            source.readable = true;
            match flow.pump(Some(&mut source), Some(&mut sink), &mut bench.work()) {
                Ok(_) => assert_eq!((flow.end(), flow.queued()), (End::Open, 0)),
                Err(failure) => break failure,
            }
            std::thread::yield_now();
        };
        assert!(matches!(failure, Failure::Source(_)));
    }
}
