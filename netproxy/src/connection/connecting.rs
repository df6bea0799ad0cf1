//! Opening the connection to the guest.
//!
//! It is begun while the client waits. It has come to its end when the socket has a peer, or an error
//! to be taken; how long that may last is a [deadline](super::deadline).

use std::io;
use std::net::SocketAddr;

use mio::net::TcpStream;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{Connection, Context, Upstream, tune};
use crate::error::{Error, Result, system};
use crate::splice::Endpoint;

impl Connection {
    /// Starts the connection to the guest, wherever that is now.
    pub(crate) fn connect(&mut self, ctx: &mut Context<'_>) -> Result<()> {
        let settings = self.guest.settings();
        let site = self.guest.site();
        let Some(remote) = settings.upstream(&site, &self.service) else {
            return Err(Error::UnknownSite {
                guest: self.guest.name.clone(),
                site,
            });
        };
        // It may have waited for so long that its service is gone.
        let port = *self.service.port.get_ref();
        if ctx.shared.is_anothers(remote, &self.guest.name, port) {
            return Err(Error::Taken(remote));
        }
        let failed = || system("Connecting to the guest");
        let socket = Socket::new(
            Domain::for_address(remote),
            Type::STREAM.nonblocking(),
            Some(Protocol::TCP),
        )
        .map_err(failed())?;
        tune(SockRef::from(&socket), ctx.limits).map_err(failed())?;
        if let Some(mss) = settings.mss {
            socket.set_tcp_mss(u32::from(mss)).map_err(failed())?;
        }
        if let Some(source) = settings.source {
            nix::sys::socket::setsockopt(
                &socket,
                nix::sys::socket::sockopt::IpBindAddressNoPort,
                &true,
            )
            .map_err(|error| failed()(error.into()))?;
            socket
                .bind(&SocketAddr::new(source, 0).into())
                .map_err(failed())?;
        }
        match socket.connect(&remote.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(failed()(error)),
        }
        let mut stream = TcpStream::from_std(socket.into());
        self.register(&mut stream, ctx).map_err(failed())?;
        self.upstream = Upstream::Connecting(stream, ctx.now);
        Ok(())
    }

    /// Takes note of a connect that has come to its end. Returns why, if it failed.
    pub(super) fn finish_connecting(
        &mut self,
        ctx: &Context<'_>,
    ) -> std::result::Result<(), String> {
        let Upstream::Connecting(stream, _) = &self.upstream else {
            return Ok(());
        };
        match connected(stream) {
            Ok(true) => {
                let placeholder = std::mem::replace(&mut self.upstream, Upstream::Waiting);
                if let Upstream::Connecting(stream, _) = placeholder {
                    self.upstream = Upstream::Open(Endpoint::new(stream));
                }
                Ok(())
            }
            Ok(false) => Ok(()),
            Err(error) => {
                self.note_failed_connect(ctx);
                Err(format!("connecting to the guest: {error}"))
            }
        }
    }

    pub(super) fn note_failed_connect(&self, ctx: &Context<'_>) {
        ctx.shared
            .metrics
            .connect_failures
            .get_or_create(&self.guest.label)
            .inc();
    }
}

/// Whether a connect has come to its end.
fn connected(stream: &TcpStream) -> io::Result<bool> {
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    match stream.peer_addr() {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
        Err(error) => Err(error),
    }
}
