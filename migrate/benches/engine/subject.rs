//! What is moved: guests that were recorded, and one that is generated.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use migrate::guest::replay::generated::{Kind, Made, Random};
use migrate::guest::replay::{Change, Content, History, Memory, Recording, Step, Write};
use migrate::pages::PAGE_SIZE;

use crate::Result;

/// A guest and what it does.
pub struct Subject {
    pub name: String,
    /// The recording, if it is one.
    pub path: Option<PathBuf>,
    pub memory: Memory,
    pub history: History,
}

impl Subject {
    pub fn mib(&self) -> u64 {
        (self.memory.populated() * PAGE_SIZE as u64) >> 20
    }

    /// The bytes of page after page, holes as zeros.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.memory.pages() as usize * PAGE_SIZE);
        for pfn in 0..self.memory.pages() {
            match self.memory.page(pfn) {
                Some((page_type, content)) if page_type.has_data() => {
                    content.look(|page| bytes.extend_from_slice(page));
                }
                _ => bytes.resize(bytes.len() + PAGE_SIZE, 0),
            }
        }
        bytes
    }
}

/// Where `testbed record` puts recordings.
fn directory() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let root = variable("VMSHADOW_CACHE")
        .map(PathBuf::from)
        .or_else(|| variable("XDG_CACHE_HOME").map(|path| PathBuf::from(path).join("vmshadow")))
        .or_else(|| variable("HOME").map(|path| PathBuf::from(path).join(".cache/vmshadow")));
    Some(root?.join("recordings"))
}

/// The one that is generated, and all that were recorded.
pub fn all(generated: Subject) -> Result<Vec<Subject>> {
    let mut subjects = vec![generated];
    let Some(directory) = directory().filter(|directory| directory.exists()) else {
        eprintln!("No recordings in the cache: make record");
        return Ok(subjects);
    };
    let mut paths: Vec<PathBuf> = std::fs::read_dir(directory)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|it| it == "recording"))
        .collect();
    paths.sort();
    for path in paths {
        let recording = Arc::new(Recording::open(&path)?);
        subjects.push(Subject {
            name: format!("recorded: {}", recording.name),
            memory: recording.memory(),
            history: recording.history(),
            path: Some(path),
        });
    }
    Ok(subjects)
}

/// A guest of so many MiB that nothing makes smaller, as one that encrypts its memory.
pub fn incompressible(mib: u64) -> Subject {
    let pages = (0..mib << 8).map(|seed| {
        let kind = Kind::Noise;
        Content::Bytes(Arc::new(Made { kind, seed }.page()))
    });
    Subject {
        name: "incompressible".into(),
        path: None,
        memory: Memory::of(pages.collect()),
        history: History {
            steps: [].into(),
            at_suspend: Vec::new(),
        },
    }
}

/// A guest of so many MiB, half of it zero, that works with a sixteenth of it for `seconds`.
pub fn generated(mib: u64, seconds: u64) -> Subject {
    let mut random = Random::new(2026);
    let pages = mib << 8;
    let contents = (0..pages).map(|pfn| {
        // Zero and other pages in stretches, as guests have them; some are there twice.
        if pfn / 64 % 2 == 1 {
            return Content::Zero;
        }
        let seed = random.next() % (pages * 4);
        let kind = Kind::ALL[(pfn / 128 % 4) as usize];
        Content::Bytes(Arc::new(Made { kind, seed }.page()))
    });
    let memory = Memory::of(contents.collect());
    let working = pages / 16;
    let step = |at, random: &mut Random| Step {
        at: Duration::from_millis(at * 200),
        writes: (0..working / 8)
            .map(|_| Write {
                pfn: random.next() % working * 16,
                change: match random.below(10) {
                    0 => Change::Content(Content::Made(Made {
                        kind: Kind::ALL[random.below(4)],
                        seed: random.next(),
                    })),
                    1 => Change::CopyOf(random.next() % pages),
                    2 => Change::Content(Content::Zero),
                    _ => Change::Edit(random.next()),
                },
            })
            .collect(),
    };
    Subject {
        name: "generated".into(),
        path: None,
        memory,
        history: History {
            steps: (0..seconds * 5).map(|at| step(at, &mut random)).collect(),
            at_suspend: Vec::new(),
        },
    }
}
