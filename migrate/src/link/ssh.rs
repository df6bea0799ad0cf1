//! The other site through ssh, as `xl migrate` does.
//!
//! ssh runs `vmshadow receive` there; its standard streams are the link. Keys must be set up: a
//! password prompt in the middle of a move is of no use. What it prints is the other site's word:
//! it is bounded, and made printable, before it is kept or shown.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};

use super::direct::Ends;
use super::loss::Losses;
use super::said::{LastLines, read_lines, read_whole};
use super::{Carrier, Link, congestion};
use crate::error::{Error, IoContext, Result};
use crate::wire::MoveId;

/// How long a question may take, ssh's own way there included.
const ANSWERING: Duration = Duration::from_secs(30);

/// The most bytes of an answer.
const LONGEST_ANSWER: u64 = 64 << 10;

/// What is logged of one ssh's standard error, in lines: it may talk for ever.
const LOGGED: u32 = 1000;

/// How long to wait for the rest of what ssh said once it has ended. A process that it left behind
/// may hold its standard error open.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The first of the options that are always given.
const BATCH_MODE: &str = "-oBatchMode=yes";

/// How often a process is looked at.
const TICK: Duration = Duration::from_millis(10);

/// How the other site is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    /// `[user@]host`, for messages.
    pub host: String,
    /// The command line up to and including `vmshadow` at the other site.
    pub command: Vec<String>,
    /// Where it is run: options may name files by paths that start there, and whoever asks later is
    /// elsewhere. None: wherever this process is.
    pub directory: Option<String>,
    /// The congestion control that connections are to go by; by default the host's own, until packets
    /// are seen to be lost all the time.
    pub congestion: Option<String>,
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
            BATCH_MODE,
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
            directory: std::env::current_dir()
                .ok()
                .and_then(|directory| directory.into_os_string().into_string().ok()),
            congestion: None,
        })
    }

    /// As a journal keeps it.
    pub fn from_parts(host: String, command: Vec<String>, directory: Option<String>) -> Remote {
        Remote {
            host,
            command,
            directory,
            congestion: None,
        }
    }

    fn child(&self, arguments: &[&str]) -> Result<Command> {
        let (program, rest) = self
            .command
            .split_first()
            .ok_or_else(|| Error::Refused("The ssh command is empty".into()))?;
        let mut command = Command::new(program);
        command.args(rest).args(arguments);
        if let Some(directory) = &self.directory {
            // One that is gone would look as if ssh were.
            let there = Path::new(directory).is_dir();
            command.current_dir(if there { directory } else { "/" });
        }
        // Out of the terminal's group: Ctrl-C is for us to answer, in order.
        command.process_group(0);
        Ok(command)
    }

    /// Starts `vmshadow receive` at the other site.
    ///
    /// # Errors
    /// [`Error::Io`] where ssh can't be started.
    pub fn connect(&self) -> Result<(Link, Session)> {
        self.start(self.child(&["receive"])?)
    }

    /// Starts one more connection to a `vmshadow receive` that runs there for `move_id`: a
    /// connection of its own in any case, since one that is shared fills no longer link.
    ///
    /// # Errors
    /// As [`Remote::connect`].
    pub fn join(&self, move_id: MoveId) -> Result<(Link, Session)> {
        let mut alone = self.clone();
        // Behind what the operator gave, and before the host. What is given first counts.
        if let Some(at) = alone.command.iter().position(|part| part == BATCH_MODE) {
            let options = ["-oControlMaster=no", "-oControlPath=none"];
            alone.command.splice(at..at, options.map(str::to_owned));
        }
        self.start(alone.child(&["receive", "--join", &move_id.to_string()])?)
    }

    fn start(&self, mut command: Command) -> Result<(Link, Session)> {
        let mut child = command
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
        let (said, heard_all) = listen(self.host.clone(), stderr);
        let link = Link {
            reader: Box::new(stdout),
            writer: Box::new(stdin),
            carrier: Carrier::Others,
        };
        Ok((
            link,
            Session {
                child,
                said,
                heard_all,
                congestion: self.congestion.clone(),
                losses: Losses::default(),
            },
        ))
    }

    /// Runs `vmshadow ARGUMENTS` at the other site and returns what it printed: printable lines,
    /// 64 KiB at most. An answer takes 30 s at most; then ssh is ended.
    ///
    /// # Errors
    /// [`Error::LinkLost`] where it can't be reached, fails, or gives no answer in time.
    pub fn ask(&self, arguments: &[&str]) -> Result<String> {
        self.ask_for(arguments, ANSWERING, &[0])
    }

    /// As [`Remote::ask`], also of what ends with the status 1 and has printed something all the
    /// same: that is an answer too.
    ///
    /// # Errors
    /// As [`Remote::ask`].
    pub fn ask_what_may_fail(&self, arguments: &[&str]) -> Result<String> {
        self.ask_for(arguments, ANSWERING, &[0, 1])
    }

    fn ask_for(&self, arguments: &[&str], patience: Duration, good: &[i32]) -> Result<String> {
        let lost = |reason: String| Error::LinkLost {
            peer: self.host.clone(),
            reason,
        };
        let mut child = self
            .child(arguments)?
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context(|| format!("Can't start {}", self.command[0]))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let mut session = match stderr {
            Some(stderr) => {
                let (said, heard_all) = listen(self.host.clone(), stderr);
                Session {
                    child,
                    said,
                    heard_all,
                    congestion: None,
                    losses: Losses::default(),
                }
            }
            // Dropped, a child is neither ended nor reaped.
            None => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Error::Refused("ssh has no standard streams".into()));
            }
        };
        let (answer, answered) = bounded(1);
        if let Some(stdout) = stdout {
            thread::spawn(move || {
                // What can't be read is no answer; the status says why.
                let text = read_whole(stdout.take(LONGEST_ANSWER)).unwrap_or_default();
                let _ = answer.send(text);
            });
        }
        let start = Instant::now();
        match session.wait(patience) {
            Some(Some(status)) if good.contains(&status) => {
                let left = patience.saturating_sub(start.elapsed()).max(LAST_WORDS);
                let text = answered
                    .recv_timeout(left)
                    .map_err(|_| lost("its answer has no end".into()))?;
                match status {
                    0 => Ok(text),
                    _ if !text.is_empty() => Ok(text),
                    _ => Err(lost(
                        session.words(Some(status)).unwrap_or("no answer".into()),
                    )),
                }
            }
            Some(status) => Err(lost(session.words(status).unwrap_or("no answer".into()))),
            None => {
                session.finish(Duration::ZERO);
                Err(lost(format!("no answer within {} s", patience.as_secs())))
            }
        }
    }
}

