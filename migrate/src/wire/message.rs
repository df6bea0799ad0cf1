//! The messages, typed, and their payloads.

use super::document::{Acceptance, JoinToken, Offer, Readiness, Refusal};
use super::{Frame, Tag, Text, WireError};
use crate::bytes::{Bytes, Malformed};
use crate::digest::MemoryDigest;
use crate::group::Proof;
use crate::guest::xen::stream::record::RecordType;
use crate::guest::xen::stream::state::{DomainKind, GuestState, GuestStateBuilder, StateError};
use crate::pages::{MAX_PAGES, Pfn};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;

/// Which way a message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the source to the destination.
    ToDestination,
    /// From the destination to the source.
    ToSource,
}

/// What a [`FrameWriter`](super::FrameWriter) sends.
pub trait Message {
    /// What it is.
    fn tag(&self) -> Tag;

    /// Appends the payload, but for its bulk.
    ///
    /// # Errors
    /// Fails when the message is not one that the peer would take.
    fn encode(&self, to: &mut Vec<u8>) -> Result<(), WireError>;

    /// Bytes that follow what [`encode`](Self::encode) appended, sent without a copy.
    fn bulk(&self) -> &[u8] {
        &[]
    }
}

/// The most bytes in a [`ToDestination::Probe`].
pub const MAX_PROBE: usize = 64 << 10;

/// Names in one [`ToSource::Shares`] at most.
pub const MAX_SHARES: usize = 1 << 15;

/// Bytes of a [`Place`].
pub(crate) const PLACE_SIZE: usize = 16;

/// Where a batch that comes by a connection of its own stands in the stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Place {
    /// How many batches come before it.
    pub batches: u64,
    /// How many messages that follow an [`ToDestination::After`] come before it.
    pub messages: u64,
}

impl Place {
    /// As it stands before a batch.
    pub(crate) fn to_bytes(self) -> [u8; PLACE_SIZE] {
        let mut bytes = [0; PLACE_SIZE];
        let (batches, messages) = bytes.split_at_mut(8);
        batches.copy_from_slice(&self.batches.to_le_bytes());
        messages.copy_from_slice(&self.messages.to_le_bytes());
        bytes
    }
}

