use super::*;
use crate::codec::MAX_BATCH_BYTES;
use crate::digest::{DigestKey, MemoryDigest};
use crate::group::{Nonce, Proof};
use crate::guest::xen::stream::samples;
use crate::link::direct::PublicKey;
use crate::pages::MAX_PAGES;
use proptest::prelude::*;
use std::io::Read;

/// Gives bytes in pieces of varying size, and fails for a moment now and then.
struct Pieces<'a> {
    left: &'a [u8],
    call: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.call += 1;
        match self.call % 7 {
            2 => Err(io::ErrorKind::Interrupted.into()),
            4 => Err(io::ErrorKind::WouldBlock.into()),
            _ => {
                let count = to.len().min(self.call * 13 % 97 + 1);
                self.left.read(&mut to[..count])
            }
        }
    }
}

/// Reads a frame as one does with a reader that may time out.
fn persist<R: Read, T>(
    reader: &mut FrameReader<R>,
    mut look: impl FnMut(Frame<'_>) -> T,
) -> Result<Option<T>, WireError> {
    loop {
        match reader.read() {
            Err(WireError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
            Ok(frame) => return Ok(frame.map(&mut look)),
        }
    }
}

fn send(message: &impl Message) -> Vec<u8> {
    let mut writer = FrameWriter::new(Vec::new());
    writer.send(message).unwrap();
    assert_eq!(writer.sent(), writer.get_ref().len() as u64);
    writer.get_ref().clone()
}

fn read(bytes: &[u8], direction: Direction) -> Result<usize, WireError> {
    let mut reader = FrameReader::new(bytes, direction);
    let mut count = 0;
    while let Some(frame) = reader.read()? {
        match direction {
            Direction::ToDestination => drop(ToDestination::decode(frame)?),
            Direction::ToSource => drop(ToSource::decode(frame)?),
        }
        count += 1;
    }
    Ok(count)
}

fn offer() -> Offer {
    Offer {
        move_id: MoveId::from_random([0x5a; 16]),
        name: "g1".to_owned(),
        uuid: "6c1c2b54-62a4-4f3b-9d5a-0d8e7d1b6b0f".to_owned(),
        kind: GuestKind::Pv,
        pages: 32_768,
        populated_pages: 32_000,
        vcpus: 2,
        configuration: serde_json::json!({ "c_info": { "name": "g1" }, "passwd": "secret" }),
        cpu_policy: CpuPolicy {
            leaves: vec![0xab; 48],
            msrs: vec![0xcd; 16],
        },
        tsc: TscOffer {
            mode: 0,
            khz: 2_400_000,
        },
        xen: XenVersion {
            major: 4,
            minor: 17,
            extra: Text::new(".5"),
        },
        digest_key: DigestKey::new([0xee; 32]),
        verify: true,
        purpose: Purpose::Shadow,
        connections: 2,
        direct: Some(DirectOffer {
            key: PublicKey::new([0x5a; 32]),
            connections: 4,
            window: 1 << 20,
        }),
    }
}

fn texts() -> impl Strategy<Value = Text> {
    any::<String>().prop_map(|text| Text::new(&text))
}

/// Messages to the destination, but for pages, which have no owner here.
fn to_destination() -> impl Strategy<Value = ToDestination<'static>> {
    prop_oneof![
        (
            any::<[u8; 16]>(),
            1..=MAX_PAGES,
            "[a-z][a-z0-9._-]{0,50}",
            any::<bool>()
        )
            .prop_map(|(id, pages, name, verify)| {
                let move_id = MoveId::from_random(id);
                let populated_pages = pages.div_ceil(2);
                let offer = Offer {
                    move_id,
                    pages,
                    populated_pages,
                    name,
                    verify,
                    ..offer()
                };
                ToDestination::Offer(Box::new(offer))
            }),
        (0u64..100_000, any::<u64>(), any::<bool>()).prop_map(|(max_pfn, seed, own_p2m)| {
            ToDestination::P2mFrames {
                max_pfn,
                populated: seed % (max_pfn + 2),
                frames: (0..=max_pfn / 512)
                    .filter(|_| own_p2m)
                    .map(|at| (seed ^ at) % (max_pfn + 1))
                    .collect(),
            }
        }),
        any::<(u32, u64, bool)>().prop_map(|(round, pages, last)| ToDestination::RoundEnd {
            round,
            pages,
            last
        }),
        samples::states().prop_map(|state| ToDestination::State(Box::new(state))),
        any::<[u8; 16]>().prop_map(|digest| ToDestination::Final(MemoryDigest(digest))),
        Just(ToDestination::Commit),
        Just(ToDestination::CatchUp),
        any::<bool>().prop_map(|known| ToDestination::Recall { known }),
        any::<[u8; 32]>().prop_map(|proof| ToDestination::Prove(Proof(proof))),
        Just(ToDestination::Keep),
        proptest::collection::vec(any::<u8>(), 0..100).prop_map(ToDestination::Outgoing),
        texts().prop_map(ToDestination::Abort),
        any::<u64>().prop_map(ToDestination::Ping),
        any::<u64>().prop_map(ToDestination::Pong),
        any::<u64>().prop_map(ToDestination::After),
        any::<u64>().prop_map(ToDestination::Spread),
        any::<([u8; 16], u32)>().prop_map(|(token, index)| ToDestination::Join {
            token: JoinToken::new(token),
            index,
        }),
        any::<(u64, u64)>().prop_map(|(batches, messages)| ToDestination::Batch {
            place: Place { batches, messages },
            batch: &[1, 2, 3],
        }),
    ]
}

fn to_source() -> impl Strategy<Value = ToSource> {
    let version =
        (any::<u32>(), any::<u32>(), texts()).prop_map(|(major, minor, extra)| XenVersion {
            major,
            minor,
            extra,
        });
    let codes = prop::sample::select(vec![
        RefusalCode::Exists,
        RefusalCode::Memory,
        RefusalCode::CpuPolicy,
        RefusalCode::Configuration,
        RefusalCode::Kind,
        RefusalCode::Busy,
        RefusalCode::Host,
        RefusalCode::Other,
    ]);
    let part = (texts(), any::<u32>()).prop_map(|(name, eighths)| Part {
        name,
        seconds: f64::from(eighths) / 8.0,
    });
    prop_oneof![
        (
            version,
            any::<Option<u32>>(),
            proptest::collection::vec(texts(), 0..3)
        )
            .prop_map(|(xen, tsc_khz, warnings)| {
                ToSource::Accept(Box::new(Acceptance {
                    edge_site: Some(Text::new("dublin")),
                    join: tsc_khz.map(|khz| JoinToken::new([khz as u8; 16])),
                    direct: tsc_khz.map(|khz| DirectDoor {
                        port: khz as u16,
                        key: PublicKey::new([khz as u8; 32]),
                    }),
                    shadow: tsc_khz.map(|khz| ShadowHead {
                        basis: (khz % 2 == 0).then_some(MemoryDigest([7; 16])),
                        lacking: vec![(khz.into(), 3)],
                    }),
                    group: tsc_khz.map(|khz| GroupOffer {
                        name: Text::new("acme"),
                        nonce: Nonce([khz as u8; 16]),
                    }),
                    xen,
                    tsc_khz,
                    warnings,
                }))
            }),
        (codes, texts()).prop_map(|(code, reason)| ToSource::Refuse(Refusal { code, reason })),
        any::<(u32, u64, u64)>().prop_map(|(round, pages, behind)| ToSource::RoundAck {
            round,
            pages,
            behind
        }),
        Just(ToSource::CaughtUp),
        (any::<[u8; 16]>(), proptest::collection::vec(part, 0..3)).prop_map(|(digest, parts)| {
            ToSource::Ready(Readiness {
                digest: MemoryDigest(digest),
                parts,
                memory: u64::from(digest[0]) << 20,
            })
        }),
        Just(ToSource::Running),
        any::<u32>().prop_map(ToSource::Joined),
        (any::<u64>(), proptest::collection::vec(any::<u8>(), 0..100))
            .prop_map(|(first, runs)| ToSource::Inventory { first, runs }),
        (any::<u64>(), proptest::collection::vec(any::<u8>(), 0..100))
            .prop_map(|(total, names)| ToSource::Shares { total, names }),
        Just(ToSource::Kept),
        texts().prop_map(ToSource::Failed),
        any::<u64>().prop_map(ToSource::Ping),
        any::<u64>().prop_map(ToSource::Pong),
    ]
}

#[test]
fn a_frame_looks_as_documented() {
    let bytes = send(&ToDestination::Ping(0x0102));
    assert_eq!(bytes, [9, 0, 0, 0, 8, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]);
    let bytes = send(&ToDestination::Pages(&[1, 2, 3]));
    assert_eq!(bytes, [3, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3]);
}

#[test]
fn an_offer_is_a_document_that_later_versions_can_add_to() {
    let mut document = serde_json::to_value(offer()).unwrap();
    assert_eq!(document["move_id"], "5a5a5a5a-5a5a-4a5a-9a5a-5a5a5a5a5a5a");
    assert_eq!(document["kind"], "pv");
    document["added_later"] = 1.into();
    document.as_object_mut().unwrap().remove("verify");
    let payload = serde_json::to_vec(&document).unwrap();
    let frame = Frame {
        tag: Tag::Offer,
        payload: &payload,
    };
    let ToDestination::Offer(read) = ToDestination::decode(frame).unwrap() else {
        panic!("Another message came back")
    };
    assert_eq!(
        *read,
        Offer {
            verify: false,
            ..offer()
        }
    );

    let unknown = br#"{"code":"from-the-future","reason":"x"}"#;
    let refusal = ToSource::decode(Frame {
        tag: Tag::Refuse,
        payload: unknown,
    })
    .unwrap();
    assert!(matches!(
        refusal,
        ToSource::Refuse(Refusal {
            code: RefusalCode::Other,
            ..
        })
    ));
}

#[test]
fn secrets_are_not_shown() {
    let shown = format!("{:?}", ToDestination::Offer(Box::new(offer())));
    assert!(
        !shown.contains("secret") && !shown.contains("ee"),
        "{shown}"
    );
    assert!(shown.contains("g1"));
}

#[test]
fn an_offer_that_is_not_possible_is_refused() {
    let check = |change: fn(&mut Offer)| {
        let mut changed = offer();
        change(&mut changed);
        changed.check().unwrap_err()
    };
    assert_eq!(offer().check(), Ok(()));
    for name in ["", "1", "a/b", "a\nb", "\u{202e}", &"x".repeat(201)] {
        assert_eq!(
            Offer {
                name: name.to_owned(),
                ..offer()
            }
            .check(),
            Err(OfferError::Name)
        );
    }
    assert_eq!(check(|offer| offer.uuid.push('0')), OfferError::Uuid);
    let other_case = check(|offer| offer.uuid.make_ascii_uppercase());
    assert_eq!(other_case, OfferError::Uuid);
    assert_eq!(
        check(|offer| offer.uuid = "../../../../../../../etc/passwd-12345".into()),
        OfferError::Uuid
    );
    for (pages, populated) in [
        (0, 0),
        (MAX_PAGES + 1, 1),
        (10, 11),
        (10, 0),
        (u64::MAX, u64::MAX),
    ] {
        let bad = Offer {
            pages,
            populated_pages: populated,
            ..offer()
        };
        assert_eq!(bad.check(), Err(OfferError::Memory { pages, populated }));
    }
    assert_eq!(check(|offer| offer.vcpus = 0), OfferError::Vcpus(0));
    assert_eq!(
        check(|offer| offer.vcpus = u32::MAX),
        OfferError::Vcpus(u32::MAX)
    );
    assert!(matches!(
        check(|offer| offer.cpu_policy.leaves.truncate(47)),
        OfferError::CpuPolicy(_)
    ));
    assert!(matches!(
        check(|offer| offer.cpu_policy.msrs.push(0)),
        OfferError::CpuPolicy(_)
    ));
    // Such an offer is not sent either.
    let bad = ToDestination::Offer(Box::new(Offer {
        vcpus: 0,
        ..offer()
    }));
    let mut writer = FrameWriter::new(Vec::new());
    assert!(matches!(writer.send(&bad), Err(WireError::Offer(_))));
    assert!(writer.get_ref().is_empty());
}

#[test]
fn identifiers_of_moves_are_written_like_uuids() {
    let id = MoveId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]);
    assert_eq!(id.to_string(), "00010203-0405-0607-0809-0a0b0c0d0eff");
    assert_eq!(id.to_string().parse(), Ok(id));
    for bad in [
        "",
        "00010203-0405-0607-0809-0a0b0c0d0ef",
        "000102030-405-0607-0809-0a0b0c0d0eff",
    ] {
        assert_eq!(bad.parse::<MoveId>(), Err(NotAMoveId));
    }
}

