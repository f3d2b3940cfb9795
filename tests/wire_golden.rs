//! The bytes of every message between gateways, against `tests/data/wire-v1.txt` and the file of each later version: stable while
//! the version is spoken.
//!
//! A line of a file is a name and the bytes in hexadecimal. Lines are never changed or removed while their version is spoken; a new
//! variant is added at the end of its enum and gets lines of its own in the file of its version.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::fmt::Debug;

use bytes::BytesMut;
use longhaul::config::PeerAddress;
use longhaul::gateway::pairing::InviteCode;
use longhaul::gateway::pairing::code::Secret;
use longhaul::gateway::pairing::exchange::{Binding, Joining, Reason, refuse};
use longhaul::proto::ownership::{AbortReason, Claim, Doubt, Message, Permit, Resolution, StreamSum};
use longhaul::proto::page::{ImageDigest, JournalId, MigrationId, PAGE_SIZE, PageAddress, StreamDigest, hex};
use longhaul::proto::reduce::{Coder, DictionaryLimits, Effort, PageShelf, Reducer, Restorer, ShelfError, batches};
use longhaul::proto::session::tail::{Protection, TailRun, repair_frame};
use longhaul::proto::vmm_stream::{PageKind, PageRecord, Record, write_page_header};
use longhaul::proto::wire::message::{
    ColdOffer, DiskPlace, Held, KnownImage, OfferedDisk, Placeable, Reply, TunnelOffer, decode, encode,
};
use longhaul::proto::wire::repair::RepairHead;
use longhaul::proto::wire::{
    Frame, FrameHeader, FrameKind, Hello, Limits, Offer, Request, SessionMessage, TestMessage,
};
use longhaul::store::trust::Fingerprint;
use serde::Serialize;
use serde::de::DeserializeOwned;

const MIGRATION: MigrationId = MigrationId([0xa1; 16]);
const JOURNAL: JournalId = JournalId([0xb2; 16]);

/// What is in the file, and which of it a test has looked at.
struct Goldens {
    lines: BTreeMap<&'static str, &'static str>,
    wrong: Vec<String>,
}

impl Goldens {
    /// Lines whose name begins with `kind` and a slash.
    fn of(kind: &str) -> Self {
        let files = [
            include_str!("data/wire-v1.txt"),
            include_str!("data/wire-v2.txt"),
            include_str!("data/wire-v3.txt"),
            include_str!("data/wire-v4.txt"),
            include_str!("data/wire-v5.txt"),
            include_str!("data/wire-v6.txt"),
            include_str!("data/wire-v8.txt"),
            include_str!("data/wire-v9.txt"),
            include_str!("data/wire-v10.txt"),
            include_str!("data/wire-v11.txt"),
            include_str!("data/wire-v12.txt"),
        ];
        let lines = files
            .into_iter()
            .flat_map(str::lines)
            .filter(|line| !line.starts_with('#') && !line.is_empty());
        let lines = lines
            .map(|line| line.split_once(' ').expect("a name, a blank, hexadecimal digits"))
            .filter(|(name, _)| name.split_once('/').is_some_and(|(first, _)| first == kind))
            .collect();
        Self {
            lines,
            wrong: Vec::new(),
        }
    }

    fn bytes(&mut self, name: &str, bytes: &[u8]) {
        let found = hex(bytes);
        match self.lines.remove(name) {
            Some(golden) if golden == found => {}
            Some(golden) => self.wrong.push(format!("{name} is {found}, the golden {golden}")),
            None => self.wrong.push(format!("{name} {found} has no golden")),
        }
    }

    /// The message has these bytes, and these bytes are the message.
    fn message<M: Serialize + DeserializeOwned + PartialEq + Debug>(&mut self, name: &str, message: &M) {
        let bytes = encode(message).unwrap();
        self.bytes(name, &bytes);
        assert_eq!(
            decode::<M>(&mut BytesMut::from(&bytes[..])).unwrap().as_ref(),
            Some(message),
            "{name}"
        );
    }

