//! Whatever comes from a peer, a hypervisor or a disk: bytes of any kind, and what was right before some of its bytes were changed.
//!
//! ```text
//! cargo test --release --test fuzz         a second for each
//! tests/run --long                         five minutes for each, after everything else
//! ```
//!
//! A failure says the seed that brings it again (`BOLERO_RANDOM_SEED`). What has failed once gets a test of its own where it was mended.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::HashSet;
use std::path::Path;
use std::sync::OnceLock;

use bolero::{check, produce};
use bytes::{Bytes, BytesMut};
use longhaul::proto::disk::nbd::{
    Answer, Command, Connection, ConnectionError, Event, Headers, MAX_DESCRIPTORS, MetaContext, Reading,
};
use longhaul::proto::page::PAGE_SIZE;
use longhaul::proto::reduce::{DictionaryLimits, Effort, PageShelf, Reducer, RestoreError, Restorer, ShelfError};
use longhaul::proto::session::Encoder;
use longhaul::proto::vmm_stream::Record;
use longhaul::proto::vmm_stream::qemu::QemuParser;
use longhaul::proto::vmm_stream::qemu::multifd::{Merger, MultifdError};
use longhaul::proto::wire::frame::{HEADER_LEN, MAX_RAW};
use longhaul::proto::wire::message::{Reply, decode, encode};
use longhaul::proto::wire::{Frame, FrameKind, Request, SessionMessage, TestMessage};
use longhaul::store::pages::{PageStore, Whose};

/// Pages of the guest whose stream is damaged.
const PAGES: u64 = 24;

/// Slots of its dictionary: fewer than pages, so that slots are used again.
const SLOTS: u32 = 16;

/// Regions of the guest's memory that it remembers: 4 MiB each.
const REGIONS: u32 = 4;

/// What a restorer may hold for them without its shelf: a table for each region, and what finds them.
const MOST_MEMORY: usize = REGIONS as usize * 4104 + 4096;

/// Magic and version of every frame.
const FRONT: [u8; 2] = [0x4c, 1];

fn limits() -> DictionaryLimits {
    DictionaryLimits::new(SLOTS, REGIONS).unwrap()
}

/// Bytes of any kind, up to so many.
macro_rules! any_bytes {
    ($most:expr) => {
        check!().with_generator(produce::<Vec<u8>>().with().len(0usize..=$most))
    };
}

/// What page `number` holds in this round: text, noise, zeroes, or what another page holds.
fn page(number: u64, round: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    match number % 4 {
        0 => {}
        1 => {
            for (place, byte) in page.iter_mut().enumerate() {
                *byte = b"what moves between continents "[place % 30];
            }
            page[..8].copy_from_slice(&(number + round).to_le_bytes());
        }
        2 => {
            let mut state = number * 7 + 1;
            for byte in &mut page {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (state >> 56) as u8;
            }
            page[100..108].copy_from_slice(&round.to_le_bytes());
        }
        _ => page.fill(7),
    }
    page
}

/// A migration stream of QEMU with two rounds over all pages.
fn stream() -> Vec<u8> {
    let ram = PAGES * PAGE_SIZE as u64;
    let mut stream = b"QEVM\0\0\0\x03\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    stream.extend((ram | 4).to_be_bytes());
    stream.extend(b"\x01r");
    stream.extend(ram.to_be_bytes());
    stream.extend(0x10_u64.to_be_bytes());
    for round in 0..2 {
        stream.extend(b"\x02\0\0\0\x02");
        for number in 0..PAGES {
            let page = page(number, round);
            let flag = if page == [0; PAGE_SIZE] { 2 } else { 8 };
            let named = if number == 0 { 0 } else { 0x20 };
            stream.extend(((number * PAGE_SIZE as u64) | flag | named).to_be_bytes());
            if named == 0 {
                stream.extend(b"\x01r");
            }
            stream.extend(if flag == 2 { &page[..1] } else { &page[..] });
        }
        stream.extend(0x10_u64.to_be_bytes());
    }
    stream
}

