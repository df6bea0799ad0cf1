//! Rings of bytes in a page shared with another domain, as in Xen's public/io/xs_wire.h and
//! public/io/console.h.
//!
//! Both counts only grow. The writer owns `produced`, the reader `consumed`.

use core::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// The page of xenstore's rings.
#[repr(C)]
pub struct StorePage {
    requests: [AtomicU8; 1024],
    responses: [AtomicU8; 1024],
    requests_consumed: AtomicU32,
    requests_produced: AtomicU32,
    responses_consumed: AtomicU32,
    responses_produced: AtomicU32,
}

impl StorePage {
    /// What goes to the daemon.
    pub fn requests(&self) -> Ring<'_> {
        Ring {
            bytes: &self.requests,
            consumed: &self.requests_consumed,
            produced: &self.requests_produced,
        }
    }

    /// What comes from the daemon.
    pub fn responses(&self) -> Ring<'_> {
        Ring {
            bytes: &self.responses,
            consumed: &self.responses_consumed,
            produced: &self.responses_produced,
        }
    }
}

/// The page of the console's rings.
#[repr(C)]
pub struct ConsolePage {
    input: [AtomicU8; 1024],
    output: [AtomicU8; 2048],
    input_consumed: AtomicU32,
    input_produced: AtomicU32,
    output_consumed: AtomicU32,
    output_produced: AtomicU32,
}

impl ConsolePage {
    /// What goes to the console.
    pub fn output(&self) -> Ring<'_> {
        Ring {
            bytes: &self.output,
            consumed: &self.output_consumed,
            produced: &self.output_produced,
        }
    }
}

/// One direction. The size is a power of two.
pub struct Ring<'a> {
    bytes: &'a [AtomicU8],
    consumed: &'a AtomicU32,
    produced: &'a AtomicU32,
}

impl Ring<'_> {
    fn at(&self, count: u32) -> Option<&AtomicU8> {
        self.bytes.get(count as usize % self.bytes.len())
    }

    /// Writes what fits. How many bytes that was.
    pub fn put(&self, data: &[u8]) -> usize {
        let produced = self.produced.load(Ordering::Relaxed);
        let used = produced.wrapping_sub(self.consumed.load(Ordering::Acquire)) as usize;
        let fits = self.bytes.len().saturating_sub(used).min(data.len());
        let mut count = produced;
        for (byte, value) in core::iter::from_fn(|| {
            let slot = self.at(count);
            count = count.wrapping_add(1);
            slot
        })
        .zip(data.iter().take(fits))
        {
            byte.store(*value, Ordering::Relaxed);
        }
        self.produced
            .store(produced.wrapping_add(fits as u32), Ordering::Release);
        fits
    }

    /// Reads what is there. How many bytes that was.
    pub fn take(&self, data: &mut [u8]) -> usize {
        let consumed = self.consumed.load(Ordering::Relaxed);
        let there = self.produced.load(Ordering::Acquire).wrapping_sub(consumed) as usize;
        let taken = there.min(self.bytes.len()).min(data.len());
        let mut count = consumed;
        for place in data.iter_mut().take(taken) {
            *place = self
                .at(count)
                .map_or(0, |byte| byte.load(Ordering::Relaxed));
            count = count.wrapping_add(1);
        }
        self.consumed
            .store(consumed.wrapping_add(taken as u32), Ordering::Release);
        taken
    }

    /// Forgets what was not read.
    pub fn discard(&self) {
        self.consumed
            .store(self.produced.load(Ordering::Acquire), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_as_they_went_in_around_the_end() {
        let bytes: [AtomicU8; 8] = Default::default();
        let start = u32::MAX - 5;
        let (consumed, produced) = (AtomicU32::new(start), AtomicU32::new(start));
        let ring = Ring {
            bytes: &bytes,
            consumed: &consumed,
            produced: &produced,
        };
        let mut read = [0; 16];
        assert_eq!(ring.take(&mut read), 0);
        assert_eq!(ring.put(b"abcdef"), 6);
        assert_eq!(ring.put(b"ghi"), 2);
        assert_eq!(ring.put(b"i"), 0);
        assert_eq!(ring.take(&mut read[..3]), 3);
        assert_eq!(&read[..3], b"abc");
        assert_eq!(ring.put(b"ijk"), 3);
        assert_eq!(ring.take(&mut read), 8);
        assert_eq!(&read[..8], b"defghijk");
        assert_eq!(ring.put(b"x"), 1);
        ring.discard();
        assert_eq!(ring.take(&mut read), 0);
    }

    #[test]
    fn the_pages_are_laid_out_as_xens() {
        assert_eq!(core::mem::offset_of!(StorePage, responses_produced), 2060);
        assert_eq!(core::mem::offset_of!(ConsolePage, output_produced), 3084);
    }
}
