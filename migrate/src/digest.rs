//! Digests of pages and of a guest's whole memory.
//!
//! A page's digest is 128 bits of xxh3 over its normalised content, mixed with its type: Xen
//! changes a page's type without changing a byte, and the destination has to know.
//!
//! ```text
//!   key, 32 bytes, a secret of the guest's
//!     | BLAKE3 expands it, once
//!     +--> secret, 192 bytes --> xxh3-128(content) --+
//!     +--> 16 masks, one a page type ----------------+-- xor --> PageDigest
//!
//!   MemoryDigest = xxh3-128(pages | type 0, digest 0 | type 1, digest 1 | ...), by the same secret
//! ```
//!
//! A guest chooses its own content, and xxh3 resists nobody who knows its secret. So every guest
//! has a secret of its own, its shadows keep it, and it is in no log. A digest made by it answers
//! for content of this one guest only.

pub use crate::hexadecimal::NotHexadecimal;

use crate::hexadecimal;
use crate::pages::{Page, PageType};
use serde::{Deserialize, Serialize};
use std::fmt;
use xxhash_rust::xxh3::{Xxh3, xxh3_128_with_secret};

/// Tells BLAKE3 what this key is expanded for. It belongs to the format: with another text, every
/// digest is another.
const CONTEXT: &str = "VMShadow 2026 page digest v1";

const SECRET_SIZE: usize = 192;

/// The secret of a guest's digests: 32 random bytes.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DigestKey([u8; 32]);

impl DigestKey {
    /// A key of bytes that must come from a good source of randomness.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, to keep beside the digests that were made by them.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Does not show the key.
impl fmt::Debug for DigestKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DigestKey(..)")
    }
}

impl TryFrom<String> for DigestKey {
    type Error = NotHexadecimal;

    fn try_from(text: String) -> Result<Self, NotHexadecimal> {
        hexadecimal::parse(&text).map(Self)
    }
}

impl From<DigestKey> for String {
    fn from(key: DigestKey) -> Self {
        hexadecimal::format(&key.0)
    }
}

/// The digest of one page: its type and its normalised content.
///
/// Zero stands for "not known": no page has it, but by a chance of one in 2^128.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct PageDigest(pub [u8; 16]);

impl PageDigest {
    /// No digest: equal to no page's.
    pub const UNKNOWN: Self = Self([0; 16]);
}

impl fmt::Debug for PageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hexadecimal::format(&self.0))
    }
}

/// The digest of a page's normalised content, whatever its type.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentDigest(u128);

impl ContentDigest {
    /// Some bits of it, as good as random.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0 as u64
    }
}

impl fmt::Debug for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hexadecimal::format(&self.0.to_le_bytes()))
    }
}

/// The digest of all of a guest's memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MemoryDigest(pub [u8; 16]);

impl fmt::Debug for MemoryDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for MemoryDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hexadecimal::format(&self.0))
    }
}

impl TryFrom<String> for MemoryDigest {
    type Error = NotHexadecimal;

    fn try_from(text: String) -> Result<Self, NotHexadecimal> {
        hexadecimal::parse(&text).map(Self)
    }
}

impl From<MemoryDigest> for String {
    fn from(digest: MemoryDigest) -> Self {
        hexadecimal::format(&digest.0)
    }
}

/// The digests of pages of zeros, made once: asking for each anew is as much work as digesting it.
#[derive(Debug, Clone)]
pub struct Zeros([PageDigest; 16]);

impl Zeros {
    /// That of a type.
    #[must_use]
    pub fn of(&self, page_type: PageType) -> PageDigest {
        self.0[usize::from(page_type.bits())]
    }
}

/// Makes the digests of one guest.
#[derive(Clone)]
pub struct Digester {
    secret: [u8; SECRET_SIZE],
    masks: [u128; 16],
}

impl fmt::Debug for Digester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Digester(..)")
    }
}

impl Digester {
    /// Expands a guest's key.
    #[must_use]
    pub fn new(key: &DigestKey) -> Self {
        let mut expanded = blake3::Hasher::new_derive_key(CONTEXT)
            .update(&key.0)
            .finalize_xof();
        let mut secret = [0; SECRET_SIZE];
        expanded.fill(&mut secret);
        let masks = std::array::from_fn(|_| {
            let mut mask = [0; 16];
            expanded.fill(&mut mask);
            u128::from_le_bytes(mask)
        });
        Self { secret, masks }
    }

