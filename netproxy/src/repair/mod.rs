//! Taking a live connection out of one socket and putting it into another.
//!
//! ```text
//!  old socket ── freeze ── drain ── dump ────────────────────┬── close_silently
//!                                     │                      │      (moved)
//!                            ┌────────┘                      └── thaw (cancelled)
//!                            ▼
//!  new socket             restore ── kick ── write ── covers? ── goes on
//!                        (sends nothing)                │no
//!                                                  mark_as_sent
//! ```
//!
//! Frozen: a classic BPF filter drops every segment before TCP sees it, so that nothing is
//! acknowledged or answered any more. It belongs to the socket, and goes with it.
//!
//! Restored: same local address, same sequence numbers, options and windows, but another remote
//! address. What the peer has not acknowledged is not put back into the send queue. It is
//! written again as new data once the peer can be reached: data in a restored queue counts as
//! sent, and would wait for a retransmission timeout.
//!
//! See TCP_REPAIR in linux/tcp.h and tcp(7).

pub mod state;

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{MsgFlags, recv};
use socket2::{Domain, Protocol, SockAddr, SockFilter, SockRef, Socket, Type};

use crate::error::{Error, Result};
use crate::sys::{self, Queue, Repair};
use state::{Raw, Snapshot, TcpInfo};

/// The kernel shows the segment that holds `snd_una` whole: at most this much more than what is
/// not acknowledged.
const SLACK: usize = 256 * 1024;

/// How a new socket is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestoreOptions {
    /// Where the peer is now.
    pub remote: SocketAddr,
    /// The mark (SO_MARK) by which routing gives a large initial congestion window.
    pub mark: Option<u32>,
    /// Bytes of the peer that waited for the client outside the socket before, and those that were
    /// only looked at. The new receive buffer is so much smaller, as after [`drain`].
    pub waiting: usize,
}

fn step(step: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Repair { step, source }
}

/// Reads `TCP_INFO`.
///
/// # Errors
/// When the kernel refuses, or gives too little.
pub fn tcp_info(socket: &impl AsFd) -> Result<TcpInfo> {
    let (bytes, length) = sys::tcp_info(socket.as_fd()).map_err(step("look at"))?;
    TcpInfo::parse(bytes.get(..length).unwrap_or(&bytes))
}

/// Says whether this process may use TCP_REPAIR, by trying it on a socket of its own.
///
/// # Errors
/// What the kernel answered: EPERM without CAP_NET_ADMIN.
pub fn probe_permission() -> Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))
        .map_err(crate::error::system("Opening a socket"))?;
    sys::set_repair(socket.as_fd(), Repair::On).map_err(step("switch on repair mode of"))
}

/// Makes a socket deaf: from now on it drops all that the peer sends.
///
/// # Errors
/// When the kernel refuses the filter.
pub fn freeze(socket: &impl AsFd) -> Result<()> {
    const RETURN: u16 = 0x06;
    SockRef::from(socket)
        .attach_filter(&[SockFilter::new(RETURN, 0, 0, 0)])
        .map_err(step("freeze"))
}

/// Undoes [`freeze`] and repair mode. The kernel sends a probe, which tells at once what the
/// peer has.
///
/// # Errors
/// When the kernel refuses.
pub fn thaw(socket: &impl AsFd) -> Result<()> {
    match SockRef::from(socket).detach_filter() {
        Ok(()) => {}
        // There was none.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        Err(error) => return Err(step("thaw")(error)),
    }
    kick(socket)
}

/// Sends a window probe: the peer answers with what it has and takes.
///
/// # Errors
/// When the kernel refuses, as it does without CAP_NET_ADMIN.
pub fn kick(socket: &impl AsFd) -> Result<()> {
    let fd = socket.as_fd();
    sys::set_repair(fd, Repair::On).map_err(step("probe"))?;
    sys::set_repair(fd, Repair::OffWithProbe).map_err(step("probe"))
}

fn address(address: io::Result<SockAddr>) -> Result<SocketAddr> {
    address
        .map_err(step("look at"))?
        .as_socket()
        .ok_or(Error::Inconsistent("its address is none of IPv4 or IPv6"))
}

