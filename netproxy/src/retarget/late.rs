//! Old sockets, kept a little longer for what comes late.
//!
//! A segment of the guest that was queued somewhere on the way from the old site finds no socket
//! once that is closed, and the kernel answers with a reset. That reset takes the way back
//! through the same queues. If the guest has come back to the old site when it arrives, and its
//! client has sent nothing meanwhile, the reset carries the very sequence number that the guest
//! expects, and ends a healthy connection.
//!
//! So an old socket stays, deaf and in repair mode: it swallows what comes, and its end is
//! silent. It stays for as long as the kernel itself takes a segment to live in a network
//! (TCP_TIMEWAIT_LEN). The guest's own retransmissions come from where it is now, and need no
//! more than that. If the guest comes back before, the new socket takes the old one's place, with
//! a [block](super::block) over the moment between.
//!
//! The new socket of a move that was given up stays in the same way. Its caller may have died, and
//! the guest come to the new site all the same: what it says there must not be answered with a
//! reset, until the proxy is told where it is.
//!
//! A socket that was made anew and has seen both ends stays too, but hears: the kernel keeps no
//! TIME_WAIT for it, and a guest whose last segment was not acknowledged sends it again.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;

use crate::repair;

/// How long an old socket is kept: TCP_TIMEWAIT_LEN, the kernel's own figure for how long a
/// segment may live.
pub(crate) const LATE: Duration = Duration::from_secs(60);

type Ends = (SocketAddr, SocketAddr);

/// The old sockets of one thread, by local and remote address.
#[derive(Debug, Default)]
pub(crate) struct Late {
    sockets: BTreeMap<Ends, (Instant, TcpStream)>,
    order: VecDeque<(Instant, Ends)>,
}

impl Late {
    /// Keeps a socket that is in repair mode and not watched by any epoll set.
    pub(crate) fn keep(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
        socket: TcpStream,
        now: Instant,
    ) {
        self.keep_until(local, remote, socket, now + LATE);
    }

    /// The same, until a moment.
    pub(crate) fn keep_until(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
        socket: TcpStream,
        until: Instant,
    ) {
        self.sockets.insert((local, remote), (until, socket));
        self.order.push_back((until, (local, remote)));
    }

    /// Closes the socket with these addresses: another one needs them.
    pub(crate) fn forget(&mut self, local: SocketAddr, remote: SocketAddr) {
        if let Some((_, socket)) = self.sockets.remove(&(local, remote))
            && let Err(error) = repair::vacate(&socket)
        {
            // Mostly it does so when it is closed.
            log::debug!("An old socket of {local}: {}", error.chain());
        }
    }

    /// Gives them all away.
    pub(crate) fn take(&mut self) -> impl Iterator<Item = (Ends, Instant, TcpStream)> {
        self.order.clear();
        let all = std::mem::take(&mut self.sockets).into_iter();
        all.map(|(ends, (until, socket))| (ends, until, socket))
    }

    /// When the next one has been kept long enough.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.order.front().map(|(until, _)| *until)
    }

    /// Closes those that have been kept long enough.
    pub(crate) fn expire(&mut self, now: Instant) {
        while let Some((until, ends)) = self.order.front().copied() {
            if until > now {
                break;
            }
            self.order.pop_front();
            // Unless another one has taken its place since.
            if self
                .sockets
                .get(&ends)
                .is_some_and(|(own, _)| *own == until)
            {
                self.sockets.remove(&ends);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket() -> TcpStream {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        TcpStream::from_std(stream)
    }

    #[test]
    fn each_is_kept_for_its_time() {
        let (a, b): (SocketAddr, SocketAddr) = (
            "192.0.2.1:1".parse().unwrap(),
            "192.0.2.2:2".parse().unwrap(),
        );
        let start = Instant::now();
        let mut late = Late::default();
        late.keep(a, b, socket(), start);
        late.keep(b, a, socket(), start + LATE / 2);
        late.forget(a, b);
        // The same addresses again: the first one's time says nothing of the second.
        late.keep(a, b, socket(), start + LATE * 3 / 4);
        late.expire(start + LATE);
        assert_eq!(late.sockets.len(), 2);
        late.expire(start + LATE * 3 / 2);
        assert_eq!(late.sockets.keys().collect::<Vec<_>>(), [&(a, b)]);
        assert_eq!(late.next(), Some(start + LATE * 7 / 4));
        late.expire(start + LATE * 2);
        assert_eq!((late.sockets.len(), late.next()), (0, None));
    }
}
