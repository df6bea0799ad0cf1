//! Bytes from anybody: random, cut, and valid ones with a few changes. No parser may panic, and
//! none may hold more memory than its limits say.
//!
//! The runs are the same every time. `HOSTILE_ROUNDS` asks for more of them than the few that a
//! test run can afford; migrate/fuzz goes further with the same functions.

#[path = "../synthesized/mod.rs"]
mod synthesized;
mod targets;

use std::sync::Arc;

use migrate::codec::{BatchEncoder, MAX_BATCH_BYTES, PREFIX_LEAST, Technique};
use migrate::digest::{DigestKey, Digester, MemoryDigest};
use migrate::group::{Nonce, Proof, Witness};
use migrate::guest::xen::stream::state::{GuestState, PvState, PvVcpu, TscInfo};
use migrate::guest::xen::stream::{Framing, record};
use migrate::guest::{PageState, PageTable};
use migrate::held::Held;
use migrate::link::direct::PublicKey;
use migrate::pages::{PAGE_SIZE, Page, PageType};
use migrate::wire::{
    Acceptance, CpuPolicy, DirectDoor, DirectOffer, FrameWriter, GroupOffer, GuestKind, Hello,
    JoinToken, MoveId, Offer, Part, Place, Purpose, Readiness, Refusal, RefusalCode, Role,
    ShadowHead, Tag, Text, ToDestination, ToSource, TscOffer, XenVersion,
};

const MIB: u64 = 1 << 20;

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
        (self.next() % limit.max(1) as u64) as usize
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }
}

/// Changes a few bytes, the beginning (where lengths and counts are) more often than the rest.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        let reach = if random.below(2) == 0 {
            64
        } else {
            bytes.len()
        };
        let at = random.below(bytes.len().min(reach));
        let interesting = [0, 1, 0x7f, 0x80, 0xff, b'"', b'9'];
        match random.below(8) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.next() as u8),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            3 => {
                let end = bytes.len().min(at + 1 + random.below(16));
                let copy = bytes[at..end].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, copy);
            }
            4 => {
                let word = [0, 1, 0x7fff_ffff, u64::MAX, 1 << 32][random.below(5)];
                let end = bytes.len().min(at + 8);
                bytes[at..end].copy_from_slice(&word.to_le_bytes()[..end - at]);
            }
            5 if at < bytes.len() => bytes[at] = interesting[random.below(interesting.len())],
            _ if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            _ => {}
        }
    }
}

