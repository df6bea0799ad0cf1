//! Frames: the header, the limits, and how they are read and written.

use super::message::{MAX_SHARES, PLACE_SIZE};
use super::{Direction, Message, WireError};
use crate::codec::MAX_BATCH_BYTES;
use crate::group::NAME_SIZE;
use crate::pages::MAX_PAGES;
use crate::shadow::inventory::MAX_CHUNK_BYTES;
use std::fmt;
use std::io::{self, IoSlice, Read, Write};

/// Bytes before a frame's payload.
pub const FRAME_HEADER_SIZE: usize = 8;

/// How much a frame that is being read may ask for ahead of what has arrived. A peer that
/// announces much and sends little makes us hold little.
const READ_STEP: usize = 256 << 10;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// What a frame is. Those from the destination have bit 7 set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Tag {
    /// [`ToDestination::Offer`](super::ToDestination::Offer).
    Offer = 0x01,
    /// [`ToDestination::P2mFrames`](super::ToDestination::P2mFrames).
    P2mFrames = 0x02,
    /// [`ToDestination::Pages`](super::ToDestination::Pages).
    Pages = 0x03,
    /// [`ToDestination::RoundEnd`](super::ToDestination::RoundEnd).
    RoundEnd = 0x04,
    /// [`ToDestination::State`](super::ToDestination::State).
    State = 0x05,
    /// [`ToDestination::Final`](super::ToDestination::Final).
    Final = 0x06,
    /// [`ToDestination::Commit`](super::ToDestination::Commit).
    Commit = 0x07,
    /// [`ToDestination::Abort`](super::ToDestination::Abort).
    Abort = 0x08,
    /// [`ToDestination::Ping`](super::ToDestination::Ping).
    SourcePing = 0x09,
    /// [`ToDestination::Pong`](super::ToDestination::Pong).
    SourcePong = 0x0a,
    /// [`ToDestination::Recall`](super::ToDestination::Recall).
    Recall = 0x0b,
    /// [`ToDestination::Keep`](super::ToDestination::Keep).
    Keep = 0x0c,
    /// [`ToDestination::Probe`](super::ToDestination::Probe).
    Probe = 0x0d,
    /// [`ToDestination::Outgoing`](super::ToDestination::Outgoing).
    Outgoing = 0x0e,
    /// [`ToDestination::Join`](super::ToDestination::Join).
    Join = 0x0f,
    /// [`ToDestination::Batch`](super::ToDestination::Batch).
    Batch = 0x10,
    /// [`ToDestination::After`](super::ToDestination::After).
    After = 0x11,
    /// [`ToDestination::Prove`](super::ToDestination::Prove).
    Prove = 0x12,
    /// [`ToDestination::Spread`](super::ToDestination::Spread).
    Spread = 0x13,
    /// [`ToDestination::CatchUp`](super::ToDestination::CatchUp).
    CatchUp = 0x14,
    /// [`ToSource::Accept`](super::ToSource::Accept).
    Accept = 0x81,
    /// [`ToSource::Refuse`](super::ToSource::Refuse).
    Refuse = 0x82,
    /// [`ToSource::RoundAck`](super::ToSource::RoundAck).
    RoundAck = 0x83,
    /// [`ToSource::Ready`](super::ToSource::Ready).
    Ready = 0x84,
    /// [`ToSource::Running`](super::ToSource::Running).
    Running = 0x85,
    /// [`ToSource::Failed`](super::ToSource::Failed).
    Failed = 0x86,
    /// [`ToSource::CaughtUp`](super::ToSource::CaughtUp).
    CaughtUp = 0x87,
    /// [`ToSource::Ping`](super::ToSource::Ping).
    DestinationPing = 0x89,
    /// [`ToSource::Pong`](super::ToSource::Pong).
    DestinationPong = 0x8a,
    /// [`ToSource::Inventory`](super::ToSource::Inventory).
    Inventory = 0x8b,
    /// [`ToSource::Kept`](super::ToSource::Kept).
    Kept = 0x8c,
    /// [`ToSource::Joined`](super::ToSource::Joined).
    Joined = 0x8d,
    /// [`ToSource::Shares`](super::ToSource::Shares).
    Shares = 0x8e,
}

