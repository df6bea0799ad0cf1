//! Old sockets, kept a little longer for what comes late.
//!
//! A segment of the guest that was queued somewhere on the way from the old site finds no socket
//! once that is closed, and the kernel answers with a reset. Nobody is at the old site to hear
//! it, unless the guest comes back soon. So an old socket stays for a while, deaf and in repair
//! mode: it swallows what comes, and its end is silent.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;

/// How long an old socket is kept: longer than any queue on the way.
pub(crate) const LATE: Duration = Duration::from_secs(3);

type Ends = (SocketAddr, SocketAddr);

/// The old sockets of one thread, by local and remote address.
#[derive(Debug, Default)]
pub(crate) struct Late {
    sockets: BTreeMap<Ends, (Instant, TcpStream)>,
    order: VecDeque<(Instant, Ends)>,
}

impl Late {
    /// Keeps a socket that is deaf and in repair mode.
    pub(crate) fn keep(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
        socket: TcpStream,
        now: Instant,
    ) {
        let until = now + LATE;
        self.sockets.insert((local, remote), (until, socket));
        self.order.push_back((until, (local, remote)));
    }

    /// Closes the socket with these addresses: another one needs them.
    pub(crate) fn forget(&mut self, local: SocketAddr, remote: SocketAddr) {
        self.sockets.remove(&(local, remote));
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
