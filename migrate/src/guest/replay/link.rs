//! A link within this process, as good or as bad as is asked for.
//!
//! ```text
//!            buffer        wire: takes bytes / rate       on its way: latency
//!  write --> [ ][ ][ ] --> [====] ----------------------> [ ] ... [ ] ----------> read
//!               waits while it is full, or              a cut loses all of it
//!               too much is on its way unread
//! ```
//!
//! The two directions are alike and independent, but for a cut, which ends both: whoever reads or
//! writes gets an error from then on, and what was on its way is lost.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::link::Link;

/// Bytes that wait for the wire before a writer does: what a socket's buffer holds.
const BUFFER: usize = 128 << 10;

/// Bytes on their way or unread, beyond what the wire itself holds.
const WINDOW: usize = 1 << 20;

/// The most bytes that are taken at once.
const PIECE: usize = 64 << 10;

/// The fewest bytes that are taken at once: a packet's worth.
const SMALLEST: usize = 1448;

/// What a link can do.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Shape {
    /// Bytes a second in each direction; as fast as this process is where there is none.
    pub rate: Option<u64>,
    /// From the end of the writing to the reading, in each direction: half a round trip.
    pub latency: Duration,
    /// The link is cut once so many bytes were written by the source.
    pub cut_after: Option<u64>,
}

/// Makes a link: the source's end, the destination's, and what cuts it.
#[must_use]
pub fn pair(shape: Shape) -> (Link, Link, Cut) {
    let away = Arc::new(Pipe::new(shape, shape.cut_after));
    let back = Arc::new(Pipe::new(shape, None));
    let cut = Cut {
        pipes: [Arc::clone(&away), Arc::clone(&back)],
    };
    let end = |writes: &Arc<Pipe>, reads: &Arc<Pipe>| {
        let writer = Writer {
            pipe: Arc::clone(writes),
            cut: cut.clone(),
        };
        Link::new(Reader(Arc::clone(reads)), writer)
    };
    (end(&away, &back), end(&back, &away), cut)
}

/// Cuts a link, at any time and from any thread.
#[derive(Clone)]
pub struct Cut {
    pipes: [Arc<Pipe>; 2],
}

impl Cut {
    /// Cuts it.
    pub fn cut(&self) {
        for pipe in &self.pipes {
            let mut flow = pipe.flow();
            flow.cut = true;
            flow.pieces.clear();
            pipe.changed.notify_all();
        }
    }
}

impl std::fmt::Debug for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cut")
    }
}

/// One direction.
struct Pipe {
    rate: Option<f64>,
    latency: Duration,
    window: usize,
    piece: usize,
    flow: Mutex<Flow>,
    changed: Condvar,
}

struct Flow {
    pieces: VecDeque<Piece>,
    /// Bytes in them.
    held: usize,
    /// When the wire has taken all that was written.
    wire_free: Instant,
    /// Bytes until the cut.
    left: Option<u64>,
    cut: bool,
    written_to_end: bool,
    unread: bool,
}

struct Piece {
    arrives: Instant,
    bytes: Vec<u8>,
    read: usize,
}

