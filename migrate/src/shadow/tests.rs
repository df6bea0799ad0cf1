use super::room::BESIDE_MEMORY;
use super::*;
use crate::guest::PageState;
use crate::image::{Arrived, Arriving};
use crate::pages::{Page, PageType};

const UUID: &str = "6C1c2b54-62a4-4f3b-9d5a-0d8e7d1b6b0f";
const PAGES: u64 = 64;

struct Site {
    root: tempfile::TempDir,
    shadows: Shadows,
}

fn site(policy: ShadowPolicy) -> Site {
    let root = tempfile::tempdir().unwrap();
    let directories = Directories::under(root.path());
    directories.create().unwrap();
    let shadows = Shadows::new(&directories, policy);
    Site { root, shadows }
}

fn key(number: u8) -> DigestKey {
    DigestKey::new([number; 32])
}

fn named(uuid: &str) -> Named<'_> {
    Named {
        uuid,
        name: "g1",
        peer: "b",
    }
}

/// What the guest has at a pfn: content, zeros, a page table, a hole, or it is not known.
fn page(pfn: u64) -> Option<(PageType, Page)> {
    match pfn {
        0..30 => Some((PageType::Normal, [pfn as u8 + 1; PAGE_SIZE])),
        30..40 => Some((PageType::Normal, [0; PAGE_SIZE])),
        40..45 => Some((PageType::PinnedL2, [pfn as u8; PAGE_SIZE])),
        45..50 => Some((PageType::Invalid, [0; PAGE_SIZE])),
        _ => None,
    }
}

fn table(digester: &Digester) -> PageTable {
    let mut table = PageTable::new(PAGES);
    for pfn in 0..PAGES {
        if let Some((page_type, content)) = page(pfn) {
            let digest = digester.page(page_type, &content);
            table.set(pfn, PageState { page_type, digest });
        }
    }
    table
}

/// A guest leaves its shadow, but for the pages that are `left_out`.
fn leave(site: &Site, key: &DigestKey, left_out: &[u64]) {
    let table = table(&Digester::new(key));
    let leaving = site
        .shadows
        .leave(named(UUID), key, &table)
        .unwrap()
        .unwrap();
    for pfn in (0..PAGES).filter(|pfn| !left_out.contains(pfn)) {
        match page(pfn) {
            Some((page_type, content)) if page_type.has_data() && content != [0; PAGE_SIZE] => {
                leaving.write(pfn, &[content]).unwrap();
            }
            _ => {}
        }
    }
    leaving.finish(&table).unwrap();
}

fn recall(site: &Site, key: &DigestKey) -> Option<Recalled> {
    let to = site.root.path().join("m.memory");
    site.shadows
        .recall(UUID, PAGES, std::slice::from_ref(&(0..PAGES)), key, &to)
        .unwrap()
}

fn same_as_left(recalled: &Recalled, digester: &Digester, but: &[u64]) {
    let expected = table(digester);
    for pfn in 0..PAGES {
        let state = recalled.image.table().get(pfn);
        if but.contains(&pfn) {
            assert_eq!(state, None, "{pfn}");
            continue;
        }
        assert_eq!(state, expected.get(pfn), "{pfn}");
        if let Some((page_type, content)) = page(pfn).filter(|(kind, _)| kind.has_data()) {
            let held = recalled.image.held(pfn).unwrap();
            assert_eq!((held.state.page_type, held.content), (page_type, &content));
        }
    }
}

#[test]
fn a_guest_that_comes_back_finds_its_pages() {
    let site = site(ShadowPolicy::default());
    leave(&site, &key(1), &[]);
    let listed = site.shadows.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert!(listed[0].memory && listed[0].uuid == UUID.to_ascii_lowercase());
    assert_eq!(site.shadows.key(UUID), Some(key(1)));
    let digester = Digester::new(&key(1));
    let recalled = recall(&site, &key(1)).unwrap();
    same_as_left(&recalled, &digester, &[]);
    assert_eq!(recalled.basis, table(&digester).digest(&digester));
    assert!(recalled.lacking.is_empty());
    // It is the move's now.
    assert!(recall(&site, &key(1)).is_none());
}

#[test]
fn what_is_not_as_it_was_is_missing() {
    let site = site(ShadowPolicy::default());
    leave(&site, &key(1), &[3, 41]);
    let path = site.shadows.memory_path(UUID).unwrap();
    let mut memory = fs::read(&path).unwrap();
    memory[7 * PAGE_SIZE + 100] ^= 1;
    memory.truncate(44 * PAGE_SIZE);
    fs::write(&path, memory).unwrap();
    let recalled = recall(&site, &key(1)).unwrap();
    same_as_left(&recalled, &Digester::new(&key(1)), &[3, 7, 41, 44]);
    assert_eq!(recalled.lacking.iter().collect::<Vec<_>>(), [3, 7, 41, 44]);
}

