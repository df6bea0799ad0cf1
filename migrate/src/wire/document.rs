//! The rare messages: JSON documents. Fields that a version does not know are skipped.

use super::Text;
use crate::digest::{DigestKey, MemoryDigest};
use crate::group::Nonce;
use crate::guest::xen::stream::record::{CPUID_LEAF_SIZE, MSR_ENTRY_SIZE};
use crate::guest::xen::stream::state::{DomainKind, StateError, StaticData};
use crate::hexadecimal::{self, NotHexadecimal};
use crate::link::direct::PublicKey;
use crate::pages::MAX_PAGES;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Identifies a move at both ends, in the journal too: 16 random bytes, written like a UUID.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MoveId(pub [u8; 16]);

/// Text that is no [`MoveId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Expected an identifier like 01234567-89ab-cdef-0123-456789abcdef")]
pub struct NotAMoveId;

impl MoveId {
    /// Makes an identifier of 16 random bytes: a UUID of version 4.
    #[must_use]
    pub const fn from_random(mut bytes: [u8; 16]) -> Self {
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Self(bytes)
    }
}

impl fmt::Display for MoveId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for MoveId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MoveId {
    type Err = NotAMoveId;

    fn from_str(text: &str) -> Result<Self, NotAMoveId> {
        let mut bytes = [0; 16];
        if !is_uuid(text) || hexadecimal::parse_into(&text.replace('-', ""), &mut bytes).is_none() {
            return Err(NotAMoveId);
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for MoveId {
    type Error = NotAMoveId;

    fn try_from(text: String) -> Result<Self, NotAMoveId> {
        text.parse()
    }
}

impl From<MoveId> for String {
    fn from(id: MoveId) -> Self {
        id.to_string()
    }
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// What lets one more connection join a move: 16 random bytes, written as hexadecimal digits.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JoinToken([u8; 16]);

impl JoinToken {
    /// A token of bytes that must come from a good source of randomness.
    #[must_use]
    pub const fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

/// Takes the same time whatever the two are: how much of it was guessed doesn't show.
impl PartialEq for JoinToken {
    fn eq(&self, other: &Self) -> bool {
        let differing = self
            .0
            .iter()
            .zip(&other.0)
            .fold(0, |all, (a, b)| std::hint::black_box(all | (a ^ b)));
        differing == 0
    }
}

impl Eq for JoinToken {}

/// Does not show the token.
impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinToken(..)")
    }
}

impl TryFrom<String> for JoinToken {
    type Error = NotHexadecimal;

    fn try_from(text: String) -> Result<Self, NotHexadecimal> {
        hexadecimal::parse(&text).map(Self)
    }
}

impl From<JoinToken> for String {
    fn from(token: JoinToken) -> Self {
        hexadecimal::format(&token.0)
    }
}

/// The kinds of guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestKind {
    /// Paravirtualised, 64 bits.
    Pv,
    /// Hardware-assisted, without a device model.
    Pvh,
    /// Hardware-assisted, with a device model.
    Hvm,
}

impl GuestKind {
    /// What a migration stream calls it.
    #[must_use]
    pub const fn domain_kind(self) -> DomainKind {
        match self {
            Self::Pv => DomainKind::Pv64,
            Self::Pvh | Self::Hvm => DomainKind::Hvm,
        }
    }
}

/// What the guest's processor can do.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuPolicy {
    /// An array of `xen_cpuid_leaf_t`, as hexadecimal digits.
    #[serde(with = "hexadecimal")]
    pub leaves: Vec<u8>,
    /// An array of `xen_msr_entry_t`, as hexadecimal digits.
    #[serde(with = "hexadecimal")]
    pub msrs: Vec<u8>,
}

impl fmt::Debug for CpuPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuPolicy")
            .field("leaves", &(self.leaves.len() / CPUID_LEAF_SIZE))
            .field("msrs", &(self.msrs.len() / MSR_ENTRY_SIZE))
            .finish()
    }
}

/// What the guest's time stamp counter is at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TscOffer {
    /// One of Xen's `TSC_MODE_*`.
    pub mode: u32,
    /// Its frequency in kHz.
    pub khz: u32,
}