#[test]
fn the_peers_reason_cannot_write_on_the_terminal() {
    let frame = Frame {
        tag: Tag::Abort,
        payload: b"\x1b]0;owned\x07 no\xff",
    };
    let ToDestination::Abort(reason) = ToDestination::decode(frame).unwrap() else {
        panic!("Another message came back")
    };
    assert!(reason.as_str().chars().all(|c| !c.is_control()));
}

#[test]
fn headers_that_cannot_be_are_refused_before_their_payload() {
    let refused = |header: [u8; 8], direction| read(&header, direction).unwrap_err();
    let down = Direction::ToDestination;
    assert!(matches!(refused([0; 8], down), WireError::UnknownTag(0)));
    assert!(matches!(
        refused([0x7f, 0, 0, 0, 0, 0, 0, 0], down),
        WireError::UnknownTag(0x7f)
    ));
    assert!(matches!(
        refused([0x85, 0, 0, 0, 0, 0, 0, 0], down),
        WireError::WrongDirection(Tag::Running)
    ));
    assert!(matches!(
        refused([0x07, 0, 0, 0, 0, 0, 0, 0], Direction::ToSource),
        WireError::WrongDirection(Tag::Commit)
    ));
    assert!(matches!(
        refused([7, 1, 0, 0, 0, 0, 0, 0], down),
        WireError::Malformed(Tag::Commit)
    ));
    assert!(matches!(
        refused([7, 0, 0, 1, 0, 0, 0, 0], down),
        WireError::Malformed(Tag::Commit)
    ));
    for tag in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] {
        assert!(matches!(
            refused([tag, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], down),
            WireError::TooLong {
                length: 0xffff_ffff,
                ..
            }
        ));
    }
}

