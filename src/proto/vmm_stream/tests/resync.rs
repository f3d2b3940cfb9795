//! Sections without a length, contradictions, and the way back from both.

use super::*;
use PageKind::{Page, Zero};

fn regained(parsed: &Parsed) -> Vec<u64> {
    let regained = |event: &StreamEvent| match *event {
        StreamEvent::Regained { offset } => Some(offset),
        _ => None,
    };
    parsed.events.iter().filter_map(regained).collect()
}

#[test]
fn early_device_sections_before_and_after_ram_start_are_passed_over() {
    for footers in [true, false] {
        let mut stream = Stream::begin();
        stream.footers = footers;
        let stream = stream
            .full(9, "virtio-mem-device-early", &[0x7e; 50])
            .full(10, "virtio-mem-device-early", &[2, 0, 0, 0, 2, 0, 0, 0])
            .ram_start(&[("pc.ram", 16)])
            .full(11, "early", &[3, 0, 0, 0, 2])
            .ram_part()
            .zero(0, Some("pc.ram"))
            .zero(1, None)
            .page(2, None, 1)
            .eos()
            .ram_end()
            .eos();
        let parsed = stream.clone().full(12, "timer", &[0; 4]).parse();
        assert_eq!(parsed.lost(), []);
        assert_eq!(
            parsed.pages(),
            [(0, 2, Page)],
            "after two records on probation, footers {footers}"
        );
        assert!(
            parsed
                .events
                .contains(&StreamEvent::DeviceState { offset: stream.len() })
        );
    }
}

#[test]
fn other_iterables_between_ram_parts_are_passed_over() {
    let mut stream = Stream::with_ram()
        .opening(1, 5, "dirty-bitmap", 1)
        .raw(&[0; 30])
        .footer(5);
    for round in 0..3 {
        stream = stream
            .ram_part()
            .zero(0, Some("pc.ram"))
            .zero(1, None)
            .page(2 + round, None, 5)
            .eos();
        stream = stream.following(2, 5).raw(&[1; 700]).footer(5);
    }
    let stream = stream
        .following(3, 5)
        .raw(&[8; 3])
        .footer(5)
        .ram_end()
        .zero(7, None)
        .eos();
    let whole = stream
        .clone()
        .following(3, 5)
        .raw(&[8; 3])
        .footer(5)
        .full(6, "timer", &[0; 5]);
    let parsed = whole.clone().eof().parse();
    assert_eq!(parsed.lost(), []);
    assert_eq!(parsed.pages(), [(0, 2, Page), (0, 3, Page), (0, 4, Page)]);
    assert!(
        parsed
            .events
            .contains(&StreamEvent::DeviceState { offset: stream.len() })
    );
    assert!(parsed.events.contains(&StreamEvent::StreamEof { offset: whole.len() }));
}

#[test]
fn an_empty_part_behind_its_footer_is_enough_to_be_sure() {
    let stream = Stream::with_ram()
        .opening(1, 5, "dirty-bitmap", 1)
        .raw(&[0; 30])
        .footer(5)
        .ram_part()
        .eos();
    let parsed = stream.ram_part().zero(3, Some("pc.ram")).parse();
    assert_eq!(parsed.pages(), [(0, 3, Zero)]);
}

#[test]
fn a_broken_record_costs_its_section_and_no_more() {
    let good = Stream::with_ram().ram_part().zero(0, Some("pc.ram"));
    let broken = good
        .clone()
        .word(5 << 12 | 0x80)
        .raw(&[0xaa; 5000])
        .page(3, None, 1)
        .eos();
    let again = broken.ram_part().zero(4, Some("pc.ram")).zero(5, None);
    let stream = again.clone().page(6, None, 1).eos().ram_end().page(7, None, 1).eos();
    let parsed = stream.full(3, "timer", &[0; 9]).eof().parse();
    assert_eq!(parsed.lost(), [(good.len(), LostTrackReason::RamRecord)]);
    assert_eq!(
        regained(&parsed),
        [again.len()],
        "after a footer, a header and two records"
    );
    assert_eq!(parsed.pages(), [(0, 0, Zero), (0, 6, Page), (0, 7, Page)]);
    assert!(matches!(parsed.events.last(), Some(StreamEvent::Description { .. })));
}

#[test]
fn a_resync_that_what_follows_contradicts_marks_nothing() {
    let good = Stream::with_ram().ram_part();
    let bait = good
        .clone()
        .word(0x80)
        .footer(RAM_ID)
        .ram_part()
        .zero(4, Some("pc.ram"))
        .word(0x80);
    let bait = bait.ram_part().page(4, Some("pc.ram"), 1).word(0x80).raw(&[0xee; 300]);
    let parsed = bait.parse();
    assert_eq!(parsed.pages(), []);
    assert_eq!(
        (parsed.lost().len(), regained(&parsed)),
        (1, vec![]),
        "one report for one loss"
    );
}

#[test]
fn what_a_page_holds_is_never_looked_at_while_the_parser_is_sure() {
    let bait = Stream::headless().ram_end().eos().full(3, "timer", &[0; 9]).eof().bytes;
    let mut page = Vec::new();
    while page.len() < PAGE_SIZE {
        page.extend_from_slice(&bait);
    }
    let stream = Stream::with_ram()
        .ram_part()
        .record(0, 8, Some("pc.ram"))
        .raw(&page[..PAGE_SIZE])
        .zero(1, None)
        .eos();
    let parsed = stream.parse();
    assert_eq!(parsed.pages(), [(0, 0, Page), (0, 1, Zero)]);
    assert_eq!(parsed.events.len(), 2);
}

