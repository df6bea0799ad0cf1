//! The state of one TCP connection, as plain values: what is taken out of one socket and given
//! to another.
//!
//! ```text
//!        snd_una            snd_nxt        write_seq
//!  acked    │ sent, not acked  │  not sent     │
//! ──────────┼──────────────────┼───────────────┼──▶ send sequence
//!           └──── `unacked` (SIOCOUTQ) ────────┘
//!                              └─ `unsent` ────┘
//! ```
//!
//! A FIN takes one sequence number and no byte. The proxy itself remembers which direction has
//! ended, so that the new socket is always an established one: its sequence numbers lie past
//! the FINs that were exchanged, and the FIN that the peer has not acknowledged is sent again by
//! an ordinary shutdown.

use std::net::SocketAddr;

use crate::error::{Error, Result};
use crate::sys::{TcpOption, Window};

/// The states of TCP, numbered as the kernel does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TcpState {
    /// Open in both directions.
    Established,
    /// Being opened by us.
    SynSent,
    /// Being opened by the peer.
    SynReceived,
    /// We have ended; the peer has not acknowledged it.
    FinWait1,
    /// We have ended, and the peer knows.
    FinWait2,
    /// Both have ended, and the peer knows.
    TimeWait,
    /// No connection.
    Closed,
    /// The peer has ended.
    CloseWait,
    /// The peer has ended, then we; the peer has not acknowledged ours.
    LastAck,
    /// We have ended, then the peer; the peer has not acknowledged ours.
    Closing,
    /// A listener, or a number this code does not know.
    Other,
}

impl TcpState {
    /// From `tcpi_state`.
    #[must_use]
    pub fn from_number(number: u8) -> Self {
        match number {
            1 => Self::Established,
            2 => Self::SynSent,
            3 | 12 => Self::SynReceived,
            4 => Self::FinWait1,
            5 => Self::FinWait2,
            6 => Self::TimeWait,
            7 => Self::Closed,
            8 => Self::CloseWait,
            9 => Self::LastAck,
            11 => Self::Closing,
            _ => Self::Other,
        }
    }

    /// Whether a FIN of ours is still to be acknowledged.
    #[must_use]
    pub fn fin_outstanding(self) -> bool {
        matches!(self, Self::FinWait1 | Self::LastAck | Self::Closing)
    }

    /// Whether the connection can be given to another socket.
    #[must_use]
    pub fn is_movable(self) -> bool {
        matches!(self, Self::Established | Self::CloseWait | Self::FinWait2)
            || self.fin_outstanding()
    }
}

/// The parts of `struct tcp_info` that the proxy uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpInfo {
    /// The state of the connection.
    pub state: TcpState,
    /// Whether both ends send timestamps.
    pub timestamps: bool,
    /// Whether both ends speak SACK.
    pub sack: bool,
    /// The window scales (theirs, ours), if agreed on.
    pub scales: Option<(u8, u8)>,
    /// The smoothed round trip time in microseconds, 0 if unknown.
    pub rtt_us: u32,
    /// The variance of that, in microseconds.
    pub rtt_var_us: u32,
    /// Since when nothing has come from the peer, in milliseconds.
    pub silent_ms: u32,
    /// How often in a row the peer has left data, or a question for its window, unanswered.
    pub unanswered: u8,
    /// Segments that came in.
    pub segments_in: u32,
}

impl TcpInfo {
    const MIN: usize = 144;

    /// Reads the bytes of `struct tcp_info`.
    ///
    /// # Errors
    /// When the kernel gave fewer bytes than every kernel since 4.6 gives.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.len() < Self::MIN {
            return Err(Error::Inconsistent("tcp_info is too short"));
        }
        let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
        let word =
            |at: usize| u32::from_ne_bytes([byte(at), byte(at + 1), byte(at + 2), byte(at + 3)]);
        let options = byte(5);
        let scales = byte(6);
        Ok(Self {
            state: TcpState::from_number(byte(0)),
            timestamps: options & 1 != 0,
            sack: options & 2 != 0,
            scales: (options & 4 != 0).then_some((scales & 15, scales >> 4)),
            rtt_us: word(68),
            rtt_var_us: word(72),
            // Of data, and of acknowledgements: either shows that the peer is there.
            silent_ms: word(52).min(word(56)),
            unanswered: byte(2).saturating_add(byte(3)),
            segments_in: word(140),
        })
    }
}

/// What was read from a socket in repair mode, before it is made sense of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Raw {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub info: TcpInfo,
    pub mss: u32,
    pub receive_buffer: usize,
    pub send_buffer: usize,
    pub window: Window,
    pub write_seq: u32,
    pub rcv_nxt: u32,
    pub unacked: u32,
    pub unsent: u32,
    /// All bytes of the send queue; the kernel may show acknowledged ones in front.
    pub send_queue: Vec<u8>,
    /// The bytes that nobody has read.
    pub receive_queue: Vec<u8>,
}

