//! The source's end of direct connections.

use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{set_socket_send_buffer_size_force, set_tcp_congestion, tcp_congestion};
use socket2::{Domain, SockRef, Socket, Type};

use super::identity::Client;
use super::{ANSWERING, Identity, MAX_WINDOW, MIN_WINDOW, shake_hands, stream};
use crate::error::{Error, IoContext, Result};
use crate::link::loss::Losses;
use crate::link::{Link, congestion};
use crate::wire::DirectDoor;

/// What may wait in the kernel before it is on its way, in bytes: enough that it never runs dry, and
/// no more, so that what is written is soon sent, and a link that is full soon shows.
const UNSENT: u32 = 128 << 10;

/// A direct connection, to be looked after while a link uses it. It ends with this.
#[derive(Debug)]
pub struct Direct {
    stream: TcpStream,
    losses: Losses,
}

/// Between which addresses direct connections go, as ssh's own connection shows them to this host.
#[derive(Debug, Clone, Copy)]
pub struct Ends {
    /// The source's.
    pub from: IpAddr,
    /// The destination's.
    pub to: IpAddr,
}

/// Opens `count` connections to the `door` of the other host, with so many bytes on their way at the
/// most, by that congestion control; by the host's own where none is given. Takes 5 s at the most.
///
/// # Errors
/// Of each: [`Error::Io`], [`Error::Refused`].
pub fn connect(
    identity: &Identity,
    ends: Ends,
    door: &DirectDoor,
    count: usize,
    window: u32,
    congestion: Option<&str>,
) -> Vec<Result<(Link, Direct)>> {
    let deadline = Instant::now() + ANSWERING;
    let client = match identity.client(door.key) {
        Ok(client) => client,
        Err(error) => return vec![Err(error)],
    };
    let one = || open(&client, ends, door.port, window, congestion, deadline);
    // All at once: each takes round trips.
    thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|_| thread::Builder::new().spawn_scoped(scope, one))
            .collect();
        let failed = || Error::Refused("A thread of ours failed".into());
        threads
            .into_iter()
            .map(|thread| match thread {
                Ok(thread) => thread.join().unwrap_or_else(|_| Err(failed())),
                Err(error) => Err(error).context(|| "Can't start a thread"),
            })
            .collect()
    })
}

fn open(
    client: &Client,
    ends: Ends,
    port: u16,
    window: u32,
    congestion: Option<&str>,
    deadline: Instant,
) -> Result<(Link, Direct)> {
    let address = SocketAddr::new(ends.to, port);
    let connected = || -> io::Result<(Link, Direct)> {
        let mut tls = client.connection(ends.to).map_err(io::Error::other)?.into();
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        // The way that ssh goes, and the address that the other host expects.
        socket.bind(&SocketAddr::new(ends.from, 0).into())?;
        let left = deadline.saturating_duration_since(Instant::now());
        socket.connect_timeout(&address.into(), left.max(Duration::from_millis(1)))?;
        let stream = TcpStream::from(socket);
        prepare(&stream, window, congestion)?;
        shake_hands(&mut tls, &stream, deadline)?;
        let direct = Direct {
            stream: stream.try_clone()?,
            losses: Losses::default(),
        };
        Ok((stream::link(tls, stream)?, direct))
    };
    connected().context(|| format!("Can't reach {address}"))
}

fn prepare(stream: &TcpStream, window: u32, congestion: Option<&str>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let window = window.clamp(MIN_WINDOW, MAX_WINDOW);
    // Beyond what the kernel gives by itself, which root may. Whoever may not has that.
    if let Err(error) = set_socket_send_buffer_size_force(stream, window as usize) {
        log::info!("A direct connection has the kernel's own buffers: {error}");
    }
    SockRef::from(stream).set_tcp_notsent_lowat(UNSENT)?;
    if let Some(name) = congestion {
        set_tcp_congestion(stream, name)?;
    }
    Ok(())
}

impl Direct {
    /// Which congestion control it goes by, if the kernel says so.
    #[must_use]
    pub fn congestion(&self) -> Option<String> {
        tcp_congestion(&self.stream).ok()
    }

    /// Whether it loses packets all the time. To be asked each second or so.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn loses_packets(&mut self) -> io::Result<bool> {
        self.losses.look(&self.stream)
    }

    /// Lets it go by the congestion control that fills a link which loses packets. Whether it went by
    /// another one.
    ///
    /// # Errors
    /// What the kernel answered; [`io::ErrorKind::NotFound`] where it has none of that name.
    pub fn follow_bbr(&self) -> io::Result<bool> {
        congestion::follow_bbr(&self.stream)
    }
}

impl Drop for Direct {
    /// Whoever reads or writes is woken.
    fn drop(&mut self) {
        // One that has ended already can't be shut down, and need not be.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
