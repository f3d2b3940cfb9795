//! Reduction from end to end: what goes into a `Reducer` comes out of a `Restorer`, and nothing a peer sends can hurt.

use longhaul::proto::page::{MigrationId, PAGE_SIZE, PageAddress, PageDigest};
use longhaul::proto::reduce::{
    BatchStats, Coder, DictionaryLimits, Effort, KeptPages, KnownContent, KnownPages, MAX_BATCH_BYTES,
    MAX_BATCH_RECORDS, MAX_CODERS, MAX_PAYLOAD_BYTES, PageCounts, PageShelf, PayloadError, Reducer, RestoreError,
    Restorer, ShelfError, batches,
};
use longhaul::proto::session::{Decoder, EncodedFrame, Encoder};
use longhaul::proto::vmm_stream::{PageRecord, Record};
use longhaul::proto::wire::{Frame, FrameHeader};
use longhaul::store::spill::SpillShelf;
use proptest::prelude::*;

/// Keeps every page, and fails a `get` of what was never put.
#[derive(Default)]
struct Pages(Vec<[u8; PAGE_SIZE]>);

impl PageShelf for Pages {
    fn put(&mut self, slot: u32, page: &[u8]) -> Result<(), ShelfError> {
        let page = page.try_into().expect("pages have a page's length");
        let slots = self.0.len();
        match self.0.get_mut(slot as usize) {
            Some(held) => *held = page,
            None if slot as usize == slots => self.0.push(page),
            None => return Err(ShelfError::NoSuchSlot { slot }),
        }
        Ok(())
    }

    fn get(&mut self, slot: u32, page: &mut [u8]) -> Result<(), ShelfError> {
        page.copy_from_slice(self.0.get(slot as usize).ok_or(ShelfError::NoSuchSlot { slot })?);
        Ok(())
    }
}

/// A vmm stream under construction.
#[derive(Clone, Debug, Default)]
struct Stream {
    bytes: Vec<u8>,
    records: Vec<Record>,
}

impl Stream {
    fn header(&mut self, page: PageRecord, flag: u64) {
        let mut word = (page.at.page * PAGE_SIZE as u64) | flag;
        if page.continues {
            word |= 0x20;
        }
        self.bytes.extend_from_slice(&word.to_be_bytes());
        if !page.continues {
            let name = &names()[usize::from(page.at.block)];
            self.bytes.push(name.len() as u8);
            self.bytes.extend_from_slice(name);
        }
    }

    fn page(&mut self, page: PageRecord, content: &[u8]) {
        self.header(page, 0x08);
        self.bytes.extend_from_slice(content);
        self.records.push(Record::Page(page));
    }

    fn zero(&mut self, page: PageRecord) {
        self.header(page, 0x02);
        self.bytes.push(0);
        self.records.push(Record::Zero(page));
    }

    fn opaque(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.records.push(Record::Bytes { len: bytes.len() });
    }

    fn chunk(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.records.push(Record::Chunk { len: bytes.len() });
    }
}

fn names() -> Vec<Vec<u8>> {
    vec![
        b"pc.ram".to_vec(),
        b"".to_vec(),
        vec![b'x'; 255],
        b"0000:00:02.0/virtio-net-pci.rom".to_vec(),
    ]
}

fn at(block: u16, page: u64, continues: bool) -> PageRecord {
    PageRecord {
        at: PageAddress { block, page },
        continues,
    }
}

/// Incompressible bytes that are a function of `seed`.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

fn text(seed: u64) -> Vec<u8> {
    format!("line {seed} of a file that is like other files\n")
        .into_bytes()
        .into_iter()
        .cycle()
        .take(PAGE_SIZE)
        .collect()
}

fn limits(slots: u32) -> DictionaryLimits {
    DictionaryLimits::new(slots, 64).expect("the limits are small")
}

fn encode(reducer: &mut Reducer, stream: &Stream) -> (Vec<Vec<u8>>, BatchStats) {
    let mut payloads = Vec::new();
    let mut total = BatchStats::default();
    for batch in batches(&stream.bytes, &stream.records, &names()) {
        assert!(batch.bytes().len() <= MAX_BATCH_BYTES);
        let mut digests = Vec::new();
        batch.digest_pages(&mut digests);
        let mut payload = Vec::new();
        let stats = reducer.encode(&batch, &digests, &mut payload);
        assert_eq!(stats.bytes_in, batch.bytes().len() as u64);
        assert_eq!(stats.bytes_out, payload.len() as u64);
        total += stats;
        payloads.push(payload);
    }
    (payloads, total)
}

#[track_caller]
fn restore<S: PageShelf>(restorer: &mut Restorer<S>, payloads: &[Vec<u8>]) -> (Vec<u8>, BatchStats) {
    let mut restored = Vec::new();
    let mut total = BatchStats::default();
    for payload in payloads {
        total += restorer
            .restore(payload, &mut restored)
            .expect("what a reducer made can be restored");
    }
    (restored, total)
}

/// Sends `stream` through a new session; the law is checked.
#[track_caller]
fn carry(slots: u32, stream: &Stream) -> BatchStats {
    let (payloads, sent) = encode(&mut Reducer::new(limits(slots), slots), stream);
    let (restored, received) = restore(&mut Restorer::new(limits(slots), Pages::default()), &payloads);
    assert!(restored == stream.bytes, "the restored stream differs");
    assert_eq!(sent, received, "both ends count alike");
    sent
}

