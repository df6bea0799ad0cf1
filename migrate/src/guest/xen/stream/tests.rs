use super::state::{DomainKind, GuestState, PvState, PvVcpu, StaticData, TscInfo};
use super::*;
use crate::digest::{DigestKey, Digester};
use crate::pages::{PAGE_SIZE, Page};
use proptest::prelude::*;

const LIMIT: u64 = 1 << 16;

fn static_data(kind: DomainKind) -> StaticData {
    StaticData {
        kind,
        xen_version: (4, 17),
        cpuid_policy: vec![1; 3 * record::CPUID_LEAF_SIZE],
        msr_policy: vec![2; record::MSR_ENTRY_SIZE],
    }
}

fn pv_state() -> GuestState {
    let vcpu = PvVcpu {
        basic: vec![9; record::VCPU_CONTEXT_SIZE],
        ..PvVcpu::default()
    };
    let shared_info = Box::new([8; PAGE_SIZE]);
    GuestState::Pv(PvState {
        tsc: TscInfo::default(),
        shared_info,
        vcpus: vec![vcpu],
    })
}

/// The records of a libxc image behind its headers: type, length and body.
fn records(image: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut rest = &image[40..];
    let mut records = Vec::new();
    while let Some((header, body)) = rest.split_at_checked(8) {
        let number = u32::from_le_bytes(header[..4].try_into().unwrap());
        let length = u32::from_le_bytes(header[4..].try_into().unwrap()) as usize;
        records.push((number, body[..length].to_vec()));
        rest = &body[length + padding(length)..];
    }
    assert!(rest.is_empty());
    records
}

fn small(framing: Framing) -> Vec<u8> {
    let mut writer =
        StreamWriter::begin(Vec::new(), framing, &static_data(DomainKind::Pv64)).unwrap();
    writer.p2m_frames(600, &[1, 2]).unwrap();
    let content = [7; PAGE_SIZE];
    writer
        .pages(&[
            StreamPage {
                pfn: 5,
                page_type: PageType::PinnedL4,
                content: Some(&content),
            },
            StreamPage {
                pfn: 6,
                page_type: PageType::Invalid,
                content: None,
            },
        ])
        .unwrap();
    writer.pages(&[]).unwrap();
    let written = writer.written();
    let bytes = writer.get_ref().len() as u64;
    assert_eq!(written, bytes);
    writer.finish(&pv_state()).unwrap()
}

