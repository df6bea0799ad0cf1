//! What room shadows take on a disk, and what they give back.
//!
//! ```text
//!   a shadow comes    older ones go, so that it and all others stay below what they may take
//!   a guest comes     older ones go, so that it finds room: a shadow costs bytes, no guest
//! ```

use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::fcntl::FlockArg;
use nix::sys::statvfs::{Statvfs, statvfs};

use super::policy::{self, Kept};
use super::{Shadows, lending, now, table_file};
use crate::digest::DigestKey;
use crate::error::{Error, IoContext, Result, chain};
use crate::pages::PAGE_SIZE;

/// What a guest that comes needs of the disk beside its memory, in bytes: for its journal, for what
/// the file system keeps of a file, and for pages beyond those that room is reserved for.
pub(super) const BESIDE_MEMORY: u64 = 16 << 20;

impl Shadows {
    /// What the memory of a guest that comes needs of the disk that `incoming` is on, beside its own
    /// shadow, which is that of its secret; and what is free there, with what the shadows of others
    /// would give back. In bytes.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io).
    pub fn room_for_guest(
        &self,
        uuid: &str,
        key: &DigestKey,
        reserved: &[Range<u64>],
        incoming: &Path,
    ) -> Result<(u64, u64)> {
        let (needed, free, others) = self.room(uuid, key, reserved, incoming)?;
        let given_back: u64 = others.iter().map(|kept| kept.bytes).sum();
        Ok((needed, free.saturating_add(given_back)))
    }

    /// Drops shadows of others, the oldest first, until a guest that comes finds room. Where it finds
    /// none in any case nothing goes.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io).
    pub fn make_room_for_guest(
        &self,
        uuid: &str,
        key: &DigestKey,
        reserved: &[Range<u64>],
        incoming: &Path,
    ) -> Result<()> {
        let (needed, free, others) = self.room(uuid, key, reserved, incoming)?;
        for uuid in policy::oldest_for(&others, needed.saturating_sub(free)) {
            log::info!("The shadow of {uuid} goes: a guest comes that needs the room");
            self.drop_quietly(&uuid);
        }
        Ok(())
    }

    /// What a guest that comes needs, what is free there, and the shadows of others on that disk.
    fn room(
        &self,
        uuid: &str,
        key: &DigestKey,
        reserved: &[Range<u64>],
        incoming: &Path,
    ) -> Result<(u64, u64, Vec<Kept>)> {
        let device = |path: &Path| {
            fs::metadata(path)
                .map(|about| about.dev())
                .context(|| format!("Can't look at {}", path.display()))
        };
        let pages: u64 = reserved.iter().map(|range| range.end - range.start).sum();
        let mut needed = pages
            .saturating_mul(PAGE_SIZE as u64)
            .saturating_add(BESIDE_MEMORY);
        let mut others = Vec::new();
        if self.directory.exists() && device(&self.directory)? == device(incoming)? {
            (others, _) = self.kept()?;
            // It becomes the memory of the guest. Where it is of no use it goes as any other.
            if let Some(own) = self.own(uuid, key) {
                let own = |kept: &mut Kept| kept.uuid == own;
                let own: u64 = others.extract_if(.., own).map(|kept| kept.bytes).sum();
                needed = needed.saturating_sub(own);
            }
        }
        // A guest's memory may take what is set apart for root.
        let disk = look_at(incoming)?;
        let free = disk.blocks_free() * disk.fragment_size();
        if free < needed {
            // One that another guest is built from gives nothing back. To look at that locks it for a
            // moment, in which it is of no use to any other.
            others.retain(|kept| {
                let locked = self
                    .memory_path(&kept.uuid)
                    .and_then(|memory| lending::lock(&memory, FlockArg::LockExclusiveNonblock));
                matches!(locked, Ok(Some(_)))
            });
        }
        Ok((needed, free, others))
    }