#[derive(Clone, Debug)]
enum Part {
    Page {
        record: PageRecord,
        content: Content,
    },
    Zero(PageRecord),
    Opaque {
        seed: u64,
        len: usize,
    },
    /// Bytes that may come again. Not all of these lengths are those of a chunk.
    Chunk {
        seed: u64,
        len: usize,
    },
    /// A page record whose header is not what the record says.
    Crooked(PageRecord),
}

#[derive(Clone, Debug)]
enum Content {
    Blank,
    Text(u64),
    Noise(u64),
    /// Noise, a stretch of which is filled.
    Edited {
        seed: u64,
        place: u16,
        len: u16,
    },
    /// Noise from another place on.
    Moved {
        seed: u64,
        by: u16,
    },
}

fn part() -> impl Strategy<Value = Part> {
    let record = (
        0_u16..4,
        prop_oneof![6 => 0_u64..12, 1 => (1_u64 << 52) - 3..1 << 52, 1 => 0_u64..100_000],
        any::<bool>(),
    )
        .prop_map(|(block, page, continues)| at(block, page, continues));
    let content = prop_oneof![
        1 => Just(Content::Blank),
        4 => (0_u64..6).prop_map(Content::Text),
        4 => (0_u64..6).prop_map(Content::Noise),
        1 => any::<u64>().prop_map(Content::Noise),
        4 => (0_u64..6, any::<u16>(), any::<u16>()).prop_map(|(seed, place, len)| Content::Edited { seed, place, len: len >> 4 }),
        1 => (0_u64..6, any::<u16>()).prop_map(|(seed, by)| Content::Moved { seed, by }),
    ];
    prop_oneof![
        8 => (record.clone(), content).prop_map(|(record, content)| Part::Page { record, content }),
        2 => record.clone().prop_map(Part::Zero),
        1 => (any::<u64>(), 0_usize..9000).prop_map(|(seed, len)| Part::Opaque { seed, len }),
        2 => (0_u64..6, prop_oneof![8 => Just(2000_usize), 1 => 0..=PAGE_SIZE + 1]).prop_map(|(seed, len)| Part::Chunk { seed, len }),
        1 => record.prop_map(Part::Crooked),
    ]
}

/// Streams whose pages tend to follow each other, to repeat and to be sent again.
fn stream() -> impl Strategy<Value = Stream> {
    prop::collection::vec((part(), 1_u64..6), 0..60).prop_map(|parts| {
        let mut stream = Stream::default();
        for (part, run) in parts {
            for step in 0..run {
                let next = |record: PageRecord| PageRecord {
                    at: PageAddress {
                        page: (record.at.page + step) % (1 << 52),
                        ..record.at
                    },
                    continues: record.continues || step > 0,
                };
                match &part {
                    Part::Page { record, content } => {
                        let content = match content {
                            Content::Blank => vec![0; PAGE_SIZE],
                            Content::Text(seed) => text(seed + step),
                            Content::Noise(seed) => noise(seed.wrapping_add(step), PAGE_SIZE),
                            Content::Edited { seed, place, len } => {
                                let mut page = noise(seed + step, PAGE_SIZE);
                                let place = usize::from(*place) % PAGE_SIZE;
                                let end = PAGE_SIZE.min(place + usize::from(*len));
                                page[place..end].fill(step as u8);
                                page
                            }
                            Content::Moved { seed, by } => {
                                let mut page = noise(*seed, PAGE_SIZE);
                                page.rotate_left(usize::from(*by) % PAGE_SIZE);
                                page
                            }
                        };
                        stream.page(next(*record), &content);
                    }
                    Part::Zero(record) => stream.zero(next(*record)),
                    Part::Opaque { seed, len } => stream.opaque(&noise(*seed, *len)),
                    Part::Chunk { seed, len } => stream.chunk(&noise(seed + step, *len)),
                    Part::Crooked(record) => {
                        let start = stream.bytes.len();
                        stream.page(*record, &text(step));
                        stream.bytes[start + 7] ^= 0x04;
                    }
                }
            }
        }
        stream
    })
}

/// The records and bytes of a stream in several stretches, cut where `cuts` (of 65536) say.
fn slices(stream: &Stream, cuts: &[u16]) -> Vec<Stream> {
    let lengths: Vec<usize> = stream.records.iter().map(record_len).collect();
    let mut places: Vec<usize> = cuts
        .iter()
        .map(|cut| usize::from(*cut) * stream.records.len() / 65536)
        .collect();
    places.extend([0, stream.records.len()]);
    places.sort_unstable();
    let mut start = 0;
    places
        .windows(2)
        .map(|place| {
            let len: usize = lengths[place[0]..place[1]].iter().sum();
            let slice = Stream {
                bytes: stream.bytes[start..start + len].to_vec(),
                records: stream.records[place[0]..place[1]].to_vec(),
            };
            start += len;
            slice
        })
        .collect()
}

