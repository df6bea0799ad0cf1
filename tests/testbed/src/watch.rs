//! Watching a guest from a site.

use crate::site::Site;
use crate::{Error, Result, process};
use std::io::{BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use testbed_guest::Watch;

/// A `testbed-client watch` that runs in a site. It ends with [`Watching::finish`],
/// or when this is dropped.
pub struct Watching {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Watching {
    /// Starts, and waits until the connections to the guest stand.
    pub(crate) fn start(site: &Site, address: Ipv4Addr) -> Result<Self> {
        let started = |source| Error::Start {
            program: "ssh".into(),
            source,
        };
        let mut child = site
            .command(&format!("exec testbed-client watch {address}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(started)?;
        let stdin = child.stdin.take();
        let pipe = child
            .stdout
            .take()
            .ok_or_else(|| started(std::io::ErrorKind::BrokenPipe.into()))?;
        let mut watching = Self {
            child,
            stdin,
            stdout: BufReader::new(pipe),
        };
        let mut line = String::new();
        watching
            .stdout
            .read_line(&mut line)
            .map_err(Error::file("testbed-client"))?;
        if line.trim() == "watching" {
            return Ok(watching);
        }
        watching.stdin = None;
        let mut rest = line;
        let _ = watching.stdout.read_to_string(&mut rest);
        if let Some(errors) = &mut watching.child.stderr {
            let _ = errors.read_to_string(&mut rest);
        }
        Err(odd(&rest))
    }

    /// Ends the watch, and gives what it saw.
    ///
    /// # Errors
    /// When the client did not end well.
    pub fn finish(mut self) -> Result<Watch> {
        self.stdin = None;
        let mut text = String::new();
        self.stdout
            .read_to_string(&mut text)
            .map_err(Error::file("testbed-client"))?;
        self.child.wait().map_err(Error::file("testbed-client"))?;
        serde_json::from_str(&text).map_err(|_| odd(&text))
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.stdin = None;
        // Harmless after `finish`: the child is known to have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn odd(answer: &str) -> Error {
    Error::Answer {
        from: "testbed-client".into(),
        answer: process::last_lines(answer, 20),
    }
}
