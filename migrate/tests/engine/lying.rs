//! A peer that lies, or a wire that changes what crosses: a clear error, with the guest at the
//! source. What is wrong never runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use migrate::Error;
use migrate::guest::replay::generated::Random;
use migrate::guest::replay::{Crossed, Crossing, Shape, cross, pair};
use migrate::link::Link;
use migrate::wire::{
    Direction, FrameReader, FrameWriter, Hello, Message, Tag, ToDestination, ToSource,
};

use crate::scene::{Place, Scene, busy};

/// Reads messages of one direction and passes them on, changed.
fn pass_on(
    reader: Box<dyn std::io::Read + Send>,
    mut writer: Box<dyn std::io::Write + Send>,
    direction: Direction,
    mut change: impl FnMut(Tag, &[u8]) -> Option<Vec<u8>> + Send + 'static,
) {
    thread::spawn(move || {
        let mut reader = reader;
        let Ok(hello) = Hello::read(&mut reader) else {
            return;
        };
        if hello.write(&mut writer).is_err() {
            return;
        }
        let mut frames = FrameReader::new(reader, direction);
        while let Ok(Some(frame)) = frames.read() {
            let bytes = change(frame.tag, frame.payload).unwrap_or_else(|| {
                let mut bytes = Vec::new();
                let mut to = FrameWriter::new(&mut bytes);
                match direction {
                    Direction::ToDestination => to.send(&ToDestination::decode(frame).unwrap()),
                    Direction::ToSource => to.send(&ToSource::decode(frame).unwrap()),
                }
                .unwrap();
                bytes
            });
            if writer
                .write_all(&bytes)
                .and_then(|()| writer.flush())
                .is_err()
            {
                return;
            }
        }
    });
}

fn framed(message: &impl Message) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    FrameWriter::new(&mut bytes).send(message).unwrap();
    Some(bytes)
}

/// A link in whose middle somebody sits.
pub fn meddled(
    away: impl FnMut(Tag, &[u8]) -> Option<Vec<u8>> + Send + 'static,
    back: impl FnMut(Tag, &[u8]) -> Option<Vec<u8>> + Send + 'static,
) -> (Link, Link) {
    let (near, middle, _) = pair(Shape::default());
    let (other, far, _) = pair(Shape::default());
    pass_on(middle.reader, other.writer, Direction::ToDestination, away);
    pass_on(other.reader, middle.writer, Direction::ToSource, back);
    (near, far)
}

/// Passes it on as it is.
pub fn untouched(_: Tag, _: &[u8]) -> Option<Vec<u8>> {
    None
}

fn moved(scene: &Scene, link: (Link, Link)) -> Crossed {
    cross(&scene.near, &scene.far, link, Crossing::default()).unwrap()
}

#[test]
fn a_middle_that_changes_nothing_is_not_noticed() {
    let scene = Scene::with(busy(30));
    let crossed = moved(&scene, meddled(untouched, untouched));
    assert_eq!(scene.settled(&crossed), Place::Destination);
}

#[test]
fn a_source_that_lies_about_its_memory() {
    let scene = Scene::with(busy(31));
    let lie = |tag, payload: &[u8]| {
        (tag == Tag::Final).then(|| {
            let mut digest: [u8; 16] = payload.try_into().unwrap();
            digest[3] ^= 1;
            framed(&ToDestination::Final(migrate::digest::MemoryDigest(digest))).unwrap()
        })
    };
    let crossed = moved(&scene, meddled(lie, untouched));
    assert_eq!(scene.settled(&crossed), Place::Source);
    let there = crossed.destination.error();
    assert!(matches!(there, Some(Error::Verify(_))), "{there:?}");
    let here = crossed.source.error();
    assert!(matches!(here, Some(Error::PeerFailed { .. })), "{here:?}");
    scene.moves(Crossing::default());
}

#[test]
fn a_destination_that_lies_about_what_it_has() {
    let scene = Scene::with(busy(32));
    let lie = |tag, payload: &[u8]| {
        let frame = migrate::wire::Frame { tag, payload };
        match ToSource::decode(frame).unwrap() {
            ToSource::Ready(mut ready) => {
                ready.digest.0[7] ^= 1;
                framed(&ToSource::Ready(ready))
            }
            _ => None,
        }
    };
    let crossed = moved(&scene, meddled(untouched, lie));
    assert_eq!(scene.settled(&crossed), Place::Source);
    let here = crossed.source.error();
    assert!(matches!(here, Some(Error::Verify(_))), "{here:?}");
    scene.moves(Crossing::default());
}

#[test]
fn a_destination_that_says_it_runs_before_it_may() {
    for early in [Tag::Accept, Tag::RoundAck, Tag::Ready] {
        let scene = Scene::with(busy(33));
        let lie = move |tag, _: &[u8]| (tag == early).then(|| framed(&ToSource::Running).unwrap());
        let crossed = moved(&scene, meddled(untouched, lie));
        assert_eq!(scene.settled(&crossed), Place::Source, "{early:?}");
        let here = crossed.source.error();
        assert!(matches!(here, Some(Error::Protocol { .. })), "{here:?}");
    }
}

/// Whatever bit of a batch of pages is changed on its way, what is wrong does not run.
#[test]
fn a_bit_of_a_batch_is_changed() {
    let mut random = Random::new(34);
    let mut refused = 0;
    for _ in 0..24 {
        let (which, at, bit) = (random.below(4), random.next(), random.below(8));
        let scene = Scene::with(busy(34));
        let seen = AtomicUsize::new(0);
        let changed = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&changed);
        let spoil = move |tag, payload: &[u8]| {
            if tag != Tag::Pages || seen.fetch_add(1, Ordering::Relaxed) != which {
                return None;
            }
            count.fetch_add(1, Ordering::Relaxed);
            let mut payload = payload.to_vec();
            let at = (at % payload.len() as u64) as usize;
            payload[at] ^= 1 << bit;
            framed(&ToDestination::Pages(&payload))
        };
        let crossed = moved(&scene, meddled(spoil, untouched));
        // Where it has moved, this has compared its memory: the bit had no meaning.
        if scene.settled(&crossed) == Place::Source {
            refused += changed.load(Ordering::Relaxed);
            let there = crossed.destination.error();
            assert!(
                matches!(there, Some(Error::Verify(_) | Error::Protocol { .. })),
                "{there:?}"
            );
        }
    }
    assert!(refused > 8, "{refused}");
}
