//! The workload on a disk: writes blocks, flushes them, and reads them back.
//!
//! `disk PATH MIB` takes the first MIB of a disk, and goes round and round. A
//! block that was flushed must be there for ever, after a move too, so each
//! round checks what the round before wrote. Reading goes around the page cache.

use crate::Guest;
use crate::faults::Fault;
use crate::spawn;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;
use testbed_guest::pattern::{self, Page, WORDS};

/// Bytes of a block.
const BLOCK: u64 = 4096;

/// What the workload counts.
#[derive(Default)]
pub struct Disk {
    blocks: AtomicU64,
}

impl Disk {
    /// Blocks written, flushed and read back.
    pub fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Relaxed)
    }
}

/// Starts the workload on a disk such as /dev/xvda. What the disk held is lost.
pub fn start(guest: &Arc<Guest>, path: &str, mib: u64) -> Result<Value, String> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|error| format!("{path}: {error}"))?;
    let guest = Arc::clone(guest);
    spawn("disk", move || {
        if let Err(error) = run(&guest, &file, mib * 1024 * 1024 / BLOCK) {
            guest.faults.add(Fault::Disk, &error.to_string());
        }
    })?;
    Ok(json!({}))
}

fn run(guest: &Guest, file: &File, blocks: u64) -> std::io::Result<()> {
    const SEED: u64 = 0x5644;
    const FLUSH: u64 = 16;
    for generation in 0_u64.. {
        for block in 0..blocks {
            let mut page = [0; WORDS];
            if generation > 0 {
                read(file, block, &mut page)?;
                if !pattern::holds(&page, SEED, block, generation - 1) {
                    let [_, _, there, ..] = page;
                    let words = format!(
                        "Block {block} has generation {there}, not {}",
                        generation - 1
                    );
                    guest.faults.add(Fault::Disk, &words);
                }
            }
            pattern::fill(&mut page, SEED, block, generation);
            let bytes: Vec<u8> = page.iter().flat_map(|word| word.to_le_bytes()).collect();
            file.write_all_at(&bytes, block * BLOCK)?;
            if block % FLUSH == FLUSH - 1 || block == blocks - 1 {
                file.sync_data()?;
                guest
                    .disk
                    .blocks
                    .fetch_add(FLUSH.min(blocks), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
    Ok(())
}

/// Reads a block from the disk, not from the cache.
fn read(file: &File, block: u64, page: &mut Page) -> std::io::Result<()> {
    let offset = i64::try_from(block * BLOCK).map_err(std::io::Error::other)?;
    posix_fadvise(
        file,
        offset,
        BLOCK as i64,
        PosixFadviseAdvice::POSIX_FADV_DONTNEED,
    )?;
    let mut bytes = [0; BLOCK as usize];
    file.read_exact_at(&mut bytes, block * BLOCK)?;
    for (word, chunk) in page.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_le_bytes(*chunk);
    }
    Ok(())
}