/// What ssh said so far, and a channel that closes when all was heard.
type Said = (Arc<Mutex<LastLines>>, Receiver<()>);

/// Reads ssh's standard error to its end.
fn listen(host: String, stderr: impl Read + Send + 'static) -> Said {
    let said = Arc::new(Mutex::new(LastLines::default()));
    let (hearing, heard_all) = bounded(0);
    let kept = Arc::clone(&said);
    thread::spawn(move || {
        // Dropped when this thread ends.
        let _hearing = hearing;
        let mut count = 0;
        let end = read_lines(stderr, |line| {
            if count < LOGGED {
                count += 1;
                log::info!("{host}: {line}");
            }
            if let Ok(mut kept) = kept.lock() {
                kept.push(line);
            }
        });
        if let Err(error) = end {
            log::debug!("{host}: {error}");
        }
    });
    (said, heard_all)
}

/// The ssh process behind a link.
#[derive(Debug)]
pub struct Session {
    child: Child,
    said: Arc<Mutex<LastLines>>,
    heard_all: Receiver<()>,
    /// What it is to go by.
    congestion: Option<String>,
    /// What its connection loses.
    losses: Losses,
}

impl Session {
    /// The ssh process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Lets ssh's connection go by the congestion control that was asked for, if one was: once the
    /// other side has answered, the connection is there. The one that it goes by then; none where ssh
    /// has no connection of its own.
    ///
    /// # Errors
    /// [`Error::Refused`] and [`Error::Io`], only where one was asked for.
    pub fn follow_congestion(&self) -> Result<Option<String>> {
        congestion::of_process(self.child.id(), self.congestion.as_deref())
    }

