//! Both ends at once: whatever a guest does, the destination has its memory in the end.

use super::*;
use crate::arrival::{Arrival, ArrivalError};
use crate::codec::{BatchDecoder, Technique};
use crate::digest::DigestKey;
use crate::image::Image;
use crate::pages::{PAGE_SIZE, PageSet, PageType};
use proptest::prelude::*;
use std::collections::HashMap;

const PAGES: u64 = 48;

fn noise(seed: u64) -> Box<Page> {
    let mut state = seed;
    Box::new(std::array::from_fn(|_| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 56) as u8
    }))
}

/// What a guest does to one of its pages.
#[derive(Debug, Clone)]
enum Act {
    /// Other bytes.
    Write(u64),
    /// A few other bytes at a place.
    Change(usize, u8),
    Clear,
    /// The content of another page.
    Copy(Pfn),
    Retype(PageType),
    /// Given to the host, or taken back.
    Balloon,
}

fn acts() -> impl Strategy<Value = (Pfn, Act)> {
    let tables = [PageType::Normal, PageType::L1, PageType::PinnedL1];
    let act = prop_oneof![
        1 => (0u64..40).prop_map(Act::Write),
        4 => (0..PAGE_SIZE, any::<u8>()).prop_map(|(at, value)| Act::Change(at, value)),
        1 => Just(Act::Clear),
        2 => (0..PAGES).prop_map(Act::Copy),
        1 => proptest::sample::select(tables.to_vec()).prop_map(Act::Retype),
        1 => Just(Act::Balloon),
    ];
    (0..PAGES, act)
}

/// What happens between two rounds; and how pages are put into batches in the second one.
#[derive(Debug, Clone)]
struct Step {
    acts: Vec<(Pfn, Act)>,
    batch: usize,
    /// Pages of this round that are left for a later one.
    deferred: Vec<Pfn>,
    technique: Technique,
}

fn steps() -> impl Strategy<Value = Step> {
    (
        proptest::collection::vec(acts(), 0..40),
        1usize..20,
        proptest::collection::vec(0..PAGES, 0..6),
        proptest::sample::select(Technique::ALL.to_vec()),
    )
        .prop_map(|(acts, batch, deferred, technique)| Step {
            acts,
            batch,
            deferred,
            technique,
        })
}

/// A guest at the source, and what has arrived of it.
struct Crossing {
    memory: Vec<(PageType, Box<Page>)>,
    digester: Digester,
    held: Held,
    encoder: BatchEncoder,
    decoder: BatchDecoder,
    arrival: Arrival,
    image: Image,
    _directory: tempfile::TempDir,
}

impl Crossing {
    fn new(hot_bytes: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let digester = Digester::new(&DigestKey::new([8; 32]));
        Crossing {
            memory: vec![(PageType::Normal, Box::new([0; PAGE_SIZE])); PAGES as usize],
            held: Held::nothing(PAGES, digester.clone(), hot_bytes),
            digester,
            encoder: BatchEncoder::new(),
            decoder: BatchDecoder::new(),
            arrival: Arrival::default(),
            image: Image::create(&directory.path().join("m.memory"), PAGES).unwrap(),
            _directory: directory,
        }
    }

    fn act(&mut self, pfn: Pfn, act: &Act) {
        let copy = match act {
            Act::Copy(from) => self.memory[*from as usize].1.clone(),
            _ => noise(0),
        };
        let (page_type, content) = &mut self.memory[pfn as usize];
        match act {
            Act::Write(seed) => *content = noise(*seed),
            Act::Change(at, value) => content[*at..(*at + 5).min(PAGE_SIZE)].fill(*value),
            Act::Clear => content.fill(0),
            Act::Copy(_) => *content = copy,
            Act::Retype(new) => *page_type = *new,
            Act::Balloon if page_type.has_data() => *page_type = PageType::Invalid,
            Act::Balloon => *page_type = PageType::Normal,
        }
    }

    fn state(&self, pfn: Pfn) -> PageState {
        let (page_type, content) = &self.memory[pfn as usize];
        PageState {
            page_type: *page_type,
            digest: self.digester.page(*page_type, content),
        }
    }

    /// Sends what the destination has not, as a tracker finds it; pages by their class.
    fn round(&mut self, step: &Step) -> HashMap<String, usize> {
        self.held.begin_round();
        self.encoder.set_technique(step.technique);
        let mut classes = HashMap::new();
        let dirty: Vec<Pfn> = (0..PAGES)
            .filter(|pfn| !step.deferred.contains(pfn))
            .filter(|pfn| self.held.table().get(*pfn) != Some(self.state(*pfn)))
            .collect();
        for batch in dirty.chunks(step.batch) {
            for pfn in batch {
                let state = self.state(*pfn);
                let (page_type, content) = &self.memory[*pfn as usize];
                // Tables are not looked at before they are copied.
                let normal = *page_type == PageType::Normal;
                let zero = normal && crate::pages::is_zero(content);
                let content = (page_type.has_data() && !zero).then_some(&**content);
                let class = self.held.send(&mut self.encoder, *pfn, state, content);
                *classes.entry(format!("{:?}", class.unwrap())).or_default() += 1;
            }
            let mut bytes = Vec::new();
            self.encoder.finish(&mut bytes);
            self.take(&bytes).unwrap();
        }
        classes
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), ArrivalError> {
        let batch = self.decoder.decode(bytes, PAGES).unwrap();
        let image = &self.image;
        let resolved = self
            .arrival
            .resolve(batch, |pfn| image.held(pfn), |_, _, _| false)?;
        let arrived = resolved.digest(&self.digester);
        self.image.store(&arrived).unwrap();
        Ok(())
    }

