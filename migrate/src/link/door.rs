//! How more connections come to a worker that receives a guest.
//!
//! ```text
//!   source                         destination
//!   ssh vmshadow receive           vmshadow receive                  the worker
//!                                    |  /run/vmshadow/join/MOVE      its door
//!   ssh ... receive --join MOVE    vmshadow receive --join MOVE      passes bytes on, both ways
//! ```
//!
//! The process that joins knows nothing but the move's name, and looks at nothing that it passes
//! on. Only the worker's own user comes in, and the worker checks what is said first. A process
//! that joins ends with its ssh, and with its worker.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use super::direct::{self, DirectPolicy, Ends, Listener};
use super::{Link, MAX_CONNECTIONS};
use crate::directories::{self, Directories};
use crate::error::{IoContext, Result};
use crate::wire::{DirectDoor, DirectOffer, MoveId};

/// How long what is said to a connection that has ended at the other site may take to be read.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// The most bytes that are read at once to be passed on: what a pipe holds.
const PASSED_AT_ONCE: usize = 64 << 10;

/// Where the connections of one move come in, until it is dropped.
#[derive(Debug)]
pub struct Door {
    path: PathBuf,
    closed: Arc<AtomicBool>,
    /// Where connections come in.
    come: Sender<Link>,
    /// Where they come directly.
    listener: Option<Listener>,
}

fn path(directories: &Directories, move_id: MoveId) -> PathBuf {
    directories.joining().join(move_id.to_string())
}

impl Door {
    /// Opens the door of a move. What comes in is received.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn open(directories: &Directories, move_id: MoveId) -> Result<(Door, Receiver<Link>)> {
        let directory = directories.joining();
        let failed = || format!("Can't open a socket in {}", directory.display());
        directories::make_private(&directory).context(failed)?;
        remove_stale(&directory);
        let path = path(directories, move_id);
        let listener = UnixListener::bind(&path).context(failed)?;
        let closed = Arc::<AtomicBool>::default();
        let (come, links) = bounded(MAX_CONNECTIONS);
        let (stop, came) = (Arc::clone(&closed), come.clone());
        thread::Builder::new()
            .name("door".into())
            .spawn(move || accept(&listener, &came, &stop))
            .context(failed)?;
        let door = Door {
            path,
            closed,
            come,
            listener: None,
        };
        Ok((door, links))
    }

    /// Takes connections directly as well, from and to these addresses, as they are `offered`.
    ///
    /// # Errors
    /// Where nobody can listen there.
    pub fn listen(
        &mut self,
        policy: &DirectPolicy,
        ends: Ends,
        offered: &DirectOffer,
    ) -> Result<DirectDoor> {
        let (listener, door) = direct::listen(policy, ends, offered, self.come.clone())?;
        self.listener = Some(listener);
        Ok(door)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Release);
        // Wakes the thread that accepts. Where this fails there is none.
        let _ = UnixStream::connect(&self.path);
        // The next worker removes it where this fails.
        let _ = fs::remove_file(&self.path);
    }
}