/// A message of the source's.
#[derive(Clone, PartialEq)]
pub enum ToDestination<'a> {
    /// The guest that is to move. The first message.
    Offer(Box<Offer>),
    /// Where a PV guest's p2m is, and how large the guest is now. It comes before each round.
    P2mFrames {
        /// The highest pfn.
        max_pfn: Pfn,
        /// Pages that the guest has now, holes left out.
        populated: u64,
        /// The pfns of the p2m's frames, in order; none for a guest whose p2m is the hypervisor's.
        frames: Vec<Pfn>,
    },
    /// A batch of pages, for [`BatchDecoder`](crate::codec::BatchDecoder).
    Pages(&'a [u8]),
    /// All pages of a round have been sent.
    RoundEnd {
        /// The round's number, from 1.
        round: u32,
        /// Pages that were sent in it.
        pages: u64,
        /// Whether the guest is suspended and no other round follows.
        last: bool,
    },
    /// What [`Connections::outgoing`](crate::connections::Connections::outgoing) gave, with the
    /// guest suspended. At most once.
    Outgoing(Vec<u8>),
    /// What the suspended guest is besides its memory.
    State(Box<GuestState>),
    /// Everything has been sent. The digest is of the memory that the destination must have now.
    Final(MemoryDigest),
    /// The guest is the destination's. The source never resumes it from now on.
    Commit,
    /// Answers an [`ToSource::Accept`] that tells of a shadow: whether the source knows its basis.
    /// Where it does not, it needs the [`ToSource::Inventory`].
    Recall {
        /// Whether it does.
        known: bool,
    },
    /// Answers an [`ToSource::Accept`] that names a trust group: the source has its key. It asks for
    /// [`ToSource::Shares`].
    Prove(Proof),
    /// The pages that crossed are to be kept as a shadow; the guest stays where it is.
    Keep,
    /// The move is over; the guest stays where it is.
    Abort(Text),
    /// Asks for a [`ToSource::Pong`] with the same number.
    Ping(u64),
    /// Answers a [`ToSource::Ping`].
    Pong(u64),
    /// Bytes of no meaning, up to [`MAX_PROBE`], before the offer: to measure the link.
    Probe(&'a [u8]),
    /// The first message of one more connection, which is to carry pages of the same move.
    Join {
        /// What the acceptance gave.
        token: JoinToken,
        /// Which of the connections it is, from 0.
        index: u32,
    },
    /// A batch of pages on such a connection.
    Batch {
        /// Where it stands.
        place: Place,
        /// As in [`ToDestination::Pages`].
        batch: &'a [u8],
    },
    /// The next message comes after so many batches that come by connections of their own.
    After(u64),
    /// Pages go by the connections whose bits are set, bit 0 for that of index 0, and by no others.
    Spread(u64),
    /// After a round: asks for a [`ToSource::CaughtUp`] once the restore has all that has arrived.
    CatchUp,
}

/// A message of the destination's.
#[derive(Debug, Clone, PartialEq)]
pub enum ToSource {
    /// The guest may come.
    Accept(Box<Acceptance>),
    /// The guest may not come; the move is over.
    Refuse(Refusal),
    /// A round has arrived.
    RoundAck {
        /// The round's number.
        round: u32,
        /// Pages that came in it.
        pages: u64,
        /// Pages that are here and have yet to be given to the restore.
        behind: u64,
    },
    /// The restore has all that had arrived.
    CaughtUp,
    /// The guest is complete, its memory proved, and it could run.
    Ready(Readiness),
    /// A part of what is here of the guest's memory.
    Inventory {
        /// The pfn of the first page that it tells of.
        first: Pfn,
        /// Runs, for [`inventory::decode`](crate::shadow::inventory::decode).
        runs: Vec<u8>,
    },
    /// The next names of contents that are here of other guests of the trust group, for
    /// [`Known::take`](crate::group::Known::take).
    Shares {
        /// How many there are in all; 0 where nothing is shared.
        total: u64,
        /// Names, each of [`NAME_SIZE`](crate::group::NAME_SIZE) bytes.
        names: Vec<u8>,
    },
    /// The shadow is kept.
    Kept,
    /// The connection is one of the move's.
    Joined(u32),
    /// The guest runs here.
    Running,
    /// The destination cannot go on. Before the commit, nothing is left there.
    Failed(Text),
    /// Asks for a [`ToDestination::Pong`] with the same number.
    Ping(u64),
    /// Answers a [`ToDestination::Ping`].
    Pong(u64),
}

impl Message for ToDestination<'_> {
    fn tag(&self) -> Tag {
        match self {
            Self::Offer(_) => Tag::Offer,
            Self::P2mFrames { .. } => Tag::P2mFrames,
            Self::Pages(_) => Tag::Pages,
            Self::RoundEnd { .. } => Tag::RoundEnd,
            Self::Outgoing(_) => Tag::Outgoing,
            Self::State(_) => Tag::State,
            Self::Final(_) => Tag::Final,
            Self::Commit => Tag::Commit,
            Self::Recall { .. } => Tag::Recall,
            Self::Prove(_) => Tag::Prove,
            Self::Keep => Tag::Keep,
            Self::Abort(_) => Tag::Abort,
            Self::Ping(_) => Tag::SourcePing,
            Self::Pong(_) => Tag::SourcePong,
            Self::Probe(_) => Tag::Probe,
            Self::Join { .. } => Tag::Join,
            Self::Batch { .. } => Tag::Batch,
            Self::After(_) => Tag::After,
            Self::Spread(_) => Tag::Spread,
            Self::CatchUp => Tag::CatchUp,
        }
    }

    fn encode(&self, to: &mut Vec<u8>) -> Result<(), WireError> {
        match self {
            Self::Offer(offer) => {
                offer.check()?;
                encode_document(self.tag(), offer, to)?;
            }
            Self::P2mFrames {
                max_pfn,
                populated,
                frames,
            } => {
                to.reserve(16 + frames.len() * 8);
                to.extend(max_pfn.to_le_bytes());
                to.extend(populated.to_le_bytes());
                frames.iter().for_each(|pfn| to.extend(pfn.to_le_bytes()));
            }
            Self::Pages(_) | Self::Probe(_) | Self::Commit | Self::Keep | Self::CatchUp => {}
            Self::Recall { known } => to.push(u8::from(*known)),
            Self::Prove(proof) => to.extend(proof.0),
            Self::RoundEnd { round, pages, last } => {
                to.extend(round.to_le_bytes());
                to.extend(pages.to_le_bytes());
                to.push(u8::from(*last));
            }
            Self::Outgoing(flows) => to.extend(flows),
            Self::State(state) => encode_state(state, to)?,
            Self::Final(digest) => to.extend(digest.0),
            Self::Abort(reason) => to.extend(reason.as_str().as_bytes()),
            Self::Ping(number)
            | Self::Pong(number)
            | Self::After(number)
            | Self::Spread(number) => {
                to.extend(number.to_le_bytes());
            }
            Self::Join { token, index } => {
                to.extend(token.as_bytes());
                to.extend(index.to_le_bytes());
            }
            Self::Batch { place, .. } => to.extend(place.to_bytes()),
        }
        Ok(())
    }

    fn bulk(&self) -> &[u8] {
        match self {
            Self::Pages(bytes) | Self::Probe(bytes) => bytes,
            Self::Batch { batch, .. } => batch,
            _ => &[],
        }
    }
}