#[test]
fn a_large_announcement_alone_takes_little_memory() {
    let limit = u32::try_from(Tag::P2mFrames.limit()).unwrap().to_le_bytes();
    let header = [[2, 0, 0, 0], limit].concat();
    let mut result = None;
    let measured = allocation_counter::measure(|| {
        result = Some(read(&header, Direction::ToDestination));
    });
    assert!(matches!(result, Some(Err(WireError::Truncated))));
    assert!(measured.bytes_max < 1 << 20, "{measured:?}");
}

#[test]
fn a_message_above_its_limit_is_not_sent() {
    let batch = vec![0; crate::codec::MAX_BATCH_BYTES + 1];
    let mut writer = FrameWriter::new(Vec::new());
    assert!(matches!(
        writer.send(&ToDestination::Pages(&batch)),
        Err(WireError::TooLong {
            tag: Tag::Pages,
            ..
        })
    ));
    assert!(writer.get_ref().is_empty());
    writer.send(&ToDestination::Pages(&batch[1..])).unwrap();
    assert_eq!(read(writer.get_ref(), Direction::ToDestination).unwrap(), 1);
}

#[test]
fn p2m_frames_fit_their_guest() {
    let sized = |max_pfn: u64, populated: u64, frames: &[u64]| {
        let payload = [&[max_pfn, populated], frames].concat();
        let payload: Vec<u8> = payload.iter().flat_map(|word| word.to_le_bytes()).collect();
        ToDestination::decode(Frame {
            tag: Tag::P2mFrames,
            payload: &payload,
        })
        .map(drop)
    };
    assert!(sized(511, 512, &[0]).is_ok());
    assert!(sized(511, 513, &[0]).is_err());
    let decode = |max_pfn: u64, frames: &[u64]| sized(max_pfn, 0, frames);
    assert!(decode(511, &[0]).is_ok());
    assert!(decode(512, &[512, 1]).is_ok());
    // A guest whose p2m is the hypervisor's.
    assert!(decode(511, &[]).is_ok());
    assert!(decode(MAX_PAGES, &[]).is_err());
    assert!(decode(511, &[0, 0]).is_err());
    assert!(decode(512, &[0]).is_err());
    assert!(decode(511, &[512]).is_err());
    assert!(decode(u64::MAX, &[0]).is_err());
    assert!(decode(MAX_PAGES, &[0]).is_err());
}