/// A version of Xen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct XenVersion {
    /// As 4 in 4.17.5.
    pub major: u32,
    /// As 17 in 4.17.5.
    pub minor: u32,
    /// As ".5" in 4.17.5.
    pub extra: Text,
}

/// What the source says of the guest that is to move.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// Identifies this move.
    pub move_id: MoveId,
    /// The guest's name.
    pub name: String,
    /// The guest's UUID, in its usual form.
    pub uuid: String,
    /// The kind of the guest.
    pub kind: GuestKind,
    /// The number of its pfns: one more than the highest.
    pub pages: u64,
    /// The number of its pages that have memory (Xen's tot_pages).
    pub populated_pages: u64,
    /// The number of its vCPUs, online or not.
    pub vcpus: u32,
    /// Its configuration, as from `libxl_domain_config_to_json`.
    pub configuration: serde_json::Value,
    /// What its processor can do.
    pub cpu_policy: CpuPolicy,
    /// Its time stamp counter.
    pub tsc: TscOffer,
    /// The Xen that it runs on.
    pub xen: XenVersion,
    /// The secret of the digests of its pages.
    pub digest_key: DigestKey,
    /// Whether everything is to be read and compared once more.
    #[serde(default)]
    pub verify: bool,
    /// What the pages are for.
    #[serde(default)]
    pub purpose: Purpose,
    /// How many connections the source would like to send the pages by, besides this one; 0 where
    /// they are to come by this one.
    #[serde(default)]
    pub connections: u32,
    /// How these could come directly; none where the source would have them come by ssh.
    #[serde(default)]
    pub direct: Option<DirectOffer>,
}

/// What a destination has to know of direct connections before they come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectOffer {
    /// Who they come from.
    pub key: PublicKey,
    /// How many of them.
    pub connections: u32,
    /// How much each is to have on its way at the most, in bytes.
    pub window: u32,
}

/// Where a destination takes direct connections, at the address by which ssh has reached it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectDoor {
    /// The port of TCP.
    pub port: u16,
    /// Who answers there.
    pub key: PublicKey,
}

/// What a guest's pages cross for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// The guest is to run at the destination.
    #[default]
    Move,
    /// The destination keeps them as a shadow, and the guest stays where it is.
    Shadow,
    /// Nothing: the destination is only to say if it would take the guest, and makes nothing.
    DryRun,
}

/// An offer that does not hold together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// The name is empty, too long, or has characters that no guest's name may have.
    #[error("Guest's name is not one")]
    Name,
    /// The UUID is not one.
    #[error("Guest's UUID is not one")]
    Uuid,
    /// No guest has so much memory, or so little.
    #[error("Guest's memory of {populated} of {pages} pages is not possible")]
    Memory {
        /// The number of pfns.
        pages: u64,
        /// The number of pages with memory.
        populated: u64,
    },
    /// No guest has so many vCPUs.
    #[error("Guest's number of {0} vCPUs is not possible")]
    Vcpus(u32),
    /// The CPU policy is not made of its entries.
    #[error("Guest's CPU policy is malformed")]
    CpuPolicy(#[from] StateError),
}

impl Offer {
    /// Checks what can be checked without asking Xen.
    ///
    /// # Errors
    /// Fails on the first field that is not possible.
    pub fn check(&self) -> Result<(), OfferError> {
        if !is_name(&self.name) {
            return Err(OfferError::Name);
        }
        // It is compared with what Xen's tools write, and stands in files' names.
        if !is_uuid(&self.uuid) || self.uuid.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(OfferError::Uuid);
        }
        let (pages, populated) = (self.pages, self.populated_pages);
        if !(1..=MAX_PAGES).contains(&pages) || !(1..=pages).contains(&populated) {
            return Err(OfferError::Memory { pages, populated });
        }
        if !(1..=crate::guest::xen::stream::record::MAX_VCPUS).contains(&self.vcpus) {
            return Err(OfferError::Vcpus(self.vcpus));
        }
        self.static_data().check()?;
        Ok(())
    }

    /// What the migration stream begins with.
    #[must_use]
    pub fn static_data(&self) -> StaticData {
        StaticData {
            kind: self.kind.domain_kind(),
            xen_version: (self.xen.major, self.xen.minor),
            cpuid_policy: self.cpu_policy.leaves.clone(),
            msr_policy: self.cpu_policy.msrs.clone(),
        }
    }
}

