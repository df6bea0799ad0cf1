//! What is known of a guest's pages, as a file.
//!
//! ```text
//!   "VMSHADOW" | u32 version | u32 length | head, a JSON document | runs of pages (inventory)
//! ```
//!
//! Nothing is synced: what a power cut left is told by the digest of the whole, which is in the
//! head, and by the digest of each page, when its content is read again. A file that is not right
//! is one that is not there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::inventory;
use crate::bytes::Bytes;
use crate::digest::{DigestKey, Digester, MemoryDigest};
use crate::error::{Error, IoContext, Result};
use crate::guest::PageTable;
use crate::pages::MAX_PAGES;

/// The version of the format.
pub const TABLE_VERSION: u32 = 1;

const MAGIC: &[u8; 8] = b"VMSHADOW";

/// A head is a few hundred bytes.
const LONGEST_HEAD: usize = 64 << 10;

/// What a table is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The guest's UUID.
    pub uuid: String,
    /// The guest's name, when this was kept.
    pub name: String,
    /// One more than its highest pfn.
    pub pages: u64,
    /// The secret of its digests.
    pub digest_key: DigestKey,
    /// The digest of the whole table, by that secret.
    pub digest: MemoryDigest,
    /// The other site: where the guest went, or came from.
    pub peer: String,
    /// When this was kept, in seconds since 1970.
    pub kept_at: u64,
}

/// Writes a table and its head, in place of what is there.
///
/// # Errors
/// [`Error::Io`].
pub fn write(path: &Path, head: &Head, table: &PageTable) -> Result<()> {
    let draft = super::draft(path);
    let written = write_draft(&draft, head, table).and_then(|()| fs::rename(&draft, path));
    if written.is_err() {
        // A disk that is full is to have its room back.
        let _ = fs::remove_file(&draft);
    }
    written.context(|| format!("Can't write {}", path.display()))
}

fn write_draft(draft: &Path, head: &Head, table: &PageTable) -> io::Result<()> {
    let document = serde_json::to_vec(head).map_err(io::Error::other)?;
    let digester = Digester::new(&head.digest_key);
    let mut bytes = Vec::with_capacity(1 << 20);
    bytes.extend(MAGIC);
    bytes.extend(TABLE_VERSION.to_le_bytes());
    bytes.extend((document.len() as u32).to_le_bytes());
    bytes.extend(document);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(draft)?;
    for first in (0..table.pages()).step_by(inventory::CHUNK_PAGES as usize) {
        let end = first + inventory::CHUNK_PAGES;
        inventory::encode(table, &digester, first, end, &mut bytes);
        file.write_all(&bytes)?;
        bytes.clear();
    }
    Ok(())
}

/// Reads a head alone.
///
/// # Errors
/// As [`read`].
pub fn read_head(path: &Path) -> Result<Head> {
    let doing = || format!("Can't read {}", path.display());
    let file = File::open(path).context(doing)?;
    let mut start = Vec::new();
    file.take(16 + LONGEST_HEAD as u64)
        .read_to_end(&mut start)
        .context(doing)?;
    parse_head(path, &mut Bytes::new(&start))
}

/// Reads a table and its head.
///
/// # Errors
/// [`Error::Shadow`] where it isn't one, is of another version, or is not whole; [`Error::Io`].
pub fn read(path: &Path) -> Result<(Head, PageTable)> {
    let doing = || format!("Can't read {}", path.display());
    let bytes = fs::read(path).context(doing)?;
    let mut from = Bytes::new(&bytes);
    let head = parse_head(path, &mut from)?;
    let digester = Digester::new(&head.digest_key);
    let mut table = PageTable::new(head.pages);
    let end = inventory::decode(from.rest(), &digester, 0, &mut table)
        .map_err(|error| bad(path, &error.to_string()))?;
    if end != head.pages || table.digest(&digester) != head.digest {
        return Err(bad(path, "It is not whole"));
    }
    Ok((head, table))
}

fn parse_head(path: &Path, from: &mut Bytes<'_>) -> Result<Head> {
    let short = |_| bad(path, "It is too short");
    if from.array().map_err(short)? != *MAGIC {
        return Err(bad(path, "It is no shadow's"));
    }
    let version = from.u32().map_err(short)?;
    if version != TABLE_VERSION {
        return Err(bad(
            path,
            &format!("Version {version} is not this program's ({TABLE_VERSION})"),
        ));
    }
    let length = from.u32().map_err(short)? as usize;
    if length > LONGEST_HEAD {
        return Err(bad(path, "Its head is too long"));
    }
    let document = from.take(length).map_err(short)?;
    let head: Head =
        serde_json::from_slice(document).map_err(|error| bad(path, &error.to_string()))?;
    if !(1..=MAX_PAGES).contains(&head.pages) {
        return Err(bad(path, "No guest has so many pages"));
    }
    Ok(head)
}

fn bad(path: &Path, what: &str) -> Error {
    Error::Shadow {
        path: path.display().to_string(),
        what: what.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::PageState;
    use crate::pages::{PAGE_SIZE, PageType};

    fn sample() -> (Head, PageTable) {
        let digest_key = DigestKey::new([3; 32]);
        let digester = Digester::new(&digest_key);
        let mut table = PageTable::new(50);
        for pfn in 5..40 {
            let page_type = PageType::Normal;
            let digest = digester.page(page_type, &[pfn as u8 / 4; PAGE_SIZE]);
            table.set(pfn, PageState { page_type, digest });
        }
        let head = Head {
            uuid: "u".into(),
            name: "g1".into(),
            pages: 50,
            digest: table.digest(&digester),
            digest_key,
            peer: "b".into(),
            kept_at: 7,
        };
        (head, table)
    }

    #[test]
    fn what_is_written_is_read() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("u.table");
        let (head, table) = sample();
        write(&path, &head, &table).unwrap();
        let (again, pages) = read(&path).unwrap();
        assert_eq!(again, head);
        assert_eq!(read_head(&path).unwrap(), head);
        assert!((0..50).all(|pfn| pages.get(pfn) == table.get(pfn)));
        assert_eq!(
            fs::read_dir(root.path()).unwrap().count(),
            1,
            "no draft stays"
        );
    }

    #[test]
    fn what_can_not_be_written_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("u.table");
        fs::create_dir(&path).unwrap();
        let (head, table) = sample();
        assert!(write(&path, &head, &table).is_err());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_not_whole_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("u.table");
        let (head, table) = sample();
        write(&path, &head, &table).unwrap();
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(read(&path).is_err(), "{length} bytes");
        }
        for at in (0..whole.len()).step_by(3) {
            let mut changed = whole.clone();
            changed[at] ^= 0x10;
            fs::write(&path, &changed).unwrap();
            // A changed name or date is still a table; its pages are not.
            if let Ok((_, pages)) = read(&path) {
                assert!((0..50).all(|pfn| pages.get(pfn) == table.get(pfn)), "{at}");
            }
        }
    }
}
