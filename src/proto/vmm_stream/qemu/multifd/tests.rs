//! Migrations with multifd built by hand, and what their merged stream must come to.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::packet::{FLAG_DEVICE_STATE, FLAG_SYNC, MAX_PAGES};
use super::*;
use crate::proto::vmm_stream::qemu::QemuParser;
use crate::proto::vmm_stream::{Record, StreamEvent};

const RAM_ID: u32 = 2;
const BLOCKS: [(&str, u64); 2] = [("pc.ram", 600), ("pc.rom", 4)];
const FLUSH: u64 = 0x200;
const EOS: u64 = 0x10;
const JSON: &[u8] = br#"{"page_size": 4096, "devices": []}"#;

/// How the machine type synchronises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Flush,
    Eos,
}

#[derive(Clone, Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn u32(self, number: u32) -> Self {
        self.raw(&number.to_be_bytes())
    }

    fn u64(self, number: u64) -> Self {
        self.raw(&number.to_be_bytes())
    }

    fn name(self, name: &str) -> Self {
        self.raw(&[name.len() as u8]).raw(name.as_bytes())
    }

    /// START up to the end of the block list.
    fn start() -> Self {
        let total: u64 = BLOCKS.iter().map(|(_, pages)| pages * 4096).sum();
        let begin = Self::default()
            .raw(b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0\x01")
            .u32(RAM_ID)
            .name("ram")
            .u32(0)
            .u32(4)
            .u64(total | 4);
        BLOCKS
            .iter()
            .fold(begin, |bytes, (name, pages)| bytes.name(name).u64(pages * 4096))
    }

    fn sync(self, style: Style) -> Self {
        match style {
            Style::Flush => self.u64(FLUSH),
            Style::Eos => self,
        }
    }

    fn eos(self) -> Self {
        self.u64(EOS).raw(&[0x7e]).u32(RAM_ID)
    }

    fn section(self, kind: u8) -> Self {
        self.raw(&[kind]).u32(RAM_ID)
    }

    fn zero(self, page: u64) -> Self {
        self.u64(page << 12 | 2).name("pc.ram").raw(&[0])
    }

    fn device_state(self) -> Self {
        self.raw(&[4])
            .u32(7)
            .name("timer")
            .u32(0)
            .u32(1)
            .raw(&[9; 30])
            .raw(&[0x7e])
            .u32(7)
            .raw(&[0, 6])
            .u32(JSON.len() as u32)
            .raw(JSON)
    }

    fn initial(channel: u8) -> Self {
        Self::default()
            .u32(MAGIC)
            .u32(1)
            .raw(&[5; 16])
            .raw(&[channel])
            .raw(&[0; 39])
    }

    fn packet(self, flags: u32, pages: &[(u64, u8)], zeroes: &[u64]) -> Self {
        let mut name = [0; 256];
        name[..6].copy_from_slice(b"pc.ram");
        // As 7.2 does where there are no pages.
        let payload = if pages.is_empty() {
            4096
        } else {
            4096 * pages.len() as u32
        };
        let packet = self
            .u32(MAGIC)
            .u32(1)
            .u32(flags)
            .u32(128)
            .u32(pages.len() as u32)
            .u32(payload)
            .u64(1)
            .u32(zeroes.len() as u32)
            .raw(&[0; 28])
            .raw(&name);
        let offsets = pages.iter().map(|(page, _)| *page).chain(zeroes.iter().copied());
        let packet = offsets.fold(packet, |packet, page| packet.u64(page << 12));
        let unused = MAX_PAGES - pages.len() - zeroes.len();
        let packet = packet.raw(&vec![0; 8 * unused]);
        pages
            .iter()
            .fold(packet, |packet, (_, fill)| packet.raw(&[*fill; PAGE_SIZE]))
    }
}

/// A page that is sent: by a channel, or as a zero page on the main stream (`None`).
#[derive(Clone, Copy, Debug)]
struct Sent {
    page: u64,
    fill: u8,
    channel: Option<usize>,
}

