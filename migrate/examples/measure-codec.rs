//! Measures what pages cost, in bytes and in time, with and without what the destination has.
//!
//! ```text
//! measure-codec [IMAGE IMAGE ...]
//! ```
//!
//! Each image is a guest's whole memory as it was in one round, of one size. Without any, a guest
//! is generated: half of it zero, the rest tables, records, text and noise, of which a working set
//! is rewritten between the rounds in different ways. All dirty pages of a round are encoded
//! twice, each as it is, and by what the destination has, by each technique; what comes out is
//! decoded and compared.

use anyhow::{Context, ensure};
use migrate::arrival::{Arrival, HeldPage};
use migrate::codec::{BatchDecoder, BatchEncoder, Technique};
use migrate::digest::{DigestKey, Digester};
use migrate::guest::PageState;
use migrate::held::{HOT_BYTES, Held};
use migrate::image::Arriving;
use migrate::pages::{PAGE_SIZE, Page, PageType, is_zero};
use std::time::{Duration, Instant};

/// Pages in one batch, as the engine sends them.
const BATCH: usize = 256;

/// Pages of the guest that is generated: 64 MiB.
const PAGES: usize = 16_384;

/// Its rounds.
const ROUNDS: usize = 4;

const TECHNIQUES: [(Technique, &str); 3] = [
    (Technique::Lz4, "LZ4"),
    (Technique::Zstd1, "zstd-1"),
    (Technique::Zstd3, "zstd-3"),
];

type Memory = Vec<Page>;

fn main() -> anyhow::Result<()> {
    let mut rounds = Vec::new();
    for path in std::env::args_os().skip(1) {
        let bytes = std::fs::read(&path)
            .with_context(|| format!("Can't read {}", path.to_string_lossy()))?;
        let (pages, rest) = bytes.as_chunks::<PAGE_SIZE>();
        ensure!(rest.is_empty(), "An image ends within a page");
        rounds.push(pages.to_vec());
    }
    if rounds.is_empty() {
        rounds = generate();
    }
    ensure!(
        rounds.iter().all(|round| round.len() == rounds[0].len()),
        "The images are not of one size"
    );
    println!(
        "{} pages ({} MiB), batches of {BATCH}; KiB that cross, ns a page to encode and to decode",
        rounds[0].len(),
        rounds[0].len() / 256
    );
    println!(
        "| round | dirty | technique | raw | ns | by what is held | ns | zero, reference, delta, raw |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (technique, name) in TECHNIQUES {
        measure(&rounds, technique, name)?;
    }
    Ok(())
}

/// What one way to encode a round costs.
#[derive(Default)]
struct Cost {
    bytes: usize,
    encoding: Duration,
    decoding: Duration,
}

impl Cost {
    fn columns(&self, pages: usize) -> String {
        let each = |took: Duration| took.as_nanos() / pages.max(1) as u128;
        format!(
            "{} | {}, {}",
            self.bytes.div_ceil(1024),
            each(self.encoding),
            each(self.decoding)
        )
    }
}

fn measure(rounds: &[Memory], technique: Technique, name: &str) -> anyhow::Result<()> {
    let pages = rounds[0].len();
    let digester = Digester::new(&DigestKey::new([1; 32]));
    let mut held = Held::nothing(pages as u64, digester.clone(), HOT_BYTES);
    let mut there: Vec<(PageState, Page)> = Vec::new();
    let none = PageState {
        page_type: PageType::Invalid,
        digest: digester.hole(PageType::Invalid),
    };
    there.resize(pages, (none, [0; PAGE_SIZE]));
    let (mut plain, mut encoder) = (BatchEncoder::new(), BatchEncoder::new());
    plain.set_technique(technique);
    encoder.set_technique(technique);
    let (mut plain_decoder, mut decoder) = (BatchDecoder::new(), BatchDecoder::new());
    let mut arrival = Arrival::default();
    let mut bytes = Vec::new();
    for (number, memory) in rounds.iter().enumerate() {
        let states: Vec<PageState> = memory
            .iter()
            .map(|content| PageState {
                page_type: PageType::Normal,
                digest: digester.page(PageType::Normal, content),
            })
            .collect();
        let dirty: Vec<usize> = (0..pages)
            .filter(|pfn| held.table().get(*pfn as u64) != Some(states[*pfn]))
            .collect();
        held.begin_round();
        let (mut as_is, mut by_held) = (Cost::default(), Cost::default());
        let mut counts = [0; 4];
        for batch in dirty.chunks(BATCH) {
            bytes.clear();
            let start = Instant::now();
            for pfn in batch {
                plain.push(*pfn as u64, PageType::Normal, &memory[*pfn])?;
            }
            plain.finish(&mut bytes);
            as_is.encoding += start.elapsed();
            as_is.bytes += bytes.len();
            let start = Instant::now();
            plain_decoder.decode(&bytes, pages as u64)?;
            as_is.decoding += start.elapsed();

            bytes.clear();
            let start = Instant::now();
            for pfn in batch {
                let content = Some(&memory[*pfn]).filter(|content| !is_zero(content));
                held.send(&mut encoder, *pfn as u64, states[*pfn], content)?;
            }
            let written = encoder.finish(&mut bytes);
            by_held.encoding += start.elapsed();
            by_held.bytes += bytes.len();
            let raw = written.raw + written.noise;
            let classes = [written.zero, written.reference, written.delta, raw];
            for (count, pages) in counts.iter_mut().zip(classes) {
                *count += pages;
            }
            let start = Instant::now();
            let batch = decoder.decode(&bytes, pages as u64)?;
            let resolved = arrival.resolve(
                batch,
                |pfn| {
                    let (state, content) = there.get(pfn as usize)?;
                    let (state, has_data) = (*state, state.page_type.has_data());
                    has_data.then_some(HeldPage { state, content })
                },
                |_, _, _| false,
            )?;
            by_held.decoding += start.elapsed();
            for page in resolved.digest(&digester) {
                let content = match page.content {
                    Arriving::Content(content) => *content,
                    _ => [0; PAGE_SIZE],
                };
                there[page.pfn as usize] = (page.state, content);
            }
        }
        ensure!(
            there.iter().map(|page| &page.1).eq(memory),
            "What was decoded is not what was encoded"
        );
        let [zero, reference, delta, raw] = counts;
        println!(
            "| {} | {} | {name} | {} | {} | {zero}, {reference}, {delta}, {raw} |",
            number + 1,
            dirty.len(),
            as_is.columns(dirty.len()),
            by_held.columns(dirty.len()),
        );
    }
    Ok(())
}