thread_local! {
    /// Room for what is looked at: to make it anew for each connection takes longer than all the rest.
    static LOOKED_AT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The room that is kept from one connection to the next, in bytes.
const KEPT: usize = 2 * SLACK;

fn peek(fd: &impl AsFd, length: usize) -> Result<Vec<u8>> {
    if length == 0 {
        return Ok(Vec::new());
    }
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    LOOKED_AT.with_borrow_mut(|buffer| {
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        let room = buffer.get_mut(..length).unwrap_or_default();
        let seen = match recv(fd.as_fd().as_raw_fd(), room, flags) {
            Ok(length) => room.get(..length).unwrap_or_default().to_vec(),
            Err(nix::Error::EAGAIN) => Vec::new(),
            Err(error) => return Err(step("read the queues of")(error.into())),
        };
        if buffer.len() > KEPT {
            *buffer = Vec::new();
        }
        Ok(seen)
    })
}

/// The bytes that the peer has sent and nobody has read, up to an urgent one.
///
/// # Errors
/// What the kernel answered.
pub fn unread(socket: &impl AsFd) -> Result<usize> {
    let unread = sys::unread(socket.as_fd()).map_err(step("read the queues of"))?;
    Ok(unread as usize)
}

/// Takes what the peer of a frozen connection has sent and nobody has read. It is offered nothing
/// for it, and the receive buffer is so much smaller afterwards: else one whose client does not
/// read could send another window with every move, or with every one that is cancelled.
///
/// [`dump`] would only look at it, which is no way for much: the kernel walks the queue from its
/// head for each segment then. A hundred megabytes take a minute, in which that processor does
/// nothing else. Nor would it see what is behind an urgent byte, which has no place in the stream.
///
/// # Errors
/// What the kernel answered before anything was taken.
pub fn drain(socket: &impl AsFd) -> Result<Vec<u8>> {
    use nix::sys::socket::{setsockopt, sockopt};
    let fd = socket.as_fd();
    // Reading from an urgent byte on gives what is behind that.
    let next = || match unread(socket)? {
        0 if sys::at_mark(fd).map_err(step("read the queues of"))? => Ok(SLACK),
        unread => Ok(unread),
    };
    let mut bytes = vec![0; next()?];
    if bytes.is_empty() {
        return Ok(bytes);
    }
    let queues = || step("read the queues of");
    let size = SockRef::from(socket).recv_buffer_size().map_err(queues())?;
    // Without a buffer there is no room to offer.
    setsockopt(&fd, sockopt::RcvBufForce, &0).map_err(|error| queues()(error.into()))?;
    let mut length = 0;
    while let Some(rest) = bytes.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match recv(fd.as_raw_fd(), rest, MsgFlags::MSG_DONTWAIT) {
            Ok(more @ 1..) => {
                length += more;
                bytes.resize(length + next().unwrap_or(0), 0);
            }
            Err(nix::Error::EINTR) => {}
            // An end, or an error: whoever looks at it next learns that.
            Ok(0) | Err(_) => break,
        }
    }
    bytes.truncate(length);
    let _ = setsockopt(
        &fd,
        sockopt::RcvBufForce,
        &(size / 2).saturating_sub(length),
    );
    let _ = sys::unlock_buffers(fd);
    Ok(bytes)
}

/// Takes the state of a frozen connection. The socket stays in repair mode: closing it tells the
/// peer nothing, and [`thaw`] gives it back as it was.
///
/// # Errors
/// [`Error::Unmovable`] when it is closed or not open yet; else what the kernel answered. The
/// socket has then left repair mode.
pub fn dump(socket: &impl AsFd) -> Result<Snapshot> {
    sys::set_repair(socket.as_fd(), Repair::On).map_err(step("switch on repair mode of"))?;
    let result = dump_in_repair(socket);
    if result.is_err() {
        let _ = sys::set_repair(socket.as_fd(), Repair::Off);
    }
    result
}

