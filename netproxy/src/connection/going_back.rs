//! What a move that is given up does to one connection.

use mio::net::TcpStream;
use socket2::SockRef;

use super::releasing::Proving;
use super::{Connection, Context, Stage, Step, Upstream, tune};
use crate::error::Result;
use crate::repair;
use crate::splice::Endpoint;

impl Connection {
    /// Goes back from the new socket to the old one, which is frozen still. Where there is no
    /// old one, the new one has its addresses and serves as well.
    pub(crate) fn undo(&mut self, ctx: &mut Context<'_>) -> Step {
        let Stage::Moved(moved) = &mut self.stage else {
            return if self.is_waiting() {
                Step::Waits
            } else {
                Step::Taken
            };
        };
        let Some(mut old) = moved.old.take() else {
            return Step::Taken;
        };
        let before = moved.before.take();
        let put_by = match std::mem::replace(&mut self.upstream, Upstream::Waiting) {
            Upstream::Open(new) => put_by(new.stream, ctx),
            _ => Ok(()),
        };
        // In repair mode it could not be read.
        let put_by = put_by.and_then(|()| repair::resume(&old));
        let registered = self.register(&mut old, ctx);
        self.upstream = Upstream::Open(Endpoint::new(old));
        let frozen = true;
        self.stage = Stage::Held { frozen, before };
        match (put_by, registered) {
            (Ok(()), Ok(())) => Step::Taken,
            (Err(error), _) => {
                self.unmovable(error.chain());
                Step::Failed
            }
            (_, Err(error)) => {
                self.unmovable(error.to_string());
                Step::Failed
            }
        }
    }

    /// The move is off: the connection goes on at the old site.
    pub(crate) fn cancel(&mut self, ctx: &mut Context<'_>) -> std::result::Result<Step, String> {
        match std::mem::replace(&mut self.stage, Stage::Normal) {
            Stage::Held { frozen, before } => self.go_back(frozen, before, ctx),
            Stage::Unmovable(why) => match self.upstream {
                Upstream::Open(_) => self.go_back(true, None, ctx),
                _ if self.client_is_lost() => Ok(Step::Gone),
                _ => Err(why),
            },
            Stage::Moved(moved) if moved.old.is_some() => {
                self.stage = Stage::Moved(moved);
                self.undo(ctx);
                self.cancel(ctx)
            }
            Stage::Moved(moved) => {
                self.proceed(*moved, true, ctx);
                Ok(Step::Taken)
            }
            stage @ (Stage::Normal | Stage::Proving(_)) => {
                self.stage = stage;
                Ok(Step::Taken)
            }
        }
    }

    pub(super) fn go_back(
        &mut self,
        frozen: bool,
        before: Option<Box<Proving>>,
        ctx: &mut Context<'_>,
    ) -> std::result::Result<Step, String> {
        match &self.upstream {
            Upstream::Open(endpoint) => {
                if frozen {
                    repair::thaw(&endpoint.stream).map_err(|error| error.chain())?;
                    let _ = tune(SockRef::from(&endpoint.stream), ctx.limits);
                }
                if let Some(proving) = before {
                    self.stage = Stage::Proving(proving);
                }
                Ok(Step::Taken)
            }
            Upstream::Connecting(..) => Ok(Step::Waits),
            Upstream::Waiting => {
                if self.client_is_lost() && !self.client_left_words() {
                    return Ok(Step::Gone);
                }
                self.connect(ctx).map_err(|error| error.chain())?;
                Ok(Step::Waits)
            }
        }
    }
}

/// Puts by a new socket that is not needed after all. It stays for a while, deaf and silent: the
/// guest may come to that site yet, and what it says there first would be answered with a reset.
fn put_by(mut socket: TcpStream, ctx: &mut Context<'_>) -> Result<()> {
    let deaf = repair::freeze(&socket).is_ok();
    repair::silence(&socket)?;
    // One that was reset has no peer any more, and nothing to keep away.
    if let (Ok(local), Ok(remote)) = (socket.local_addr(), socket.peer_addr())
        && deaf
        && ctx.registry.deregister(&mut socket).is_ok()
    {
        ctx.late.keep(local, remote, socket, ctx.now);
    }
    Ok(())
}