#[test]
fn a_stream_looks_as_specified() {
    let image = small(Framing::Libxc);
    let header = [
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, b'X', b'E', b'N', b'F', 0, 0, 0, 3, //
        0, 0, 0, 0, 0, 0, 0, 0, // options, reserved
        1, 0, 0, 0, 12, 0, 0, 0, 4, 0, 0, 0, 17, 0, 0, 0,
    ];
    assert_eq!(image[..40], header);
    let records = records(&image);
    let order: Vec<_> = records.iter().map(|(number, _)| *number).collect();
    assert_eq!(
        order,
        [0x02, 0x11, 0x12, 0x10, 0x03, 0x01, 0x08, 0x07, 0x04, 0x00]
    );
    assert_eq!(records[0].1, [8, 4, 0, 0, 0, 0, 0, 0]);
    let mut frames = vec![0, 0, 0, 0, 0x58, 2, 0, 0];
    frames.extend([1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(records[4].1, frames);
    let mut pages = vec![2, 0, 0, 0, 0, 0, 0, 0];
    pages.extend([5, 0, 0, 0, 0, 0, 0, 0xc0, 6, 0, 0, 0, 0, 0, 0, 0xf0]);
    pages.extend([7; PAGE_SIZE]);
    assert_eq!(records[5].1, pages);

    let stream = small(Framing::Libxl);
    let start = [
        b"LibxlFmt".as_slice(),
        &[0, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    ]
    .concat();
    assert_eq!(stream, [start, image, vec![0; 8]].concat());
}

#[test]
fn a_file_of_xl_save_is_read() {
    let mut file = b"Xen saved domain, xl format\n \0 \r".to_vec();
    for word in [0x0102_0304u32, 3, 0, 9] {
        file.extend(word.to_le_bytes());
    }
    file.extend(b"{ \"a\":1 }");
    file.extend(small(Framing::Libxl));
    let image = Image::read(file.as_slice(), Framing::XlSave, LIMIT).unwrap();
    assert_eq!(
        image,
        Image::read(small(Framing::Libxc).as_slice(), Framing::Libxc, LIMIT).unwrap()
    );
    assert_eq!(image.content(5), Some(&[7; PAGE_SIZE]));
    assert_eq!((image.content(6), image.content(4)), (None, None));
    assert_eq!(image.max_pfn, Some(600));
    file[36] = 1;
    assert!(matches!(
        Image::read(file.as_slice(), Framing::XlSave, LIMIT),
        Err(StreamError::Foreign(_))
    ));
}

#[test]
fn an_order_that_the_restorer_refuses_cannot_be_written() {
    let page = [1; PAGE_SIZE];
    let normal = |pfn| StreamPage {
        pfn,
        page_type: PageType::Normal,
        content: Some(&page),
    };
    let begin = |kind| StreamWriter::begin(Vec::new(), Framing::Libxl, &static_data(kind)).unwrap();

    let mut pv = begin(DomainKind::Pv64);
    assert!(matches!(
        pv.pages(&[normal(0)]),
        Err(StreamError::OutsideMemory(0))
    ));
    assert!(matches!(
        pv.p2m_frames(600, &[1]),
        Err(StreamError::Malformed(_))
    ));
    assert!(matches!(
        pv.p2m_frames(u64::MAX, &[1]),
        Err(StreamError::OutsideMemory(_))
    ));
    pv.p2m_frames(511, &[1]).unwrap();
    assert!(matches!(
        pv.pages(&[normal(512)]),
        Err(StreamError::OutsideMemory(512))
    ));
    pv.p2m_frames(512, &[1, 2]).unwrap();
    pv.pages(&[normal(512)]).unwrap();
    let many = vec![normal(0); MAX_RECORD_PAGES + 1];
    assert!(matches!(pv.pages(&many), Err(StreamError::PageCount(1025))));
    pv.pages(&many[1..]).unwrap();
    for (page_type, content) in [(PageType::Invalid, Some(&page)), (PageType::L1, None)] {
        let page = StreamPage {
            pfn: 1,
            page_type,
            content,
        };
        assert!(matches!(pv.pages(&[page]), Err(StreamError::Content(1, _))));
    }
    let stream = pv.finish(&pv_state()).unwrap();
    assert_eq!(
        Image::read(stream.as_slice(), Framing::Libxl, LIMIT)
            .unwrap()
            .pages(),
        513
    );

    assert!(
        begin(DomainKind::Pv64).finish(&pv_state()).is_err(),
        "No p2m was written"
    );
    let mut hvm = begin(DomainKind::Hvm);
    assert!(matches!(
        hvm.p2m_frames(1, &[0]),
        Err(StreamError::OutOfOrder(_))
    ));
    hvm.pages(&[normal(0)]).unwrap();
    assert!(matches!(
        hvm.finish(&pv_state()),
        Err(StreamError::OutOfOrder(_))
    ));
}

#[test]
fn an_order_that_the_restorer_refuses_is_not_read() {
    let image = small(Framing::Libxc);
    let records = records(&image);
    let rebuild = |order: &[usize]| {
        let mut bytes = image[..40].to_vec();
        for at in order {
            let (number, body) = &records[*at];
            bytes.extend(number.to_le_bytes());
            bytes.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
            bytes.extend(body);
            bytes.extend(vec![0; padding(body.len())]);
        }
        Image::read(bytes.as_slice(), Framing::Libxc, LIMIT)
    };
    assert!(rebuild(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]).is_ok());
    // Static data in any order, and the p2m and pages again.
    assert!(rebuild(&[2, 0, 1, 3, 4, 5, 5, 4, 5, 8, 7, 6, 9]).is_ok());
    for wrong in [
        &[1, 2, 3, 4, 5, 6, 7, 8, 9][..],   // no X86_PV_INFO
        &[0, 1, 2, 4, 5, 6, 7, 8, 9],       // no STATIC_DATA_END
        &[0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9], // two of them
        &[0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9], // two X86_PV_INFO
        &[0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9], // two policies
        &[0, 1, 2, 3, 5, 4, 6, 7, 8, 9],    // pages before the p2m
        &[0, 1, 2, 3, 4, 6, 5, 7, 8, 9],    // pages after the first of the state
        &[0, 1, 2, 3, 4, 5, 7, 8, 9],       // no X86_TSC_INFO
        &[0, 1, 2, 3, 4, 5, 6, 8, 9],       // no SHARED_INFO
        &[0, 1, 2, 3, 4, 5, 6, 7, 9],       // no vCPU
        &[0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9], // a vCPU twice
        &[0, 1, 2, 3, 4, 5, 6, 7, 8],       // no END
    ] {
        assert!(rebuild(wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn unknown_records_are_refused_unless_optional() {
    let image = small(Framing::Libxc);
    let with = |number: u32| {
        let (start, end) = image.split_at(image.len() - 8);
        let record = [
            &number.to_le_bytes()[..],
            &[3, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0, 0],
        ]
        .concat();
        Image::read(
            [start, &record, end].concat().as_slice(),
            Framing::Libxc,
            LIMIT,
        )
    };
    assert!(with(OPTIONAL | 0x13).is_ok());
    for number in [0x13, 0x7fff_ffff, 0x0b, 0x0d, 0x0e, 0x0f] {
        assert!(matches!(with(number), Err(StreamError::Unsupported(n)) if n == number));
    }
}

fn pages() -> impl Strategy<Value = Vec<(Pfn, PageType, u8)>> {
    proptest::collection::vec(
        (0u64..2000, prop::sample::select(&PageType::ALL[..]), 0u8..4),
        1..60,
    )
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        state in samples::states(),
        pages in pages(),
        libxl: bool,
        records in 1usize..5,
    ) {
        let kind = samples::kind_of(&state);
        let framing = if libxl { Framing::Libxl } else { Framing::Libxc };
        let mut writer = StreamWriter::begin(Vec::new(), framing, &static_data(kind)).unwrap();
        if kind == DomainKind::Pv64 {
            writer.p2m_frames(1999, &[3, 2, 1, 0]).unwrap();
        }
        let contents: Vec<Page> = (0..4).map(|byte| [byte; PAGE_SIZE]).collect();
        for chunk in pages.chunks(pages.len().div_ceil(records)) {
            let chunk: Vec<_> = chunk
                .iter()
                .map(|(pfn, page_type, byte)| StreamPage {
                    pfn: *pfn,
                    page_type: *page_type,
                    content: page_type.has_data().then_some(&contents[usize::from(*byte)]),
                })
                .collect();
            writer.pages(&chunk).unwrap();
        }
        let stream = writer.finish(&state).unwrap();
        prop_assert!(stream.len().is_multiple_of(8));
        let mut rest = stream.as_slice();
        let image = Image::read(&mut rest, framing, LIMIT).unwrap();
        prop_assert!(rest.is_empty());
        prop_assert_eq!(&image.static_data, &static_data(kind));
        prop_assert_eq!(&image.state, &state);
        let frames: &[Pfn] = if kind == DomainKind::Pv64 { &[3, 2, 1, 0] } else { &[] };
        prop_assert_eq!(&image.p2m_frames, frames);
        // The last one of each pfn counts.
        for pfn in 0..2000 {
            match pages.iter().rfind(|page| page.0 == pfn) {
                Some((_, page_type, byte)) => {
                    prop_assert_eq!(image.page_type(pfn), *page_type);
                    let content = page_type.has_data().then_some(&contents[usize::from(*byte)]);
                    prop_assert!(image.content(pfn) == content);
                }
                None => prop_assert_eq!(image.page_type(pfn), PageType::Invalid),
            }
        }
        // A limit below the highest page is noticed.
        let highest = pages.iter().map(|page| page.0).max().unwrap();
        prop_assert!(matches!(
            Image::read(stream.as_slice(), framing, highest),
            Err(StreamError::OutsideMemory(_))
        ));
    }

    #[test]
    fn images_differ_where_pages_do(pages in pages(), at in any::<prop::sample::Index>()) {
        let image = |pages: &[(Pfn, PageType, u8)]| {
            let data = static_data(DomainKind::Pv64);
            let mut writer = StreamWriter::begin(Vec::new(), Framing::Libxc, &data).unwrap();
            writer.p2m_frames(1999, &[0; 4]).unwrap();
            for (pfn, page_type, byte) in pages {
                let content = [*byte; PAGE_SIZE];
                let content = page_type.has_data().then_some(&content);
                writer.pages(&[StreamPage { pfn: *pfn, page_type: *page_type, content }]).unwrap();
            }
            let stream = writer.finish(&pv_state()).unwrap();
            Image::read(stream.as_slice(), Framing::Libxc, LIMIT).unwrap()
        };
        let digester = Digester::new(&DigestKey::new([1; 32]));
        let before = image(&pages);
        prop_assert!(before.differing_pages(&before).is_empty());
        let pfn = pages[at.index(pages.len())].0;
        let mut changed = pages.clone();
        changed.push((pfn, PageType::L2, 0xee));
        let after = image(&changed);
        prop_assert_eq!(before.differing_pages(&after), vec![pfn]);
        prop_assert_ne!(before.digest(&digester, 2000), after.digest(&digester, 2000));
    }
}
