//! The destination's end of several connections.
//!
//! ```text
//!   links that come --> hello, Join: token and index right? --> joined
//!                                                                 |
//!   data 0   reader thread --> [ ] ---+                           v
//!   data 1   reader thread --> [ ] ---+--> one thread: Order --> received as if all had come
//!   first    reader thread --> [ ] ---+                          by one connection
//! ```
//!
//! Of each connection a batch is held that is read, and one that was; those that wait for their turn
//! have a number of bytes for each connection (`order`). What comes by the first connection is read all the time, up to a limit
//! that no source comes near, so that its signs of life count.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Select, Sender, bounded};

use super::conversation::{Heard, QUEUE, Reading, Received, SILENCE};
use super::order::{Order, Turn};
use super::spreading::bit;
use super::{Conversation, Link, MAX_CONNECTIONS, Rate};
use crate::error::{Error, Result, chain};
use crate::wire::{DirectDoor, JoinToken, Role, Tag, Text, ToDestination, ToSource};

/// How long a connection may take to say what it belongs to.
const JOINING: Duration = Duration::from_secs(20);

/// How often connections are looked at of which nothing comes.
const TICK: Duration = Duration::from_secs(1);

/// How long the first connection may take to say why another one has ended.
const GRACE: Duration = Duration::from_secs(1);

/// The most messages that wait for batches before them, and how many bytes they may have, but for
/// the last one. No source comes near.
const MOST_WAITING: usize = 64;
const MOST_WAITING_BYTES: usize = 32 << 20;

/// Connections that may come to a move, for its pages.
pub struct Expecting {
    /// What each has to know.
    pub token: JoinToken,
    /// Connections that have come, and said nothing yet.
    pub links: Receiver<Link>,
    /// Where they may come directly.
    pub direct: Option<DirectDoor>,
}

impl Conversation {
    /// From now on takes what comes by up to `most` other connections in its place among what comes
    /// by this one.
    pub fn gather(&mut self, expecting: Expecting, most: usize) {
        let (heard, incoming) = bounded(QUEUE);
        let messages = std::mem::replace(&mut self.incoming, incoming);
        let (open, closed) = bounded(0);
        self.gathering = Some(open);
        let (joined, joining) = bounded(MAX_CONNECTIONS);
        let (peer, read) = (self.peer.clone(), Arc::clone(&self.read));
        let until = closed.clone();
        let most = most.min(MAX_CONNECTIONS);
        thread::spawn(move || admit(&peer, &expecting, most, &read, &joined, &until));
        thread::spawn(move || {
            if let Err(end) = merge(&messages, &joining, &closed, &heard) {
                // A receiver that is gone needs nothing more.
                let _ = heard.send(end);
            }
        });
    }
}

/// Lets connections join, until `closed` closes.
fn admit(
    peer: &str,
    expecting: &Expecting,
    most: usize,
    read: &Arc<AtomicU64>,
    joined: &Sender<(u32, Conversation)>,
    closed: &Receiver<()>,
) {
    let taken = Arc::new(Mutex::new(vec![false; most]));
    // Whoever doesn't know the token may not try for ever.
    for _ in 0..most * 4 {
        let link = crossbeam_channel::select! {
            recv(expecting.links) -> link => link,
            recv(closed) -> _ => return,
        };
        let Ok(link) = link else { return };
        let (peer, read, joined) = (peer.to_owned(), Arc::clone(read), joined.clone());
        let (token, taken) = (expecting.token, Arc::clone(&taken));
        thread::spawn(move || {
            let cancel = Arc::default();
            let rate = Rate::default();
            let reading = Reading {
                queue: 1,
                read,
                // Whoever it is gets no memory before it has shown that it belongs here.
                first: Some(Tag::Join),
            };
            let mut connection =
                Conversation::begin(&peer, link, Role::Destination, rate, cancel, QUEUE, reading);
            match welcome(&mut connection, token, &taken) {
                Ok(index) => {
                    // A move that has ended needs it no more.
                    let _ = joined.send((index, connection));
                }
                Err(error) => {
                    log::warn!("{}", chain(&error));
                    let reason = Text::new("This connection belongs to no move");
                    let _ = connection.send(&ToSource::Failed(reason));
                    connection.close();
                }
            }
        });
    }
}