impl Tag {
    const ALL: [Self; 33] = [
        Self::Offer,
        Self::P2mFrames,
        Self::Pages,
        Self::RoundEnd,
        Self::State,
        Self::Final,
        Self::Commit,
        Self::Abort,
        Self::SourcePing,
        Self::SourcePong,
        Self::Probe,
        Self::Outgoing,
        Self::Accept,
        Self::Refuse,
        Self::RoundAck,
        Self::Ready,
        Self::Running,
        Self::Failed,
        Self::CatchUp,
        Self::CaughtUp,
        Self::DestinationPing,
        Self::DestinationPong,
        Self::Recall,
        Self::Keep,
        Self::Inventory,
        Self::Kept,
        Self::Join,
        Self::Batch,
        Self::After,
        Self::Spread,
        Self::Joined,
        Self::Prove,
        Self::Shares,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|tag| *tag as u8 == byte)
    }

    /// Which way messages of this kind go.
    #[must_use]
    pub const fn direction(self) -> Direction {
        if self as u8 & 0x80 == 0 {
            Direction::ToDestination
        } else {
            Direction::ToSource
        }
    }

    /// The header of such a frame with a payload of `length` bytes.
    ///
    /// # Errors
    /// Fails where that is more than its limit.
    pub fn header(self, length: usize) -> Result<[u8; FRAME_HEADER_SIZE], WireError> {
        if length > self.limit() {
            return Err(WireError::TooLong {
                tag: self,
                length: length as u64,
                limit: self.limit() as u64,
            });
        }
        let mut header = [0; FRAME_HEADER_SIZE];
        header[0] = self as u8;
        // All limits are far below 4 GiB.
        header[4..8].copy_from_slice(&(length as u32).to_le_bytes());
        Ok(header)
    }

    /// The most bytes in the payload of such a message.
    #[must_use]
    pub const fn limit(self) -> usize {
        match self {
            Self::Offer => MIB,
            Self::P2mFrames => 16 + (MAX_PAGES as usize).div_ceil(512) * 8,
            Self::Pages => MAX_BATCH_BYTES,
            Self::Batch => PLACE_SIZE + MAX_BATCH_BYTES,
            Self::Inventory => 8 + MAX_CHUNK_BYTES,
            Self::Shares => 8 + MAX_SHARES * NAME_SIZE,
            Self::State => 16 * MIB,
            Self::Outgoing => 2 * MIB,
            Self::Accept | Self::Ready | Self::Probe => 64 * KIB,
            Self::Refuse | Self::Abort | Self::Failed => 8 * KIB,
            Self::RoundEnd | Self::RoundAck | Self::Final | Self::Join | Self::Prove => 64,
            Self::Commit
            | Self::CatchUp
            | Self::CaughtUp
            | Self::Recall
            | Self::Keep
            | Self::After
            | Self::Spread
            | Self::Joined
            | Self::Kept
            | Self::Running
            | Self::SourcePing
            | Self::SourcePong
            | Self::DestinationPing
            | Self::DestinationPong => 16,
        }
    }
}

/// A frame as it came: a payload of allowed length, not looked into.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What the sender says it is.
    pub tag: Tag,
    /// The payload.
    pub payload: &'a [u8],
}

/// Does not show the payload: it may be a guest's memory.
impl fmt::Debug for Frame<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({:?}, {} bytes)", self.tag, self.payload.len())
    }
}

/// Reads frames of one direction.
///
/// An error of the underlying reader that may go away (a time-out, an interruption, a read that
/// would block) does not lose anything: the next call goes on where this one stopped.
pub struct FrameReader<R> {
    from: R,
    direction: Direction,
    /// What the next frame has to be, if it may not be any.
    only: Option<Tag>,
    header: [u8; FRAME_HEADER_SIZE],
    payload: Vec<u8>,
    /// Bytes of the frame that have arrived, its header counted.
    filled: usize,
    received: u64,
}

impl<R: Read> FrameReader<R> {
    /// A reader of messages that go in one direction.
    pub const fn new(from: R, direction: Direction) -> Self {
        Self {
            from,
            direction,
            only: None,
            header: [0; FRAME_HEADER_SIZE],
            payload: Vec::new(),
            filled: 0,
            received: 0,
        }
    }

    /// The first frame has to be of this kind: of any other nothing but the header is read.
    #[must_use]
    pub const fn beginning_with(mut self, tag: Option<Tag>) -> Self {
        self.only = tag;
        self
    }

    /// Bytes that have arrived so far.
    pub const fn received(&self) -> u64 {
        self.received
    }

    /// The reader beneath.
    pub const fn get_ref(&self) -> &R {
        &self.from
    }