fn record_len(record: &Record) -> usize {
    let header = |page: &PageRecord| {
        if page.continues {
            8
        } else {
            9 + names()[usize::from(page.at.block)].len()
        }
    };
    match record {
        Record::Bytes { len } | Record::Chunk { len } => *len,
        Record::Page(page) => header(page) + PAGE_SIZE,
        Record::Zero(page) => header(page) + 1,
    }
}

/// The pages of a session that has ended, as the next one knows them: contents in the order of the pages that have them.
fn known<S: PageShelf>(mut kept: KeptPages<S>) -> (KnownPages, Pages) {
    let (mut contents, mut slots) = (Pages::default(), Vec::new());
    let places = kept.places.iter().map(|&(at, slot)| {
        let number = slots.iter().position(|&other| other == slot).unwrap_or_else(|| {
            let mut page = [0; PAGE_SIZE];
            kept.shelf.get(slot, &mut page).expect("what was kept is there");
            contents.0.push(page);
            slots.push(slot);
            slots.len() - 1
        });
        (at, number as u32)
    });
    let places = places.collect();
    let digests = contents.0.iter().map(|page| PageDigest::of(page)).collect();
    let pages = KnownPages::new(digests, places).expect("each place was given a number");
    (pages, contents)
}

/// Contents of an earlier session at the source, some of which cannot be had.
struct Contents {
    pages: Vec<[u8; PAGE_SIZE]>,
    missing: u32,
}

impl KnownContent for Contents {
    fn read(&mut self, number: u32, page: &mut [u8; PAGE_SIZE]) -> bool {
        *page = self.pages[number as usize];
        number % 8 >= self.missing
    }
}

/// Sends `stream` through a new session, which knows what an earlier one left; what both ends keep of it is the same.
#[track_caller]
fn carry_knowing(
    slots: u32,
    stream: &Stream,
    before: Option<(&KnownPages, &Pages)>,
    missing: u32,
) -> (BatchStats, KnownPages, Pages) {
    let (mut reducer, mut shelf) = (Reducer::new(limits(slots), slots / 2), Pages::default());
    let mut kept_at_source = Pages::default();
    if let Some((known, contents)) = before {
        let content = Contents {
            pages: contents.0.clone(),
            missing,
        };
        reducer.know(known, Box::new(content));
        shelf.0 = contents.0[..known.slots(slots) as usize].to_vec();
        kept_at_source.0.clone_from(&shelf.0);
    }
    reducer.keep_on(Box::new(kept_at_source));
    let mut restorer = Restorer::new(limits(slots), shelf);
    if let Some((known, _)) = before {
        restorer.know(known);
    }
    let (payloads, sent) = encode(&mut reducer, stream);
    let (restored, received) = restore(&mut restorer, &payloads);
    assert!(restored == stream.bytes, "the restored stream differs");
    assert_eq!(sent, received, "both ends count alike");
    let kept = reducer.into_kept().zip(restorer.into_kept());
    let Some((at_source, at_destination)) = kept else {
        // More pages than the dictionary has: both leave nothing.
        return (sent, KnownPages::default(), Pages::default());
    };
    let ((at_source, _), (at_destination, contents)) = (known(at_source), known(at_destination));
    assert_eq!(at_source.digest(), at_destination.digest());
    assert_eq!(at_source, at_destination);
    (sent, at_destination, contents)
}

/// A guest's memory: every page is text or noise of its own.
fn memory(pages: u64) -> Stream {
    let mut stream = Stream::default();
    for page in 0..pages {
        let content = if page % 2 == 0 {
            text(page)
        } else {
            noise(page, PAGE_SIZE)
        };
        stream.page(at(0, page, page > 0), &content);
    }
    stream
}

#[test]
fn a_guest_that_comes_back_unchanged_costs_next_to_nothing() {
    let stream = memory(4000);
    let (first, known, contents) = carry_knowing(5000, &stream, None, 0);
    let (second, again, _) = carry_knowing(5000, &stream, Some((&known, &contents)), 0);
    assert_eq!(second.pages.same, 4000);
    assert!(
        second.bytes_out * 1000 < first.bytes_out,
        "{} of {}",
        second.bytes_out,
        first.bytes_out
    );
    assert_eq!(known, again);
}

#[test]
fn what_has_changed_in_a_guest_that_comes_back_goes_as_what_changed() {
    let (first, known, contents) = carry_knowing(5000, &memory(4000), None, 0);
    let mut changed = memory(4000);
    for page in 0..4000 {
        // Behind the header: 15 bytes for the first page, which has the block's name, 8 for the others.
        let start = 15 + page * (8 + PAGE_SIZE);
        changed.bytes[start + page % 4000..][..64].fill(page as u8);
    }
    let (second, ..) = carry_knowing(5000, &changed, Some((&known, &contents)), 0);
    assert!(second.pages.delta > 3900, "{:?}", second.pages);
    assert!(
        second.bytes_out * 20 < first.bytes_out,
        "{} of {}",
        second.bytes_out,
        first.bytes_out
    );
}

