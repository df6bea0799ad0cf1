//! What can go wrong in the proxy.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// The error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("Cannot use {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The configuration does not say what it should. The message carries the place.
    #[error("{0}")]
    Config(String),
    /// A listener could not be opened.
    #[error("Cannot listen on {address}")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A call into the kernel failed.
    #[error("{what} failed")]
    System {
        /// The call, as a short phrase.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The state of a connection could not be taken or given to the kernel.
    #[error("Cannot {step} the connection")]
    Repair {
        /// The step: a verb that takes "the connection".
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A connection is in a state that can't be carried to another socket.
    #[error("The connection can't be moved: {0}")]
    Unmovable(&'static str),
    /// A connection holds more than the limit `carry` lets it take to another socket.
    #[error(
        "The connection holds more than the limit `carry`: {to_guest} bytes to the guest, \
         {to_client} to the client"
    )]
    TooMuch {
        /// Bytes that the guest has not acknowledged.
        to_guest: usize,
        /// Bytes that the client's socket has not taken.
        to_client: usize,
    },
    /// A connection's guest is not reached any more where the connection leads.
    #[error("Another service is reached at {0} now")]
    Taken(SocketAddr),
    /// A socket's state, as read, contradicts itself.
    #[error("The state of the connection contradicts itself: {0}")]
    Inconsistent(&'static str),
    /// The configuration has no such guest.
    #[error("No guest is named {0}")]
    UnknownGuest(String),
    /// The guest has no such site.
    #[error("Guest {guest} has no site {site}")]
    UnknownSite {
        /// The guest.
        guest: String,
        /// The site asked for.
        site: String,
    },
    /// A step of a move was asked for out of its order.
    #[error("Guest {guest} is {phase}: {asked} is not possible now")]
    OutOfOrder {
        /// The guest.
        guest: String,
        /// Where its move is.
        phase: &'static str,
        /// The step asked for.
        asked: &'static str,
    },
    /// A step of a move that is tied to another caller was asked for.
    #[error("Guest {0} is being moved by another caller")]
    Another(String),
    /// A move is not lent to anybody any more.
    #[error("No lease of guest {0} can be renewed: its move has ended, or its lease has")]
    LeaseOver(String),
    /// Something can't be done while a guest is moved.
    #[error("Guest {0} is being moved: finish or cancel that first")]
    Busy(String),
    /// A worker thread did not answer.
    #[error("A worker of the proxy does not answer")]
    Worker,
    /// The other end of the control socket broke the protocol.
    #[error("The control socket: {0}")]
    Protocol(String),
    /// The proxy, asked through the control socket, did not answer in the time it was given.
    #[error("The proxy does not answer in time")]
    Timeout,
    /// The proxy, asked through the control socket, said no.
    #[error("The proxy refused: {0}")]
    Refused(String),
    /// A program that the proxy runs failed.
    #[error("{program} failed: {message}")]
    Program {
        /// The program.
        program: String,
        /// What it printed.
        message: String,
    },
}

/// The result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The error and its sources in one line, for logs and replies.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            source = error.source();
        }
        text
    }
}

/// Names the call that failed.
pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::System { what, source }
}
