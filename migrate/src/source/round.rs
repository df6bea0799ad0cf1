//! One pass over pages: they are read, put into batches by what the destination holds, and sent.

use std::time::{Duration, Instant};

use super::{HANDLING, READ_BATCH, Session};
use crate::error::{Error, Result};
use crate::guest::{Batch, Found, Moment};
use crate::hold::hold;
use crate::pages::PageSet;
use crate::report::{Progress, Round};
use crate::rounds::InRound;
use crate::wire::{ToDestination, ToSource};

/// Pages in one frame. Larger ones compress hardly better, and hold up what follows.
const FRAME_PAGES: usize = 256;

/// The fewest pages of a frame, where there are enough: what makes a batch worth compressing.
const FEWEST_FRAME_PAGES: usize = 32;

/// How many pages are to be in a frame, of `left` that are left of a round, by so many connections.
/// While the guest is silent no connection is to go without where others have much.
fn frame_pages(moment: Moment, left: u64, connections: u32) -> usize {
    match moment {
        Moment::Live => FRAME_PAGES,
        Moment::Last => usize::try_from(left.div_ceil(connections.max(1).into()))
            .unwrap_or(FRAME_PAGES)
            .clamp(FEWEST_FRAME_PAGES, FRAME_PAGES),
    }
}

impl Session<'_> {
    /// One pass over the pages that the backlog has for it; waits until it has crossed.
    pub(super) fn round(&mut self, number: u32, moment: Moment, started: Instant) -> Result<Round> {
        hold(match (moment, number) {
            (Moment::Live, 1) => "copying",
            (Moment::Live, _) => "recopying",
            (Moment::Last, _) => "last-round",
        });
        let mut round = Round {
            pages: self.backlog.this_round().len(),
            ..Round::default()
        };
        let bytes_before = self.go.peer.bytes().0;
        let populated = self.go.guest.populated();
        self.tell_frames(true)?;
        self.held.begin_round();
        self.encoder.resume(self.go.peer.sent());
        let mut pfns = Vec::with_capacity(READ_BATCH);
        let mut batch = Batch::default();
        let mut deferred = PageSet::new(self.held.table().pages());
        let mut done = 0;
        self.reading = Duration::ZERO;
        loop {
            self.check_interrupted()?;
            self.tend();
            if moment == Moment::Live {
                self.check_time(number);
                if self.time_is_up {
                    break;
                }
                if !self.scans() && self.looked.elapsed() >= self.look_after {
                    self.look()?;
                    self.tell_frames(false)?;
                }
            }
            if self.backlog.take(READ_BATCH, &mut pfns) == 0 {
                break;
            }
            batch.clear();
            let known = self.held.table();
            let guest = &mut self.go.guest;
            let reading = Instant::now();
            guest.read(&pfns, known, moment, &mut batch, &mut deferred)?;
            self.reading += reading.elapsed();
            if !deferred.is_empty() {
                round.deferred += deferred.len();
                self.backlog.deferred(&deferred);
                deferred.clear();
            }
            done += pfns.len() as u64;
            pfns.clear();
            round.same += batch.unchanged;
            let left = batch.entries.len() as u64 + round.pages.saturating_sub(done);
            let pages = frame_pages(moment, left, self.report.link.connections);
            for entries in batch.entries.chunks(pages) {
                let encoder = self.encoder.batch();
                for entry in entries {
                    let content = match entry.content {
                        Found::Nothing | Found::Zero => None,
                        Found::Slot(slot) => {
                            Some(batch.content(slot).ok_or_else(|| Error::Guest {
                                what: format!("page {:#x} was lost", entry.pfn),
                            })?)
                        }
                    };
                    let class = self.held.send(encoder, entry.pfn, entry.state, content)?;
                    round.count(class);
                }
                let encoding = self.encoder.hand_out(self.go.peer.sent());
                let waiting = Instant::now();
                self.go.peer.send_pages(encoding)?;
                self.encoder.waited(waiting.elapsed());
            }
            let wire_bytes = self.go.peer.bytes().0;
            self.meter.note(Instant::now(), wire_bytes);
            let waiting = self.backlog.waiting();
            let so_far = InRound {
                number,
                done,
                left: round.pages - done,
                next: waiting.0,
                hot: waiting.1,
                unseen: self.looked.elapsed(),
                spent: started.elapsed(),
                bytes: wire_bytes - bytes_before,
                pages: populated,
            };
            let rate = self.meter.rate();
            let outlook = match self.suspend_started {
                Some(since) => self.forecast.last(&so_far, since.elapsed(), rate),
                None => self.forecast.outlook(&so_far, &self.limits(), rate),
            };
            self.go.observer.notice(Progress::Pages {
                round: number,
                done,
                total: round.pages,
                wire_bytes,
                outlook,
            });
        }
        // Where time was up, the rest of them wait.
        round.pages = done;
        let last = moment == Moment::Last;
        self.go.peer.send(&ToDestination::RoundEnd {
            round: number,
            pages: round.sent(),
            last,
        })?;
        round.compressed = self.encoder.take_compressed();
        // The last one is answered by "ready": nothing waits for a round trip in the silence.
        if last {
            let end = self.go.peer.mark()?;
            self.last_round = Some((bytes_before, end));
        } else {
            // Over a slow link what is queued takes longer than the other side needs to handle it.
            self.go.peer.flush()?;
            match self.receive(HANDLING)? {
                ToSource::RoundAck { round, behind, .. } if round == number => {
                    self.behind = behind;
                }
                other => return Err(self.unexpected(&other)),
            }
        }
        round.took = started.elapsed();
        // Of the last one it is known when all has arrived.
        round.wire_bytes = self.go.peer.bytes().0 - bytes_before;
        self.note_memory();
        Ok(round)
    }

    /// Tells the destination where the p2m is, and how large the guest; in the middle of a round
    /// only where that has changed.
    fn tell_frames(&mut self, always: bool) -> Result<()> {
        let populated = self.go.guest.populated();
        let frames = self.go.guest.p2m_frames();
        if !always && (populated, frames) == (self.told_frames.0, self.told_frames.1.as_slice()) {
            return Ok(());
        }
        let frames = frames.to_vec();
        self.told_frames = (populated, frames.clone());
        self.go.peer.send(&ToDestination::P2mFrames {
            max_pfn: self.held.table().pages().saturating_sub(1),
            populated,
            frames,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_the_silence_each_connection_has_its_part() {
        let live = |left, connections| frame_pages(Moment::Live, left, connections);
        let last = |left, connections| frame_pages(Moment::Last, left, connections);
        assert_eq!(live(800, 8), FRAME_PAGES);
        assert_eq!(last(800, 8), 100);
        assert_eq!(last(801, 8), 101);
        assert_eq!(last(800, 1), FRAME_PAGES);
        assert_eq!(last(5000, 8), FRAME_PAGES);
        assert_eq!(last(20, 8), FEWEST_FRAME_PAGES);
        assert_eq!(last(0, 0), FEWEST_FRAME_PAGES);
    }
}