impl<'a> ToDestination<'a> {
    /// The message in a frame. The numbers in it are in themselves possible; whether they fit the
    /// guest that was offered is for the caller to check.
    ///
    /// # Errors
    /// Fails when the payload is not exactly one such message.
    pub fn decode(frame: Frame<'a>) -> Result<Self, WireError> {
        let tag = frame.tag;
        let malformed = WireError::malformed(tag);
        let mut from = Bytes::new(frame.payload);
        let message = match tag {
            Tag::Offer => {
                let offer: Box<Offer> = decode_document(&mut from, tag)?;
                offer.check()?;
                Self::Offer(offer)
            }
            Tag::P2mFrames => decode_p2m_frames(&mut from).map_err(&malformed)?,
            Tag::Pages => Self::Pages(decode_rest(&mut from)),
            Tag::RoundEnd => Self::RoundEnd {
                round: from.u32().map_err(&malformed)?,
                pages: from.u64().map_err(&malformed)?,
                last: decode_bool(&mut from, tag)?,
            },
            Tag::Prove => Self::Prove(Proof(from.array().map_err(&malformed)?)),
            Tag::Recall => Self::Recall {
                known: decode_bool(&mut from, tag)?,
            },
            Tag::Keep => Self::Keep,
            Tag::Outgoing => Self::Outgoing(decode_rest(&mut from).to_vec()),
            Tag::State => Self::State(Box::new(decode_state(decode_rest(&mut from))?)),
            Tag::Final => Self::Final(MemoryDigest(from.array().map_err(&malformed)?)),
            Tag::Commit => Self::Commit,
            Tag::CatchUp => Self::CatchUp,
            Tag::Abort => Self::Abort(Text::from_bytes(decode_rest(&mut from))),
            Tag::SourcePing => Self::Ping(from.u64().map_err(&malformed)?),
            Tag::SourcePong => Self::Pong(from.u64().map_err(&malformed)?),
            Tag::Probe => Self::Probe(decode_rest(&mut from)),
            Tag::Join => Self::Join {
                token: JoinToken::new(from.array().map_err(&malformed)?),
                index: from.u32().map_err(&malformed)?,
            },
            Tag::Batch => Self::Batch {
                place: Place {
                    batches: from.u64().map_err(&malformed)?,
                    messages: from.u64().map_err(&malformed)?,
                },
                batch: decode_rest(&mut from),
            },
            Tag::After => Self::After(from.u64().map_err(&malformed)?),
            Tag::Spread => Self::Spread(from.u64().map_err(&malformed)?),
            _ => return Err(WireError::WrongDirection(tag)),
        };
        if from.is_empty() {
            Ok(message)
        } else {
            Err(WireError::Malformed(tag))
        }
    }
}

