use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

/// A guest's frames.
#[derive(Default)]
struct Memory {
    frames: HashMap<Mfn, Box<Page>>,
    next: Mfn,
}

#[derive(Debug, PartialEq)]
struct Unreadable;

const MAX_MFN: Mfn = 0xff_ffff;

impl Memory {
    fn new() -> Self {
        Self {
            frames: HashMap::new(),
            next: 0x1000,
        }
    }

    fn allocate(&mut self) -> Mfn {
        // Not in order, as on a real host.
        self.next = (self.next * 5 + 0x357) & MAX_MFN | 0x800;
        while self.frames.contains_key(&self.next) {
            self.next += 1;
        }
        self.frames.insert(self.next, Box::new([0; PAGE_SIZE]));
        self.next
    }

    fn set(&mut self, frame: Mfn, index: u64, word: u64) {
        let at = (index % 512) as usize * 8;
        self.frames.get_mut(&frame).unwrap()[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }

    fn get(&self, frame: Mfn, index: u64) -> u64 {
        let (entries, _) = self.frames[&frame].as_chunks();
        u64::from_le_bytes(entries[(index % 512) as usize])
    }

    fn find(&self, guest: &P2mDescription) -> Result<P2mFrames, P2mError<Unreadable>> {
        find(guest, MAX_MFN, 1 << 28, |mfn, to| {
            to.copy_from_slice(&**self.frames.get(&mfn).ok_or(Unreadable)?);
            Ok(())
        })
    }

    /// Builds the tree over frames.
    fn tree(&mut self, pages: u64, frames: &[Mfn]) -> P2mDescription {
        let root = self.allocate();
        for (chunk, at) in frames.chunks(512).zip(0..) {
            let list = self.allocate();
            self.set(root, at, list);
            for (frame, at) in chunk.iter().zip(0..) {
                self.set(list, at, *frame);
            }
        }
        P2mDescription {
            pages,
            frame_list_list: root,
            cr3: 0,
            address: 0,
            generation: 0,
        }
    }

    /// Maps frames from an address on.
    fn linear(&mut self, pages: u64, frames: &[Mfn], address: u64) -> P2mDescription {
        let root = self.allocate();
        for (frame, at) in frames.iter().zip(0..) {
            self.map(root, address + at * 4096, *frame);
        }
        P2mDescription {
            pages,
            frame_list_list: 0,
            cr3: root << 12,
            address,
            generation: 4,
        }
    }

    fn map(&mut self, root: Mfn, address: u64, frame: Mfn) {
        let l1 = self.l1_of(root, address);
        // As Linux maps it: present, writable, accessed, dirty, global, no execute.
        self.set(l1, address >> 12, frame << 12 | 0x8000_0000_0000_0163);
    }

    fn l1_of(&mut self, root: Mfn, address: u64) -> Mfn {
        let mut table = root;
        for shift in [39, 30, 21] {
            let entry = self.get(table, address >> shift);
            let next = if entry == 0 {
                self.allocate()
            } else {
                entry >> 12 & 0xff_ffff_ffff
            };
            self.set(table, address >> shift, next << 12 | 0x67);
            table = next;
        }
        table
    }
}

fn frames(count: u64) -> Vec<Mfn> {
    (0..count).map(|at| 0x40_0000 + at * 3).collect()
}

#[test]
fn placeholders_at_the_end_of_a_tree_are_cut_off() {
    let mut memory = Memory::new();
    // Four lists, the last two the same: three are kept.
    let all = frames(4 * 512);
    let guest = memory.tree(4 * 512 * 512, &all);
    let third = memory.get(guest.frame_list_list, 2);
    memory.set(guest.frame_list_list, 3, third);
    let found = memory.find(&guest).unwrap();
    assert_eq!(found.max_pfn, 3 * 512 * 512 - 1);
    assert_eq!(found.frames, &all[..3 * 512]);
    // All the same: one is kept.
    for at in 0..3 {
        memory.set(guest.frame_list_list, at, third);
    }
    assert_eq!(memory.find(&guest).unwrap().max_pfn, 512 * 512 - 1);
}

#[test]
fn placeholders_at_the_end_of_a_linear_p2m_are_cut_off() {
    for address in [
        0xffff_c900_0000_0000,
        0xffff_c9ff_ffa0_0000,
        0xffff_c900_0000_3000,
    ] {
        let mut memory = Memory::new();
        let all = frames(5 * 512);
        let guest = memory.linear(5 * 512 * 512, &all, address);
        assert_eq!(memory.find(&guest).unwrap().frames, all);
        let root = guest.cr3 >> 12;
        // What maps the last 1,024 frames is one table of placeholders, twice or more.
        let shared = memory.l1_of(root, address + 4 * (512 * 4096));
        let last = address + (5 * 512 - 1) * 4096;
        for l1_address in [address + 3 * (512 * 4096), last] {
            let l3 = memory.get(root, l1_address >> 39) >> 12 & 0xff_ffff_ffff;
            let l2 = memory.get(l3, l1_address >> 30) >> 12 & 0xff_ffff_ffff;
            memory.set(l2, l1_address >> 21, shared << 12 | 0x67);
        }
        let found = memory.find(&guest).unwrap();
        // Where the address is not that of a whole table, the first table maps fewer frames.
        let used = 3 * 512 - (address >> 12) % 512;
        assert_eq!(found.frames, &all[..used as usize], "{address:#x}");
        assert_eq!(found.max_pfn, used * 512 - 1);
    }
}

#[test]
fn what_is_not_possible_is_refused() {
    let mut memory = Memory::new();
    let all = frames(600);
    let pages = 600 * 512;
    let address = 0xffff_c900_0000_0000;
    let linear = memory.linear(pages, &all, address);
    let tree = memory.tree(pages, &all);
    assert!(memory.find(&linear).is_ok() && memory.find(&tree).is_ok());

    for pages in [0, (1 << 28) + 1, u64::MAX] {
        let guest = P2mDescription { pages, ..tree };
        assert!(matches!(memory.find(&guest), Err(P2mError::Pages(_))));
    }
    let guest = P2mDescription {
        pages: MAX_TREE_PFN + 2,
        ..tree
    };
    assert!(matches!(
        memory.find(&guest),
        Err(P2mError::TreeTooSmall(_))
    ));
    for root in [0, u64::MAX, MAX_MFN + 1] {
        let guest = P2mDescription {
            frame_list_list: root,
            ..tree
        };
        assert!(matches!(memory.find(&guest), Err(P2mError::Frame(frame)) if frame == root));
    }
    let guest = P2mDescription {
        frame_list_list: 1,
        ..tree
    };
    assert!(matches!(
        memory.find(&guest),
        Err(P2mError::Read(Unreadable))
    ));
    for cr3 in [1, (MAX_MFN + 1) << 12, u64::MAX] {
        assert!(matches!(
            memory.find(&P2mDescription { cr3, ..linear }),
            Err(P2mError::Frame(_))
        ));
    }
    for address in [
        0x0000_8000_0000_0000, // not canonical
        0x0000_7fff_ffff_f000, // runs out of the lower half
        0xffff_7fff_ffff_f000, // not canonical either
        0xffff_8000_0000_0000, // Xen's
        0xffff_87ff_ffff_f000, // begins in Xen's
        0xffff_ffff_ffff_f000, // wraps
        address + 8,           // not aligned
    ] {
        let guest = P2mDescription { address, ..linear };
        assert!(matches!(memory.find(&guest), Err(P2mError::Address(a)) if a == address));
    }
    let guest = P2mDescription {
        generation: 5,
        ..linear
    };
    assert!(matches!(memory.find(&guest), Err(P2mError::Changing)));
    let guest = P2mDescription {
        address: address + (1 << 30),
        ..linear
    };
    assert!(matches!(memory.find(&guest), Err(P2mError::NotMapped(_))));

    // Holes and superpages on the way.
    let root = linear.cr3 >> 12;
    let entry = memory.get(root, address >> 39);
    for bad in [entry & !PRESENT, entry | SUPERPAGE] {
        memory.set(root, address >> 39, bad);
        assert!(matches!(memory.find(&linear), Err(P2mError::NotMapped(_))));
    }
    memory.set(root, address >> 39, PRESENT);
    assert!(matches!(memory.find(&linear), Err(P2mError::Frame(0))));
}

#[test]
fn tables_are_read_once() {
    let mut memory = Memory::new();
    let all = frames(2048);
    let linear = memory.linear(2048 * 512, &all, 0xffff_c900_0000_0000);
    let tree = memory.tree(2048 * 512, &all);
    for (guest, reads) in [(linear, 3 + 4), (tree, 1 + 4)] {
        let mut count = 0;
        find(&guest, MAX_MFN, 1 << 28, |mfn, to| {
            count += 1;
            to.copy_from_slice(&**memory.frames.get(&mfn).ok_or(Unreadable)?);
            Ok::<_, Unreadable>(())
        })
        .unwrap();
        assert_eq!(count, reads);
    }
}

#[test]
fn frames_become_pfns_or_the_stranger_is_named() {
    let pfn_of = |mfn: Mfn| (mfn < 10).then_some(mfn + 100);
    assert_eq!(frames_to_pfns(&[1, 2], pfn_of), Ok(vec![101, 102]));
    assert_eq!(frames_to_pfns(&[1, 12, 2], pfn_of), Err(12));
}

proptest! {
    #[test]
    fn both_forms_lead_to_the_frames(
        count in 1u64..1300,
        missing in 0u64..512,
        slot in 0u64..(1 << 20),
    ) {
        let all = frames(count);
        let pages = count * 512 - missing;
        let mut memory = Memory::new();
        let guest = memory.tree(pages, &all);
        let found = memory.find(&guest).unwrap();
        prop_assert_eq!((found.max_pfn, found.generation), (pages - 1, None));
        prop_assert_eq!(&found.frames, &all);
        let guest = memory.linear(pages, &all, 0xffff_c900_0000_0000 + slot * 4096);
        let found = memory.find(&guest).unwrap();
        prop_assert_eq!((found.max_pfn, found.generation), (pages - 1, Some(4)));
        prop_assert_eq!(&found.frames, &all);
    }

    #[test]
    fn a_hostile_guest_is_bounded(
        seed: u64,
        pages in 1u64..(1 << 24),
        cr3: u64,
        address in prop_oneof![any::<u64>(), (0u64..1 << 30).prop_map(|a| 0xffff_c900_0000_0000 + a * 4096)],
        tree: bool,
    ) {
        let guest = P2mDescription {
            pages,
            frame_list_list: cr3 & MAX_MFN,
            cr3: if tree { 0 } else { cr3 & 0xff_ffff_f000 },
            address,
            generation: 0,
        };
        let mut reads = 0u64;
        let result = find(&guest, MAX_MFN, 1 << 24, |mfn, to| {
            reads += 1;
            // Entries that are mostly plausible, so that the walk gets deep.
            let mut state = mfn ^ seed;
            let (entries, _) = to.as_chunks_mut();
            for entry in entries {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                let frame = (state >> 40) | 1;
                *entry = if tree { frame } else { frame << 12 | 1 }.to_le_bytes();
            }
            Ok::<_, Unreadable>(())
        });
        if let Ok(found) = result {
            prop_assert!(found.max_pfn < pages);
            prop_assert_eq!(found.frames.len() as u64, found.max_pfn / 512 + 1);
        }
        // Each L1 table or list of 512 frames once, and the few above them.
        prop_assert!(reads <= pages / (512 * 512) + 10, "{reads}");
    }
}
