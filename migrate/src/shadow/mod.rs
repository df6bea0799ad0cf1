//! Shadows: what a site holds of guests that do not run there.
//!
//! ```text
//! shadows/<uuid>.table     type and digest of each page, as the guest was when it left or arrived
//! shadows/<uuid>.memory    the pages themselves, sparse; only where the guest left
//!
//!   a guest leaves A for B          A: table and memory       B: table
//!   it comes back                   A: "I have what it was when its digest was D"
//!                                   B: knows that table, and sends what differs
//!   a copy to B breaks              B: table and memory of what arrived
//!   it is tried again               B: tells its table; A sends what is missing
//! ```
//!
//! A shadow is believed page by page. When its memory is taken up again every page is digested,
//! and what is not as the table says counts as missing. So nothing has to be synced, a stale or
//! damaged shadow costs bytes and never the guest, and the digest of the whole memory proves the
//! move as it proves any other. It is taken up only for who has the secret of the guest's digests:
//! it would tell of what it holds to whoever names the guest.
//!
//! Where the operator has made a trust group, other guests of it are built from them as well
//! ([`group`](crate::group)).
//!
//! Digests are made by the guest's own secret, which is kept with the table and goes along with
//! the guest: they stay valid from move to move.

pub mod inventory;
mod leaving;
mod lending;
mod policy;
mod room;
mod table_file;

pub use leaving::Leaving;
pub use lending::Lent;
pub use policy::ShadowPolicy;
pub use table_file::{Head, TABLE_VERSION};

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::digest::{DigestKey, Digester, MemoryDigest};
use crate::directories::Directories;
use crate::error::{Error, IoContext, Result, chain};
use crate::guest::PageTable;
use crate::image::Image;
use crate::outgoing::random;
use crate::pages::{PAGE_SIZE, PageSet};
use crate::wire::ShadowHead;

/// How long a shadow may be in use before a guest that comes goes without: to look whether one is in
/// use takes a moment, to read one for another guest minutes.
const IN_USE: Duration = Duration::from_secs(1);

/// A shadow that lacks pages in more places than this is told of by its inventory.
const MOST_LACKING: usize = 1000;

/// The shadows of one site.
#[derive(Debug, Clone)]
pub struct Shadows {
    directory: PathBuf,
    policy: ShadowPolicy,
}

/// One shadow, for the operator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// The guest's name, when it was kept.
    pub name: String,
    /// The guest's UUID.
    pub uuid: String,
    /// The other site: where the guest went, or came from.
    pub peer: String,
    /// Seconds since 1970.
    pub kept_at: u64,
    /// The guest's memory, in bytes, holes counted.
    pub guest_bytes: u64,
    /// Whether its pages are here, not what is known of them alone.
    pub memory: bool,
    /// On the disk.
    pub bytes: u64,
}

/// A guest that is to be kept: what names it.
#[derive(Debug, Clone, Copy)]
pub struct Named<'a> {
    /// Its UUID.
    pub uuid: &'a str,
    /// Its name.
    pub name: &'a str,
    /// The other site.
    pub peer: &'a str,
}

/// A shadow that was taken up again.
#[derive(Debug)]
pub struct Recalled {
    /// Its pages, as far as they are what the table says.
    pub image: Image,
    /// The digest of the table that it was kept with.
    pub basis: MemoryDigest,
    /// What of that table is no longer here.
    pub lacking: PageSet,
}

impl Shadows {
    /// Those of a host.
    #[must_use]
    pub fn new(directories: &Directories, policy: ShadowPolicy) -> Self {
        Shadows {
            directory: directories.shadows(),
            policy,
        }
    }

    /// Whether memory is kept here at all.
    #[must_use]
    pub fn keep(&self) -> bool {
        self.policy.keep
    }

    fn table_path(&self, uuid: &str) -> Result<PathBuf> {
        // It becomes a file's name.
        let plain = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-';
        if uuid.is_empty() || !uuid.bytes().all(plain) {
            return Err(Error::Refused(format!("{uuid:?} is no UUID")));
        }
        let uuid = uuid.to_ascii_lowercase();
        Ok(self.directory.join(format!("{uuid}.table")))
    }