/// Whoever lacks the secret learns nothing of what is in it, and costs the guest nothing.
#[test]
fn without_its_secret_no_shadow_is_taken_up() {
    let site = site(ShadowPolicy::default());
    leave(&site, &key(1), &[5]);
    assert!(recall(&site, &key(2)).is_none());
    let recalled = recall(&site, &key(1)).unwrap();
    same_as_left(&recalled, &Digester::new(&key(1)), &[5]);
}

#[test]
fn the_secret_of_a_guest_is_kept_from_its_first_move_on() {
    for keep in [true, false] {
        let site = site(ShadowPolicy {
            keep,
            ..ShadowPolicy::default()
        });
        let key = site.shadows.key_for(UUID).unwrap();
        site.shadows.keep_key(named(UUID), &key).unwrap();
        assert_eq!(site.shadows.key_for(UUID).unwrap(), key);
        // What is there is more than that.
        if keep {
            leave(&site, &key, &[]);
        }
        let other = DigestKey::new([9; 32]);
        site.shadows.keep_key(named(UUID), &other).unwrap();
        assert_eq!(site.shadows.key(UUID), Some(key));
        assert_eq!(site.shadows.list().unwrap()[0].memory, keep);
    }
}

#[test]
fn what_would_be_taken_up_is_told_and_left_alone() {
    let site = site(ShadowPolicy::default());
    leave(&site, &key(1), &[]);
    let expected = |pages, number| site.shadows.expected(UUID, pages, &key(number));
    let (head, known) = expected(PAGES, 1).unwrap();
    assert_eq!(head.basis, Some(known.digest(&Digester::new(&key(1)))));
    assert!(expected(PAGES + 1, 1).is_none() && expected(PAGES, 2).is_none());
    assert!(recall(&site, &key(1)).is_some());
    assert!(expected(PAGES, 1).is_none());
}

#[test]
fn a_shadow_of_another_size_or_with_a_bad_table_is_dropped() {
    let site = site(ShadowPolicy::default());
    let to = site.root.path().join("m.memory");
    leave(&site, &key(1), &[]);
    assert!(
        site.shadows
            .recall(UUID, PAGES + 1, &[], &key(1), &to)
            .unwrap()
            .is_none()
    );
    assert!(site.shadows.list().unwrap().is_empty());
    leave(&site, &key(1), &[]);
    let path = site.shadows.table_path(UUID).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 20;
    bytes[last] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(recall(&site, &key(1)).is_none());
    assert!(!path.exists() && !to.exists());
}

#[test]
fn what_arrived_of_a_broken_move_is_kept() {
    let site = site(ShadowPolicy::default());
    let digester = Digester::new(&key(1));
    let path = site.root.path().join("incoming");
    let mut image = Image::create(&path, PAGES).unwrap();
    assert!(
        !site
            .shadows
            .keep_image(named(UUID), &key(1), &image)
            .unwrap(),
        "there is nothing"
    );
    let state = |page_type, content: &Page| PageState {
        page_type,
        digest: digester.page(page_type, content),
    };
    for pfn in 0..50 {
        let Some((page_type, content)) = page(pfn) else {
            continue;
        };
        // First something else, so that bytes of it stay in the file where there are zeros now.
        let old = [0xee; PAGE_SIZE];
        for (page_type, content) in [(PageType::Normal, old), (page_type, content)] {
            let arriving = match page_type.has_data() && content != [0; PAGE_SIZE] {
                true => Arriving::Content(&content),
                false => Arriving::Nothing,
            };
            image
                .store(&[Arrived {
                    pfn,
                    state: state(page_type, &content),
                    content: arriving,
                }])
                .unwrap();
        }
    }
    assert!(
        site.shadows
            .keep_image(named(UUID), &key(1), &image)
            .unwrap()
    );
    image.remove().unwrap();
    drop(image);
    let recalled = recall(&site, &key(1)).unwrap();
    same_as_left(&recalled, &digester, &[]);
    assert!(recalled.lacking.is_empty());
}

#[test]
fn a_guest_that_arrived_is_known_without_its_pages() {
    let site = site(ShadowPolicy::default());
    leave(&site, &key(1), &[]);
    let digester = Digester::new(&key(1));
    let table = table(&digester);
    site.shadows.remember(named(UUID), &key(1), &table).unwrap();
    let (head, known) = site.shadows.known(UUID).unwrap();
    assert_eq!(head.digest, known.digest(&digester));
    assert!(
        recall(&site, &key(1)).is_none(),
        "pages of another time are gone"
    );
    assert!(!site.shadows.list().unwrap()[0].memory);
}

