use super::*;
use crate::group::{WITNESS_SIZE, Witness};
use crate::pages::{Page, PageType};
use proptest::prelude::*;
use std::sync::Arc;

#[derive(Debug, Clone, PartialEq)]
struct Owned {
    pfn: Pfn,
    page_type: PageType,
    content: Option<Box<Page>>,
}

/// A page that nothing makes smaller.
fn noise(seed: u64) -> Box<Page> {
    let mut state = seed;
    Box::new(std::array::from_fn(|_| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 56) as u8
    }))
}

/// Whether a batch's pages have the first of these contents, in their order.
pub(super) fn has_contents<P: std::borrow::Borrow<Page>>(batch: Batch<'_>, pages: &[P]) -> bool {
    batch.len() <= pages.len()
        && batch
            .iter()
            .zip(pages)
            .all(|(it, page)| matches!(it.content, Content::Raw(raw) if raw == page.borrow()))
}

/// A page in which nothing is repeated, of letters that take seven bits each.
fn letters(seed: u64) -> Box<Page> {
    let mut page = noise(seed);
    page.iter_mut().for_each(|byte| *byte >>= 1);
    page
}

fn contents() -> impl Strategy<Value = Box<Page>> {
    prop_oneof![
        Just(Box::new([0; PAGE_SIZE])),
        any::<u8>().prop_map(|byte| Box::new([byte; PAGE_SIZE])),
        any::<u64>().prop_map(noise),
        any::<u64>().prop_map(letters),
        any::<[u8; 32]>().prop_map(|text| Box::new(std::array::from_fn(|i| text[i % 32]))),
    ]
}

fn batches() -> impl Strategy<Value = Vec<Owned>> {
    let page = (
        prop_oneof![4 => Just(0u64), 1 => 0u64..3, 1 => 0u64..200_000],
        0usize..12,
        contents(),
    );
    proptest::collection::vec(page, 1..40).prop_map(|pages| {
        let mut pfn = 0;
        pages
            .into_iter()
            .map(|(gap, kind, content)| {
                let page_type = PageType::ALL[kind];
                pfn += gap + 1;
                Owned {
                    pfn,
                    page_type,
                    content: page_type.has_data().then_some(content),
                }
            })
            .collect()
    })
}

fn techniques() -> impl Strategy<Value = Technique> {
    proptest::sample::select(Technique::ALL.as_slice())
}

fn encode(pages: &[Owned], technique: Technique) -> (Vec<u8>, BatchStatistics) {
    let mut encoder = BatchEncoder::new();
    encoder.set_technique(technique);
    for page in pages {
        match &page.content {
            Some(content) => drop(encoder.push(page.pfn, page.page_type, content).unwrap()),
            None => encoder.push_hole(page.pfn, page.page_type).unwrap(),
        }
    }
    let mut bytes = Vec::new();
    let statistics = encoder.finish(&mut bytes);
    assert!(encoder.is_empty());
    assert_eq!(statistics.bytes, bytes.len());
    (bytes, statistics)
}

fn own(batch: Batch<'_>) -> Vec<Owned> {
    batch
        .iter()
        .map(|page| Owned {
            pfn: page.pfn,
            page_type: page.page_type,
            content: match page.content {
                Content::None => None,
                Content::Zero => Some(Box::new([0; PAGE_SIZE])),
                Content::Raw(content) => Some(Box::new(*content)),
                other => panic!("{other:?} was not written"),
            },
        })
        .collect()
}

#[test]
fn a_batch_of_zeros_is_a_few_bytes() {
    let mut encoder = BatchEncoder::new();
    for pfn in 0..MAX_BATCH_PAGES as u64 {
        encoder.push_zero(pfn, PageType::Normal).unwrap();
    }
    assert!(encoder.is_full());
    assert_eq!(
        encoder.push_zero(5000, PageType::Normal),
        Err(EncodeError::Full)
    );
    let mut bytes = Vec::new();
    let statistics = encoder.finish(&mut bytes);
    assert_eq!(bytes, [0, 0, 1, 0, 0, 0x10, 0, 0xff, 0x07]);
    assert_eq!(statistics.zero, MAX_BATCH_PAGES);
    let mut decoder = BatchDecoder::new();
    let batch = decoder.decode(&bytes, MAX_BATCH_PAGES as u64).unwrap();
    assert_eq!(batch.len(), MAX_BATCH_PAGES);
    assert!(batch.iter().all(|page| page.content == Content::Zero));
}

