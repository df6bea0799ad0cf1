//! The system calls that no crate offers: TCP_REPAIR and its kin.
//!
//! Every `unsafe` block of the proxy is here. The functions are as thin as can be: they give
//! and take plain numbers, and decide nothing.
//!
//! Specification: linux/tcp.h, and tcp_repair in net/ipv4/tcp.c.
#![allow(unsafe_code)]

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_uint, c_ulong, c_void, socklen_t};

/// SO_BUF_LOCK, which libc lacks for this target: which buffers are not sized by the kernel.
const SO_BUF_LOCK: c_int = 72;
/// The bytes of the send queue that were never sent.
const SIOCOUTQNSD: c_ulong = 0x894B;
/// Whether the next byte to be read is an urgent one.
const SIOCATMARK: c_ulong = 0x8905;

/// Which queue the next call on a socket in repair mode means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Queue {
    /// Neither.
    None = 0,
    /// What came from the peer.
    Receive = 1,
    /// What goes to the peer.
    Send = 2,
}

/// How repair mode is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repair {
    /// Repair mode. Closing such a socket tells the peer nothing.
    On = 1,
    /// Ordinary again; the kernel sends a window probe.
    OffWithProbe = 0,
    /// Ordinary again, and nothing is sent.
    Off = -1,
}

/// The window part of a TCP connection: `struct tcp_repair_window`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Window {
    /// The sequence number of the segment that last updated the send window.
    pub snd_wl1: u32,
    /// How much the peer takes, in bytes.
    pub snd_wnd: u32,
    /// The largest window the peer has offered.
    pub max_window: u32,
    /// The window offered to the peer.
    pub rcv_wnd: u32,
    /// `rcv_nxt` when that window was offered.
    pub rcv_wup: u32,
}

/// One TCP option in effect: `struct tcp_repair_opt`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TcpOption {
    /// The option's kind, as on the wire.
    pub code: u32,
    /// Its value: the MSS, or both window scales, or 0.
    pub value: u32,
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn set<T: Copy>(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: &[T]) -> io::Result<()> {
    let length = socklen_t::try_from(size_of_val(value)).map_err(io::Error::other)?;
    // SAFETY: `value` is valid for reads of `length` bytes, and the kernel only reads it.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast::<c_void>(),
            length,
        )
    };
    check(result).map(drop)
}

/// Reads an option into `value`. Only instantiated with types for which any bytes are valid.
fn get<T: Copy>(fd: BorrowedFd<'_>, name: c_int, value: &mut T) -> io::Result<usize> {
    let mut length = socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: `value` is valid for writes of `length` bytes; the kernel writes no more than that,
    // and every T used here (integers, byte arrays, `Window`) has no invalid bit patterns.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            name,
            std::ptr::from_mut(value).cast::<c_void>(),
            &raw mut length,
        )
    };
    check(result)?;
    Ok(length as usize)
}

fn ioctl_int(fd: BorrowedFd<'_>, request: c_ulong) -> io::Result<u32> {
    let mut value = MaybeUninit::<c_int>::zeroed();
    // SAFETY: the four requests used here write one int to the pointer they are given.
    let value = unsafe {
        check(libc::ioctl(fd.as_raw_fd(), request, value.as_mut_ptr()))?;
        value.assume_init()
    };
    u32::try_from(value).map_err(io::Error::other)
}

