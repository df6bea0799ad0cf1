//! The other end of the control socket: for the command, and for tests.

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use super::protocol::{Change, Done, Ended, MAX_LINE, Request, Status, read_answer, write_request};
use crate::directories::Directories;
use crate::error::{Error, IoContext, Result};
use crate::handover::journal::Role;

/// How long an answer may take that needs nothing of the engine.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a move may take to end once it is given up: a suspend that is under way, the guest's
/// going on, last words to a link that takes none.
const ENDING: Duration = Duration::from_secs(300);

/// A control socket, by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Socket {
    pub(super) path: PathBuf,
    pub(super) move_id: String,
}

impl Socket {
    /// The file name of a move's socket.
    pub(super) fn name(move_id: &str, role: Role) -> String {
        let role = match role {
            Role::Source => "source",
            Role::Destination => "destination",
        };
        format!("{move_id}.{role}")
    }
}

/// All sockets of this host, stale ones among them.
pub(super) fn sockets(directories: &Directories) -> Result<Vec<Socket>> {
    let directory = directories.control();
    let entries = match fs::read_dir(&directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.context(|| format!("Can't read {}", directory.display()))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.context(|| format!("Can't read {}", directory.display()))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some((move_id, "source" | "destination")) = name.rsplit_once('.') {
            found.push(Socket {
                path: entry.path(),
                move_id: move_id.to_owned(),
            });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// A connection to a worker's control socket.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
    name: String,
}

impl Client {
    fn connect(socket: &Socket) -> io::Result<Client> {
        let stream = UnixStream::connect(&socket.path)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Client {
            reader: BufReader::new(stream),
            name: socket.move_id.clone(),
        })
    }

    /// How the move goes.
    ///
    /// # Errors
    /// [`Error::Control`] where the worker gives no answer.
    pub fn status(&mut self) -> Result<Status> {
        match self.call(&Request::Status, PATIENCE)? {
            Done::Status(status) => Ok(*status),
            other => Err(self.failed(format!("it answers {other:?}"))),
        }
    }

    /// Gives the move up, and waits until it has ended.
    ///
    /// # Errors
    /// [`Error::Refused`] where it is too late; [`Error::Control`] where the worker gives no
    /// answer.
    pub fn cancel(&mut self) -> Result<Ended> {
        match self.call(&Request::Cancel, ENDING)? {
            Done::Cancel(ended) => Ok(ended),
            other => Err(self.failed(format!("it answers {other:?}"))),
        }
    }

    /// Changes limits, and says which hold then.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn set(&mut self, change: Change) -> Result<Change> {
        match self.call(&Request::Set(change), PATIENCE)? {
            Done::Set(change) => Ok(change),
            other => Err(self.failed(format!("it answers {other:?}"))),
        }
    }

    fn failed(&self, reason: String) -> Error {
        Error::Control {
            name: self.name.clone(),
            reason,
        }
    }

    fn call(&mut self, request: &Request, patience: Duration) -> Result<Done> {
        let line = write_request(request).map_err(|error| self.failed(error.to_string()))?;
        let answer = self.exchange(&line, patience).map_err(|error| {
            self.failed(match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                    format!("no answer within {} s", patience.as_secs())
                }
                _ => error.to_string(),
            })
        })?;
        read_answer(&answer)
            .map_err(|reason| self.failed(reason))?
            .map_err(Error::Refused)
    }

    fn exchange(&mut self, line: &str, patience: Duration) -> io::Result<String> {
        let stream = self.reader.get_mut();
        stream.set_read_timeout(Some(patience))?;
        stream.write_all(line.as_bytes())?;
        let mut answer = String::new();
        let read = self
            .reader
            .by_ref()
            .take(MAX_LINE as u64)
            .read_line(&mut answer)?;
        match read {
            0 => Err(io::Error::other("the worker has ended")),
            _ => Ok(answer),
        }
    }
}

/// A worker of this host.
#[derive(Debug)]
pub struct At {
    /// How its move goes.
    pub status: Status,
    /// To steer it by.
    pub client: Client,
}

/// The workers of this host.
#[derive(Debug, Default)]
pub struct Found {
    /// Those that answer.
    pub moves: Vec<At>,
    /// Why others don't.
    pub silent: Vec<Error>,
}