    #[track_caller]
    fn done(self) {
        let left: Vec<_> = self.lines.keys().collect();
        assert!(
            self.wrong.is_empty() && left.is_empty(),
            "{:#?}\nnot looked at: {left:?}",
            self.wrong
        );
    }
}

fn hello() -> Hello {
    Hello {
        oldest_version: 1,
        newest_version: 300,
        site: "frankfurt".into(),
        software: "longhaul 0.1.0".into(),
        journal: JOURNAL,
        limits: Limits {
            window_bytes: 75_000_000,
            dictionary_pages: 1 << 20,
        },
    }
}

fn offer() -> Offer {
    Offer {
        migration: MIGRATION,
        vm: "db-1".into(),
        inventory: "{}".into(),
        was_running: true,
        reduce: true,
        dictionary_pages: 131_072,
        regions: 192,
    }
}

fn disk() -> OfferedDisk {
    OfferedDisk {
        name: "vda".into(),
        size_bytes: 4 << 30,
        allocated_bytes: 1 << 30,
    }
}

fn cold_offer() -> ColdOffer {
    ColdOffer {
        migration: MIGRATION,
        vm: "db-1".into(),
        disks: vec![disk()],
    }
}

fn placed(request: Placeable) -> Request {
    let places = vec![DiskPlace {
        disk: "vda".into(),
        place: "fast/db-1.qcow2".into(),
    }];
    Request::Placed { request, places }
}

fn permit() -> Permit {
    Permit {
        stream: StreamSum {
            digest: StreamDigest([0xc3; 32]),
            length: 1 << 33,
        },
        was_running: true,
        destination_journal: JOURNAL,
    }
}

#[test]
fn requests_have_these_bytes() {
    let mut goldens = Goldens::of("request");
    let requests = [
        Request::Hello(hello()),
        Request::Check(offer()),
        Request::Open(Offer {
            was_running: false,
            reduce: false,
            ..offer()
        }),
        Request::Attach {
            migration: MIGRATION,
            epoch: Some(7),
        },
        Request::Attach {
            migration: MIGRATION,
            epoch: None,
        },
        Request::Ping(u64::MAX),
        Request::Drives { migration: MIGRATION },
        Request::Test { test: MIGRATION },
        Request::OpenKnowing {
            offer: offer(),
            images: vec![KnownImage {
                id: MIGRATION,
                digest: ImageDigest([0xc3; 32]),
            }],
        },
        Request::Tunnel(TunnelOffer {
            stream: MIGRATION,
            tunnel: "libvirt".into(),
            window_bytes: 32 << 20,
            dictionary_pages: 1 << 16,
        }),
        Request::AttachTunnel {
            stream: MIGRATION,
            epoch: 7,
        },
        Request::CheckWithDisks {
            offer: offer(),
            disks: vec![disk()],
        },
        Request::OpenWithDisks {
            offer: offer(),
            images: Vec::new(),
            disks: vec![disk()],
        },
        Request::Disks {
            migration: MIGRATION,
            stream: TunnelOffer {
                stream: MigrationId([0xd4; 16]),
                tunnel: String::new(),
                window_bytes: 32 << 20,
                dictionary_pages: 1 << 16,
            },
        },
        Request::CheckCold(cold_offer()),
        Request::OpenCold(cold_offer()),
        placed(Placeable::Check {
            offer: offer(),
            disks: vec![disk()],
        }),
        placed(Placeable::Open {
            offer: offer(),
            images: Vec::new(),
            disks: vec![disk()],
        }),
        placed(Placeable::CheckCold(cold_offer())),
        placed(Placeable::OpenCold(cold_offer())),
    ];
    for request in &requests {
        // A variant that is added must be given a name here, and so a golden.
        let name = match request {
            Request::Hello(_) => "request/hello",
            Request::Check(_) => "request/check",
            Request::Open(_) => "request/open",
            Request::Attach { epoch: Some(_), .. } => "request/attach",
            Request::Attach { epoch: None, .. } => "request/attach-without-stream",
            Request::Ping(_) => "request/ping",
            Request::Drives { .. } => "request/drives",
            Request::Test { .. } => "request/test",
            Request::OpenKnowing { .. } => "request/open-knowing",
            Request::Tunnel(_) => "request/tunnel",
            Request::AttachTunnel { .. } => "request/attach-tunnel",
            Request::CheckWithDisks { .. } => "request/check-with-disks",
            Request::OpenWithDisks { .. } => "request/open-with-disks",
            Request::Disks { .. } => "request/disks",
            Request::CheckCold(_) => "request/check-cold",
            Request::OpenCold(_) => "request/open-cold",
            Request::Placed { request, .. } => match request {
                Placeable::Check { .. } => "request/placed-check",
                Placeable::Open { .. } => "request/placed-open",
                Placeable::CheckCold(_) => "request/placed-check-cold",
                Placeable::OpenCold(_) => "request/placed-open-cold",
            },
        };
        goldens.message(name, request);
    }
    goldens.done();
}

