//! Workloads in memory.
//!
//! | command | does |
//! |---|---|
//! | `rewrite MIB [RATE]` | checks and rewrites its pages all the time, at most RATE MiB a second; a thread for each vCPU |
//! | `random MIB` | holds pages that don't compress |
//! | `text MIB` | holds pages that compress well |
//! | `churn` | makes and ends processes all the time: page tables come and go |
//! | `verify` | checks the pages that are held |
//! | `drop` | ends all of these and frees their memory |

use crate::Guest;
use crate::faults::Fault;
use crate::{spawn, system};
use serde_json::{Value, json};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use testbed_guest::pattern::{self, Page, WORDS};

/// Pages of a MiB.
const PAGES: u64 = 256;

/// What the workloads share.
#[derive(Default)]
pub struct Memory {
    /// Raised by `drop`: a thread that was started under an older number ends.
    epoch: AtomicU64,
    generation: AtomicU64,
    rewriting_mib: AtomicU64,
    churned: AtomicU64,
    held: Mutex<Vec<Held>>,
}

/// Pages that are written once.
struct Held {
    pages: Vec<Page>,
    seed: u64,
    random: bool,
}

impl Held {
    fn new(mib: u64, seed: u64, random: bool) -> Result<Self, String> {
        let mut pages = allocate(mib)?;
        for (index, page) in (0..).zip(&mut pages) {
            if random {
                pattern::fill(page, seed, index, 0);
            } else {
                pattern::fill_text(page, seed, index);
            }
        }
        Ok(Self {
            pages,
            seed,
            random,
        })
    }

    fn bad(&self) -> Vec<u64> {
        (0..)
            .zip(black_box(&self.pages))
            .filter(|(index, page)| {
                !if self.random {
                    pattern::holds(page, self.seed, *index, 0)
                } else {
                    pattern::holds_text(page, self.seed, *index)
                }
            })
            .map(|(index, _)| index)
            .collect()
    }
}

impl Memory {
    fn held(&self) -> MutexGuard<'_, Vec<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A workload that was started under another number ends.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Whole passes of the slowest-started rewriting thread.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// MiB under a workload.
    pub fn mib(&self) -> u64 {
        let held: usize = self.held().iter().map(|held| held.pages.len()).sum();
        self.rewriting_mib.load(Ordering::Relaxed) + held as u64 / PAGES
    }

    /// Processes made by the churning workload.
    pub fn churned(&self) -> u64 {
        self.churned.load(Ordering::Relaxed)
    }
}

/// Memory for pages. Page-aligned or not does not matter: every byte is checked.
fn allocate(mib: u64) -> Result<Vec<Page>, String> {
    let count = usize::try_from(mib * PAGES).map_err(|_| "Too much memory".to_owned())?;
    let mut pages = Vec::new();
    pages
        .try_reserve_exact(count)
        .map_err(|error| format!("No {mib} MiB: {error}"))?;
    pages.resize(count, [0; WORDS]);
    Ok(pages)
}

/// A seed that no other boot and no other workload has.
fn seed() -> u64 {
    static TAKEN: AtomicU64 = AtomicU64::new(0);
    let now = std::time::UNIX_EPOCH.elapsed().map_or(0, |time| {
        time.as_secs() ^ u64::from(time.subsec_nanos()) << 32
    });
    pattern::mix(now ^ pattern::mix(TAKEN.fetch_add(1, Ordering::Relaxed)))
}

/// Holds `mib` of random or text pages.
pub fn hold(guest: &Guest, mib: u64, random: bool) -> Result<Value, String> {
    let held = Held::new(mib, seed(), random)?;
    guest.memory.held().push(held);
    Ok(json!({ "held_mib": mib }))
}

/// Checks what is held. Bad pages are faults.
pub fn verify(guest: &Guest) -> Value {
    let held = guest.memory.held();
    let (mut checked, mut bad) = (0, 0);
    for part in held.iter() {
        checked += part.pages.len();
        for index in part.bad() {
            bad += 1;
            guest.faults.add(
                Fault::Memory,
                &format!("Held page {index} is not what was written"),
            );
        }
    }
    json!({ "checked": checked, "bad": bad })
}

/// Ends all workloads.
pub fn stop(guest: &Guest) -> Value {
    guest.memory.epoch.fetch_add(1, Ordering::Relaxed);
    guest.memory.held().clear();
    guest.memory.rewriting_mib.store(0, Ordering::Relaxed);
    json!({})
}

/// Starts to rewrite `mib`, divided among a thread for each vCPU. `rate` is in
/// MiB a second, all threads together; 0 is as fast as it goes.
pub fn rewrite(guest: &Arc<Guest>, mib: u64, rate: u64) -> Result<Value, String> {
    let threads = thread::available_parallelism()
        .map_or(1, |count| count.get() as u64)
        .min(mib.max(1));
    let epoch = guest.memory.epoch.load(Ordering::Relaxed);
    for number in 0..threads {
        let share = mib / threads + u64::from(number < mib % threads);
        let pages = allocate(share)?;
        let guest = Arc::clone(guest);
        // The time that a MiB must take at least.
        let pause = Duration::from_secs(1)
            .mul_f64(threads as f64)
            .checked_div(u32::try_from(rate).unwrap_or(u32::MAX));
        spawn("rewrite", move || {
            rewrite_pages(&guest, pages, epoch, number == 0, pause)
        })?;
    }
    guest.memory.rewriting_mib.fetch_add(mib, Ordering::Relaxed);
    Ok(json!({ "threads": threads }))
}

/// Checks and rewrites pages until the workloads are dropped.
fn rewrite_pages(
    guest: &Guest,
    mut pages: Vec<Page>,
    epoch: u64,
    leads: bool,
    pause: Option<Duration>,
) {
    let seed = seed();
    for (index, page) in (0..).zip(&mut pages) {
        pattern::fill(page, seed, index, 0);
    }
    for generation in 0.. {
        let mut started = Instant::now();
        for (index, page) in (0..).zip(black_box(&mut pages)) {
            if !pattern::holds(page, seed, index, generation) {
                let [_, _, there, ..] = page;
                let words =
                    format!("Page {index} has generation {there}, not {generation}, or is torn");
                guest.faults.add(Fault::Memory, &words);
            }
            pattern::fill(page, seed, index, generation + 1);
            if index % PAGES == PAGES - 1 {
                if guest.memory.epoch.load(Ordering::Relaxed) != epoch {
                    return;
                }
                if let Some(pause) = pause {
                    thread::sleep(pause.saturating_sub(started.elapsed()));
                    started = Instant::now();
                }
            }
        }
        if leads {
            guest
                .memory
                .generation
                .store(generation + 1, Ordering::Relaxed);
        }
    }
}

/// Starts to make and end processes, a few dozen a second.
pub fn churn(guest: &Arc<Guest>) -> Result<Value, String> {
    let epoch = guest.memory.epoch.load(Ordering::Relaxed);
    let guest = Arc::clone(guest);
    spawn("churn", move || {
        while guest.memory.epoch.load(Ordering::Relaxed) == epoch {
            if let Err(error) = system::run("true") {
                guest
                    .faults
                    .add(Fault::Memory, &format!("A process failed: {error}"));
            }
            guest.memory.churned.fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(20));
        }
    })?;
    Ok(json!({}))
}