    /// Drops what is too old or too much, so that `bytes` of `uuid` find room; whether they do. So
    /// many of them are on the disk `already`. For what finds none in any case nothing else goes.
    pub(super) fn make_room(&self, uuid: &str, bytes: u64, already: u64) -> Result<bool> {
        self.drop_shadow(uuid)?;
        let (kept, used) = self.kept()?;
        let free = free_at(&self.directory)?.saturating_add(already);
        let most = self.policy.most_bytes(used, free, already);
        if bytes > most {
            log::info!(
                "The shadow of {uuid} would take {} MiB of the disk, and shadows may take {}",
                bytes >> 20,
                most >> 20
            );
            return Ok(false);
        }
        for uuid in self
            .policy
            .too_many(&kept, now(), most, bytes.max(PAGE_SIZE as u64))
        {
            log::info!("The shadow of {uuid} goes");
            self.drop_quietly(&uuid);
        }
        // A disk that is nearly full keeps what it has for others.
        let (free, needed) = (free_at(&self.directory)?, bytes.saturating_sub(already));
        Ok(needed == 0 || needed.saturating_add(free / 10) <= free)
    }

    /// Drops what the policy does not keep any longer, and what is of no use; but for what the guest
    /// `taken` has here, which counts for nothing.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn prune_beside(&self, taken: Option<&str>) -> Result<()> {
        self.drop_useless()?;
        let (mut kept, _) = self.kept()?;
        kept.retain(|kept| Some(kept.uuid.as_str()) != taken);
        let used = kept.iter().map(|kept| kept.bytes).sum();
        let newest = kept.first().map_or(0, |kept| kept.bytes);
        let free = free_at(&self.directory)?;
        let most = self.policy.most_bytes(used, free, newest);
        for uuid in self.policy.too_many(&kept, now(), most, 0) {
            self.drop_quietly(&uuid);
        }
        // What is known of a shadow at another site is of no use for longer than that is kept.
        let known = self.list()?.into_iter().filter(|listed| !listed.memory);
        for listed in known.filter(|listed| self.policy.is_old(listed.kept_at, now())) {
            self.drop_quietly(&listed.uuid);
        }
        Ok(())
    }

    /// Drops what has no table that can be read, as a power cut may leave it: nobody could tell what
    /// it is.
    ///
    /// # Errors
    /// [`Error::Io`] where the directory can't be read.
    pub fn drop_useless(&self) -> Result<()> {
        for path in self.files()? {
            let Some(uuid) = path.file_stem().and_then(|stem| stem.to_str()) else {
                continue;
            };
            let kind = path.extension();
            let table = path.with_extension("table");
            if kind.is_some_and(|kind| kind == "memory" || kind == "table")
                && let Err(error) = table_file::read_head(&table)
                && tells_of_nothing(&error)
                // Another may have taken it up, or dropped it, since the directory was read.
                && path.exists()
            {
                log::warn!("A shadow is of no use: {}", chain(&error));
                self.drop_quietly(uuid);
            }
        }
        Ok(())
    }

    /// The shadows whose memory is here, and the bytes that they take.
    fn kept(&self) -> Result<(Vec<Kept>, u64)> {
        let kept: Vec<Kept> = self
            .list()?
            .into_iter()
            .filter(|listed| listed.memory)
            .map(|listed| Kept {
                uuid: listed.uuid,
                kept_at: listed.kept_at,
                bytes: listed.bytes,
            })
            .collect();
        let used = kept.iter().map(|kept| kept.bytes).sum();
        Ok((kept, used))
    }
}

/// Whether a table is of no use, or not there. One that can't be read now may be of use later.
fn tells_of_nothing(error: &Error) -> bool {
    match error {
        Error::Shadow { .. } => true,
        Error::Io { source, .. } => source.kind() == ErrorKind::NotFound,
        _ => false,
    }
}

/// The bytes that are free where `directory` is, for anybody.
fn free_at(directory: &Path) -> Result<u64> {
    let disk = look_at(directory)?;
    Ok(disk.blocks_available() * disk.fragment_size())
}

fn look_at(directory: &Path) -> Result<Statvfs> {
    let doing = || format!("Can't look at {}", directory.display());
    statvfs(directory)
        .map_err(std::io::Error::from)
        .context(doing)
}
