//! What people do with a desktop, as far as memory sees it.
//!
//! | command | does |
//! |---|---|
//! | `edit` | types into a document of 2 MiB, five keys a second, moves what is behind, and saves it now and then |
//! | `build` | compiles, in its way: processes read sources, write objects and archives of them, and end |
//! | `browse` | opens a page every few seconds: text, a tree of small objects, pictures; keeps the last twelve, and lets the older go |
//!
//! They end with `drop`, as the workloads of [`memory`](crate::memory) do.

use crate::faults::Fault;
use crate::{Guest, spawn, system};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::fs;
use std::hint::black_box;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use testbed_guest::pattern::{self, WORDS, mix};

/// A page of text of the usual kind.
fn text(seed: u64, index: u64) -> Vec<u8> {
    let mut page = [0; WORDS];
    pattern::fill_text(&mut page, seed, index);
    page.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn start(
    guest: &Arc<Guest>,
    name: &'static str,
    mut step: impl FnMut(u64) -> Result<Duration, String> + Send + 'static,
) -> Result<Value, String> {
    let epoch = guest.memory.epoch();
    let guest = Arc::clone(guest);
    spawn(name, move || {
        for number in 0.. {
            if guest.memory.epoch() != epoch {
                break;
            }
            match step(number) {
                Ok(pause) => thread::sleep(pause),
                Err(error) => {
                    guest.faults.add(Fault::Memory, &error);
                    break;
                }
            }
        }
    })?;
    Ok(json!({}))
}

/// Types into a document.
pub fn edit(guest: &Arc<Guest>) -> Result<Value, String> {
    let mut document: Vec<u8> = (0..512).flat_map(|index| text(1, index)).collect();
    let mut undo: VecDeque<(usize, u8)> = VecDeque::new();
    start(guest, "edit", move |key| {
        // Within a paragraph; now and then elsewhere.
        let paragraph = mix(key / 200) as usize % document.len();
        let at = (paragraph + key as usize % 200).min(document.len());
        let letter = b'a' + (mix(key) % 26) as u8;
        document.insert(at, letter);
        undo.push_back((at, letter));
        if undo.len() > 10_000 {
            undo.pop_front();
        }
        if key % 150 == 149 {
            let saved = fs::write("/tmp/document.new", &document)
                .and_then(|()| fs::rename("/tmp/document.new", "/tmp/document"));
            saved.map_err(|error| format!("Can't save: {error}"))?;
        }
        black_box(&document);
        Ok(Duration::from_millis(200))
    })
}

/// Builds software, in its way.
pub fn build(guest: &Arc<Guest>) -> Result<Value, String> {
    const SOURCES: u64 = 40;
    fs::create_dir_all("/tmp/build").map_err(|error| format!("/tmp/build: {error}"))?;
    for source in 0..SOURCES {
        let pages = 4 + mix(source) % 12;
        let bytes: Vec<u8> = (0..pages).flat_map(|page| text(source, page)).collect();
        fs::write(format!("/tmp/build/{source}.c"), bytes)
            .map_err(|error| format!("A source: {error}"))?;
    }
    start(guest, "build", move |step| {
        let source = step % SOURCES;
        if source == 0 && step > 0 {
            // All objects are there: one archive of them, and a file is changed for the next time.
            system::run("tar -c -f /tmp/build/program /tmp/build/objects")?;
            system::run("gzip -f /tmp/build/program")?;
            let changed = mix(step) % SOURCES;
            fs::write(
                format!("/tmp/build/{changed}.c"),
                [text(step, 0), text(changed, 1), text(changed, 2)].concat(),
            )
            .map_err(|error| format!("A source: {error}"))?;
            return Ok(Duration::from_millis(500));
        }
        fs::create_dir_all("/tmp/build/objects").map_err(|error| format!("Objects: {error}"))?;
        let file = format!("/tmp/build/{source}.c");
        // What compilers do: they read, think, and write something of another form.
        system::run(&format!("sort -r -o /tmp/build/objects/{source}.i {file}"))?;
        system::run(&format!("gzip -f /tmp/build/objects/{source}.i"))?;
        Ok(Duration::from_millis(20))
    })
}

/// Opens pages, as a browser does.
pub fn browse(guest: &Arc<Guest>) -> Result<Value, String> {
    struct Tab {
        text: Vec<u8>,
        nodes: Vec<Vec<u64>>,
        pictures: Vec<Vec<u64>>,
    }
    let open = |number: u64| Tab {
        text: (0..64).flat_map(|page| text(number % 7, page)).collect(),
        nodes: (0..12_000)
            .map(|node| {
                let kind = mix(number ^ node) % 9;
                vec![kind, node, number, 0, 0, kind * 8, node / 9, 1, 0, 0, 0, 0]
            })
            .collect(),
        pictures: (0..3 + mix(number) % 5)
            .map(|picture| {
                let words = 16_384 + mix(picture ^ number) % 65_536;
                (0..words)
                    .map(|word| mix(word ^ mix(picture ^ number << 8)))
                    .collect()
            })
            .collect(),
    };
    let mut tabs: VecDeque<Tab> = VecDeque::new();
    start(guest, "browse", move |tick| {
        if tick % 20 == 0 {
            tabs.push_back(open(tick / 20));
            if tabs.len() > 12 {
                tabs.pop_front();
            }
        }
        // Scripts, and what moves on a page: the newest one's nodes.
        if let Some(tab) = tabs.back_mut() {
            for step in 0..400 {
                let node = mix(tick << 16 | step) as usize % tab.nodes.len();
                tab.nodes[node][8] += 1;
                tab.nodes[node][9] = tick;
            }
            let frame = tab.pictures.len() as u64;
            if let Some(picture) = tab.pictures.get_mut((tick % frame.max(1)) as usize) {
                for (word, at) in picture.iter_mut().take(4096).zip(0..) {
                    *word = mix(at ^ tick);
                }
            }
            black_box(&tab.text);
        }
        black_box(&tabs);
        Ok(Duration::from_millis(200))
    })
}
