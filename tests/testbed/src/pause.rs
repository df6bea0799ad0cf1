//! How long an empty guest stands still while it moves: it answers no pings, but xenstore tells.
//!
//! ```text
//!   source        control/shutdown = suspend      the toolstack asks: it may stand still from here
//!   destination   data/resumed = N                the guest's first act there
//! ```
//! Both moments are taken by this machine's clock.

use crate::guest::Guest;
use crate::site::Site;
use crate::{Error, Result, process};
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Watches a move of an empty guest. Ends with [`Pause::finish`], or when this is dropped.
pub struct Pause {
    asked: Watched,
    resumed: Watched,
}

impl Pause {
    /// Starts, and waits until both sites watch.
    pub(crate) fn start(from: &Site, to: &Site, guest: &Guest) -> Result<Self> {
        let name = process::quote(&guest.name);
        // A watch fires once when it is set.
        let asked =
            format!("exec xenstore-watch -n 2 /local/domain/$(xl domid {name})/control/shutdown");
        let resumed = "xenstore-watch /local/domain | sed -u -n '1p; /\\/data\\/resumed$/{p;q}'";
        Ok(Self {
            asked: Watched::start(from, &asked)?,
            resumed: Watched::start(to, resumed)?,
        })
    }

    /// The time between, once the guest has moved.
    ///
    /// # Errors
    /// When one of the two did not happen.
    pub fn finish(self) -> Result<Duration> {
        let (asked, resumed) = (self.asked.moment()?, self.resumed.moment()?);
        Ok(resumed.saturating_duration_since(asked))
    }
}

/// A command that prints a line when it has begun, and one when what it waits for happens.
struct Watched {
    child: Child,
    reader: Option<JoinHandle<Option<Instant>>>,
}

impl Watched {
    fn start(site: &Site, command: &str) -> Result<Self> {
        let started = |source| Error::Start {
            program: "ssh".into(),
            source,
        };
        let mut child = site
            .command(command)
            .stdout(Stdio::piped())
            .spawn()
            .map_err(started)?;
        let pipe = child.stdout.take();
        let mut watched = Self {
            child,
            reader: None,
        };
        let mut lines =
            BufReader::new(pipe.ok_or_else(|| started(std::io::ErrorKind::BrokenPipe.into()))?);
        if !read_line(&mut lines) {
            return Err(nothing());
        }
        watched.reader = Some(thread::spawn(move || {
            read_line(&mut lines).then(Instant::now)
        }));
        Ok(watched)
    }

    fn moment(mut self) -> Result<Instant> {
        let reader = self.reader.take().ok_or_else(nothing)?;
        // What has not happened by now will not.
        let deadline = Instant::now() + Duration::from_secs(10);
        while !reader.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        reader.join().ok().flatten().ok_or_else(nothing)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // Harmless when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_line(lines: &mut BufReader<ChildStdout>) -> bool {
    lines
        .read_line(&mut String::new())
        .is_ok_and(|bytes| bytes > 0)
}

fn nothing() -> Error {
    Error::Answer {
        from: "xenstore-watch".to_owned(),
        answer: "nothing".to_owned(),
    }
}