#[test]
fn a_site_that_keeps_nothing_keeps_nothing() {
    let policy = ShadowPolicy {
        keep: false,
        ..ShadowPolicy::default()
    };
    let site = site(policy);
    let table = table(&Digester::new(&key(1)));
    assert!(
        site.shadows
            .leave(named(UUID), &key(1), &table)
            .unwrap()
            .is_none()
    );
    site.shadows.remember(named(UUID), &key(1), &table).unwrap();
    assert!(site.shadows.list().unwrap().is_empty());
}

#[test]
fn the_number_of_guests_is_limited() {
    let policy = ShadowPolicy {
        guests: 2,
        ..ShadowPolicy::default()
    };
    let site = site(policy);
    let table = table(&Digester::new(&key(1)));
    for uuid in ["a", "b", "c"] {
        let leaving = site.shadows.leave(named(uuid), &key(1), &table).unwrap();
        leaving.unwrap().finish(&table).unwrap();
    }
    assert_eq!(site.shadows.list().unwrap().len(), 2);
    site.shadows.drop_shadow("c").unwrap();
    site.shadows.drop_shadow("c").unwrap();
    assert_eq!(site.shadows.list().unwrap().len(), 1);
}

/// One that is larger than all that may be kept drives no other out.
#[test]
fn what_finds_no_room_in_any_case_costs_no_other() {
    let site = site(ShadowPolicy::default());
    leave(&site, &key(1), &[]);
    let table = table(&Digester::new(&key(1)));
    let none = Shadows::new(
        &Directories::under(site.root.path()),
        ShadowPolicy {
            gib: Some(0),
            ..ShadowPolicy::default()
        },
    );
    assert!(none.leave(named("b"), &key(1), &table).unwrap().is_none());
    assert_eq!(site.shadows.list().unwrap().len(), 1);
}

/// As after a kill.
#[test]
fn a_shadow_that_can_not_be_taken_up_refuses_no_guest() {
    let site = site(ShadowPolicy::default());
    leave(&site, &key(1), &[]);
    // Nothing that memory could be reserved in.
    let memory = site.shadows.memory_path(UUID).unwrap();
    fs::remove_file(&memory).unwrap();
    std::os::unix::fs::symlink("/dev/null", &memory).unwrap();
    let to = site.root.path().join("m.memory");
    let reserved = std::slice::from_ref(&(0..PAGES));
    let (image, shadow) = site
        .shadows
        .image(UUID, PAGES, &key(1), reserved, &to)
        .unwrap();
    assert_eq!(shadow, None);
    assert_eq!(image.table().known().len(), 0);
    assert!(!fs::symlink_metadata(&to).unwrap().is_symlink());
    assert_eq!(site.shadows.list().unwrap(), []);
}

/// Of a guest that was ended, or moved on by other ways.
#[test]
fn what_is_known_of_another_site_is_not_kept_for_ever() {
    let site = site(ShadowPolicy::default());
    leave(&site, &key(1), &[]);
    fs::remove_file(site.shadows.memory_path(UUID).unwrap()).unwrap();
    site.shadows.prune_beside(None).unwrap();
    assert_eq!(site.shadows.list().unwrap().len(), 1);
    let strict = Shadows::new(
        &Directories::under(site.root.path()),
        ShadowPolicy {
            days: 0,
            ..ShadowPolicy::default()
        },
    );
    // Times are in whole seconds.
    std::thread::sleep(Duration::from_millis(1100));
    strict.prune_beside(None).unwrap();
    assert_eq!(site.shadows.list().unwrap(), []);
}

#[test]
fn memory_that_nobody_can_tell_is_dropped() {
    let site = site(ShadowPolicy::default());
    leave(&site, &key(1), &[]);
    let memory = site.shadows.memory_path(UUID).unwrap();
    site.shadows.prune_beside(None).unwrap();
    assert!(memory.exists());
    // As a power cut may leave it.
    fs::write(memory.with_extension("table"), "").unwrap();
    let other = memory.with_file_name("6c1c2b54.memory");
    fs::write(&other, "lost").unwrap();
    site.shadows.prune_beside(None).unwrap();
    assert!(!memory.exists() && !memory.with_extension("table").exists() && !other.exists());
}

