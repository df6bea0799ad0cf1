//! When a connection is looked at without an event, and which limits of time end it.
//!
//! ```text
//!  Proving                        the next check of the release
//!  Connecting                     `connect`
//!  settling, or last words        a moment: nothing reports that bytes are acknowledged
//!  else the earlier of            `idle`, or `half_closed` when one direction has ended
//!                                 keep-alive's limit of silence, halved
//! ```
//!
//! One that a move holds can carry nothing, and is not ended for that.

use std::time::{Duration, Instant};

use mio::net::TcpStream;

use super::{Connection, Context, Next, Stage, Upstream};
use crate::config::Limits;
use crate::repair;
use crate::splice::End;

/// How often it is looked whether the guest has acknowledged the last bytes.
const SETTLE: Duration = Duration::from_millis(20);

impl Connection {
    /// When it has to be looked at without an event.
    pub(crate) fn deadline(&self, limits: &Limits, now: Instant) -> Instant {
        if let Stage::Proving(proving) = &self.stage {
            return proving.next_check;
        }
        if let Upstream::Connecting(_, since) = &self.upstream {
            return *since + limits.connect.0;
        }
        if self.settle_since.is_some() || self.has_last_words() {
            return now + SETTLE;
        }
        let idle = self.last_activity + self.idle_limit(limits);
        // One that is held is not ended by it, and would be due again and again.
        let idle = match self.is_held() {
            true => idle.max(now + SETTLE),
            false => idle,
        };
        match limits.silence() {
            Some(silence) => idle.min(self.looked + silence / 2),
            None => idle,
        }
    }

    /// Who does not answer for too long. Keep-alive does not ask while something is under way, and
    /// the kernel goes on sending that for a quarter of an hour. TCP_USER_TIMEOUT is no way out: it
    /// also ends those that answer, and only don't read. Those are asked rarely, so silence alone
    /// says nothing: two questions have to be open.
    fn unheard(&self, limits: &Limits) -> Option<&'static str> {
        let silence = limits.silence()?;
        let gone = |stream: &TcpStream| {
            repair::tcp_info(stream).is_ok_and(|info| {
                info.unanswered >= 2 && u128::from(info.silent_ms) >= silence.as_millis()
            })
        };
        if gone(&self.client.stream) {
            return Some("the client does not answer any more");
        }
        match &self.upstream {
            Upstream::Open(endpoint) if gone(&endpoint.stream) => {
                Some("the guest does not answer any more")
            }
            _ => None,
        }
    }

    fn idle_limit(&self, limits: &Limits) -> Duration {
        let half = self.to_guest.end() != End::Open || self.to_client.end() != End::Open;
        if half {
            limits.half_closed.0.min(limits.idle.0)
        } else {
            limits.idle.0
        }
    }

    /// Its deadline may have come.
    pub(crate) fn on_timer(&mut self, ctx: &mut Context<'_>) -> Next {
        if matches!(self.stage, Stage::Proving(_)) {
            let could_write = self.may_write();
            return match self.check(ctx) {
                Next::Wait if self.lost.is_some() => self.advance(ctx),
                Next::Wait if !could_write && self.may_write() => self.advance(ctx),
                next => next,
            };
        }
        if let Upstream::Connecting(_, since) = &self.upstream {
            if ctx.now >= *since + ctx.limits.connect.0 {
                self.note_failed_connect(ctx);
                return Next::Failed("the guest does not answer".into());
            }
            return Next::Wait;
        }
        if self.has_last_words() {
            return self.advance(ctx);
        }
        if self.settle_since.is_some() {
            return self.settle(ctx);
        }
        self.looked = ctx.now;
        if matches!(self.stage, Stage::Normal)
            && let Some(why) = self.unheard(ctx.limits)
        {
            return Next::Failed(why.into());
        }
        if ctx.now < self.last_activity + self.idle_limit(ctx.limits) {
            return Next::Wait;
        }
        if matches!(self.stage, Stage::Normal) {
            return Next::Expired("it carried nothing for too long");
        }
        // A held connection can't carry anything: that is not its fault.
        self.last_activity = ctx.now;
        Next::Wait
    }
}