impl Pipe {
    fn new(shape: Shape, left: Option<u64>) -> Self {
        let rate = shape.rate.map(|rate| rate.max(1) as f64);
        // A connection's window is as large as what the wire and the way back can hold.
        let wire = rate.map_or(0.0, |rate| rate * 2.0 * shape.latency.as_secs_f64());
        Pipe {
            rate,
            latency: shape.latency,
            window: WINDOW + wire as usize,
            piece: rate.map_or(PIECE, |rate| {
                ((rate * 2e-3) as usize).clamp(SMALLEST, PIECE)
            }),
            flow: Mutex::new(Flow {
                pieces: VecDeque::new(),
                held: 0,
                wire_free: Instant::now(),
                left,
                cut: false,
                written_to_end: false,
                unread: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// A thread that was ended with the lock in hand leaves nothing half done here.
    fn flow(&self) -> MutexGuard<'_, Flow> {
        self.flow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long a buffer's worth takes on the wire: the wire may be behind by so much.
    fn buffered(&self) -> Duration {
        self.rate.map_or(Duration::ZERO, |rate| {
            Duration::from_secs_f64(BUFFER as f64 / rate)
        })
    }
}

struct Writer {
    pipe: Arc<Pipe>,
    cut: Cut,
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let pipe = &self.pipe;
        let mut length = bytes.len().min(pipe.piece);
        let mut flow = pipe.flow();
        loop {
            if flow.cut || flow.unread {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let now = Instant::now();
            let behind = flow.wire_free.saturating_duration_since(now);
            let wait = if flow.held > 0 && flow.held + length > pipe.window {
                None
            } else if behind > pipe.buffered() {
                Some(behind - pipe.buffered())
            } else {
                break;
            };
            flow = match wait {
                // The reader wakes us.
                None => pipe
                    .changed
                    .wait(flow)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(wait) => {
                    let (flow, _) = pipe
                        .changed
                        .wait_timeout(flow, wait)
                        .unwrap_or_else(PoisonError::into_inner);
                    flow
                }
            };
        }
        let mut last = false;
        if let Some(left) = &mut flow.left {
            last = length as u64 >= *left;
            length = length.min(*left as usize);
            *left -= length as u64;
        }
        let took = pipe.rate.map_or(Duration::ZERO, |rate| {
            Duration::from_secs_f64(length as f64 / rate)
        });
        flow.wire_free = flow.wire_free.max(Instant::now()) + took;
        let arrives = flow.wire_free + pipe.latency;
        flow.held += length;
        flow.pieces.push_back(Piece {
            arrives,
            bytes: bytes.get(..length).unwrap_or_default().to_vec(),
            read: 0,
        });
        pipe.changed.notify_all();
        drop(flow);
        if last {
            self.cut.cut();
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.pipe.flow().written_to_end = true;
        self.pipe.changed.notify_all();
    }
}

struct Reader(Arc<Pipe>);

impl Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let pipe = &self.0;
        let mut guard = pipe.flow();
        loop {
            let flow = &mut *guard;
            if flow.cut {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            let wait = match flow.pieces.front_mut() {
                None if flow.written_to_end => return Ok(0),
                None => None,
                Some(piece) => {
                    let early = piece.arrives.saturating_duration_since(Instant::now());
                    if early.is_zero() {
                        let rest = piece.bytes.get(piece.read..).unwrap_or_default();
                        let length = rest.len().min(into.len());
                        into[..length].copy_from_slice(&rest[..length]);
                        piece.read += length;
                        if piece.read == piece.bytes.len() {
                            flow.pieces.pop_front();
                        }
                        flow.held -= length;
                        pipe.changed.notify_all();
                        return Ok(length);
                    }
                    Some(early)
                }
            };
            guard = match wait {
                None => pipe
                    .changed
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(wait) => {
                    let (guard, _) = pipe
                        .changed
                        .wait_timeout(guard, wait)
                        .unwrap_or_else(PoisonError::into_inner);
                    guard
                }
            };
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.flow().unread = true;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_in_order_and_ends() {
        let (mut near, mut far, _cut) = pair(Shape::default());
        let sent: Vec<u8> = (0..5 << 20).map(|at: u32| (at % 251) as u8).collect();
        let expected = sent.clone();
        let writing = std::thread::spawn(move || {
            near.writer.write_all(&sent).unwrap();
            drop(near.writer);
            let mut answer = Vec::new();
            near.reader.read_to_end(&mut answer).unwrap();
            answer
        });
        let mut got = Vec::new();
        far.reader.read_to_end(&mut got).unwrap();
        assert!(got == expected);
        far.writer.write_all(b"all").unwrap();
        drop(far);
        assert_eq!(writing.join().unwrap(), b"all");
    }

    #[test]
    fn a_wire_is_no_faster_than_its_rate_and_its_latency() {
        let shape = Shape {
            rate: Some(10 << 20),
            latency: Duration::from_millis(20),
            cut_after: None,
        };
        let (mut near, mut far, _cut) = pair(shape);
        let start = Instant::now();
        let writing = std::thread::spawn(move || near.writer.write_all(&vec![1; 1 << 20]));
        let mut got = vec![0; 1 << 20];
        far.reader.read_exact(&mut got).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(119));
        writing.join().unwrap().unwrap();
    }

    #[test]
    fn a_cut_ends_both_directions_and_loses_what_is_on_its_way() {
        let (mut near, mut far, cut) = pair(Shape {
            latency: Duration::from_secs(3600),
            ..Shape::default()
        });
        near.writer.write_all(b"never").unwrap();
        let waiting = std::thread::spawn(move || far.reader.read(&mut [0; 8]).is_err());
        cut.cut();
        assert!(waiting.join().unwrap());
        assert!(near.writer.write(b"more").is_err());
        assert!(near.reader.read(&mut [0; 8]).is_err());
    }

    #[test]
    fn it_is_cut_after_so_many_bytes() {
        let (mut near, _far, _cut) = pair(Shape {
            cut_after: Some(1000),
            ..Shape::default()
        });
        near.writer.write_all(&[0; 999]).unwrap();
        assert!(near.writer.write_all(&[0; 2]).is_err());
        assert!(near.reader.read(&mut [0; 8]).is_err());
    }

    #[test]
    fn a_peer_that_is_gone_is_noticed() {
        let (mut near, far, _cut) = pair(Shape::default());
        drop(far);
        assert!(near.writer.write(b"hello").is_err());
        assert_eq!(near.reader.read(&mut [0; 8]).unwrap(), 0);
    }
}