/// How often a parser that takes a given number of bytes is tried.
fn rounds(length: usize) -> usize {
    let rounds = std::env::var("HOSTILE_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok());
    let budget: usize = rounds.unwrap_or(15_000);
    (budget * 256 / (length + 256)).max(budget / 100).max(20)
}

/// Tries a parser with bytes that are valid, cut, changed, and random; none may make it hold more
/// than `limit` bytes.
fn assault(name: &str, samples: &[Vec<u8>], limit: u64, parse: fn(&[u8])) {
    let try_one = |bytes: &[u8]| {
        let measured = allocation_counter::measure(|| parse(bytes));
        assert!(
            measured.bytes_max <= limit + 4 * bytes.len() as u64,
            "{name} held {} bytes for {}",
            measured.bytes_max,
            bytes.len()
        );
    };
    let mut random = Random(0x5eed);
    for sample in samples {
        try_one(sample);
        // Every length near the ends, and some in between.
        let step = (sample.len() / 500).max(1);
        (0..sample.len().min(300)).for_each(|end| try_one(&sample[..end]));
        (0..sample.len())
            .step_by(step)
            .for_each(|end| try_one(&sample[..end]));
        for _ in 0..rounds(sample.len()) {
            let mut changed = sample.clone();
            mutate(&mut changed, &mut random);
            try_one(&changed);
        }
    }
    for _ in 0..rounds(256) {
        let length = random.below(512);
        try_one(&random.bytes(length));
    }
}

fn offer() -> Offer {
    let configuration = serde_json::json!({
        "c_info": {
            "type": "pv",
            "name": "g1",
            "uuid": "6c1c2b54-62a4-4f3b-9d5a-0d8e7d1b6b0f"
        },
        "b_info": {
            "max_vcpus": 2,
            "avail_vcpus": [0, 1],
            "kernel": "/boot/guests/vmlinuz",
            "bootloader": "/bin/false",
            "cpuid": [{ "leaf": 1, "eax": "x".repeat(32) }],
            "type.pv": { "e820_host": "False" }
        },
        "disks": [{ "pdev_path": "/srv/disks/g1", "vdev": "xvda", "format": "raw" }],
        "nics": [{ "mac": "00:16:3e:01:02:03", "script": "/bin/false" }],
        "on_reboot": "restart"
    });
    Offer {
        purpose: Purpose::Move,
        connections: 2,
        direct: Some(DirectOffer {
            key: PublicKey::new([6; 32]),
            connections: 4,
            window: 1 << 20,
        }),
        move_id: MoveId::from_random([3; 16]),
        name: "g1".to_owned(),
        uuid: "6c1c2b54-62a4-4f3b-9d5a-0d8e7d1b6b0f".to_owned(),
        kind: GuestKind::Pv,
        pages: 1024,
        populated_pages: 1000,
        vcpus: 2,
        configuration,
        cpu_policy: CpuPolicy {
            leaves: vec![1; 48],
            msrs: vec![2; 16],
        },
        tsc: TscOffer {
            mode: 0,
            khz: 2_400_000,
        },
        xen: XenVersion {
            major: 4,
            minor: 17,
            extra: Text::new(".5"),
        },
        digest_key: DigestKey::new([9; 32]),
        verify: false,
    }
}

fn batch(technique: Technique) -> Vec<u8> {
    let mut encoder = BatchEncoder::new();
    encoder.set_technique(technique);
    let mut random = Random(7);
    for pfn in 0..40 {
        let page_type = PageType::ALL[random.below(12)];
        let pfn = pfn * 300;
        if page_type.has_data() {
            let word = random.next().to_le_bytes();
            let content: [u8; PAGE_SIZE] = std::array::from_fn(|at| word[at % 7] & 3);
            let mut changed = content;
            changed[random.below(PAGE_SIZE)] = 9;
            match random.below(5) {
                0 => encoder.push_same(pfn, page_type),
                1 => encoder.push_reference(pfn, page_type, pfn + 1),
                2 => encoder
                    .push_changed(pfn, page_type, &changed, &content)
                    .map(drop),
                3 => {
                    let witness = Witness(random.next().to_le_bytes());
                    encoder.push_shared(pfn, page_type, random.below(6) as u64, witness)
                }
                _ => encoder.push(pfn, page_type, &content).map(drop),
            }
            .expect("It fits");
        } else {
            encoder.push_hole(pfn, page_type).expect("It fits");
        }
    }
    let mut bytes = Vec::new();
    encoder.finish(&mut bytes);
    bytes
}

/// The rounds of a small guest in which pages are rewritten, copied, emptied, given another type
/// and ballooned out: each batch after its length.
fn crossing(technique: Technique) -> Vec<u8> {
    let pages = targets::ARRIVING_PAGES;
    let digester = Digester::new(&DigestKey::new([5; 32]));
    let mut held = Held::nothing(pages, digester.clone(), 16 * PAGE_SIZE);
    let mut encoder = BatchEncoder::new();
    encoder.set_technique(technique);
    let mut random = Random(11);
    let mut memory: Vec<(PageType, Page)> = (0..pages)
        .map(|pfn| {
            (
                PageType::Normal,
                std::array::from_fn(|at| (pfn * 7) as u8 ^ at as u8 & 9),
            )
        })
        .collect();
    let (mut all, mut classes) = (Vec::new(), Vec::new());
    let mut before = None;
    for _ in 0..4 {
        held.begin_round();
        for (pfn, (page_type, content)) in (0..).zip(&memory) {
            let state = PageState {
                page_type: *page_type,
                digest: digester.page(*page_type, content),
            };
            if held.table().get(pfn) == Some(state) {
                continue;
            }
            let content = content.iter().any(|byte| *byte != 0).then_some(content);
            let class = held
                .send(&mut encoder, pfn, state, content)
                .expect("It fits");
            classes.push(format!("{class:?}"));
        }
        let block = Arc::new(encoder.block().to_vec());
        let mut bytes = Vec::new();
        encoder.finish(&mut bytes);
        // Only the first round has enough to stand before the others.
        if block.len() >= PREFIX_LEAST {
            before = Some(block);
        }
        encoder.set_prefix(before.clone());
        all.extend((bytes.len() as u32).to_le_bytes());
        all.extend(bytes);
        for _ in 0..40 {
            let (one, other) = (random.below(64), random.below(64));
            match random.below(6) {
                0 => memory[one].1 = memory[other].1,
                1 => memory[one].1 = [0; PAGE_SIZE],
                2 => memory[one].0 = PageType::ALL[random.below(12)],
                _ => memory[one].1[random.below(PAGE_SIZE)] = random.next() as u8,
            }
        }
    }
    for class in ["None", "Zero", "Raw", "Same", "Reference", "Delta"] {
        assert!(classes.iter().any(|it| it == class), "No {class}");
    }
    all
}

fn state() -> GuestState {
    let vcpu = |id| PvVcpu {
        id,
        basic: vec![1; record::VCPU_CONTEXT_SIZE],
        extended: vec![2; 100],
        xsave: vec![3; 600],
        msrs: vec![4; 32],
    };
    let shared_info = Box::new([5; PAGE_SIZE]);
    GuestState::Pv(PvState {
        tsc: TscInfo::default(),
        shared_info,
        vcpus: vec![vcpu(0), vcpu(2)],
    })
}

fn to_destination() -> Vec<Vec<u8>> {
    let batch = batch(Technique::Zstd3);
    let messages = [
        ToDestination::Offer(Box::new(offer())),
        ToDestination::P2mFrames {
            max_pfn: 1023,
            populated: 7,
            frames: vec![5, 6],
        },
        ToDestination::Pages(&batch),
        ToDestination::RoundEnd {
            round: 1,
            pages: 40,
            last: true,
        },
        ToDestination::State(Box::new(state())),
        ToDestination::Final(MemoryDigest([1; 16])),
        ToDestination::Commit,
        ToDestination::CatchUp,
        ToDestination::Join {
            token: JoinToken::new([5; 16]),
            index: 1,
        },
        ToDestination::Batch {
            place: Place {
                batches: 7,
                messages: 2,
            },
            batch: &batch,
        },
        ToDestination::After(8),
        ToDestination::Spread(3),
        ToDestination::Prove(Proof([8; 32])),
        ToDestination::Abort(Text::new("Enough")),
        ToDestination::Ping(7),
    ];
    let mut all = FrameWriter::new(Vec::new());
    let mut each = Vec::new();
    for message in &messages {
        let mut one = FrameWriter::new(Vec::new());
        one.send(message).expect("It can be sent");
        all.send(message).expect("It can be sent");
        each.push(one.get_ref().clone());
    }
    each.push(all.get_ref().clone());
    each
}

/// What is known of a small guest's pages, as runs.
fn inventory() -> Vec<u8> {
    let digester = Digester::new(&DigestKey::new([1; 32]));
    let mut table = PageTable::new(40);
    for pfn in 4..30 {
        let page_type = match pfn {
            ..10 => PageType::Normal,
            10..20 => PageType::PinnedL1,
            _ => PageType::Invalid,
        };
        let digest = digester.page(page_type, &[(pfn % 3) as u8; PAGE_SIZE]);
        table.set(pfn, PageState { page_type, digest });
    }
    let mut runs = Vec::new();
    migrate::shadow::inventory::encode(&table, &digester, 0, 40, &mut runs);
    runs
}

fn to_source() -> Vec<Vec<u8>> {
    let xen = XenVersion {
        major: 4,
        minor: 17,
        extra: Text::default(),
    };
    let warnings = vec![Text::new("Careful")];
    let parts = vec![Part {
        name: Text::new("restore"),
        seconds: 0.5,
    }];
    let messages = [
        ToSource::Accept(Box::new(Acceptance {
            xen,
            tsc_khz: Some(1),
            warnings,
            edge_site: None,
            group: Some(GroupOffer {
                name: Text::new("acme"),
                nonce: Nonce([4; 16]),
            }),
            join: Some(JoinToken::new([5; 16])),
            direct: Some(DirectDoor {
                port: 7100,
                key: PublicKey::new([6; 32]),
            }),
            shadow: Some(ShadowHead {
                basis: Some(MemoryDigest([3; 16])),
                lacking: vec![(5, 2)],
            }),
        })),
        ToSource::Inventory {
            first: 0,
            runs: inventory(),
        },
        ToSource::Shares {
            total: 2,
            names: vec![6; 32],
        },
        ToSource::Kept,
        ToSource::Joined(3),
        ToSource::Refuse(Refusal {
            code: RefusalCode::Memory,
            reason: Text::new("Full"),
        }),
        ToSource::RoundAck {
            round: 1,
            pages: 2,
            behind: 1,
        },
        ToSource::Ready(Readiness {
            digest: MemoryDigest([1; 16]),
            parts,
            memory: u64::MAX,
        }),
        ToSource::Running,
        ToSource::Failed(Text::new("No")),
        ToSource::CaughtUp,
        ToSource::Pong(3),
    ];
    let mut all = FrameWriter::new(Vec::new());
    for message in &messages {
        all.send(message).expect("It can be sent");
    }
    vec![all.get_ref().clone()]
}

#[test]
fn hello_survives() {
    assault(
        "hello",
        &[Hello::new(Role::Source).encode()],
        64 << 10,
        targets::hello,
    );
}

#[test]
fn frames_to_destination_survive() {
    // The largest single message, decoded and sent again.
    let limit = 4 * MAX_BATCH_BYTES as u64 + 8 * Tag::Offer.limit() as u64;
    assault(
        "frames",
        &to_destination(),
        limit,
        targets::frames_to_destination,
    );
}

#[test]
fn frames_to_source_survive() {
    assault("frames", &to_source(), 2 * MIB, targets::frames_to_source);
}

#[test]
fn batches_survive() {
    // Two decoders and an encoder with its compressed copy.
    assault(
        "batch",
        &[Technique::Stored, Technique::Lz4, Technique::Zstd1].map(batch),
        5 * MAX_BATCH_BYTES as u64,
        targets::batch,
    );
}

#[test]
fn what_builds_upon_other_pages_survives() {
    // The guest, three times: as it is held, in a batch and its compressed copy, and as copies.
    let guest = targets::ARRIVING_PAGES * PAGE_SIZE as u64;
    assault(
        "arrival",
        &[Technique::Stored, Technique::Lz4, Technique::Zstd1].map(crossing),
        3 * guest + MIB,
        targets::arrival,
    );
}

#[test]
fn streams_survive() {
    let mut samples = Vec::new();
    for (choice, framing) in [(0, Framing::Libxc), (1, Framing::Libxl)] {
        let mut bytes = vec![choice];
        synthesized::write(&mut bytes, framing, 20).expect("A vector takes all");
        samples.push(bytes);
    }
    // An image keeps what the stream holds, and a few bytes for each page of the guest.
    assault(
        "stream",
        &samples,
        8 * MIB + targets::PAGES * 32,
        targets::stream,
    );
}

#[test]
fn inventories_survive() {
    // Two tables.
    let limit = 2 * targets::PAGES * 17 + MIB;
    assault("inventory", &[inventory()], limit, targets::inventory);
}

#[test]
fn configurations_survive() {
    let document = serde_json::to_vec(&offer()).expect("It is a document");
    assault("configuration", &[document], MIB, targets::configuration);
}

/// A document of the greatest length may hold as many values as it can; they must stay within
/// what one can afford.
#[test]
fn the_worst_document_is_affordable() {
    for filling in ["[],", "0,", "{\"\":0},", "\"\",", "[[[[0]]]],"] {
        let mut document = serde_json::to_value(offer()).expect("It is a document");
        document["configuration"] = "FILLING".into();
        let count = (Tag::Offer.limit() - 4096) / filling.len();
        let list = format!("[{}0]", filling.repeat(count));
        let text = document.to_string().replace("\"FILLING\"", &list);
        assert!(text.len() <= Tag::Offer.limit());
        let mut read = false;
        let measured = allocation_counter::measure(|| {
            read = serde_json::from_str::<Offer>(&text).is_ok();
        });
        assert!(read);
        assert!(measured.bytes_max < 192 * MIB, "{filling}: {measured:?}");
        targets::configuration(text.as_bytes());
    }
    // Depth is bounded by the parser.
    let deep = "[".repeat(500_000);
    targets::configuration(deep.as_bytes());
}

#[test]
fn p2m_walks_survive() {
    // Three levels of tables that point at each other, and a list.
    let mut linear = Vec::new();
    for word in [600 * 512u64, 0, 0, 1 << 12, 0xffff_c900_0000_0000, 2] {
        linear.extend(word.to_le_bytes());
    }
    let mut tree = linear.clone();
    tree[8] = 1;
    tree[24..32].fill(0);
    for (sample, entry) in [(&mut linear, 0x3067u64), (&mut tree, 3)] {
        for frame in 0..4u64 {
            for at in 0..512 {
                sample.extend((entry + (((frame * at) % 5) << 12)).to_le_bytes());
            }
        }
    }
    // A frame list of the largest guest, twice while it grows.
    assault(
        "p2m",
        &[linear, tree],
        2 * (1 << 24) / 512 * 8 * 2,
        targets::p2m,
    );
}