#[test]
fn replies_of_version_1_have_these_bytes() {
    let mut goldens = Goldens::of("reply");
    let replies = [
        Reply::Hello(hello()),
        Reply::Checked(vec![]),
        Reply::Checked(vec!["no room".into(), "no such VM".into()]),
        Reply::Refused("a hello comes first".into()),
        Reply::Pong(1),
        Reply::Drives(false),
        Reply::Followed,
    ];
    for reply in &replies {
        let name = match reply {
            Reply::Hello(_) => "reply/hello",
            Reply::Checked(against) if against.is_empty() => "reply/checked",
            Reply::Checked(_) => "reply/checked-against",
            Reply::Refused(_) => "reply/refused",
            Reply::Pong(_) => "reply/pong",
            Reply::Drives(_) => "reply/drives",
            Reply::Followed => "reply/followed",
        };
        goldens.message(name, reply);
    }
    goldens.done();
}

#[test]
fn messages_of_a_link_test_have_these_bytes() {
    let mut goldens = Goldens::of("test");
    let messages = [
        TestMessage::Arrived {
            lanes: 300,
            lane_bytes: 1 << 30,
            micros: 10_000_000,
        },
        TestMessage::Refused("busy".into()),
    ];
    for message in &messages {
        let name = match message {
            TestMessage::Arrived { .. } => "test/arrived",
            TestMessage::Refused(_) => "test/refused",
        };
        goldens.message(name, message);
    }
    goldens.done();
}

#[test]
fn session_messages_of_version_1_have_these_bytes() {
    let mut goldens = Goldens::of("session");
    let held = Held {
        next: 300,
        beyond: vec![(302, 303), (400, 512)],
    };
    let messages = [
        SessionMessage::Accepted { held: Held::default() },
        SessionMessage::Refused { reason: "no".into() },
        SessionMessage::Ack {
            held,
            vmm_bytes: 1 << 40,
            queued_bytes: 5,
        },
        SessionMessage::Failed {
            reason: "the hypervisor ended".into(),
        },
        SessionMessage::Cancel {
            reason: "the operator cancelled it".into(),
        },
        SessionMessage::Ownership(Message::Cancel),
        SessionMessage::Loaded,
        SessionMessage::AcceptedKnowing { image: MIGRATION },
        SessionMessage::Answer {
            offset: 300,
            bytes: b"hi".to_vec(),
        },
        SessionMessage::Answer {
            offset: 302,
            bytes: Vec::new(),
        },
        SessionMessage::AnswersTaken { until: 303 },
    ];
    for message in &messages {
        let name = match message {
            SessionMessage::Accepted { .. } => "session/accepted",
            SessionMessage::Refused { .. } => "session/refused",
            SessionMessage::Ack { .. } => "session/ack",
            SessionMessage::Failed { .. } => "session/failed",
            SessionMessage::Cancel { .. } => "session/cancel",
            SessionMessage::Ownership(_) => "session/ownership",
            SessionMessage::Loaded => "session/loaded",
            SessionMessage::AcceptedKnowing { .. } => "session/accepted-knowing",
            SessionMessage::Answer { bytes, .. } if bytes.is_empty() => "session/answers-end",
            SessionMessage::Answer { .. } => "session/answer",
            SessionMessage::AnswersTaken { .. } => "session/answers-taken",
        };
        goldens.message(name, message);
    }
    goldens.done();
}