/// Whether text may be a guest's name: what xl takes, and what is safe in a path of xenstore and
/// on a terminal.
pub(crate) fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 200
        && Text::new(text).as_str() == text
        && !text.contains('/')
        && !text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Does not show the configuration, which may hold passwords.
impl fmt::Debug for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Offer")
            .field("move_id", &self.move_id)
            .field("name", &self.name)
            .field("uuid", &self.uuid)
            .field("kind", &self.kind)
            .field("pages", &self.pages)
            .field("populated_pages", &self.populated_pages)
            .field("vcpus", &self.vcpus)
            .field("cpu_policy", &self.cpu_policy)
            .field("tsc", &self.tsc)
            .field("xen", &self.xen)
            .field("verify", &self.verify)
            .finish_non_exhaustive()
    }
}

/// What the destination says when the guest may come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acceptance {
    /// The Xen that it will run on.
    pub xen: XenVersion,
    /// The frequency of the destination's time stamp counter in kHz, if it is known.
    #[serde(default)]
    pub tsc_khz: Option<u32>,
    /// What the user should know, one line each.
    #[serde(default)]
    pub warnings: Vec<Text>,
    /// What the destination is called at the edge that keeps the guest's connections.
    #[serde(default)]
    pub edge_site: Option<Text>,
    /// What the destination has of the guest's memory already.
    #[serde(default)]
    pub shadow: Option<ShadowHead>,
    /// What lets the connections join that the source would like to send pages by; none where it
    /// wants none, or none are taken.
    #[serde(default)]
    pub join: Option<JoinToken>,
    /// Where these may come directly; none where they are to come by ssh.
    #[serde(default)]
    pub direct: Option<DirectDoor>,
    /// The trust group of which the destination shares contents, if the source proves its key.
    #[serde(default)]
    pub group: Option<GroupOffer>,
}

/// That contents of a trust group can be shared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupOffer {
    /// The group's name.
    pub name: Text,
    /// What the key is to be proved over.
    pub nonce: Nonce,
}

/// What a destination has of a guest's memory already, in few words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShadowHead {
    /// It is the guest as it was when its memory had this digest. Where the source knows that
    /// memory's table it needs no inventory.
    #[serde(default)]
    pub basis: Option<MemoryDigest>,
    /// But for these pages: the first, and how many.
    #[serde(default)]
    pub lacking: Vec<(u64, u64)>,
}

/// Why a destination does not take a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalCode {
    /// A domain of that name or UUID is there already.
    Exists,
    /// There is not enough free memory.
    Memory,
    /// The processor lacks what the guest's has.
    CpuPolicy,
    /// The configuration has something that cannot move or is not allowed.
    Configuration,
    /// The kind of guest cannot be received there.
    Kind,
    /// Another move of this guest is under way.
    Busy,
    /// Its Xen cannot be used.
    Host,
    /// Another reason, or one that a later version knows.
    #[serde(other)]
    Other,
}

/// Why a destination does not take a guest, and the words for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The reason, for programs.
    pub code: RefusalCode,
    /// The reason, for people.
    pub reason: Text,
}

/// A part of a span of time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// What was done.
    pub name: Text,
    /// How long it took.
    pub seconds: f64,
}

impl Part {
    /// The longest that anything takes, in seconds: a day.
    const LONGEST: f64 = 86_400.0;

    /// Whether anything could have taken so long. What is said here goes into what this host
    /// remembers of its moves.
    #[must_use]
    pub fn can_be(&self) -> bool {
        (0.0..=Self::LONGEST).contains(&self.seconds)
    }
}

/// What the destination says when the guest is complete.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Readiness {
    /// The digest of the memory that it has.
    pub digest: MemoryDigest,
    /// What it did since the last page arrived.
    #[serde(default)]
    pub parts: Vec<Part>,
    /// The most memory of its own that it had at the end of a round, in bytes.
    #[serde(default)]
    pub memory: u64,
}