/// Its payloads, at each effort as what it is, and as a stream of which nothing is known.
fn payloads() -> &'static Vec<Vec<Bytes>> {
    static PAYLOADS: OnceLock<Vec<Vec<Bytes>>> = OnceLock::new();
    PAYLOADS.get_or_init(|| {
        let encode = |effort: Effort, opaque: bool| {
            let reducer = Reducer::new(limits(), SLOTS);
            let mut encoder = if opaque {
                Encoder::of_opaque(reducer)
            } else {
                Encoder::new(Some(reducer))
            };
            encoder.set_effort(effort);
            let mut frames = Vec::new();
            for piece in stream().chunks(20_000) {
                encoder.feed(piece, &mut frames);
            }
            encoder.finish(&mut frames);
            frames.retain(|frame| frame.kind == FrameKind::Reduced);
            frames.into_iter().map(|frame| frame.payload).collect()
        };
        let known = Effort::ALL.iter().map(|&effort| encode(effort, false));
        known.chain([encode(Effort::LEAST, true)]).collect()
    })
}

/// Changes `bytes` as the input says: at a place, a byte; or cuts them off there.
fn damage(bytes: &mut Vec<u8>, input: &[u8]) {
    for change in input.chunks_exact(4) {
        let place = u32::from_le_bytes([change[0], change[1], change[2], 0]) as usize % bytes.len().max(1);
        match (change[3], bytes.get_mut(place)) {
            (0, _) => bytes.truncate(place),
            (by, Some(byte)) => *byte ^= by,
            (_, None) => {}
        }
    }
}

/// Pages in memory.
struct Shelf(Vec<[u8; PAGE_SIZE]>);

impl PageShelf for Shelf {
    fn put(&mut self, slot: u32, page: &[u8]) -> Result<(), ShelfError> {
        let held = self.0.get_mut(slot as usize).ok_or(ShelfError::NoSuchSlot { slot })?;
        held.copy_from_slice(page);
        Ok(())
    }

    fn get(&mut self, slot: u32, page: &mut [u8]) -> Result<(), ShelfError> {
        page.copy_from_slice(self.0.get(slot as usize).ok_or(ShelfError::NoSuchSlot { slot })?);
        Ok(())
    }
}

fn restorer() -> Restorer<Shelf> {
    Restorer::new(limits(), Shelf(vec![[0; PAGE_SIZE]; SLOTS as usize]))
}

/// Restores what comes, and holds the restorer to its word.
fn restore(restorer: &mut Restorer<Shelf>, payload: &[u8]) -> Option<Vec<u8>> {
    let mut out = b"before".to_vec();
    let restored = restorer.restore(payload, &mut out);
    assert!(out.starts_with(b"before") && out.len() <= b"before".len() + MAX_RAW);
    assert!(restorer.memory_bytes() <= MOST_MEMORY);
    if restored.is_err() {
        assert_eq!(out, b"before");
        assert!(matches!(
            restorer.restore(payload, &mut out),
            Err(RestoreError::AfterFailure)
        ));
        return None;
    }
    Some(out.split_off(b"before".len()))
}

#[test]
fn any_bytes_are_parsed_without_gap_however_they_are_sliced() {
    let whole = stream();
    any_bytes!(8192).for_each(|input: &Vec<u8>| {
        // Behind fronts of all lengths: what may come at each place of a stream.
        let front = input.first().map_or(0, |first| usize::from(*first));
        let step = input.get(1).map_or(1, |second| 1 + usize::from(*second));
        parse(&[&whole[..front], &input[..]].concat(), step);
    });
}

#[test]
fn a_damaged_stream_is_parsed_without_gap_however_it_is_sliced() {
    let whole = stream();
    any_bytes!(128).for_each(|input: &Vec<u8>| {
        let mut stream = whole.clone();
        damage(&mut stream, input);
        parse(&stream, 1 + input.len() * 331 % 5000);
    });
}

