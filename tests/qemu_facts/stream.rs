//! Where the parts of a recorded stream are.

use longhaul::proto::vmm_stream::qemu::QemuParser;
use longhaul::proto::vmm_stream::{Record, StreamEvent};

/// The part of a stream in which the guest does not run any more. All places are offsets into it.
pub(crate) struct Tail {
    /// The record of the last page that was sent in full.
    pub(crate) last_page: usize,
    /// Device sections, from the first byte behind memory on.
    pub(crate) sections: Vec<usize>,
    /// The EOF byte.
    pub(crate) eof: usize,
}

impl Tail {
    pub(crate) fn of(stream: &[u8]) -> Tail {
        let mut parser = QemuParser::default();
        let (mut records, mut events) = (Vec::new(), Vec::new());
        parser.parse(stream, true, &mut records, &mut events);
        let (mut place, mut last_page) = (0, None);
        for record in &records {
            if let Record::Page(_) = record {
                last_page = Some(place);
            }
            place += record.stream_len(parser.blocks());
        }
        let (mut devices, mut eof) = (None, None);
        for event in events {
            match event {
                StreamEvent::DeviceState { offset } => devices = Some(usize::try_from(offset).unwrap()),
                StreamEvent::StreamEof { offset } => eof = Some(usize::try_from(offset).unwrap()),
                _ => {}
            }
        }
        let (devices, eof) = (devices.unwrap(), eof.unwrap());
        assert!(stream[eof] == 0 && ends_in_a_description(stream));
        Tail {
            last_page: last_page.unwrap(),
            sections: sections(stream, devices, eof),
            eof,
        }
    }
}

/// Sections with whole devices: type 4, id, name and content, and a footer, which is 0x7e and the id again.
fn sections(stream: &[u8], first: usize, eof: usize) -> Vec<usize> {
    let (mut sections, mut start) = (Vec::new(), first);
    while start < eof {
        assert_eq!(stream[start], 4, "a device section at {start}");
        sections.push(start);
        let footer = [&[0x7e], &stream[start + 1..start + 5]].concat();
        start = (start + 5..=eof - 5)
            .find(|&at| stream[at..].starts_with(&footer) && (at + 5 == eof || stream[at + 5] == 4))
            .expect("a section ends")
            + 5;
    }
    sections
}

/// Whether everything is there: the description of the device state is JSON at the end, type 6, length, text.
pub(crate) fn ends_in_a_description(stream: &[u8]) -> bool {
    (0..stream.len().saturating_sub(5)).rev().any(|place| {
        let length = u32::from_be_bytes(stream[place + 1..place + 5].try_into().unwrap()) as usize;
        stream[place] == 6 && place + 5 + length == stream.len() && stream[place + 5] == b'{'
    })
}
