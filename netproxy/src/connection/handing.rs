//! Handing a connection from one program to the next.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use mio::Registry;
use mio::net::TcpStream;

use super::lost::Lost;
use super::releasing::Proving;
use super::{Connection, Context, Stage, Upstream, client_token, watch};
use crate::config::ServiceConfig;
use crate::error::{Result, system};
use crate::guest::{Guest, Shared};
use crate::splice::{Endpoint, Flow};
use crate::upgrade::state::{ConnectionState, Handed, Micros, UpstreamState};

/// A connection that was put down, and what it belongs to.
#[derive(Debug)]
pub(crate) struct Packed {
    pub guest: Arc<Guest>,
    pub service: Arc<ServiceConfig>,
    pub state: ConnectionState,
}

fn handed(stream: TcpStream) -> Handed {
    Handed(OwnedFd::from(stream))
}

impl Connection {
    /// Puts it down. Guest and service have no number in the state yet.
    pub(crate) fn pack(
        self,
        registry: &Registry,
        shared: &Shared,
        now: std::time::Instant,
    ) -> Packed {
        let proving = match &self.stage {
            Stage::Proving(proving) => Some(proving.pack(now)),
            // No guest is being moved.
            _ => None,
        };
        let (client_lost, guest_lost) = (self.client_is_lost(), self.guest_is_lost());
        let mut client = self.client;
        let _ = registry.deregister(&mut client.stream);
        let upstream = match self.upstream {
            Upstream::Waiting => UpstreamState::Waiting,
            Upstream::Connecting(mut stream, since) => {
                let _ = registry.deregister(&mut stream);
                UpstreamState::Connecting(handed(stream), Micros::since(since, now))
            }
            Upstream::Open(mut endpoint) => {
                let _ = registry.deregister(&mut endpoint.stream);
                UpstreamState::Open(handed(endpoint.stream))
            }
        };
        Packed {
            state: ConnectionState {
                id: self.admission.id,
                guest: 0,
                service: 0,
                client_address: self.client_address,
                client: handed(client.stream),
                client_lost: client_lost && proving.is_some(),
                client_gone: client_lost,
                guest_lost,
                upstream,
                to_guest: self.to_guest.pack(&shared.budget),
                header: self.header,
                to_client: self.to_client.pack(&shared.budget),
                proving,
                opened: Micros::since(self.opened, now),
                last_activity: Micros::since(self.last_activity, now),
                moved_before: self.moved_before,
            },
            guest: self.guest,
            service: self.service,
        }
    }

    /// Takes it up again, in slot `key`.
    pub(crate) fn unpack(
        packed: Packed,
        key: usize,
        shared: &Arc<Shared>,
        ctx: &mut Context<'_>,
    ) -> Result<Self> {
        let Packed {
            guest,
            service,
            state,
        } = packed;
        let watched = || system("Watching a connection that was taken over");
        let mut client = TcpStream::from(state.client.0);
        watch(&mut client, client_token(key), ctx).map_err(watched())?;
        let to_guest = Flow::unpack(state.to_guest, ctx.pool, &shared.budget);
        let to_client = Flow::unpack(state.to_client, ctx.pool, &shared.budget);
        let counted = (to_guest.given(), to_client.given());
        let mut connection = Self {
            admission: shared.readmit(state.id, &guest, state.client_address.ip()),
            guest,
            service,
            client_address: state.client_address,
            client: Endpoint::new(client),
            lost: Lost::taken_over(state.client_lost || state.client_gone, state.guest_lost),
            upstream: Upstream::Waiting,
            to_guest,
            header: state.header,
            to_client,
            stage: match state.proving {
                Some(proving) => Stage::Proving(Box::new(Proving::unpack(&proving, ctx.now))),
                None => Stage::Normal,
            },
            opened: state.opened.ago(ctx.now),
            last_activity: state.last_activity.ago(ctx.now),
            looked: ctx.now,
            settle_since: None,
            moved_before: state.moved_before,
            counted,
            key,
            timer_at: None,
            queued: false,
        };
        connection.upstream = match state.upstream {
            UpstreamState::Waiting => Upstream::Waiting,
            UpstreamState::Connecting(socket, since) => {
                let mut stream = TcpStream::from(socket.0);
                connection.register(&mut stream, ctx).map_err(watched())?;
                Upstream::Connecting(stream, since.ago(ctx.now))
            }
            UpstreamState::Open(socket) => {
                let mut stream = TcpStream::from(socket.0);
                connection.register(&mut stream, ctx).map_err(watched())?;
                Upstream::Open(Endpoint::new(stream))
            }
        };
        Ok(connection)
    }
}
