use super::*;
use crate::pages::{Page, PageType};
use proptest::prelude::*;

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

fn contents() -> impl Strategy<Value = Box<Page>> {
    prop_oneof![
        Just(Box::new([0; PAGE_SIZE])),
        any::<u8>().prop_map(|byte| Box::new([byte; PAGE_SIZE])),
        any::<u64>().prop_map(noise),
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

fn encode(pages: &[Owned]) -> (Vec<u8>, BatchStatistics) {
    let mut encoder = BatchEncoder::new();
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
    assert_eq!(bytes, [0, 0, 1, 0, 0x10, 0, 0xff, 0x07]);
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
            Ok(Class::Raw)
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
    let page = noise(1);
    let mut encoder = BatchEncoder::new();
    for pfn in 0..16 {
        encoder.push(pfn, PageType::Normal, &page).unwrap();
    }
    let mut bytes = Vec::new();
    let statistics = encoder.finish(&mut bytes);
    assert_eq!((statistics.raw, bytes[0]), (16, LZ4));
    assert!(bytes.len() < 2 * PAGE_SIZE);
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
    refuse(&[0, 0, 0, 0], CodecError::PageCount);
    refuse(&[0, 1, 1, 0, normal_zero, 0, 0], CodecError::Malformed);
    refuse(&[0, 0, 2, 0, normal_zero, 0, 0], CodecError::Malformed);
    refuse(
        &[0, 0, 1, 0, normal_zero, 100, 0],
        CodecError::OutsideMemory(100),
    );
    refuse(
        &[0, 0, 1, 0, normal_zero, 99, 1],
        CodecError::OutsideMemory(100),
    );
    refuse(
        &[0, 0, 1, 0, normal_zero, 0x80, 0x00, 0],
        CodecError::Malformed,
    );
    refuse(&[0, 0, 1, 0, 0x30, 0, 0], CodecError::UnknownClass(3));
    refuse(
        &[0, 0, 1, 0, 0x15, 0, 0],
        CodecError::UnknownType(UnknownPageType(5)),
    );
    refuse(&[0, 0, 1, 0, 0x00, 0, 0], CodecError::ClassAndType(0));
    refuse(&[0, 0, 1, 0, 0x1f, 7, 0], CodecError::ClassAndType(7));
    refuse(
        &[2, 0, 1, 0, normal_zero, 0, 0],
        CodecError::UnknownCompression(2),
    );
    refuse(
        &[0, 0, 1, 0, normal_zero, 0, 0, 9],
        CodecError::BlockLength {
            expected: 0,
            found: 1,
        },
    );
    refuse(
        &[1, 0, 1, 0, normal_zero, 0, 0],
        CodecError::BlockLength {
            expected: 0,
            found: 0,
        },
    );
    refuse(
        &[0, 0, 1, 0, 0x20, 0, 0],
        CodecError::BlockLength {
            expected: PAGE_SIZE,
            found: 0,
        },
    );
    refuse(&[1, 0, 1, 0, 0x20, 0, 0], CodecError::Decompress);
    // One literal, and the end: a valid block, but not of a page.
    refuse(
        &[1, 0, 1, 0, 0x20, 0, 0, 0x10, 0x41],
        CodecError::BlockLength {
            expected: PAGE_SIZE,
            found: 1,
        },
    );
    // Runs that add up to more than a batch, or to more than a number can say.
    let mut bytes = vec![0, 0, 1, 0, normal_zero, 0];
    crate::bytes::push_varint(&mut bytes, u64::MAX);
    refuse(&bytes, CodecError::Malformed);
    let many = [0, 0, 1, 0, normal_zero, 0, 0x80, 0x08];
    assert_eq!(
        BatchDecoder::new().decode(&many, MAX_PAGES).unwrap_err(),
        CodecError::PageCount
    );
}

proptest! {
    #[test]
    fn pages_come_back(pages in batches()) {
        let (bytes, statistics) = encode(&pages);
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
        let (again, _) = encode(&pages[..1]);
        prop_assert_eq!(own(decoder.decode(&again, size).unwrap()), &pages[..1]);
    }

    #[test]
    fn what_is_cut_or_grown_is_refused(pages in batches(), at in any::<prop::sample::Index>()) {
        let (mut bytes, _) = encode(&pages);
        let mut decoder = BatchDecoder::new();
        prop_assert!(decoder.decode(&bytes[..at.index(bytes.len())], MAX_PAGES).is_err());
        bytes.push(0);
        prop_assert!(decoder.decode(&bytes, MAX_PAGES).is_err());
    }
}