#[test]
fn the_largest_batch_fits_its_limit() {
    let mut encoder = BatchEncoder::new();
    let stride = MAX_PAGES / MAX_BATCH_PAGES as u64;
    for at in 0..MAX_BATCH_PAGES as u64 {
        *encoder.slot() = *noise(at);
        assert_eq!(
            encoder.keep((at + 1) * stride - 1, PageType::Normal),
            Ok(Class::Noise)
        );
    }
    let mut bytes = Vec::new();
    encoder.finish(&mut bytes);
    assert!(bytes.len() <= MAX_BATCH_BYTES);
    assert_eq!(bytes[0], STORED);
    assert_eq!(
        BatchDecoder::new().decode(&bytes, MAX_PAGES).unwrap().len(),
        MAX_BATCH_PAGES
    );
}

#[test]
fn content_of_equal_pages_is_compressed_across_pages() {
    let page = letters(1);
    let mut encoder = BatchEncoder::new();
    let mut decoder = BatchDecoder::new();
    for (technique, compression) in [
        (Technique::Stored, STORED),
        (Technique::Lz4, LZ4),
        (Technique::Zstd1, ZSTD),
        (Technique::Zstd3, ZSTD),
        (Technique::Zstd6, ZSTD),
        (Technique::Lz4, LZ4),
    ] {
        encoder.set_technique(technique);
        for pfn in 0..16 {
            encoder.push(pfn, PageType::Normal, &page).unwrap();
        }
        let expected = encoder.block_length_with(technique);
        let mut bytes = Vec::new();
        let statistics = encoder.finish(&mut bytes);
        assert_eq!((statistics.raw, bytes[0]), (16, compression));
        assert_eq!(statistics.technique, technique);
        assert_eq!(statistics.block, expected);
        assert_eq!(bytes.len() < 2 * PAGE_SIZE, compression != STORED);
        let batch = decoder.decode(&bytes, 16).unwrap();
        assert!(batch.iter().all(|it| it.content == Content::Raw(&page)));
    }
}

/// A batch of these pages by `technique`, after the block `before`; and its own block.
fn after(
    before: Option<&Arc<Vec<u8>>>,
    technique: Technique,
    pages: &[Box<Page>],
) -> (Vec<u8>, Arc<Vec<u8>>) {
    let mut encoder = BatchEncoder::new();
    encoder.set_technique(technique);
    encoder.set_prefix(before.cloned());
    for (pfn, page) in (0..).zip(pages) {
        encoder.push(pfn, PageType::Normal, page).unwrap();
    }
    let block = Arc::new(encoder.block().to_vec());
    let expected = encoder.block_length_with(technique);
    let mut bytes = Vec::new();
    assert_eq!(encoder.finish(&mut bytes).block, expected);
    (bytes, block)
}

