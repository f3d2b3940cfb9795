//! The parser on what real QEMU sends: the records give the stream back, and count as many pages as QEMU says it sent.
//!
//! Runs with the QEMU of the system's release and with the one from backports (`netem-scripts/qemu`), guests of SeaBIOS alone
//! or of a boot sector that writes to memory, under TCG.
#![expect(clippy::unwrap_used, reason = "what goes wrong here is to end the test")]

#[path = "../common/boot_sector.rs"]
mod boot_sector;
mod vm;

use longhaul::proto::page::PAGE_SIZE;
use longhaul::proto::vmm_stream::qemu::QemuParser;
use longhaul::proto::vmm_stream::{PageKind, Record, StreamEvent, write_page_header};
use proptest::prelude::*;
use serde_json::json;

use vm::{Capture, Vm, qemus, say};

#[test]
fn every_page_of_a_machine_is_marked() {
    for qemu in qemus() {
        for (machine, memory, more) in [
            ("pc", "64", &["-S"][..]),
            (
                "pc",
                "256",
                &["-device", "VGA,romfile=", "-device", "virtio-net-pci,romfile="],
            ),
            ("q35", "128", &["-S", "-device", "virtio-balloon-pci"]),
            (
                "q35",
                "64",
                &["-smp", "2", "-device", "qemu-xhci", "-device", "virtio-serial-pci"],
            ),
        ] {
            let capture = Vm::start(qemu, machine, &[&["-m", memory], more].concat()).migrate();
            let marked = capture.check();
            assert!(
                marked
                    .machine()
                    .is_some_and(|name| name.starts_with(&format!("pc-{}", machine.replace("pc", ""))))
            );
            assert_eq!(
                (marked.pages, marked.zeros),
                (capture.normal, capture.zero),
                "{qemu:?} {machine}"
            );
            assert!(marked.description_len() > 1000);
        }
    }
}

#[test]
fn machines_without_footers_configuration_or_description_are_marked() {
    for qemu in qemus() {
        let no_footers = ["-global", "migration.send-section-footer=off"];
        // Without the description too: QEMU 10.0 trips over its own JSON writer otherwise.
        let no_configuration = ["-global", "migration.send-configuration=off"];
        for (machine, more) in [
            ("q35", no_footers.to_vec()),
            ("pc,suppress-vmdesc=on", no_configuration.to_vec()),
            ("pc-i440fx-2.9", vec![]),
        ] {
            let capture = Vm::start(qemu, machine, &[&["-m", "64"], &more[..]].concat()).migrate();
            let marked = capture.check();
            assert_eq!(
                (marked.pages, marked.zeros),
                (capture.normal, capture.zero),
                "{qemu:?} {machine}"
            );
            assert_eq!(marked.description_len() == 0, machine.contains("suppress-vmdesc"));
        }
    }
}

#[test]
fn rounds_of_a_writing_guest_are_marked_with_their_ends() {
    for qemu in qemus() {
        let mut vm = Vm::start_writing_guest(qemu, "pc");
        let capture = vm.migrate_in_rounds(5);
        let marked = capture.check();
        assert_eq!((marked.pages, marked.zeros), (capture.normal, capture.zero), "{qemu:?}");
        assert!(
            marked.most_sends >= 4,
            "pages were sent up to {} times",
            marked.most_sends
        );
        // A page comes at most once a pass, and each end is noticed.
        assert!(marked.round_ends + 1 >= marked.most_sends, "{} ends", marked.round_ends);
        assert!(
            marked.round_ends <= capture.syncs,
            "{} ends, {} syncs",
            marked.round_ends,
            capture.syncs
        );
    }
}

#[test]
fn early_device_sections_are_passed_over() {
    for qemu in qemus() {
        let args = [
            "-m",
            "64M,slots=1,maxmem=512M",
            "-object",
            "memory-backend-ram,id=m,size=64M",
        ];
        let device = ["-device", "virtio-mem-pci,memdev=m,id=vm,requested-size=32M"];
        let capture = Vm::start(qemu, "q35", &[&args[..], &device[..]].concat()).migrate();
        let marked = capture.check();
        // Since QEMU 8.0 they have no length; what follows RAM's START behind one is confirmed by two records that stay bytes.
        let early = capture.main.windows(23).any(|name| name == b"virtio-mem-device-early");
        let missed = capture.normal + capture.zero - marked.pages - marked.zeros;
        assert_eq!(missed, if early { 2 } else { 0 }, "{qemu:?}");
    }
}

