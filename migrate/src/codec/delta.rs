//! What changed in a page: pure functions over bytes.
//!
//! ```text
//!   skip | length - 1 | bytes | skip | length - 1 | bytes | ... | skip
//!
//!   old   ...............aaaa........................bb...................
//!   new   ...............xxxx........................yy...................
//!         <--- skip --->       <------- skip ------>   <------ skip ----->
//! ```
//!
//! Numbers are varints. A skip passes over bytes that are as they were; the bytes after it replace
//! as many old ones. The delta ends where the page does, so the last skip is left out where the
//! page's last byte changed.
//!
//! The bytes are the new ones, not their XOR with the old ones. Where a byte changed that tells no
//! more, and new words and texts compress better beside other pages (measured: docs/benchmarks.md).

use crate::bytes::{Bytes, Malformed, push_varint};
use crate::pages::{PAGE_SIZE, Page};
use std::fmt;
use std::ops::Range;

/// The most bytes that a delta is written with. A longer one saves too little: the page itself is
/// compressed as well, and better for being whole.
pub const MAX_DELTA_BYTES: usize = PAGE_SIZE / 2;

/// Unchanged bytes between two changes that are sent along: fewer than two numbers would cost.
const JOIN: usize = 3;

/// A delta that was checked: it changes one page, and no byte outside of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Delta<'a>(&'a [u8]);

/// Does not show the bytes: they are a guest's memory.
impl fmt::Debug for Delta<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Delta({} bytes)", self.0.len())
    }
}

/// Appends what makes `new` of `old`. False, and nothing is appended, where that takes more than
/// [`MAX_DELTA_BYTES`].
#[must_use]
pub fn encode(old: &Page, new: &Page, to: &mut Vec<u8>) -> bool {
    let start = to.len();
    let mut written = 0;
    let mut changed = 0..0;
    let (old_words, _) = old.as_chunks::<8>();
    let (new_words, _) = new.as_chunks::<8>();
    for (index, (old_word, new_word)) in old_words.iter().zip(new_words).enumerate() {
        let mut differs = u64::from_le_bytes(*old_word) ^ u64::from_le_bytes(*new_word);
        while differs != 0 {
            let byte = differs.trailing_zeros() as usize / 8;
            differs &= !(0xff << (byte * 8));
            let at = index * 8 + byte;
            if changed.is_empty() || at - changed.end > JOIN {
                written = write_change(new, written, changed, to);
                if to.len() - start > MAX_DELTA_BYTES {
                    to.truncate(start);
                    return false;
                }
                changed = at..at;
            }
            changed.end = at + 1;
        }
    }
    written = write_change(new, written, changed, to);
    if written < PAGE_SIZE {
        push_varint(to, (PAGE_SIZE - written) as u64);
    }
    if to.len() - start > MAX_DELTA_BYTES {
        to.truncate(start);
        return false;
    }
    true
}

/// Appends one change after what is `written` of the page; how much is written then.
fn write_change(new: &Page, written: usize, changed: Range<usize>, to: &mut Vec<u8>) -> usize {
    if changed.is_empty() {
        return written;
    }
    push_varint(to, (changed.start - written) as u64);
    push_varint(to, (changed.len() - 1) as u64);
    let end = changed.end;
    to.extend_from_slice(&new[changed]);
    end
}

impl<'a> Delta<'a> {
    /// Takes one delta off the front of bytes that may come from anybody.
    pub(super) fn read(from: &mut Bytes<'a>) -> Result<Self, Malformed> {
        let all = from.rest();
        walk(from, |_, _| {})?;
        let length = all.len() - from.rest().len();
        all.get(..length).map(Self).ok_or(Malformed)
    }

    /// Makes the new page of the old one, in place.
    pub fn apply(self, page: &mut Page) {
        // It was checked when it was read.
        let _ = walk(&mut Bytes::new(self.0), |at, bytes| {
            if let Some(place) = page.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        });
    }
}

/// Hands out each change: where it begins, and its bytes. They lie within a page.
fn walk<'a>(
    from: &mut Bytes<'a>,
    mut change: impl FnMut(usize, &'a [u8]),
) -> Result<(), Malformed> {
    let mut at = 0;
    loop {
        at = advance(at, from.varint()?)?;
        if at == PAGE_SIZE {
            return Ok(());
        }
        let start = at;
        at = advance(at, from.varint()?.checked_add(1).ok_or(Malformed)?)?;
        change(start, from.take(at - start)?);
        if at == PAGE_SIZE {
            return Ok(());
        }
    }
}