/// Does not show content: it is a guest's memory.
impl fmt::Debug for ToDestination<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Offer(offer) => f.debug_tuple("Offer").field(offer).finish(),
            Self::P2mFrames {
                max_pfn,
                populated,
                frames,
            } => write!(
                f,
                "P2mFrames({} up to {max_pfn:#x}, {populated} pages)",
                frames.len()
            ),
            Self::Pages(batch) => write!(f, "Pages({} bytes)", batch.len()),
            Self::Probe(bytes) => write!(f, "Probe({} bytes)", bytes.len()),
            Self::RoundEnd { round, pages, last } => f
                .debug_struct("RoundEnd")
                .field("round", round)
                .field("pages", pages)
                .field("last", last)
                .finish(),
            Self::Outgoing(flows) => write!(f, "Outgoing({} bytes)", flows.len()),
            Self::State(state) => f.debug_tuple("State").field(state).finish(),
            Self::Final(digest) => f.debug_tuple("Final").field(digest).finish(),
            Self::Commit => f.write_str("Commit"),
            Self::CatchUp => f.write_str("CatchUp"),
            Self::Prove(_) => f.write_str("Prove(..)"),
            Self::Recall { known } => f.debug_struct("Recall").field("known", known).finish(),
            Self::Keep => f.write_str("Keep"),
            Self::Abort(reason) => f.debug_tuple("Abort").field(reason).finish(),
            Self::Ping(number) => f.debug_tuple("Ping").field(number).finish(),
            Self::Pong(number) => f.debug_tuple("Pong").field(number).finish(),
            Self::Join { index, .. } => write!(f, "Join({index})"),
            Self::Batch { place, batch } => write!(f, "Batch({place:?}, {} bytes)", batch.len()),
            Self::After(batches) => f.debug_tuple("After").field(batches).finish(),
            Self::Spread(which) => write!(f, "Spread({which:#b})"),
        }
    }
}

impl Message for ToSource {
    fn tag(&self) -> Tag {
        match self {
            Self::Accept(_) => Tag::Accept,
            Self::Refuse(_) => Tag::Refuse,
            Self::RoundAck { .. } => Tag::RoundAck,
            Self::Ready(_) => Tag::Ready,
            Self::Inventory { .. } => Tag::Inventory,
            Self::Shares { .. } => Tag::Shares,
            Self::Kept => Tag::Kept,
            Self::Running => Tag::Running,
            Self::Joined(_) => Tag::Joined,
            Self::Failed(_) => Tag::Failed,
            Self::CaughtUp => Tag::CaughtUp,
            Self::Ping(_) => Tag::DestinationPing,
            Self::Pong(_) => Tag::DestinationPong,
        }
    }

    fn encode(&self, to: &mut Vec<u8>) -> Result<(), WireError> {
        match self {
            Self::Accept(acceptance) => encode_document(self.tag(), acceptance, to)?,
            Self::Refuse(refusal) => encode_document(self.tag(), refusal, to)?,
            Self::RoundAck {
                round,
                pages,
                behind,
            } => {
                to.extend(round.to_le_bytes());
                to.extend(pages.to_le_bytes());
                to.extend(behind.to_le_bytes());
            }
            Self::Ready(readiness) => encode_document(self.tag(), readiness, to)?,
            Self::Running | Self::Kept | Self::CaughtUp => {}
            Self::Joined(index) => to.extend(index.to_le_bytes()),
            Self::Inventory { first, runs } => {
                to.extend(first.to_le_bytes());
                to.extend(runs);
            }
            Self::Shares { total, names } => {
                to.extend(total.to_le_bytes());
                to.extend(names);
            }
            Self::Failed(reason) => to.extend(reason.as_str().as_bytes()),
            Self::Ping(number) | Self::Pong(number) => to.extend(number.to_le_bytes()),
        }
        Ok(())
    }
}

