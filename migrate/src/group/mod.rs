//! Trust groups: guests whose contents may stand for one another.
//!
//! Guests of one organisation share kernels and libraries. Where both sites have the group's key,
//! what the destination's shadows hold of other guests of the group need not cross again:
//!
//! ```text
//!   source                                     destination
//!     | Offer: guest web-2 -------------------> |   web-* is group "acme" here
//!     | <------------- Accept: "acme", a nonce  |   and there are shadows of web-1, web-3
//!     | Prove: MAC of nonce and move ---------> |   by the same key
//!     | <-------------- Shares: names, names... |   of each content once: its place is its number
//!     | Pages: ... shared, place 17, witness -> |   reads it, and looks whether it has that name,
//!     |                                         |   and that witness
//! ```
//!
//! A content's name is keyed BLAKE3 of it, 128 bits: who lacks the key can neither make two
//! contents of one name nor tell what a name is of. A guest lacks it, whatever it writes to its
//! memory. So a name says "the same" of contents of different guests, which the digests that
//! [`digest`](crate::digest) makes never do (they are xxh3, and each guest's own). The digest of
//! the whole memory proves the move all the same.
//!
//! The key gives two others, one for names and one for proofs, by BLAKE3's derivation. A proof is
//! over a nonce of the destination's, so that one that was seen is of no use again.
//!
//! A proof says that somebody has the key, not that the peer does: a site to which a guest of the
//! group moves could pass a nonce of another one's on, and have it proved. So names are all that a
//! proof gives. Each page that is shared comes with a [`Witness`], more bytes of the hash that gave
//! its name: only who has the key, and the content, can say them.

mod known;
mod library;

pub use known::Known;
pub use library::{Library, MAX_LIBRARY};

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::configuration::absolute_path;
use crate::error::{Error, IoContext, Result, chain};
use crate::hexadecimal::{self, NotHexadecimal};
use crate::pages::Page;
use crate::wire::MoveId;

/// What the keys are derived for. It belongs to the format.
const NAMES: &str = "VMShadow 2026 trust group content name v1";
const PROOFS: &str = "VMShadow 2026 trust group proof v1";

/// Bytes of a [`ContentName`].
pub const NAME_SIZE: usize = 16;

/// Bytes of a [`Witness`].
pub const WITNESS_SIZE: usize = 8;

/// A trust group as the operator names it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupPolicy {
    /// Its name, the same at all sites.
    pub name: String,
    /// The file with its key: 64 hexadecimal digits, for its owner alone to read.
    #[serde(deserialize_with = "absolute_path")]
    pub key_file: PathBuf,
    /// The names of its guests. A `*` at the end stands for any rest.
    pub guests: Vec<String>,
}

/// The group that a guest of this name is in: the first that takes it.
#[must_use]
pub fn group_of<'a>(groups: &'a [GroupPolicy], guest: &str) -> Option<&'a GroupPolicy> {
    groups.iter().find(|group| takes(&group.guests, guest))
}

/// That group, opened. Without its key a guest moves all the same, and `warn` hears why it takes
/// longer.
pub fn open_group_of(
    groups: &[GroupPolicy],
    guest: &str,
    warn: impl FnOnce(String),
) -> Option<Group> {
    let opened = group_of(groups, guest)?.open();
    opened.map_err(|error| warn(chain(&error))).ok()
}

fn takes(guests: &[String], guest: &str) -> bool {
    guests
        .iter()
        .any(|pattern| match pattern.strip_suffix('*') {
            Some(start) => guest.starts_with(start),
            None => guest == pattern,
        })
}

impl GroupPolicy {
    /// Reads the key.
    ///
    /// # Errors
    /// [`Error::Refused`] where it is no key, or others may read it; [`Error::Io`].
    pub fn open(&self) -> Result<Group> {
        let path = self.key_file.display();
        let doing = || format!("Can't read the key of trust group {}: {path}", self.name);
        let mode = fs::metadata(&self.key_file).context(doing)?.mode();
        if mode & 0o077 != 0 {
            return Err(Error::Refused(format!(
                "Others than its owner may read the key of trust group {}: {path}",
                self.name
            )));
        }
        let text = fs::read_to_string(&self.key_file).context(doing)?;
        let key: [u8; 32] = hexadecimal::parse(text.trim()).map_err(|error| {
            Error::Refused(format!(
                "Bad key of trust group {}: {path}: {error}",
                self.name
            ))
        })?;
        Ok(Group::new(&self.name, &self.guests, &key))
    }
}

/// A trust group, with its keys.
#[derive(Clone)]
pub struct Group {
    name: String,
    guests: Vec<String>,
    names: Names,
    proofs: [u8; 32],
}