fn advance(at: usize, by: u64) -> Result<usize, Malformed> {
    let left = PAGE_SIZE - at;
    match usize::try_from(by) {
        Ok(by) if by <= left => Ok(at + by),
        _ => Err(Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pages() -> impl Strategy<Value = (Box<Page>, Box<Page>)> {
        let change = (0..PAGE_SIZE, 1usize..80, any::<u8>());
        (any::<[u8; 16]>(), proptest::collection::vec(change, 0..60)).prop_map(|(text, changes)| {
            let old: Box<Page> =
                Box::new(std::array::from_fn(|at| text[at % 16] ^ (at >> 4) as u8));
            let mut new = old.clone();
            for (at, length, value) in changes {
                let end = (at + length).min(PAGE_SIZE);
                new[at..end].iter_mut().for_each(|byte| *byte ^= value);
            }
            (old, new)
        })
    }

    fn delta(old: &Page, new: &Page) -> Option<Vec<u8>> {
        let mut bytes = vec![9; 3];
        let written = encode(old, new, &mut bytes);
        assert_eq!(bytes[..3], [9; 3]);
        assert!(
            written || bytes.len() == 3,
            "What was given up is left over"
        );
        written.then(|| bytes[3..].to_vec())
    }

    fn read(bytes: &[u8]) -> Result<usize, Malformed> {
        let mut from = Bytes::new(bytes);
        Delta::read(&mut from).map(|_| bytes.len() - from.rest().len())
    }

    #[test]
    fn a_change_is_itself_and_where_it_is() {
        let old = [7; PAGE_SIZE];
        assert_eq!(delta(&old, &old).unwrap(), [0x80, 0x20]);
        let mut new = old;
        new[300] = 1;
        assert_eq!(delta(&old, &new).unwrap(), [0xac, 0x02, 0, 1, 0xd3, 0x1d]);
        // Near ones are one change; what is between them is sent along.
        new[302] = 2;
        assert_eq!(
            delta(&old, &new).unwrap(),
            [0xac, 0x02, 2, 1, 7, 2, 0xd1, 0x1d]
        );
        // Up to the ends of the page.
        let mut ends = old;
        ends[0] = 5;
        ends[PAGE_SIZE - 1] = 6;
        assert_eq!(delta(&old, &ends).unwrap(), [0, 0, 5, 0xfe, 0x1f, 0, 6]);
    }

    #[test]
    fn what_changed_too_much_is_no_delta() {
        let old = [1; PAGE_SIZE];
        assert_eq!(delta(&old, &[2; PAGE_SIZE]), None);
        let mut half = old;
        half[..MAX_DELTA_BYTES - 8].fill(2);
        assert!(delta(&old, &half).unwrap().len() <= MAX_DELTA_BYTES);
        let mut scattered = old;
        scattered.iter_mut().step_by(5).for_each(|byte| *byte = 2);
        assert_eq!(delta(&old, &scattered), None);
    }

    #[test]
    fn nothing_outside_of_the_page_is_changed() {
        assert_eq!(read(&[0x80, 0x20]), Ok(2));
        // A skip, or a change, beyond the end; one that says more than a number can.
        assert_eq!(read(&[0x81, 0x20]), Err(Malformed));
        assert_eq!(read(&[0xff, 0x1f, 0, 1]), Ok(4));
        assert_eq!(read(&[0xff, 0x1f, 1, 1, 1]), Err(Malformed));
        let mut most = vec![0];
        push_varint(&mut most, u64::MAX);
        assert_eq!(read(&most), Err(Malformed));
        // It ends before the page does.
        assert_eq!(read(&[]), Err(Malformed));
        assert_eq!(read(&[0, 0, 1]), Err(Malformed));
        assert_eq!(read(&[0, 5, 1]), Err(Malformed));
        // What follows is not its.
        assert_eq!(read(&[0x80, 0x20, 1, 2]), Ok(2));
    }

    proptest! {
        #[test]
        fn the_new_page_comes_back((old, new) in pages()) {
            if let Some(bytes) = delta(&old, &new) {
                prop_assert!(bytes.len() <= MAX_DELTA_BYTES);
                let mut from = Bytes::new(&bytes);
                let read = Delta::read(&mut from).unwrap();
                prop_assert!(from.is_empty());
                let mut page = old.clone();
                read.apply(&mut page);
                prop_assert_eq!(page, new);
                for end in 0..bytes.len() {
                    prop_assert!(Delta::read(&mut Bytes::new(&bytes[..end])).is_err());
                }
            }
        }

        #[test]
        fn any_bytes_are_refused_or_change_one_page(
            bytes in proptest::collection::vec(prop_oneof![Just(0u8), 0u8..4, any::<u8>()], 0..200),
        ) {
            let mut from = Bytes::new(&bytes);
            if let Ok(delta) = Delta::read(&mut from) {
                let mut page = [7; PAGE_SIZE];
                delta.apply(&mut page);
                prop_assert_eq!(delta.0.len() + from.rest().len(), bytes.len());
            }
        }
    }
}