#[test]
fn strong_techniques_find_what_the_batch_before_had() {
    let pages: Vec<_> = (1..=32).map(letters).collect();
    for technique in [Technique::Zstd3, Technique::Zstd6] {
        let (first, block) = after(None, technique, &pages);
        let (second, _) = after(Some(&block), technique, &pages);
        assert_eq!((first[0], second[0]), (ZSTD, ZSTD_AFTER));
        assert!(second.len() < PAGE_SIZE, "{}", second.len());
        // What is small is passed over: it stands before nothing.
        let (small, of_small) = after(Some(&block), technique, &pages[..2]);
        assert!(small.len() < PAGE_SIZE && of_small.len() < PREFIX_LEAST);
        let mut decoder = BatchDecoder::new();
        for bytes in [&first, &second, &small, &second] {
            let batch = decoder.decode(bytes, 32).unwrap();
            assert!(has_contents(batch, &pages));
        }
        let error = BatchDecoder::new().decode(&second, 32).map(|_| ());
        assert_eq!(error, Err(CodecError::NoPrefix));
        // Another one before it: what comes out is as long, and wrong, or an error.
        let mut decoder = BatchDecoder::new();
        let (other, _) = after(None, Technique::Stored, &vec![letters(99); 32]);
        decoder.decode(&other, 32).unwrap();
        if let Ok(batch) = decoder.decode(&second, 32) {
            assert!(batch.iter().next().unwrap().content != Content::Raw(&pages[0]));
        }
    }
    // The cheap ones take no time for it.
    let block = Arc::new(pages.iter().flat_map(|page| **page).collect());
    let (bytes, _) = after(
        Some(&block),
        Technique::Zstd1,
        &[pages[0].clone(), pages[0].clone()],
    );
    assert_eq!(bytes[0], ZSTD);
}

#[test]
fn a_block_that_looks_like_a_dictionary_stands_before_nothing() {
    let mut pages: Vec<_> = (1..=32).map(letters).collect();
    pages[0][..4].copy_from_slice(&DICTIONARY_MAGIC);
    let (first, block) = after(None, Technique::Stored, &pages);
    let twice = vec![pages[1].clone(); 32];
    let (second, _) = after(Some(&block), Technique::Zstd3, &twice);
    assert_eq!(second[0], ZSTD);
    let mut decoder = BatchDecoder::new();
    decoder.decode(&first, 32).unwrap();
    let mut forged = second.clone();
    forged[0] = ZSTD_AFTER;
    let error = decoder.decode(&forged, 32).map(|_| ());
    assert_eq!(error, Err(CodecError::NoPrefix));
}

#[test]
fn noise_is_beside_the_block_or_costs_no_bytes_in_it() {
    let mut encoder = BatchEncoder::new();
    for technique in Technique::ALL {
        encoder.set_technique(technique);
        let pages: Vec<_> = (0..40)
            .map(|pfn| match pfn % 4 {
                0 => Box::new([7; PAGE_SIZE]),
                _ => noise(pfn),
            })
            .collect();
        for (pfn, page) in (0..).zip(&pages) {
            encoder.push(pfn, PageType::Normal, page).unwrap();
        }
        let beside = if technique.leaves_noise() { 30 } else { 0 };
        assert_eq!(encoder.noise_bytes(), beside * PAGE_SIZE);
        assert_eq!(encoder.content_bytes(), 40 * PAGE_SIZE);
        let mut bytes = Vec::new();
        let statistics = encoder.finish(&mut bytes);
        assert_eq!((statistics.raw, statistics.noise), (40 - beside, beside));
        assert_eq!(statistics.technique, technique);
        assert_eq!(
            bytes.len() < 31 * PAGE_SIZE,
            technique != Technique::Stored,
            "{technique:?}"
        );
        let mut decoder = BatchDecoder::new();
        let batch = decoder.decode(&bytes, 40).unwrap();
        assert!(has_contents(batch, &pages));
        // Fewer bytes than there are pages.
        assert!(decoder.decode(&bytes[..30 * PAGE_SIZE], 40).is_err());
    }
    assert_eq!(encoder.noise_bytes(), 0);
}

/// A batch of `pages` normal raw pages with that block.
fn with_zstd_block(pages: u64, block: &[u8]) -> Vec<u8> {
    let mut bytes = vec![ZSTD, 0, 1, 0, 0, 0x20, 0];
    crate::bytes::push_varint(&mut bytes, pages - 1);
    bytes.extend_from_slice(block);
    bytes
}

fn zstd_frame(content: &[u8], content_size: bool) -> Vec<u8> {
    let mut context = zstd_safe::CCtx::create();
    context
        .set_parameter(zstd_safe::CParameter::ContentSizeFlag(content_size))
        .unwrap();
    let mut frame = vec![0; zstd_safe::compress_bound(content.len())];
    let length = context.compress2(frame.as_mut_slice(), content).unwrap();
    frame.truncate(length);
    frame
}

