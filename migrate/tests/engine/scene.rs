//! Two sites and a guest between them.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use migrate::digest::{DigestKey, Digester};
use migrate::error::chain;
use migrate::guest::replay::generated::{Kind, Made, Random};
use migrate::guest::replay::{
    Call, Change, Clock, Content, Crossed, Crossing, Cut, Guest, History, Memory, Shape, Site,
    Step, Watch, Write, cross, pair,
};
use migrate::guest::{PageState, PageTable};
use migrate::handover::journal::Outcome;
use migrate::link::Link;
use migrate::pages::PageType;
use migrate::shadow::{Named, ShadowPolicy, Shadows};

/// Where a guest is when all is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Source,
    Destination,
}

/// Two sites.
pub struct Scene {
    _root: Arc<tempfile::TempDir>,
    pub near: Arc<Site>,
    pub far: Arc<Site>,
}

impl Scene {
    pub fn new() -> Scene {
        let root = tempfile::tempdir().unwrap();
        let site = |name: &str| Site::new(&root.path().join(name)).unwrap();
        Scene {
            near: site("near"),
            far: site("far"),
            _root: Arc::new(root),
        }
    }

    /// With that guest at the near site.
    pub fn with(guest: Guest) -> Scene {
        let scene = Scene::new();
        scene.near.start(guest);
        scene
    }

    /// The way back.
    pub fn turned(&self) -> Scene {
        Scene {
            _root: Arc::clone(&self._root),
            near: Arc::clone(&self.far),
            far: Arc::clone(&self.near),
        }
    }

    /// Moves the guest over a link as fast as this process.
    pub fn cross(&self, crossing: Crossing) -> Crossed {
        let (near, far, _cut) = pair(Shape::default());
        cross(&self.near, &self.far, (near, far), crossing).unwrap()
    }

    /// Law 1: the guest runs at one site, both journals say which, and nothing of it is left at
    /// the other. Where it moved, its memory is what it was.
    pub fn settled(&self, crossed: &Crossed) -> Place {
        let place = match (self.near.runs(), self.far.runs()) {
            (true, false) => Place::Source,
            (false, true) => Place::Destination,
            both => panic!("It runs at {both:?}: {crossed:?}"),
        };
        let outcome = match place {
            Place::Source => Outcome::Aborted,
            Place::Destination => Outcome::Moved,
        };
        assert_eq!(crossed.source_journal.outcome, Some(outcome), "{crossed:?}");
        if let Some(there) = &crossed.destination_journal {
            assert_eq!(there.outcome, Some(outcome), "{crossed:?}");
        }
        let arriving = std::fs::read_dir(self.far.directories.incoming()).unwrap();
        assert_eq!(arriving.count(), 0, "{crossed:?}");
        match place {
            Place::Source => {
                assert!(!self.far.has_any(), "{crossed:?}");
                let logged = self.near.with_guest(|guest| Ok(guest.is_logged()));
                assert!(!logged.unwrap(), "{crossed:?}");
            }
            Place::Destination => {
                assert!(!self.near.has_any(), "{crossed:?}");
                self.same_memory();
            }
        }
        place
    }

    /// What the guest left behind is what it has now.
    pub fn same_memory(&self) {
        let left = self.near.left().unwrap();
        let differences = self
            .far
            .with_guest(|guest| Ok(guest.memory().differences(&left)))
            .unwrap();
        assert_eq!(differences, Vec::<u64>::new());
    }

    /// A move that must succeed.
    pub fn moves(&self, crossing: Crossing) -> Crossed {
        let crossed = self.cross(crossing);
        if let Some(error) = crossed.source.error() {
            panic!("{}", chain(error));
        }
        assert!(crossed.source.is_ok() && crossed.destination.is_ok());
        assert_eq!(self.settled(&crossed), Place::Destination);
        crossed
    }
}

/// So many connections for pages beside the first one, both ends of each, and what cuts them.
pub fn connections(count: usize) -> ((Vec<Link>, Vec<Link>), Vec<Cut>) {
    let (mut data, mut cuts) = ((Vec::new(), Vec::new()), Vec::new());
    for _ in 0..count {
        let (near, far, cut) = pair(Shape::default());
        data.0.push(near);
        data.1.push(far);
        cuts.push(cut);
    }
    (data, cuts)
}

