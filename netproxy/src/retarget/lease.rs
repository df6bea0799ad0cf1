//! How long a move may stand still: a value, without any connection.
//!
//! ```text
//!            hold(limit)              renew(limit)
//!  (none) ───────────────▶ until t ────────────────▶ until t'
//!                             │ t has come, or
//!                             │ the connection of the caller it is tied to has closed
//!                             └───────────────────────────────────────────────────────▶ over
//! ```
//!
//! Whoever moves a guest can die in the middle, and its connections would be held for ever. So a
//! hold is lent for a time, and may be tied to its caller's control connection as well: then nobody
//! else takes a step of it, but to end it, or to prepare another move in its place that is tied as
//! well. When either is over, the connections go back to where they were. The connection alone says
//! too little: that of a host which has lost its power or its line stays open for hours.
//!
//! What is tied and only prepared is lent too, for `PREPARED`: it holds no connection, but as
//! long as it is open there is no reload and no upgrade.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The lease of a hold that does not say how long it is to last.
pub const DEFAULT: Duration = Duration::from_secs(120);
/// The longest lease.
pub const LONGEST: Duration = Duration::from_secs(3600);

/// How long a tied move may stay prepared. Whoever prepares it is about to hold it: the guest's
/// last rounds may take minutes, and nothing waits for them.
pub(crate) const PREPARED: Duration = LONGEST;

/// When a move is over that nobody has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Term {
    /// At this moment.
    until: Instant,
    /// When this control connection closes.
    caller: Option<u64>,
    /// Whether connections wait for it.
    holds: bool,
}

impl Term {
    /// A time from `now`, no longer than [`LONGEST`].
    pub(crate) fn within(limit: Duration, now: Instant) -> Self {
        Self {
            until: now + limit.min(LONGEST),
            caller: None,
            holds: true,
        }
    }

    /// As long as a caller is there, and no longer than [`PREPARED`]: for a move that holds
    /// nothing yet.
    pub(crate) fn of(caller: u64, now: Instant) -> Self {
        Self {
            until: now + PREPARED,
            caller: Some(caller),
            holds: false,
        }
    }

    /// The same, but over when the caller goes.
    pub(crate) fn tied_to(self, caller: u64) -> Self {
        Self {
            caller: Some(caller),
            ..self
        }
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
        let Some(term) = self.terms.get_mut(guest).filter(|term| term.until > now) else {
            return false;
        };
        let until = now + limit.min(LONGEST);
        // What stands still nowhere yet is not to end sooner for it.
        term.until = if term.holds {
            until
        } else {
            until.max(term.until)
        };
        true
    }

    /// A step is under way that may take so long: what is lent is not over meanwhile.
    pub(crate) fn outlast(&mut self, guest: &str, step: Duration, now: Instant) {
        if let Some(term) = self.terms.get_mut(guest) {
            term.until = term.until.max(now + step.min(LONGEST));
        }
    }

    /// The move has come to its end.
    pub(crate) fn end(&mut self, guest: &str) {
        self.terms.remove(guest);
    }

    /// The guests whose time is over.
    pub(crate) fn due(&self, now: Instant) -> Vec<String> {
        self.whose(|term| term.until <= now)
    }

    /// The guests that are lent to a caller.
    pub(crate) fn of(&self, caller: u64) -> Vec<String> {
        self.whose(|term| term.caller == Some(caller))
    }

    fn whose(&self, which: impl Fn(&Term) -> bool) -> Vec<String> {
        let chosen = self.terms.iter().filter(|(_, term)| which(term));
        chosen.map(|(guest, _)| guest.clone()).collect()
    }

    /// Whether a step of the guest's move is for `caller` to take: nobody else may, while it is
    /// tied to one.
    pub(crate) fn may_step(&self, guest: &str, caller: Option<u64>) -> bool {
        let tied_to = self.terms.get(guest).and_then(|term| term.caller);
        tied_to.is_none_or(|owner| caller == Some(owner))
    }

    /// When the next one is over.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.terms.values().map(|term| term.until).min()
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
        leases.outlast("g", minute, now + minute);
        assert_eq!(leases.due(now + minute * 2), ["g"]);
        leases.outlast("g", minute / 2, now + minute);
        assert_eq!(leases.next(), Some(now + minute * 2));
        leases.end("g");
        leases.outlast("g", minute, now);
        assert_eq!(
            (leases.next(), leases.due(now + minute * 9)),
            (None, vec![])
        );
    }

    /// A host without power keeps its connection open, and says nothing.
    #[test]
    fn what_is_only_prepared_is_not_so_for_ever() {
        let (now, minute) = (Instant::now(), Duration::from_secs(60));
        let mut leases = Leases::default();
        leases.grant("g", Term::of(7, now));
        assert_eq!(leases.next(), Some(now + PREPARED));
        // A renewal does not shorten it.
        assert!(leases.renew("g", minute, now));
        assert!(leases.due(now + PREPARED - minute).is_empty());
        assert_eq!(leases.due(now + PREPARED), ["g"]);
        assert!(!leases.renew("g", minute, now + PREPARED));
        // But one that still renews is there.
        leases.grant("g", Term::of(7, now));
        assert!(leases.renew("g", minute * 2, now + PREPARED - minute));
        assert!(leases.due(now + PREPARED).is_empty());
        // A hold begins anew.
        leases.grant("g", Term::within(minute, now).tied_to(7));
        assert_eq!(leases.due(now + minute), ["g"]);
    }

    #[test]
    fn a_caller_is_there_and_in_time() {
        let (now, minute) = (Instant::now(), Duration::from_secs(60));
        let mut leases = Leases::default();
        leases.grant("g", Term::of(7, now));
        assert_eq!(leases.of(7), ["g"]);
        // What is held is lent for a shorter time.
        leases.grant("g", Term::within(minute, now).tied_to(7));
        leases.grant("h", Term::within(LONGEST * 2, now).tied_to(8));
        assert_eq!(leases.of(7), ["g"]);
        assert!(leases.of(9).is_empty());
        assert!(leases.may_step("g", Some(7)) && !leases.may_step("g", Some(8)));
        assert!(!leases.may_step("g", None) && leases.may_step("i", None));
        assert_eq!(leases.due(now + minute), ["g"]);
        assert_eq!(leases.due(now + LONGEST), ["g", "h"]);
        assert!(leases.renew("g", minute, now + minute / 2));
        assert!(leases.due(now + minute).is_empty());
        assert_eq!(leases.of(7), ["g"]);
    }
}