#[test]
fn a_frame_of_another_length_is_refused() {
    let mut decoder = BatchDecoder::new();
    for content_size in [false, true] {
        let frame = zstd_frame(&[7; 2 * PAGE_SIZE], content_size);
        let mut decode = |pages, block: &[u8]| {
            decoder
                .decode(&with_zstd_block(pages, block), 100)
                .map(|batch| batch.len())
        };
        assert_eq!(decode(2, &frame), Ok(2));
        assert_eq!(decode(1, &frame), Err(CodecError::Decompress));
        assert_eq!(
            decode(3, &frame),
            Err(CodecError::BlockLength {
                expected: 3 * PAGE_SIZE,
                found: 2 * PAGE_SIZE
            })
        );
        // Two frames, one that is to be skipped, nothing.
        assert_eq!(
            decode(4, &[frame.as_slice(), &frame].concat()),
            Err(CodecError::Decompress)
        );
        let skipped = [0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 9];
        assert_eq!(
            decode(2, &[&skipped, frame.as_slice()].concat()),
            Err(CodecError::Decompress)
        );
        assert!(decode(2, &skipped).is_err());
        assert_eq!(decode(1, &[]), Err(CodecError::Decompress));
        // The context is as good as before.
        assert_eq!(decode(2, &frame), Ok(2));
    }
}

#[test]
fn a_window_costs_no_memory() {
    // A frame header with a window of 2 GiB, and one block of a repeated byte that is a page.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3];
    frame.extend(((PAGE_SIZE as u32) << 3 | 0b011).to_le_bytes()[..3].iter());
    frame.push(7);
    let mut decoder = BatchDecoder::new();
    let bytes = with_zstd_block(1, &frame);
    let measured = allocation_counter::measure(|| {
        // Whether it is accepted is up to zstd.
        let _ = decoder.decode(&bytes, 1).map(|batch| batch.len());
    });
    assert!(measured.bytes_max < 16 * PAGE_SIZE as u64);
    assert!((1..512 << 10).contains(&decoder.zstd_bytes()));
    let held = decoder.zstd_bytes();
    let content: Vec<u8> = (0..MAX_BATCH_PAGES as u64)
        .flat_map(|at| *noise(at % 7))
        .collect();
    let largest = with_zstd_block(MAX_BATCH_PAGES as u64, &zstd_frame(&content, false));
    for _ in 0..3 {
        decoder.decode(&largest, MAX_PAGES).unwrap();
        assert_eq!(decoder.zstd_bytes(), held);
    }
}

#[test]
fn a_claim_of_many_pages_is_checked_before_memory_is_taken() {
    // More than a batch may have is refused by its runs, before the block is looked at.
    let bytes = with_zstd_block(
        MAX_BATCH_PAGES as u64 + 1,
        &zstd_frame(&[7; PAGE_SIZE], true),
    );
    let mut decoder = BatchDecoder::new();
    let measured = allocation_counter::measure(|| {
        assert_eq!(
            decoder.decode(&bytes, MAX_PAGES).unwrap_err(),
            CodecError::PageCount
        );
    });
    assert!(measured.bytes_max < PAGE_SIZE as u64);
    assert_eq!(decoder.zstd_bytes(), 0);
}

#[test]
fn a_slot_that_is_not_kept_is_forgotten() {
    let mut encoder = BatchEncoder::new();
    encoder.slot().fill(1);
    encoder.slot().fill(2);
    encoder.keep(3, PageType::L1).unwrap();
    encoder.slot().fill(3);
    encoder.push_hole(4, PageType::Invalid).unwrap();
    let mut bytes = Vec::new();
    encoder.finish(&mut bytes);
    let mut decoder = BatchDecoder::new();
    let pages = own(decoder.decode(&bytes, 5).unwrap());
    assert_eq!(pages.len(), 2);
    assert_eq!(pages[0].content.as_deref(), Some(&[2; PAGE_SIZE]));
}