#[test]
fn ownership_messages_of_version_1_have_these_bytes() {
    let mut goldens = Goldens::of("ownership");
    let resolved = |claim| {
        Message::Resolved(Resolution {
            claim,
            by: "ann".into(),
        })
    };
    let query = |permit, bytes_lost| Message::Query {
        permit,
        bytes_lost,
        destination_journal: JOURNAL,
    };
    let messages = [
        Message::Permit(permit()),
        Message::Permit(Permit {
            was_running: false,
            ..permit()
        }),
        query(Some(permit()), false),
        query(None, true),
        Message::Cancel,
        Message::Settled,
        resolved(Claim::PeerIsFenced),
        resolved(Claim::PeerOwns),
        Message::InProgress,
        Message::MissingBytes,
        Message::Committed,
        Message::Running,
        Message::Reverted,
        Message::Unknown,
    ];
    for message in &messages {
        let name = match message {
            Message::Permit(permit) if permit.was_running => "ownership/permit",
            Message::Permit(_) => "ownership/permit-of-a-paused-guest",
            Message::Query { permit: Some(_), .. } => "ownership/query",
            Message::Query { permit: None, .. } => "ownership/query-without-permit",
            Message::Cancel => "ownership/cancel",
            Message::Settled => "ownership/settled",
            Message::Resolved(Resolution {
                claim: Claim::PeerIsFenced,
                ..
            }) => "ownership/resolved-peer-is-fenced",
            Message::Resolved(Resolution {
                claim: Claim::PeerOwns, ..
            }) => "ownership/resolved-peer-owns",
            Message::InProgress => "ownership/in-progress",
            Message::MissingBytes => "ownership/missing-bytes",
            Message::Committed => "ownership/committed",
            Message::Running => "ownership/running",
            Message::Reverted => "ownership/reverted",
            Message::Unknown => "ownership/unknown",
            Message::Aborted { .. } | Message::InDoubt { .. } => unreachable!("they come below"),
        };
        goldens.message(name, message);
    }
    for reason in [
        AbortReason::Cancelled,
        AbortReason::TimedOut,
        AbortReason::StreamDiffers,
        AbortReason::LoadFailed,
        AbortReason::VmmDied,
        AbortReason::RanEarly,
        AbortReason::Restarted,
        AbortReason::BytesLost,
        AbortReason::NeverPrepared,
        AbortReason::JournalChanged,
        AbortReason::Resolved,
    ] {
        let name = match reason {
            AbortReason::Cancelled => "cancelled",
            AbortReason::TimedOut => "timed-out",
            AbortReason::StreamDiffers => "stream-differs",
            AbortReason::LoadFailed => "load-failed",
            AbortReason::VmmDied => "vmm-died",
            AbortReason::RanEarly => "ran-early",
            AbortReason::Restarted => "restarted",
            AbortReason::BytesLost => "bytes-lost",
            AbortReason::NeverPrepared => "never-prepared",
            AbortReason::JournalChanged => "journal-changed",
            AbortReason::Resolved => "resolved",
        };
        goldens.message(&format!("ownership/aborted-{name}"), &Message::Aborted { reason });
    }
    for doubt in [
        Doubt::JournalFailed,
        Doubt::JournalChanged,
        Doubt::PeerInDoubt,
        Doubt::MayHaveRun,
        Doubt::CannotContinue,
        Doubt::CannotResume,
        Doubt::RanAfterPermit,
        Doubt::NotFrozen,
        Doubt::Contradicted,
    ] {
        let name = match doubt {
            Doubt::JournalFailed => "journal-failed",
            Doubt::JournalChanged => "journal-changed",
            Doubt::PeerInDoubt => "peer-in-doubt",
            Doubt::MayHaveRun => "may-have-run",
            Doubt::CannotContinue => "cannot-continue",
            Doubt::CannotResume => "cannot-resume",
            Doubt::RanAfterPermit => "ran-after-permit",
            Doubt::NotFrozen => "not-frozen",
            Doubt::Contradicted => "contradicted",
        };
        goldens.message(&format!("ownership/in-doubt-{name}"), &Message::InDoubt { doubt });
    }
    goldens.done();
}