fn dump_in_repair(socket: &impl AsFd) -> Result<Snapshot> {
    let fd = socket.as_fd();
    let read = || step("read the state of");
    let reference = SockRef::from(socket);
    // A segment that passed the filter just before it was attached can still arrive: take what
    // was read only if nothing moved meanwhile.
    for _ in 0..16 {
        let info = tcp_info(socket)?;
        if !info.state.is_movable() {
            break;
        }
        sys::set_repair_queue(fd, Queue::Receive).map_err(read())?;
        let rcv_nxt = sys::queue_seq(fd).map_err(read())?;
        let unread = sys::unread(fd).map_err(read())?;
        let receive_queue = peek(socket, unread as usize)?;
        if receive_queue.len() != unread as usize {
            continue;
        }
        sys::set_repair_queue(fd, Queue::Send).map_err(read())?;
        let write_seq = sys::queue_seq(fd).map_err(read())?;
        let unacked = sys::unacknowledged(fd).map_err(read())?;
        let unsent = sys::unsent(fd).map_err(read())?;
        let send_queue = if unacked == 0 {
            Vec::new()
        } else {
            peek(socket, unacked as usize + SLACK)?
        };
        let raw = Raw {
            local: address(reference.local_addr())?,
            remote: address(reference.peer_addr())?,
            info,
            mss: sys::max_segment(fd).map_err(read())?,
            receive_buffer: reference.recv_buffer_size().map_err(read())?,
            send_buffer: reference.send_buffer_size().map_err(read())?,
            window: sys::window(fd).map_err(read())?,
            write_seq,
            rcv_nxt,
            unacked,
            unsent,
            send_queue,
            receive_queue,
        };
        // Only now: the peeks above chose the queue.
        let same_send = sys::unacknowledged(fd).map_err(read())? == unacked;
        sys::set_repair_queue(fd, Queue::Receive).map_err(read())?;
        let same_receive = sys::queue_seq(fd).map_err(read())? == rcv_nxt;
        sys::set_repair_queue(fd, Queue::None).map_err(read())?;
        if same_send && same_receive && tcp_info(socket)?.state == info.state {
            return Snapshot::from_raw(raw);
        }
    }
    match tcp_info(socket)?.state {
        state if state.is_movable() => Err(Error::Inconsistent("it does not come to rest")),
        state::TcpState::Closed => Err(Error::Unmovable("it is closed")),
        state::TcpState::TimeWait => Err(Error::Unmovable("both ends have ended")),
        _ => Err(Error::Unmovable("it is not open")),
    }
}

/// Makes a socket that continues the connection towards `options.remote`. Nothing is sent, not
/// even a probe. `clock` is the old socket's [`clock`], read as late as possible, so that the
/// timestamps never go back.
///
/// # Errors
/// What the kernel answered.
pub fn restore(snapshot: &Snapshot, options: RestoreOptions, clock: u32) -> Result<Socket> {
    let make = || step("restore");
    let domain = Domain::for_address(options.remote);
    let socket =
        Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP)).map_err(make())?;
    let fd = socket.as_fd();
    // From here on closing it is silent, also when a step fails.
    sys::set_repair(fd, Repair::On).map_err(make())?;
    if let Some(mark) = options.mark {
        socket.set_mark(mark).map_err(make())?;
    }
    socket.bind(&snapshot.local.into()).map_err(make())?;
    // Before connect: the first flight's segments are cut to this.
    if snapshot.mss > 0 {
        let _ = socket.set_tcp_mss(snapshot.mss);
    }
    force_buffers(&socket, snapshot, options.waiting)?;
    sys::set_repair_queue(fd, Queue::Send).map_err(make())?;
    sys::set_queue_seq(fd, snapshot.snd_una).map_err(make())?;
    sys::set_repair_queue(fd, Queue::Receive).map_err(make())?;
    sys::set_queue_seq(fd, snapshot.rcv_nxt).map_err(make())?;
    socket.connect(&options.remote.into()).map_err(make())?;
    sys::set_options(fd, &snapshot.options()).map_err(make())?;
    if snapshot.info.timestamps {
        sys::set_timestamp(fd, clock).map_err(make())?;
    }
    sys::set_window(fd, snapshot.window).map_err(make())?;
    sys::set_repair_queue(fd, Queue::None).map_err(make())?;
    sys::set_repair(fd, Repair::Off).map_err(make())?;
    let _ = sys::unlock_buffers(fd);
    Ok(socket)
}

/// The clock that a connection's timestamps show.
///
/// # Errors
/// What the kernel answered.
pub fn clock(socket: &impl AsFd) -> Result<u32> {
    sys::timestamp(socket.as_fd()).map_err(step("read the state of"))
}

