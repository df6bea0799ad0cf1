//! The source's end of several connections: one carries all but pages, the others carry those.
//!
//! ```text
//!   send()        After, message --> first connection
//!
//!   send_pages()  one queue  [ ][ ][ ] --+--> connection 0        each takes the next batch
//!                                        +--> connection 1        when it has written one
//!                                        +--> connection 2
//! ```
//!
//! So no connection waits for a slower one, and of what each has to write the order stays that of
//! the stream. A connection that breaks ends the conversation: what was on its way is not known.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, TryRecvError, bounded};

use super::conversation::Heard;
use super::direct::{MAX_WINDOW, MIN_WINDOW};
use super::writing::{Outgoing, Placed, Share};
use super::{Conversation, Link};
use crate::codec::Encoding;
use crate::error::{Error, Result, chain};
use crate::wire::{JoinToken, Place, Role, Tag, ToDestination, ToSource};

/// The most connections that carry a guest's pages: twice what 1 Gbit/s over 200 ms takes, for where
/// packets are lost.
pub const MAX_CONNECTIONS: usize = 32;

/// So many are opened at once: an sshd refuses some of those that come while ten others have not
/// shown who they are (its `MaxStartups`).
pub const OPENED_AT_ONCE: usize = 8;

/// How much one ssh connection has on its way at the most: the window of its channel, in bytes.
const WINDOW: f64 = 2_097_152.0;

/// The part of its window that it has on its way all the time: what has arrived is confirmed in
/// portions.
const IN_FLIGHT: f64 = 0.75;

/// How many times a link's bandwidth times its delay connections have on their way: what came behind
/// a lost packet waits for a round trip until that is sent again.
const WITH_LOSSES: f64 = 2.0;

/// What direct connections have on their way at the most, all together, in bytes: both kernels keep
/// that, and as much again for what it is kept in.
const ALL_WINDOWS: u32 = 64 << 20;

/// What a link is taken for whose rate nobody limits, in bytes a second: 1 Gbit/s.
const FAST: f64 = 125e6;

/// How long at least each connection that joins is listened to.
const HEARD: Duration = Duration::from_secs(1);

/// Over a round trip of so much a connection needs seconds to become fast, and after a lost packet
/// to become so again.
const FAR: Duration = Duration::from_millis(100);

/// So many that share a link that is [`FAR`] are slow for clearly less long.
const SHARING: usize = 4;

/// This part of what connections can carry is carried where it is they that the link waits for.
const FILLED: f64 = 0.7;

/// How many connections fill a link with that round trip, where no more than `limit` bytes a second
/// are sent and `earlier` moves saw it carry so many: its bandwidth times its delay over what one of
/// them has on its way.
///
/// Each costs both hosts some processes. So no more than there are cores to encrypt are taken for a
/// link of which nobody knows that it is so fast, but some more where connections are slow for other
/// reasons. Who sets a limit knows; and a link that was filled by so many is faster than they are.
#[must_use]
pub fn connections_for(
    limit: Option<u64>,
    earlier: Option<f64>,
    round_trip: Duration,
    cores: usize,
) -> usize {
    let rate = limit.map_or(FAST, |bytes| (bytes as f64).min(FAST));
    let wanted = (rate * round_trip.as_secs_f64() / (WINDOW * IN_FLIGHT)).ceil() as usize;
    let wanted = wanted.clamp(1, MAX_CONNECTIONS);
    let careful = match round_trip >= FAR {
        true => cores.max(SHARING),
        false => cores.max(1),
    };
    let carried = WINDOW * careful as f64 / round_trip.as_secs_f64();
    match limit.is_some() || earlier.is_some_and(|earlier| earlier >= carried * FILLED) {
        true => wanted,
        false => wanted.min(careful),
    }
}