fn parse(stream: &[u8], step: usize) {
    let mut parser = QemuParser::default();
    let (mut at, mut given) = (0, 0);
    while at < stream.len() || given < stream.len() {
        given = (given + step).min(stream.len());
        let end = given == stream.len();
        let (mut records, mut events) = (Vec::new(), Vec::new());
        let taken = parser.parse(&stream[at..given], end, &mut records, &mut events);
        let covered: usize = records
            .iter()
            .map(|record: &Record| record.stream_len(parser.blocks()))
            .sum();
        assert_eq!(covered, taken);
        at += taken;
        assert!(given - at <= QemuParser::MAX_PENDING);
        assert!(!end || at == stream.len());
    }
}

/// A migration with one multifd channel: main stream, then channel. Two rounds.
fn multifd() -> [Vec<u8>; 2] {
    let ram = PAGES * PAGE_SIZE as u64;
    let mut main = b"QEVM\0\0\0\x03\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    main.extend((ram | 4).to_be_bytes());
    main.extend(b"\x01r");
    main.extend(ram.to_be_bytes());
    let end = |main: &mut Vec<u8>| {
        main.extend(0x200_u64.to_be_bytes());
        main.extend(0x10_u64.to_be_bytes());
        main.extend(b"\x7e\0\0\0\x02");
    };
    let start = b"\x11\x22\x33\x44\0\0\0\x01";
    let packet = |flags: u32, pages: &[u64], zeroes: &[u64]| {
        let mut packet = start.to_vec();
        packet.extend(flags.to_be_bytes());
        packet.extend(128_u32.to_be_bytes());
        packet.extend((pages.len() as u32).to_be_bytes());
        packet.extend((pages.len() as u32 * PAGE_SIZE as u32).to_be_bytes());
        packet.extend(0_u64.to_be_bytes());
        packet.extend((zeroes.len() as u32).to_be_bytes());
        packet.resize(64, 0);
        packet.push(b'r');
        packet.resize(320, 0);
        for number in pages.iter().chain(zeroes) {
            packet.extend((number * PAGE_SIZE as u64).to_be_bytes());
        }
        packet.resize(1344, 0);
        packet
    };
    let mut channel = start.to_vec();
    channel.resize(64, 0);
    channel.extend(packet(1, &[], &[]));
    end(&mut main);
    for (round, kind) in [(0, 2), (1, 3)] {
        main.extend([kind, 0, 0, 0, 2]);
        end(&mut main);
        let numbers: Vec<u64> = (0..PAGES).collect();
        for few in numbers.chunks(5) {
            let (zeroes, pages): (Vec<u64>, Vec<u64>) =
                few.iter().partition(|&&number| page(number, round) == [0; PAGE_SIZE]);
            channel.extend(packet(0, &pages, &zeroes));
            for &number in &pages {
                channel.extend(page(number, round));
            }
        }
        channel.extend(packet(1, &[], &[]));
    }
    main.extend(b"\0\x06\0\0\0\x02{}");
    [main, channel]
}

#[test]
fn damaged_multifd_connections_are_refused_or_merged_within_their_limit_and_whole_ones_hold_every_page() {
    let whole = multifd();
    let merged = merge(&whole, 700).unwrap();
    let (mut records, mut events) = (Vec::new(), Vec::new());
    QemuParser::default().parse(&merged, true, &mut records, &mut events);
    let pages = records.iter().filter(|record| !matches!(record, Record::Bytes { .. }));
    assert_eq!(pages.count() as u64, 2 * PAGES);
    check!()
        .with_type::<(bool, u16, Vec<u8>)>()
        .for_each(|(which, step, input)| {
            let mut connections = whole.clone();
            damage(&mut connections[usize::from(*which)], input);
            let _ = merge(&connections, usize::from(*step) + 1);
        });
}