/// Checks what a connection says that it belongs to; its index.
fn welcome(
    connection: &mut Conversation,
    token: JoinToken,
    taken: &Mutex<Vec<bool>>,
) -> Result<u32> {
    let deadline = Instant::now() + JOINING;
    connection.greet(deadline)?;
    let received = connection.receive(deadline)?;
    let refused = |what: &str| Error::Protocol {
        peer: connection.peer().to_owned(),
        what: what.to_owned(),
    };
    let index = match ToDestination::decode(received.frame())? {
        ToDestination::Join { token: said, index } if said == token => index,
        ToDestination::Join { .. } => {
            return Err(refused("a connection to another move, or to none"));
        }
        _ => return Err(refused("a connection that doesn't say what it is for")),
    };
    let fresh = taken
        .lock()
        .ok()
        .and_then(|mut taken| {
            let taken = taken.get_mut(index as usize)?;
            Some(!std::mem::replace(taken, true))
        })
        .unwrap_or(false);
    if !fresh {
        return Err(refused(
            "a connection that is there, or was not agreed upon",
        ));
    }
    connection.send(&ToSource::Joined(index))?;
    Ok(index)
}

/// A connection that has joined.
struct Joined {
    connection: Conversation,
    index: u32,
}

/// What a wait came to.
enum Event {
    Closed,
    Message(Heard),
    Joined(Box<(u32, Conversation)>),
    /// Nobody else will join.
    AllJoined,
    Batch(usize, Option<Heard>),
    Tick,
}