#[test]
fn a_page_that_ends_as_zeroes_leaves_nothing_and_one_that_comes_back_does() {
    let (_, known, contents) = carry_knowing(100, &memory(10), None, 0);
    let mut stream = Stream::default();
    for page in 0..10 {
        match page {
            0 => stream.zero(at(0, page, false)),
            1 => stream.page(at(0, page, true), &[0; PAGE_SIZE]),
            2 => {
                stream.zero(at(0, page, true));
                stream.page(at(0, page, true), &text(page));
            }
            _ => stream.page(
                at(0, page, true),
                &if page % 2 == 0 {
                    text(page)
                } else {
                    noise(page, PAGE_SIZE)
                },
            ),
        }
    }
    let (sent, known, _) = carry_knowing(100, &stream, Some((&known, &contents)), 0);
    assert_eq!((sent.pages.zero, sent.pages.same), (3, 8));
    let places: Vec<u64> = known.places().iter().map(|(at, _)| at.page).collect();
    assert_eq!(places, (2..10).collect::<Vec<_>>());
}

#[test]
fn a_guest_with_more_pages_than_the_dictionary_leaves_nothing_at_either_end() {
    let (_, known, _) = carry_knowing(1000, &memory(1001), None, 0);
    assert_eq!(known, KnownPages::default());
    let (_, known, _) = carry_knowing(1001, &memory(1001), None, 0);
    assert_eq!(known.places().len(), 1001);
}