/// The state of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Our address.
    pub local: SocketAddr,
    /// The peer's address, as this host sees it.
    pub remote: SocketAddr,
    /// State, options and round trip time.
    pub info: TcpInfo,
    /// The MSS agreed on.
    pub mss: u32,
    /// The first byte that the peer has not acknowledged.
    pub snd_una: u32,
    /// The first sequence number that was never sent.
    pub snd_nxt: u32,
    /// The next sequence number expected from the peer.
    pub rcv_nxt: u32,
    /// The bytes that the peer has not acknowledged, sent or not.
    pub send: Vec<u8>,
    /// The bytes from the peer that nobody has read.
    pub receive: Vec<u8>,
    /// The size of the receive buffer (SO_RCVBUF, as the kernel shows it).
    pub(crate) receive_buffer: usize,
    /// The size of the send buffer (SO_SNDBUF, as the kernel shows it).
    pub(crate) send_buffer: usize,
    pub(crate) window: Window,
}

impl Snapshot {
    pub(crate) fn from_raw(raw: Raw) -> Result<Self> {
        let state = raw.info.state;
        if !state.is_movable() {
            return Err(Error::Unmovable(match state {
                TcpState::Closed => "it is closed",
                TcpState::TimeWait => "both ends have ended",
                TcpState::SynSent | TcpState::SynReceived => "it is being opened",
                _ => "its state is unknown",
            }));
        }
        if raw.unsent > raw.unacked {
            return Err(Error::Inconsistent(
                "more was not sent than was not acknowledged",
            ));
        }
        let fin = u32::from(state.fin_outstanding());
        let Some(bytes) = raw.unacked.checked_sub(fin) else {
            return Err(Error::Inconsistent(
                "a FIN is outstanding and the queue is empty",
            ));
        };
        // The kernel keeps a segment whole until all of it is acknowledged.
        let mut send = raw.send_queue;
        let Some(acknowledged) = send.len().checked_sub(bytes as usize) else {
            return Err(Error::Inconsistent("the send queue lacks bytes"));
        };
        send.drain(..acknowledged);
        Ok(Self {
            local: raw.local,
            remote: raw.remote,
            info: raw.info,
            mss: raw.mss,
            snd_una: raw.write_seq.wrapping_sub(raw.unacked),
            snd_nxt: raw.write_seq.wrapping_sub(raw.unsent),
            rcv_nxt: raw.rcv_nxt,
            send,
            receive: raw.receive_queue,
            receive_buffer: raw.receive_buffer,
            send_buffer: raw.send_buffer,
            window: raw.window,
        })
    }

    /// The bytes that were sent and not acknowledged (a FIN counts as one). The peer may know
    /// them: a new socket has to have sent as much before it understands all acknowledgements.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.snd_nxt.wrapping_sub(self.snd_una)
    }

    /// The sequence numbers that the peer has not acknowledged, sent or not (a FIN counts as one).
    #[must_use]
    pub fn unacknowledged(&self) -> u32 {
        let bytes = u32::try_from(self.send.len()).unwrap_or(u32::MAX);
        bytes.saturating_add(u32::from(self.fin_outstanding()))
    }

    /// What the peer may still send: it was offered so much, and that can't be taken back.
    #[must_use]
    pub fn offered(&self) -> u32 {
        let end = self.window.rcv_wup.wrapping_add(self.window.rcv_wnd);
        let left = end.wrapping_sub(self.rcv_nxt);
        // Behind rcv_nxt means nothing is left.
        if left > u32::MAX / 2 { 0 } else { left }
    }

    /// Whether a FIN of ours has to be sent again.
    #[must_use]
    pub fn fin_outstanding(&self) -> bool {
        self.info.state.fin_outstanding()
    }

    /// The options to set, in the kernel's encoding. The window scale is always among them:
    /// without it the kernel keeps the scale it picked itself.
    pub(crate) fn options(&self) -> Vec<TcpOption> {
        let (theirs, ours) = self.info.scales.unwrap_or((0, 0));
        let mut options = vec![
            TcpOption {
                code: 2,
                value: self.mss,
            },
            TcpOption {
                code: 3,
                value: u32::from(theirs) | (u32::from(ours) << 16),
            },
        ];
        if self.info.sack {
            options.push(TcpOption { code: 4, value: 0 });
        }
        if self.info.timestamps {
            options.push(TcpOption { code: 8, value: 0 });
        }
        options
    }
}