#[test]
fn mistakes_of_the_caller_are_refused() {
    let mut encoder = BatchEncoder::new();
    encoder.push_zero(5, PageType::Normal).unwrap();
    assert_eq!(
        encoder.push_zero(5, PageType::Normal),
        Err(EncodeError::NotAscending(5))
    );
    assert_eq!(
        encoder.push_zero(MAX_PAGES, PageType::Normal),
        Err(EncodeError::OutsideMemory(MAX_PAGES))
    );
    assert_eq!(
        encoder.push_zero(6, PageType::Invalid),
        Err(EncodeError::ClassAndType(6, PageType::Invalid))
    );
    assert_eq!(
        encoder.push_hole(6, PageType::Normal),
        Err(EncodeError::ClassAndType(6, PageType::Normal))
    );
    assert_eq!(encoder.len(), 1);
    encoder.clear();
    let mut bytes = Vec::new();
    assert_eq!(encoder.finish(&mut bytes), BatchStatistics::default());
    assert!(bytes.is_empty());
}

#[test]
fn each_lie_has_its_error() {
    let mut decoder = BatchDecoder::new();
    let mut refuse = |bytes: &[u8], error| {
        assert_eq!(decoder.decode(bytes, 100).unwrap_err(), error, "{bytes:x?}");
    };
    let normal_zero = 0x10;
    refuse(&[], CodecError::Malformed);
    refuse(&[0, 0, 0, 0, 0], CodecError::PageCount);
    refuse(&[0, 1, 1, 0, normal_zero, 0, 0], CodecError::Malformed);
    refuse(&[0, 0, 2, 0, 0, normal_zero, 0, 0], CodecError::Malformed);
    refuse(
        &[0, 0, 1, 0, 0, normal_zero, 100, 0],
        CodecError::OutsideMemory(100),
    );
    refuse(
        &[0, 0, 1, 0, 0, normal_zero, 99, 1],
        CodecError::OutsideMemory(100),
    );
    refuse(
        &[0, 0, 1, 0, 0, normal_zero, 0x80, 0x00, 0],
        CodecError::Malformed,
    );
    refuse(&[0, 0, 1, 0, 0, 0x80, 0, 0], CodecError::UnknownClass(8));
    refuse(&[0, 0, 1, 0, 0, 0x70, 0, 0], CodecError::Malformed);
    refuse(
        &[0, 0, 1, 0, 0, 0x15, 0, 0],
        CodecError::UnknownType(UnknownPageType(5)),
    );
    refuse(&[0, 0, 1, 0, 0, 0x00, 0, 0], CodecError::ClassAndType(0));
    refuse(&[0, 0, 1, 0, 0, 0x1f, 7, 0], CodecError::ClassAndType(7));
    refuse(
        &[4, 0, 1, 0, 0, normal_zero, 0, 0],
        CodecError::UnknownCompression(4),
    );
    refuse(
        &[0, 0, 1, 0, 0, normal_zero, 0, 0, 9],
        CodecError::BlockLength {
            expected: 0,
            found: 1,
        },
    );
    refuse(
        &[1, 0, 1, 0, 0, normal_zero, 0, 0],
        CodecError::BlockLength {
            expected: 0,
            found: 0,
        },
    );
    refuse(
        &[0, 0, 1, 0, 0, 0x20, 0, 0],
        CodecError::BlockLength {
            expected: PAGE_SIZE,
            found: 0,
        },
    );
    refuse(
        &[2, 0, 1, 0, 0, normal_zero, 0, 0],
        CodecError::BlockLength {
            expected: 0,
            found: 0,
        },
    );
    refuse(&[1, 0, 1, 0, 0, 0x20, 0, 0], CodecError::Decompress);
    refuse(&[2, 0, 1, 0, 0, 0x20, 0, 0], CodecError::Decompress);
    refuse(&[3, 0, 1, 0, 0, 0x20, 0, 0], CodecError::NoPrefix);
    // One literal, and the end: a valid block, but not of a page.
    refuse(
        &[1, 0, 1, 0, 0, 0x20, 0, 0, 0x10, 0x41],
        CodecError::BlockLength {
            expected: PAGE_SIZE,
            found: 1,
        },
    );
    // Runs that add up to more than a batch, or to more than a number can say.
    let mut bytes = vec![0, 0, 1, 0, 0, normal_zero, 0];
    crate::bytes::push_varint(&mut bytes, u64::MAX);
    refuse(&bytes, CodecError::Malformed);
    let many = [0, 0, 1, 0, 0, normal_zero, 0, 0x80, 0x08];
    assert_eq!(
        BatchDecoder::new().decode(&many, MAX_PAGES).unwrap_err(),
        CodecError::PageCount
    );
}