    /// From where to where ssh's own connection leads; none where it has none, as behind another host
    /// that it goes through by a command.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn ends(&self) -> io::Result<Option<Ends>> {
        match congestion::connection_of(self.child.id())? {
            Some(socket) => congestion::ends(socket),
            None => Ok(None),
        }
    }

    /// Whether ssh's connection loses packets all the time. To be asked each second or so.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn loses_packets(&mut self) -> io::Result<bool> {
        match congestion::connection_of(self.child.id())? {
            Some(socket) => self.losses.look(socket),
            None => Ok(false),
        }
    }

    /// Lets ssh's connection go by the congestion control that fills a link which loses packets.
    /// Whether it went by another one.
    ///
    /// # Errors
    /// What the kernel answered; [`io::ErrorKind::NotFound`] where it has none of that name.
    pub fn follow_bbr(&self) -> io::Result<bool> {
        match congestion::connection_of(self.child.id())? {
            Some(socket) => congestion::follow_bbr(socket),
            None => Ok(false),
        }
    }

    /// The last of what ssh, or the other site's program, wrote to its standard error, oldest
    /// line first. At most 20 lines, printable, of bounded length.
    pub fn said(&self) -> Vec<String> {
        self.said.lock().map(|said| said.all()).unwrap_or_default()
    }

    /// Why the link ended, as far as ssh says; else what was `seen` of it here.
    pub fn reason(&mut self, seen: String) -> String {
        let status = self.finish(Duration::from_secs(2));
        self.words(status).unwrap_or(seen)
    }

    /// ssh's last words, or its status; nothing where it was silent and had to be ended.
    fn words(&self, status: Option<i32>) -> Option<String> {
        let said = self.said.lock().ok();
        let last = said.as_ref().and_then(|said| said.last());
        match (last, status) {
            (Some(line), _) => Some(line.to_owned()),
            (None, status) => status.map(|code| format!("ssh ended with status {code}")),
        }
    }

    /// Waits for ssh to end by itself. Nothing where it doesn't within `patience`; else its exit
    /// status, if it has one.
    fn wait(&mut self, patience: Duration) -> Option<Option<i32>> {
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status.code(),
                Ok(None) if start.elapsed() < patience => thread::sleep(TICK),
                Ok(None) => return None,
                // It can't be waited for: there is none any more.
                Err(_) => break None,
            }
        };
        // Nothing is ever sent: this returns when all was heard, or is given up.
        let _ = self.heard_all.recv_timeout(LAST_WORDS);
        Some(status)
    }

    /// Gives ssh `patience` to end by itself, then ends it. The exit status, if it has one.
    pub fn finish(&mut self, patience: Duration) -> Option<i32> {
        if let Some(status) = self.wait(patience) {
            return status;
        }
        // Killing what has ended already fails; nothing is lost by that.
        let _ = self.child.kill();
        let status = self.child.wait().ok().and_then(|status| status.code());
        let _ = self.heard_all.recv_timeout(LAST_WORDS);
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
    use std::io::Write;

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
    fn a_connection_that_joins_is_shared_with_none() {
        let script = r#"for part; do echo "$part"; done"#;
        let mut remote = Remote::new("sh", "b", "vmshadow").unwrap();
        // What ssh would get.
        let shell = ["sh", "-c", script].map(str::to_owned);
        remote.command.splice(0..1, shell);
        let (mut link, _session) = remote.join(MoveId::from_random([1; 16])).unwrap();
        let mut said = String::new();
        link.reader.read_to_string(&mut said).unwrap();
        let said: Vec<&str> = said.lines().collect();
        let at = |part: &str| said.iter().position(|it| *it == part).unwrap();
        assert!(at("-oControlPath=none") < at("b"), "{said:?}");
        assert_eq!(
            said[at("vmshadow")..at("vmshadow") + 3],
            ["vmshadow", "receive", "--join"]
        );
    }

    #[test]
    fn the_streams_of_the_child_are_the_link() {
        let echo = ["sh", "-c", "echo hello >&2; cat"]
            .map(str::to_owned)
            .to_vec();
        let remote = Remote::from_parts("here".into(), echo, None);
        let (mut link, mut session) = remote.connect().unwrap();
        link.writer.write_all(b"there and back").unwrap();
        drop(link.writer);
        let mut back = String::new();
        link.reader.read_to_string(&mut back).unwrap();
        assert_eq!(back, "there and back");
        assert_eq!(session.reason("closed".into()), "hello");
    }

    fn shell(script: &str) -> Remote {
        let command = ["sh", "-c", script].map(str::to_owned).to_vec();
        Remote::from_parts("b".into(), command, None)
    }

    #[test]
    fn paths_in_the_command_hold_for_whoever_asks_later() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("key"), "mine").unwrap();
        let mut remote = shell("cat ./key");
        assert!(remote.ask(&[]).is_err());
        remote.directory = Some(root.path().display().to_string());
        assert_eq!(remote.ask(&[]).unwrap(), "mine");
        drop(root);
        // It says what it lacks, and is not taken for one that is missing itself.
        let error = remote.ask(&[]).unwrap_err();
        assert!(matches!(error, Error::LinkLost { .. }), "{error:?}");
        let here = std::env::current_dir().unwrap();
        let remote = Remote::new("ssh", "b", "vmshadow").unwrap();
        assert_eq!(remote.directory, here.to_str().map(str::to_owned));
    }

    #[test]
    fn an_answer_is_what_was_printed() {
        let answer = shell("echo noise >&2; echo one; printf 'two\\033[2J\\n'")
            .ask(&[])
            .unwrap();
        assert_eq!(answer, "one\ntwo\u{fffd}[2J");
    }

    #[test]
    fn what_never_answers_is_ended_and_reaped() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let script = format!("echo $$ > {}; exec sleep 3600", file.path().display());
        let remote = shell(&script);
        let pid = loop {
            let error = remote
                .ask_for(&[], Duration::from_secs(1), &[0])
                .unwrap_err();
            assert!(error.to_string().contains("no answer within"), "{error}");
            // A busy machine may not even have come to the echo.
            if let Ok(pid) = std::fs::read_to_string(file.path())
                .unwrap()
                .trim()
                .parse::<u32>()
            {
                break pid;
            }
        };
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn an_answer_without_end_is_no_answer() {
        let error = shell("exec yes").ask_for(&[], Duration::from_secs(30), &[0]);
        // Its output is closed once it was enough, and that ends it.
        assert!(matches!(error, Err(Error::LinkLost { .. })), "{error:?}");
    }

    #[test]
    fn what_holds_the_standard_error_open_holds_up_nothing() {
        let (link, mut session) = shell("sleep 3600 >&- <&- & echo $!; echo gone >&2; exit 3")
            .connect()
            .unwrap();
        let mut pid = String::new();
        let mut reader = link.reader;
        reader.read_to_string(&mut pid).unwrap();
        assert_eq!(session.reason("closed".into()), "gone");
        // The one that was started here.
        let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    #[test]
    fn where_ssh_says_nothing_what_was_seen_is_told() {
        let (_link, mut session) = shell("exec sleep 3600").connect().unwrap();
        assert_eq!(session.finish(Duration::ZERO), None);
        let seen = "nothing heard for 21 s";
        assert_eq!(session.reason(seen.into()), seen);
    }

    #[test]
    fn a_talkative_other_end_is_bounded() {
        let (link, mut session) =
            shell("yes loud | head -c 1000000 >&2; printf '\\033[31mlast\\007' >&2")
                .connect()
                .unwrap();
        drop(link);
        session.finish(Duration::from_secs(60));
        assert_eq!(session.said().len(), 20);
        assert_eq!(session.reason("closed".into()), "\u{fffd}[31mlast\u{fffd}");
    }

    #[test]
    fn what_fails_may_have_answered() {
        let ask = |script| shell(script).ask_what_may_fail(&[]);
        assert_eq!(ask("echo no; exit 1").unwrap(), "no");
        for script in ["echo No route >&2; exit 1", "echo No route >&2; exit 255"] {
            let error = ask(script).unwrap_err();
            assert_eq!(error.to_string(), "Lost the link to b: No route");
        }
    }

    #[test]
    fn a_failing_command_is_a_lost_link() {
        let error = shell("echo No route >&2; exit 255").ask(&[]).unwrap_err();
        assert_eq!(error.to_string(), "Lost the link to b: No route");
    }
}
