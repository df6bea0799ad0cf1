//! One stream made of several connections' parts: pure.
//!
//! ```text
//!   first connection    After 2 | RoundEnd          After 3 | RoundEnd
//!   data, 0             0, 0    |    2, 1
//!   data, 1                1, 0 |
//!
//!   the stream:         batch 0, batch 1, RoundEnd, batch 2, RoundEnd
//! ```
//!
//! A connection that is slow for a moment, as one that sends a lost packet again is, would hold up all
//! others if nothing of theirs was kept. So batches that have come too early are kept, up to a number
//! of bytes for each connection there is.
//!
//! On each connection batches come in ascending order. So the one whose turn it is always is the next
//! one of a connection, or yet to come by one of which none is kept, and that may come however many
//! are kept: nothing that is kept can keep it from coming.

use std::collections::VecDeque;

use crate::wire::Place;

/// So many bytes may wait for their turn for each connection: about what it has on its way where the
/// link is long and fast, for the round trip in which another one sends a lost packet again.
pub const KEPT: usize = 4 << 20;

/// A batch counts as so many more bytes than it has: nobody may have any number of empty ones kept.
const BESIDE: usize = 4 << 10;

/// What was promised of the order was not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// A batch comes twice, or after a later one.
    #[error("Batch {0} came twice, or late")]
    Late(u64),
    /// A message belongs among batches that have passed.
    #[error("A message came after batch {0}, which was to follow it")]
    Passed(u64),
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn<T> {
    /// A message of the first connection.
    Message(T),
    /// A batch.
    Batch(Vec<u8>),
}

/// Puts messages and batches into their order.
#[derive(Debug)]
pub struct Order<T> {
    /// Batches and messages that have passed.
    passed: Place,
    /// The batches of each connection that wait for their turn.
    kept: Vec<VecDeque<(Place, Vec<u8>)>>,
    /// What these count as, in bytes.
    kept_bytes: usize,
    /// Messages, and how many batches come before each that has a place.
    messages: VecDeque<(Option<u64>, T)>,
    /// The batches that come before the next message.
    after: Option<u64>,
}

impl<T> Order<T> {
    /// Nothing came yet.
    pub const fn new() -> Self {
        Order {
            passed: Place {
                batches: 0,
                messages: 0,
            },
            kept: Vec::new(),
            kept_bytes: 0,
            messages: VecDeque::new(),
            after: None,
        }
    }

    /// One more connection; its number.
    pub fn join(&mut self) -> usize {
        self.kept.push(VecDeque::new());
        self.kept.len() - 1
    }

    /// Whether the next batch of a connection can be taken.
    pub fn wants(&self, connection: usize) -> bool {
        let room = self.kept_bytes < KEPT * self.kept.len();
        self.kept
            .get(connection)
            .is_some_and(|kept| kept.is_empty() || room)
    }

    /// The messages that wait.
    pub fn waiting(&self) -> impl Iterator<Item = &T> {
        self.messages.iter().map(|(_, message)| message)
    }

    /// The next message comes after so many batches.
    ///
    /// # Errors
    /// Where more have passed.
    pub fn after(&mut self, batches: u64) -> Result<(), OrderError> {
        if batches < self.passed.batches {
            return Err(OrderError::Passed(self.passed.batches - 1));
        }
        self.after = Some(batches);
        Ok(())
    }

    /// A message came.
    pub fn message(&mut self, message: T) {
        self.messages.push_back((self.after.take(), message));
    }

    /// The next batch of a connection came, which [`wants`](Self::wants) one.
    ///
    /// # Errors
    /// Where its place has passed, or is another one's, or is before one that came earlier by this
    /// connection.
    pub fn batch(
        &mut self,
        connection: usize,
        place: Place,
        batch: Vec<u8>,
    ) -> Result<(), OrderError> {
        let taken = self.kept.iter().any(|kept| {
            kept.binary_search_by_key(&place.batches, |(kept, _)| kept.batches)
                .is_ok()
        });
        let behind = self
            .kept
            .get(connection)
            .and_then(VecDeque::back)
            .is_some_and(|(last, _)| last.batches > place.batches);
        if place.batches < self.passed.batches || taken || behind {
            return Err(OrderError::Late(place.batches));
        }
        if let Some(kept) = self.kept.get_mut(connection) {
            self.kept_bytes += batch.len() + BESIDE;
            kept.push_back((place, batch));
        }
        Ok(())
    }