#[test]
fn with_multifd_the_main_stream_passes() {
    for qemu in qemus() {
        let mut vm = Vm::start_writing_guest(qemu, "pc");
        vm.set_capability("multifd");
        vm.execute("migrate-set-parameters", json!({"multifd-channels": 2}));
        vm.channels = 3;
        let capture = vm.migrate_in_rounds(3);
        let marked = capture.check();
        assert_eq!(marked.pages, 0);
        for channel in &capture.others {
            let parsed = Marked::of(channel, usize::MAX);
            assert!(matches!(parsed.events[..], [StreamEvent::LostTrack { offset: 0, .. }]));
        }
    }
}

#[test]
fn compressed_pages_pass_as_bytes() {
    for qemu in qemus() {
        for capability in ["xbzrle", "compress"] {
            let mut vm = Vm::start_writing_guest(qemu, "q35");
            if !vm.has_capability(capability) {
                say(&format!("skipped: {} has no {capability}", qemu.display()));
                continue;
            }
            vm.set_capability(capability);
            let capture = vm.migrate_in_rounds(5);
            let marked = capture.check();
            assert!(capture.compressed > 0, "{capability} compressed nothing");
            assert_eq!(marked.pages, capture.normal, "{qemu:?} {capability}");
            if capability == "xbzrle" {
                assert_eq!(marked.zeros, capture.zero, "{qemu:?}");
            } else {
                // QEMU counts a zero page again whenever it collects from the thread that found it.
                assert!(marked.zeros <= capture.zero, "{qemu:?}");
            }
        }
    }
}

/// A change to a captured stream. Places are fractions of its length, in 2^-32.
#[derive(Clone, Debug)]
enum Mutation {
    Flip(u32, u8),
    Truncate(u32),
    Insert(u32, Vec<u8>),
    Remove(u32, usize),
}

impl Mutation {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let place = |at: u32| ((bytes.len() as u64 * u64::from(at)) >> 32) as usize;
        match self {
            Self::Flip(at, bits) => {
                let at = place(*at);
                bytes[at] ^= bits;
            }
            Self::Truncate(at) => bytes.truncate(place(*at).max(1)),
            Self::Insert(at, more) => {
                let at = place(*at);
                bytes.splice(at..at, more.iter().copied());
            }
            Self::Remove(at, len) => {
                let at = place(*at).max(1);
                let end = bytes.len().min(at + len);
                bytes.drain(at..end);
            }
        }
    }
}

fn mutation() -> impl Strategy<Value = Mutation> {
    // Half of the changes hit the headers at the start, where a stream of megabytes has most of its structure.
    let at = || prop_oneof![any::<u32>(), 0u32..1 << 20];
    prop_oneof![
        (at(), 1u8..).prop_map(|(at, bits)| Mutation::Flip(at, bits)),
        at().prop_map(Mutation::Truncate),
        (at(), prop::collection::vec(any::<u8>(), 1..40)).prop_map(|(at, more)| Mutation::Insert(at, more)),
        (at(), 1usize..5000).prop_map(|(at, len)| Mutation::Remove(at, len)),
    ]
}

#[test]
fn no_damage_to_a_real_stream_costs_a_byte() {
    for qemu in qemus() {
        let capture = Vm::start_writing_guest(qemu, "pc").migrate_in_rounds(3).main;
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(48));
        let input = (prop::collection::vec(mutation(), 1..6), 1usize..100_000);
        runner
            .run(&input, |(mutations, slice)| {
                let mut bytes = capture.clone();
                mutations.iter().for_each(|mutation| mutation.apply(&mut bytes));
                let (whole, sliced) = (Marked::of(&bytes, usize::MAX), Marked::of(&bytes, slice));
                prop_assert_eq!((whole.pages, whole.zeros), (sliced.pages, sliced.zeros));
                prop_assert_eq!(whole.events, sliced.events);
                Ok(())
            })
            .unwrap();
    }
}

