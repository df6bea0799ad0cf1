//! How long a move may stand still: a value, without any connection.
//!
//! ```text
//!            hold(limit)                         renew(limit)
//!  (none) ───────────────▶ timed, until t ──────────────────────▶ until t'
//!     │      hold(owner)                    caller's connection closed
//!     └──────────────────▶ tied to a caller ──────────────────────────────▶ over
//! ```
//!
//! Whoever moves a guest can die in the middle, and its connections would be held for ever. So a
//! hold is lent: to a caller for as long as its control connection is open, or for a time. When
//! that is over, the connections go back to where they were.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The lease of a hold that does not say how long it is to last.
pub const DEFAULT: Duration = Duration::from_secs(120);
/// The longest lease.
pub const LONGEST: Duration = Duration::from_secs(3600);

/// What a move is tied to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Term {
    /// It is over at this moment.
    Until(Instant),
    /// It is over when this control connection closes.
    Caller(u64),
}

impl Term {
    /// A time from `now`, no longer than [`LONGEST`].
    pub(crate) fn within(limit: Duration, now: Instant) -> Self {
        Self::Until(now + limit.min(LONGEST))
    }
}

/// The leases of all guests that are being moved.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    terms: BTreeMap<String, Term>,
    closed: bool,
}

impl Leases {
    /// Lends, or lends anew.
    pub(crate) fn grant(&mut self, guest: &str, term: Term) {
        self.terms.insert(guest.to_owned(), term);
    }

    /// Lends a little longer. False when nothing is lent, or it is over.
    pub(crate) fn renew(&mut self, guest: &str, limit: Duration, now: Instant) -> bool {
        match self.terms.get_mut(guest) {
            Some(Term::Until(until)) if *until <= now => false,
            Some(term @ Term::Until(_)) => {
                *term = Term::within(limit, now);
                true
            }
            // Open as the caller is, there is nothing to renew.
            Some(Term::Caller(_)) => true,
            None => false,
        }
    }

    /// The move has come to its end.
    pub(crate) fn end(&mut self, guest: &str) {
        self.terms.remove(guest);
    }

    /// The guests whose time is over.
    pub(crate) fn due(&self, now: Instant) -> Vec<String> {
        self.whose(|term| matches!(term, Term::Until(until) if *until <= now))
    }

    /// The guests that are lent to a caller.
    pub(crate) fn of(&self, caller: u64) -> Vec<String> {
        self.whose(|term| *term == Term::Caller(caller))
    }

    fn whose(&self, which: impl Fn(&Term) -> bool) -> Vec<String> {
        let chosen = self.terms.iter().filter(|(_, term)| which(term));
        chosen.map(|(guest, _)| guest.clone()).collect()
    }

    /// When the next one is over.
    pub(crate) fn next(&self) -> Option<Instant> {
        let until = |term: &Term| match term {
            Term::Until(until) => Some(*until),
            Term::Caller(_) => None,
        };
        self.terms.values().filter_map(until).min()
    }

    /// Nothing is lent any more, and nobody watches.
    pub(crate) fn close(&mut self) {
        self.terms.clear();
        self.closed = true;
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_can_be_renewed_until_it_is_over() {
        let (now, minute) = (Instant::now(), Duration::from_secs(60));
        let mut leases = Leases::default();
        assert!(!leases.renew("g", minute, now));
        leases.grant("g", Term::within(minute, now));
        assert!(leases.due(now + minute / 2).is_empty());
        assert!(leases.renew("g", minute, now + minute / 2));
        assert!(leases.due(now + minute).is_empty());
        assert_eq!(leases.next(), Some(now + minute * 3 / 2));
        assert_eq!(leases.due(now + minute * 3 / 2), ["g"]);
        assert!(!leases.renew("g", minute, now + minute * 2));
        leases.end("g");
        assert_eq!(
            (leases.next(), leases.due(now + minute * 9)),
            (None, vec![])
        );
    }

    #[test]
    fn a_caller_that_is_there_needs_no_time() {
        let (now, year) = (Instant::now(), Duration::from_secs(31_536_000));
        let mut leases = Leases::default();
        leases.grant("g", Term::Caller(7));
        leases.grant("h", Term::Caller(8));
        leases.grant("i", Term::within(year, now));
        assert_eq!(leases.due(now + LONGEST), ["i"]);
        assert!(leases.renew("g", Duration::ZERO, now + year));
        assert_eq!(leases.of(7), ["g"]);
        assert!(leases.of(9).is_empty());
    }
}
