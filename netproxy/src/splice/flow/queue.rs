//! What a flow has taken from its source and its sink does not have yet.
//!
//! ```text
//!              written before                      the source's next
//!  push_front ───────────────▶ bytes, pipe, bytes ◀─────────────────── push_back, splicing
//!                                │ in this order
//!                                ▼
//!                              write: the sink
//! ```
//!
//! Pipes and bytes stay in the order in which they came. What an earlier socket had sent may be put
//! in front once more: it counts as `written` each time, and as `given` once.

use std::collections::VecDeque;
use std::io::{self, Write};

use super::{Endpoint, Workspace};
use crate::splice::budget::Budget;
use crate::splice::pipe::{Pipe, PipePool};
use crate::upgrade::state::{FlowState, Handed, SegmentState};

#[derive(Debug)]
enum Segment {
    Bytes { bytes: Vec<u8>, start: usize },
    Pipe(Pipe),
}

/// The queue of one flow, and the account of what has left it or gone past it.
#[derive(Debug)]
pub(super) struct Queue {
    segments: VecDeque<Segment>,
    /// The bytes in all segments.
    length: usize,
    written: u64,
    /// Those that were written for the first time.
    given: u64,
    /// The bytes in front that were written before.
    again: usize,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self {
            segments: VecDeque::new(),
            length: 0,
            written: 0,
            given: 0,
            again: 0,
        }
    }

    /// Whether it has no segment, not even an empty pipe.
    pub(super) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Bytes taken from the source that the sink does not have.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Bytes written to sinks so far, those that were written again included.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// Bytes given to sinks so far, each of them once.
    pub(super) fn given(&self) -> u64 {
        self.given
    }

    /// Bytes that came into the queue so far or went past it, each of them once.
    pub(super) fn taken(&self) -> u64 {
        self.given + self.length.saturating_sub(self.again) as u64
    }

    /// A sink has got so many bytes more.
    pub(super) fn note_written(&mut self, bytes: usize) {
        let again = bytes.min(self.again);
        self.again -= again;
        self.given += (bytes - again) as u64;
        self.written += bytes as u64;
    }

    /// A sink has got again so many bytes that are not in the queue.
    pub(super) fn note_written_again(&mut self, bytes: usize) {
        self.written += bytes as u64;
    }

    /// Puts bytes behind all others.
    pub(super) fn push_back(&mut self, data: &[u8], budget: &Budget) {
        if data.is_empty() {
            return;
        }
        budget.take(data.len());
        self.length += data.len();
        if let Some(Segment::Bytes { bytes, start }) = self.segments.back_mut() {
            if *start > bytes.len() / 2 {
                bytes.drain(..*start);
                *start = 0;
            }
            bytes.extend_from_slice(data);
        } else {
            self.segments.push_back(Segment::Bytes {
                bytes: data.to_vec(),
                start: 0,
            });
        }
    }

    /// Puts bytes in front of all others: they were written before, and are to be written again.
    pub(super) fn push_front(&mut self, bytes: Vec<u8>, budget: &Budget) {
        if bytes.is_empty() {
            return;
        }
        budget.take(bytes.len());
        self.length += bytes.len();
        self.again += bytes.len();
        self.segments.push_front(Segment::Bytes { bytes, start: 0 });
    }

    /// Puts an empty pipe behind all bytes.
    pub(super) fn push_pipe(&mut self, pipe: Pipe) {
        self.segments.push_back(Segment::Pipe(pipe));
    }

    /// The pipe into which the next bytes can be spliced.
    pub(super) fn last_pipe(&mut self) -> Option<&mut Pipe> {
        match self.segments.back_mut() {
            Some(Segment::Pipe(pipe)) => Some(pipe),
            _ => None,
        }
    }

    /// So many bytes were spliced into the [last pipe](Self::last_pipe).
    pub(super) fn note_spliced(&mut self, bytes: usize) {
        self.length += bytes;
    }

    /// Gives the last pipe back if there is nothing in it.
    pub(super) fn drop_empty_pipe(&mut self, pool: &mut PipePool) {
        if let Some(Segment::Pipe(pipe)) = self.segments.pop_back() {
            if pipe.filled() == 0 {
                pool.give_back(pipe);
            } else {
                self.segments.push_back(Segment::Pipe(pipe));
            }
        }
    }

    /// Writes segments until the sink is full, nothing is left, or the turn is over.
    pub(super) fn write(
        &mut self,
        sink: &mut Endpoint,
        work: &mut Workspace<'_>,
    ) -> io::Result<usize> {
        let mut total = 0;
        while sink.writable && total < work.turn {
            let more = self.segments.len() > 1;
            let Some(front) = self.segments.front_mut() else {
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
                    self.length = self.length.saturating_sub(written);
                    self.note_written(written);
                    if written == 0 && !done {
                        sink.writable = false;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => sink.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if done && let Some(Segment::Pipe(pipe)) = self.segments.pop_front() {
                work.pool.give_back(pipe);
            }
        }
        if self.segments.is_empty() && self.segments.capacity() > 4 {
            self.segments = VecDeque::new();
        }
        Ok(total)
    }

    /// Drops what is in it.
    pub(super) fn clear(&mut self, pool: &mut PipePool, budget: &Budget) {
        for segment in self.segments.drain(..) {
            match segment {
                Segment::Bytes { bytes, start } => budget.release(bytes.len() - start),
                Segment::Pipe(pipe) => pool.give_back(pipe),
            }
        }
        self.length = 0;
        self.again = 0;
    }

    /// The bytes in front that were written before.
    pub(super) fn again(&self) -> usize {
        self.again
    }

    /// Puts its segments down for the next program.
    pub(super) fn pack(self, budget: &Budget) -> Vec<SegmentState> {
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
        self.segments.into_iter().map(segment).collect()
    }

    /// Takes up what was put down.
    pub(super) fn unpack(state: FlowState, pool: &mut PipePool, budget: &Budget) -> Self {
        let mut queue = Self {
            segments: VecDeque::new(),
            length: 0,
            written: state.written,
            given: state.given.unwrap_or(state.written),
            again: state.again,
        };
        for segment in state.segments {
            match segment {
                SegmentState::Bytes { bytes, .. } => {
                    budget.take(bytes.len());
                    queue.length += bytes.len();
                    queue.segments.push_back(Segment::Bytes { bytes, start: 0 });
                }
                SegmentState::Pipe {
                    reader,
                    writer,
                    capacity,
                    filled,
                } => {
                    pool.adopt();
                    queue.length += filled;
                    let pipe = Pipe::adopted(reader.0, writer.0, capacity, filled);
                    queue.segments.push_back(Segment::Pipe(pipe));
                }
            }
        }
        queue
    }
}