/// Whether a new socket has sent all that the old one had in flight, so that no acknowledgement
/// of the peer can lie beyond what it knows.
///
/// `written` is the count of sequence numbers given to the new socket, from the old one's
/// `snd_una` on; `unsent` is what it has not sent of them.
#[must_use]
pub fn covers(in_flight: u32, written: u32, unsent: u32) -> bool {
    written.saturating_sub(unsent) >= in_flight
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn info(state: TcpState) -> TcpInfo {
        TcpInfo {
            state,
            timestamps: true,
            sack: true,
            scales: Some((7, 9)),
            rtt_us: 10_000,
            rtt_var_us: 100,
            silent_ms: 0,
            unanswered: 0,
            segments_in: 4,
        }
    }

    fn raw(state: TcpState, write_seq: u32, unacked: u32, unsent: u32, queue: usize) -> Raw {
        Raw {
            local: "192.0.2.1:40000".parse().unwrap(),
            remote: "192.0.2.2:15900".parse().unwrap(),
            info: info(state),
            mss: 1448,
            receive_buffer: 131_072,
            send_buffer: 16_384,
            window: Window::default(),
            write_seq,
            rcv_nxt: 77,
            unacked,
            unsent,
            send_queue: (0..queue).map(|i| u8::try_from(i % 251).unwrap()).collect(),
            receive_queue: Vec::new(),
        }
    }

    #[test]
    fn a_fin_takes_a_number_and_no_byte() {
        let snapshot = Snapshot::from_raw(raw(TcpState::FinWait1, 1000, 11, 0, 10)).unwrap();
        assert_eq!(
            (snapshot.snd_una, snapshot.snd_nxt, snapshot.send.len()),
            (989, 1000, 10)
        );
        assert!(snapshot.fin_outstanding());
        assert_eq!(snapshot.in_flight(), 11);
        let ended = Snapshot::from_raw(raw(TcpState::FinWait2, 1000, 0, 0, 0)).unwrap();
        assert_eq!((ended.snd_una, ended.snd_nxt), (1000, 1000));
        assert!(!ended.fin_outstanding());
    }

    #[test]
    fn acknowledged_bytes_in_front_of_the_queue_are_dropped() {
        let snapshot = Snapshot::from_raw(raw(TcpState::Established, 3, 10, 4, 25)).unwrap();
        assert_eq!(snapshot.send, (15..25).collect::<Vec<u8>>());
        // The numbers wrap.
        assert_eq!(snapshot.snd_una, 3_u32.wrapping_sub(10));
        assert_eq!(snapshot.in_flight(), 6);
    }

    #[test]
    fn what_was_offered_is_counted_from_what_came() {
        let mut raw = raw(TcpState::Established, 0, 0, 0, 0);
        raw.rcv_nxt = 5;
        raw.window.rcv_wup = u32::MAX - 4;
        raw.window.rcv_wnd = 100;
        assert_eq!(Snapshot::from_raw(raw.clone()).unwrap().offered(), 90);
        raw.window.rcv_wnd = 3;
        assert_eq!(Snapshot::from_raw(raw).unwrap().offered(), 0);
    }

    #[test]
    fn contradictions_are_errors() {
        for bad in [
            raw(TcpState::Established, 0, 10, 11, 10),
            raw(TcpState::Established, 0, 10, 0, 9),
            raw(TcpState::LastAck, 0, 0, 0, 0),
        ] {
            assert!(matches!(
                Snapshot::from_raw(bad),
                Err(Error::Inconsistent(_))
            ));
        }
        for state in [
            TcpState::Closed,
            TcpState::SynSent,
            TcpState::TimeWait,
            TcpState::Other,
        ] {
            assert!(matches!(
                Snapshot::from_raw(raw(state, 0, 0, 0, 0)),
                Err(Error::Unmovable(_))
            ));
        }
    }

    #[test]
    fn the_scale_is_set_even_if_there_is_none() {
        let mut snapshot = Snapshot::from_raw(raw(TcpState::Established, 0, 0, 0, 0)).unwrap();
        let codes = |s: &Snapshot| {
            s.options()
                .iter()
                .map(|o| (o.code, o.value))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            codes(&snapshot),
            [(2, 1448), (3, 7 | (9 << 16)), (4, 0), (8, 0)]
        );
        snapshot.info.scales = None;
        snapshot.info.sack = false;
        snapshot.info.timestamps = false;
        assert_eq!(codes(&snapshot), [(2, 1448), (3, 0)]);
    }

    proptest! {
        #[test]
        fn any_figures_give_an_answer(
            state in 0_u8..16, write_seq: u32, unacked in 0_u32..5000, unsent in 0_u32..5000,
            queue in 0_usize..6000,
        ) {
            let raw = raw(TcpState::from_number(state), write_seq, unacked, unsent, queue);
            if let Ok(s) = Snapshot::from_raw(raw) {
                prop_assert_eq!(
                    s.send.len() as u32 + u32::from(s.fin_outstanding()), unacked
                );
                prop_assert_eq!(s.snd_una.wrapping_add(unacked), write_seq);
                prop_assert_eq!(s.in_flight(), unacked - unsent);
            }
        }

        #[test]
        fn tcp_info_of_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(TcpInfo::parse(&bytes).is_ok(), bytes.len() >= 144);
        }
    }
}
