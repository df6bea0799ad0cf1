//! What is done with bytes from anybody: one function for each parser that meets them. The tests
//! beside this file and the fuzzer share them.
//!
//! None may panic, and each checks what must hold of whatever it accepts.

use migrate::arrival::{Arrival, HeldPage};
use migrate::codec::{BatchDecoder, BatchEncoder, Content, MAX_BATCH_PAGES};
use migrate::configuration::{SitePolicy, accept};
use migrate::digest::{DigestKey, Digester};
use migrate::guest::PageState;
use migrate::guest::xen::p2m::{P2mDescription, find};
use migrate::guest::xen::stream::{Framing, Image};
use migrate::image::Arriving;
use migrate::pages::{PAGE_SIZE, Page};
use migrate::wire::{
    Direction, FrameReader, FrameWriter, Hello, Offer, Role, ToDestination, ToSource, WireError,
};

/// Pages of the guest that batches and streams are for.
pub const PAGES: u64 = 1 << 14;

/// What a destination says that it has of a guest. What is accepted is the same when it is written
/// again.
pub fn inventory(bytes: &[u8]) {
    use migrate::guest::PageTable;
    use migrate::shadow::inventory::{decode, encode};
    let digester = Digester::new(&DigestKey::new([1; 32]));
    let mut table = PageTable::new(PAGES);
    let Ok(end) = decode(bytes, &digester, 0, &mut table) else {
        return;
    };
    assert!(end <= PAGES);
    let (mut again, mut same) = (Vec::new(), PageTable::new(PAGES));
    encode(&table, &digester, 0, end, &mut again);
    assert_eq!(decode(&again, &digester, 0, &mut same), Ok(end));
    assert!((0..PAGES).all(|pfn| same.get(pfn) == table.get(pfn)));
}

/// Pages of the guest that arrives, which are all kept.
pub const ARRIVING_PAGES: u64 = 64;

/// A connection's first bytes, then frames.
pub fn hello(bytes: &[u8]) {
    let Ok(hello) = Hello::read(bytes) else {
        return;
    };
    let again = Hello::read(hello.encode().as_slice()).expect("What was read can be written");
    let facts = |hello: &Hello| (hello.role, hello.min, hello.max, hello.features);
    assert_eq!(facts(&again), facts(&hello));
    let _ = Hello::new(Role::Source).agree(&hello);
}

/// Frames to a destination. What is accepted comes back when it is sent again.
pub fn frames_to_destination(bytes: &[u8]) {
    let _ = each_frame(bytes, Direction::ToDestination, |frame| {
        let message = ToDestination::decode(frame)?;
        let mut writer = FrameWriter::new(Vec::new());
        writer.send(&message)?;
        let mut reader = FrameReader::new(writer.get_ref().as_slice(), Direction::ToDestination);
        let again = reader.read()?.map(ToDestination::decode).transpose()?;
        assert!(
            again.as_ref() == Some(&message),
            "{message:?} came back as {again:?}"
        );
        if let ToDestination::Pages(payload) | ToDestination::Batch { batch: payload, .. } = message
        {
            batch(payload);
        }
        Ok(())
    });
}

/// Frames to a source.
pub fn frames_to_source(bytes: &[u8]) {
    let _ = each_frame(bytes, Direction::ToSource, |frame| {
        let message = ToSource::decode(frame)?;
        assert!(!format!("{message:?}").contains('\x1b'));
        FrameWriter::new(Vec::new()).send(&message)
    });
}

