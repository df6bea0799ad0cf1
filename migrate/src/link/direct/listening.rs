//! The destination's end of direct connections.
//!
//! It listens while a move expects connections, at the address by which ssh has come, and takes those
//! from where ssh has come that show the source's key. What comes from elsewhere is closed at once.

use std::fmt;
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use serde::Deserialize;
use socket2::SockRef;

use super::identity::Server;
use super::{ANSWERING, Ends, Identity, MAX_WINDOW, MIN_WINDOW, shake_hands, stream};
use crate::error::{IoContext, Result};
use crate::link::{Link, MAX_CONNECTIONS};
use crate::wire::{DirectDoor, DirectOffer};

/// How long to wait where the kernel has no room for a connection.
const PAUSE: Duration = Duration::from_millis(100);

/// Whether this site takes direct connections, and where.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DirectPolicy {
    /// Whether it does.
    pub accept: bool,
    /// The ports to listen at. Not given: any that is free.
    pub ports: Option<Ports>,
}

impl Default for DirectPolicy {
    fn default() -> Self {
        DirectPolicy {
            accept: true,
            ports: None,
        }
    }
}

/// A range of ports: the first and the last one.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "(u16, u16)")]
pub struct Ports(RangeInclusive<u16>);

/// Ports that are no range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Expected the first port and the last one, from 1 on")]
pub struct NoPorts;

impl TryFrom<(u16, u16)> for Ports {
    type Error = NoPorts;

    fn try_from((first, last): (u16, u16)) -> std::result::Result<Self, NoPorts> {
        match first > 0 && first <= last {
            true => Ok(Ports(first..=last)),
            false => Err(NoPorts),
        }
    }
}

/// Where direct connections come in, until it is dropped.
pub(crate) struct Listener {
    socket: Arc<TcpListener>,
    closed: Arc<AtomicBool>,
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.socket, f)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        close(&self.socket, &self.closed);
    }
}

/// Listens for the connections that are offered, which come from and to these addresses. They are
/// handed to `come`.
///
/// # Errors
/// Where none of the ports can be had.
pub(crate) fn listen(
    policy: &DirectPolicy,
    ends: Ends,
    offered: &DirectOffer,
    come: Sender<Link>,
) -> Result<(Listener, DirectDoor)> {
    let identity = Identity::new()?;
    let server = identity.server(offered.key)?;
    let failed = || format!("Can't listen for connections at {}", ends.to);
    let socket = bind(policy.ports.as_ref(), ends.to).context(failed)?;
    // Connections are given what this one has. Who is not root has what the kernel gives by itself.
    let window = offered.window.clamp(MIN_WINDOW, MAX_WINDOW);
    if let Err(error) = set_socket_recv_buffer_size_force(&socket, window as usize) {
        log::info!("Direct connections have the kernel's own buffers: {error}");
    }
    let port = socket.local_addr().context(failed)?.port();
    let listener = Listener {
        socket: Arc::new(socket),
        closed: Arc::default(),
    };
    let accepting = Accepting {
        socket: Arc::clone(&listener.socket),
        closed: Arc::clone(&listener.closed),
        server,
        come,
        from: ends.from,
        most: MAX_CONNECTIONS.min(offered.connections as usize),
        taken: AtomicUsize::new(0),
        greeted: AtomicUsize::new(0),
    };
    thread::Builder::new()
        .name("listener".into())
        .spawn(move || accept(&Arc::new(accepting)))
        .context(failed)?;
    let key = identity.public();
    Ok((listener, DirectDoor { port, key }))
}

/// The first of the ports that can be had.
fn bind(ports: Option<&Ports>, address: IpAddr) -> io::Result<TcpListener> {
    let ports = ports.map_or(0..=0, |ports| ports.0.clone());
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for port in ports {
        match TcpListener::bind(SocketAddr::new(address, port)) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// What the thread that accepts shares with those that greet.
struct Accepting {
    socket: Arc<TcpListener>,
    closed: Arc<AtomicBool>,
    server: Server,
    come: Sender<Link>,
    from: IpAddr,
    /// So many come at the most.
    most: usize,
    /// How many have come.
    taken: AtomicUsize,
    /// How many are being greeted.
    greeted: AtomicUsize,
}

fn accept(shared: &Arc<Accepting>) {
    loop {
        let accepted = shared.socket.accept();
        if shared.closed.load(Ordering::Acquire) {
            return;
        }
        let stream = match accepted {
            Ok((stream, peer)) if peer.ip() == shared.from => stream,
            Ok((_, peer)) => {
                log::info!("A connection from {peer} is none of the source's");
                continue;
            }
            Err(error) => {
                log::warn!("A connection did not come in: {error}");
                thread::sleep(PAUSE);
                continue;
            }
        };
        // Others may come from there. Where they keep the source out, it goes by ssh.
        if shared.greeted.fetch_add(1, Ordering::AcqRel) >= MAX_CONNECTIONS {
            shared.greeted.fetch_sub(1, Ordering::AcqRel);
            continue;
        }
        let greeting = Arc::clone(shared);
        let started = thread::Builder::new().spawn(move || greeting.greet(stream));
        if let Err(error) = started {
            shared.greeted.fetch_sub(1, Ordering::AcqRel);
            log::warn!("A connection can't be greeted: {error}");
            thread::sleep(PAUSE);
        }
    }
}

impl Accepting {
    fn greet(&self, stream: TcpStream) {
        let greeted = greet(&self.server, stream);
        self.greeted.fetch_sub(1, Ordering::AcqRel);
        match greeted {
            Ok(link) => {
                // One that nobody takes any more is closed.
                let _ = self.come.try_send(link);
                if self.taken.fetch_add(1, Ordering::AcqRel) + 1 == self.most {
                    close(&self.socket, &self.closed);
                }
            }
            Err(error) => log::info!("A direct connection did not come in: {error}"),
        }
    }
}

/// From now on nobody listens.
fn close(socket: &TcpListener, closed: &AtomicBool) {
    closed.store(true, Ordering::Release);
    // Wakes the thread that accepts. One that is closed already can't be, and need not be.
    let _ = SockRef::from(socket).shutdown(Shutdown::Both);
}

fn greet(server: &Server, stream: TcpStream) -> io::Result<Link> {
    stream.set_nodelay(true)?;
    let tls = server.connection().map_err(io::Error::other)?;
    let mut tls = tls.into();
    shake_hands(&mut tls, &stream, Instant::now() + ANSWERING)?;
    stream::link(tls, stream)
}