#[test]
fn losing_track_within_the_last_ram_section_still_finds_device_state() {
    let stream = Stream::with_ram().ram_end().word(0x80).raw(&[0xaa; 100]).footer(RAM_ID);
    let whole = stream
        .clone()
        .full(3, "timer", &[0; 9])
        .full(4, "fdc", &[1; 9])
        .full(5, "ide", &[1; 9])
        .eof();
    let parsed = whole.parse();
    assert!(
        parsed
            .events
            .contains(&StreamEvent::DeviceState { offset: stream.len() }),
        "{:?}",
        parsed.events
    );
    assert!(matches!(parsed.events.last(), Some(StreamEvent::Description { .. })));
}

#[test]
fn device_state_that_looks_like_a_footer_does_not_end_the_stream() {
    let body = Stream::headless()
        .raw(&[5; 40])
        .footer(3)
        .raw(&[0, 6, 0xff, 0, 0, 0])
        .footer(3)
        .raw(&[9; 40])
        .bytes;
    let devices = Stream::with_ram().ram_end().eos().full(3, "timer", &body);
    let parsed = devices.clone().eof().parse();
    assert!(
        parsed
            .events
            .contains(&StreamEvent::StreamEof { offset: devices.len() })
    );
}

#[test]
fn every_contradiction_is_named() {
    use LostTrackReason as Reason;
    let part = || Stream::with_ram().ram_part();
    let list = || Stream::begin().opening(1, RAM_ID, "ram", 4);
    let cases = [
        (
            Stream::headless().raw(b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff"),
            Reason::Configuration,
        ),
        (
            Stream::headless().raw(b"QEVM\0\0\0\x03\x07\0\0\0\x01\x80"),
            Reason::Configuration,
        ),
        (Stream::begin().raw(b"\x05\x03new\0\0\0\x01"), Reason::Configuration),
        (Stream::with_ram().raw(&[0x55]), Reason::Element),
        (Stream::with_ram().raw(&[2, 0, 0, 0, 99]), Reason::Element),
        (Stream::begin().opening(1, RAM_ID, "ram", 5), Reason::RamSection),
        (Stream::begin().opening(4, RAM_ID, "ram", 4), Reason::RamSection),
        (Stream::with_ram().opening(1, 77, "ram", 4), Reason::RamSection),
        (list().word(0x04), Reason::BlockList),
        (list().word(4096 | 0x10), Reason::BlockList),
        (list().word(4096 | 0x04).name("").word(4096), Reason::BlockList),
        (list().word(4096 | 0x04).name("a").word(u64::MAX), Reason::BlockList),
        (
            list().word(8192 | 0x04).name("a").word(4096).word(0).word(0).word(0),
            Reason::BlockList,
        ),
        (
            list()
                .word(8192 | 0x04)
                .name("a")
                .word(4096)
                .name("a")
                .word(4096)
                .word(0x10),
            Reason::BlockList,
        ),
        (part().word(0), Reason::RamRecord),
        (part().word(0x0a), Reason::RamRecord),
        (part().word(0x1010), Reason::RamRecord),
        (part().word(0x400), Reason::RamRecord),
        (
            part().record(0, 0x40, Some("pc.ram")).raw(&[1, 0xff, 0xff]),
            Reason::RamRecord,
        ),
        (
            part().record(0, 0x100, Some("pc.ram")).raw(&[0xff; 4]),
            Reason::RamRecord,
        ),
        (part().zero(0, Some("pc.bios")), Reason::UnknownBlock),
        (part().page(16, Some("pc.ram"), 0), Reason::OutsideBlock),
        (part().word(u64::MAX << 12 | 0x28), Reason::OutsideBlock),
        (part().word(0x10).raw(&[0x7e, 0, 0, 0, 9]), Reason::Footer),
    ];
    for (at, (stream, reason)) in cases.into_iter().enumerate() {
        let parsed = stream.raw(&[0xff; 40]).parse();
        assert_eq!(parsed.lost().first().map(|lost| lost.1), Some(reason), "case {at}");
        assert_eq!(parsed.pages(), [], "case {at}");
    }
}

#[test]
fn a_block_list_without_end_is_cut_at_its_limit() {
    for (blocks, known) in [(super::super::MAX_BLOCKS, true), (super::super::MAX_BLOCKS + 1, false)] {
        let mut stream = Stream::begin()
            .opening(1, RAM_ID, "ram", 4)
            .word((blocks as u64) << 12 | 4);
        for block in 0..blocks {
            stream = stream.name(&format!("block{block}")).word(4096);
        }
        let parsed = Parsed::whole(&stream.eos().bytes);
        assert_eq!(parsed.blocks.len(), if known { blocks } else { 0 });
        assert_eq!(parsed.lost().is_empty(), known);
    }
}

#[test]
fn a_full_size_page_with_the_longest_name_fits_what_may_stay_pending() {
    let name = "n".repeat(255);
    let stream = Stream::begin()
        .ram_start(&[(&name, 16)])
        .ram_part()
        .page(5, Some(&name), 1);
    let before = stream.bytes.len() - 1;
    let parsed = Parsed::sliced(&stream.bytes, [before, 1].into_iter());
    assert_eq!(parsed.pages(), [(0, 5, Page)]);
}