/// What main stream and channel are merged to, read in turn in pieces of so many bytes.
fn merge(connections: &[Vec<u8>; 2], step: usize) -> Result<Vec<u8>, MultifdError> {
    let mut merger = Merger::new(1);
    let mut out = Vec::new();
    let mut left = [&connections[0][..], &connections[1][..]];
    for _ in &left {
        merger.connect()?;
    }
    loop {
        let mut went_on = false;
        for (one, left) in left.iter_mut().enumerate() {
            if left.is_empty() || !merger.may_read(one) {
                continue;
            }
            went_on = true;
            let (now, later) = left.split_at(step.min(left.len()));
            *left = later;
            merger.pending(one).extend_from_slice(now);
            merger.advance(one, &mut out)?;
        }
        if !went_on {
            break;
        }
    }
    let given: usize = connections.iter().map(Vec::len).sum();
    // A zero page of a packet takes 8 bytes there, and 9 or a name's more in a stream, with a section of its own at worst.
    assert!(out.len() <= 4 * given);
    merger.close(1)?;
    merger.close(0)?;
    Ok(out)
}

#[test]
fn a_payload_of_any_bytes_is_refused_or_restores_within_its_limit() {
    // Its head begins with the format and a sequence number.
    let front = &payloads()[0][0][..2];
    any_bytes!(8192).for_each(|input: &Vec<u8>| {
        restore(&mut restorer(), input);
        restore(&mut restorer(), &[front, &input[..]].concat());
    });
}

#[test]
fn damaged_payloads_are_refused_or_restore_within_their_limit_and_what_is_whole_restores_exactly() {
    let whole = stream();
    any_bytes!(64).for_each(|input: &Vec<u8>| {
        let (chosen, changes) = input.split_first_chunk::<2>().unwrap_or((&[0, 0], &[]));
        let payloads = &payloads()[usize::from(chosen[0]) % payloads().len()];
        let damaged = usize::from(chosen[1]) % payloads.len();
        let mut restorer = restorer();
        let mut at = 0;
        for (number, payload) in payloads.iter().enumerate() {
            let mut bytes = payload.to_vec();
            if number == damaged {
                damage(&mut bytes, changes);
            }
            let is_whole = number < damaged || bytes == payload[..];
            let Some(restored) = restore(&mut restorer, &bytes) else {
                assert!(!is_whole, "payload {number} was not damaged");
                return;
            };
            if !is_whole {
                return;
            }
            assert!(whole[at..].starts_with(&restored));
            at += restored.len();
        }
        assert_eq!(at, whole.len());
    });
}

#[test]
fn a_lane_of_any_bytes_is_refused_or_is_a_frame_that_has_these_bytes() {
    any_bytes!(2048).for_each(|input: &Vec<u8>| {
        // As it is, and with the magic, the version and the length of a frame.
        let mut framed = input.clone();
        let payload = input.len().saturating_sub(HEADER_LEN);
        if let Some(front) = framed.first_chunk_mut::<8>() {
            front[..2].copy_from_slice(&FRONT);
            front[4..].copy_from_slice(&u32::try_from(payload).unwrap().to_le_bytes());
        }
        for lane in [input, &framed] {
            if let Ok(frame) = Frame::decode(Bytes::copy_from_slice(lane)) {
                assert_eq!([&frame.encode_header()[..], &frame.payload].concat(), *lane);
            }
        }
    });
    // One that is right, so that what is compared above can be reached.
    let mut frame = [0; HEADER_LEN + 5];
    frame[..2].copy_from_slice(&FRONT);
    (frame[2], frame[4], frame[28]) = (1, 5, 5);
    assert!(Frame::decode(Bytes::copy_from_slice(&frame)).is_ok());
}

#[test]
fn messages_of_any_bytes_are_refused_or_are_the_message_that_has_them() {
    fn read<M: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(input: &[u8]) {
        let mut bytes = BytesMut::from(input);
        if let Ok(Some(message)) = decode::<M>(&mut bytes) {
            // Numbers may be written longer than they need be, so that the bytes may be others; the message is the same.
            let again = encode(&message).unwrap();
            assert_eq!(decode::<M>(&mut BytesMut::from(&again[..])).unwrap(), Some(message));
        }
    }
    any_bytes!(2048).for_each(|input: &Vec<u8>| {
        let mut framed = u32::try_from(input.len()).unwrap().to_le_bytes().to_vec();
        framed.extend(input);
        for bytes in [&input[..], &framed] {
            read::<Request>(bytes);
            read::<Reply>(bytes);
            read::<SessionMessage>(bytes);
            read::<TestMessage>(bytes);
        }
    });
}