/// Takes over a descriptor that the program before left open for this one at an exec. It is not
/// left open for the next.
pub(crate) fn adopt(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl takes any number, and refuses one that is not open.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open. The program before wrote each number down once, and left it open for
    // nobody but who reads it there; nothing else in this process knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Ignores SIGPIPE, as this process did from its start: an exec that fails leaves it at its default,
/// and a splice into a broken connection would end the process.
pub(crate) fn ignore_broken_pipes() -> io::Result<()> {
    // SAFETY: no handler is installed that could do anything.
    let before = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    if before == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Switches repair mode. Needs CAP_NET_ADMIN.
pub(crate) fn set_repair(fd: BorrowedFd<'_>, mode: Repair) -> io::Result<()> {
    set(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR, &[mode as c_int])
}

/// Undoes a connection: the socket has no peer any more, as after a close. One in repair mode does
/// so silently.
pub(crate) fn disconnect(fd: BorrowedFd<'_>) -> io::Result<()> {
    let nobody = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        sa_data: [0; 14],
    };
    let length = socklen_t::try_from(size_of_val(&nobody)).map_err(io::Error::other)?;
    // SAFETY: `nobody` is valid for reads of `length` bytes, and the kernel only reads it.
    let result = unsafe { libc::connect(fd.as_raw_fd(), &raw const nobody, length) };
    check(result).map(drop)
}

/// Chooses the queue that [`queue_seq`], [`set_queue_seq`] and a peek mean.
pub(crate) fn set_repair_queue(fd: BorrowedFd<'_>, queue: Queue) -> io::Result<()> {
    set(
        fd,
        libc::IPPROTO_TCP,
        libc::TCP_REPAIR_QUEUE,
        &[queue as c_int],
    )
}

/// The sequence number after the chosen queue's last byte.
pub(crate) fn queue_seq(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut value: c_uint = 0;
    get(fd, libc::TCP_QUEUE_SEQ, &mut value)?;
    Ok(value)
}

/// Sets the sequence number at which the chosen queue starts. Only before connect.
pub(crate) fn set_queue_seq(fd: BorrowedFd<'_>, seq: u32) -> io::Result<()> {
    set(fd, libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ, &[seq])
}

/// The clock that the connection's timestamps show.
pub(crate) fn timestamp(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut value: c_uint = 0;
    get(fd, libc::TCP_TIMESTAMP, &mut value)?;
    Ok(value)
}

/// Sets that clock.
pub(crate) fn set_timestamp(fd: BorrowedFd<'_>, value: u32) -> io::Result<()> {
    set(fd, libc::IPPROTO_TCP, libc::TCP_TIMESTAMP, &[value])
}

/// The MSS: in repair mode the one agreed on with the peer.
pub(crate) fn max_segment(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut value: c_uint = 0;
    get(fd, libc::TCP_MAXSEG, &mut value)?;
    Ok(value)
}

/// Both windows.
pub(crate) fn window(fd: BorrowedFd<'_>) -> io::Result<Window> {
    let mut value = Window::default();
    if get(fd, libc::TCP_REPAIR_WINDOW, &mut value)? < size_of::<Window>() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(value)
}

/// Sets both windows.
pub(crate) fn set_window(fd: BorrowedFd<'_>, window: Window) -> io::Result<()> {
    set(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR_WINDOW, &[window])
}

/// Sets the options that the handshake would have agreed on.
pub(crate) fn set_options(fd: BorrowedFd<'_>, options: &[TcpOption]) -> io::Result<()> {
    set(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR_OPTIONS, options)
}

/// The bytes of `struct tcp_info`, as many as this kernel gives (at most 256).
pub(crate) fn tcp_info(fd: BorrowedFd<'_>) -> io::Result<([u8; 256], usize)> {
    let mut bytes = [0_u8; 256];
    let length = get(fd, libc::TCP_INFO, &mut bytes)?;
    Ok((bytes, length))
}

/// Gives the sizing of both buffers back to the kernel after they were forced.
pub(crate) fn unlock_buffers(fd: BorrowedFd<'_>) -> io::Result<()> {
    set(fd, libc::SOL_SOCKET, SO_BUF_LOCK, &[0_u32])
}

/// The bytes received and not read yet, up to an urgent one.
pub(crate) fn unread(fd: BorrowedFd<'_>) -> io::Result<u32> {
    ioctl_int(fd, libc::FIONREAD)
}

/// Whether an urgent byte is next: what is behind it does not count as [`unread`].
pub(crate) fn at_mark(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(ioctl_int(fd, SIOCATMARK)? != 0)
}

/// The bytes not acknowledged yet, sent or not; a FIN counts as one.
pub(crate) fn unacknowledged(fd: BorrowedFd<'_>) -> io::Result<u32> {
    ioctl_int(fd, libc::TIOCOUTQ)
}

/// The bytes never sent; a FIN counts as one.
pub(crate) fn unsent(fd: BorrowedFd<'_>) -> io::Result<u32> {
    ioctl_int(fd, SIOCOUTQNSD)
}
