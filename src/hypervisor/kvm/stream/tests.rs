use super::*;
use crate::hypervisor::kvm::memory::Block;
use crate::proto::page::{PAGE_SIZE, PageAddress};
use crate::proto::vmm_stream::qemu::QemuParser;
use crate::proto::vmm_stream::{Record, StreamEvent};

fn blocks() -> Vec<Block> {
    let block = |(number, pages): (u32, u64)| Block {
        name: format!("ram{number}"),
        slot: number,
        guest_address: u64::from(number) << 32,
        len: pages << 12,
    };
    [(0, 10), (1, 3)].into_iter().map(block).collect()
}

fn at(block: u16, page: u64) -> PageAddress {
    PageAddress { block, page }
}

/// Two passes: the second has a page again, and one that has become zero.
fn sample() -> Vec<u8> {
    let mut stream = Vec::new();
    let mut writer = Writer::begin(&mut stream, &blocks()).unwrap();
    writer.begin_pass(false);
    for page in 0..10 {
        writer.page(at(0, page), Some(&[page as u8 + 1; PAGE_SIZE])).unwrap();
    }
    writer.page(at(1, 2), Some(&[0xff; PAGE_SIZE])).unwrap();
    writer.end_pass().unwrap();
    writer.begin_pass(true);
    writer.page(at(0, 3), Some(&[77; PAGE_SIZE])).unwrap();
    writer.page(at(1, 2), None).unwrap();
    writer.end_pass().unwrap();
    writer.finish(b"the state of KVM", b"of devices").unwrap();
    stream
}

#[test]
fn what_is_written_is_read_and_the_last_version_of_a_page_counts() {
    let mut memory = [vec![0_u8; 10], vec![0; 3]];
    let state = Reader::new(&sample()[..])
        .read(&blocks(), |at, content| {
            memory[usize::from(at.block)][at.page as usize] = content.map_or(0, |content| content[9]);
        })
        .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(memory, [vec![1, 2, 3, 77, 5, 6, 7, 8, 9, 10], vec![0, 0, 0]]);
    assert_eq!(
        (&state.machine[..], &state.devices[..]),
        (&b"the state of KVM"[..], &b"of devices"[..])
    );
}

#[test]
fn a_gateway_finds_every_page_and_the_end_in_it() {
    let stream = sample();
    let (mut records, mut events) = (Vec::new(), Vec::new());
    let mut parser = QemuParser::default();
    assert_eq!(parser.parse(&stream, true, &mut records, &mut events), stream.len());
    let pages = records
        .iter()
        .filter(|record| matches!(record, Record::Page(_)))
        .count();
    let zeroes = records
        .iter()
        .filter(|record| matches!(record, Record::Zero(_)))
        .count();
    assert_eq!((pages, zeroes), (12, 1));
    let has = |wanted: fn(&StreamEvent) -> bool| events.iter().any(wanted);
    assert!(
        !has(|event| matches!(event, StreamEvent::LostTrack { .. })),
        "{events:?}"
    );
    assert!(has(|event| matches!(event, StreamEvent::RoundEnd { .. })), "{events:?}");
    assert!(
        has(|event| matches!(event, StreamEvent::DeviceState { .. })),
        "{events:?}"
    );
    let eof = stream.len() - 1 - 5 - DESCRIPTION.len();
    assert!(
        events.contains(&StreamEvent::StreamEof { offset: eof as u64 }),
        "{events:?}"
    );
}

#[test]
fn a_stream_that_is_cut_anywhere_is_no_guest_and_nothing_may_follow_it() {
    let stream = sample();
    for len in (0..200)
        .chain((200..stream.len()).step_by(97))
        .chain(stream.len() - 120..stream.len())
    {
        let read = Reader::new(&stream[..len]).read(&blocks(), |_, _| {});
        assert!(matches!(read, Err(StreamError::Broken { .. })), "{len}");
    }
    let longer = [&stream[..], b"x"].concat();
    let read = Reader::new(&longer[..]).read(&blocks(), |_, _| {});
    assert!(matches!(read, Err(StreamError::GoesOn)));
}

#[test]
fn bytes_that_are_not_as_they_should_be_are_an_error_or_another_page_and_never_a_page_elsewhere() {
    let stream = sample();
    let (blocks, mut errors) = (blocks(), 0);
    for place in (0..400).chain(stream.len() - 140..stream.len()) {
        for change in [1, 0x10, 0x80, 0xff] {
            let mut stream = stream.clone();
            stream[place] ^= change;
            let read = Reader::new(&stream[..]).read(&blocks, |at, _| {
                assert!(at.page < blocks[usize::from(at.block)].pages());
            });
            errors += u32::from(read.is_err());
        }
    }
    assert!(errors > 400, "{errors}");
}

#[test]
fn another_machine_is_refused_with_what_differs() {
    let mut smaller = blocks();
    smaller[1].len -= 4096;
    let error = Reader::new(&sample()[..])
        .read(&smaller, |_, _| {})
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("ram1 of 12288 bytes") && error.contains("ram1 of 8192 bytes"),
        "{error}"
    );
    let mut qemu = sample();
    qemu[13..25].copy_from_slice(b"pc-i440fx-10");
    let error = Reader::new(&qemu[..])
        .read(&blocks(), |_, _| {})
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("pc-i440fx-10"), "{error}");
}