/// All moves that are at work on this host. A worker that hangs doesn't hide the others.
///
/// # Errors
/// [`Error::Io`] where this user may not look.
pub fn moves(directories: &Directories) -> Result<Found> {
    let mut found = Found::default();
    for socket in sockets(directories)? {
        let mut client = match Client::connect(&socket) {
            Ok(client) => client,
            // Its worker was killed, or has ended by now.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::ConnectionRefused | ErrorKind::NotFound
                ) =>
            {
                continue;
            }
            Err(error) => {
                found.silent.push(Error::Control {
                    name: socket.move_id,
                    reason: error.to_string(),
                });
                continue;
            }
        };
        match client.status() {
            Ok(status) => found.moves.push(At { status, client }),
            Err(error) => found.silent.push(error),
        }
    }
    Ok(found)
}

/// The moves of the guest that is called `domain`, by its name, its UUID or, where it leaves, its
/// domain id. What waits comes last: a move that began meanwhile is what is meant.
///
/// # Errors
/// [`Error::Refused`] where there is none; [`Error::Control`] where a worker that may be its
/// doesn't answer; [`Error::Io`].
pub fn find(directories: &Directories, domain: &str) -> Result<Vec<At>> {
    let mut found = moves(directories)?;
    found.moves.retain(|at| is_called(&at.status, domain));
    found.moves.sort_by_key(|at| at.status.waiting);
    match found.silent.pop() {
        _ if !found.moves.is_empty() => Ok(found.moves),
        Some(silent) => Err(silent),
        None => Err(Error::Refused(format!(
            "No move of {domain} is at work on this host"
        ))),
    }
}