/// How many direct connections fill a link with that round trip, where no more than `limit` bytes a
/// second are sent: what is to be on its way over three quarters of the largest window. They cost
/// little; so the link is taken for a fast one where nobody says, and there always are some that go
/// on while one of them sends a lost packet again.
#[must_use]
pub fn direct_connections_for(limit: Option<u64>, round_trip: Duration) -> usize {
    let window = f64::from(MAX_WINDOW) * IN_FLIGHT;
    let wanted = (on_its_way(limit, round_trip) / window).ceil() as usize;
    wanted.clamp(SHARING, MAX_CONNECTIONS)
}

/// How much each of so many direct connections is to have on its way at the most, in bytes: twice its
/// part, as one is quicker than another; and its part of what both kernels are asked to keep for all.
#[must_use]
pub fn direct_window_for(limit: Option<u64>, round_trip: Duration, connections: usize) -> u32 {
    let part = on_its_way(limit, round_trip) / connections.max(1) as f64;
    let most = MAX_WINDOW.min(ALL_WINDOWS / connections.max(1) as u32);
    ((part * 2.0) as u32).clamp(MIN_WINDOW, most)
}

/// How much is to be on its way over a link, in bytes.
fn on_its_way(limit: Option<u64>, round_trip: Duration) -> f64 {
    let rate = limit.map_or(FAST, |bytes| (bytes as f64).min(FAST));
    rate * round_trip.as_secs_f64() * WITH_LOSSES
}

/// The bit of a connection in [`ToDestination::Spread`].
pub(super) fn bit(index: u32) -> u64 {
    1u64.checked_shl(index).unwrap_or(0)
}

/// The connections that carry pages.
pub(super) struct Spreading {
    pub(super) queue: Sender<Placed>,
    /// Where the stream has come to.
    place: Place,
    /// All pages are sent, and what follows them: connections for pages may end. Where one took
    /// some of them along, the destination notices.
    complete: bool,
    connections: Vec<Conversation>,
    stop: Arc<AtomicBool>,
    /// How many batches were written.
    written: Arc<AtomicU64>,
}

/// A connection that is to join a move.
pub struct Joining {
    connection: Conversation,
    index: u32,
}

impl Joining {
    /// Says over `link` that it belongs to the move that gave out `token`. The deadline of `first`
    /// is its own.
    ///
    /// # Errors
    /// [`Error::LinkLost`], [`Error::Cancelled`], [`Error::Stalled`].
    pub fn start(
        first: &Conversation,
        link: Link,
        token: JoinToken,
        index: u32,
    ) -> Result<Joining> {
        // All connections together keep below the rate.
        let (rate, cancel) = (first.rate.clone(), Arc::clone(&first.cancel));
        let mut connection = Conversation::start(first.peer(), link, Role::Source, rate, cancel);
        connection.deadline = first.deadline;
        connection.send(&ToDestination::Join { token, index })?;
        Ok(Joining { connection, index })
    }

    /// Waits until the other side says of each that it does, for so long all together; with each its
    /// index. One that takes all that time leaves the others a moment: they may have been answered
    /// long ago.
    ///
    /// # Errors
    /// Of each: what the other side says else; [`Error::LinkLost`], [`Error::Cancelled`],
    /// [`Error::Stalled`].
    pub fn finish_all(
        joining: Vec<Joining>,
        within: Duration,
    ) -> impl Iterator<Item = Result<(u32, Conversation)>> {
        let deadline = Instant::now() + within;
        joining
            .into_iter()
            .map(move |it| it.finish(deadline.max(Instant::now() + HEARD)))
    }

    fn finish(mut self, deadline: Instant) -> Result<(u32, Conversation)> {
        self.connection.greet(deadline)?;
        let received = self.connection.receive(deadline)?;
        let peer = self.connection.peer().to_owned();
        match ToSource::decode(received.frame())? {
            ToSource::Joined(index) if index == self.index => Ok((index, self.connection)),
            ToSource::Failed(reason) => Err(Error::PeerFailed {
                peer,
                reason: reason.to_string(),
            }),
            _ => Err(Error::Protocol {
                peer,
                what: "no answer to a connection that joins".into(),
            }),
        }
    }
}