/// Pages of the guest of these tests.
pub const PAGES: u64 = 700;

/// A guest with all kinds of pages, who works with some of them.
pub fn busy(seed: u64) -> Guest {
    let mut random = Random::new(seed);
    let mut memory = Memory::holes(PAGES);
    for pfn in 0..PAGES {
        let made = content(&mut random);
        match random.below(16) {
            0 => {}
            1..=6 => memory.set(pfn, PageType::Normal, Content::Zero),
            7 => memory.set(pfn, PageType::L1, made),
            _ => memory.set(pfn, PageType::Normal, made),
        }
    }
    let mut guest = Guest::idle("g1", memory);
    guest.live(history(&mut random, 12, 60), Clock::Calls);
    guest
}

/// So few pages that a guest has some of them more than once.
pub fn pool() -> &'static [Content] {
    static PAGES: OnceLock<Vec<Content>> = OnceLock::new();
    PAGES.get_or_init(|| {
        let page = |seed| {
            let kind = Kind::ALL[seed as usize % 4];
            Content::Bytes(Arc::new(Made { kind, seed }.page()))
        };
        (0..400).map(page).collect()
    })
}

fn content(random: &mut Random) -> Content {
    pool()[random.below(pool().len())].clone()
}

/// What a busy guest does.
pub fn history(random: &mut Random, steps: usize, writes: usize) -> History {
    let step = |random: &mut Random| Step {
        at: Duration::ZERO,
        writes: (0..writes).map(|_| write(random)).collect(),
    };
    let mut pinned = Vec::new();
    for _ in 0..20 {
        pinned.push(Write {
            pfn: random.next() % PAGES,
            change: Change::Type(PageType::PinnedL1),
        });
    }
    History {
        steps: (0..steps).map(|_| step(random)).collect::<VecDeque<_>>(),
        at_suspend: pinned,
    }
}

fn write(random: &mut Random) -> Write {
    let anywhere = random.next() % PAGES;
    // Most of what it does is in its working set.
    let pfn = if random.below(4) > 0 {
        anywhere % 100
    } else {
        anywhere
    };
    let change = match random.below(12) {
        0..=5 => Change::Edit(random.next()),
        6 => Change::CopyOf(random.next() % PAGES),
        7 => Change::Content(Content::Zero),
        8 => Change::Content(content(random)),
        9 => Change::Type([PageType::Normal, PageType::L1, PageType::L2][random.below(3)]),
        10 => Change::Hole,
        _ => [Change::Unsettled, Change::Settled][random.below(2)].clone(),
    };
    Write { pfn, change }
}

/// The shadows of a site.
pub fn shadows(site: &Site) -> Shadows {
    Shadows::new(&site.directories, ShadowPolicy::default())
}

/// Leaves the shadow of another guest at a site.
pub fn leave_shadow(site: &Site, name: &str, uuid: &str, memory: &Memory) {
    let key = DigestKey::new([9; 32]);
    let digester = Digester::new(&key);
    let mut table = PageTable::new(memory.pages());
    let pages = || {
        let page = |pfn| Some((pfn, memory.page(pfn)?));
        (0..memory.pages()).filter_map(page)
    };
    for (pfn, (page_type, content)) in pages() {
        let digest = match page_type.has_data() {
            true => content.look(|page| digester.page(page_type, page)),
            false => digester.hole(page_type),
        };
        table.set(pfn, PageState { page_type, digest });
    }
    let peer = "elsewhere";
    let named = Named { uuid, name, peer };
    let leaving = shadows(site).leave(named, &key, &table).unwrap().unwrap();
    for (pfn, (page_type, content)) in pages() {
        if page_type.has_data() {
            content.look(|page| leaving.write(pfn, &[*page])).unwrap();
        }
    }
    leaving.finish(&table).unwrap();
}

/// Does something at the nth time that a call is made.
pub fn at_call(call: Call, nth: usize, act: impl Fn() + Send + Sync + 'static) -> Arc<Watch> {
    let seen = AtomicUsize::new(0);
    Arc::new(move |this| {
        if this == call && seen.fetch_add(1, Ordering::Relaxed) + 1 == nth {
            act();
        }
        Ok(())
    })
}