fn nonsense(error: &(dyn std::error::Error + 'static)) -> Heard {
    Heard::Nonsense(chain(error))
}

/// Puts what comes in order, until `closed` closes.
///
/// # Errors
/// Why there is nothing more to come: an end, or nonsense.
fn merge(
    messages: &Receiver<Heard>,
    joining: &Receiver<(u32, Conversation)>,
    closed: &Receiver<()>,
    to: &Sender<Heard>,
) -> std::result::Result<(), Heard> {
    let mut order = Order::<Received>::new();
    // None where one has ended.
    let mut connections: Vec<Option<Joined>> = Vec::new();
    let mut may_join = true;
    // Which of them the source uses, once it has said so, and which have ended.
    let (mut spread, mut ended) = (0, 0);
    // All pages have come: connections for them may end.
    let mut complete = false;
    let mut lost: Option<(Instant, String)> = None;
    loop {
        while let Some(turn) = order.turn().map_err(|error| nonsense(&error))? {
            let received = match turn {
                Turn::Message(received) => {
                    complete |= matches!(received.tag, Tag::Final | Tag::Keep);
                    received
                }
                Turn::Batch(payload) => Received {
                    tag: Tag::Pages,
                    payload,
                },
            };
            if to.send(Heard::Frame(received)).is_err() {
                return Ok(());
            }
        }
        let event = wait(&order, messages, joining, closed, &connections, may_join);
        match event {
            Event::Closed => return Ok(()),
            Event::Message(Heard::Frame(received)) if received.tag == Tag::After => {
                match ToDestination::decode(received.frame()) {
                    Ok(ToDestination::After(batches)) => {
                        order.after(batches).map_err(|error| nonsense(&error))?;
                    }
                    Ok(_) => {}
                    Err(error) => return Err(nonsense(&error)),
                }
            }
            Event::Message(Heard::Frame(received)) if received.tag == Tag::Spread => {
                match ToDestination::decode(received.frame()) {
                    Ok(ToDestination::Spread(which)) => spread = which,
                    Ok(_) => {}
                    Err(error) => return Err(nonsense(&error)),
                }
                if spread & ended != 0 {
                    let reason = "the connection was closed".to_owned();
                    lost.get_or_insert((Instant::now() + GRACE, reason));
                }
            }
            // It waits for nothing.
            Event::Message(
                heard @ Heard::Frame(Received {
                    tag: Tag::Abort, ..
                }),
            ) => {
                let _ = to.send(heard);
                return Ok(());
            }
            Event::Message(Heard::Frame(received)) => order.message(received),
            Event::Message(end @ (Heard::End(_) | Heard::Nonsense(_))) => return Err(end),
            Event::Message(Heard::Hello(_)) => {
                return Err(Heard::Nonsense("it greeted twice".into()));
            }
            Event::Joined(connection) => {
                order.join();
                let (index, connection) = *connection;
                connections.push(Some(Joined { connection, index }));
            }
            Event::AllJoined => may_join = false,
            Event::Batch(number, Some(Heard::Frame(received))) => {
                let Some(Some(joined)) = connections.get_mut(number) else {
                    continue;
                };
                // While nothing was taken nothing was read.
                joined.connection.last_heard.note(Instant::now());
                match ToDestination::decode(received.frame()).map_err(|error| nonsense(&error))? {
                    ToDestination::Batch { place, batch } => order
                        .batch(number, place, batch.to_vec())
                        .map_err(|error| nonsense(&error))?,
                    other => {
                        return Err(Heard::Nonsense(format!(
                            "{:?} on a connection for pages",
                            crate::wire::Message::tag(&other)
                        )));
                    }
                }
            }
            Event::Batch(_, Some(end @ Heard::Nonsense(_))) => return Err(end),
            Event::Batch(number, end) => {
                let Some(joined) = connections.get_mut(number).and_then(Option::take) else {
                    continue;
                };
                ended |= bit(joined.index);
                let reason = match end {
                    Some(Heard::End(reason)) => reason,
                    _ => "the connection was closed".into(),
                };
                // What was on its way is lost. One that was answered too late takes nothing along: the
                // source goes on without it.
                if !complete && spread & bit(joined.index) != 0 {
                    lost.get_or_insert((Instant::now() + GRACE, reason));
                }
            }
            Event::Tick => {}
        }
        if complete {
            lost = None;
            continue;
        }
        if let Some((_, reason)) = lost.take_if(|(until, _)| Instant::now() >= *until) {
            return Err(Heard::End(reason));
        }
        for (number, connection) in connections.iter().enumerate() {
            // One that the source does not use says nothing, as long as it likes.
            let silent = connection
                .as_ref()
                .filter(|joined| spread & bit(joined.index) != 0)
                .map(|joined| &joined.connection)
                .filter(|it| order.wants(number) && it.incoming.is_empty())
                .and_then(|it| it.last_heard.silent_for(Instant::now()));
            if let Some(silent) = silent.filter(|silent| *silent > SILENCE) {
                let reason = format!("nothing heard for {} s", silent.as_secs());
                return Err(Heard::End(reason));
            }
        }
    }
}

/// Waits until something comes that can be taken.
fn wait(
    order: &Order<Received>,
    messages: &Receiver<Heard>,
    joining: &Receiver<(u32, Conversation)>,
    closed: &Receiver<()>,
    connections: &[Option<Joined>],
    may_join: bool,
) -> Event {
    let mut select = Select::new();
    let closing = select.recv(closed);
    let (waiting, bytes) = order.waiting().fold((0, 0), |(count, bytes), received| {
        (count + 1, bytes + received.payload.len())
    });
    let message =
        (waiting < MOST_WAITING && bytes <= MOST_WAITING_BYTES).then(|| select.recv(messages));
    let join = may_join.then(|| select.recv(joining));
    let batches: Vec<(usize, usize, &Receiver<Heard>)> = connections
        .iter()
        .enumerate()
        .filter(|(number, _)| order.wants(*number))
        .filter_map(|(number, connection)| {
            let incoming = &connection.as_ref()?.connection.incoming;
            Some((select.recv(incoming), number, incoming))
        })
        .collect();
    let Ok(ready) = select.select_timeout(TICK) else {
        return Event::Tick;
    };
    let at = ready.index();
    if at == closing {
        // Nothing is ever sent.
        let _: std::result::Result<(), _> = ready.recv(closed);
        return Event::Closed;
    }
    if Some(at) == message {
        return match ready.recv(messages) {
            Ok(heard) => Event::Message(heard),
            Err(_) => Event::Message(Heard::End("the connection was closed".into())),
        };
    }
    if Some(at) == join {
        return ready
            .recv(joining)
            .map_or(Event::AllJoined, |it| Event::Joined(Box::new(it)));
    }
    match batches.iter().find(|(index, ..)| *index == at) {
        Some((_, number, incoming)) => Event::Batch(*number, ready.recv(incoming).ok()),
        // There is no other.
        None => Event::Tick,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Direction, FrameReader, FrameWriter, Hello, Message, Place};
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::AtomicBool;

    const TOKEN: JoinToken = JoinToken::new([3; 16]);

    /// A destination that takes `most` connections for pages, the source's end of its first one,
    /// and where others come in.
    struct World {
        destination: Conversation,
        first: UnixStream,
        come: Sender<Link>,
    }

    fn link(stream: UnixStream) -> Link {
        Link::new(stream.try_clone().unwrap(), stream)
    }

    fn say(to: &mut impl Write, message: &impl Message) {
        FrameWriter::new(to).send(message).unwrap();
    }

    fn hello(stream: &mut UnixStream) {
        Hello::new(Role::Source).write(&mut *stream).unwrap();
        Hello::read(&mut *stream).unwrap();
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    impl World {
        fn new(most: usize) -> World {
            let (mut first, theirs) = UnixStream::pair().unwrap();
            let cancel = Arc::<AtomicBool>::default();
            let mut destination =
                Conversation::start("a", link(theirs), Role::Destination, None, cancel);
            hello(&mut first);
            destination.greet(later()).unwrap();
            let (come, links) = bounded(MAX_CONNECTIONS);
            destination.gather(
                Expecting {
                    token: TOKEN,
                    links,
                    direct: None,
                },
                most,
            );
            World {
                destination,
                first,
                come,
            }
        }

        /// One more connection, and what the destination answers to it.
        fn join(&self, token: JoinToken, index: u32) -> (UnixStream, Option<ToSource>) {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            self.come.send(link(theirs)).unwrap();
            hello(&mut ours);
            say(&mut ours, &ToDestination::Join { token, index });
            let mut frames = FrameReader::new(ours.try_clone().unwrap(), Direction::ToSource);
            let answer = frames
                .read()
                .unwrap()
                .map(|frame| ToSource::decode(frame).unwrap());
            (ours, answer)
        }

        fn joined(&self, index: u32) -> UnixStream {
            let (stream, answer) = self.join(TOKEN, index);
            assert_eq!(answer, Some(ToSource::Joined(index)));
            stream
        }

        fn next(&mut self) -> Received {
            self.destination.receive(later()).unwrap()
        }

        /// What comes next breaks the protocol. It is no lost link: it would come again.
        fn hears_nonsense(&mut self, said: &str) {
            let error = self.destination.receive(later()).err().unwrap();
            assert!(
                matches!(&error, Error::Protocol { what, .. } if what.contains(said)),
                "{error}"
            );
        }
    }

    /// The source says which connections it uses.
    fn spread(world: &mut World, which: u64) {
        say(&mut world.first, &ToDestination::Spread(which));
    }

    fn batch(to: &mut UnixStream, batches: u64, messages: u64, content: u8) {
        let place = Place { batches, messages };
        let batch = &[content];
        say(to, &ToDestination::Batch { place, batch });
    }

    #[test]
    fn what_comes_by_several_connections_is_one_stream() {
        let mut world = World::new(2);
        let (mut a, mut b) = (world.joined(1), world.joined(0));
        batch(&mut b, 1, 0, 11);
        batch(&mut b, 2, 1, 12);
        say(&mut world.first, &ToDestination::After(2));
        say(&mut world.first, &ToDestination::Keep);
        batch(&mut a, 0, 0, 10);
        for expected in [
            (Tag::Pages, vec![10]),
            (Tag::Pages, vec![11]),
            (Tag::Keep, vec![]),
            (Tag::Pages, vec![12]),
        ] {
            let received = world.next();
            assert_eq!((received.tag, received.payload), expected);
        }
        // All has come: they may end.
        drop((a, b));
        say(&mut world.first, &ToDestination::Commit);
        assert_eq!(world.next().tag, Tag::Commit);
    }

    #[test]
    fn who_does_not_know_the_token_or_was_not_agreed_upon_stays_outside() {
        let world = World::new(2);
        let outside = |token, index| {
            let (_stream, answer) = world.join(token, index);
            assert!(matches!(answer, Some(ToSource::Failed(_))), "{answer:?}");
        };
        outside(JoinToken::new([4; 16]), 0);
        outside(TOKEN, 2);
        let _first = world.joined(1);
        outside(TOKEN, 1);
        let _second = world.joined(0);
    }

    #[test]
    fn a_batch_that_comes_twice_ends_the_conversation() {
        let mut world = World::new(2);
        let (mut a, mut b) = (world.joined(0), world.joined(1));
        batch(&mut a, 0, 0, 1);
        assert_eq!(world.next().tag, Tag::Pages);
        batch(&mut b, 0, 0, 1);
        world.hears_nonsense("twice");
    }

    #[test]
    fn what_is_no_message_is_no_lost_link() {
        let mut world = World::new(2);
        world.first.write_all(&[0xff; 64]).unwrap();
        world.hears_nonsense("");
    }

    #[test]
    fn no_other_message_comes_by_a_connection_for_pages() {
        let mut world = World::new(2);
        let mut a = world.joined(0);
        say(&mut a, &ToDestination::Commit);
        world.hears_nonsense("Commit");
    }

    #[test]
    fn a_connection_that_ends_ends_the_conversation_unless_the_source_says_why() {
        let mut world = World::new(2);
        let mut a = world.joined(0);
        spread(&mut world, 1);
        batch(&mut a, 0, 0, 1);
        assert_eq!(world.next().tag, Tag::Pages);
        drop(a);
        let began = Instant::now();
        let error = world.destination.receive(later()).err().unwrap();
        assert!(matches!(error, Error::LinkLost { .. }), "{error}");
        assert!(began.elapsed() < SILENCE, "It was the silence: {error}");

        let mut world = World::new(2);
        let mut a = world.joined(0);
        spread(&mut world, 1);
        batch(&mut a, 0, 0, 1);
        assert_eq!(world.next().tag, Tag::Pages);
        // It waits for a batch that never comes, and the end of the move does not.
        say(&mut world.first, &ToDestination::After(2));
        say(&mut world.first, &ToDestination::Keep);
        drop(a);
        say(&mut world.first, &ToDestination::Abort(Text::new("enough")));
        assert_eq!(world.next().tag, Tag::Abort);
    }

    /// What was on its way when it ended is lost, though nothing has come by it.
    #[test]
    fn a_connection_that_takes_its_first_batch_along_ends_the_conversation() {
        for told_first in [true, false] {
            let mut world = World::new(2);
            let (a, mut b) = (world.joined(0), world.joined(1));
            if told_first {
                spread(&mut world, 3);
            }
            drop(a);
            thread::sleep(GRACE / 4);
            if !told_first {
                spread(&mut world, 3);
            }
            batch(&mut b, 1, 0, 11);
            say(&mut world.first, &ToDestination::After(2));
            say(&mut world.first, &ToDestination::Keep);
            let soon = Instant::now() + GRACE * 10;
            let error = world.destination.receive(soon).err().unwrap().to_string();
            assert!(!error.contains("in time"), "{error}");
        }
    }

    /// It was answered too late for the source, which went on without it.
    #[test]
    fn a_connection_that_is_not_used_ends_nothing() {
        let mut world = World::new(2);
        drop(world.joined(1));
        spread(&mut world, 1);
        // Longer than the first connection has for saying why.
        thread::sleep(GRACE * 2);
        let mut a = world.joined(0);
        batch(&mut a, 0, 0, 1);
        assert_eq!(world.next().tag, Tag::Pages);
    }

    /// Its path is dead, and nobody closes it.
    #[test]
    fn a_connection_that_is_not_used_may_be_silent() {
        let mut world = World::new(2);
        let _silent = world.joined(1);
        let mut a = world.joined(0);
        spread(&mut world, 1);
        let until = Instant::now() + SILENCE + Duration::from_secs(2);
        for place in 0.. {
            batch(&mut a, place, 0, 1);
            assert_eq!(world.next().tag, Tag::Pages);
            if Instant::now() > until {
                break;
            }
            thread::sleep(Duration::from_secs(1));
        }
    }

    #[test]
    fn messages_that_wait_have_no_more_bytes_than_they_may() {
        let mut order = Order::<Received>::new();
        order.after(1).unwrap();
        let (send, messages) = bounded(1);
        let (_joins, joining) = bounded(1);
        let (_open, closed) = bounded(0);
        let mut taken = 0;
        for _ in 0..MOST_WAITING {
            let payload = vec![0; MOST_WAITING_BYTES / 4];
            let tag = Tag::State;
            send.send(Heard::Frame(Received { tag, payload })).unwrap();
            match wait(&order, &messages, &joining, &closed, &[], false) {
                Event::Message(Heard::Frame(received)) => order.message(received),
                Event::Tick => break,
                _ => panic!("Nothing else was sent"),
            }
            taken += 1;
        }
        // As many as they may have, and the one that went beyond.
        assert_eq!(taken, 5);
    }
}