    /// The digest of a page with content. Only the caller knows whether the content is normalised.
    ///
    /// For a type without content, the content does not count.
    #[must_use]
    pub fn page(&self, page_type: PageType, content: &Page) -> PageDigest {
        if !page_type.has_data() {
            return self.hole(page_type);
        }
        self.mix(page_type, xxh3_128_with_secret(content, &self.secret))
    }

    /// The digest of a page that has a type only.
    #[must_use]
    pub fn hole(&self, page_type: PageType) -> PageDigest {
        self.mix(page_type, 0)
    }

    /// The digest of a page of zeros. It is constant for a type: keep it rather than ask again.
    #[must_use]
    pub fn zero(&self, page_type: PageType) -> PageDigest {
        self.page(page_type, &[0; crate::pages::PAGE_SIZE])
    }

    /// Tells pages of zeros by their digests.
    #[must_use]
    pub fn zeros(&self) -> Zeros {
        let mut digests = [PageDigest::UNKNOWN; 16];
        for page_type in PageType::ALL {
            digests[usize::from(page_type.bits())] = self.zero(page_type);
        }
        Zeros(digests)
    }

    /// What a page's digest says of its content alone, for a type that has one.
    #[must_use]
    pub fn content(&self, page_type: PageType, digest: PageDigest) -> ContentDigest {
        let mask = self.masks[usize::from(page_type.bits())];
        ContentDigest(u128::from_le_bytes(digest.0) ^ mask)
    }

    /// The digest of a page of that content.
    #[must_use]
    pub fn with_type(&self, content: ContentDigest, page_type: PageType) -> PageDigest {
        if !page_type.has_data() {
            return self.hole(page_type);
        }
        self.mix(page_type, content.0)
    }

    fn mix(&self, page_type: PageType, digest: u128) -> PageDigest {
        PageDigest((digest ^ self.masks[usize::from(page_type.bits())]).to_le_bytes())
    }