impl Group {
    /// The group `name` with these guests and this key.
    #[must_use]
    pub fn new(name: &str, guests: &[String], key: &[u8; 32]) -> Group {
        Group {
            name: name.to_owned(),
            guests: guests.to_vec(),
            names: Names(blake3::derive_key(NAMES, key)),
            proofs: blake3::derive_key(PROOFS, key),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether a guest of this name is in it.
    #[must_use]
    pub fn takes(&self, guest: &str) -> bool {
        takes(&self.guests, guest)
    }

    /// What names its contents.
    #[must_use]
    pub const fn names(&self) -> &Names {
        &self.names
    }

    /// Shows that this side has the key, to who chose `nonce` for the move.
    #[must_use]
    pub fn prove(&self, nonce: &Nonce, move_id: MoveId) -> Proof {
        let said = [nonce.0, move_id.0].concat();
        Proof(*blake3::keyed_hash(&self.proofs, &said).as_bytes())
    }

    /// Whether a peer has shown that it has the key.
    #[must_use]
    pub fn accepts(&self, proof: &Proof, nonce: &Nonce, move_id: MoveId) -> bool {
        // This comparison takes the same time whatever the two are.
        blake3::Hash::from_bytes(proof.0) == blake3::Hash::from_bytes(self.prove(nonce, move_id).0)
    }
}

/// Does not show the keys.
impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Names the contents of one group.
#[derive(Clone)]
pub struct Names([u8; 32]);

impl Names {
    /// The name of a content.
    #[must_use]
    pub fn of(&self, content: &Page) -> ContentName {
        self.witnessed(content).0
    }

    /// The name of a content, and what shows that it is known to who has the key.
    #[must_use]
    pub fn witnessed(&self, content: &Page) -> (ContentName, Witness) {
        let hash = blake3::keyed_hash(&self.0, content);
        let (name, rest) = hash.as_bytes().split_at(NAME_SIZE);
        let (witness, _) = rest.split_at(WITNESS_SIZE);
        let (mut named, mut known) = ([0; NAME_SIZE], [0; WITNESS_SIZE]);
        named.copy_from_slice(name);
        known.copy_from_slice(witness);
        (ContentName(named), Witness(known))
    }
}

/// Does not show the key.
impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Names(..)")
    }
}

/// What a content is called within its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentName(pub [u8; NAME_SIZE]);

/// What is said of a content besides its name, and crosses from the source alone: the destination
/// never tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Witness(pub [u8; WITNESS_SIZE]);

/// What a destination asks for to be proved over: 16 random bytes, as hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Nonce(pub [u8; 16]);

impl TryFrom<String> for Nonce {
    type Error = NotHexadecimal;

    fn try_from(text: String) -> std::result::Result<Self, NotHexadecimal> {
        hexadecimal::parse(&text).map(Self)
    }
}

impl From<Nonce> for String {
    fn from(nonce: Nonce) -> Self {
        hexadecimal::format(&nonce.0)
    }
}

/// Shows who has the key of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof(pub [u8; 32]);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::PAGE_SIZE;
    use std::os::unix::fs::PermissionsExt;

    fn group(key: u8) -> Group {
        Group::new("acme", &["web-*".into(), "db".into()], &[key; 32])
    }

    #[test]
    fn a_name_depends_on_every_byte_and_on_the_key() {
        let mut page = [7; PAGE_SIZE];
        let name = group(1).names().of(&page);
        assert_eq!(name, group(1).names().of(&page));
        assert_ne!(name, group(2).names().of(&page));
        let witnessed = group(1).names().witnessed(&page);
        assert_eq!(witnessed.0, name);
        // No part of the name.
        assert_ne!(name.0[..WITNESS_SIZE], witnessed.1.0);
        assert_ne!(name.0[WITNESS_SIZE..], witnessed.1.0);
        page[PAGE_SIZE - 1] ^= 1;
        assert_ne!(name, group(1).names().of(&page));
        assert_ne!(witnessed.1, group(1).names().witnessed(&page).1);
    }

    #[test]
    fn a_proof_holds_for_its_key_its_nonce_and_its_move() {
        let (nonce, other) = (Nonce([3; 16]), Nonce([4; 16]));
        let (id, another) = (MoveId([5; 16]), MoveId([6; 16]));
        let proof = group(1).prove(&nonce, id);
        assert!(group(1).accepts(&proof, &nonce, id));
        assert!(!group(2).accepts(&proof, &nonce, id));
        assert!(!group(1).accepts(&proof, &other, id));
        assert!(!group(1).accepts(&proof, &nonce, another));
        // Neither is a proof the name of anything.
        assert_ne!(group(1).names.0, group(1).proofs);
    }

    #[test]
    fn guests_are_named_whole_or_by_their_start() {
        let group = group(1);
        assert!(group.takes("db") && group.takes("web-1") && group.takes("web-"));
        assert!(!group.takes("db2") && !group.takes("we") && !group.takes(""));
    }

    #[test]
    fn a_key_is_read_and_one_that_others_may_read_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let policy = GroupPolicy {
            name: "acme".into(),
            key_file: root.path().join("key"),
            guests: vec!["db".into()],
        };
        assert!(matches!(policy.open(), Err(Error::Io { .. })));
        let write = |text: &str, mode: u32| {
            fs::write(&policy.key_file, text).unwrap();
            fs::set_permissions(&policy.key_file, fs::Permissions::from_mode(mode)).unwrap();
            policy.open()
        };
        let right = "01".repeat(32);
        let opened = write(&format!("{right}\n"), 0o600).unwrap();
        assert_eq!(opened.names.0, Group::new("acme", &[], &[1; 32]).names.0);
        let open_to_all = write(&right, 0o644).unwrap_err();
        let short = write(&right[2..], 0o600).unwrap_err();
        for error in [open_to_all, short] {
            let message = error.to_string();
            assert!(matches!(error, Error::Refused(_)), "{message}");
            assert!(!message.contains("0101"), "{message}");
        }
    }
}
