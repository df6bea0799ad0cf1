//! The other site through ssh, as `xl migrate` does.
//!
//! ssh runs `vmshadow receive` there; its standard streams are the link. Keys must be set up: a
//! password prompt in the middle of a move is of no use.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::Link;
use crate::error::{Error, IoContext, Result};
use crate::wire::Text;

/// Lines of the other side's standard error that are kept, each of [`LONGEST_LINE`] at most.
const LINES: usize = 20;

/// Bytes of a line that are looked at: a peer may send one that never ends.
const LONGEST_LINE: u64 = 4096;

/// Bytes of an answer that are read: it is a line.
const LONGEST_ANSWER: u64 = 64 << 10;

/// How long an answer may take: ssh, a program's start, and another move's end there.
const ANSWERING: Duration = Duration::from_secs(90);

/// How the other site is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    /// `[user@]host`, for messages.
    pub host: String,
    /// The command line up to and including `vmshadow` at the other site.
    pub command: Vec<String>,
}

impl Remote {
    /// `host` through `ssh` (a command with its own options, as in `xl migrate -s`), where the
    /// program is called `program`.
    ///
    /// # Errors
    /// [`Error::Refused`] for a host or command that isn't one.
    pub fn new(ssh: &str, host: &str, program: &str) -> Result<Remote> {
        // A leading dash would be an option of ssh's.
        if host.is_empty() || host.starts_with('-') || host.contains(char::is_whitespace) {
            return Err(Error::Refused(format!("{host:?} is no host")));
        }
        let mut command: Vec<String> = ssh.split_whitespace().map(str::to_owned).collect();
        if command.is_empty() {
            return Err(Error::Refused("The ssh command is empty".into()));
        }
        for option in [
            "-T",
            "-oBatchMode=yes",
            "-oServerAliveInterval=5",
            "-oServerAliveCountMax=3",
            "-oConnectTimeout=20",
            "-oCompression=no",
        ] {
            command.push(option.to_owned());
        }
        command.push(host.to_owned());
        command.extend(program.split_whitespace().map(str::to_owned));
        Ok(Remote {
            host: host.to_owned(),
            command,
        })
    }

    /// As a journal keeps it.
    pub fn from_parts(host: String, command: Vec<String>) -> Remote {
        Remote { host, command }
    }

    fn child(&self, arguments: &[&str]) -> Result<Command> {
        let (program, rest) = self
            .command
            .split_first()
            .ok_or_else(|| Error::Refused("The ssh command is empty".into()))?;
        let mut command = Command::new(program);
        command.args(rest).args(arguments);
        // Out of the terminal's group: Ctrl-C is for us to answer, in order.
        command.process_group(0);
        Ok(command)
    }

    /// Starts `vmshadow receive` at the other site.
    ///
    /// # Errors
    /// [`Error::Io`] where ssh can't be started.
    pub fn connect(&self) -> Result<(Link, Session)> {
        self.start(&["receive"])
    }

    fn start(&self, arguments: &[&str]) -> Result<(Link, Session)> {
        let mut child = self
            .child(arguments)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context(|| format!("Can't start {}", self.command[0]))?;
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(Error::Refused("ssh has no standard streams".into()));
        };
        let said = Arc::new(Mutex::new(Vec::new()));
        let listener = {
            let said = Arc::clone(&said);
            let host = self.host.clone();
            thread::spawn(move || {
                let mut stderr = BufReader::new(stderr);
                while let Some(line) = read_line(&mut stderr) {
                    log::info!("{host}: {line}");
                    if let Ok(mut said) = said.lock() {
                        // The last ones tell why it ended.
                        if said.len() == LINES {
                            said.remove(0);
                        }
                        said.push(line);
                    }
                }
            })
        };
        let link = Link {
            reader: Box::new(stdout),
            writer: Box::new(stdin),
        };
        Ok((
            link,
            Session {
                child,
                said,
                listener: Some(listener),
            },
        ))
    }

    /// Runs `vmshadow ARGUMENTS` at the other site and returns what it printed.
    ///
    /// # Errors
    /// [`Error::LinkLost`] where it can't be reached, fails, or takes too long.
    pub fn ask(&self, arguments: &[&str]) -> Result<String> {
        let lost = |reason: String| Error::LinkLost {
            peer: self.host.clone(),
            reason,
        };
        let (link, mut session) = self.start(arguments)?;
        drop(link.writer);
        let (answered, answer) = crossbeam_channel::bounded(1);
        thread::spawn(move || {
            let mut bytes = Vec::new();
            let read = link.reader.take(LONGEST_ANSWER).read_to_end(&mut bytes);
            // Nobody waits any more where it took too long.
            let _ = answered.send(read.map(|_| bytes));
        });
        let answer = answer.recv_timeout(ANSWERING);
        let status = session.finish(Duration::from_secs(2));
        match answer {
            Err(_) => Err(lost(format!("no answer within {} s", ANSWERING.as_secs()))),
            Ok(Err(error)) => Err(lost(error.to_string())),
            Ok(Ok(bytes)) if status == Some(0) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Ok(Ok(_)) => Err(lost(session.last_words().unwrap_or("no answer".into()))),
        }
    }
}

