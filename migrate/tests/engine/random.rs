//! Random histories of a guest's writes, of links that break, of workers that die, and of retries:
//! what arrives in the end is what left.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use migrate::Error;
use migrate::group::Group;
use migrate::guest::Moment;
use migrate::guest::replay::{
    Call, Change, Clock, Content, Crossing, Cut, Guest, History, Memory, Shape, Step, Watch, Write,
    cross, die, pair,
};
use migrate::pages::PageType;
use migrate::report::TrackerKind;
use migrate::rounds::Limits;
use migrate::source::Plan;
use proptest::prelude::*;

use crate::scene::{Place, Scene, connections, leave_shadow, pool};

/// The most pages of a guest here.
const MOST: u64 = 300;

/// What goes wrong in one attempt.
#[derive(Debug, Clone)]
enum Trouble {
    CutAfter(u64),
    At(Call, usize, Deed),
}

#[derive(Debug, Clone, Copy)]
enum Deed {
    Cut,
    /// A connection for pages, where there are any.
    CutOther,
    Kill,
    Cancel,
    Fail,
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        1 => Just(Content::Zero),
        3 => any::<prop::sample::Index>().prop_map(|which| which.get(pool()).clone()),
    ]
}

fn page_type() -> impl Strategy<Value = PageType> {
    prop::sample::select(vec![
        PageType::Normal,
        PageType::L1,
        PageType::L2,
        PageType::PinnedL1,
        PageType::PinnedL4,
    ])
}

fn memory() -> impl Strategy<Value = Memory> {
    let page = prop_oneof![
        1 => Just(None),
        6 => content().prop_map(|content| Some((PageType::Normal, content))),
        1 => (page_type(), content()).prop_map(Some),
    ];
    prop::collection::vec(page, 2..MOST as usize).prop_map(|pages| {
        let mut memory = Memory::holes(pages.len() as u64);
        for (pfn, page) in (0..).zip(pages) {
            if let Some((page_type, content)) = page {
                memory.set(pfn, page_type, content);
            }
        }
        // No guest has none at all.
        memory.set(0, PageType::Normal, Content::Zero);
        memory
    })
}

fn writes(most: usize) -> impl Strategy<Value = Vec<Write>> {
    let pfn = prop_oneof![3 => 0..20u64, 1 => 0..MOST];
    let change = prop_oneof![
        4 => any::<u64>().prop_map(Change::Edit),
        2 => content().prop_map(Change::Content),
        2 => (0..MOST).prop_map(Change::CopyOf),
        2 => page_type().prop_map(Change::Type),
        1 => Just(Change::Hole),
        1 => Just(Change::Unsettled),
        1 => Just(Change::Settled),
    ];
    let write = (pfn, change).prop_map(|(pfn, change)| Write { pfn, change });
    prop::collection::vec(write, 0..most)
}

fn history() -> impl Strategy<Value = History> {
    let step = writes(40).prop_map(|writes| Step {
        at: Duration::ZERO,
        writes,
    });
    (prop::collection::vec(step, 0..12), writes(20)).prop_map(|(steps, at_suspend)| History {
        steps: steps.into(),
        at_suspend,
    })
}

fn trouble() -> impl Strategy<Value = Trouble> {
    let call = prop::sample::select(vec![
        Call::Begin,
        Call::NextDirty,
        Call::Read(Moment::Live),
        Call::Suspend,
        Call::Read(Moment::Last),
        Call::FinalState,
        Call::EndTracking,
        Call::EndSuspend,
        Call::Resume,
        Call::Destroy,
        Call::Ask,
        Call::Start,
        Call::BeginRound,
        Call::Changed,
        Call::EndRound,
        Call::Behind,
        Call::Complete,
        Call::Completed,
        Call::Verify,
        Call::Confirm,
        Call::TakeOver,
        Call::Discard,
        Call::Keep,
    ]);
    let deed = prop::sample::select(vec![
        Deed::Cut,
        Deed::CutOther,
        Deed::Kill,
        Deed::Cancel,
        Deed::Fail,
    ]);
    prop_oneof![
        1 => (1..400_000u64).prop_map(Trouble::CutAfter),
        3 => (call, 1..4usize, deed).prop_map(|(call, nth, deed)| Trouble::At(call, nth, deed)),
    ]
}

/// Tracker, verify mode, rounds, whether the log is read all the time and hot pages wait, the
/// cores to encode on, and connections for pages: fewer than two are none.
type Options = (TrackerKind, bool, u32, bool, usize, usize);