/// Sockets of workers that were killed: nobody will ever listen there again.
fn remove_stale(directory: &std::path::Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if UnixStream::connect(entry.path())
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        {
            // It harms nobody, and the next worker tries again.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn accept(listener: &UnixListener, come: &Sender<Link>, closed: &AtomicBool) {
    for stream in listener.incoming() {
        if closed.load(Ordering::Acquire) {
            return;
        }
        let link = stream.and_then(|stream| {
            let who = getsockopt(&stream, PeerCredentials)?;
            if who.uid() != geteuid().as_raw() {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            Ok(Link::new(stream.try_clone()?, stream))
        });
        match link {
            Ok(link) => {
                // One that can't be taken is closed; so is the door, once nobody takes any.
                let _ = come.try_send(link);
            }
            Err(error) => {
                log::warn!("A connection did not come in: {error}");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Joins a move that is received here: passes `input` on to its worker, and what that says to
/// `output`, until either has ended.
///
/// # Errors
/// Where no such move is received here.
pub fn join(
    directories: &Directories,
    move_id: MoveId,
    mut input: File,
    mut output: File,
) -> Result<()> {
    let failed = || format!("Can't join the move {move_id}");
    let mut worker = UnixStream::connect(path(directories, move_id)).context(failed)?;
    let mut to_worker = worker.try_clone().context(failed)?;
    let (passing, passed) = bounded::<()>(0);
    thread::spawn(move || {
        // Dropped when this thread ends. Whatever ended it, there is nothing more to pass on.
        let _passing = passing;
        let _ = pass_on(&mut input, &mut to_worker);
        let _ = to_worker.shutdown(Shutdown::Write);
    });
    let (saying, said) = bounded::<()>(0);
    thread::spawn(move || {
        let _saying = saying;
        let _ = pass_on(&mut worker, &mut output);
    });
    crossbeam_channel::select! {
        // Nothing is ever sent: a channel closes when its thread ends.
        recv(said) -> _ => {}
        recv(passed) -> _ => {
            let _: std::result::Result<(), _> = said.recv_timeout(LAST_WORDS);
        }
    }
    Ok(())
}

/// Passes bytes on until there are no more.
///
/// Not by `io::copy`, which splices: the kernel keeps a pipe's lock while it waits for the other end
/// of a splice. The sshd at that pipe would wait for the lock in a read or write that is not to
/// block, and could do nothing else meanwhile, for seconds and again and again.
fn pass_on(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; PASSED_AT_ONCE];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => to.write_all(&buffer[..length])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::unistd::pipe2;
    use std::os::fd::OwnedFd;

    fn id() -> MoveId {
        MoveId::from_random([7; 16])
    }

    /// A process that joins, as a thread, and its two streams' other ends.
    fn joined(
        directories: &Directories,
    ) -> (thread::JoinHandle<Result<()>>, UnixStream, UnixStream) {
        let (input, ours) = UnixStream::pair().unwrap();
        let (output, theirs) = UnixStream::pair().unwrap();
        let directories = directories.clone();
        let file = |stream: UnixStream| File::from(OwnedFd::from(stream));
        let thread = thread::spawn(move || join(&directories, id(), file(input), file(output)));
        (thread, ours, theirs)
    }

    #[test]
    fn what_comes_in_is_passed_on_until_either_end_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::under(root.path());
        let (door, links) = Door::open(&directories, id()).unwrap();
        let (joining, mut ours, mut theirs) = joined(&directories);
        let mut link = links.recv().unwrap();
        ours.write_all(b"there").unwrap();
        let mut bytes = [0; 5];
        link.reader.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"there");
        link.writer.write_all(b"back").unwrap();
        theirs.read_exact(&mut bytes[..4]).unwrap();
        assert_eq!(&bytes[..4], b"back");
        // The worker ends.
        drop(link);
        joining.join().unwrap().unwrap();

        // ssh ends.
        let (joining, ours, _theirs) = joined(&directories);
        let mut link = links.recv().unwrap();
        drop(ours);
        assert_eq!(link.reader.read(&mut bytes).unwrap(), 0);
        drop(link);
        joining.join().unwrap().unwrap();
        drop(door);
        assert_eq!(fs::read_dir(directories.joining()).unwrap().count(), 0);
    }

    /// sshd does all of a connection on one thread, by calls that don't block.
    #[test]
    fn whoever_is_at_the_pipes_never_waits() {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::under(root.path());
        let (_door, links) = Door::open(&directories, id()).unwrap();
        let pipe = || pipe2(OFlag::O_CLOEXEC).unwrap();
        let ((input, ours), (theirs, output)) = (pipe(), pipe());
        let joining = {
            let directories = directories.clone();
            thread::spawn(move || join(&directories, id(), input.into(), output.into()))
        };
        let mut link = links.recv().unwrap();
        for end in [&ours, &theirs] {
            fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        }
        let (mut ours, mut theirs) = (File::from(ours), File::from(theirs));
        let (done, all_done) = bounded(0);
        thread::spawn(move || {
            link.writer.write_all(b"word").unwrap();
            let mut bytes = [0; 5];
            while theirs.read(&mut bytes).map_err(|error| error.kind())
                == Err(io::ErrorKind::WouldBlock)
            {}
            // By now the other process waits for the next word.
            thread::sleep(Duration::from_millis(100));
            let read = theirs.read(&mut bytes).map_err(|error| error.kind());
            // Nobody takes what comes by the link.
            while ours.write(&[0; 4096]).is_ok() {
                thread::sleep(Duration::from_millis(1));
            }
            done.send(read).unwrap();
            drop((link, ours));
        });
        let read = all_done.recv_timeout(Duration::from_secs(30));
        assert_eq!(read, Ok(Err(io::ErrorKind::WouldBlock)));
        joining.join().unwrap().unwrap();
    }

    #[test]
    fn there_is_no_door_where_nothing_is_received() {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::under(root.path());
        let (joining, ..) = joined(&directories);
        assert!(joining.join().unwrap().is_err());
        // A worker that was killed leaves its socket, and the next one removes it.
        directories::make_private(&directories.joining()).unwrap();
        let stale = directories.joining().join("stale");
        drop(UnixListener::bind(&stale).unwrap());
        let (_door, _links) = Door::open(&directories, id()).unwrap();
        assert!(!stale.exists());
    }
}
