//! Which pages can't be made smaller, told by a look at a few of their bytes.
//!
//! What is encrypted, or compressed already, is among a guest's other pages: pictures, films and
//! archives in the cache of files, memory of a browser. A compressor finds nothing in it, and needs
//! as long for it; and where such pages are half of a batch, the other half seems to be hardly
//! worth it either. So each page is looked at by itself, where time is what counts: by techniques
//! that are there for fast links and small hosts.
//!
//! **What is counted** are pairs of equal bytes, in [`PIECES`] pieces from all over the page. Bytes
//! that come by chance have one pair in 256, give or take little. Text has eight times as many,
//! programs and tables more. It is the sample's collision entropy: at [`MOST_PAIRS`] it is 7.7 bits
//! a byte, and no code for single bytes saves more than 4 %.
//!
//! Pages of which a part repeats another one, with all bytes equally often in both, are not seen
//! to shrink: those of a file that was just read, which are in a buffer as well. Stronger techniques
//! look for that, and find a twentieth of the noise of a desktop. Where whole pages are alike, they
//! are references.

use crate::pages::Page;

/// The parts of the page that are looked at: the start of each.
const PIECES: usize = 8;

/// Bytes of each.
const PIECE: usize = 64;

/// Bytes by chance have 511 pairs, with a standard deviation of 23.
const MOST_PAIRS: u32 = 640;

/// Whether a page is not worth compressing.
///
/// Pages of 255 MB of a desktop that had more than this in common shrank to 0.27 (zstd -1), all
/// others not at all.
#[must_use]
pub fn is_noise(page: &Page) -> bool {
    // What counts is no more than the sample's length.
    let mut seen = [0u16; 256];
    let mut pairs = 0;
    for piece in page.chunks_exact(page.len() / PIECES) {
        for byte in &piece[..PIECE] {
            let seen = &mut seen[usize::from(*byte)];
            pairs += u32::from(*seen);
            *seen += 1;
        }
        // Most pages are done here after the first piece or two.
        if pairs > MOST_PAIRS {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::PAGE_SIZE;

    /// Bytes by chance, of the lowest so many bits.
    fn random(seed: u64, bits: u32) -> Page {
        let mut state = seed;
        std::array::from_fn(|_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (state >> (64 - bits)) as u8
        })
    }

    #[test]
    fn bytes_by_chance_are_noise() {
        assert!((0..1000).all(|seed| is_noise(&random(seed, 8))));
    }

    #[test]
    fn what_has_less_in_its_bytes_is_not() {
        for bits in [1, 4, 6, 7] {
            assert!((0..1000).all(|seed| !is_noise(&random(seed, bits))));
        }
        assert!(!is_noise(&[0; PAGE_SIZE]));
        // A quarter of it, of which the pieces see all there is to see.
        let mut page = random(7, 8);
        for piece in page.chunks_exact_mut(64) {
            piece[..16].fill(0);
        }
        assert!(!is_noise(&page));
    }

    #[test]
    fn numbers_are_not() {
        // Of which only the lower half counts.
        let mut page = random(3, 8);
        for number in page.as_chunks_mut::<8>().0 {
            number[5..].fill(0);
        }
        assert!(!is_noise(&page));
        let mut page = [0; PAGE_SIZE];
        let text = b"What is encrypted, or compressed already, is among a guest's other pages. ";
        for (byte, letter) in page.iter_mut().zip(text.iter().cycle()) {
            *byte = *letter;
        }
        assert!(!is_noise(&page));
    }
}