#[test]
fn frames_of_version_1_have_these_bytes() {
    let mut goldens = Goldens::of("frame");
    let frames = [
        (FrameKind::Plain, false, false),
        (FrameKind::Reduced, false, true),
        (FrameKind::Plain, true, true),
    ];
    for (kind, last, held) in frames {
        let name = match kind {
            FrameKind::Plain if last => "frame/plain-last-held",
            FrameKind::Plain => "frame/plain",
            FrameKind::Reduced => "frame/reduced-held",
            FrameKind::Repair => unreachable!("of version 2"),
        };
        let header = FrameHeader {
            kind,
            last,
            held,
            migration: MIGRATION,
            epoch: 3,
            sequence: 0x0102_0304_0506_0708,
            stream_offset: 1 << 40,
            stream_bytes: 3,
        };
        let frame = Frame {
            header,
            payload: b"abc"[..].into(),
        };
        let lane = [frame.encode_header(), frame.payload.clone()].concat();
        goldens.bytes(name, &lane);
        assert_eq!(Frame::decode(lane.into()).unwrap(), frame);
    }
    goldens.done();
}

#[test]
fn repairs_of_version_2_have_these_bytes() {
    let frame = |sequence, payload: &'static [u8]| Frame {
        header: FrameHeader {
            kind: FrameKind::Plain,
            last: false,
            held: false,
            migration: MIGRATION,
            epoch: 3,
            sequence,
            stream_offset: 0,
            stream_bytes: payload.len() as u32,
        },
        payload: payload.into(),
    };
    let run = TailRun {
        frames: vec![(frame(8, b"abc"), 5), (frame(9, b""), 7)],
    };
    let protection = Protection {
        rows: 2,
        row_exponent: 11,
    };
    let repair = repair_frame(&run, protection);
    let mut goldens = Goldens::of("repair");
    let head = RepairHead::decode(&repair.payload).unwrap().unwrap();
    let (front, parity) = repair.payload.split_at(head.len());
    goldens.bytes("repair/header", &repair.encode_header());
    goldens.bytes("repair/head", front);
    // The lanes fill a part of the first row, so that the second parity row is the first: 2^0 = 1.
    let covered = [48, 3, 48].iter().sum::<usize>();
    goldens.bytes("repair/parity", &parity[..covered]);
    assert_eq!(parity.len(), 2 << 11);
    assert_eq!(parity[..1 << 11], parity[1 << 11..]);
    assert!(parity[covered..1 << 11].iter().all(|byte| *byte == 0));
    goldens.done();
}

#[test]
fn a_parity_row_beyond_the_first_weighs_rows_by_powers_of_two() {
    let mut payload = vec![0; 3 << 11];
    // One byte in each of the rows 1 and 2, at the same column; the header takes the first 48 bytes of row 0.
    payload[(1 << 11) - 48] = 1;
    payload[(2 << 11) - 48] = 0x80;
    let frame = Frame {
        header: FrameHeader {
            kind: FrameKind::Plain,
            last: false,
            held: false,
            migration: MigrationId([0; 16]),
            epoch: 0,
            sequence: 0,
            stream_offset: 0,
            stream_bytes: payload.len() as u32,
        },
        payload: payload.into(),
    };
    let run = TailRun {
        frames: vec![(frame, 0)],
    };
    let protection = Protection {
        rows: 3,
        row_exponent: 11,
    };
    let repair = repair_frame(&run, protection);
    let parity = &repair.payload[RepairHead::decode(&repair.payload).unwrap().unwrap().len()..];
    // Of the header only its first byte, 0x4c, is in this column. 2·1 = 2, 4·1 = 4; 4·0x80 = 0x3a, 16·0x80 = 0xe8 (x^8 = 0x1d).
    let column = |row: usize| parity[row << 11];
    assert_eq!(column(0), 0x4c ^ 0x01 ^ 0x80);
    assert_eq!(column(1), 0x4c ^ 0x02 ^ 0x3a);
    assert_eq!(column(2), 0x4c ^ 0x04 ^ 0xe8);
}