fn options() -> impl Strategy<Value = Options> {
    let tracker = prop::sample::select(vec![TrackerKind::LogDirty, TrackerKind::Scan]);
    (
        tracker,
        any::<bool>(),
        1..6u32,
        any::<bool>(),
        1..4usize,
        0..4usize,
    )
}

fn plain(options: Options) -> Crossing {
    made(options).0
}

fn made((tracker, verify, rounds, looking, cores, others): Options) -> (Crossing, Vec<Cut>) {
    let (looking, downtime, behind) = match looking {
        true => (Duration::ZERO, Duration::from_nanos(1), 0),
        false => (Limits::default().looking, Duration::ZERO, 1024),
    };
    let (data, cuts) = connections(if others < 2 { 0 } else { others });
    let crossing = Crossing {
        tracker,
        plan: Plan {
            verify,
            // As many rounds as are allowed: this process is too fast for more than one.
            limits: Limits {
                downtime,
                rounds,
                looking,
                behind,
                ..Limits::default()
            },
            cores: NonZeroUsize::new(cores),
            ..Plan::default()
        },
        data,
        ..Crossing::default()
    };
    (crossing, cuts)
}

/// One move in which things go wrong. Where the guest is then.
fn attempt(scene: &Scene, troubles: &[Trouble], options: Options) -> Place {
    let mut shape = Shape::default();
    let mut deeds = Vec::new();
    for trouble in troubles {
        match *trouble {
            Trouble::CutAfter(bytes) => shape.cut_after = Some(bytes),
            Trouble::At(call, nth, deed) => deeds.push((call, nth, deed, AtomicUsize::new(0))),
        }
    }
    let (near, far, cut) = pair(shape);
    let (plain, others) = made(options);
    let cancel = Arc::<AtomicBool>::default();
    let cancelled = Arc::clone(&cancel);
    let watch: Arc<Watch> = Arc::new(move |this| {
        for (call, nth, deed, seen) in &deeds {
            if this != *call || seen.fetch_add(1, Ordering::Relaxed) + 1 != *nth {
                continue;
            }
            match deed {
                Deed::Cut => cut.cut(),
                Deed::CutOther => others.iter().take(1).for_each(Cut::cut),
                Deed::Kill => die(),
                Deed::Cancel => cancelled.store(true, Ordering::Relaxed),
                Deed::Fail => return Err(Error::Refused("It fails".into())),
            }
        }
        Ok(())
    });
    let crossing = Crossing {
        cancel,
        // Each call is made at one of the sites, but for the start of a keeper.
        at_source: Arc::clone(&watch),
        at_destination: watch,
        ..plain
    };
    let crossed = cross(&scene.near, &scene.far, (near, far), crossing).unwrap();
    scene.settled(&crossed)
}

/// A guest that has given all of its memory up is refused.
fn has_memory(scene: &Scene) -> bool {
    let populated = |guest: &mut Guest| Ok(guest.memory().populated());
    scene.near.with_guest(populated).unwrap() > 0
}

proptest! {
    #![proptest_config(ProptestConfig {
        // A whole move takes longer than a test of a function.
        cases: ProptestConfig::default().cases / 6,
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_arrives_is_what_left(
        memory in memory(),
        history in history(),
        attempts in prop::collection::vec(prop::collection::vec(trouble(), 1..4), 0..3),
        options in options(),
        later in history(),
        shared in prop::option::of(memory()),
    ) {
        let mut guest = Guest::idle("g1", memory);
        guest.live(history, Clock::Calls);
        let scene = Scene::with(guest);
        // Another guest of a trust group has been there.
        if let Some(memory) = &shared {
            let group = Group::new("acme", &["g*".into()], &[1; 32]);
            scene.near.join(group.clone());
            scene.far.join(group);
            leave_shadow(&scene.far, "g2", "5eed5eed-0000-4000-8000-000000000002", memory);
        }
        let moved = attempts
            .iter()
            .any(|troubles| attempt(&scene, troubles, options) == Place::Destination);
        if !moved {
            prop_assume!(has_memory(&scene));
            scene.moves(plain(options));
        }
        // And back, with what it did there.
        scene.far.with_guest(|guest| {
            guest.live(later, Clock::Calls);
            Ok(())
        }).unwrap();
        let back = scene.turned();
        prop_assume!(has_memory(&back));
        back.moves(plain(options));
    }
}