/// Makes room for the bytes that will be written at once, and for all that the peer may still
/// send into the window it was offered: that had room in the old receive buffer. A larger one would
/// be filled as well, and the next one be larger again. The kernel doubles the figures for its own
/// accounting.
fn force_buffers(socket: &Socket, snapshot: &Snapshot, waiting: usize) -> Result<()> {
    use nix::sys::socket::{setsockopt, sockopt};
    let restore = |error: nix::Error| step("restore")(error.into());
    let before = snapshot.receive_buffer / 2;
    let receive = before
        .saturating_sub(waiting)
        .max(before.min(snapshot.offered() as usize))
        .max(4096);
    setsockopt(socket, sockopt::RcvBufForce, &receive).map_err(restore)?;
    let mut send = snapshot.send_buffer / 2;
    if !snapshot.send.is_empty() {
        send = send.max(snapshot.send.len().saturating_add(64 * 1024));
    }
    setsockopt(socket, sockopt::SndBufForce, &send).map_err(restore)
}

/// Gives a new socket the send buffer of the old one, after all that was pending is written.
///
/// # Errors
/// What the kernel answered.
pub fn relax(socket: &impl AsFd, snapshot_buffer: usize) -> Result<()> {
    use nix::sys::socket::{setsockopt, sockopt};
    let fd = socket.as_fd();
    let size = snapshot_buffer / 2;
    setsockopt(&fd, sockopt::SndBufForce, &size).map_err(|error| step("set up")(error.into()))?;
    sys::unlock_buffers(fd).map_err(step("set up"))
}

/// What a socket has not sent yet; a FIN counts as one.
///
/// # Errors
/// What the kernel answered.
pub fn unsent(socket: &impl AsFd) -> Result<u32> {
    sys::unsent(socket.as_fd()).map_err(step("look at"))
}

/// What the peer has not acknowledged yet; a FIN counts as one.
///
/// # Errors
/// What the kernel answered.
pub fn unacknowledged(socket: &impl AsFd) -> Result<u32> {
    sys::unacknowledged(socket.as_fd()).map_err(step("look at"))
}

/// Makes the kernel take everything in the send queue as sent. For a new socket whose first
/// flight does not reach what the old one had sent: the peer may acknowledge more than this
/// socket knows, and the kernel would drop such segments for ever. What the peer lacks is then
/// sent again by the ordinary retransmission, later, but surely.
///
/// # Errors
/// What the kernel answered.
pub fn mark_as_sent(socket: &impl AsFd) -> Result<()> {
    let fd = socket.as_fd();
    let mark = || step("restore the queue of");
    sys::set_repair(fd, Repair::On).map_err(mark())?;
    sys::set_repair_queue(fd, Queue::Send).map_err(mark())?;
    // Any push of the queue does: in repair mode the kernel moves it along without a packet.
    let pushed = SockRef::from(socket).set_tcp_nodelay(true);
    sys::set_repair_queue(fd, Queue::None).map_err(mark())?;
    sys::set_repair(fd, Repair::OffWithProbe).map_err(mark())?;
    pushed.map_err(mark())
}

/// Prepares a socket for an end that the peer does not see: no FIN, no reset. Drop it after.
///
/// # Errors
/// What the kernel answered; closing it would then be seen.
pub fn silence(socket: &impl AsFd) -> Result<()> {
    sys::set_repair(socket.as_fd(), Repair::On).map_err(step("silence"))
}

/// Gives up the addresses of a [silenced](silence) or [dumped](dump) socket, for another one to
/// have. To close it is not enough: a program that is just being started, for another guest's
/// move, has copies of all descriptors for a moment.
///
/// # Errors
/// What the kernel answered.
pub fn vacate(socket: &impl AsFd) -> Result<()> {
    sys::disconnect(socket.as_fd()).map_err(step("give up"))
}

/// Makes a socket ordinary again, and sends nothing. A frozen one stays frozen.
///
/// # Errors
/// What the kernel answered.
pub fn resume(socket: &impl AsFd) -> Result<()> {
    sys::set_repair(socket.as_fd(), Repair::Off).map_err(step("resume"))
}