/// Payloads are judged by what they restore to: how well lz4 does is not part of the format.
#[test]
fn payloads_of_format_1_restore_to_these_bytes() {
    let mut goldens = Goldens::of("payload");
    let limits = DictionaryLimits::new(16, 4).unwrap();
    let names = [b"pc.ram".to_vec()];
    let mut reducer = Reducer::without_deltas(limits);
    let mut restorer = Restorer::new(limits, Pages::default());
    // Bytes, a zero record, a page of zeroes, a literal and a reference; then the same pages once more.
    let text = [b'x'; PAGE_SIZE];
    let pages = [None, Some([0; PAGE_SIZE]), Some(text), Some(text)];
    let mut stream = b"head".to_vec();
    let mut records = vec![Record::Bytes { len: 4 }];
    for (page, content) in (0..).zip(&pages) {
        let record = PageRecord {
            at: PageAddress { block: 0, page },
            continues: page > 0,
        };
        let kind = if content.is_some() {
            PageKind::Page
        } else {
            PageKind::Zero
        };
        write_page_header(record, kind, &names[0], &mut stream);
        stream.extend_from_slice(content.as_ref().map_or(&[0][..], |content| &content[..]));
        records.push(if content.is_some() {
            Record::Page(record)
        } else {
            Record::Zero(record)
        });
    }
    for name in ["payload/first", "payload/again"] {
        let Some(golden) = goldens.lines.remove(name) else {
            let batch = batches(&stream, &records, &names).next().unwrap();
            let mut digests = Vec::new();
            batch.digest_pages(&mut digests);
            let mut payload = Vec::new();
            reducer.encode(&batch, &digests, &mut payload);
            goldens.bytes(name, &payload);
            continue;
        };
        let payload = unhex(golden);
        let mut restored = Vec::new();
        restorer.restore(&payload, &mut restored).unwrap();
        assert!(restored == stream, "{name} restores to other bytes");
    }
    goldens.done();
}

/// A page, what changed in it, and the page with its previous version as dictionary. Nothing of a delta depends on a codec's version but the
/// last, which is judged by what it restores to.
#[test]
fn payloads_of_format_2_restore_to_these_bytes() {
    let mut goldens = Goldens::of("payload2");
    let limits = DictionaryLimits::new(16, 4).unwrap();
    let names = [b"pc.ram".to_vec()];
    let mut reducer = Reducer::new(limits, limits.slots());
    let mut restorer = Restorer::new(limits, Pages::default());
    let before: [u8; PAGE_SIZE] = std::array::from_fn(|at| (at / 16) as u8);
    let mut edited = before;
    edited[1000..1008].copy_from_slice(b"longhaul");
    let mut moved = edited;
    moved.rotate_right(300);
    for (name, page) in [("first", before), ("edited", edited), ("moved", moved)] {
        let name = format!("payload2/{name}");
        let record = PageRecord {
            at: PageAddress { block: 0, page: 7 },
            continues: false,
        };
        let mut stream = Vec::new();
        write_page_header(record, PageKind::Page, &names[0], &mut stream);
        stream.extend_from_slice(&page);
        let records = [Record::Page(record)];
        let batch = batches(&stream, &records, &names).next().unwrap();
        let mut digests = Vec::new();
        batch.digest_pages(&mut digests);
        let mut payload = Vec::new();
        let deltas = reducer.encode(&batch, &digests, &mut payload).pages.delta;
        assert_eq!(deltas, u64::from(!name.ends_with("first")), "{name}");
        let Some(golden) = goldens.lines.remove(name.as_str()) else {
            goldens.bytes(&name, &payload);
            continue;
        };
        if name.ends_with("edited") {
            assert_eq!(golden, hex(&payload));
        }
        let payload = unhex(golden);
        let mut restored = Vec::new();
        restorer.restore(&payload, &mut restored).unwrap();
        assert!(restored == stream, "{name} restores to other bytes");
    }
    // What begins a zstd frame, and what goes on in it.
    reducer.set_effort(Effort::MOST);
    for name in ["payload2/zstd", "payload2/zstd-goes-on"] {
        let text = format!("{name} was here. ").repeat(300);
        let text = &text.as_bytes()[..3 * PAGE_SIZE / 4];
        let records = [Record::Bytes { len: text.len() }];
        let batch = batches(text, &records, &names).next().unwrap();
        let mut payload = Vec::new();
        reducer.encode(&batch, &[], &mut payload);
        let Some(golden) = goldens.lines.remove(name) else {
            goldens.bytes(name, &payload);
            continue;
        };
        let mut restored = Vec::new();
        restorer.restore(&unhex(golden), &mut restored).unwrap();
        assert!(restored == text, "{name} restores to other bytes");
    }
    goldens.done();
}

