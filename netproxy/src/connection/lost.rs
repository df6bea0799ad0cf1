//! A side that has failed, and what it had said before.
//!
//! ```text
//!  one side fails ──▶ what it had sent goes on ──▶ the other side has it ──▶ that sees a reset too
//!                                    └──────────── linger is over ────────────────▲
//! ```
//!
//! The kernel keeps what came before a reset. It is read as ever, and only then the error shows. So
//! the error is left to the read that comes after the last byte, and nothing is written to that
//! side any more: a write would take the error away, and the read after it would show an end.

use std::io;
use std::time::Instant;

use super::{Connection, Context, Next, Stage, Upstream};
use crate::repair;
use crate::splice::{End, Flow};

/// A side to which nothing can be told any more.
#[derive(Debug)]
pub(super) struct Lost {
    pub(super) of_client: bool,
    /// None as long as no read has come to it.
    why: Option<String>,
    /// All that it had sent has been read.
    pub(super) drained: bool,
    /// The error is taken already: what reads as an end is none.
    pub(super) endless: bool,
    /// Since when the other side can be told, without a move between.
    since: Option<Instant>,
}

impl Lost {
    fn new(of_client: bool) -> Self {
        Self {
            of_client,
            why: None,
            drained: false,
            endless: false,
            since: None,
        }
    }

    /// One that another program knew of. Whether the error is there still is not known.
    pub(super) fn taken_over(client: bool, guest: bool) -> Option<Self> {
        (client || guest).then(|| Self {
            endless: true,
            ..Self::new(client)
        })
    }
}

/// How a side was found to be broken.
#[derive(Debug)]
pub(super) enum Sign {
    /// By what epoll says of it.
    Event,
    /// A read has come to the error.
    Read(io::Error),
    /// A write has taken the error.
    Write(io::Error),
}

impl Connection {
    /// One side is broken. Returns why, if there is nobody left who could hear of it.
    pub(super) fn lose(&mut self, of_client: bool, sign: Sign) -> Option<String> {
        let side = if of_client { "client" } else { "guest" };
        let why = |error: io::Error| format!("the {side}'s side: {error}");
        let open = self.flow_from(of_client).end() == End::Open;
        let lost = self.lost.get_or_insert(Lost::new(of_client));
        match sign {
            _ if lost.of_client != of_client => return Some("both sides are broken".into()),
            Sign::Event => {}
            Sign::Read(error) => {
                lost.drained = true;
                lost.why = Some(why(error));
            }
            Sign::Write(error) => {
                lost.endless = open;
                lost.why = Some(why(error));
            }
        }
        None
    }

    fn flow_from(&self, client: bool) -> &Flow {
        if client {
            &self.to_guest
        } else {
            &self.to_client
        }
    }

    pub(super) fn client_is_lost(&self) -> bool {
        self.lost.as_ref().is_some_and(|lost| lost.of_client)
    }

    /// Whether there is no guest any more whose move it could follow.
    pub(crate) fn guest_is_lost(&self) -> bool {
        self.lost.as_ref().is_some_and(|lost| !lost.of_client)
    }

    /// Whether what a lost side had said can reach the other one now. The guest hears nothing before
    /// it can be reached again.
    pub(super) fn has_last_words(&self) -> bool {
        self.guest_is_lost() || self.client_is_lost() && matches!(self.stage, Stage::Normal)
    }

    /// The other side can't be told now. When it can, it has its time again.
    pub(super) fn begin_anew(&mut self) {
        if let Some(lost) = &mut self.lost {
            lost.since = None;
        }
    }

    /// Whether a lost client has said something that was not written to the guest yet.
    pub(super) fn client_left_words(&self) -> bool {
        let drained = self.lost.as_ref().is_some_and(|lost| lost.drained);
        let left = self.to_guest.queued() > 0 && !self.client_was_silent();
        self.client_is_lost() && (!drained || left)
    }

    /// Whether its client has said nothing so far. What the proxy says of it is not its own.
    fn client_was_silent(&self) -> bool {
        self.to_guest.taken() <= self.header as u64
    }

    /// Keeps the connection until the other side has what the lost one had said.
    pub(super) fn last_words(&mut self, ctx: &Context<'_>) -> Next {
        if !self.has_last_words() {
            self.begin_anew();
            return if self.ended() {
                self.settle(ctx)
            } else {
                Next::Wait
            };
        }
        let silent = self.client_was_silent();
        let upstream = match &self.upstream {
            Upstream::Open(endpoint) => Some(&endpoint.stream),
            _ => None,
        };
        let Some(lost) = &mut self.lost else {
            return Next::Wait;
        };
        let (flow, from, to) = if lost.of_client {
            (&self.to_guest, Some(&self.client.stream), upstream)
        } else {
            (&self.to_client, upstream, Some(&self.client.stream))
        };
        let heard = |stream| repair::unacknowledged(stream).unwrap_or(0) == 0;
        let nothing = lost.of_client && silent;
        let all_heard = || flow.queued() == 0 && to.is_none_or(heard);
        let told = lost.drained && (nothing || all_heard());
        if !told {
            if to.is_none() {
                // How long it may be until there is somebody is the limit of a connect.
                return Next::Wait;
            }
            let since = *lost.since.get_or_insert(ctx.now);
            if ctx.now.duration_since(since) < ctx.limits.linger.0 {
                return Next::Wait;
            }
        }
        let side = if lost.of_client { "client" } else { "guest" };
        let taken = || from.and_then(|stream| stream.take_error().ok().flatten());
        Next::Failed(match lost.why.take() {
            Some(why) => why,
            None => match taken() {
                Some(error) => format!("the {side}'s side: {error}"),
                None => format!("the {side} has gone"),
            },
        })
    }
}
