//! Whether a link loses packets all the time, by what TCP has to send again.
//!
//! ```text
//!   TCP_INFO, each second --> segments sent, and sent again --> spans of a second and of 300
//!   segments at least --> three lossy ones in a row: it does
//! ```
//!
//! A congestion control that takes each loss for a full link, as cubic does, never fills a link that
//! loses a few packets whatever is sent: Mathis et al., "The Macroscopic Behavior of the TCP
//! Congestion Avoidance Algorithm" (1997), give its rate. One that goes by what arrives does.
//! Queues that overflow lose packets as well, but not in each span: after such a loss cubic sends
//! less, and needs seconds to fill the queue again.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::sys::socket::GetSockOpt;
use nix::{getsockopt_impl, sockopt_impl};

/// The shortest span to judge by.
const SPAN: Duration = Duration::from_secs(1);

/// The fewest segments to judge by.
const SEGMENTS: u32 = 300;

/// The part of a span's segments from which on it is lossy.
const LOSSY: f64 = 0.002;

/// So many lossy spans in a row are no accident.
const SPANS: u32 = 3;

/// The beginning of the kernel's `struct tcp_info`, as far as it is looked at.
const TCP_INFO_LENGTH: usize = 140;

sockopt_impl!(
    /// The beginning of the kernel's `struct tcp_info`.
    TcpInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    [u8; TCP_INFO_LENGTH]
);

/// Segments that a connection sent since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segments {
    /// All of them.
    pub(super) sent: u32,
    /// Of these, such as were sent before.
    pub(super) again: u32,
}

impl Segments {
    /// Asks the kernel.
    ///
    /// # Errors
    /// What the kernel answered.
    pub(super) fn of(socket: &impl AsFd) -> io::Result<Self> {
        let bytes = TcpInfo.get(&socket.as_fd())?;
        Ok(Self::parse(&bytes))
    }

    fn parse(bytes: &[u8; TCP_INFO_LENGTH]) -> Self {
        let field = |at: usize| {
            let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk());
            bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
        };
        Segments {
            sent: field(136),
            again: field(100),
        }
    }
}

/// Watches one connection.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// When the span began, and what had been sent.
    span: Option<(Instant, Segments)>,
    /// Lossy spans in a row.
    lossy: u32,
}

impl Losses {
    /// Looks at a connection. Whether it loses packets all the time.
    ///
    /// # Errors
    /// What the kernel answered.
    pub(super) fn look(&mut self, socket: impl AsFd) -> io::Result<bool> {
        Ok(self.note(Instant::now(), Segments::of(&socket)?))
    }

    /// Notes what has been sent by `now`. Whether packets are lost all the time.
    fn note(&mut self, now: Instant, segments: Segments) -> bool {
        let Some((began, before)) = self.span else {
            self.span = Some((now, segments));
            return false;
        };
        let sent = segments.sent.wrapping_sub(before.sent);
        if now.saturating_duration_since(began) >= SPAN && sent >= SEGMENTS {
            let again = segments.again.wrapping_sub(before.again);
            self.lossy = match f64::from(again) >= LOSSY * f64::from(sent) {
                true => self.lossy + 1,
                false => 0,
            };
            self.span = Some((now, segments));
        }
        self.lossy >= SPANS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    /// Looks each second, while so many segments are sent, and so many of them again. When it is
    /// noticed.
    fn noticed(seconds: impl IntoIterator<Item = (u32, u32)>) -> Option<usize> {
        let (mut losses, start) = (Losses::default(), Instant::now());
        let mut all = Segments { sent: 0, again: 0 };
        losses.note(start, all);
        seconds
            .into_iter()
            .enumerate()
            .position(|(at, (sent, again))| {
                all.sent += sent;
                all.again += again;
                losses.note(start + Duration::from_secs(at as u64 + 1), all)
            })
    }

    #[test]
    fn what_is_lost_all_the_time_is_noticed() {
        assert_eq!(noticed([(800, 4); 5]), Some(2));
        // Few segments need longer.
        assert_eq!(noticed([(100, 1); 20]), Some(8));
        assert_eq!(noticed([(10, 1); 20]), None);
    }

    #[test]
    fn a_queue_that_overflows_is_no_such_link() {
        assert_eq!(noticed([(800, 0); 60]), None);
        // Slow start ends with a burst of losses; later ones come now and then.
        let sawtooth = (0..60).map(|second| match second {
            0 | 1 => (3000, 200),
            _ if second % 4 == 0 => (800, 6),
            _ => (800, 0),
        });
        assert_eq!(noticed(sawtooth), None);
    }

    #[test]
    fn the_kernel_counts() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        let before = Segments::of(&near).unwrap();
        for _ in 0..20 {
            near.write_all(b"x").unwrap();
            far.read_exact(&mut [0]).unwrap();
        }
        let after = Segments::of(&near).unwrap();
        // Each byte went by itself, and nothing is lost there.
        assert!((20..60).contains(&(after.sent - before.sent)), "{after:?}");
        assert_eq!(after.again, 0);
    }
}