impl ToSource {
    /// The message in a frame.
    ///
    /// # Errors
    /// Fails when the payload is not exactly one such message.
    pub fn decode(frame: Frame<'_>) -> Result<Self, WireError> {
        let tag = frame.tag;
        let malformed = WireError::malformed(tag);
        let mut from = Bytes::new(frame.payload);
        let message = match tag {
            Tag::Accept => Self::Accept(decode_document(&mut from, tag)?),
            Tag::Refuse => Self::Refuse(decode_document(&mut from, tag)?),
            Tag::RoundAck => Self::RoundAck {
                round: from.u32().map_err(&malformed)?,
                pages: from.u64().map_err(&malformed)?,
                behind: from.u64().map_err(&malformed)?,
            },
            Tag::Ready => Self::Ready(decode_document(&mut from, tag)?),
            Tag::Running => Self::Running,
            Tag::Joined => Self::Joined(from.u32().map_err(&malformed)?),
            Tag::Inventory => Self::Inventory {
                first: from.u64().map_err(&malformed)?,
                runs: decode_rest(&mut from).to_vec(),
            },
            Tag::Shares => Self::Shares {
                total: from.u64().map_err(&malformed)?,
                names: decode_rest(&mut from).to_vec(),
            },
            Tag::Kept => Self::Kept,
            Tag::Failed => Self::Failed(Text::from_bytes(decode_rest(&mut from))),
            Tag::CaughtUp => Self::CaughtUp,
            Tag::DestinationPing => Self::Ping(from.u64().map_err(&malformed)?),
            Tag::DestinationPong => Self::Pong(from.u64().map_err(&malformed)?),
            _ => return Err(WireError::WrongDirection(tag)),
        };
        if from.is_empty() {
            Ok(message)
        } else {
            Err(WireError::Malformed(tag))
        }
    }
}

fn decode_bool(from: &mut Bytes<'_>, tag: Tag) -> Result<bool, WireError> {
    match from.u8().map_err(WireError::malformed(tag))? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(WireError::Malformed(tag)),
    }
}

fn decode_rest<'a>(from: &mut Bytes<'a>) -> &'a [u8] {
    let rest = from.rest();
    *from = Bytes::new(&[]);
    rest
}

fn encode_document(tag: Tag, document: &impl Serialize, to: &mut Vec<u8>) -> Result<(), WireError> {
    serde_json::to_writer(to, document).map_err(|error| WireError::Document(tag, error))
}

fn decode_document<T: DeserializeOwned>(from: &mut Bytes<'_>, tag: Tag) -> Result<T, WireError> {
    serde_json::from_slice(decode_rest(from)).map_err(|error| WireError::Document(tag, error))
}

fn decode_p2m_frames<'a>(from: &mut Bytes<'_>) -> Result<ToDestination<'a>, Malformed> {
    let max_pfn = from.u64()?;
    let populated = from.u64()?;
    let (frames, left) = decode_rest(from).as_chunks::<8>();
    if max_pfn >= MAX_PAGES || populated > max_pfn + 1 || !left.is_empty() {
        return Err(Malformed);
    }
    // Only 64-bit PV guests move: a frame of their p2m holds 512 entries. Others have none.
    if !frames.is_empty() && frames.len() as u64 != max_pfn / 512 + 1 {
        return Err(Malformed);
    }
    let frames: Vec<_> = frames.iter().copied().map(Pfn::from_le_bytes).collect();
    if frames.iter().any(|pfn| *pfn > max_pfn) {
        return Err(Malformed);
    }
    Ok(ToDestination::P2mFrames {
        max_pfn,
        populated,
        frames,
    })
}

// A state is its kind (1 PV, 2 HVM) and its records, each a u32 type, a u32 length, and a body.

fn encode_state(state: &GuestState, to: &mut Vec<u8>) -> Result<(), WireError> {
    let kind: u32 = match state {
        GuestState::Pv(_) => 1,
        GuestState::Hvm(_) => 2,
    };
    to.extend(kind.to_le_bytes());
    state.write_records(|record, head, body| {
        to.extend(record.number().to_le_bytes());
        // The lengths were checked, and are far below 4 GiB.
        to.extend(((head.len() + body.len()) as u32).to_le_bytes());
        to.extend_from_slice(head);
        to.extend_from_slice(body);
        Ok(())
    })
}

fn decode_state(payload: &[u8]) -> Result<GuestState, StateError> {
    let mut from = Bytes::new(payload);
    let kind = match from.u32()? {
        1 => DomainKind::Pv64,
        2 => DomainKind::Hvm,
        _ => return Err(StateError::Malformed),
    };
    let mut builder = GuestStateBuilder::new();
    while !from.is_empty() {
        let record = RecordType::from_number(from.u32()?).ok_or(StateError::Malformed)?;
        let length = from.u32()? as usize;
        builder.add(record, from.take(length)?)?;
    }
    builder.finish(kind)
}