#[test]
fn a_guest_of_the_same_image_at_other_addresses_goes_as_references() {
    let (_, known, contents) = carry_knowing(5000, &memory(1000), None, 0);
    let mut other = Stream::default();
    for page in 0..1000 {
        let of = 999 - page;
        let content = if of % 2 == 0 { text(of) } else { noise(of, PAGE_SIZE) };
        other.page(at(1, page, page > 0), &content);
    }
    let (sent, ..) = carry_knowing(5000, &other, Some((&known, &contents)), 0);
    assert_eq!(sent.pages.reference, 1000);
    assert!(sent.bytes_out < 6000, "{}", sent.bytes_out);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn sessions_that_begin_with_what_others_left_carry_any_stream(
        streams in prop::collection::vec(stream(), 2..5),
        slots in prop_oneof![Just(1_u32), Just(2), Just(7), Just(30), Just(10_000)],
        missing in 0_u32..8,
    ) {
        let mut before = None;
        for stream in &streams {
            let known = before.as_ref().map(|(known, contents): &(KnownPages, Pages)| (known, contents));
            let (_, known, contents) = carry_knowing(slots, stream, known, missing);
            before = Some((known, contents));
        }
    }

    #[test]
    fn a_stream_survives_any_slicing_and_any_dictionary(
        stream in stream(),
        cuts in prop::collection::vec(any::<u16>(), 0..12),
        slots in prop_oneof![Just(0_u32), Just(1), Just(2), Just(7), Just(64), Just(10_000)],
        regions in 0_u32..3,
        copies in prop_oneof![Just(0_u32), Just(1), Just(5), Just(10_000)],
        efforts in prop::collection::vec(prop_oneof![Just(Effort::LEAST), Just(Effort::MOST)], 12),
    ) {
        let limits = DictionaryLimits::new(slots, regions).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let shelf = SpillShelf::new(dir.path(), slots, slots / 3).unwrap();
        let (mut reducer, mut restorer) = (Reducer::new(limits, copies), Restorer::new(limits, shelf));
        for (slice, effort) in slices(&stream, &cuts).into_iter().zip(efforts.into_iter().cycle()) {
            reducer.set_effort(effort);
            let (payloads, sent) = encode(&mut reducer, &slice);
            let (restored, received) = restore(&mut restorer, &payloads);
            prop_assert!(restored == slice.bytes);
            prop_assert_eq!(sent, received);
        }
    }

    #[test]
    fn a_stream_survives_coders_that_take_turns_as_they_come_and_tell_what_they_found_late(
        streams in prop::collection::vec(stream(), 1..4),
        turns in prop::collection::vec((0..MAX_CODERS, prop::sample::select(Effort::ALL.to_vec()), any::<bool>()), 1..12),
    ) {
        let (mut reducer, mut restorer) = (Reducer::new(limits(30), 30), Restorer::new(limits(30), Pages::default()));
        let mut coders: Vec<Coder> = (0..MAX_CODERS).map(Coder::new).collect();
        let mut findings = Vec::new();
        let mut turns = turns.into_iter().cycle();
        for stream in &streams {
            for batch in batches(&stream.bytes, &stream.records, &names()) {
                let (number, effort, learns) = turns.next().unwrap();
                let (mut digests, mut payload, mut restored) = (Vec::new(), Vec::new(), Vec::new());
                batch.digest_pages(&mut digests);
                reducer.set_effort(effort);
                let draft = reducer.draft(&batch, &digests);
                prop_assert_eq!(draft.stream_bytes(), batch.bytes().len());
                findings.push(coders[number].code(draft, &mut payload));
                let received = restorer.restore(&payload, &mut restored).unwrap();
                prop_assert!(restored == batch.bytes());
                prop_assert_eq!(findings.last().unwrap().stats(), received);
                if learns {
                    findings.drain(..).rev().for_each(|coded| reducer.learn(coded));
                }
            }
        }
    }

    #[test]
    fn records_that_do_not_fit_the_bytes_cost_ratio_and_nothing_else(
        stream in stream(),
        others in stream(),
        lost in 0_usize..5000,
    ) {
        let bytes = &stream.bytes[..stream.bytes.len().saturating_sub(lost)];
        carry(7, &Stream { bytes: bytes.to_vec(), records: stream.records.clone() });
        carry(7, &Stream { bytes: stream.bytes, records: others.records });
    }

    #[test]
    fn a_damaged_payload_is_refused_or_restored_within_bounds(
        stream in stream(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
        truncate in any::<bool>(),
    ) {
        let mut reducer = Reducer::new(limits(7), 7);
        reducer.set_effort(if truncate { Effort::MOST } else { Effort::LEAST });
        let (payloads, _) = encode(&mut reducer, &stream);
        for damaged in 0..payloads.len() {
            let mut restorer = Restorer::new(limits(7), Pages::default());
            restore(&mut restorer, &payloads[..damaged]);
            let mut payload = payloads[damaged].clone();
            for (place, byte) in &damage {
                let place = place.index(payload.len());
                payload[place] = *byte;
            }
            if truncate {
                payload.truncate(cut.index(payload.len()));
            }
            restore_hostile(&mut restorer, &payload);
        }
    }

    #[test]
    fn random_ops_under_a_plausible_head_are_refused_or_restored_within_bounds(
        ops in prop::collection::vec(prop_oneof![hostile_op(), prop::collection::vec(any::<u8>(), 1..8)], 0..40),
        lengths in prop::array::uniform3(prop_oneof![0_u64..20_000, 0_u64..1 << 21, any::<u64>()]),
        tail in prop::collection::vec(any::<u8>(), 0..9000),
    ) {
        let ops = ops.concat();
        let [raw_len, packed_len, plain_len] = lengths;
        let mut payload = vec![2, 0];
        for len in [raw_len, ops.len() as u64, packed_len, plain_len] {
            varint(len, &mut payload);
        }
        payload.extend_from_slice(&ops);
        payload.extend_from_slice(&tail);
        restore_hostile(&mut Restorer::new(limits(7), Pages::default()), &payload);
    }
}

fn hostile_op() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![0_u64..3, 0_u64..5000, any::<u64>()];
    (any::<u8>(), prop::collection::vec(number, 0..4)).prop_map(|(first, operands)| {
        let mut op = vec![first];
        operands.iter().for_each(|operand| varint(*operand, &mut op));
        op
    })
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Restores what may be anything: it must not panic, nor append or allocate more than a batch.
fn restore_hostile(restorer: &mut Restorer<Pages>, payload: &[u8]) {
    let mut out = b"before".to_vec();
    match restorer.restore(payload, &mut out) {
        Ok(stats) => {
            assert_eq!(out.len() as u64, 6 + stats.bytes_in);
            assert_eq!(stats.bytes_out, payload.len() as u64);
        }
        Err(_) => {
            assert_eq!(out, b"before");
            assert!(matches!(
                restorer.restore(payload, &mut out),
                Err(RestoreError::AfterFailure)
            ));
        }
    }
    assert!(out.capacity() <= MAX_BATCH_BYTES + 64, "{}", out.capacity());
    // A region takes 4 KiB and an entry; the limits allow 64.
    assert!(
        restorer.memory_bytes() <= 64 * 4200 + 128 * 32,
        "{}",
        restorer.memory_bytes()
    );
}

#[test]
fn ten_thousand_scattered_pages_sent_again_unchanged_take_at_most_4_bytes_each() {
    // Ascending, as QEMU walks its dirty bitmap, and on average 420 pages apart: a 16 GiB guest.
    let pages: Vec<u64> = (0..10_000_u64)
        .map(|n| n * 419 + u64::from(noise(n, 1)[0]) % 200)
        .collect();
    let mut round = Stream::default();
    for page in &pages {
        let mut content = text(*page);
        content[..8].copy_from_slice(&page.to_be_bytes());
        round.page(at(0, *page, true), &content);
    }
    let limits = DictionaryLimits::new(10_000, 5000).unwrap();
    let (mut reducer, mut restorer) = (
        Reducer::new(limits, limits.slots()),
        Restorer::new(limits, Pages::default()),
    );
    for again in [false, true] {
        let (payloads, stats) = encode(&mut reducer, &round);
        let (restored, _) = restore(&mut restorer, &payloads);
        assert!(restored == round.bytes);
        if again {
            assert_eq!(
                stats.pages,
                PageCounts {
                    same: 10_000,
                    ..PageCounts::default()
                }
            );
            assert!(stats.bytes_out <= 4 * 10_000, "{} bytes", stats.bytes_out);
        }
    }
}

/// Two rounds over `pages` pages, of which `change` makes the second; the law is checked. What the second took.
fn rewritten(copies: u32, pages: u64, change: impl Fn(u64, &mut [u8])) -> BatchStats {
    let (mut reducer, mut restorer) = (
        Reducer::new(limits(4096), copies),
        Restorer::new(limits(4096), Pages::default()),
    );
    let mut last = BatchStats::default();
    for again in [false, true] {
        let mut round = Stream::default();
        for page in 0..pages {
            let mut content = noise(page, PAGE_SIZE);
            if again {
                change(page, &mut content);
            }
            round.page(at(0, page, page > 0), &content);
        }
        let (payloads, stats) = encode(&mut reducer, &round);
        let (restored, received) = restore(&mut restorer, &payloads);
        assert!(restored == round.bytes);
        assert_eq!(stats, received);
        last = stats;
    }
    last
}

#[test]
fn a_page_of_which_64_bytes_changed_takes_little_more_than_those() {
    let stats = rewritten(1000, 1000, |page, content| {
        let place = page as usize * 37 % 4000;
        content[place..place + 64].copy_from_slice(&noise(page + 5000, 64));
    });
    assert_eq!(stats.pages.delta, 1000);
    assert!(stats.bytes_out <= 72 * 1000, "{}", stats.bytes_out);
}

#[test]
fn a_page_whose_content_moved_is_coded_with_its_previous_version() {
    let stats = rewritten(100, 100, |_, content| content.rotate_right(100));
    assert_eq!(stats.pages.delta, 100);
    assert!(stats.bytes_out <= 200 * 100, "{}", stats.bytes_out);
}

#[test]
fn a_page_with_nothing_in_common_or_without_a_copy_is_a_literal() {
    let stats = rewritten(100, 100, |page, content| {
        content.copy_from_slice(&noise(page + 5000, PAGE_SIZE))
    });
    assert_eq!((stats.pages.delta, stats.pages.raw), (0, 100));
    let stats = rewritten(0, 100, |_, content| content[0] ^= 1);
    assert_eq!((stats.pages.delta, stats.pages.raw), (0, 100));
    let stats = rewritten(50, 100, |_, content| content[0] ^= 1);
    assert_eq!((stats.pages.delta, stats.pages.raw), (50, 50));
}

#[test]
fn a_destination_without_deltas_is_sent_none() {
    let mut reducer = Reducer::without_deltas(limits(100));
    reducer.set_effort(Effort::MOST);
    let mut stream = Stream::default();
    for content in [noise(1, PAGE_SIZE), text(1), text(2)] {
        stream.page(at(0, 3, false), &content);
    }
    let (payloads, stats) = encode(&mut reducer, &stream);
    assert_eq!(payloads[0][0], 1, "the format that it knows");
    assert_eq!((stats.pages.delta, stats.pages.literal + stats.pages.raw), (0, 3));
}

#[test]
fn what_cannot_be_compressed_grows_by_at_most_half_a_per_cent() {
    let mut pages = Stream::default();
    for page in 0..2000 {
        pages.page(at(0, page, page > 0), &noise(page, PAGE_SIZE));
    }
    let mut opaque = Stream::default();
    opaque.opaque(&noise(0, 3 * MAX_BATCH_BYTES + 12_345));
    let mut scattered = Stream::default();
    for page in 0..500 {
        scattered.page(
            at((page % 4) as u16, page * 7919 % 100_000, false),
            &noise(page, PAGE_SIZE),
        );
    }
    for stream in [pages, opaque, scattered] {
        let stats = carry(100, &stream);
        assert!(stats.bytes_out * 1000 <= stats.bytes_in * 1005, "{stats:?}");
        assert_eq!(stats.pages.literal, 0);
    }
}

#[test]
fn the_worst_batch_makes_a_payload_within_the_limit() {
    // Every page in another block, every block with the longest name, every address as far as can be.
    let names: Vec<Vec<u8>> = (0..2000_u16)
        .map(|block| [&[b'x'; 253], &block.to_be_bytes()[..]].concat())
        .collect();
    let mut stream = Stream::default();
    for number in 0..MAX_BATCH_RECORDS as u64 {
        stream.zero(at((number % 1100) as u16, (1 << 52) - 1 - number % 2, true));
    }
    stream.opaque(&noise(0, MAX_BATCH_BYTES - stream.bytes.len()));
    let batch = batches(&stream.bytes, &stream.records, &names).next().unwrap();
    let mut payload = Vec::new();
    Reducer::new(limits(0), 0).encode(&batch, &[], &mut payload);
    assert!(payload.len() <= MAX_PAYLOAD_BYTES, "{}", payload.len());
    let mut restored = Vec::new();
    Restorer::new(limits(0), Pages::default())
        .restore(&payload, &mut restored)
        .unwrap();
    assert!(restored == batch.bytes());

    payload.resize(MAX_PAYLOAD_BYTES + 1, 0);
    let refused = Restorer::new(limits(0), Pages::default()).restore(&payload, &mut Vec::new());
    assert!(matches!(refused, Err(RestoreError::Malformed(PayloadError::TooLarge))));
}

#[test]
fn zero_runs_cost_next_to_nothing() {
    let mut stream = Stream::default();
    for page in 0..100_000 {
        stream.zero(at(0, page, page > 0));
    }
    let stats = carry(1, &stream);
    assert_eq!(stats.pages.zero, 100_000);
    let payloads = 100_000_u64.div_ceil(MAX_BATCH_RECORDS as u64);
    assert!(stats.bytes_out <= 32 * payloads, "{stats:?}");
}

#[test]
fn each_page_is_carried_in_the_cheapest_way_that_is_right() {
    let mut stream = Stream::default();
    stream.zero(at(0, 0, false));
    stream.page(at(0, 1, true), &[0; PAGE_SIZE]);
    stream.page(at(0, 2, true), &text(1));
    stream.page(at(0, 3, true), &text(1));
    stream.page(at(0, 2, true), &text(1));
    stream.page(at(3, 2, false), &text(2));
    let stats = carry(8, &stream);
    assert_eq!(
        stats.pages,
        PageCounts {
            zero: 2,
            same: 1,
            reference: 1,
            literal: 2,
            ..PageCounts::default()
        }
    );
}

/// Bytes of frames that a stream of which nothing is known takes, in pieces of so many bytes. `waits`: nothing follows a piece before it has arrived.
fn carry_opaque(slots: u32, bytes: &[u8], piece: usize, waits: bool) -> u64 {
    let mut encoder = Encoder::of_opaque(Reducer::new(limits(slots), 0));
    let mut decoder = Decoder::new(Some((limits(slots), Pages::default())));
    let (mut frames, mut sequence) = (Vec::new(), 0);
    let (mut restored, mut taken) = (Vec::new(), 0);
    let mut deliver = |frames: &mut Vec<EncodedFrame>| {
        for frame in frames.drain(..) {
            taken += frame.lane_bytes();
            assert!(!frame.held || frame.stream_bytes == 0, "a program waits for it");
            let header = FrameHeader {
                kind: frame.kind,
                held: frame.held,
                last: false,
                migration: MigrationId([1; 16]),
                epoch: 0,
                sequence,
                stream_offset: restored.len() as u64,
                stream_bytes: frame.stream_bytes,
            };
            sequence += 1;
            let frame = Frame {
                header,
                payload: frame.payload,
            };
            restored.extend_from_slice(&decoder.restore(&frame).expect("it restores"));
        }
        restored.len()
    };
    for (number, piece_bytes) in bytes.chunks(piece).enumerate() {
        encoder.feed(piece_bytes, &mut frames);
        if waits {
            encoder.feed_nothing_more(&mut frames);
        }
        let until = bytes.len().min((number + 1) * piece);
        let arrived = deliver(&mut frames);
        assert!(arrived + PAGE_SIZE > until, "at most a chunk waits for more");
        assert!(arrived == until || !waits, "and nothing where nothing more comes");
    }
    let (summary, _) = encoder.finish(&mut frames);
    deliver(&mut frames);
    assert_eq!(summary, decoder.summary());
    assert!(restored == bytes, "the restored stream differs");
    taken
}

#[test]
fn what_comes_again_in_a_stream_of_which_nothing_is_known_goes_as_references() {
    let part = noise(1, 3 << 20);
    let twice = [
        &part[..],
        &noise(2, 777),
        &part[..1 << 20],
        b"changed",
        &part[1 << 20..],
    ]
    .concat();
    let (once, both) = (
        carry_opaque(4096, &part, 100_000, false),
        carry_opaque(4096, &twice, 100_000, false),
    );
    assert!(once <= part.len() as u64 * 1005 / 1000, "{once}");
    assert!(both - once <= part.len() as u64 / 50, "{both} after {once}");
    // Whoever waits for an answer has it.
    carry_opaque(4096, &part[..9000], 7, true);
    // What is forgotten is sent again.
    let forgotten = carry_opaque(16, &twice, 100_000, false);
    assert!(forgotten >= 2 * part.len() as u64, "{forgotten}");
}

#[test]
fn content_that_was_evicted_is_sent_again() {
    let mut stream = Stream::default();
    for page in 0..3 {
        stream.page(at(0, page, true), &text(page));
    }
    for page in 0..3 {
        stream.page(at(0, page, true), &text(page));
    }
    let pages = carry(2, &stream).pages;
    assert_eq!(
        (pages.literal, pages.delta),
        (3, 3),
        "as what differs from that which took its place"
    );
    assert_eq!(carry(3, &stream).pages.same, 3);
}

#[test]
fn a_page_that_no_header_can_address_is_carried_as_bytes() {
    for page in [1 << 52, u64::MAX] {
        let mut stream = Stream::default();
        stream.page(at(0, 0, true), &text(0));
        stream.records = vec![Record::Page(at(0, page, true))];
        assert_eq!(carry(4, &stream).pages, PageCounts::default());
    }
}

#[test]
fn a_block_may_take_another_name() {
    let (before, after) = (vec![b"one".to_vec()], vec![b"another".to_vec()]);
    let (mut reducer, mut restorer) = (Reducer::new(limits(4), 4), Restorer::new(limits(4), Pages::default()));
    for names in [&before, &after] {
        let mut bytes = 2_u64.to_be_bytes().to_vec();
        bytes.push(names[0].len() as u8);
        bytes.extend_from_slice(&names[0]);
        bytes.push(0);
        let records = [Record::Zero(at(0, 0, false))];
        let batch = batches(&bytes, &records, names).next().unwrap();
        let (mut payload, mut restored) = (Vec::new(), Vec::new());
        assert_eq!(reducer.encode(&batch, &[], &mut payload).pages.zero, 1);
        restorer.restore(&payload, &mut restored).unwrap();
        assert_eq!(restored, bytes);
    }
}

#[test]
fn payloads_lost_repeated_or_overtaken_are_refused() {
    let mut stream = Stream::default();
    stream.page(at(0, 0, true), &text(0));
    let mut reducer = Reducer::new(limits(4), 4);
    let payloads: Vec<Vec<u8>> = (0..3).map(|_| encode(&mut reducer, &stream).0.remove(0)).collect();
    for (first, then) in [(0, 0), (0, 2)] {
        let mut restorer = Restorer::new(limits(4), Pages::default());
        let mut out = Vec::new();
        restorer.restore(&payloads[first], &mut out).unwrap();
        assert!(matches!(
            restorer.restore(&payloads[then], &mut out),
            Err(RestoreError::OutOfOrder { expected: 1, found }) if found == then as u64
        ));
        assert!(matches!(
            restorer.restore(&payloads[1], &mut out),
            Err(RestoreError::AfterFailure)
        ));
        assert_eq!(out, stream.bytes);
    }
}

#[test]
fn a_reference_to_what_was_never_sent_is_refused() {
    let restore = |slots, ops: &[u8], raw_len: u64| {
        let mut payload = vec![2, 0];
        for len in [raw_len, ops.len() as u64, 0, 0] {
            varint(len, &mut payload);
        }
        payload.extend_from_slice(ops);
        Restorer::new(limits(slots), Pages::default()).restore(&payload, &mut Vec::new())
    };
    let block = [0xb1, 0, 1, b'r'];
    let with = |ops: &[u8]| [&block, ops].concat();
    assert!(matches!(
        restore(4, &with(&[0x10]), 4104),
        Err(RestoreError::NeverSent { .. })
    ));
    assert!(matches!(
        restore(4, &with(&[0x20, 0]), 4104),
        Err(RestoreError::EmptySlot { slot: 0 })
    ));
    assert!(matches!(
        restore(4, &with(&[0x20, 8]), 4104),
        Err(RestoreError::EmptySlot { slot: 4 })
    ));
    assert!(matches!(
        restore(0, &with(&[0x20, 0]), 4104),
        Err(RestoreError::EmptySlot { slot: 0 })
    ));
    let malformed = |result, expected| match result {
        Err(RestoreError::Malformed(error)) => assert_eq!(error, expected),
        other => panic!("{other:?} instead of {expected:?}"),
    };
    malformed(restore(4, &[0xb0, 1, 0x00], 9), PayloadError::NoSuchBlock { number: 1 });
    malformed(restore(4, &with(&[0x00]), 8), PayloadError::WrongLength);
    malformed(restore(4, &with(&[0x00]), 10), PayloadError::WrongLength);
    malformed(restore(4, &with(&[0x60]), 4104), PayloadError::Truncated);
    malformed(restore(4, &with(&[0x80, 1]), 1), PayloadError::Truncated);
    assert_eq!(restore(4, &with(&[0x00]), 9).unwrap().pages.zero, 1);
}

#[test]
fn a_shelf_that_fails_ends_the_session() {
    struct Full;
    impl PageShelf for Full {
        fn put(&mut self, slot: u32, _: &[u8]) -> Result<(), ShelfError> {
            Err(ShelfError::Storage {
                slot,
                source: "the disk is on fire".into(),
            })
        }
        fn get(&mut self, slot: u32, _: &mut [u8]) -> Result<(), ShelfError> {
            Err(ShelfError::NoSuchSlot { slot })
        }
    }
    let mut stream = Stream::default();
    stream.page(at(0, 0, true), &text(0));
    let (payloads, _) = encode(&mut Reducer::new(limits(4), 4), &stream);
    let mut restorer = Restorer::new(limits(4), Full);
    let mut out = Vec::new();
    assert!(matches!(
        restorer.restore(&payloads[0], &mut out),
        Err(RestoreError::Shelf(ShelfError::Storage { .. }))
    ));
    assert!(out.is_empty());
}

#[test]
fn the_digests_of_a_batch_are_those_of_its_pages_and_chunks_in_order() {
    let mut stream = Stream::default();
    let mut expected = Vec::new();
    for page in 0..40 {
        stream.opaque(&noise(page, page as usize));
        stream.page(at(0, page, page % 3 > 0), &text(page));
        stream.zero(at(1, page, false));
        stream.chunk(&noise(page, 1500));
        expected.push(PageDigest::of(&text(page)));
        expected.push(PageDigest::of(&noise(page, 1500)));
    }
    let mut digests = Vec::new();
    batches(&stream.bytes, &stream.records, &names()).for_each(|batch| batch.digest_pages(&mut digests));
    assert_eq!(digests, expected);
}

#[test]
fn a_stream_is_cut_at_the_limits_of_a_batch() {
    let mut stream = Stream::default();
    stream.opaque(&noise(0, 2 * MAX_BATCH_BYTES + 1));
    for page in 0..2 * MAX_BATCH_RECORDS as u64 {
        stream.zero(at(0, page, true));
    }
    let names = names();
    let lengths: Vec<usize> = batches(&stream.bytes, &stream.records, &names)
        .map(|batch| batch.bytes().len())
        .collect();
    let full = MAX_BATCH_RECORDS * 9;
    assert_eq!(lengths, [MAX_BATCH_BYTES, MAX_BATCH_BYTES, 1 + full - 9, full, 9]);
}