    /// All that was sent is there.
    fn check(&self, left: &PageSet) {
        for pfn in (0..PAGES).filter(|pfn| !left.contains(*pfn)) {
            let (page_type, content) = &self.memory[pfn as usize];
            assert_eq!(self.image.table().get(pfn), Some(self.state(pfn)), "{pfn}");
            if page_type.has_data() {
                assert!(self.image.content(pfn) == Some(&**content), "{pfn}");
            }
        }
        let arrived = self.image.table().digest(&self.digester);
        assert_eq!(self.held.digest(), arrived);
    }
}

fn step(acts: Vec<(Pfn, Act)>) -> Step {
    Step {
        acts,
        batch: 16,
        deferred: Vec::new(),
        technique: Technique::Zstd1,
    }
}

#[test]
fn each_page_goes_by_the_shortest_way() {
    let mut crossing = Crossing::new(HOT_BYTES);
    let mut go = |acts: Vec<(Pfn, Act)>, classes: &[(&str, usize)]| {
        for (pfn, act) in &acts {
            crossing.act(*pfn, act);
        }
        let sent = crossing.round(&step(acts));
        crossing.check(&PageSet::new(PAGES));
        let expected = classes.iter().map(|(name, count)| ((*name).into(), *count));
        assert_eq!(sent, expected.collect::<HashMap<String, usize>>());
    };
    let all = PAGES as usize;
    // In one batch: 3 is as 2 is, before that is anywhere else.
    go(
        vec![(2, Act::Write(1)), (3, Act::Copy(2)), (40, Act::Balloon)],
        &[("Zero", all - 3), ("Raw", 1), ("Reference", 1), ("None", 1)],
    );
    go(vec![], &[]);
    go(
        vec![(2, Act::Change(7, 1)), (3, Act::Clear)],
        &[("Delta", 1), ("Zero", 1)],
    );
    // What 2 and 3 had is nowhere any more.
    go(vec![(4, Act::Write(1))], &[("Raw", 1)]);
    // A higher pfn in the same batch still has its old content for a lower one.
    go(
        vec![(1, Act::Copy(4)), (4, Act::Write(2))],
        &[("Reference", 1), ("Raw", 1)],
    );
    go(vec![(1, Act::Retype(PageType::PinnedL1))], &[("Same", 1)]);
    go(vec![(4, Act::Clear)], &[("Zero", 1)]);
    go(vec![(4, Act::Retype(PageType::L1))], &[("Same", 1)]);
    go(vec![(1, Act::Balloon)], &[("None", 1)]);
    // Neither its own content nor that of others can come from a hole.
    go(
        vec![(1, Act::Balloon), (9, Act::Copy(1))],
        &[("Raw", 1), ("Reference", 1)],
    );
}

#[test]
fn a_page_that_builds_upon_nothing_is_refused() {
    let refused = |write: fn(&mut BatchEncoder), original| {
        let mut crossing = Crossing::new(HOT_BYTES);
        // 2 and 3 have arrived, 3 as a hole; of the rest nothing is known.
        let mut bytes = Vec::new();
        let encoder = &mut crossing.encoder;
        encoder.push(2, PageType::Normal, &noise(1)).unwrap();
        encoder.push_hole(3, PageType::Invalid).unwrap();
        encoder.finish(&mut bytes);
        crossing.take(&bytes).unwrap();
        bytes.clear();
        write(&mut crossing.encoder);
        crossing.encoder.finish(&mut bytes);
        let pfn = 5;
        let error = ArrivalError::NothingThere { pfn, original };
        assert_eq!(crossing.take(&bytes), Err(error));
        assert!(crossing.image.held(5).is_none());
        assert!(
            crossing.image.held(4).is_none(),
            "Part of a batch was stored"
        );
    };
    const NORMAL: PageType = PageType::Normal;
    refused(|to| to.push_same(5, NORMAL).unwrap(), 5);
    refused(|to| to.push_reference(5, NORMAL, 3).unwrap(), 3);
    refused(|to| to.push_reference(5, NORMAL, 40).unwrap(), 40);
    // A page of the same batch that comes later, and one that becomes a hole before.
    refused(
        |to| {
            to.push_zero(4, NORMAL).unwrap();
            to.push_reference(5, NORMAL, 6).unwrap();
            to.push(6, NORMAL, &noise(1)).unwrap();
        },
        6,
    );
    refused(
        |to| {
            to.push_hole(2, PageType::Invalid).unwrap();
            to.push_reference(5, NORMAL, 2).unwrap();
        },
        2,
    );
    refused(
        |to| {
            let mut new = noise(1);
            new[9] ^= 1;
            to.push_changed(5, NORMAL, &noise(1), &new).unwrap();
        },
        5,
    );
}

proptest! {
    #[test]
    fn whatever_the_guest_does_its_memory_arrives(
        history in proptest::collection::vec(steps(), 1..8),
        hot_pages in prop_oneof![Just(0usize), 1usize..12, Just(1000usize)],
    ) {
        let mut crossing = Crossing::new(hot_pages * PAGE_SIZE);
        for step in &history {
            for (pfn, act) in &step.acts {
                crossing.act(*pfn, act);
            }
            crossing.round(step);
            let mut left = PageSet::new(PAGES);
            left.extend(step.deferred.iter().copied());
            crossing.check(&left);
        }
        crossing.round(&step(Vec::new()));
        crossing.check(&PageSet::new(PAGES));
    }
}
