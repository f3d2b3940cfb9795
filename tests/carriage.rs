//! A vmm stream from end to end without the edges: bytes into an encoder, frames on lanes that overtake each other and die with their
//! connections, bytes out of a decoder.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;

use longhaul::proto::page::{MigrationId, PAGE_SIZE};
use longhaul::proto::reduce::{DictionaryLimits, PageCounts, PageShelf, Reducer, ShelfError};
use longhaul::proto::session::{Decoder, DestinationSession, Encoder, SessionError, SourceSession, StreamSummary};
use longhaul::proto::wire::Frame;
use longhaul::proto::wire::message::Held;
use proptest::prelude::*;

/// The pages of a dictionary, in memory.
#[derive(Default)]
struct Pages(BTreeMap<u32, Vec<u8>>);

impl PageShelf for Pages {
    fn put(&mut self, slot: u32, page: &[u8]) -> Result<(), ShelfError> {
        self.0.insert(slot, page.to_vec());
        Ok(())
    }

    fn get(&mut self, slot: u32, page: &mut [u8]) -> Result<(), ShelfError> {
        page.copy_from_slice(self.0.get(&slot).ok_or(ShelfError::NoSuchSlot { slot })?);
        Ok(())
    }
}

/// Both ends of a migration, the lanes between them, and the control channel while there is one.
struct World {
    stream: Vec<u8>,
    fed: usize,
    encoder: Option<Encoder>,
    encoded: Option<(StreamSummary, PageCounts)>,
    source: SourceSession,
    /// Lanes on their way, of the connection there is and of those that are half dead.
    lanes: Vec<Frame>,
    is_cut: bool,
    /// What the destination answered to the newest attach, and that has not reached the source.
    answer: Option<(u32, Held)>,
    destination: DestinationSession,
    decoder: Decoder<Pages>,
    /// Frames before this one are restored.
    decoded: u64,
    out: Vec<u8>,
    is_held: bool,
}

impl World {
    fn new(stream: Vec<u8>, dictionary: Option<DictionaryLimits>, window: u64) -> Self {
        Self {
            stream,
            fed: 0,
            encoder: Some(Encoder::new(
                dictionary.map(|limits| Reducer::new(limits, limits.slots())),
            )),
            encoded: None,
            source: SourceSession::new(MigrationId([1; 16]), window),
            lanes: Vec::new(),
            is_cut: false,
            answer: None,
            destination: DestinationSession::new(window),
            decoder: Decoder::new(dictionary.map(|limits| (limits, Pages::default()))),
            decoded: 0,
            out: Vec::new(),
            is_held: false,
        }
    }

    /// The vmm writes so many bytes, or ends its stream where none are left.
    fn feed(&mut self, len: usize) {
        let Some(mut encoder) = self.encoder.take() else { return };
        let mut frames = Vec::new();
        let end = self.stream.len().min(self.fed + len);
        if self.fed < self.stream.len() {
            encoder.feed(&self.stream[self.fed..end], &mut frames);
            self.fed = end;
            self.encoder = Some(encoder);
        } else {
            self.encoded = Some(encoder.finish(&mut frames));
        }
        let count = frames.len();
        for (at, frame) in frames.into_iter().enumerate() {
            self.source.push(frame, self.encoded.is_some() && at + 1 == count);
        }
    }

    fn transmit(&mut self) {
        let epoch = self.source.epoch();
        self.lanes.extend(self.source.poll_transmit(epoch));
    }