    fn memory_path(&self, uuid: &str) -> Result<PathBuf> {
        Ok(self.table_path(uuid)?.with_extension("memory"))
    }

    /// What is known here of a guest's pages. None where nothing is, or where it can't be read.
    #[must_use]
    pub fn known(&self, uuid: &str) -> Option<(Head, PageTable)> {
        self.read(uuid).unwrap_or_else(|error| {
            log::warn!("What is known of {uuid} can't be read: {}", chain(&error));
            None
        })
    }

    /// What is known here of a guest's pages. None where nothing is, or where it is of no use: then it
    /// is dropped.
    ///
    /// # Errors
    /// [`Error::Io`]: it may be of use at another time.
    fn read(&self, uuid: &str) -> Result<Option<(Head, PageTable)>> {
        match table_file::read(&self.table_path(uuid)?) {
            Ok(known) => Ok(Some(known)),
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
            Err(error @ Error::Shadow { .. }) => {
                log::warn!("A shadow is of no use: {}", chain(&error));
                self.drop_quietly(uuid);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The secret of a guest's digests, if this site has it.
    #[must_use]
    pub fn key(&self, uuid: &str) -> Option<DigestKey> {
        let path = self.table_path(uuid).ok()?;
        table_file::read_head(&path)
            .ok()
            .map(|head| head.digest_key)
    }

    /// The secret for a guest's digests: that which it has, so that what a site has of it stays
    /// comparable, else a new one.
    ///
    /// # Errors
    /// [`Error::Io`] where there are no random bytes.
    pub fn key_for(&self, uuid: &str) -> Result<DigestKey> {
        match self.key(uuid) {
            Some(key) => Ok(key),
            None => Ok(DigestKey::new(random()?)),
        }
    }

    /// Keeps the secret of a guest that moves for the first time, whatever else is kept here: what
    /// arrives of it is of use later only to who has that.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn keep_key(&self, named: Named<'_>, key: &DigestKey) -> Result<()> {
        if self.key(named.uuid).is_some() || self.read(named.uuid)?.is_some() {
            return Ok(());
        }
        // What it would be of nobody could tell.
        remove(&self.memory_path(named.uuid)?)?;
        // Of its pages nothing is known: the smallest table that there is says so.
        let table = PageTable::new(1);
        let head = self.head(named, key, &table);
        table_file::write(&self.table_path(named.uuid)?, &head, &table)
    }

    /// Takes a guest's shadow up as the file `to`, which is its image from now on; room is reserved
    /// for the pages in `reserved`. None where there is none of a guest of so many pages, whose digests
    /// are by `key`: whoever asks has to know that. Every page is read once.
    ///
    /// # Errors
    /// [`Error::Refused`] where the disk has no room for all of it; [`Error::Io`].
    pub fn recall(
        &self,
        uuid: &str,
        pages: u64,
        reserved: &[Range<u64>],
        key: &DigestKey,
        to: &Path,
    ) -> Result<Option<Recalled>> {
        let memory = self.memory_path(uuid)?;
        if !memory.exists() {
            return Ok(None);
        }
        let Some((head, table)) = self.read(uuid)? else {
            self.drop_quietly(uuid);
            return Ok(None);
        };
        if head.digest_key != *key {
            log::info!("The shadow of {uuid} has another secret: this move goes without");
            return Ok(None);
        }
        if head.pages != pages {
            self.drop_quietly(uuid);
            return Ok(None);
        }
        // Where it is read for another guest that arrives, it is not written into.
        let Some(_alone) = lending::lock_alone(&memory, IN_USE)? else {
            log::info!("The shadow of {uuid} is in use: this move goes without");
            return Ok(None);
        };
        // From here on it is an image, which whoever settles the move removes.
        fs::rename(&memory, to).context(|| format!("Can't rename {}", memory.display()))?;
        let (image, lacking) = Image::recall(to, table, reserved, &Digester::new(key))?;
        Ok(Some(Recalled {
            image,
            basis: head.digest,
            lacking,
        }))
    }

    /// The guest, where its shadow here may be taken up by one who has this secret.
    fn own(&self, uuid: &str, key: &DigestKey) -> Option<String> {
        let own = self.policy.keep && self.key(uuid).as_ref() == Some(key);
        own.then(|| uuid.to_ascii_lowercase())
    }

    /// Where the memory of a guest that comes goes: into its shadow if there is one, with what is to
    /// be told of that, else into a new file `memory`. Room is reserved for the pages in `reserved`.
    ///
    /// # Errors
    /// [`Error::Refused`] where the disk has no room; [`Error::Io`].
    pub fn image(
        &self,
        uuid: &str,
        pages: u64,
        key: &DigestKey,
        reserved: &[Range<u64>],
        memory: &Path,
    ) -> Result<(Image, Option<ShadowHead>)> {
        // What is about to be taken up is not too old for that, nor one too many.
        if let Err(error) = self.prune_beside(self.own(uuid, key).as_deref()) {
            log::warn!("{}", chain(&error));
        }
        let recalled = match self.policy.keep {
            true => self
                .recall(uuid, pages, reserved, key, memory)
                .unwrap_or_else(|error| {
                    // Without it more bytes cross, and that is all.
                    log::warn!("A shadow is of no use: {}", chain(&error));
                    // What is where it was may be of use to another attempt.
                    if self.memory_path(uuid).is_ok_and(|kept| !kept.exists()) {
                        self.drop_quietly(uuid);
                    }
                    // It may be there already, renamed.
                    let _ = fs::remove_file(memory);
                    None
                }),
            false => None,
        };
        let Some(Recalled {
            image,
            basis,
            lacking,
        }) = recalled
        else {
            return Ok((Image::create_in_part(memory, pages, reserved)?, None));
        };
        let runs: Vec<(u64, u64)> = lacking
            .runs()
            .take(MOST_LACKING + 1)
            .map(|run| (run.start, run.end - run.start))
            .collect();
        let head = match runs.len() <= MOST_LACKING {
            true => ShadowHead {
                basis: Some(basis),
                lacking: runs,
            },
            false => ShadowHead {
                basis: None,
                lacking: Vec::new(),
            },
        };
        Ok((image, Some(head)))
    }

    /// What [`Shadows::image`] would find, going by the table alone: its pages are not looked at,
    /// nor is it taken up. None where there is no shadow, or it has another secret.
    #[must_use]
    pub fn expected(
        &self,
        uuid: &str,
        pages: u64,
        key: &DigestKey,
    ) -> Option<(ShadowHead, PageTable)> {
        let memory = self.memory_path(uuid).ok()?;
        if !self.policy.keep || !memory.exists() {
            return None;
        }
        let (head, table) = self.known(uuid)?;
        let same = (head.pages, &head.digest_key) == (pages, key);
        let told = ShadowHead {
            basis: Some(head.digest),
            lacking: Vec::new(),
        };
        same.then_some((told, table))
    }

    fn head(&self, named: Named<'_>, key: &DigestKey, table: &PageTable) -> Head {
        Head {
            uuid: named.uuid.to_ascii_lowercase(),
            name: named.name.to_owned(),
            pages: table.pages(),
            digest_key: key.clone(),
            digest: table.digest(&Digester::new(key)),
            peer: named.peer.to_owned(),
            kept_at: now(),
        }
    }

    /// Keeps what is known of a guest that arrived: its old site has just these pages.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remember(&self, named: Named<'_>, key: &DigestKey, table: &PageTable) -> Result<()> {
        if !self.policy.keep {
            return self.drop_shadow(named.uuid);
        }
        let head = self.head(named, key, table);
        // Memory that is still here is of another time.
        remove(&self.memory_path(named.uuid)?)?;
        table_file::write(&self.table_path(named.uuid)?, &head, table)
    }

    /// Keeps an image that will not become a guest now: its file moves here. Whether it was kept.
    ///
    /// # Errors
    /// [`Error::Io`]; then the file is where it was.
    pub fn keep_image(&self, named: Named<'_>, key: &DigestKey, image: &Image) -> Result<bool> {
        let table = image.table();
        if !self.policy.keep || (0..table.pages()).all(|pfn| table.get(pfn).is_none()) {
            return Ok(false);
        }
        image.thin()?;
        // It is on this disk already: what it may take there only the operator says.
        let bytes = image.bytes()?;
        if !self.make_room(named.uuid, bytes, bytes)? {
            return Ok(false);
        }
        let head = self.head(named, key, table);
        table_file::write(&self.table_path(named.uuid)?, &head, table)?;
        image.rename(&self.memory_path(named.uuid)?)?;
        Ok(true)
    }

    /// Begins to keep the memory of a guest that leaves, as `table` has it. None where the policy
    /// or the disk has no room for it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn leave(
        &self,
        named: Named<'_>,
        key: &DigestKey,
        table: &PageTable,
    ) -> Result<Option<Leaving>> {
        if !self.policy.keep {
            return Ok(None);
        }
        let zeros = Digester::new(key).zeros();
        let content = |pfn: &u64| {
            table.get(*pfn).is_some_and(|state| {
                state.page_type.has_data() && state.digest != zeros.of(state.page_type)
            })
        };
        let bytes = (0..table.pages()).filter(content).count() as u64 * PAGE_SIZE as u64;
        if !self.make_room(named.uuid, bytes, 0)? {
            return Ok(None);
        }
        let head = self.head(named, key, table);
        Leaving::begin(
            self.table_path(named.uuid)?,
            self.memory_path(named.uuid)?,
            head,
        )
        .map(Some)
    }