#[test]
fn a_damaged_image_of_the_store_gives_its_pages_or_none() {
    let folder = tempfile::tempdir().unwrap();
    let disk: Vec<u8> = (0..PAGES).flat_map(|number| page(number, 0)).collect();
    let disk_file = folder.path().join("disk.raw");
    std::fs::write(&disk_file, &disk).unwrap();
    let store = |dir: &Path| PageStore::open(dir, 1 << 30).unwrap();
    let dir = folder.path().join("store");
    let id = store(&dir).seed(&disk_file, "", 1).unwrap().unwrap().head.id;
    let path = store(&dir).path_of(id);
    let whole = std::fs::read(&path).unwrap();
    any_bytes!(16).for_each(|input: &Vec<u8>| {
        let mut image = whole.clone();
        damage(&mut image, input);
        std::fs::write(&path, &image).unwrap();
        let store = store(&dir);
        store.take_in(&mut HashSet::new()).unwrap();
        let Some(found) = store.image(id, &Whose::seed("")) else {
            assert_ne!(image, whole);
            return;
        };
        let mut page = [0; PAGE_SIZE];
        for number in 0..found.head().contents {
            found.read(number, &mut page).unwrap();
            assert!(disk.chunks_exact(PAGE_SIZE).any(|block| block == page));
        }
    });
}

/// Bytes of the export that a hostile server has, and of each read of it.
const EXPORT: u64 = 1 << 20;
const READ: u32 = 8192;

