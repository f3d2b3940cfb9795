//! Every element of the format, as it stands in a stream that nothing is wrong with.

use super::*;
use PageKind::{Page, Zero};

#[test]
fn a_whole_stream_is_marked_page_by_page() {
    let stream = Stream::with_ram()
        .ram_part()
        .page(0, Some("pc.ram"), 7)
        .zero(1, None)
        .page(1, Some("pc.rom"), 8)
        .eos();
    let device_state = stream.clone().ram_end().zero(2, Some("pc.ram")).eos();
    let eof = device_state
        .clone()
        .full(3, "timer", &[1; 24])
        .full(4, "cpu_common", &[0; 8]);
    let parsed = eof.clone().eof().parse();
    let header = Stream::with_ram().ram_part().len() as usize;
    assert_eq!(
        parsed.records,
        [
            Record::Bytes { len: header },
            Record::Page(page_record(0, 0, false)),
            Record::Zero(page_record(0, 1, true)),
            Record::Page(page_record(1, 1, false)),
            Record::Bytes { len: 8 + 5 + 5 },
            Record::Zero(page_record(0, 2, false)),
            Record::Bytes {
                len: eof.clone().eof().bytes.len() - device_state.bytes.len() + 8 + 5
            },
        ]
    );
    let blocks = [("pc.ram", 16 * 4096), ("pc.rom", 2 * 4096)].map(|(name, length)| RamBlock {
        name: name.as_bytes().to_vec(),
        length,
    });
    assert_eq!(
        parsed.events,
        [
            StreamEvent::Machine("pc-q35-10.0".into()),
            StreamEvent::RamBlocks(blocks.to_vec()),
            StreamEvent::RoundEnd {
                offset: device_state.len() - (8 + 7 + 1 + 8 + 5)
            },
            StreamEvent::DeviceState {
                offset: device_state.len()
            },
            StreamEvent::StreamEof { offset: eof.len() },
            StreamEvent::Description {
                offset: eof.len() + 6,
                len: 34
            },
        ]
    );
    assert_eq!(parsed.blocks, blocks);
}

#[test]
fn a_stream_without_footers_is_marked_to_its_end() {
    let stream = Stream::begin()
        .without_footers()
        .ram_start(&[("pc.ram", 16)])
        .ram_part()
        .page(3, Some("pc.ram"), 1)
        .eos()
        .ram_end()
        .eos();
    let devices = stream.clone().full(3, "timer", &[0; 40]).full(4, "fdc", b"\0\x06{\"");
    let parsed = devices.clone().eof().parse();
    assert_eq!(parsed.pages(), [(0, 3, Page)]);
    assert!(
        parsed
            .events
            .contains(&StreamEvent::DeviceState { offset: stream.len() })
    );
    assert!(
        parsed
            .events
            .contains(&StreamEvent::StreamEof { offset: devices.len() })
    );
    assert_eq!(parsed.lost(), []);
}

#[test]
fn a_stream_without_description_ends_with_its_eof_byte() {
    let devices = Stream::with_ram().ram_end().eos().full(3, "timer", &[0; 40]);
    let parsed = devices.clone().raw(&[0]).parse();
    assert_eq!(
        parsed.events.last(),
        Some(&StreamEvent::StreamEof { offset: devices.len() })
    );
    let bare = Stream::with_ram().ram_end().eos();
    let parsed = bare.clone().raw(&[0]).parse();
    assert_eq!(
        parsed.events.last(),
        Some(&StreamEvent::StreamEof { offset: bare.len() })
    );
}