    /// The next frame, or nothing when the peer has closed the connection between two frames.
    ///
    /// # Errors
    /// Fails when the connection does or ends inside a frame, and when the frame's header is not
    /// one that this direction can have. After an error of the latter kind the reader is of no use.
    pub fn read(&mut self) -> Result<Option<Frame<'_>>, WireError> {
        while self.filled < FRAME_HEADER_SIZE {
            let count = read_some(&mut self.from, &mut self.header[self.filled..])?;
            if count == 0 {
                return if self.filled == 0 {
                    Ok(None)
                } else {
                    Err(WireError::Truncated)
                };
            }
            self.filled += count;
            self.received += count as u64;
        }
        let (tag, length) = self.check_header()?;
        while self.filled < FRAME_HEADER_SIZE + length {
            let start = self.filled - FRAME_HEADER_SIZE;
            if self.payload.len() < length && self.payload.len() == start {
                self.payload.resize(length.min(start + READ_STEP), 0);
            }
            let end = self.payload.len().min(length);
            let count = read_some(&mut self.from, &mut self.payload[start..end])?;
            if count == 0 {
                return Err(WireError::Truncated);
            }
            self.filled += count;
            self.received += count as u64;
        }
        self.filled = 0;
        self.only = None;
        Ok(Some(Frame {
            tag,
            payload: &self.payload[..length],
        }))
    }

    fn check_header(&self) -> Result<(Tag, usize), WireError> {
        let [tag, flags, reserved @ .., a, b, c, d] = self.header;
        let tag = Tag::from_byte(tag).ok_or(WireError::UnknownTag(tag))?;
        if tag.direction() != self.direction {
            return Err(WireError::WrongDirection(tag));
        }
        if self.only.is_some_and(|only| only != tag) {
            return Err(WireError::NotYet(tag));
        }
        let length = u32::from_le_bytes([a, b, c, d]);
        if flags != 0 || reserved != [0; 2] {
            return Err(WireError::Malformed(tag));
        }
        match usize::try_from(length) {
            Ok(length) if length <= tag.limit() => Ok((tag, length)),
            _ => Err(WireError::TooLong {
                tag,
                length: length.into(),
                limit: tag.limit() as u64,
            }),
        }
    }
}

impl<R> fmt::Debug for FrameReader<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameReader")
            .field("direction", &self.direction)
            .field("received", &self.received)
            .finish_non_exhaustive()
    }
}

fn read_some(from: &mut impl Read, to: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(to) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Writes frames. Each is written in one go where the writer takes it, and flushed.
pub struct FrameWriter<W> {
    to: W,
    scratch: Vec<u8>,
    sent: u64,
}

impl<W: Write> FrameWriter<W> {
    /// A writer that has sent nothing.
    pub const fn new(to: W) -> Self {
        Self {
            to,
            scratch: Vec::new(),
            sent: 0,
        }
    }

    /// Bytes that have been sent so far.
    pub const fn sent(&self) -> u64 {
        self.sent
    }

    /// The writer beneath.
    pub const fn get_ref(&self) -> &W {
        &self.to
    }

    /// Sends a message.
    ///
    /// # Errors
    /// Fails when the connection does; the connection is of no use then. Fails before anything is
    /// sent when the message is longer than its kind may be.
    pub fn send(&mut self, message: &impl Message) -> Result<(), WireError> {
        let tag = message.tag();
        self.scratch.clear();
        self.scratch.resize(FRAME_HEADER_SIZE, 0);
        message.encode(&mut self.scratch)?;
        let bulk = message.bulk();
        let length = self.scratch.len() - FRAME_HEADER_SIZE + bulk.len();
        self.scratch[..FRAME_HEADER_SIZE].copy_from_slice(&tag.header(length)?);
        let mut slices = [IoSlice::new(&self.scratch), IoSlice::new(bulk)];
        crate::bytes::write_all_vectored(&mut self.to, &mut slices)?;
        self.to.flush()?;
        self.sent += (FRAME_HEADER_SIZE + length) as u64;
        Ok(())
    }
}

impl<W> fmt::Debug for FrameWriter<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameWriter")
            .field("sent", &self.sent)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_7_tells_the_direction_and_zero_is_nothing() {
        assert_eq!(Tag::from_byte(0), None);
        for tag in Tag::ALL {
            assert_eq!(Tag::from_byte(tag as u8), Some(tag));
            assert_eq!(tag.direction() == Direction::ToSource, tag as u8 >= 0x80);
            assert!(u32::try_from(tag.limit()).is_ok());
        }
    }
}