#[test]
fn a_guest_that_comes_needs_what_its_shadow_does_not_take_already() {
    let site = site(ShadowPolicy::default());
    let incoming = site.root.path();
    let reserved = std::slice::from_ref(&(0..PAGES));
    let room = || {
        site.shadows
            .room_for_guest(UUID, &key(1), reserved, incoming)
    };
    let all = PAGES * PAGE_SIZE as u64 + BESIDE_MEMORY;
    assert_eq!(room().unwrap().0, all);
    leave(&site, &key(1), &[]);
    let own = site.shadows.list().unwrap()[0].bytes;
    assert_eq!(room().unwrap().0, all - own);
    let beside = site
        .shadows
        .room_for_guest("b0", &key(1), reserved, incoming);
    assert_eq!(beside.unwrap().0, all);
    // What is of another secret is not its own.
    let other = site
        .shadows
        .room_for_guest(UUID, &key(2), reserved, incoming);
    assert_eq!(other.unwrap().0, all);
    // Where none is used, its own goes as any other.
    let unused = Shadows::new(
        &Directories::under(site.root.path()),
        ShadowPolicy {
            keep: false,
            ..ShadowPolicy::default()
        },
    );
    let needed = unused
        .room_for_guest(UUID, &key(1), reserved, incoming)
        .unwrap()
        .0;
    assert_eq!(needed, all);
}

#[test]
fn a_draft_that_was_left_is_dropped() {
    let site = site(ShadowPolicy::default());
    let table = table(&Digester::new(&key(1)));
    let leaving = site.shadows.leave(named(UUID), &key(1), &table).unwrap();
    std::mem::forget(leaving);
    let left = || fs::read_dir(&site.shadows.directory).unwrap().count();
    assert_eq!(left(), 1);
    let drafts = site.shadows.drafts().unwrap();
    assert!(drafts.iter().eq([&UUID.to_ascii_lowercase()]));
    site.shadows.drop_drafts(UUID).unwrap();
    assert_eq!(left(), 0);
}

#[test]
fn a_draft_leaves_nothing_and_a_path_is_no_uuid() {
    let site = site(ShadowPolicy::default());
    let table = table(&Digester::new(&key(1)));
    let leaving = site.shadows.leave(named(UUID), &key(1), &table).unwrap();
    drop(leaving);
    assert_eq!(fs::read_dir(&site.shadows.directory).unwrap().count(), 0);
    for uuid in ["", "../x", "a/b", "x"] {
        assert!(site.shadows.drop_shadow(uuid).is_err(), "{uuid:?}");
    }
}

/// It was kept long enough to be of use, and the guest that it is of has come.
#[test]
fn a_shadow_that_is_about_to_be_taken_up_is_not_too_old() {
    let site = site(ShadowPolicy::default());
    leave(&site, &key(1), &[]);
    let strict = Shadows::new(
        &Directories::under(site.root.path()),
        ShadowPolicy {
            days: 0,
            guests: 0,
            ..ShadowPolicy::default()
        },
    );
    // Times are in whole seconds.
    std::thread::sleep(Duration::from_millis(1100));
    let expected = strict.expected(UUID, PAGES, &key(1)).map(|(head, _)| head);
    let image = |number| {
        let to = site.root.path().join(format!("m{number}.memory"));
        let reserved = std::slice::from_ref(&(0..PAGES));
        let (_, shadow) = strict
            .image(UUID, PAGES, &key(number), reserved, &to)
            .unwrap();
        shadow
    };
    assert!(expected.is_some());
    assert_eq!(image(1), expected);
    // Of no use for who comes, it is.
    leave(&site, &key(1), &[]);
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(image(2), None);
    assert_eq!(site.shadows.list().unwrap(), []);
}

/// For the moment that it takes to look whether it is in use.
#[test]
fn a_shadow_that_is_locked_for_a_moment_is_waited_for() {
    let site = site(ShadowPolicy::default());
    leave(&site, &key(1), &[]);
    let lent = site.shadows.lend(UUID).unwrap().unwrap();
    let given_back = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(lent);
    });
    assert!(recall(&site, &key(1)).is_some());
    given_back.join().unwrap();
}

#[test]
fn what_can_not_be_read_now_is_not_dropped() {
    let site = site(ShadowPolicy::default());
    leave(&site, &key(1), &[]);
    let table = site.shadows.table_path(UUID).unwrap();
    let hidden = table.with_extension("hidden");
    fs::rename(&table, &hidden).unwrap();
    // That a directory can't be read as a file says nothing of the shadow.
    fs::create_dir(&table).unwrap();
    assert!(site.shadows.known(UUID).is_none());
    site.shadows.prune_beside(None).unwrap();
    let to = site.root.path().join("m.memory");
    let reserved = std::slice::from_ref(&(0..PAGES));
    let image = site.shadows.image(UUID, PAGES, &key(1), reserved, &to);
    assert_eq!(image.unwrap().1, None);
    fs::remove_file(&to).unwrap();
    fs::remove_dir(&table).unwrap();
    fs::rename(&hidden, &table).unwrap();
    assert!(recall(&site, &key(1)).is_some());
}
