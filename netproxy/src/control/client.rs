//! The other end of the control socket: for the command, and for tests.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::{Answer, Envelope, Request, VERSION, milliseconds};
use crate::error::{Error, Result};
use crate::event_loop::Tally;
use crate::proxy::Overview;
use crate::retarget::lease;
use crate::retarget::path::Warmth;

/// A connection to a proxy's control socket.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
}

fn broken(error: impl std::fmt::Display) -> Error {
    Error::Protocol(error.to_string())
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// When nobody listens there, or this user may not.
    pub fn connect(path: &Path) -> Result<Self> {
        let failed = |source| Error::File {
            path: path.to_owned(),
            source,
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .map_err(failed)?;
        Ok(Self {
            reader: BufReader::new(stream),
        })
    }

    /// Asks, and waits for the answer: the fields beside `version` and `ok`.
    ///
    /// # Errors
    /// [`Error::Refused`] with the proxy's own words; [`Error::Protocol`] when it does not
    /// answer in the protocol's terms.
    pub fn call(&mut self, request: &Request) -> Result<serde_json::Value> {
        let mut line = serde_json::to_string(&Envelope {
            version: VERSION,
            body: request,
        })
        .map_err(broken)?;
        line.push('\n');
        self.reader
            .get_mut()
            .write_all(line.as_bytes())
            .map_err(broken)?;
        let mut answer = String::new();
        if self.reader.read_line(&mut answer).map_err(broken)? == 0 {
            return Err(broken("the proxy has ended"));
        }
        let answer: Answer = serde_json::from_str(&answer).map_err(broken)?;
        if answer.version != VERSION {
            return Err(broken(format!(
                "the proxy speaks version {}",
                answer.version
            )));
        }
        if answer.ok {
            Ok(serde_json::Value::Object(answer.result))
        } else {
            Err(Error::Refused(answer.error.unwrap_or_default()))
        }
    }

    fn typed<T: serde::de::DeserializeOwned>(&mut self, request: &Request) -> Result<T> {
        serde_json::from_value(self.call(request)?).map_err(broken)
    }

    /// All guests and connections.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn list(&mut self) -> Result<Overview> {
        self.typed(&Request::List)
    }

    /// Warms the path of `guest` to `site`, ahead of a move.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn prepare(&mut self, guest: &str, site: &str) -> Result<Warmth> {
        self.typed(&Request::Prepare {
            guest: guest.to_owned(),
            site: site.to_owned(),
            tied: false,
        })
    }

    /// The same; the move is cancelled if this client is dropped before the hold.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn prepare_tied(&mut self, guest: &str, site: &str) -> Result<Warmth> {
        self.typed(&Request::Prepare {
            guest: guest.to_owned(),
            site: site.to_owned(),
            tied: true,
        })
    }

    /// Freezes all connections of `guest`. After its suspend, not before. The move is cancelled
    /// if it is not released within `lease`, or [renewed](Self::renew).
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn hold(&mut self, guest: &str, lease: Duration) -> Result<Tally> {
        self.typed(&Request::Hold {
            guest: guest.to_owned(),
            lease_ms: milliseconds(lease),
            tied: false,
        })
    }

    /// The same, without a limit of time; the move is cancelled when this client is dropped, or
    /// its process dies, before the release.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn hold_tied(&mut self, guest: &str) -> Result<Tally> {
        self.typed(&Request::Hold {
            guest: guest.to_owned(),
            lease_ms: milliseconds(lease::DEFAULT),
            tied: true,
        })
    }

    /// The move of a held `guest` may take until `lease` from now.
    ///
    /// # Errors
    /// As [`Self::call`]; refused when the lease is over: the connections have gone back.
    pub fn renew(&mut self, guest: &str, lease: Duration) -> Result<()> {
        let lease_ms = milliseconds(lease);
        self.call(&Request::Renew {
            guest: guest.to_owned(),
            lease_ms,
        })
        .map(drop)
    }

    /// Makes all connections of `guest` anew, towards the prepared site.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn retarget(&mut self, guest: &str) -> Result<Tally> {
        self.typed(&Request::Retarget {
            guest: guest.to_owned(),
        })
    }

    /// Lets the connections of `guest` go on at the new site. With a `wait`, the proxy asks the
    /// guest until it answers, at most so long, before it sends what is pending.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn release(&mut self, guest: &str, wait: Duration) -> Result<Tally> {
        let wait_ms = milliseconds(wait);
        self.typed(&Request::Release {
            guest: guest.to_owned(),
            wait_ms,
        })
    }

    /// Lets the program that is now where the proxy was started from take its place. All
    /// connections go on.
    ///
    /// # Errors
    /// As [`Self::call`]; refused while a guest is moved, or if the new program can't take over.
    /// The old one goes on then.
    pub fn upgrade(&mut self) -> Result<()> {
        self.call(&Request::Upgrade).map(drop)
    }

    /// Lets the connections of `guest` go on at the old site.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn cancel(&mut self, guest: &str) -> Result<Tally> {
        self.typed(&Request::Cancel {
            guest: guest.to_owned(),
        })
    }
}
