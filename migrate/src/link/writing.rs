//! What a conversation writes: frames in their order, paced, and signs of life between them.
//!
//! ```text
//!   Frame ----------------------------+
//!   Pages --> wait until encoded -----+--> slices, below the rate --> link
//!   Share --> batches of all, one by one, each with its place
//! ```

use std::io::{self, IoSlice, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::carrier::Worked;
use super::{Counted, HeldUp, Pace, Rate};
use crate::bytes::write_all_vectored;
use crate::codec::Encoding;
use crate::wire::{FrameWriter, Hello, Place, Role, Tag, ToDestination, ToSource, WireError};

/// A sign of life is sent after this long without anything else.
const SIGN_OF_LIFE: Duration = Duration::from_secs(2);

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

/// Writes the hello, and then what comes by `frames`, until that closes.
///
/// # Errors
/// What the link refuses, and pages that were not encoded.
pub(super) fn write_frames(
    writer: &mut Counted<Box<dyn Write + Send>>,
    role: Role,
    frames: &Receiver<Outgoing>,
    rate: Rate,
    hurry: &AtomicBool,
    held_up: &HeldUp,
    worked: Option<&Worked>,
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
        worked,
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
    worked: Option<&'a Worked>,
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
            self.worked.inspect(|worked| worked.note());
            self.pace.wait(header.len() + slice.len(), self.hurry);
            header = &[];
        }
        Ok(())
    }
}