impl Spreading {
    /// What is to be sent before a message of that kind.
    pub(super) fn before(&mut self, tag: Tag) -> Option<ToDestination<'static>> {
        match tag {
            Tag::Abort | Tag::SourcePing | Tag::SourcePong => None,
            _ => {
                self.complete |= matches!(tag, Tag::Final | Tag::Keep);
                self.place.messages += 1;
                Some(ToDestination::After(self.place.batches))
            }
        }
    }

    /// The next batch.
    pub(super) fn place(&mut self, pages: Encoding) -> Placed {
        let place = self.place;
        self.place.batches += 1;
        Placed { place, pages }
    }

    /// Whether batches wait to be written.
    pub(super) fn is_behind(&self) -> bool {
        self.written.load(Ordering::Relaxed) < self.place.batches
    }

    pub(super) fn connections(&self) -> &[Conversation] {
        &self.connections
    }

    /// How long the connections were held up, each of them.
    pub(super) fn held_up(&self, of: impl Fn(&Conversation) -> Duration) -> Duration {
        let all: Duration = self.connections.iter().map(of).sum();
        all / self.connections.len().max(1) as u32
    }

    /// Whether all of them still are connections.
    pub(super) fn check(&self) -> Result<()> {
        if self.complete {
            return Ok(());
        }
        for connection in &self.connections {
            connection.check_connection()?;
            match connection.incoming.try_recv() {
                Err(TryRecvError::Empty) => {}
                Ok(Heard::End(reason)) => return Err(connection.lost(reason)),
                Ok(Heard::Nonsense(what)) => return Err(connection.nonsense(what)),
                Err(TryRecvError::Disconnected) | Ok(Heard::Hello(_)) => {
                    return Err(connection.lost("the connection was closed".into()));
                }
                Ok(Heard::Frame(received)) => {
                    let said = ToSource::decode(received.frame());
                    return Err(match said {
                        Ok(ToSource::Failed(reason)) => connection.lost(reason.to_string()),
                        Ok(_) => connection.nonsense("a message on a connection for pages".into()),
                        Err(error) => connection.nonsense(chain(&error)),
                    });
                }
            }
        }
        Ok(())
    }
}

impl Drop for Spreading {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for connection in &mut self.connections {
            connection.hurry.store(true, Ordering::Relaxed);
            connection.outgoing = None;
        }
    }
}

impl Conversation {
    /// From now on pages go by `connections`, each with its index, with room for `queue` batches that
    /// wait for them, and this one carries all else. Without any of them all stays as it is. The other
    /// side is told which they are: one that it has answered may have been answered too late.
    ///
    /// # Errors
    /// [`Error::LinkLost`].
    pub fn spread_over(
        &mut self,
        connections: Vec<(u32, Conversation)>,
        queue: usize,
    ) -> Result<()> {
        if connections.is_empty() {
            return Ok(());
        }
        let which = connections
            .iter()
            .fold(0, |all, (index, _)| all | bit(*index));
        self.send(&ToDestination::Spread(which))?;
        let connections: Vec<_> = connections.into_iter().map(|(_, it)| it).collect();
        let (queue, batches) = bounded(queue);
        let share = Share {
            batches,
            stop: Arc::default(),
            written: Arc::default(),
        };
        for connection in &connections {
            let share = Outgoing::Share(share.clone());
            let taken = connection
                .outgoing
                .as_ref()
                .is_some_and(|outgoing| outgoing.send(share).is_ok());
            if !taken {
                return Err(connection.lost("the connection was closed".into()));
            }
            self.written_beside.push(Arc::clone(&connection.written));
        }
        self.spreading = Some(Spreading {
            queue,
            place: Place::default(),
            complete: false,
            connections,
            stop: share.stop,
            written: share.written,
        });
        Ok(())
    }