/// The connections' bytes of a migration, main stream first, and what memory comes to.
fn build(rounds: &[Vec<Sent>], channels: usize, style: Style) -> (Vec<Vec<u8>>, BTreeMap<u64, u8>) {
    let sync = |bytes: Bytes| bytes.packet(FLAG_SYNC, &[], &[]);
    let mut main = Bytes::start().sync(style).eos();
    let mut others: Vec<Bytes> = (0..channels).map(|one| sync(Bytes::initial(one as u8))).collect();
    let mut memory = BTreeMap::new();
    for (number, round) in rounds.iter().enumerate() {
        let is_last = number + 1 == rounds.len();
        if is_last {
            main = main.raw(&[8, 0, 11, 0, 0]);
        }
        main = main.section(if is_last { 3 } else { 2 });
        for sent in round {
            memory.insert(sent.page, sent.fill);
            match (sent.channel, sent.fill) {
                (None, _) => main = main.zero(sent.page),
                (Some(channel), 0) => {
                    others[channel] = std::mem::take(&mut others[channel]).packet(0, &[], &[sent.page]);
                }
                (Some(channel), fill) => {
                    others[channel] = std::mem::take(&mut others[channel]).packet(0, &[(sent.page, fill)], &[]);
                }
            }
        }
        main = main.sync(style).eos();
        others = others.into_iter().map(sync).collect();
    }
    let main = main.device_state().0;
    let all = std::iter::once(main).chain(others.into_iter().map(|one| one.0));
    (all.collect(), memory)
}

/// Merges, taking from the connection and as many bytes as `turns` say, as far as may be.
fn merge(connections: &[Vec<u8>], turns: impl Iterator<Item = (usize, usize)>) -> Result<Vec<u8>, MultifdError> {
    let mut merger = Merger::new((connections.len() - 1) as u8);
    for _ in connections {
        merger.connect()?;
    }
    let mut left: Vec<&[u8]> = connections.iter().map(Vec::as_slice).collect();
    let mut out = Vec::new();
    let mut feed = |merger: &mut Merger, one: usize, most: usize, out: &mut Vec<u8>| {
        if !merger.may_read(one) || left[one].is_empty() {
            return Ok(false);
        }
        let (now, later) = left[one].split_at(most.min(left[one].len()));
        left[one] = later;
        merger.pending(one).extend_from_slice(now);
        merger.advance(one, out).map(|()| true)
    };
    for (one, most) in turns {
        feed(&mut merger, one % connections.len(), most, &mut out)?;
    }
    loop {
        let mut went_on = false;
        for one in 0..connections.len() {
            went_on |= feed(&mut merger, one, usize::MAX, &mut out)?;
        }
        if !went_on {
            break;
        }
    }
    for one in 1..connections.len() {
        merger.close(one)?;
        assert!(!merger.has_ended());
    }
    merger.close(0)?;
    assert!(merger.has_ended());
    Ok(out)
}

/// What a destination makes of a plain stream, and whether it is one from its start to its end.
fn load(stream: &[u8]) -> BTreeMap<u64, u8> {
    let (mut records, mut events) = (Vec::new(), Vec::new());
    let mut parser = QemuParser::default();
    assert_eq!(parser.parse(stream, true, &mut records, &mut events), stream.len());
    let lost = events
        .iter()
        .find(|event| matches!(event, StreamEvent::LostTrack { .. }));
    assert_eq!(lost, None);
    let described = StreamEvent::Description {
        offset: (stream.len() - JSON.len()) as u64,
        len: JSON.len() as u32,
    };
    assert_eq!(events.last(), Some(&described));
    let mut memory = BTreeMap::new();
    let mut at = 0;
    for record in records {
        at += record.stream_len(parser.blocks());
        match record {
            Record::Page(page) => memory.insert(page.at.page, stream[at - 1]),
            Record::Zero(page) => memory.insert(page.at.page, 0),
            Record::Bytes { .. } | Record::Chunk { .. } => None,
        };
    }
    memory
}