/// A generator of numbers that is the same everywhere (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

fn words(mut word: impl FnMut(u64) -> u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    let (places, _) = page.as_chunks_mut::<8>();
    for (place, at) in places.iter_mut().zip(0..) {
        *place = word(at).to_le_bytes();
    }
    page
}

fn text(random: &mut Random) -> Page {
    const SYLLABLES: [&[u8]; 16] = [
        b"the ", b"mi", b"gra", b"tion ", b"of ", b"a ", b"guest", b"ing ", b"net", b"work ",
        b"to ", b"er ", b"al", b"page", b".\n", b"0x",
    ];
    let mut page = [b' '; PAGE_SIZE];
    let mut at = 0;
    while at < PAGE_SIZE {
        let syllable = SYLLABLES[random.below(16)];
        let end = (at + syllable.len()).min(PAGE_SIZE);
        page[at..end].copy_from_slice(&syllable[..end - at]);
        at = end;
    }
    page
}

/// A page of one of four kinds.
fn page(kind: usize, random: &mut Random) -> Page {
    match kind {
        // Entries of a table, most of them in a row.
        0 => {
            let first = random.next() & 0xf_ffff;
            words(|at| ((first + at) << 12) | 0x67)
        }
        // Records of 64 bytes: pointers near each other, small numbers, flags, a hash.
        1 => {
            let heap = 0x7f00_0000_0000 | (random.next() & 0xffff_f000);
            words(|at| match at % 8 {
                0 | 1 => heap + random.next() % (1 << 20) / 16 * 16,
                2 => random.next() % 1000,
                3 => random.next() % 4,
                4 => random.next(),
                _ => 0,
            })
        }
        2 => text(random),
        _ => words(|_| random.next()),
    }
}

/// A guest's memory in each round.
fn generate() -> Vec<Memory> {
    let mut random = Random(2026);
    let mut memory: Memory = vec![[0; PAGE_SIZE]; PAGES];
    for (pfn, place) in memory.iter_mut().enumerate() {
        // Zero and other pages in stretches, as guests have them.
        if pfn / 64 % 2 == 0 {
            *place = page(pfn / 128 % 4, &mut random);
        }
    }
    // A quarter of what is not zero is somewhere else as well.
    for _ in 0..PAGES / 8 {
        let (from, to) = (random.below(PAGES), random.below(PAGES));
        if !is_zero(&memory[to]) {
            memory[to] = memory[from];
        }
    }
    let mut rounds = vec![memory.clone()];
    for _ in 1..ROUNDS {
        // The working set: the first 256 pages of each quarter; half of them are zero at first.
        for pfn in (0..4).flat_map(|part| part * 4096..part * 4096 + 256) {
            rewrite(&mut memory, pfn, &mut random);
        }
        rounds.push(memory.clone());
    }
    rounds
}

/// What a guest does to a page of its working set between two rounds.
fn rewrite(memory: &mut Memory, pfn: usize, random: &mut Random) {
    match random.below(10) {
        // Some words: counters, pointers, flags.
        0..=4 => {
            for _ in 0..1 + random.below(24) {
                let at = random.below(PAGE_SIZE / 8) * 8;
                let word = random.next() >> random.below(60);
                memory[pfn][at..at + 8].copy_from_slice(&word.to_le_bytes());
            }
        }
        // A stretch of it: a buffer, a log that grew.
        5 | 6 => {
            let new = text(random);
            let (from, length) = (random.below(PAGE_SIZE), random.below(1500));
            let end = (from + length).min(PAGE_SIZE);
            memory[pfn][from..end].copy_from_slice(&new[from..end]);
        }
        // All of it.
        7 => memory[pfn] = page(1 + random.below(3), random),
        // What is elsewhere too.
        8 => memory[pfn] = memory[random.below(PAGES)],
        _ => memory[pfn] = [0; PAGE_SIZE],
    }
}
