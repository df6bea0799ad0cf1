//! The other site through ssh, as `xl migrate` does.
//!
//! ssh runs `vmshadow receive` there; its standard streams are the link. Keys must be set up: a
//! password prompt in the middle of a move is of no use.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::Link;
use crate::error::{Error, IoContext, Result};

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
        let mut child = self
            .child(&["receive"])?
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
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    log::info!("{host}: {line}");
                    if let Ok(mut said) = said.lock() {
                        // Bounded: a peer may talk for ever.
                        if said.len() < 20 {
                            said.push(line.chars().take(400).collect());
                        }
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
    /// [`Error::LinkLost`] where it can't be reached or fails.
    pub fn ask(&self, arguments: &[&str]) -> Result<String> {
        let lost = |reason: String| Error::LinkLost {
            peer: self.host.clone(),
            reason,
        };
        let output = self
            .child(arguments)?
            .stdin(Stdio::null())
            .output()
            .context(|| format!("Can't start {}", self.command[0]))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(lost(
                said.lines().last().unwrap_or("no answer").trim().to_owned(),
            ));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
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
        let said = self.said();
        let last = said.iter().rev().find(|line| !line.trim().is_empty());
        match (last, status) {
            (Some(line), _) => line.trim().to_owned(),
            (None, Some(code)) => format!("ssh ended with status {code}"),
            (None, None) => "the connection was closed".to_owned(),
        }
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
    fn a_failing_command_is_a_lost_link() {
        let sh = ["sh", "-c", "echo No route >&2; exit 255"]
            .map(str::to_owned)
            .to_vec();
        let error = Remote::from_parts("b".into(), sh).ask(&[]).unwrap_err();
        assert_eq!(error.to_string(), "Lost the link to b: No route");
    }
}
