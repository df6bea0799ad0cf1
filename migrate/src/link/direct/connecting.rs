//! The source's end of direct connections.

use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use rustix::net::sockopt::{set_socket_send_buffer_size_force, set_tcp_congestion, tcp_congestion};
use socket2::SockRef;

use super::{Identity, MAX_WINDOW, MIN_WINDOW, shake_hands, stream};
use crate::error::{Error, IoContext, Result};
use crate::link::loss::Losses;
use crate::link::{Link, congestion};
use crate::wire::DirectDoor;

/// How long the other host may take to answer at its port: one behind a firewall never does.
const ANSWERING: Duration = Duration::from_secs(3);

/// What may wait in the kernel before it is on its way, in bytes: enough that it never runs dry, and
/// no more, so that what is written is soon sent, and a link that is full soon shows.
const UNSENT: u32 = 128 << 10;

/// A direct connection, to be looked after while a link uses it. It ends with this.
#[derive(Debug)]
pub struct Direct {
    stream: TcpStream,
    losses: Losses,
}

/// Opens `count` connections to the `door` of the host at `address`, with so many bytes on their way
/// at the most, by that congestion control; by the host's own where none is given.
///
/// # Errors
/// [`Error::Io`] where not one can be made.
pub fn connect(
    identity: &Identity,
    address: IpAddr,
    door: &DirectDoor,
    count: usize,
    window: u32,
    congestion: Option<&str>,
) -> Result<Vec<(Link, Direct)>> {
    let address = SocketAddr::new(address, door.port);
    let one = || -> Result<(Link, Direct)> {
        let mut tls = identity.client(address.ip(), door.key)?.into();
        let failed = || format!("Can't reach {address}");
        let stream = TcpStream::connect_timeout(&address, ANSWERING).context(failed)?;
        prepare(&stream, window, congestion).context(failed)?;
        shake_hands(&mut tls, &stream).context(failed)?;
        let kept = stream.try_clone().context(failed)?;
        let direct = Direct {
            stream: kept,
            losses: Losses::default(),
        };
        Ok((stream::link(tls, stream).context(failed)?, direct))
    };
    // All at once: each takes round trips.
    let made: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(one)).collect();
        let made = threads.into_iter().map(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(Error::Refused("A thread of ours failed".into())))
        });
        made.collect()
    });
    let mut connections = Vec::new();
    let mut failure = None;
    for one in made {
        match one {
            Ok(connection) => connections.push(connection),
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        Some(error) if connections.is_empty() => Err(error),
        _ => Ok(connections),
    }
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
