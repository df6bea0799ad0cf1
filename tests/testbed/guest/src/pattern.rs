//! Page contents that can be made again from a few numbers, so that a page can
//! be checked in full against what was once written to it.
//!
//! A page is 512 words. The first three name it, and the rest follow from them:
//!
//! ```text
//! word 0      seed         one for each workload
//! word 1      index        the page's place in the workload
//! word 2      generation   how often it was rewritten
//! word 3...   stream       xorshift from the three
//! ```
//! A page that is lost, stale, torn, or in another page's place is noticed.

/// Words of a page: 4,096 bytes.
pub const WORDS: usize = 512;

/// A page as words.
pub type Page = [u64; WORDS];

/// One step of the splitmix64 generator: spreads the bits of `value`.
#[must_use]
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The stream behind a page's three names.
fn stream(seed: u64, index: u64, generation: u64) -> impl Iterator<Item = u64> {
    let mut state = mix(seed ^ mix(index ^ mix(generation))) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    })
}

/// Writes the page of these names. Its content can't be compressed.
pub fn fill(page: &mut Page, seed: u64, index: u64, generation: u64) {
    let names = [seed, index, generation].into_iter();
    for (word, value) in page
        .iter_mut()
        .zip(names.chain(stream(seed, index, generation)))
    {
        *word = value;
    }
}

/// Whether the page is exactly what [`fill`] wrote.
#[must_use]
pub fn holds(page: &Page, seed: u64, index: u64, generation: u64) -> bool {
    let names = [seed, index, generation].into_iter();
    page.iter()
        .zip(names.chain(stream(seed, index, generation)))
        .all(|(word, value)| *word == value)
}

/// Writes a page like those of a usual program: runs of text out of a small
/// vocabulary, and a quarter of it zero. Its content compresses well.
pub fn fill_text(page: &mut Page, seed: u64, index: u64) {
    for (place, word) in page.iter_mut().enumerate() {
        *word = text_word(seed, index, place);
    }
}

/// Whether the page is exactly what [`fill_text`] wrote.
#[must_use]
pub fn holds_text(page: &Page, seed: u64, index: u64) -> bool {
    page.iter()
        .enumerate()
        .all(|(place, word)| *word == text_word(seed, index, place))
}

/// One word of a text page.
fn text_word(seed: u64, index: u64, place: usize) -> u64 {
    const VOCABULARY: [&[u8; 8]; 16] = [
        b"session ",
        b"message ",
        b"connect ",
        b"request ",
        b"timeout ",
        b"address ",
        b"network ",
        b"desktop ",
        b"storage ",
        b"pointer ",
        b"virtual ",
        b"machine ",
        b"journal ",
        b"display ",
        b"process ",
        b"kernel: ",
    ];
    match place {
        0 => seed,
        1 => index,
        384.. => 0,
        _ => {
            let pick = mix(seed ^ mix(index) ^ (place as u64 / 4)).wrapping_add(place as u64) % 16;
            usize::try_from(pick)
                .ok()
                .and_then(|pick| VOCABULARY.get(pick))
                .map_or(0, |text| u64::from_le_bytes(**text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_and_every_other_name_shows() {
        let mut page = [0; WORDS];
        fill(&mut page, 1, 2, 3);
        assert!(holds(&page, 1, 2, 3));
        assert!(!holds(&page, 9, 2, 3) && !holds(&page, 1, 9, 3) && !holds(&page, 1, 2, 4));
        for place in 0..WORDS {
            page[place] ^= 1 << (place % 64);
            assert!(!holds(&page, 1, 2, 3));
            page[place] ^= 1 << (place % 64);
        }
        assert!(holds(&page, 1, 2, 3));
    }

    #[test]
    fn generations_share_no_words() {
        let (mut one, mut two) = ([0; WORDS], [0; WORDS]);
        fill(&mut one, 1, 2, 3);
        fill(&mut two, 1, 2, 4);
        let same = one
            .iter()
            .zip(&two)
            .skip(2)
            .filter(|(one, two)| one == two)
            .count();
        assert_eq!(same, 0);
    }

    #[test]
    fn text_pages_are_checked_too() {
        let mut page = [0; WORDS];
        fill_text(&mut page, 1, 2);
        assert!(holds_text(&page, 1, 2) && !holds_text(&page, 1, 3));
        page[100] ^= 1;
        assert!(!holds_text(&page, 1, 2));
    }
}