/// What an NBD server says until it is ready, with the best headers that it offers.
fn nbd_handshake(headers: Headers) -> Vec<u8> {
    let mut said = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let mut reply = |option: u32, kind: u32, data: &[u8]| {
        said.extend(0x0003_e889_0455_65a9_u64.to_be_bytes());
        for word in [option, kind, u32::try_from(data.len()).unwrap()] {
            said.extend(word.to_be_bytes());
        }
        said.extend(data);
    };
    if headers == Headers::Structured {
        reply(11, 0x8000_0001, b"not known");
        reply(8, 1, b"");
    } else {
        reply(11, 1, b"");
    }
    reply(10, 4, b"\0\0\0\x05base:allocation");
    reply(10, 1, b"");
    reply(7, 3, &[&b"\0\0"[..], &EXPORT.to_be_bytes(), &[0x0d, 0xed]].concat());
    reply(7, 3, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0");
    reply(7, 1, b"");
    said
}

/// Its answers to a read of each kind, to block status and to a flush: cookies 1 to 4.
fn nbd_answers(headers: Headers) -> Vec<u8> {
    let mut said = Vec::new();
    let mut chunk = |is_last: bool, kind: u16, cookie: u64, offset: u64, payload: &[u8]| {
        let extended = headers == Headers::Extended;
        said.extend(if extended { 0x6e8a_278c } else { 0x668e_33ef_u32 }.to_be_bytes());
        said.extend(u16::from(is_last).to_be_bytes());
        said.extend(kind.to_be_bytes());
        said.extend(cookie.to_be_bytes());
        let length = payload.len() as u64;
        if extended {
            said.extend(offset.to_be_bytes());
            said.extend(length.to_be_bytes());
        } else {
            said.extend(u32::try_from(length).unwrap().to_be_bytes());
        }
        said.extend(payload);
    };
    let data = |offset: u64, length: usize| [&offset.to_be_bytes()[..], &vec![7; length]].concat();
    let second = u64::from(READ);
    chunk(false, 1, 1, 0, &data(4096, 4096));
    chunk(false, 1, 2, second, &data(second, 512));
    chunk(
        true,
        2,
        1,
        0,
        &[&0_u64.to_be_bytes()[..], &4096_u32.to_be_bytes()].concat(),
    );
    chunk(
        true,
        0x8002,
        2,
        second,
        &[&b"\0\0\0\x05\0\x03bad"[..], &9000_u64.to_be_bytes()].concat(),
    );
    if headers == Headers::Extended {
        let front = b"\0\0\0\x05\0\0\0\x02";
        let descriptors = [4096_u64, 0, EXPORT, 3].map(u64::to_be_bytes).concat();
        chunk(true, 6, 3, 0, &[&front[..], &descriptors].concat());
    } else {
        let words = [5, 4096, 0, 1 << 20, 3_u32];
        chunk(true, 5, 3, 0, &words.map(u32::to_be_bytes).concat());
    }
    chunk(true, 0, 4, 0, b"");
    said
}

/// What a client makes of what a server says, cut at multiples of `step`. Between its two parts it asks for what [`nbd_answers`]
/// answers, if it is ready.
fn nbd_client(said: [&[u8]; 2], step: usize) -> (Vec<Event>, Result<(), ConnectionError>) {
    let mut client = Connection::new("disk", vec![MetaContext::Allocation]).unwrap();
    let mut events = Vec::new();
    for part in said {
        for piece in part.chunks(step) {
            if let Err(error) = client.feed(piece, &mut events) {
                assert_eq!(client.feed(b"more", &mut Vec::new()), Err(error.clone()));
                return (events, Err(error));
            }
        }
        let read = |offset| Command::Read {
            offset,
            length: READ,
            reading: Reading::Sparse,
        };
        let status = Command::BlockStatus {
            offset: 0,
            length: EXPORT,
        };
        for command in [read(0), read(READ.into()), status, Command::Flush] {
            let _ = client.submit(command);
        }
    }
    (events, Ok(()))
}

#[test]
fn an_nbd_server_of_any_bytes_is_refused_or_gives_whole_answers_however_they_are_sliced() {
    for headers in [Headers::Structured, Headers::Extended] {
        let (handshake, answers) = (nbd_handshake(headers), nbd_answers(headers));
        let (events, ended) = nbd_client([&handshake, &answers], 1000);
        assert_eq!((events.len(), ended), (5, Ok(())), "{events:?}");
    }
    any_bytes!(256).for_each(|input: &Vec<u8>| {
        let ([which, how, step], rest) = input.split_first_chunk::<3>().unwrap_or((&[0; 3], &[]));
        let headers = if which % 2 == 0 {
            Headers::Structured
        } else {
            Headers::Extended
        };
        let mut handshake = nbd_handshake(headers);
        let mut answers = nbd_answers(headers);
        match how % 3 {
            // Damage in either half; any bytes in place of answers.
            0 => damage(&mut handshake, rest),
            1 => damage(&mut answers, rest),
            _ => answers = rest.to_vec(),
        }
        let outcome = nbd_client([&handshake, &answers], 1 + usize::from(*step) * 8);
        assert_eq!(nbd_client([&handshake, &answers], 1 << 20), outcome);
        for event in outcome.0 {
            match event {
                Event::Finished(_, Ok(Answer::Read(pieces))) => {
                    let bytes: u64 = pieces.iter().map(|piece| piece.content.len()).sum();
                    let gap = pieces
                        .windows(2)
                        .find(|two| two[0].offset + two[0].content.len() != two[1].offset);
                    assert_eq!((bytes, gap), (u64::from(READ), None));
                }
                Event::Finished(_, Ok(Answer::Status(statuses))) => {
                    assert!(
                        statuses
                            .iter()
                            .all(|status| (1..=MAX_DESCRIPTORS).contains(&status.count()))
                    );
                    assert!(
                        statuses
                            .iter()
                            .all(|status| status.start() == 0 && status.end() <= EXPORT)
                    );
                }
                Event::Finished(..) | Event::Ready(_) => {}
            }
        }
    });
}
