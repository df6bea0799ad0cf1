//! The ways to write a block.

use serde::Serialize;

/// How the content of a batch's raw pages is written. From the cheapest to the one that shrinks
/// most; all zstd levels are one compression on the wire.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Technique {
    /// As it is.
    #[default]
    Stored,
    /// LZ4.
    Lz4,
    /// zstd at level 1.
    Zstd1,
    /// zstd at level 3.
    Zstd3,
    /// zstd at level 6.
    Zstd6,
}

impl Technique {
    /// All, in their order.
    pub const ALL: [Self; 5] = [
        Self::Stored,
        Self::Lz4,
        Self::Zstd1,
        Self::Zstd3,
        Self::Zstd6,
    ];

    /// The level of those that are zstd.
    pub(super) const fn zstd_level(self) -> Option<i32> {
        match self {
            Self::Stored | Self::Lz4 => None,
            Self::Zstd1 => Some(1),
            Self::Zstd3 => Some(3),
            Self::Zstd6 => Some(6),
        }
    }

    /// Whether it makes use of the block before: for those that are taken where the link is slow,
    /// it is worth the time.
    pub(super) const fn looks_back(self) -> bool {
        matches!(self, Self::Zstd3 | Self::Zstd6)
    }

    /// Whether noise goes beside its blocks. zstd may find a part of it that is somewhere else in
    /// the block as well, as of a file that is just read; and loses little time where it finds
    /// none.
    pub(super) const fn leaves_noise(self) -> bool {
        matches!(self, Self::Stored | Self::Lz4)
    }

    /// The next stronger one.
    pub(super) fn stronger(self) -> Option<Self> {
        Self::ALL.get(self as usize + 1).copied()
    }

    /// The next cheaper one.
    pub(super) fn cheaper(self) -> Option<Self> {
        Self::ALL.get((self as usize).checked_sub(1)?).copied()
    }
}

/// Raw pages by the technique that wrote them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PagesByTechnique {
    /// By [`Technique::Stored`], also where another one didn't make them smaller.
    pub stored: u64,
    /// By [`Technique::Lz4`].
    pub lz4: u64,
    /// By [`Technique::Zstd1`].
    #[serde(rename = "zstd-1")]
    pub zstd_1: u64,
    /// By [`Technique::Zstd3`].
    #[serde(rename = "zstd-3")]
    pub zstd_3: u64,
    /// By [`Technique::Zstd6`].
    #[serde(rename = "zstd-6")]
    pub zstd_6: u64,
}

impl PagesByTechnique {
    /// Counts `pages` that `technique` wrote.
    pub fn add(&mut self, technique: Technique, pages: u64) {
        let count = match technique {
            Technique::Stored => &mut self.stored,
            Technique::Lz4 => &mut self.lz4,
            Technique::Zstd1 => &mut self.zstd_1,
            Technique::Zstd3 => &mut self.zstd_3,
            Technique::Zstd6 => &mut self.zstd_6,
        };
        *count += pages;
    }

    /// All of them.
    #[must_use]
    pub const fn all(&self) -> u64 {
        self.stored + self.lz4 + self.zstd_1 + self.zstd_3 + self.zstd_6
    }
}
