//! Connections for pages that go directly from worker to worker: TCP of our own, within TLS 1.3.
//!
//! ```text
//!   source                                    destination
//!   Offer: its key ------------- ssh --------> listens where ssh has reached this host
//!   connect <------------------- ssh --------- Acceptance: its key, the port
//!      |                                        |
//!      +-- TCP, TLS: each shows its key -------+--> as a connection that has come by the door
//! ```
//!
//! An ssh connection has no more than 2 MiB on its way, whatever the link takes, and costs two
//! processes at either end. These have buffers as large as what the link takes with losses, and are
//! encrypted by the threads that write and read them. ssh stays what the two sites know one
//! another by: each makes a key for this one move, says it through ssh, and takes no other. Where the
//! port can't be reached, pages go by ssh.

mod connecting;
mod identity;
mod listening;
mod stream;

pub use connecting::{Direct, Ends, connect};
pub use identity::{Identity, PublicKey};
pub use listening::{DirectPolicy, Ports};
pub(crate) use listening::{Listener, listen};

use std::io;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustls::Connection;

/// How long the other end may take to answer, and to show who it is. Who is behind a firewall never
/// does.
const ANSWERING: Duration = Duration::from_secs(5);

/// The largest window that TCP offers with the kernel's defaults, in bytes.
pub const MAX_WINDOW: u32 = 8 << 20;

/// The smallest window that is asked for, in bytes: what a link of a few Mbit/s takes.
pub(super) const MIN_WINDOW: u32 = 1 << 20;

/// Lets both ends show their keys, until `deadline`.
fn shake_hands(
    connection: &mut Connection,
    mut stream: &TcpStream,
    deadline: Instant,
) -> io::Result<()> {
    while connection.is_handshaking() || connection.wants_write() {
        // A peer that drips bytes gets no more time by each of them.
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        stream.set_write_timeout(Some(left))?;
        let writes = connection.wants_write();
        let crossed = match writes {
            true => connection.write_tls(&mut stream),
            false => connection.read_tls(&mut stream),
        };
        match crossed {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) if writes => continue,
            Ok(_) => {}
            // What a socket says whose time is over, which is looked at above.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        if let Err(error) = connection.process_new_packets() {
            // The other end is told why, if it listens.
            let _ = connection.write_tls(&mut stream);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
    }
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)
}

#[cfg(test)]
mod tests;
