//! The first message of each end, and what the two agree on.
//!
//! ```text
//!   "VMSHADOW" | u16 lowest | u16 highest | u8 role | u8 0 | u16 length of the rest
//!   u64 features | u8 length | program | what later versions add
//! ```
//!
//! This layout never changes. Both ends send theirs without waiting, and both pick by the same
//! rule.

use super::{Text, WireError};
use crate::bytes::Bytes;
use std::io::{self, Read, Write};

/// The lowest version of the protocol that this program speaks. Version 1 had no zstd, and
/// version 2 neither references nor deltas; version 3 knew nothing of shadows, of dry runs, nor of
/// connections that a guest has begun itself; version 4 had one connection for everything,
/// version 5 no trust groups, and version 6 no batches that build upon the block before,
/// nor did its sources say which connections they use. Version 9 gave shared contents out to whoever
/// said their places.
pub const MIN_PROTOCOL: u16 = 10;
/// The highest version of the protocol that this program speaks.
pub const MAX_PROTOCOL: u16 = 10;

const MAGIC: &[u8; 8] = b"VMSHADOW";
const HEADER_SIZE: usize = 16;
/// The most bytes after the header. It leaves later versions room.
const MAX_REST: usize = 1024;
const MAX_PROGRAM: usize = 64;

/// Which end of a move one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// The guest runs here.
    Source = 1,
    /// The guest is to run here.
    Destination = 2,
}

/// What each end says first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Which end it is.
    pub role: Role,
    /// The lowest version of the protocol that it speaks.
    pub min: u16,
    /// The highest version of the protocol that it speaks.
    pub max: u16,
    /// What it can do beyond its protocol version, one bit each. None is defined yet.
    pub features: u64,
    /// The program's version, for people to read.
    pub program: Text,
}

/// What two ends have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreement {
    /// The highest version of the protocol that both speak.
    pub version: u16,
    /// The features that both have.
    pub features: u64,
    /// The peer's program's version.
    pub peer_program: Text,
}

impl Hello {
    /// The hello of this program.
    #[must_use]
    pub fn new(role: Role) -> Self {
        Self {
            role,
            min: MIN_PROTOCOL,
            max: MAX_PROTOCOL,
            features: 0,
            program: Text::new(env!("CARGO_PKG_VERSION")),
        }
    }

    /// The hello's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let program = self.program.as_str().as_bytes();
        let program = &program[..program.len().min(MAX_PROGRAM)];
        let mut bytes = Vec::with_capacity(HEADER_SIZE + 9 + program.len());
        bytes.extend(MAGIC);
        bytes.extend(self.min.to_le_bytes());
        bytes.extend(self.max.to_le_bytes());
        bytes.extend([self.role as u8, 0]);
        // At most 73, by the limit above.
        bytes.extend((9 + program.len() as u16).to_le_bytes());
        bytes.extend(self.features.to_le_bytes());
        bytes.push(program.len() as u8);
        bytes.extend(program);
        bytes
    }

    /// Writes the hello, and flushes.
    ///
    /// # Errors
    /// Fails when the connection does.
    pub fn write(&self, mut to: impl Write) -> Result<(), WireError> {
        to.write_all(&self.encode())?;
        to.flush()?;
        Ok(())
    }

    /// Reads the peer's hello, and nothing behind it.
    ///
    /// # Errors
    /// Fails when the connection does or when something else than a hello comes.
    pub fn read(mut from: impl Read) -> Result<Self, WireError> {
        let mut header = [0; HEADER_SIZE];
        let mut filled = 0;
        // As soon as a byte is wrong no other is waited for: a shell's complaint may be shorter
        // than a hello.
        while filled < header.len() {
            let count = match from.read(&mut header[filled..]) {
                Ok(0) if filled == 0 => return Err(WireError::Truncated),
                Ok(0) => 0,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            filled += count;
            let magic = filled.min(MAGIC.len());
            if header[..magic] != MAGIC[..magic] {
                return Err(WireError::Foreign(Text::from_bytes(&header[..filled])));
            }
            if count == 0 {
                return Err(WireError::Truncated);
            }
        }
        let foreign = || WireError::Foreign(Text::from_bytes(&header));
        let mut fields = Bytes::new(&header[MAGIC.len()..]);
        let (Ok(min), Ok(max), Ok(role), Ok(_), Ok(length)) = (
            fields.u16(),
            fields.u16(),
            fields.u8(),
            fields.u8(),
            fields.u16(),
        ) else {
            return Err(foreign());
        };
        let role = match role {
            1 => Role::Source,
            2 => Role::Destination,
            _ => return Err(foreign()),
        };
        let length = usize::from(length);
        if length > MAX_REST || min > max {
            return Err(foreign());
        }
        let mut rest = [0; MAX_REST];
        let rest = &mut rest[..length];
        from.read_exact(rest).map_err(truncated)?;
        let mut rest = Bytes::new(rest);
        let (Ok(features), Ok(length)) = (rest.u64(), rest.u8()) else {
            return Err(foreign());
        };
        let Ok(program) = rest.take(usize::from(length)) else {
            return Err(foreign());
        };
        Ok(Self {
            role,
            min,
            max,
            features,
            program: Text::from_bytes(program),
        })
    }

    /// What this end and the peer have in common. Both ends come to the same result.
    ///
    /// # Errors
    /// Fails when they speak no common version or have the same role.
    pub fn agree(&self, peer: &Self) -> Result<Agreement, WireError> {
        let version = self.max.min(peer.max);
        if version < self.min.max(peer.min) {
            return Err(WireError::Incompatible {
                our_program: self.program.clone(),
                our_min: self.min,
                our_max: self.max,
                their_program: peer.program.clone(),
                their_min: peer.min,
                their_max: peer.max,
            });
        }
        if self.role == peer.role {
            return Err(WireError::SameRole(peer.role));
        }
        Ok(Agreement {
            version,
            features: self.features & peer.features,
            peer_program: peer.program.clone(),
        })
    }
}