fn is_called(status: &Status, domain: &str) -> bool {
    status.domain == domain
        || status.uuid == domain
        || (status.domid.is_some() && domain.parse().ok() == status.domid)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;
    use crate::control::shared::tests::a_move;
    use crate::control::{Bandwidth, Facts, Outcome, Server};
    use crate::report::Progress;
    use crate::whereabouts::Whereabouts;

    struct Host {
        _root: tempfile::TempDir,
        directories: Directories,
    }

    impl Host {
        fn new() -> Host {
            let root = tempfile::tempdir().unwrap();
            let directories = Directories::under(root.path());
            directories.create().unwrap();
            Host {
                _root: root,
                directories,
            }
        }

        fn names(&self) -> Vec<String> {
            let found = moves(&self.directories).unwrap();
            assert!(found.silent.is_empty());
            found.moves.into_iter().map(|at| at.status.domain).collect()
        }
    }

    fn cancelled() -> Ended {
        Ended {
            outcome: Outcome::Cancelled,
            guest: Whereabouts::Source,
            what: "g1 was not moved and runs here".into(),
        }
    }

    #[test]
    fn moves_of_different_guests_are_told_apart() {
        let host = Host::new();
        assert!(host.names().is_empty());
        let (first, second) = (a_move(Role::Source, 1), a_move(Role::Destination, 2));
        let servers =
            [first.clone(), second].map(|shared| Server::start(&host.directories, shared).unwrap());
        first.note(&Progress::Phase("copying"));
        assert_eq!(host.names(), ["g1", "g2"]);
        for name in ["g1", "101", "10000000-0000-4000-8000-000000000001"] {
            let at = find(&host.directories, name).unwrap();
            assert_eq!(at[0].status.phase, "copying");
            assert_eq!(at.len(), 1);
        }
        // Who arrives has no number yet that anybody could know.
        let error = find(&host.directories, "102").unwrap_err();
        assert!(error.to_string().contains("No move of 102"), "{error}");
        drop(servers);
        assert!(host.names().is_empty());
    }

    #[test]
    fn only_its_owner_can_open_the_socket() {
        let host = Host::new();
        let _server = Server::start(&host.directories, a_move(Role::Source, 1)).unwrap();
        let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&host.directories.control()) & 0o777, 0o700);
        let socket = &sockets(&host.directories).unwrap()[0];
        assert_eq!(mode(&socket.path) & 0o777, 0o600);
    }

    #[test]
    fn a_move_that_is_at_work_comes_before_one_that_waits() {
        let host = Host::new();
        let (waiting, at_work) = (a_move(Role::Source, 1), a_move(Role::Source, 1));
        at_work.go_on(Facts {
            move_id: "10000000-0000-4000-8000-0000000000ff".into(),
            ..at_work.facts()
        });
        let _servers = [waiting.clone(), at_work]
            .map(|shared| Server::start(&host.directories, shared).unwrap());
        let first = || find(&host.directories, "g1").unwrap().remove(0).status;
        assert_eq!(first().move_id, waiting.facts().move_id);
        waiting.pause("waiting for the next time");
        assert_ne!(first().move_id, waiting.facts().move_id);
    }

    #[test]
    fn limits_are_set_from_outside() {
        let host = Host::new();
        let shared = a_move(Role::Source, 1);
        let _server = Server::start(&host.directories, shared.clone()).unwrap();
        let mut at = find(&host.directories, "g1").unwrap().remove(0);
        let change = Change {
            bandwidth: Some(Bandwidth::of_bytes(Some(1_000_000))),
            downtime_ms: Some(70),
        };
        assert_eq!(at.client.set(change).unwrap(), change);
        assert_eq!(shared.downtime(), Duration::from_millis(70));
        assert_eq!(
            at.client.status().unwrap().bandwidth,
            Bandwidth::Limit(8_000_000)
        );
    }

    #[test]
    fn a_cancel_is_answered_when_the_move_has_ended() {
        let host = Host::new();
        let shared = a_move(Role::Source, 1);
        let server = Server::start(&host.directories, shared.clone()).unwrap();
        let mut at = find(&host.directories, "g1").unwrap().remove(0);
        let asking = thread::spawn(move || at.client.cancel());
        // As an engine does, once it sees it; others are served meanwhile.
        while !find(&host.directories, "g1").unwrap()[0].status.cancelling {
            thread::yield_now();
        }
        assert!(!asking.is_finished());
        server.end(cancelled());
        assert_eq!(asking.join().unwrap().unwrap(), cancelled());
    }

    #[test]
    fn a_cancel_that_comes_too_late_is_refused_at_once() {
        let host = Host::new();
        let shared = a_move(Role::Source, 1);
        let _server = Server::start(&host.directories, shared.clone()).unwrap();
        assert!(shared.commit());
        let mut at = find(&host.directories, "g1").unwrap().remove(0);
        let error = at.client.cancel().unwrap_err();
        assert!(matches!(error, Error::Refused(_)), "{error:?}");
        assert!(error.to_string().contains("too late"), "{error}");
    }

    #[test]
    fn what_a_killed_worker_left_is_passed_over_and_removed_by_the_next() {
        let host = Host::new();
        fs::create_dir(host.directories.control()).unwrap();
        let stale = host.directories.control().join(Socket::name(
            "00000000-0000-4000-8000-0000000000ff",
            Role::Source,
        ));
        // Closing a listener doesn't remove its socket.
        drop(UnixListener::bind(&stale).unwrap());
        assert!(host.names().is_empty());
        assert!(stale.exists());
        let _server = Server::start(&host.directories, a_move(Role::Source, 1)).unwrap();
        assert!(!stale.exists());
        assert_eq!(host.names(), ["g1"]);
    }

    #[test]
    fn clients_that_hang_or_talk_nonsense_keep_nobody_away() {
        let host = Host::new();
        let _server = Server::start(&host.directories, a_move(Role::Source, 1)).unwrap();
        let socket = sockets(&host.directories).unwrap().remove(0);
        let _silent: Vec<_> = (0..8)
            .map(|_| UnixStream::connect(&socket.path).unwrap())
            .collect();
        for nonsense in ["{}\n".as_bytes(), b"\xff\n", &[b'x'; MAX_LINE + 1]] {
            let mut stream = UnixStream::connect(&socket.path).unwrap();
            stream.write_all(nonsense).unwrap();
            let mut answer = String::new();
            BufReader::new(&stream).read_line(&mut answer).unwrap();
            assert!(read_answer(&answer).unwrap().is_err(), "{answer}");
        }
        assert_eq!(host.names(), ["g1"]);
    }

    #[test]
    fn a_worker_that_is_stopped_is_named_and_hides_no_other() {
        let host = Host::new();
        let _server = Server::start(&host.directories, a_move(Role::Source, 1)).unwrap();
        let path = host.directories.control().join(Socket::name(
            "00000000-0000-4000-8000-0000000000ff",
            Role::Source,
        ));
        // It listens, and answers nothing: as a process that was stopped.
        let listener = UnixListener::bind(&path).unwrap();
        let ending = thread::spawn(move || drop(listener.accept()));
        let found = moves(&host.directories).unwrap();
        assert_eq!(found.moves.len(), 1);
        assert_eq!(found.silent.len(), 1);
        ending.join().unwrap();
    }
}