proptest! {
    #[test]
    fn messages_to_the_destination_come_back(
        messages in proptest::collection::vec(to_destination(), 0..6),
        batch in any::<Vec<u8>>(),
    ) {
        let mut writer = FrameWriter::new(Vec::new());
        for message in &messages {
            writer.send(message).unwrap();
            writer.send(&ToDestination::Pages(&batch)).unwrap();
        }
        let pieces = Pieces { left: writer.get_ref(), call: 0 };
        let mut reader = FrameReader::new(pieces, Direction::ToDestination);
        for message in &messages {
            let same = persist(&mut reader, |frame| ToDestination::decode(frame).unwrap() == *message);
            prop_assert!(same.unwrap().unwrap(), "{message:?}");
            let same = persist(&mut reader, |frame| {
                ToDestination::decode(frame).unwrap() == ToDestination::Pages(&batch)
            });
            prop_assert!(same.unwrap().unwrap());
        }
        prop_assert!(persist(&mut reader, |_| ()).unwrap().is_none());
        prop_assert_eq!(reader.received(), writer.sent());
    }

    #[test]
    fn messages_to_the_source_come_back(messages in proptest::collection::vec(to_source(), 0..6)) {
        let mut writer = FrameWriter::new(Vec::new());
        for message in &messages {
            writer.send(message).unwrap();
        }
        let pieces = Pieces { left: writer.get_ref(), call: 3 };
        let mut reader = FrameReader::new(pieces, Direction::ToSource);
        for message in &messages {
            let came = persist(&mut reader, |frame| ToSource::decode(frame).unwrap()).unwrap();
            prop_assert_eq!(came.as_ref(), Some(message));
        }
        prop_assert!(persist(&mut reader, |_| ()).unwrap().is_none());
    }

    #[test]
    fn a_connection_that_ends_inside_a_message_is_noticed(message in to_source()) {
        let bytes = send(&message);
        for end in 1..bytes.len() {
            prop_assert!(matches!(
                read(&bytes[..end], Direction::ToSource),
                Err(WireError::Truncated)
            ));
        }
        prop_assert_eq!(read(&bytes, Direction::ToSource).unwrap(), 1);
    }

    #[test]
    fn a_payload_of_another_length_is_refused(message in to_destination()) {
        let mut bytes = send(&message);
        // A reason may have any length, and so may a batch.
        prop_assume!(!matches!(
            message,
            ToDestination::Abort(_) | ToDestination::Outgoing(_) | ToDestination::Batch { .. }
        ));
        let tag = message.tag();
        bytes.push(b'!');
        let longer = Frame { tag, payload: &bytes[8..] };
        prop_assert!(ToDestination::decode(longer).is_err());
        let cut = bytes.len() - 2;
        if cut >= 8 {
            let shorter = Frame { tag, payload: &bytes[8..cut] };
            prop_assert!(ToDestination::decode(shorter).is_err());
        }
    }
}