    /// No pages follow: the connections for them are closed.
    pub fn end_spreading(&mut self) {
        self.spreading = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{FrameWriter, Hello};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_longer_and_faster_link_needs_more_connections() {
        let ms = Duration::from_millis;
        let unknown = |round_trip, cores| connections_for(None, None, round_trip, cores);
        assert_eq!(unknown(ms(1), 8), 1);
        assert_eq!(unknown(ms(40), 8), 4);
        assert_eq!(unknown(ms(40), 2), 2);
        assert_eq!(unknown(ms(99), 1), 1);
        assert_eq!(unknown(ms(100), 1), SHARING);
        assert_eq!(unknown(ms(10_000), 64), MAX_CONNECTIONS);
        // 50 Mbit/s are filled by one.
        let limited = |limit, round_trip| connections_for(Some(limit), None, round_trip, 2);
        assert_eq!(limited(6_250_000, ms(200)), 1);
        assert_eq!(limited(125_000_000, ms(200)), 16);
        assert_eq!(limited(125_000_000, ms(40)), 4);
        assert_eq!(limited(u64::MAX, Duration::ZERO), 1);
    }

    #[test]
    fn direct_connections_have_as_much_on_their_way_as_the_link_takes() {
        let ms = Duration::from_millis;
        let for_link = |limit, round_trip| {
            let connections = direct_connections_for(limit, round_trip);
            let window = direct_window_for(limit, round_trip, connections);
            (connections, window)
        };
        assert_eq!(for_link(None, Duration::ZERO), (SHARING, MIN_WINDOW));
        assert_eq!(for_link(None, ms(10)), (SHARING, 1_250_000));
        assert_eq!(for_link(None, ms(40)), (SHARING, 5_000_000));
        assert_eq!(for_link(None, ms(200)), (8, MAX_WINDOW));
        assert_eq!(for_link(None, ms(10_000)), (MAX_CONNECTIONS, 2 << 20));
        assert_eq!(for_link(Some(6_250_000), ms(200)), (SHARING, 1_250_000));
        assert_eq!(for_link(Some(u64::MAX), ms(40)), for_link(None, ms(40)));
    }

    #[test]
    fn a_link_that_was_filled_is_taken_for_a_faster_one() {
        let after = |earlier| connections_for(None, Some(earlier), Duration::from_millis(200), 2);
        // Four have 42 MB a second at the most.
        assert_eq!(after(39e6), 16);
        assert_eq!(after(25e6), SHARING);
    }

    /// A source's conversation with one connection for pages, and what is at their other ends.
    fn spread() -> (Conversation, [UnixStream; 2]) {
        let start = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let link = Link::new(ours.try_clone().unwrap(), ours);
            let conversation = Conversation::start("b", link, Role::Source, None, Arc::default());
            (conversation, theirs)
        };
        let ((mut first, far), (data, data_far)) = (start(), start());
        first.spread_over(vec![(0, data)], 1).unwrap();
        (first, [far, data_far])
    }

    #[test]
    fn a_connection_for_pages_is_needed_until_all_are_sent() {
        let soon = || Instant::now() + Duration::from_secs(3);
        let (mut first, [_far, data]) = spread();
        first.send(&ToDestination::Recall { known: true }).unwrap();
        drop(data);
        let error = first.receive(soon()).err().unwrap().to_string();
        assert!(!error.contains("in time"), "{error}");

        let (mut first, [_far, data]) = spread();
        first.send(&ToDestination::Keep).unwrap();
        drop(data);
        let error = first.receive(soon()).err().unwrap().to_string();
        assert!(error.contains("in time"), "{error}");
    }

    #[test]
    fn one_that_is_not_answered_keeps_no_other_from_joining() {
        let (first, _ends) = spread();
        let mut answered = Vec::new();
        let joining = (0..2).map(|index| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let link = Link::new(ours.try_clone().unwrap(), ours);
            if index == 1 {
                Hello::new(Role::Destination).write(&mut theirs).unwrap();
                FrameWriter::new(&mut theirs)
                    .send(&ToSource::Joined(index))
                    .unwrap();
            }
            answered.push(theirs);
            Joining::start(&first, link, JoinToken::new([1; 16]), index).unwrap()
        });
        let joining = joining.collect();
        let joined = Joining::finish_all(joining, Duration::ZERO).map(|it| it.is_ok());
        assert_eq!(joined.collect::<Vec<_>>(), [false, true]);
    }
}
