//! How a connection shares its link with others: the kernel's congestion control, which differs most
//! where packets are lost.
//!
//! ```text
//!   ssh -- /proc/PID/fd --> its sockets -- pidfd_getfd(2) --> the one of TCP -- TCP_CONGESTION
//! ```
//!
//! ssh opens the connection, and has no option for this. So its socket is asked for from outside, and
//! told. It says how this end sends, and most of a move is sent from here.
//!
//! Where nobody chose one, a connection goes by the host's own. Most of them take each lost packet for
//! a full link. So once packets are seen to be lost all the time it goes by [`BBR`], if the host has
//! it: Cardwell et al., "BBR: Congestion-Based Congestion Control" (2016).

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::sockopt::{set_tcp_congestion, socket_protocol, tcp_congestion};
use rustix::net::{SocketAddrAny, getpeername, getsockname, ipproto};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::direct::Ends;
use super::loss::Segments;
use crate::error::{Error, IoContext, Result};

/// What fills a link that loses packets.
pub(crate) const BBR: &str = "bbr";

/// Which congestion control the TCP connection of a process goes by; from now on by `wanted`, if that
/// is given. None where it has no such connection, or nothing is asked for and it can't be looked at.
///
/// # Errors
/// Where one is wanted: [`Error::Refused`] if the kernel has none of that name, or the process no
/// connection; [`Error::Io`] where it can't be set.
pub(super) fn of_process(id: u32, wanted: Option<&str>) -> Result<Option<String>> {
    let found = sockets(id).and_then(|sockets| follow(&sockets, wanted));
    let Some(name) = wanted else {
        return Ok(found.unwrap_or_else(|error| {
            log::debug!("ssh's connection can't be looked at: {error}");
            None
        }));
    };
    match found {
        Ok(Some(used)) => Ok(Some(used)),
        Ok(None) => Err(Error::Refused(format!(
            "Congestion control {name} can't be set: this ssh has no TCP connection of its own"
        ))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Refused(format!(
            "This host has no congestion control {name:?}"
        ))),
        Err(error) => Err(error).context(|| format!("Can't set congestion control {name}")),
    }
}

/// Lets a TCP connection go by [`BBR`]. Whether it went by another one.
///
/// # Errors
/// What the kernel answered; [`io::ErrorKind::NotFound`] where it has none of that name.
pub(super) fn follow_bbr(socket: impl AsFd) -> io::Result<bool> {
    if tcp_congestion(&socket)? == BBR {
        return Ok(false);
    }
    set_tcp_congestion(&socket, BBR)?;
    Ok(true)
}

/// From where to where a TCP connection leads; none where these are no addresses of IP.
///
/// # Errors
/// What the kernel answered.
pub(super) fn ends(socket: impl AsFd) -> io::Result<Option<Ends>> {
    let address = |end: SocketAddrAny| SocketAddr::try_from(end).ok().map(|end| end.ip());
    let from = address(getsockname(&socket)?);
    let to = getpeername(&socket)?.and_then(address);
    Ok(from.zip(to).map(|(from, to)| Ends { from, to }))
}

/// The TCP connection of a process; none where it has none. One that forwards something else is none
/// of ours, and sends less. It is to be found anew each time: a socket that is kept here would outlive
/// the process.
///
/// # Errors
/// What the kernel answered.
pub(super) fn connection_of(id: u32) -> io::Result<Option<OwnedFd>> {
    let mut most: Option<(Segments, OwnedFd)> = None;
    for socket in sockets(id)? {
        let segments = Segments::of(&socket)?;
        if most
            .as_ref()
            .is_none_or(|(most, _)| most.sent <= segments.sent)
        {
            most = Some((segments, socket));
        }
    }
    Ok(most.map(|(_, socket)| socket))
}

/// The process's TCP sockets, shared with it.
fn sockets(id: u32) -> io::Result<Vec<OwnedFd>> {
    let process = i32::try_from(id)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(Errno::SRCH)?;
    let process = pidfd_open(process, PidfdFlags::empty())?;
    let mut sockets = Vec::new();
    for entry in fs::read_dir(format!("/proc/{id}/fd"))? {
        let entry = entry?;
        // It may have closed one since.
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let (true, Some(number)) = (target.to_string_lossy().starts_with("socket:"), number) else {
            continue;
        };
        let socket = match pidfd_getfd(&process, number, PidfdGetfdFlags::empty()) {
            Err(Errno::BADF) => continue,
            other => other?,
        };
        if socket_protocol(&socket)? == Some(ipproto::TCP) {
            sockets.push(socket);
        }
    }
    Ok(sockets)
}

/// Sets what is wanted; what the last of them goes by.
fn follow(sockets: &[OwnedFd], wanted: Option<&str>) -> io::Result<Option<String>> {
    let mut used = None;
    for socket in sockets {
        if let Some(name) = wanted {
            set_tcp_congestion(socket, name)?;
        }
        used = Some(tcp_congestion(socket)?);
    }
    Ok(used)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::process::{Child, Command, Stdio};

    struct Asleep(Child);

    impl Asleep {
        fn with(stdin: Stdio) -> Asleep {
            let child = Command::new("sleep").arg("60").stdin(stdin).spawn();
            Asleep(child.unwrap())
        }
    }

    impl Drop for Asleep {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn the_connection_of_another_process_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let before = tcp_congestion(&ours).unwrap();
        let child = Asleep::with(OwnedFd::from(ours.try_clone().unwrap()).into());
        let id = child.0.id();
        assert_eq!(of_process(id, None).unwrap(), Some(before));
        // The kernel always has this one.
        assert_eq!(
            of_process(id, Some("reno")).unwrap().as_deref(),
            Some("reno")
        );
        assert_eq!(tcp_congestion(&ours).unwrap(), "reno");
        let unknown = of_process(id, Some("swift")).unwrap_err().to_string();
        assert!(
            unknown.contains("no congestion control \"swift\""),
            "{unknown}"
        );
        assert_eq!(of_process(id, None).unwrap().as_deref(), Some("reno"));
    }

    #[test]
    fn one_without_a_connection_can_not_be_told() {
        let child = Asleep::with(Stdio::null());
        assert_eq!(of_process(child.0.id(), None).unwrap(), None);
        let refused = of_process(child.0.id(), Some("reno")).unwrap_err();
        assert!(
            refused.to_string().contains("no TCP connection"),
            "{refused}"
        );
        drop(child);
        // Nobody has this number.
        assert_eq!(of_process(u32::MAX, None).unwrap(), None);
        assert!(of_process(u32::MAX, Some("reno")).is_err());
    }
}