    /// The digest of a whole memory: of the number of its pages, and of every page's type and
    /// digest in the order of the pfns.
    ///
    /// `types` and `digests` are indexed by pfn; what one of them lacks counts as a hole
    /// ([`PageType::Invalid`]) without a digest. For a type without content, its digest does not
    /// count, so that both ends agree on a hole whatever was there before.
    #[must_use]
    pub fn memory(&self, types: &[PageType], digests: &[PageDigest]) -> MemoryDigest {
        const BATCH: usize = 256;
        const ENTRY: usize = 17;

        let pages = types.len().max(digests.len());
        let mut hasher = Xxh3::with_secret(self.secret);
        hasher.update(&(pages as u64).to_le_bytes());
        let mut batch = [0; BATCH * ENTRY];
        for first in (0..pages).step_by(BATCH) {
            let count = BATCH.min(pages - first);
            let (entries, _) = batch.as_chunks_mut::<ENTRY>();
            for (entry, pfn) in entries.iter_mut().zip(first..first + count) {
                let page_type = types.get(pfn).copied().unwrap_or(PageType::Invalid);
                let digest = match digests.get(pfn) {
                    Some(digest) if page_type.has_data() => digest.0,
                    _ => PageDigest::UNKNOWN.0,
                };
                entry[0] = page_type.bits();
                entry[1..].copy_from_slice(&digest);
            }
            hasher.update(&batch[..count * ENTRY]);
        }
        MemoryDigest(hasher.digest128().to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::PAGE_SIZE;
    use proptest::prelude::*;

    fn digester() -> Digester {
        Digester::new(&DigestKey::new([7; 32]))
    }

    #[test]
    fn the_same_everywhere_and_for_ever() {
        // Kept shadows hold digests: these must not change from one version to the next.
        let digester = digester();
        let page: Page = std::array::from_fn(|i| (i * 7 % 251) as u8);
        assert_eq!(
            format!("{:?}", digester.page(PageType::Normal, &page)),
            "b224b0ffb70866ec0912e46aeafc3b3b"
        );
        assert_eq!(
            format!("{:?}", digester.page(PageType::PinnedL4, &page)),
            "25ec1b4321a83b8d7b47f06319f8de8a"
        );
        let types = [PageType::Normal, PageType::Invalid];
        let digests = [digester.zero(PageType::Normal), PageDigest::UNKNOWN];
        assert_eq!(
            digester.memory(&types, &digests).to_string(),
            "2b87d8a18d58cf95cece7154cc28950d"
        );
    }

    #[test]
    fn type_content_and_key_all_count() {
        let page = [1; PAGE_SIZE];
        let mut seen = std::collections::HashSet::new();
        for key in [[1; 32], [2; 32]] {
            let digester = Digester::new(&DigestKey::new(key));
            for page_type in PageType::ALL {
                assert!(seen.insert(digester.hole(page_type)));
                if page_type.has_data() {
                    assert!(seen.insert(digester.page(page_type, &page)));
                    assert!(seen.insert(digester.zero(page_type)));
                } else {
                    assert_eq!(digester.page(page_type, &page), digester.hole(page_type));
                }
            }
        }
    }

    #[test]
    fn content_keeps_its_digest_through_types() {
        let digester = digester();
        let tables: Vec<_> = PageType::ALL
            .into_iter()
            .filter(|page_type| page_type.has_data())
            .collect();
        let (one, other) = ([1; PAGE_SIZE], [2; PAGE_SIZE]);
        let content = digester.content(PageType::Normal, digester.page(PageType::Normal, &one));
        for page_type in tables {
            let digest = digester.page(page_type, &one);
            assert_eq!(digester.content(page_type, digest), content);
            assert_eq!(digester.with_type(content, page_type), digest);
            let digest = digester.page(page_type, &other);
            assert_ne!(digester.content(page_type, digest), content);
        }
        assert_eq!(
            digester.with_type(content, PageType::Invalid),
            digester.hole(PageType::Invalid)
        );
    }

    #[test]
    fn a_key_is_not_shown() {
        let key = DigestKey::new([0xab; 32]);
        assert!(!format!("{key:?} {:?}", Digester::new(&key)).contains("ab"));
        let text = serde_json::to_string(&key).unwrap();
        assert_eq!(serde_json::from_str::<DigestKey>(&text).unwrap(), key);
        assert!(serde_json::from_str::<DigestKey>("\"abcd\"").is_err());
        assert!(serde_json::from_str::<DigestKey>(&text.replace('b', "g")).is_err());
    }

    #[test]
    fn holes_agree_whatever_was_there() {
        let digester = digester();
        let page = digester.page(PageType::Normal, &[3; PAGE_SIZE]);
        let types = [PageType::Normal, PageType::Invalid, PageType::AllocateOnly];
        let clean = digester.memory(&types, &[page, PageDigest::UNKNOWN, PageDigest::UNKNOWN]);
        assert_eq!(digester.memory(&types, &[page, page, page]), clean);
        assert_eq!(digester.memory(&types, &[page]), clean);
        assert_ne!(digester.memory(&types[..2], &[page]), clean);
        // A guest that grew holes at its end is another guest.
        let mut longer = types.to_vec();
        longer.push(PageType::Invalid);
        assert_ne!(digester.memory(&longer, &[page]), clean);
    }

    proptest! {
        #[test]
        fn one_difference_shows(
            count in 1usize..700,
            at in any::<prop::sample::Index>(),
            bit in 0usize..128,
        ) {
            let digester = digester();
            let types = vec![PageType::Normal; count];
            let digests: Vec<_> = (0..count)
                .map(|i| PageDigest((i as u128 * 0x1234_5678_9abc).to_le_bytes()))
                .collect();
            let before = digester.memory(&types, &digests);
            let at = at.index(count);
            let mut changed = digests.clone();
            changed[at].0[bit / 8] ^= 1 << (bit % 8);
            prop_assert_ne!(digester.memory(&types, &changed), before);
            let mut retyped = types.clone();
            retyped[at] = PageType::L1;
            prop_assert_ne!(digester.memory(&retyped, &digests), before);
        }
    }
}
