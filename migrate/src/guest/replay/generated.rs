//! Content that is made from numbers: the same everywhere, and as guests have it in kind.

use crate::pages::{PAGE_SIZE, Page};

/// A generator of numbers that is the same everywhere (SplitMix64).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Random(u64);

impl Random {
    /// Starts from `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Random(seed)
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// The next number below `limit`; 0 where that is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// What a page is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Entries of a table, most of them in a row.
    Table,
    /// Records of 64 bytes: pointers near each other, small numbers, flags, a hash.
    Records,
    /// Words of a language.
    Text,
    /// What nothing makes smaller.
    Noise,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 4] = [Kind::Table, Kind::Records, Kind::Text, Kind::Noise];
}

/// A page that is made whenever it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Made {
    /// What it is like.
    pub kind: Kind,
    /// Which of its kind.
    pub seed: u64,
}

impl Made {
    /// Makes it.
    #[must_use]
    pub fn page(&self) -> Page {
        page(self.kind, &mut Random::new(self.seed))
    }
}

/// A page of a kind.
pub fn page(kind: Kind, random: &mut Random) -> Page {
    match kind {
        Kind::Table => {
            let first = random.next() & 0xf_ffff;
            words(|at| ((first + at) << 12) | 0x67)
        }
        Kind::Records => {
            let heap = 0x7f00_0000_0000 | (random.next() & 0xffff_f000);
            words(|at| match at % 8 {
                0 | 1 => heap + random.next() % (1 << 20) / 16 * 16,
                2 => random.next() % 1000,
                3 => random.next() % 4,
                4 => random.next(),
                _ => 0,
            })
        }
        Kind::Text => text(random),
        Kind::Noise => words(|_| random.next()),
    }
}

/// What a guest does to a page that it works with: it changes some words, or a stretch.
pub fn edit(page: &mut Page, random: &mut Random) {
    if random.below(3) > 0 {
        for _ in 0..=random.below(24) {
            let at = random.below(PAGE_SIZE / 8) * 8;
            let word = random.next() >> random.below(60);
            page[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
    } else {
        let new = text(random);
        let (from, length) = (random.below(PAGE_SIZE), random.below(1500));
        let end = (from + length).min(PAGE_SIZE);
        page[from..end].copy_from_slice(&new[from..end]);
    }
}

fn words(mut word: impl FnMut(u64) -> u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    let (places, _) = page.as_chunks_mut::<8>();
    for (place, at) in places.iter_mut().zip(0..) {
        *place = word(at).to_le_bytes();
    }
    page
}

fn text(random: &mut Random) -> Page {
    const SYLLABLES: [&[u8]; 16] = [
        b"the ", b"mi", b"gra", b"tion ", b"of ", b"a ", b"guest", b"ing ", b"net", b"work ",
        b"to ", b"er ", b"al", b"page", b".\n", b"0x",
    ];
    let mut page = [b' '; PAGE_SIZE];
    let mut at = 0;
    while at < PAGE_SIZE {
        let syllable = SYLLABLES[random.below(16)];
        let end = (at + syllable.len()).min(PAGE_SIZE);
        page[at..end].copy_from_slice(&syllable[..end - at]);
        at = end;
    }
    page
}
