//! Pipes for splicing, and the pool of a thread.
//!
//! The kernel counts the pages of all pipes of a user (pipe-user-pages-soft), so pipes are few,
//! and a flow has one only while there are bytes in it. Who gets none copies.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

/// A pipe of less than this is no faster than copying.
const SMALLEST: usize = 64 * 1024;

/// A pipe with `filled` bytes in it.
#[derive(Debug)]
pub(crate) struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
    capacity: usize,
    filled: usize,
}

impl Pipe {
    fn new(size: usize) -> io::Result<Self> {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        let wanted = i32::try_from(size).map_err(io::Error::other)?;
        let capacity = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(wanted))?;
        let capacity = usize::try_from(capacity).map_err(io::Error::other)?;
        if capacity < SMALLEST {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(Self {
            reader,
            writer,
            capacity,
            filled: 0,
        })
    }

    /// One that was taken over.
    pub(crate) fn adopted(
        reader: OwnedFd,
        writer: OwnedFd,
        capacity: usize,
        filled: usize,
    ) -> Self {
        Self {
            reader,
            writer,
            capacity,
            filled,
        }
    }

    /// Its ends, its capacity, and the bytes in it.
    pub(crate) fn into_parts(self) -> (OwnedFd, OwnedFd, usize, usize) {
        (self.reader, self.writer, self.capacity, self.filled)
    }

    pub(crate) fn filled(&self) -> usize {
        self.filled
    }

    /// Takes bytes from `source`; 0 is its end. Full pipe and empty source both are
    /// `WouldBlock`: the kernel does not say which.
    pub(crate) fn fill(&mut self, source: &impl AsFd) -> io::Result<usize> {
        // The kernel counts slots, and a slot may hold far more than a page: the bytes are
        // counted here.
        let room = self.capacity.saturating_sub(self.filled);
        if room == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
        let taken = splice(source.as_fd(), None, self.writer.as_fd(), None, room, flags)?;
        self.filled += taken;
        Ok(taken)
    }

    /// Gives bytes to `sink`. `more` says that others will surely follow at once.
    pub(crate) fn drain(&mut self, sink: &impl AsFd, more: bool) -> io::Result<usize> {
        let mut flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
        if more {
            flags |= SpliceFFlags::SPLICE_F_MORE;
        }
        let given = splice(
            self.reader.as_fd(),
            None,
            sink.as_fd(),
            None,
            self.filled,
            flags,
        )?;
        self.filled = self.filled.saturating_sub(given);
        Ok(given)
    }
}

/// The pipes of one thread.
#[derive(Debug)]
pub(crate) struct PipePool {
    free: Vec<Pipe>,
    leased: usize,
    limit: usize,
    size: usize,
}

impl PipePool {
    /// A pool of at most `limit` pipes of `size` bytes each. Pipes are made when first needed.
    pub(crate) fn new(limit: usize, size: usize) -> Self {
        Self {
            free: Vec::new(),
            leased: 0,
            limit,
            size,
        }
    }

    /// An empty pipe, if there is one to have.
    pub(crate) fn lease(&mut self) -> Option<Pipe> {
        let pipe = match self.free.pop() {
            Some(pipe) => pipe,
            None if self.leased < self.limit => match Pipe::new(self.size) {
                Ok(pipe) => pipe,
                Err(error) => {
                    // The user's pages or descriptors are used up: go on with what there is.
                    log::info!("No more than {} pipes for splicing: {error}", self.leased);
                    self.limit = self.leased;
                    return None;
                }
            },
            None => return None,
        };
        self.leased += 1;
        Some(pipe)
    }

    /// Counts a pipe that was taken over among the leased ones.
    pub(crate) fn adopt(&mut self) {
        self.leased += 1;
    }

    /// Takes a pipe back. One that still holds bytes is closed instead.
    pub(crate) fn give_back(&mut self, pipe: Pipe) {
        self.leased = self.leased.saturating_sub(1);
        if pipe.filled == 0 {
            self.free.push(pipe);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_pass_in_order() {
        let mut pool = PipePool::new(1, 1 << 17);
        let mut pipe = pool.lease().unwrap();
        let (mut from, source) = UnixStream::pair().unwrap();
        let (sink, mut to) = UnixStream::pair().unwrap();
        from.write_all(b"hello").unwrap();
        assert_eq!(pipe.fill(&source).unwrap(), 5);
        from.write_all(b" world").unwrap();
        assert_eq!(pipe.fill(&source).unwrap(), 6);
        assert_eq!(pipe.drain(&sink, false).unwrap(), 11);
        let mut bytes = [0; 11];
        to.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello world");
    }

    #[test]
    fn the_pool_keeps_its_limit_and_no_dirty_pipe() {
        let mut pool = PipePool::new(1, 1 << 17);
        let mut pipe = pool.lease().unwrap();
        assert!(pool.lease().is_none());
        let (mut from, source) = UnixStream::pair().unwrap();
        from.write_all(b"left").unwrap();
        pipe.fill(&source).unwrap();
        pool.give_back(pipe);
        assert_eq!(pool.lease().unwrap().filled(), 0);
    }
}
