//! What holds for any stream and any slicing; [`Parsed::sliced`] checks that the records give the bytes back.

use proptest::prelude::*;

use super::*;

/// A piece of a stream, more or less in its place.
#[derive(Clone, Debug)]
enum Piece {
    Page(u64, bool, u8),
    Zero(u64, bool),
    Eos,
    Part,
    End,
    Full(u32, Vec<u8>),
    Footer,
    Flush,
    Command(u8, u8),
    Xbzrle(u16),
    Eof,
    Noise(Vec<u8>),
}

fn piece() -> impl Strategy<Value = Piece> {
    let body = || {
        prop::collection::vec(
            prop::sample::select(vec![0u8, 1, 2, 3, 4, 6, 0x7e, b'{', b'"', 0xff]),
            0..80,
        )
    };
    prop_oneof![
        6 => (0u64..20, any::<bool>(), any::<u8>()).prop_map(|(page, named, fill)| Piece::Page(page, named, fill)),
        6 => (0u64..20, any::<bool>()).prop_map(|(page, named)| Piece::Zero(page, named)),
        4 => Just(Piece::Eos),
        4 => Just(Piece::Part),
        1 => Just(Piece::End),
        2 => (0u32..6, body()).prop_map(|(id, body)| Piece::Full(id, body)),
        1 => Just(Piece::Footer),
        1 => Just(Piece::Flush),
        1 => (0u8..13, 0u8..20).prop_map(|(command, len)| Piece::Command(command, len)),
        1 => any::<u16>().prop_map(Piece::Xbzrle),
        1 => Just(Piece::Eof),
        1 => body().prop_map(Piece::Noise),
    ]
}

fn build(pieces: &[Piece], footers: bool) -> Vec<u8> {
    let mut stream = Stream::begin();
    stream.footers = footers;
    let mut stream = stream.ram_start(&[("pc.ram", 16), ("pc.rom", 2)]);
    for piece in pieces {
        let block = |named: bool| named.then_some("pc.ram");
        stream = match piece {
            Piece::Page(page, named, fill) => stream.page(*page, block(*named), *fill),
            Piece::Zero(page, named) => stream.zero(*page, block(*named)),
            Piece::Eos => stream.eos(),
            Piece::Part => stream.ram_part(),
            Piece::End => stream.ram_end(),
            Piece::Full(id, body) => stream.full(*id, "device", body),
            Piece::Footer => stream.footer(RAM_ID),
            Piece::Flush => stream.word(0x200),
            Piece::Command(command, len) => stream.raw(&[8, 0, *command, 0, *len]).raw(&vec![0; usize::from(*len)]),
            Piece::Xbzrle(len) => stream.record(1, 0x40, None).raw(&[1]).raw(&len.to_be_bytes()),
            Piece::Eof => stream.eof(),
            Piece::Noise(bytes) => stream.raw(bytes),
        };
    }
    stream.bytes
}

fn slices() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![3 => 0usize..40, 2 => 40usize..6000], 0..300)
}

proptest! {
    #[test]
    fn no_slicing_changes_what_a_stream_comes_to(
        pieces in prop::collection::vec(piece(), 0..40),
        footers in any::<bool>(),
        slices in slices(),
    ) {
        let bytes = build(&pieces, footers);
        let whole = Parsed::whole(&bytes);
        let sliced = Parsed::sliced(&bytes, slices.into_iter());
        prop_assert_eq!(whole, sliced);
    }

    #[test]
    fn no_slicing_changes_what_noise_comes_to(
        bytes in prop::collection::vec(prop::sample::select(vec![0u8, 1, 2, 3, 4, 8, 0x10, 0x20, 0x22, 0x7e, 0xff]), 0..3000),
        head in 0usize..4,
        slices in slices(),
    ) {
        let streams = [Stream::headless(), Stream::begin(), Stream::with_ram(), Stream::with_ram().ram_part()];
        let bytes = streams[head].clone().raw(&bytes).bytes;
        let whole = Parsed::whole(&bytes);
        let sliced = Parsed::sliced(&bytes, slices.into_iter());
        prop_assert_eq!(whole, sliced);
    }

    #[test]
    fn a_stream_in_order_is_marked_completely(
        rounds in prop::collection::vec(prop::collection::vec((0u64..16, any::<bool>(), any::<bool>()), 0..20), 0..8),
        footers in any::<bool>(),
    ) {
        let mut stream = Stream::begin();
        stream.footers = footers;
        let mut stream = stream.ram_start(&[("pc.ram", 16)]);
        let mut pages = 0;
        for round in &rounds {
            stream = stream.ram_part();
            for &(page, zero, named) in round {
                let block = (named || pages == 0).then_some("pc.ram");
                stream = if zero { stream.zero(page, block) } else { stream.page(page, block, 3) };
                pages += 1;
            }
            stream = stream.eos();
        }
        let stream = stream.ram_end().eos();
        let parsed = Parsed::whole(&stream.clone().full(3, "timer", &[0; 20]).eof().bytes);
        prop_assert_eq!(parsed.pages().len(), pages);
        prop_assert_eq!(parsed.lost(), vec![]);
        let device_state = StreamEvent::DeviceState { offset: stream.len() };
        prop_assert!(parsed.events.contains(&device_state));
    }
}