    /// All files here.
    fn files(&self) -> Result<Vec<PathBuf>> {
        let doing = || format!("Can't read {}", self.directory.display());
        match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            entries => entries
                .context(doing)?
                .map(|entry| entry.map(|entry| entry.path()).context(doing))
                .collect(),
        }
    }

    /// All shadows here, the newest first. One that can't be read is left out, and told.
    ///
    /// # Errors
    /// [`Error::Io`] where the directory can't be read.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let mut listed = Vec::new();
        for path in self.files()? {
            if path
                .extension()
                .is_none_or(|extension| extension != "table")
            {
                continue;
            }
            match table_file::read_head(&path) {
                Ok(head) => {
                    let memory = fs::metadata(path.with_extension("memory")).ok();
                    let table = fs::metadata(&path).map_or(0, |table| table.blocks() * 512);
                    listed.push(Listed {
                        name: head.name,
                        uuid: head.uuid,
                        peer: head.peer,
                        kept_at: head.kept_at,
                        guest_bytes: head.pages * PAGE_SIZE as u64,
                        bytes: table + memory.as_ref().map_or(0, |memory| memory.blocks() * 512),
                        memory: memory.is_some(),
                    });
                }
                Err(error) => log::warn!("{}", chain(&error)),
            }
        }
        listed.sort_by_key(|listed| std::cmp::Reverse(listed.kept_at));
        Ok(listed)
    }

    /// Drops what is kept of a guest. Harmless where nothing is.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn drop_shadow(&self, uuid: &str) -> Result<()> {
        // First the table: memory without one is nothing.
        remove(&self.table_path(uuid)?)?;
        remove(&self.memory_path(uuid)?)?;
        self.drop_drafts(uuid)
    }

    /// Drops what a worker that was killed has begun to write of a guest. None may be at work on it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn drop_drafts(&self, uuid: &str) -> Result<()> {
        remove(&draft(&self.memory_path(uuid)?))?;
        remove(&draft(&self.table_path(uuid)?))
    }

    /// The guests of which something was begun to be written, by a worker that is at work or was
    /// killed.
    ///
    /// # Errors
    /// [`Error::Io`] where the directory can't be read.
    pub fn drafts(&self) -> Result<BTreeSet<String>> {
        let uuid = |path: PathBuf| {
            let name = path.file_name()?.to_str()?.strip_suffix(DRAFT)?;
            Some(name.split_once('.')?.0.to_owned())
        };
        Ok(self.files()?.into_iter().filter_map(uuid).collect())
    }

    fn drop_quietly(&self, uuid: &str) {
        if let Err(error) = self.drop_shadow(uuid) {
            log::warn!("{}", chain(&error));
        }
    }
}

/// How the names of files end while they are written.
const DRAFT: &str = ".new";

/// The name of a file while it is written.
fn draft(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(DRAFT);
    name.into()
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).context(|| format!("Can't remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