/// The end of the input where more was needed is the peer's doing, not the connection's.
pub(super) fn truncated(error: io::Error) -> WireError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        WireError::Truncated
    } else {
        WireError::Io(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello(role: Role, min: u16, max: u16) -> Hello {
        Hello {
            min,
            max,
            ..Hello::new(role)
        }
    }

    struct StuckAfter(&'static [u8]);

    impl Read for StuckAfter {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            assert!(!self.0.is_empty(), "Waited for more than was needed");
            self.0.read(to)
        }
    }

    #[test]
    fn the_highest_common_version_is_picked() {
        for (ours, theirs, picked) in [
            ((1, 1), (1, 1), Some(1)),
            ((1, 3), (2, 5), Some(3)),
            ((2, 5), (1, 3), Some(3)),
            ((1, 9), (4, 4), Some(4)),
            ((1, 2), (3, 4), None),
            ((3, 4), (1, 2), None),
        ] {
            let ours = hello(Role::Source, ours.0, ours.1);
            let theirs = hello(Role::Destination, theirs.0, theirs.1);
            let agreement = ours.agree(&theirs);
            assert_eq!(agreement.as_ref().ok().map(|a| a.version), picked);
            assert_eq!(theirs.agree(&ours).ok().map(|a| a.version), picked);
        }
    }

    #[test]
    fn an_incompatible_peer_is_named_with_its_versions() {
        let ours = hello(Role::Source, 1, 2);
        let theirs = Hello {
            program: Text::new("9.8.7\x1b"),
            ..hello(Role::Destination, 40, 50)
        };
        let message = ours.agree(&theirs).unwrap_err().to_string();
        for part in [env!("CARGO_PKG_VERSION"), "1 to 2", "9.8.7", "40 to 50"] {
            assert!(message.contains(part), "{message}");
        }
        assert!(!message.contains('\x1b'));
    }

    #[test]
    fn a_peer_of_another_version_is_told_so_at_once() {
        let ours = Hello::new(Role::Source);
        for version in [1, MIN_PROTOCOL - 1, MAX_PROTOCOL + 1] {
            let theirs = hello(Role::Destination, version, version);
            let error = ours.agree(&theirs).unwrap_err();
            assert!(matches!(error, WireError::Incompatible { .. }), "{error}");
            assert!(error.to_string().contains(&version.to_string()), "{error}");
        }
    }

    #[test]
    fn two_sources_do_not_move_anything() {
        let ours = Hello::new(Role::Source);
        assert!(matches!(
            ours.agree(&ours.clone()),
            Err(WireError::SameRole(Role::Source))
        ));
    }

    #[test]
    fn only_common_features_are_used() {
        let ours = Hello {
            features: 0b110,
            ..Hello::new(Role::Source)
        };
        let theirs = Hello {
            features: 0b011,
            ..Hello::new(Role::Destination)
        };
        assert_eq!(ours.agree(&theirs).unwrap().features, 0b010);
    }

    #[test]
    fn a_shell_is_quoted_at_once() {
        // Shorter than a hello; nobody may wait for the rest.
        let never = StuckAfter(b"no such");
        let error = Hello::read(never).unwrap_err();
        assert!(error.to_string().contains("no such"), "{error}");
    }

    #[test]
    fn what_later_versions_add_is_skipped() {
        let ours = Hello::new(Role::Destination);
        let mut bytes = ours.encode();
        let length = bytes.len() - HEADER_SIZE + 5;
        bytes[14..16].copy_from_slice(&u16::try_from(length).unwrap().to_le_bytes());
        bytes.extend(b"later next");
        let mut from = bytes.as_slice();
        assert_eq!(Hello::read(&mut from).unwrap(), ours);
        assert_eq!(from, b" next");
    }

    proptest! {
        #[test]
        fn a_hello_comes_back(min: u16, more: u16, features: u64, program in "[ -~]{0,64}", source: bool) {
            let role = if source { Role::Source } else { Role::Destination };
            let max = min.saturating_add(more);
            let hello = Hello { role, min, max, features, program: Text::new(&program) };
            let bytes = hello.encode();
            prop_assert_eq!(Hello::read(bytes.as_slice()).unwrap(), hello);
            for end in 0..bytes.len() {
                prop_assert!(matches!(Hello::read(&bytes[..end]), Err(WireError::Truncated)));
            }
        }
    }
}