/// A batch with one run of normal pages from pfn 5 on, and `rest` as it is.
fn with_rest(class: Class, pages: u8, announced: u8, rest: &[u8]) -> Vec<u8> {
    let run = [(class as u8) << 4, 5, pages - 1];
    [&[STORED, 0, 1, 0, announced], run.as_slice(), rest].concat()
}

#[test]
fn what_stands_for_content_is_checked() {
    let mut decoder = BatchDecoder::new();
    let mut decode = |bytes: &[u8]| {
        let batch = decoder.decode(bytes, 100)?;
        Ok::<_, CodecError>(
            batch
                .iter()
                .map(|page| format!("{:?}", page.content))
                .collect(),
        )
    };
    let good = |what: &[&str]| -> Result<Vec<String>, _> {
        Ok(what.iter().map(ToString::to_string).collect())
    };
    let same = with_rest(Class::Same, 2, 0, &[]);
    assert_eq!(decode(&same), good(&["Same", "Same"]));
    // The first is to pfn 7, the second to the one after it, the third to pfn 4.
    let references = with_rest(Class::Reference, 3, 3, &[14, 0, 9]);
    assert_eq!(
        decode(&references),
        good(&["Reference(0x7)", "Reference(0x8)", "Reference(0x4)"])
    );
    let delta = with_rest(Class::Delta, 1, 2, &[0x80, 0x20]);
    assert_eq!(decode(&delta), good(&["Delta(..)"]));

    let to = |rest: &[u8]| with_rest(Class::Reference, 1, rest.len() as u8, rest);
    // To itself, to the guest's end, below zero.
    for rest in [&[10][..], &[0xc8, 0x01], &[1]] {
        assert_eq!(
            decode(&to(rest)),
            Err(CodecError::Reference(5)),
            "{rest:x?}"
        );
    }
    for lie in [
        // Too few bytes, too many, more than such pages can have.
        with_rest(Class::Reference, 2, 1, &[14]),
        with_rest(Class::Reference, 1, 2, &[14, 0]),
        with_rest(Class::Reference, 1, 6, &[14, 0, 0, 0, 0, 0]),
        with_rest(Class::Same, 1, 1, &[0]),
        with_rest(Class::Zero, 1, 1, &[0]),
        with_rest(Class::Delta, 1, 1, &[0]),
        with_rest(Class::Delta, 1, 2, &[0x81, 0x20]),
        with_rest(Class::Delta, 2, 2, &[0x80, 0x20]),
        with_rest(Class::Delta, 1, 3, &[0x80, 0x20, 0]),
        // A number that is not in its shortest form.
        to(&[0x8e, 0x00]),
    ] {
        assert_eq!(decode(&lie), Err(CodecError::Rest), "{lie:x?}");
    }
    // Another length than was announced.
    assert!(matches!(
        decode(&with_rest(Class::Reference, 1, 1, &[14, 0])),
        Err(CodecError::BlockLength { .. })
    ));
    // Places are of a library, not of the guest: beyond its end, but not beyond any.
    let witness = [7; WITNESS_SIZE];
    let two = [&[0x7e][..], &witness, &[0], &witness].concat();
    let places = with_rest(Class::Shared, 2, two.len() as u8, &two);
    assert_eq!(decode(&places), good(&["Shared(63)", "Shared(64)"]));
    for step in [&[1][..], &[0x80, 0x80, 0x80, 0x80, 0x08]] {
        let rest = [step, &witness].concat();
        let places = with_rest(Class::Shared, 1, rest.len() as u8, &rest);
        assert_eq!(decode(&places), Err(CodecError::Place(5)), "{rest:x?}");
    }
    // A place without all of its witness.
    let short = &two[..WITNESS_SIZE];
    let places = with_rest(Class::Shared, 1, short.len() as u8, short);
    assert_eq!(decode(&places), Err(CodecError::Rest));
    for class in [Class::Same, Class::Reference, Class::Delta, Class::Shared] {
        let mut hole = with_rest(class, 1, 0, &[]);
        hole[5] |= PageType::Invalid.bits();
        assert_eq!(decode(&hole), Err(CodecError::ClassAndType(5)));
    }
}