/// What the parser made of a stream.
struct Marked {
    pages: u64,
    zeros: u64,
    /// How often the page was sent that was sent most often.
    most_sends: u64,
    round_ends: u64,
    events: Vec<StreamEvent>,
}

impl Marked {
    /// Parses `stream` as a gateway does, `slice` bytes at a time, and checks that the records give it back.
    #[track_caller]
    fn of(stream: &[u8], slice: usize) -> Self {
        let mut parser = QemuParser::default();
        let mut marked = Self {
            pages: 0,
            zeros: 0,
            most_sends: 0,
            round_ends: 0,
            events: Vec::new(),
        };
        let mut sends = std::collections::HashMap::new();
        let (mut records, mut rebuilt) = (Vec::new(), Vec::with_capacity(stream.len()));
        let (mut consumed, mut offered) = (0, 0usize);
        while offered < stream.len() {
            offered = stream.len().min(offered.saturating_add(slice));
            let end = offered == stream.len();
            records.clear();
            let took = parser.parse(&stream[consumed..offered], end, &mut records, &mut marked.events);
            for record in &records {
                let len = record.stream_len(parser.blocks());
                let (page, kind, content) = match *record {
                    Record::Bytes { .. } | Record::Chunk { .. } => {
                        rebuilt.extend_from_slice(&stream[consumed..consumed + len]);
                        consumed += len;
                        continue;
                    }
                    Record::Page(page) => (page, PageKind::Page, PAGE_SIZE),
                    Record::Zero(page) => (page, PageKind::Zero, 1),
                };
                match kind {
                    PageKind::Page => marked.pages += 1,
                    PageKind::Zero => marked.zeros += 1,
                }
                let count: &mut u64 = sends.entry(page.at).or_default();
                *count += 1;
                marked.most_sends = marked.most_sends.max(*count);
                let name = &parser.blocks()[usize::from(page.at.block)].name;
                write_page_header(page, kind, name, &mut rebuilt);
                rebuilt.extend_from_slice(&stream[consumed + len - content..consumed + len]);
                consumed += len;
            }
            assert!(took <= offered && offered - consumed <= QemuParser::MAX_PENDING);
        }
        assert!(rebuilt == stream, "the records do not give the stream back");
        marked.round_ends = marked
            .events
            .iter()
            .filter(|e| matches!(e, StreamEvent::RoundEnd { .. }))
            .count() as u64;
        marked
    }

    fn machine(&self) -> Option<&str> {
        self.events.iter().find_map(|event| match event {
            StreamEvent::Machine(name) => Some(name.as_str()),
            _ => None,
        })
    }

    fn description_len(&self) -> u32 {
        let len = |event: &StreamEvent| match *event {
            StreamEvent::Description { len, .. } => Some(len),
            _ => None,
        };
        self.events.iter().find_map(len).unwrap_or(0)
    }
}

impl Capture {
    /// Parses the main stream in two ways and checks what holds for every migration that worked.
    #[track_caller]
    fn check(&self) -> Marked {
        let marked = Marked::of(&self.main, usize::MAX);
        assert_eq!(marked.events, Marked::of(&self.main, 1500).events);
        let mut device_state = None;
        let mut eof = None;
        let mut end = None;
        for event in &marked.events {
            match *event {
                StreamEvent::LostTrack { offset, reason } => panic!("lost track at {offset}: {reason}"),
                StreamEvent::DeviceState { offset } => device_state = Some(offset),
                StreamEvent::StreamEof { offset } => (eof, end) = (Some(offset), Some(offset + 1)),
                StreamEvent::Description { offset, len } => end = Some(offset + u64::from(len)),
                _ => {}
            }
        }
        assert!(device_state.is_some() && device_state < eof, "{device_state:?} {eof:?}");
        assert_eq!(
            end,
            Some(self.main.len() as u64),
            "the stream ends with its description"
        );
        marked
    }
}