/// The same text by two coders, then once more by the second, which knows it then.
#[test]
fn payloads_of_several_coders_restore_to_these_bytes() {
    let mut goldens = Goldens::of("payload6");
    let limits = DictionaryLimits::new(16, 4).unwrap();
    let mut reducer = Reducer::new(limits, limits.slots());
    let mut restorer = Restorer::new(limits, Pages::default());
    let mut coders = [0, 1].map(Coder::new);
    reducer.set_effort(Effort::MOST);
    let text = "the same words. ".repeat(200);
    let records = [Record::Bytes { len: text.len() }];
    for (name, coder) in [("of-coder-0", 0), ("of-coder-1", 1), ("of-coder-1-goes-on", 1)] {
        let name = format!("payload6/{name}");
        let batch = batches(text.as_bytes(), &records, &[]).next().unwrap();
        let mut payload = Vec::new();
        coders[coder].code(reducer.draft(&batch, &[]), &mut payload);
        let Some(golden) = goldens.lines.remove(name.as_str()) else {
            goldens.bytes(&name, &payload);
            continue;
        };
        let mut restored = Vec::new();
        restorer.restore(&unhex(golden), &mut restored).unwrap();
        assert!(restored == text.as_bytes(), "{name} restores to other bytes");
    }
    goldens.done();
}

fn unhex(digits: &str) -> Vec<u8> {
    let pairs = (0..digits.len()).step_by(2);
    pairs
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
        .collect()
}

/// The pages of a dictionary, in memory.
#[derive(Default)]
struct Pages(BTreeMap<u32, Vec<u8>>);

impl PageShelf for Pages {
    fn put(&mut self, slot: u32, page: &[u8]) -> Result<(), ShelfError> {
        self.0.insert(slot, page.to_vec());
        Ok(())
    }

    fn get(&mut self, slot: u32, page: &mut [u8]) -> Result<(), ShelfError> {
        page.copy_from_slice(&self.0[&slot]);
        Ok(())
    }
}

#[test]
fn pairing_of_version_1_has_these_bytes() {
    let mut goldens = Goldens::of("pairing");
    let code = InviteCode {
        site: "frankfurt".into(),
        address: "frankfurt.example.net:4646".parse().unwrap(),
        fingerprint: Fingerprint([0xd4; 32]),
        secret: Secret([0xe5; 32]),
        expires_at: 1_800_000_000,
    };
    goldens.bytes("pairing/code", code.to_string().as_bytes());
    assert_eq!(code.to_string().parse(), Ok(code.clone()));
    let binding = Binding {
        exporter: [0xf6; 32],
        inviter: code.fingerprint,
        joiner: Fingerprint([0x17; 32]),
    };
    let address: PeerAddress = "tokyo.example.net:4646".parse().unwrap();
    let (_, request) = Joining::begin(&code, binding, "tokyo", Some(&address)).unwrap();
    goldens.bytes("pairing/request", &request);
    goldens.bytes("pairing/refused", &refuse(Reason::NotInvited));
    goldens.done();
}
