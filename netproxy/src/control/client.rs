//! The other end of the control socket: for the command, and for tests.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::{Answer, Envelope, Reach, Request, VERSION, milliseconds};
use crate::error::{Error, Result, system};
use crate::event_loop::Tally;
use crate::proxy::Overview;
use crate::retarget::path::Warmth;

/// How long an answer may take, unless the caller says otherwise. No step of a move takes so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a proxy's control socket.
///
/// Every call returns within the [patience](Self::set_patience) of the client. After an answer
/// that did not come in time the connection is of no more use, and every further call fails:
/// nobody could tell which request a late answer belongs to. Drop it and open another one. What
/// is tied to the connection ends when it is dropped.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
    broken: bool,
    /// The program that leads to the control socket of another host.
    child: Option<Child>,
}

fn broken(error: impl std::fmt::Display) -> Error {
    Error::Protocol(error.to_string())
}

impl Client {
    /// Connects to a proxy on this host.
    ///
    /// # Errors
    /// When nobody listens there, or this user may not.
    pub fn connect(path: &Path) -> Result<Self> {
        let failed = |source| Error::File {
            path: path.to_owned(),
            source,
        };
        Self::over(UnixStream::connect(path).map_err(failed)?, None)
    }

    /// Connects through a program whose input and output lead to a control socket, such as
    /// `ssh edge netproxy attach /run/netproxy/netproxy.sock`. The program is ended with the
    /// client, and not by a Ctrl-C in the terminal before that: it has a process group of its own.
    ///
    /// # Errors
    /// When the program can't be started. That it does not get through shows in the first call.
    pub fn through(command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let failed = |error: std::io::Error| Error::Program {
            program,
            message: error.to_string(),
        };
        let (near, far) = UnixStream::pair().map_err(system("Making a socket"))?;
        let input = far.try_clone().map_err(system("Making a socket"))?;
        let child = command
            .stdin(OwnedFd::from(input))
            .stdout(OwnedFd::from(far))
            .process_group(0)
            .spawn();
        // The command keeps its copies of the other end, and the program's end would not be seen.
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Self::over(near, Some(child.map_err(failed)?))
    }

    fn over(stream: UnixStream, child: Option<Child>) -> Result<Self> {
        let mut client = Self {
            reader: BufReader::new(stream),
            broken: false,
            child,
        };
        client.set_patience(PATIENCE)?;
        Ok(client)
    }

    /// How long an answer may take: a minute, if this is never called. Not zero.
    ///
    /// # Errors
    /// When it is zero.
    pub fn set_patience(&mut self, patience: Duration) -> Result<()> {
        let stream = self.reader.get_ref();
        stream
            .set_read_timeout(Some(patience))
            .and_then(|()| stream.set_write_timeout(Some(patience)))
            .map_err(system("Setting a limit of time"))
    }

    /// Asks, and waits for the answer: the fields beside `version` and `ok`.
    ///
    /// # Errors
    /// [`Error::Refused`] with the proxy's own words; [`Error::Timeout`] when it does not answer
    /// in time; [`Error::Protocol`] when it does not answer in the protocol's terms.
    pub fn call(&mut self, request: &Request) -> Result<serde_json::Value> {
        if self.broken {
            return Err(broken("an answer is missing"));
        }
        let mut line = serde_json::to_string(&Envelope {
            version: VERSION,
            body: request,
        })
        .map_err(broken)?;
        line.push('\n');
        let answer = self.exchange(&line);
        self.broken = answer.is_err();
        let answer = answer?;
        if answer.ok {
            Ok(serde_json::Value::Object(answer.result))
        } else {
            Err(Error::Refused(answer.error.unwrap_or_default()))
        }
    }

    fn exchange(&mut self, line: &str) -> Result<Answer> {
        let failed = |error: std::io::Error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Error::Timeout,
            _ => broken(error),
        };
        self.reader
            .get_mut()
            .write_all(line.as_bytes())
            .map_err(failed)?;
        let mut answer = String::new();
        if self.reader.read_line(&mut answer).map_err(failed)? == 0 {
            return Err(broken("the proxy has ended"));
        }
        let answer: Answer = serde_json::from_str(&answer).map_err(broken)?;
        if answer.version != VERSION {
            return Err(broken(format!(
                "the proxy speaks version {}",
                answer.version
            )));
        }
        Ok(answer)
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

    /// The same; the move is also cancelled when this client is dropped, or its process dies,
    /// before the release. The lease stands for callers that vanish without a word.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn hold_tied(&mut self, guest: &str, lease: Duration) -> Result<Tally> {
        self.typed(&Request::Hold {
            guest: guest.to_owned(),
            lease_ms: milliseconds(lease),
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

    /// The guest runs at `site` now, however it came there: settles whatever is open. New
    /// connections go there, and those that are open are re-targeted, late as it may be. Does
    /// nothing if all is so already.
    ///
    /// For whoever finds a move half done: a handover that was settled later, a proxy that was
    /// not there when the guest moved.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn arrived(&mut self, guest: &str, site: &str) -> Result<Tally> {
        self.typed(&Request::Arrived {
            guest: guest.to_owned(),
            site: site.to_owned(),
        })
    }

    /// How this proxy reaches `guest` at `site`, and what the site has to do for that.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn reach(&mut self, guest: &str, site: &str) -> Result<Reach> {
        self.typed(&Request::Translation {
            guest: guest.to_owned(),
            site: site.to_owned(),
        })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = self.reader.get_ref().shutdown(std::net::Shutdown::Both);
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Leads standard input and output to a control socket, until either end closes: the far end of
/// [`Client::through`].
///
/// # Errors
/// When nobody listens there, or this user may not.
pub fn attach(path: &Path) -> Result<()> {
    let failed = |source| Error::File {
        path: path.to_owned(),
        source,
    };
    let stream = UnixStream::connect(path).map_err(failed)?;
    let (mut reader, mut writer) = (&stream, stream.try_clone().map_err(failed)?);
    std::thread::Builder::new()
        .name("attach".into())
        .spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut writer);
            // Whoever asked has gone: what is tied to the connection ends.
            let _ = writer.shutdown(std::net::Shutdown::Both);
        })
        .map_err(system("Starting a thread"))?;
    // Line by line, as the standard output is buffered.
    std::io::copy(&mut reader, &mut std::io::stdout())
        .map(drop)
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_to_another_host_is_out_of_the_terminals_group() {
        let script = r#"answer=$(cut -d ' ' -f 1,5 /proc/$$/stat); read -r _
            echo "{\"version\":1,\"ok\":true,\"answer\":\"$answer\"}""#;
        let mut client = Client::through(Command::new("sh").args(["-c", script])).unwrap();
        let answer = client.call(&Request::Reload).unwrap();
        let (id, group) = answer["answer"].as_str().unwrap().split_once(' ').unwrap();
        assert_eq!(id, group);
    }
}