#[test]
fn configuration_may_be_absent_or_have_subsections() {
    let header = Stream::headless().raw(b"QEVM\0\0\0\x03");
    assert_eq!(
        header
            .ram_start(&[("pc.ram", 1)])
            .zero(0, Some("pc.ram"))
            .parse()
            .lost(),
        []
    );

    let uuid = Stream::begin()
        .raw(b"\x05\x12configuration/uuid\0\0\0\x01")
        .raw(&[7; 16]);
    let bits = uuid.raw(b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0\x0c");
    let names = bits.raw(b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x02\x0ax-ignore-a\x0amapped-ram");
    let parsed = names
        .ram_start(&[("pc.ram", 1)])
        .ram_part()
        .zero(0, Some("pc.ram"))
        .parse();
    assert_eq!((parsed.lost(), parsed.pages()), (vec![], vec![(0, 0, Zero)]));
}

#[test]
fn pages_of_another_size_are_not_marked() {
    let stream = Stream::begin().raw(b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0\x0e");
    let parsed = stream.ram_start(&[("ram", 4)]).ram_part().zero(0, Some("ram")).parse();
    assert_eq!(parsed.pages(), []);
    assert!(matches!(parsed.lost()[..], [(_, LostTrackReason::TargetPageSize)]));
}

#[test]
fn optional_words_of_the_block_list_are_told_from_names_and_records() {
    for (between, behind) in [(0, 1), (1, 0), (2, 2)] {
        let mut stream = Stream::begin()
            .opening(1, RAM_ID, "ram", 4)
            .word(12 << 12 | 4)
            .name("a")
            .word(8 << 12);
        for word in [2 << 20, 0].into_iter().take(between) {
            stream = stream.word(word);
        }
        stream = stream.name("b").word(4 << 12);
        for word in [2 << 20, 0xc0000].into_iter().take(behind) {
            stream = stream.word(word);
        }
        let parsed = stream.eos().ram_part().zero(3, Some("b")).parse();
        assert_eq!(
            (parsed.lost(), parsed.pages()),
            (vec![], vec![(1, 3, Zero)]),
            "{between} {behind}"
        );
    }
}

#[test]
fn a_section_header_does_not_break_continuation() {
    let stream = Stream::with_ram()
        .ram_part()
        .zero(0, Some("pc.rom"))
        .eos()
        .ram_part()
        .zero(1, None)
        .eos();
    assert_eq!(stream.parse().pages(), [(1, 0, Zero), (1, 1, Zero)]);
}

#[test]
fn pages_in_an_unusual_form_are_bytes_and_the_next_one_is_marked() {
    let stream = Stream::with_ram()
        .ram_part()
        .record(0, 0x02, Some("pc.rom"))
        .raw(&[9])
        .zero(1, None);
    let xbzrle = stream
        .record(0, 0x40, Some("pc.ram"))
        .raw(&[1, 0, 3, 8, 16, 1])
        .page(1, None, 3);
    let compressed = xbzrle
        .record(0, 0x100, Some("pc.rom"))
        .raw(&[0, 0, 0, 4, 1, 2, 3, 4])
        .zero(1, None)
        .eos();
    let parsed = compressed.parse();
    assert_eq!(parsed.lost(), []);
    assert_eq!(parsed.pages(), [(1, 1, Zero), (0, 1, Page), (1, 1, Zero)]);
}

#[test]
fn a_round_ends_where_ram_starts_over() {
    let first = Stream::with_ram()
        .ram_part()
        .zero(3, Some("pc.ram"))
        .zero(9, None)
        .zero(0, Some("pc.rom"))
        .eos()
        .ram_part();
    let second = first.clone().page(2, Some("pc.ram"), 1).page(7, None, 1);
    let third = second.clone().page(7, None, 1).eos();
    let parsed = third.parse();
    let rounds: Vec<_> = parsed
        .events
        .iter()
        .filter(|event| matches!(event, StreamEvent::RoundEnd { .. }))
        .collect();
    let ends = [first, second].map(|stream| StreamEvent::RoundEnd { offset: stream.len() });
    assert_eq!(rounds, ends.iter().collect::<Vec<_>>());
}

#[test]
fn with_multifd_a_flush_in_a_part_ends_a_round() {
    let begin = Stream::begin()
        .opening(1, RAM_ID, "ram", 4)
        .word(16 << 12 | 4)
        .name("pc.ram")
        .word(16 << 12);
    let part = begin.word(0x200).eos().ram_part().word(0x200);
    let end = part.clone().eos().ram_end().word(0x200).eos();
    let parsed = end.clone().full(3, "timer", &[0; 9]).eof().parse();
    assert_eq!(
        parsed.events[2..4],
        [
            StreamEvent::RoundEnd { offset: part.len() },
            StreamEvent::DeviceState { offset: end.len() }
        ]
    );
    assert_eq!(parsed.lost(), []);
}

#[test]
fn commands_are_passed_over_with_their_data() {
    let stream = Stream::begin()
        .raw(&[8, 0, 1, 0, 0])
        .raw(&[8, 0, 2, 0, 4, 0, 0, 0, 1])
        .raw(&[8, 0, 3, 0, 16])
        .raw(&[4; 16])
        .ram_start(&[("pc.ram", 4)])
        .raw(&[8, 0, 7, 0, 4, 0, 0, 1, 0])
        .raw(&[2; 256])
        .ram_part()
        .zero(0, Some("pc.ram"))
        .eos()
        .raw(&[8, 0, 11, 0, 0])
        .raw(&[8, 0, 99, 0, 2, 1, 1])
        .ram_end()
        .zero(1, None)
        .eos();
    let parsed = stream.parse();
    assert_eq!(
        (parsed.lost(), parsed.pages()),
        (vec![], vec![(0, 0, Zero), (0, 1, Zero)])
    );
}

#[test]
fn what_is_not_a_qemu_stream_passes_as_bytes() {
    let multifd = Stream::headless().raw(&0x1122_3344_u32.to_be_bytes()).raw(&[0; 60]);
    let old = Stream::headless().raw(b"QEVM\0\0\0\x02").raw(&[0; 60]);
    for stream in [multifd, old] {
        let parsed = stream.parse();
        assert_eq!(
            parsed.records,
            [Record::Bytes {
                len: stream.bytes.len()
            }]
        );
        assert_eq!(
            parsed.events,
            [StreamEvent::LostTrack {
                offset: 0,
                reason: LostTrackReason::NotQemu
            }]
        );
    }
    assert_eq!(Stream::headless().parse(), Parsed::default());
}

#[test]
fn a_stream_cut_anywhere_passes_whole() {
    let stream = Stream::with_ram()
        .ram_part()
        .page(0, Some("pc.ram"), 7)
        .zero(1, None)
        .eos();
    let stream = stream.ram_end().eos().full(3, "timer", &[1; 24]).eof();
    for cut in 0..stream.bytes.len() {
        let parsed = Parsed::whole(&stream.bytes[..cut]);
        assert_eq!(parsed.lost(), [], "cut at {cut}");
    }
}

#[test]
fn a_header_is_written_as_qemu_writes_it() {
    let mut out = Vec::new();
    write_page_header(page_record(0, 0x12345, false), Page, b"pc.ram", &mut out);
    assert_eq!(out, b"\0\0\0\0\x12\x34\x50\x08\x06pc.ram");
    out.clear();
    write_page_header(page_record(0, 1, true), Zero, b"ignored", &mut out);
    assert_eq!(out, [0, 0, 0, 0, 0, 0, 0x10, 0x22]);
    out.clear();
    write_page_header(page_record(0, u64::MAX, false), Page, &[b'n'; 300], &mut out);
    assert_eq!(out.len(), 8 + 1 + 255);
}