#[test]
fn an_announced_length_is_checked_before_memory_is_taken() {
    let mut bytes = vec![STORED, 0, 1, 0];
    crate::bytes::push_varint(&mut bytes, 1 << 40);
    bytes.extend([(Class::Delta as u8) << 4, 0, 0]);
    let measured = allocation_counter::measure(|| {
        let error = BatchDecoder::new()
            .decode(&bytes, 9)
            .map(|_| ())
            .unwrap_err();
        assert_eq!(error, CodecError::Rest);
    });
    assert!(measured.bytes_max < PAGE_SIZE as u64);
}

#[test]
fn what_stands_for_content_is_compressed_behind_it() {
    let old = noise(5);
    let mut new = old.clone();
    new[100..104].fill(1);
    for technique in Technique::ALL {
        let mut encoder = BatchEncoder::new();
        encoder.set_technique(technique);
        encoder.push_same(0, PageType::PinnedL1).unwrap();
        encoder.push_reference(1, PageType::Normal, 77).unwrap();
        encoder.push(2, PageType::Normal, &[3; PAGE_SIZE]).unwrap();
        let class = encoder.push_changed(3, PageType::Normal, &old, &new);
        assert_eq!(class, Ok(Class::Delta));
        let class = encoder.push_changed(4, PageType::Normal, &old, &[0; PAGE_SIZE]);
        assert_eq!(class, Ok(Class::Zero));
        let class = encoder.push_changed(5, PageType::Normal, &old, &noise(6));
        let beside = technique.leaves_noise();
        assert_eq!(class, Ok(if beside { Class::Noise } else { Class::Raw }));
        encoder.push_reference(6, PageType::L2, 78).unwrap();
        let witness = |fill| Witness([fill; WITNESS_SIZE]);
        encoder
            .push_shared(7, PageType::Normal, 40, witness(1))
            .unwrap();
        encoder
            .push_shared(8, PageType::L1, 41, witness(2))
            .unwrap();
        assert_eq!(
            encoder.push_shared(9, PageType::L1, MAX_PAGES, witness(3)),
            Err(EncodeError::BadPlace(9, MAX_PAGES))
        );
        assert_eq!(
            encoder.push_reference(9, PageType::L2, 9),
            Err(EncodeError::BadReference(9, 9))
        );
        assert_eq!(
            encoder.push_changed(6, PageType::L2, &old, &new),
            Err(EncodeError::NotAscending(6))
        );
        let mut bytes = Vec::new();
        let statistics = encoder.finish(&mut bytes);
        assert_eq!(
            (statistics.same, statistics.reference, statistics.delta),
            (1, 2, 1)
        );
        assert_eq!((statistics.zero, statistics.raw + statistics.noise), (1, 2));
        assert_eq!(statistics.noise, usize::from(beside));
        assert_eq!(statistics.shared, 2);
        let mut decoder = BatchDecoder::new();
        let batch = decoder.decode(&bytes, 79).unwrap();
        let is: Vec<_> = batch.iter().map(|page| page.content).collect();
        assert_eq!(is[0], Content::Same);
        assert_eq!(is[1], Content::Reference(77));
        assert_eq!(is[2], Content::Raw(&[3; PAGE_SIZE]));
        let Content::Delta(delta) = is[3] else {
            panic!("{:?}", is[3])
        };
        let mut page = old.clone();
        delta.apply(&mut page);
        assert_eq!(page, new);
        assert_eq!(
            is[4..],
            [
                Content::Zero,
                Content::Raw(&noise(6)),
                Content::Reference(78),
                Content::Shared(40, witness(1)),
                Content::Shared(41, witness(2))
            ]
        );
        // The next batch knows nothing of this one's references.
        encoder.push_reference(1, PageType::Normal, 3).unwrap();
        bytes.clear();
        encoder.finish(&mut bytes);
        assert_eq!(bytes[8..], [6]);
    }
}