#[test]
fn who_has_to_say_something_first_gets_no_memory_before() {
    let join = ToDestination::Join {
        token: JoinToken::new([1; 16]),
        index: 0,
    };
    let batch = ToDestination::Batch {
        place: Place::default(),
        batch: &[1, 2, 3],
    };
    let mut bytes = Vec::new();
    FrameWriter::new(&mut bytes).send(&join).unwrap();
    FrameWriter::new(&mut bytes).send(&batch).unwrap();
    let reader =
        |bytes| FrameReader::new(bytes, Direction::ToDestination).beginning_with(Some(Tag::Join));
    let mut right = reader(&bytes[..]);
    assert_eq!(right.read().unwrap().unwrap().tag, Tag::Join);
    assert_eq!(right.read().unwrap().unwrap().tag, Tag::Batch);
    // The header alone is refused: nothing that it announces is waited for.
    let header = Tag::Batch.header(MAX_BATCH_BYTES).unwrap();
    assert!(matches!(
        reader(&header[..]).read(),
        Err(WireError::NotYet(Tag::Batch))
    ));
}

#[test]
fn the_frames_of_the_largest_guest_fit_a_message() {
    let frames = vec![0; usize::try_from(MAX_PAGES.div_ceil(512)).unwrap()];
    let largest = ToDestination::P2mFrames {
        max_pfn: MAX_PAGES - 1,
        populated: MAX_PAGES,
        frames,
    };
    FrameWriter::new(std::io::sink()).send(&largest).unwrap();
}

#[test]
fn nothing_takes_less_than_no_time_or_more_than_a_day() {
    let part = |seconds| Part {
        name: Text::new("restore"),
        seconds,
    };
    for seconds in [0.0, 0.2, 86_400.0] {
        assert!(part(seconds).can_be(), "{seconds}");
    }
    for seconds in [-0.1, 86_401.0, 1e308, f64::INFINITY, f64::NAN] {
        assert!(!part(seconds).can_be(), "{seconds}");
    }
}
