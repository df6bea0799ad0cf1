//! What can go wrong with a move, and whose fault it is.

use std::io;

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a move, or a step of it, failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Xen, libxl or xenstore refused something.
    #[error("{doing}")]
    Xen {
        /// What was being done.
        doing: String,
        /// What Xen said.
        #[source]
        source: xen_sys::Error,
    },
    /// A system call failed.
    #[error("{doing}")]
    Io {
        /// What was being done.
        doing: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something at this site makes the move impossible; nothing was touched.
    #[error("{0}")]
    Refused(String),
    /// The other site won't take the guest; nothing was touched.
    #[error("{peer} refuses: {reason}")]
    RefusedByPeer {
        /// The other site.
        peer: String,
        /// What kind of reason it is.
        code: crate::wire::RefusalCode,
        /// Its words.
        reason: String,
    },
    /// The other site failed on the way.
    #[error("{peer} failed: {reason}")]
    PeerFailed {
        /// The other site.
        peer: String,
        /// Its words.
        reason: String,
    },
    /// The link to the other site broke, or it went silent.
    #[error("Lost the link to {peer}: {reason}")]
    LinkLost {
        /// The other site.
        peer: String,
        /// What was seen of it.
        reason: String,
    },
    /// What had to be done with the other site by a certain time was not.
    #[error("{peer}, or the link to it, took longer than {} s", seconds(*.allowed))]
    Stalled {
        /// The other site.
        peer: String,
        /// How long it was allowed to take.
        allowed: std::time::Duration,
    },
    /// The other side sent something that isn't in the protocol.
    #[error("{peer} breaks the protocol: {what}")]
    Protocol {
        /// The other site.
        peer: String,
        /// What it sent.
        what: String,
    },
    /// A frame couldn't be read or written.
    #[error("Bad frame")]
    Wire(#[from] crate::wire::WireError),
    /// The stream for the restore couldn't be written.
    #[error("Can't feed the restore")]
    Stream(#[from] crate::guest::xen::stream::StreamError),
    /// A batch of pages couldn't be written.
    #[error("Can't encode pages")]
    Encode(#[from] crate::codec::EncodeError),
    /// The guest's own data (its p2m, its page tables) can't be followed.
    #[error("The guest's {what}")]
    Guest {
        /// What was found, continuing "The guest's".
        what: String,
    },
    /// What arrived, or was restored, is not what was sent.
    #[error("Verification failed: {0}")]
    Verify(String),
    /// A journal can't be read.
    #[error("Journal {path}: {what}")]
    Journal {
        /// The file.
        path: String,
        /// What is wrong with it.
        what: String,
    },
    /// What was kept of a guest can't be used.
    #[error("Shadow {path}: {what}")]
    Shadow {
        /// The file.
        path: String,
        /// What is wrong with it.
        what: String,
    },
    /// Another process works on the same guest.
    #[error("{0}")]
    Busy(String),
    /// A worker can't be controlled.
    #[error("The worker of move {name} can't be asked: {reason}")]
    Control {
        /// The move.
        name: String,
        /// What was seen of it.
        reason: String,
    },
    /// The time that the operator gave is over.
    #[error("The time for the move is over: {0}")]
    TimedOut(String),
    /// The guest would be silent for longer than it may be, or than the operator's time allows.
    #[error("The guest would be silent for too long: {0}")]
    TooSilent(String),
    /// The operator cancelled.
    #[error("Cancelled")]
    Cancelled,
    /// The move was given up, and the guest could not be made to go on here.
    #[error("Can't make the guest go on here")]
    Unsettled(#[source] Box<Error>),
    /// Commit was sent and no answer came: only the other site knows who owns the guest.
    #[error("No answer from {peer} after the commit")]
    InDoubt {
        /// The other site.
        peer: String,
    },
}

/// Seconds as messages show them: 30, 2.5.
fn seconds(duration: std::time::Duration) -> f64 {
    (duration.as_secs_f64() * 10.0).round() / 10.0
}

/// Says what was being done when a call failed.
pub(crate) trait IoContext<T> {
    /// Turns the error into [`Error::Io`] or [`Error::Xen`].
    fn context<S: Into<String>>(self, doing: impl FnOnce() -> S) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn context<S: Into<String>>(self, doing: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|source| Error::Io {
            doing: doing().into(),
            source,
        })
    }
}

impl<T> IoContext<T> for std::result::Result<T, xen_sys::Error> {
    fn context<S: Into<String>>(self, doing: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|source| Error::Xen {
            doing: doing().into(),
            source,
        })
    }
}

/// An error and all its sources in one line, for a peer or a log.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}
