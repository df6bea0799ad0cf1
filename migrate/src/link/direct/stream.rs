//! A TCP connection within TLS as a link: one thread writes, another one reads.
//!
//! ```text
//!   writer:  plain -- lock -- sealed --> socket
//!   reader:  socket --> sealed -- lock -- plain
//! ```
//!
//! The lock is held to encrypt and to decrypt, and never for as long as the socket lets wait: a
//! writer that the link holds up keeps nobody from reading.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::mem;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::net::{SendFlags, send};
use rustls::Connection;

use crate::link::Link;

/// How much is encrypted at once, and read at once: some records of TLS, of 16 KiB each.
const AT_ONCE: usize = 128 << 10;

/// A link by a connection whose ends have shown who they are.
pub(super) fn link(mut connection: Connection, stream: TcpStream) -> io::Result<Link> {
    connection.set_buffer_limit(Some(AT_ONCE));
    let tls = Arc::new(Mutex::new(connection));
    let reader = Reader {
        tls: Arc::clone(&tls),
        stream: stream.try_clone()?,
        sealed: vec![0; AT_ONCE],
        filled: 0,
        taken: 0,
    };
    let writer = Writer {
        tls,
        stream,
        sealed: Vec::new(),
    };
    Ok(Link::new(reader, writer))
}

/// A thread that has failed with the connection in hand leaves it as it is: what is wrong with it
/// shows.
fn lock(tls: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    tls.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

struct Reader {
    tls: Arc<Mutex<Connection>>,
    stream: TcpStream,
    /// What was read of the socket: `filled` bytes, of which `taken` were handed on.
    sealed: Vec<u8>,
    filled: usize,
    taken: usize,
}

impl Read for Reader {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if to.is_empty() {
            return Ok(0);
        }
        loop {
            let mut tls = lock(&self.tls);
            match tls.reader().read(to) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    return Err(io::Error::new(error.kind(), "It was closed"));
                }
                // At the end of all: nothing, where the other end has said so.
                other => return other,
            }
            if self.taken == self.filled {
                drop(tls);
                self.filled = self.stream.read(&mut self.sealed)?;
                self.taken = 0;
                tls = lock(&self.tls);
            }
            let mut sealed = &self.sealed[self.taken..self.filled];
            self.taken += tls.read_tls(&mut sealed)?;
            tls.process_new_packets()
                .map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        }
    }
}

struct Writer {
    tls: Arc<Mutex<Connection>>,
    stream: TcpStream,
    /// What is to be written to the socket.
    sealed: Vec<u8>,
}

impl Writer {
    /// Takes all that is encrypted.
    fn seal(&mut self, tls: &mut Connection) -> io::Result<()> {
        while tls.wants_write() {
            tls.write_tls(&mut self.sealed)?;
        }
        Ok(())
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let tls = Arc::clone(&self.tls);
        let mut tls = lock(&tls);
        let count = tls.writer().write_vectored(slices)?;
        self.seal(&mut tls)?;
        drop(tls);
        // What can't be written is not written again: it would not fit behind what was.
        let mut sealed = mem::take(&mut self.sealed);
        self.stream.write_all(&sealed)?;
        sealed.clear();
        self.sealed = sealed;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Writer {
    /// The other end reads to its end, as with a pipe, and mostly hears that it is one.
    fn drop(&mut self) {
        let tls = Arc::clone(&self.tls);
        let mut tls = lock(&tls);
        tls.send_close_notify();
        // Where it can't be said at once the connection is held up, or broken: then it ends without.
        if self.seal(&mut tls).is_ok() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let _ = send(&self.stream, &self.sealed, flags);
        }
        let _ = self.stream.shutdown(Shutdown::Write);
    }
}