    fn arrive(&mut self, index: usize) {
        if self.lanes.is_empty() {
            return;
        }
        let frame = self.lanes.swap_remove(index % self.lanes.len());
        match self.destination.receive(frame) {
            Ok(()) | Err(SessionError::OldEpoch { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn restore(&mut self) {
        let Some(frame) = self.destination.poll_frame().unwrap() else {
            return;
        };
        assert!(frame.header.held || !self.is_held, "what is held stays held");
        self.is_held = frame.header.held;
        let start = self.out.len();
        self.out.extend_from_slice(&self.decoder.restore(&frame).unwrap());
        assert!(self.out[start..] == self.stream[start..self.out.len()]);
        self.decoded = frame.header.sequence + 1;
    }

    fn acknowledge(&mut self) {
        if !self.is_cut {
            let held = Held {
                next: self.decoded,
                beyond: Vec::new(),
            };
            self.source.on_ack(&held).unwrap();
        }
    }

    /// The connection is gone for the source, and with it some of its lanes; others are on their way still.
    fn cut(&mut self, kept: usize) {
        self.is_cut = true;
        self.lanes.truncate(kept % (self.lanes.len() + 1));
    }

    /// An attach reaches the destination.
    fn attach(&mut self) {
        if self.is_cut {
            let epoch = self.source.epoch() + 1;
            self.answer = Some((epoch, self.destination.resume(epoch).unwrap()));
        }
    }

    /// The answer to it reaches the source.
    fn resume(&mut self) {
        if let Some((epoch, held)) = self.answer.take() {
            self.source.resume(epoch, &held).unwrap();
            self.is_cut = false;
        }
    }

    fn step(&mut self, action: u8, number: usize) {
        match action {
            0..=3 => self.feed(number),
            4..=8 => self.transmit(),
            9..=13 => self.arrive(number),
            14..=18 => self.restore(),
            19 | 20 => self.acknowledge(),
            21 => self.cut(number),
            22 | 23 => self.attach(),
            24 => self.answer = None,
            _ => self.resume(),
        }
    }

    /// Nothing is lost any more.
    fn go_on_to_the_end(&mut self) {
        for _ in 0..10_000 {
            if self.source.is_finished() {
                return;
            }
            self.feed(20_000);
            if self.is_cut {
                self.attach();
                self.resume();
            }
            self.transmit();
            self.arrive(0);
            self.restore();
            self.acknowledge();
        }
        panic!("the stream does not come to its end");
    }
}

/// A part of a stream that looks like QEMU's.
#[derive(Clone, Debug)]
enum Part {
    Pages { first: u64, count: u64, content: Content },
    Opaque(Vec<u8>),
}

#[derive(Clone, Copy, Debug)]
enum Content {
    Zero,
    Text(u64),
    Noise(u64),
}

/// A header, memory in sections of RAM, device state, the end and a description.
fn like_qemu(parts: &[Part]) -> Vec<u8> {
    let word = |word: u64| word.to_be_bytes();
    let mut stream = b"QEVM\0\0\0\x03\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    stream.extend(word((1 << 20) | 4));
    stream.extend(b"\x06pc.ram");
    stream.extend(word(1 << 20));
    stream.extend(word(0x10));
    for part in parts {
        match part {
            Part::Pages { first, count, content } => {
                stream.extend(b"\x02\0\0\0\x02");
                for page in *first..first + count {
                    let is_zero = matches!(content, Content::Zero);
                    let flags = if is_zero { 2 } else { 8 } | if page > *first { 0x20 } else { 0 };
                    stream.extend(word((page % 256) << 12 | flags));
                    if page == *first {
                        stream.extend(b"\x06pc.ram");
                    }
                    match content {
                        Content::Zero => stream.push(0),
                        Content::Text(seed) => {
                            let line = format!("line {} of a file\n", seed + page % 3);
                            stream.extend(line.bytes().cycle().take(PAGE_SIZE));
                        }
                        Content::Noise(seed) => stream.extend(noise(seed + page % 3, PAGE_SIZE)),
                    }
                }
                stream.extend(word(0x10));
            }
            // The parser loses its way, and finds it again or not.
            Part::Opaque(bytes) => stream.extend(bytes),
        }
    }
    stream.extend(b"\x03\0\0\0\x02");
    stream.extend(word(0x10));
    stream.extend(b"\x04\0\0\0\x07\x05timer\0\0\0\0\0\0\0\x02 state of a device");
    stream.extend(b"\0\x06\0\0\0\x02{}");
    stream
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

fn stream() -> impl Strategy<Value = Vec<u8>> {
    let content = prop_oneof![
        1 => Just(Content::Zero),
        3 => (0u64..4).prop_map(Content::Text),
        3 => (0u64..4).prop_map(Content::Noise),
    ];
    let pages =
        (0u64..256, 1u64..20, content).prop_map(|(first, count, content)| Part::Pages { first, count, content });
    let part = prop_oneof![
        12 => pages,
        1 => prop::collection::vec(any::<u8>(), 1..3000).prop_map(Part::Opaque),
    ];
    prop_oneof![
        4 => prop::collection::vec(part, 0..20).prop_map(|parts| like_qemu(&parts)),
        1 => (any::<u64>(), 0usize..200_000).prop_map(|(seed, len)| noise(seed, len)),
    ]
}

fn dictionary() -> impl Strategy<Value = Option<DictionaryLimits>> {
    let slots = prop_oneof![Just(0u32), Just(1), Just(7), Just(64), Just(10_000)];
    prop::option::weighted(0.9, (slots, 0u32..3)).prop_map(|limits| {
        let (slots, regions) = limits?;
        Some(DictionaryLimits::new(slots, regions).unwrap())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// Whatever is cut, repeated, lost or late: the bytes that came in come out.
    #[test]
    fn a_stream_arrives_whole_over_lanes_in_any_order_and_cuts_at_any_moment(
        stream in stream(),
        dictionary in dictionary(),
        window in 100_000u64..300_000,
        steps in prop::collection::vec((0u8..27, 0usize..20_000), 0..400),
    ) {
        let mut world = World::new(stream, dictionary, window);
        for (action, number) in steps {
            world.step(action, number);
            prop_assert!(world.source.outstanding_bytes() <= window);
        }
        world.go_on_to_the_end();
        prop_assert!(world.out == world.stream);
        prop_assert!(world.destination.is_finished() && world.is_held);
        let (summary, pages) = world.encoded.unwrap();
        prop_assert_eq!(world.decoder.summary(), summary);
        prop_assert_eq!(world.decoder.pages(), pages);
    }
}
