//! When a peer was heard last.
//!
//! Silence counts from its hello on: before that ssh may still be logging in. From then on each
//! byte counts, not only whole messages: a long one on a slow link takes its time.

use std::io::{self, Read};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Shared between the thread that reads and those that ask. Nothing until the peer has greeted.
#[derive(Debug, Clone, Default)]
pub(super) struct LastHeard(Arc<Mutex<Option<Instant>>>);

impl LastHeard {
    /// The peer has greeted: from now on it may be missed.
    pub(super) fn begin(&self, now: Instant) {
        if let Ok(mut heard) = self.0.lock() {
            *heard = Some(now);
        }
    }

    /// Something came, or was taken from what came.
    pub(super) fn note(&self, now: Instant) {
        if let Ok(mut heard) = self.0.lock()
            && let Some(heard) = heard.as_mut()
        {
            *heard = now;
        }
    }

    /// For how long nothing was heard; nothing where the peer has not greeted yet.
    pub(super) fn silent_for(&self, now: Instant) -> Option<Duration> {
        let heard = self.0.lock().ok().and_then(|heard| *heard);
        heard.map(|heard| now.saturating_duration_since(heard))
    }
}

/// A reader that notes each byte.
#[derive(Debug)]
pub(super) struct Listening<R> {
    inner: R,
    heard: LastHeard,
}

impl<R> Listening<R> {
    pub(super) fn new(inner: R, heard: LastHeard) -> Self {
        Listening { inner, heard }
    }
}

impl<R: Read> Read for Listening<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if count > 0 {
            self.heard.note(Instant::now());
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_single_byte_is_a_sign_of_life() {
        let heard = LastHeard::default();
        let long_ago = Instant::now();
        let now = long_ago + HOUR;
        heard.begin(long_ago);
        assert_eq!(heard.silent_for(now), Some(HOUR));
        let mut reader = Listening::new(&b"x"[..], heard.clone());
        reader.read_exact(&mut [0]).unwrap();
        assert!(heard.silent_for(now).unwrap() < HOUR);
        // The end of the input is none.
        heard.begin(long_ago);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        assert_eq!(heard.silent_for(now), Some(HOUR));
    }

    #[test]
    fn who_has_not_greeted_is_not_missed() {
        let heard = LastHeard::default();
        heard.note(Instant::now());
        assert_eq!(heard.silent_for(Instant::now() + HOUR), None);
    }
}