proptest! {
    /// Batches of all sizes and techniques in a row, each with the block before it where the
    /// encoder has kept that.
    #[test]
    fn batches_that_build_upon_one_another_come_back(
        batches in proptest::collection::vec((techniques(), 1usize..40, any::<u8>(), any::<bool>()), 1..8),
    ) {
        let mut decoder = BatchDecoder::new();
        let mut before = None;
        for (technique, count, seed, keeps) in batches {
            let pages: Vec<_> = (0..count as u64).map(|at| letters(u64::from(seed & 3) + at % 20)).collect();
            let (bytes, block) = after(before.as_ref(), technique, &pages);
            if block.len() >= PREFIX_LEAST {
                before = keeps.then_some(block);
            }
            let batch = decoder.decode(&bytes, 40).unwrap();
            prop_assert!(has_contents(batch, &pages));
        }
    }

    #[test]
    fn pages_come_back(pages in batches(), technique in techniques(), next in techniques()) {
        let (bytes, statistics) = encode(&pages, technique);
        prop_assert!(bytes.len() <= MAX_BATCH_BYTES);
        prop_assert_eq!(statistics.pages, pages.len());
        let size = pages.last().unwrap().pfn + 1;
        let mut decoder = BatchDecoder::new();
        let batch = decoder.decode(&bytes, size).unwrap();
        prop_assert_eq!(batch.len(), pages.len());
        prop_assert_eq!(own(batch), pages.clone());
        prop_assert!(matches!(
            decoder.decode(&bytes, size - 1),
            Err(CodecError::OutsideMemory(pfn)) if pfn == size - 1
        ));
        // Another batch in the same buffers.
        let (again, _) = encode(&pages[..1], next);
        prop_assert_eq!(own(decoder.decode(&again, size).unwrap()), &pages[..1]);
    }

    #[test]
    fn what_is_cut_or_grown_is_refused(
        pages in batches(),
        technique in techniques(),
        at in any::<prop::sample::Index>(),
    ) {
        let (mut bytes, _) = encode(&pages, technique);
        let mut decoder = BatchDecoder::new();
        prop_assert!(decoder.decode(&bytes[..at.index(bytes.len())], MAX_PAGES).is_err());
        bytes.push(0);
        prop_assert!(decoder.decode(&bytes, MAX_PAGES).is_err());
    }

    #[test]
    fn any_block_is_refused_or_is_its_pages(
        block in proptest::collection::vec(any::<u8>(), 0..300),
        header in any::<bool>(),
        compression in 0u8..5,
        pages in 1u64..5,
    ) {
        let start: &[u8] = if header { &[0x28, 0xb5, 0x2f, 0xfd] } else { &[] };
        let mut bytes = with_zstd_block(pages, &[start, &block].concat());
        bytes[0] = compression;
        let mut decoder = BatchDecoder::new();
        if let Ok(batch) = decoder.decode(&bytes, 100) {
            prop_assert_eq!(batch.iter().count(), pages as usize);
        }
    }

    #[test]
    fn a_changed_block_leaves_the_decoder_usable(
        pages in batches(),
        at in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let (bytes, _) = encode(&pages, Technique::Zstd3);
        let mut changed = bytes.clone();
        changed[at.index(bytes.len())] ^= 1 << bit;
        let mut decoder = BatchDecoder::new();
        let _ = decoder.decode(&changed, MAX_PAGES).map(|batch| batch.iter().count());
        prop_assert_eq!(own(decoder.decode(&bytes, MAX_PAGES).unwrap()), pages);
    }
}