/// One line, cut and made safe to show; `None` at the end.
fn read_line(from: &mut impl BufRead) -> Option<String> {
    let mut line = Vec::new();
    let mut piece = from.by_ref().take(LONGEST_LINE);
    match piece.read_until(b'\n', &mut line) {
        Ok(0) | Err(_) => None,
        Ok(_) => Some(Text::from_bytes(line.trim_ascii_end()).to_string()),
    }
}

/// The ssh process behind a link.
#[derive(Debug)]
pub struct Session {
    child: Child,
    said: Arc<Mutex<Vec<String>>>,
    listener: Option<thread::JoinHandle<()>>,
}

impl Session {
    /// The ssh process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What ssh, or the other site's program, wrote to its standard error.
    pub fn said(&self) -> Vec<String> {
        self.said
            .lock()
            .map(|said| said.clone())
            .unwrap_or_default()
    }

    /// Why the link ended, as far as ssh says.
    pub fn reason(&mut self) -> String {
        let status = self.finish(Duration::from_secs(2));
        match (self.last_words(), status) {
            (Some(line), _) => line,
            (None, Some(code)) => format!("ssh ended with status {code}"),
            (None, None) => "the connection was closed".to_owned(),
        }
    }

    /// The last line that says anything.
    fn last_words(&self) -> Option<String> {
        let said = self.said();
        let last = said.iter().rev().find(|line| !line.trim().is_empty());
        last.map(|line| line.trim().to_owned())
    }

    /// Gives ssh `patience` to end by itself, then ends it. The exit status, if it has one.
    pub fn finish(&mut self, patience: Duration) -> Option<i32> {
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status.code(),
                Ok(None) if start.elapsed() < patience => thread::sleep(Duration::from_millis(10)),
                Ok(None) | Err(_) => {
                    // Killing what has ended already fails; nothing is lost by that.
                    let _ = self.child.kill();
                    break self.child.wait().ok().and_then(|status| status.code());
                }
            }
        };
        if let Some(listener) = self.listener.take() {
            // The listener ends with ssh's standard error.
            let _ = listener.join();
        }
        status
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.finish(Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_host_is_no_option() {
        for bad in ["", "-oProxyCommand=x", "a b"] {
            assert!(Remote::new("ssh", bad, "vmshadow").is_err());
        }
        let remote = Remote::new("ssh -p 2222", "root@b", "vmshadow").unwrap();
        assert_eq!(remote.command[..3], ["ssh", "-p", "2222"]);
        assert_eq!(
            remote.command[remote.command.len() - 2..],
            ["root@b", "vmshadow"]
        );
    }

    #[test]
    fn the_streams_of_the_child_are_the_link() {
        let echo = ["sh", "-c", "echo hello >&2; cat"]
            .map(str::to_owned)
            .to_vec();
        let remote = Remote::from_parts("here".into(), echo);
        let (mut link, mut session) = remote.connect().unwrap();
        link.writer.write_all(b"there and back").unwrap();
        drop(link.writer);
        let mut back = String::new();
        link.reader.read_to_string(&mut back).unwrap();
        assert_eq!(back, "there and back");
        assert_eq!(session.reason(), "hello");
    }

    #[test]
    fn what_the_other_side_says_is_bounded_and_safe_to_show() {
        let flood = "i=0; while [ $i -lt 100 ]; do printf 'line %d \\033[2J\\n' $i >&2; i=$((i+1)); done; \
                     head -c 100000 /dev/zero | tr '\\0' x >&2; exit 3";
        let sh = ["sh", "-c", flood].map(str::to_owned).to_vec();
        let (_link, mut session) = Remote::from_parts("b".into(), sh).connect().unwrap();
        assert_eq!(session.finish(Duration::from_secs(60)), Some(3));
        let said = session.said();
        assert_eq!(said.len(), LINES);
        assert!(said.iter().all(|line| line.len() <= Text::MAX));
        assert!(!said.concat().contains('\u{1b}'));
    }

    #[test]
    fn an_answer_is_what_was_printed() {
        let sh = ["sh", "-c", "cat; echo yes"].map(str::to_owned).to_vec();
        let answer = Remote::from_parts("b".into(), sh).ask(&[]).unwrap();
        assert_eq!(answer, "yes\n");
    }

    #[test]
    fn a_failing_command_is_a_lost_link() {
        let sh = ["sh", "-c", "echo No route >&2; exit 255"]
            .map(str::to_owned)
            .to_vec();
        let error = Remote::from_parts("b".into(), sh).ask(&[]).unwrap_err();
        assert_eq!(error.to_string(), "Lost the link to b: No route");
    }
}