    /// What comes next, if it is there.
    ///
    /// # Errors
    /// Where a message was to come earlier.
    pub fn turn(&mut self) -> Result<Option<Turn<T>>, OrderError> {
        if let Some((after, _)) = self.messages.front() {
            let due = match *after {
                None => true,
                Some(batches) if batches < self.passed.batches => {
                    return Err(OrderError::Passed(self.passed.batches - 1));
                }
                Some(batches) => batches == self.passed.batches,
            };
            if due && let Some((after, message)) = self.messages.pop_front() {
                self.passed.messages += u64::from(after.is_some());
                return Ok(Some(Turn::Message(message)));
            }
        }
        let next = self.kept.iter_mut().find(|kept| {
            kept.front().is_some_and(|(place, _)| {
                place.batches == self.passed.batches && place.messages <= self.passed.messages
            })
        });
        Ok(next.and_then(VecDeque::pop_front).map(|(_, batch)| {
            self.passed.batches += 1;
            self.kept_bytes -= batch.len() + BESIDE;
            Turn::Batch(batch)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A place behind so many batches, and no message.
    fn at(batches: u64) -> Place {
        Place {
            batches,
            messages: 0,
        }
    }

    #[test]
    fn what_comes_twice_or_too_late_is_an_error() {
        let mut order = Order::<u8>::new();
        assert_eq!((order.join(), order.join()), (0, 1));
        order.batch(0, at(1), vec![1]).unwrap();
        assert_eq!(order.turn(), Ok(None));
        assert_eq!(order.batch(1, at(1), vec![]), Err(OrderError::Late(1)));
        assert_eq!(order.batch(0, at(0), vec![]), Err(OrderError::Late(0)));
        order.batch(1, at(0), vec![0]).unwrap();
        assert_eq!(order.turn(), Ok(Some(Turn::Batch(vec![0]))));
        assert_eq!(order.turn(), Ok(Some(Turn::Batch(vec![1]))));
        assert_eq!(order.batch(0, at(1), vec![]), Err(OrderError::Late(1)));
        assert_eq!(order.after(1), Err(OrderError::Passed(1)));
        // It may be said before the batches that make it wrong have come.
        order.after(2).unwrap();
        order.message(7);
        order.after(2).unwrap();
        order.batch(0, at(2), vec![2]).unwrap();
        assert_eq!(order.turn(), Ok(Some(Turn::Message(7))));
        assert_eq!(order.turn(), Ok(Some(Turn::Batch(vec![2]))));
        order.message(8);
        assert_eq!(order.turn(), Err(OrderError::Passed(2)));
    }

    #[test]
    fn what_comes_too_early_is_kept_until_there_is_too_much_of_it() {
        let mut order = Order::<u8>::new();
        (0..2).for_each(|_| {
            order.join();
        });
        let half = KEPT / 2 - BESIDE;
        for number in 1..=4 {
            assert!(order.wants(0), "{number}");
            order.batch(0, at(number), vec![0; half]).unwrap();
        }
        // But for the one that all wait for, which may come by the other one.
        assert!(!order.wants(0) && order.wants(1));
        assert_eq!(order.turn(), Ok(None));
        order.batch(1, at(0), vec![1]).unwrap();
        assert_eq!(order.turn(), Ok(Some(Turn::Batch(vec![1]))));
        for _ in 1..=4 {
            assert_eq!(order.turn(), Ok(Some(Turn::Batch(vec![0; half]))));
        }
        assert_eq!(order.turn(), Ok(None));
        // Nor are there any number of them if they have no bytes.
        let empty = (6u64..)
            .take_while(|number| {
                let wants = order.wants(0);
                if wants {
                    order.batch(0, at(*number), Vec::new()).unwrap();
                }
                wants
            })
            .count();
        assert_eq!(empty, 2 * KEPT / BESIDE);
    }

    #[test]
    fn a_message_without_a_place_waits_for_nothing() {
        let mut order = Order::new();
        order.message(1);
        assert_eq!(order.turn(), Ok(Some(Turn::Message(1))));
        assert_eq!(order.turn(), Ok(None));
    }

    proptest! {
        /// However the connections' bytes interleave, the stream is what was sent.
        #[test]
        fn the_order_is_that_of_the_source(
            sent in prop::collection::vec(prop::option::of(0..3usize), 0..60),
            choices in prop::collection::vec(0..4usize, 400),
        ) {
            let mut order = Order::new();
            let mut lanes: Vec<VecDeque<(Place, Vec<u8>)>> = vec![VecDeque::new(); 3];
            let mut first = VecDeque::new();
            let mut place = Place::default();
            for (at, lane) in sent.iter().enumerate() {
                let number = at as u8;
                match lane {
                    Some(lane) => {
                        lanes[*lane].push_back((place, vec![number]));
                        place.batches += 1;
                    }
                    None => {
                        first.push_back((place.batches, number));
                        place.messages += 1;
                    }
                }
            }
            (0..3).for_each(|_| { order.join(); });
            let mut got = Vec::new();
            for choice in choices.into_iter().chain((0..2000).map(|at| at % 4)) {
                match lanes.get_mut(choice) {
                    None => if let Some((batches, message)) = first.pop_front() {
                        order.after(batches).unwrap();
                        order.message(message);
                    },
                    Some(lane) => if order.wants(choice) && let Some((place, batch)) = lane.pop_front() {
                        order.batch(choice, place, batch).unwrap();
                    },
                }
                while let Some(turn) = order.turn().unwrap() {
                    got.push(match turn {
                        Turn::Message(number) => number,
                        Turn::Batch(batch) => batch[0],
                    });
                }
            }
            prop_assert_eq!(got, (0..sent.len() as u8).collect::<Vec<_>>());
        }
    }
}
