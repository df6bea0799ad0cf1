//! Listeners, and the clients who come.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::net::{TcpListener, TcpStream};
use mio::{Interest, Token};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{LISTENERS, Slot, Worker};
use crate::config::ServiceConfig;
use crate::connection::{Connection, Next};
use crate::error::{Error, Result};
use crate::guest::Guest;
use crate::metrics::Refusal;

/// So many clients are taken from one listener before the others have their turn.
const BATCH: usize = 64;
/// How long to wait when there are no descriptors left.
const PAUSE: Duration = Duration::from_millis(100);
const BACKLOG: i32 = 4096;

/// One thread's listener on one address.
#[derive(Debug)]
pub(super) struct Listener {
    pub socket: TcpListener,
    pub guest: Arc<Guest>,
    pub service: Arc<ServiceConfig>,
}

/// Opens a listener that shares its address with those of the other threads.
pub(crate) fn open(address: SocketAddr) -> Result<Socket> {
    let open = || -> io::Result<Socket> {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM.nonblocking(),
            Some(Protocol::TCP),
        )?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket)
    };
    open().map_err(|source| Error::Listen { address, source })
}

impl Worker {
    pub(super) fn listen(
        &mut self,
        id: usize,
        socket: Socket,
        guest: Arc<Guest>,
        service: Arc<ServiceConfig>,
    ) {
        let mut socket = TcpListener::from_std(socket.into());
        let token = Token(LISTENERS + id);
        if let Err(error) = self
            .poll
            .registry()
            .register(&mut socket, token, Interest::READABLE)
        {
            log::error!("Watching a listener of {}: {error}", guest.name);
            return;
        }
        self.listeners.insert(
            id,
            Listener {
                socket,
                guest,
                service,
            },
        );
    }

    pub(super) fn wake_listener(&mut self, id: usize) {
        if !self.accepting.contains(&id) {
            self.accepting.push_back(id);
        }
    }

    pub(super) fn accept_some(&mut self) {
        if self.accept_again.is_some_and(|at| at > self.now) {
            return;
        }
        if self.accept_again.take().is_some() {
            let all: Vec<usize> = self.listeners.keys().copied().collect();
            all.into_iter().for_each(|id| self.wake_listener(id));
        }
        for _ in 0..self.accepting.len() {
            let Some(id) = self.accepting.pop_front() else {
                return;
            };
            for turn in 0..=BATCH {
                let Some(listener) = self.listeners.get(&id) else {
                    break;
                };
                if turn == BATCH {
                    self.accepting.push_back(id);
                    break;
                }
                match listener.socket.accept() {
                    Ok((stream, address)) => {
                        let guest = Arc::clone(&listener.guest);
                        let service = Arc::clone(&listener.service);
                        self.welcome(stream, address, &guest, service);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if is_exhaustion(&error) => {
                        log::warn!("Clients have to wait: {error}");
                        self.shared.metrics.accept_pauses.inc();
                        self.accepting.clear();
                        self.accept_again = Some(Instant::now() + PAUSE);
                        return;
                    }
                    // The client has gone already.
                    Err(_) => {}
                }
            }
        }
    }

    fn welcome(
        &mut self,
        stream: TcpStream,
        address: SocketAddr,
        guest: &Arc<Guest>,
        service: Arc<ServiceConfig>,
    ) {
        let ip = address.ip();
        let allowed = service
            .allow
            .as_ref()
            .is_none_or(|nets| nets.iter().any(|net| net.contains(&ip)));
        let admission = if allowed {
            self.shared.admit(guest, ip)
        } else {
            Err(Refusal::not_allowed)
        };
        let admission = match admission {
            Ok(admission) => admission,
            Err(reason) => {
                self.shared.count_refusal(reason);
                log::debug!("{address} refused at {}: {reason:?}", guest.name);
                // A reset costs neither side a socket in TIME_WAIT.
                let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                return;
            }
        };
        let held = self.held.contains(&guest.name);
        let key = self.connections.vacant_key();
        let mut ctx = Self::context(
            &self.poll,
            &mut self.scratch,
            &mut self.pool,
            &mut self.late,
            &self.shared,
            &self.limits,
            self.now,
        );
        let connection = Connection::new(
            admission,
            Arc::clone(guest),
            service,
            stream,
            address,
            key,
            &mut ctx,
        );
        match connection {
            Ok(connection) => {
                self.connections.insert(Slot::Live(Box::new(connection)));
            }
            Err(error) => {
                log::warn!("A client of {}: {}", guest.name, error.chain());
                return;
            }
        }
        self.with(key, |connection, ctx| {
            if held {
                connection.hold();
            } else if let Err(error) = connection.connect(ctx) {
                return Next::Failed(error.chain());
            }
            connection.advance(ctx)
        });
    }
}

fn is_exhaustion(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}