fn style() -> impl Strategy<Value = Style> {
    prop_oneof![Just(Style::Flush), Just(Style::Eos)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn however_the_connections_are_read_every_page_has_what_it_was_sent_last(
        rounds in prop::collection::vec(prop::collection::btree_map(0u64..40, (0u8..4, 0usize..4), 0..30), 1..5),
        channels in 1usize..4,
        style in style(),
        turns in prop::collection::vec((0usize..4, prop_oneof![0usize..100, 100usize..9000]), 0..200),
    ) {
        let rounds: Vec<Vec<Sent>> = rounds
            .iter()
            .enumerate()
            .map(|(round, pages)| {
                let sent = |(&page, &(kind, channel)): (&u64, &(u8, usize))| Sent {
                    page,
                    fill: if kind == 0 { 0 } else { round as u8 * 4 + kind },
                    channel: (kind != 0 || channel != 0).then_some(channel % channels),
                };
                pages.iter().map(sent).collect()
            })
            .collect();
        let (connections, memory) = build(&rounds, channels, style);
        let merged = merge(&connections, turns.into_iter()).unwrap();
        prop_assert_eq!(load(&merged), memory);
    }

    #[test]
    fn noise_on_any_connection_is_refused_or_merged_within_bounds(
        one in 0usize..3,
        at in 0usize..6000,
        noise in prop::collection::vec(any::<u8>(), 1..40),
        style in style(),
    ) {
        let sent = |page, channel| Sent { page, fill: 7, channel: Some(channel) };
        let (mut connections, _) = build(&[vec![sent(1, 0), sent(2, 1)], vec![sent(1, 1)]], 2, style);
        let at = at % connections[one].len();
        for (byte, noise) in connections[one][at..].iter_mut().zip(noise) {
            *byte = noise;
        }
        let mut merger = Merger::new(2);
        let mut out = Vec::new();
        let all = connections.iter().map(Vec::len).sum::<usize>();
        for bytes in &connections {
            let one = merger.connect().unwrap();
            merger.pending(one).extend_from_slice(bytes);
        }
        for one in 0..connections.len() {
            if merger.advance(one, &mut out).is_err() || merger.close(one).is_err() {
                break;
            }
        }
        // A record of 5 to 9 bytes for an offset of 8, with the frame around it.
        prop_assert!(out.len() <= 4 * all);
    }
}

/// One channel, with this behind its greeting and first synchronisation.
fn one_channel(then: Bytes) -> Result<Vec<u8>, MultifdError> {
    let (mut connections, _) = build(&[vec![]], 1, Style::Flush);
    connections[1] = Bytes::initial(0)
        .packet(FLAG_SYNC, &[], &[])
        .raw(&then.0)
        .packet(FLAG_SYNC, &[], &[])
        .0;
    merge(&connections, std::iter::empty())
}

#[test]
fn pages_of_a_packet_that_synchronises_come_before_the_synchronisation() {
    let (mut connections, _) = build(&[vec![], vec![]], 1, Style::Eos);
    connections[1] = Bytes::initial(0)
        .packet(FLAG_SYNC, &[], &[])
        .packet(FLAG_SYNC, &[(3, 1)], &[4])
        .packet(FLAG_SYNC, &[(3, 2)], &[])
        .0;
    let merged = merge(&connections, std::iter::empty()).unwrap();
    assert_eq!(load(&merged), BTreeMap::from([(3, 2), (4, 0)]));
}

#[test]
fn a_plain_stream_comes_of_a_migration_without_pages() {
    let (connections, _) = build(&[vec![]], 2, Style::Flush);
    let merged = merge(&connections, std::iter::empty()).unwrap();
    let plain = Bytes::start()
        .eos()
        .raw(&[8, 0, 11, 0, 0])
        .section(3)
        .eos()
        .device_state();
    assert_eq!(merged, plain.0);
}

#[test]
fn what_cannot_be_carried_is_named() {
    let refused = [
        (
            one_channel(Bytes::default().packet(4, &[(1, 1)], &[])),
            MultifdError::Compressed,
        ),
        (
            one_channel(Bytes::default().packet(FLAG_DEVICE_STATE, &[], &[])),
            MultifdError::DeviceState,
        ),
        (
            one_channel(Bytes::default().packet(1 << 9, &[], &[])),
            MultifdError::Packet("flags"),
        ),
        (
            one_channel(Bytes::default().packet(0, &[(600, 1)], &[])),
            MultifdError::OutsideBlock,
        ),
        (
            one_channel(Bytes::default().raw(&[0; PACKET_LEN])),
            MultifdError::Packet("magic number"),
        ),
    ];
    for (found, error) in refused {
        assert_eq!(found, Err(error));
    }
    let mut other = Bytes::default().packet(0, &[], &[1]).0;
    other[64..70].copy_from_slice(b"pc.xyz");
    assert_eq!(one_channel(Bytes(other)), Err(MultifdError::UnknownBlock));
    let mut many = Bytes::default().packet(0, &[(1, 1)], &[]).0;
    many[16..20].copy_from_slice(&129u32.to_be_bytes());
    assert_eq!(one_channel(Bytes(many)), Err(MultifdError::Packet("number of pages")));
}

#[test]
fn a_device_that_is_sent_in_rounds_beside_memory_is_named() {
    let (mut connections, _) = build(&[vec![]], 1, Style::Flush);
    connections[0] = Bytes::start()
        .u64(FLUSH)
        .eos()
        .raw(&[1])
        .u32(5)
        .name("vfio")
        .u32(0)
        .u32(1)
        .0;
    assert_eq!(merge(&connections, std::iter::empty()), Err(MultifdError::OtherDevice));
}

#[test]
fn pages_wait_neither_for_the_end_of_start_nor_for_the_next_section() {
    // QEMU has both in a buffer, which it does not write out before its channels have sent.
    for style in [Style::Flush, Style::Eos] {
        let begin = match style {
            Style::Flush => Bytes::start().u64(FLUSH),
            Style::Eos => Bytes::start().u64(EOS),
        };
        let mut merger = Merger::new(1);
        let mut out = Vec::new();
        let channel = Bytes::initial(0).packet(FLAG_SYNC, &[], &[]).packet(0, &[(5, 9)], &[]);
        for bytes in [begin, channel] {
            let one = merger.connect().unwrap();
            merger.pending(one).extend_from_slice(&bytes.0);
            merger.advance(one, &mut out).unwrap();
        }
        assert_eq!(out[out.len() - PAGE_SIZE..], [9; PAGE_SIZE], "{style:?}");
    }
}

#[test]
fn nobody_waits_for_a_channel_that_has_ended() {
    let (connections, _) = build(&[vec![]], 2, Style::Flush);
    let mut merger = Merger::new(2);
    let mut out = Vec::new();
    for bytes in [&connections[0][..], &connections[1][..], &connections[2][..70]] {
        let one = merger.connect().unwrap();
        merger.pending(one).extend_from_slice(bytes);
        merger.advance(one, &mut out).unwrap();
    }
    assert!(!merger.may_read(0) && merger.may_read(2) && !merger.has_ended());
    merger.close(2).unwrap();
    assert!(merger.has_ended());
}

#[test]
fn a_migration_of_which_nothing_but_the_end_came_has_ended() {
    let mut merger = Merger::new(1);
    for _ in 0..2 {
        merger.connect().unwrap();
    }
    merger.close(0).unwrap();
    assert!(!merger.has_ended());
    merger.close(1).unwrap();
    assert!(merger.has_ended());
}

#[test]
fn a_channel_that_ends_behind_the_end_of_memory_does_not_cut_device_state_short() {
    // QEMU 9.1 and 9.2, whose channels have one synchronisation more: the first has come to it, the second ends without.
    let (connections, _) = build(&[vec![]], 2, Style::Flush);
    let mut merger = Merger::new(2);
    let mut out = Vec::new();
    let more = Bytes(connections[1].clone()).packet(FLAG_SYNC, &[], &[]).0;
    let (main, state) = connections[0].split_at(connections[0].len() - 20);
    for bytes in [main, &more, &connections[2]] {
        let one = merger.connect().unwrap();
        merger.pending(one).extend_from_slice(bytes);
        merger.advance(one, &mut out).unwrap();
    }
    merger.close(2).unwrap();
    assert!(!merger.has_ended());
    merger.pending(0).extend_from_slice(state);
    merger.advance(0, &mut out).unwrap();
    assert!(out.ends_with(JSON));
}

#[test]
fn memory_does_not_end_with_pages_that_nobody_has_synchronised() {
    let (mut connections, _) = build(&[vec![]], 1, Style::Flush);
    connections[0] = Bytes::start().u64(FLUSH).eos().section(3).eos().device_state().0;
    connections[1] = Bytes::initial(0)
        .packet(FLAG_SYNC, &[], &[])
        .packet(0, &[(3, 1)], &[])
        .0;
    let main_first = merge(&connections, std::iter::empty());
    assert_eq!(main_first, Err(MultifdError::PageOutOfPlace));
    let channel_first = merge(&connections, [(0, 90), (1, 9000)].into_iter());
    assert_eq!(channel_first, Err(MultifdError::NotSynchronised));
    let len = connections[1].len();
    connections[1].truncate(len - 4097);
    assert_eq!(merge(&connections, std::iter::empty()), Err(MultifdError::CutShort(0)));
}

#[test]
fn a_synchronisation_behind_the_end_of_memory_is_nothing() {
    // QEMU 9.1 and 9.2: the channels have one more than the main stream.
    let (mut connections, memory) = build(
        &[vec![Sent {
            page: 1,
            fill: 2,
            channel: Some(0),
        }]],
        2,
        Style::Flush,
    );
    for channel in &mut connections[1..] {
        *channel = Bytes(std::mem::take(channel)).packet(FLAG_SYNC, &[], &[]).0;
    }
    assert_eq!(load(&merge(&connections, std::iter::empty()).unwrap()), memory);
}

#[test]
fn strangers_are_not_let_in() {
    let mut merger = Merger::new(1);
    let mut out = Vec::new();
    let mut greet = |bytes: &[u8]| {
        let one = merger.connect()?;
        merger.pending(one).extend_from_slice(bytes);
        merger.advance(one, &mut out)
    };
    assert_eq!(greet(&Bytes::initial(1).0), Err(MultifdError::Channel(1)));
    assert_eq!(greet(b"HTTP/1.1 "), Err(MultifdError::Stranger));
    assert_eq!(greet(b""), Err(MultifdError::TooManyConnections { channels: 1 }));
}
