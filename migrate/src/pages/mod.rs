//! Guest pages: their numbers, their types, and sets of them.
//!
//! A guest's memory is an array of 4 KiB pages. The guest counts them by *pfn*, from zero without
//! regard to where they are; the host counts its own pages by *mfn*. A page that crosses is its
//! type and its content, with every mfn inside rewritten to a pfn:
//!
//! ```text
//!   pfn      0     1     2     3     4     5    ...  pages - 1
//!          +-----+-----+-----+-----+-----+-----+   +-----+
//!   type   | no  | no  | L1  | L2  |  X  | no  |   | no  |    4 bits each: PageType
//!          +-----+-----+-----+-----+-----+-----+   +-----+
//!   dirty     1     0     1     1     0     0         1       1 bit each: PageSet
//! ```

mod kind;
mod set;

pub use kind::{PageType, UnknownPageType};
pub use set::{PageSet, Runs};

/// The number of a page as the guest counts, in units of [`PAGE_SIZE`].
pub type Pfn = u64;

/// The number of a page as the host counts, in units of [`PAGE_SIZE`].
pub type Mfn = u64;

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;

/// The most pages a guest may have: 4 TiB. It bounds what a peer can make us allocate.
pub const MAX_PAGES: u64 = 1 << 30;

/// The content of one page.
pub type Page = [u8; PAGE_SIZE];

/// Whether every byte of a page is zero.
///
/// A page that is not zero mostly shows it in its first bytes, so the check goes in steps and
/// ends at the first one that differs.
#[must_use]
pub fn is_zero(page: &Page) -> bool {
    let (blocks, _) = page.as_chunks::<128>();
    blocks.iter().all(|block| {
        let (words, _) = block.as_chunks::<8>();
        words
            .iter()
            .fold(0, |all, word| all | u64::from_ne_bytes(*word))
            == 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_page_of_zeros_is_zero() {
        let mut page = [0; PAGE_SIZE];
        assert!(is_zero(&page));
        for at in 0..PAGE_SIZE {
            page[at] = 1;
            assert!(!is_zero(&page), "a byte at {at} went unseen");
            page[at] = 0;
        }
    }
}
