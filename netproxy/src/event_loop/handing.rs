//! Handing a thread's part from one program to the next.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use mio::net::TcpStream;

use super::{Slot, Worker};
use crate::connection::{Connection, Next, Packed};
use crate::upgrade::state::{Handed, LateState, Micros};

/// What a thread put down.
#[derive(Debug, Default)]
pub(crate) struct PackedWorker {
    pub listeners: Vec<(usize, Handed)>,
    pub connections: Vec<Packed>,
    pub late: Vec<LateState>,
}

impl Worker {
    /// Puts everything down. The thread ends after it.
    pub(super) fn pack(&mut self) -> PackedWorker {
        let now = self.now;
        let mut packed = PackedWorker::default();
        for (id, listener) in std::mem::take(&mut self.listeners) {
            let socket = Handed(OwnedFd::from(listener.socket));
            packed.listeners.push((id, socket));
        }
        for slot in self.connections.drain() {
            if let Slot::Live(connection) = slot {
                let state = connection.pack(self.poll.registry(), &self.shared, now);
                packed.connections.push(state);
            }
        }
        packed.late = self
            .late
            .take()
            .map(|(ends, until, socket)| late(ends, Micros::until(until, now), socket))
            .collect();
        packed
    }

    /// Takes up what another thread put down; listeners come by themselves.
    pub(super) fn adopt(&mut self, packed: PackedWorker) {
        for state in packed.late {
            let socket = TcpStream::from(state.socket.0);
            let until = state.left.ahead(self.now);
            self.late
                .keep_until(state.local, state.remote, socket, until);
        }
        for packed in packed.connections {
            let key = self.connections.vacant_key();
            let (id, guest) = (packed.state.id, packed.guest.name.clone());
            let mut ctx = Self::context(
                &self.poll,
                &mut self.scratch,
                &mut self.pool,
                &mut self.late,
                &self.shared,
                &self.limits,
                self.now,
            );
            match Connection::unpack(packed, key, &self.shared, &mut ctx) {
                Ok(connection) => {
                    self.connections.insert(Slot::Live(Box::new(connection)));
                }
                Err(error) => {
                    log::error!("Connection {id} of {guest} is lost: {}", error.chain());
                    continue;
                }
            }
            self.with(key, |connection, ctx| {
                if connection.is_waiting()
                    && let Err(error) = connection.connect(ctx)
                {
                    return Next::Failed(error.chain());
                }
                connection.advance(ctx)
            });
        }
    }
}

fn late((local, remote): (SocketAddr, SocketAddr), left: Micros, socket: TcpStream) -> LateState {
    LateState {
        local,
        remote,
        left,
        socket: Handed(OwnedFd::from(socket)),
    }
}