fn each_frame(
    bytes: &[u8],
    direction: Direction,
    mut look: impl FnMut(migrate::wire::Frame<'_>) -> Result<(), WireError>,
) -> Result<(), WireError> {
    let mut reader = FrameReader::new(bytes, direction);
    while let Some(frame) = reader.read()? {
        look(frame)?;
    }
    Ok(())
}

/// A batch of pages. What is accepted is the same when it is written again.
pub fn batch(payload: &[u8]) {
    let mut decoder = BatchDecoder::new();
    let Ok(batch) = decoder.decode(payload, PAGES) else {
        return;
    };
    assert!((1..=MAX_BATCH_PAGES).contains(&batch.len()));
    let mut encoder = BatchEncoder::new();
    let mut last = None;
    let mut count = 0;
    for page in batch.iter() {
        assert!(page.pfn < PAGES && last < Some(page.pfn));
        last = Some(page.pfn);
        count += 1;
        assert_eq!(page.page_type.has_data(), page.content != Content::None);
        let kept = match page.content {
            Content::None => encoder.push_hole(page.pfn, page.page_type),
            Content::Zero => encoder.push_zero(page.pfn, page.page_type),
            Content::Raw(content) => encoder.push(page.pfn, page.page_type, content).map(drop),
            Content::Same => encoder.push_same(page.pfn, page.page_type),
            Content::Reference(original) => {
                assert!(original < PAGES && original != page.pfn);
                encoder.push_reference(page.pfn, page.page_type, original)
            }
            Content::Shared(place, witness) => {
                encoder.push_shared(page.pfn, page.page_type, place, witness)
            }
            Content::Delta(delta) => {
                let mut new = CHANGED;
                delta.apply(&mut new);
                encoder
                    .push_changed(page.pfn, page.page_type, &CHANGED, &new)
                    .map(drop)
            }
        };
        kept.expect("What was decoded can be encoded");
    }
    assert_eq!(count, batch.len());
    let mut again = Vec::new();
    encoder.finish(&mut again);
    let mut second = BatchDecoder::new();
    let same = second
        .decode(&again, PAGES)
        .expect("What was encoded can be decoded");
    assert!(batch.iter().zip(same.iter()).all(|(one, other)| {
        (one.pfn, one.page_type) == (other.pfn, other.page_type)
            && seen(one.content) == seen(other.content)
    }));
}

/// The page that deltas change.
const CHANGED: Page = [7; PAGE_SIZE];

/// What a page becomes, or what it is taken from.
fn seen(content: Content<'_>) -> Result<Page, String> {
    match content {
        Content::Raw(content) => Ok(*content),
        Content::Zero => Ok([0; PAGE_SIZE]),
        Content::Delta(delta) => {
            let mut page = CHANGED;
            delta.apply(&mut page);
            Ok(page)
        }
        Content::None | Content::Same | Content::Reference(_) | Content::Shared(..) => {
            Err(format!("{content:?}"))
        }
    }
}

/// Batches, each after its length in 4 bytes, to a guest of [`ARRIVING_PAGES`]. What is accepted
/// of them is digested as it is stored.
pub fn arrival(bytes: &[u8]) {
    let digester = Digester::new(&DigestKey::new([5; 32]));
    let mut held: Vec<Option<(PageState, Box<Page>)>> = vec![None; ARRIVING_PAGES as usize];
    let mut decoder = BatchDecoder::new();
    let mut arrival = Arrival::default();
    let mut rest = bytes;
    while let Some((length, after)) = rest.split_first_chunk() {
        let length = u32::from_le_bytes(*length) as usize;
        let (batch, after) = after.split_at(length.min(after.len()));
        rest = after;
        let Ok(batch) = decoder.decode(batch, ARRIVING_PAGES) else {
            return;
        };
        let resolved = arrival.resolve(
            batch,
            |pfn| {
                let (state, content) = held.get(pfn as usize)?.as_ref()?;
                let content = state.page_type.has_data().then_some(content)?;
                Some(HeldPage {
                    state: *state,
                    content,
                })
            },
            |place, _, page| {
                // As a library of four contents.
                page.fill(place as u8);
                place < 4
            },
        );
        let Ok(resolved) = resolved else {
            return;
        };
        let arrived = resolved.digest(&digester);
        assert_eq!(arrived.len(), batch.len());
        for page in arrived {
            let place = &mut held[page.pfn as usize];
            let content = match (page.content, place.take()) {
                (Arriving::Content(content), _) => Box::new(*content),
                (Arriving::Nothing, _) => Box::new([0; PAGE_SIZE]),
                (Arriving::Kept, before) => before.expect("What is kept is there").1,
            };
            let page_type = page.state.page_type;
            assert_eq!(page.state.digest, digester.page(page_type, &content));
            *place = Some((page.state, content));
        }
    }
}

/// A migration stream. The first byte chooses what is around it.
pub fn stream(bytes: &[u8]) {
    let Some((framing, bytes)) = bytes.split_first() else {
        return;
    };
    let framing = match framing % 3 {
        0 => Framing::Libxc,
        1 => Framing::Libxl,
        _ => Framing::XlSave,
    };
    if let Ok(image) = Image::read(bytes, framing, PAGES) {
        assert!(image.pages() <= PAGES);
        assert!(image.differing_pages(&image).is_empty());
        let digester = Digester::new(&DigestKey::new([0; 32]));
        let digest = image.digest(&digester, image.pages());
        assert_ne!(digest, image.digest(&digester, image.pages() + 1));
    }
}

/// An offer, and the configuration in it.
pub fn configuration(bytes: &[u8]) {
    let Ok(offer) = serde_json::from_slice::<Offer>(bytes) else {
        return;
    };
    if offer.check().is_err() {
        return;
    }
    let policy = SitePolicy {
        kernel_directories: vec!["/boot/guests".to_owned()],
        disk_directories: vec!["/srv/disks".to_owned()],
        default_bridge: Some("xenbr0".to_owned()),
        ..SitePolicy::default()
    };
    if let Ok(accepted) = accept(&offer, &policy) {
        let document = &accepted.configuration;
        assert_eq!(document["c_info"]["domid"], 0);
        for path in [
            &document["b_info"]["kernel"],
            &document["b_info"]["ramdisk"],
        ] {
            assert!(
                path.as_str()
                    .is_none_or(|path| path.starts_with("/boot/guests/"))
            );
            assert!(!path.to_string().contains(".."));
        }
        let text = document.to_string();
        for field in [
            "\"script\"",
            "\"bootloader\"",
            "\"device_model\"",
            "\"extra\"",
        ] {
            assert!(!text.contains(&format!("{field}:")), "{text}");
        }
    }
}

/// The p2m of a guest: what it says of it, and frames that it wrote, each found by its number.
pub fn p2m(bytes: &[u8]) {
    let mut shared_info = [0; PAGE_SIZE];
    let said = bytes.len().min(48);
    shared_info[3088..3088 + said].copy_from_slice(&bytes[..said]);
    let mut guest = P2mDescription::parse(&shared_info);
    // Let it get beyond the first checks now and then.
    if guest.pages > 1 << 24 {
        guest.pages &= (1 << 24) - 1;
        guest.address &= !0xfff;
        guest.generation &= !1;
    }
    let frames: Vec<_> = bytes[said..].chunks(PAGE_SIZE).collect();
    let mut reads = 0u64;
    let found = find(&guest, 1 << 20, 1 << 24, |mfn, to| {
        reads += 1;
        let frame = frames.get(mfn as usize % frames.len().max(1)).ok_or(())?;
        to[..frame.len()].copy_from_slice(frame);
        to[frame.len()..].fill(0x43);
        Ok::<_, ()>(())
    });
    assert!(reads <= guest.pages / (512 * 512) * 512 + 2048, "{reads}");
    if let Ok(found) = found {
        assert!(found.max_pfn < guest.pages);
        assert_eq!(found.frames.len() as u64, found.max_pfn / 512 + 1);
        assert!(found.frames.iter().all(|mfn| (1..=1 << 20).contains(mfn)));
    }
}
