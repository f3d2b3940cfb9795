//! The start of a stream: its header, and the configuration section if there is one (`migration/savevm.c`).

use super::super::{LostTrackReason, Output, PAGE_BITS, StreamEvent};
use super::{QemuParser, State, Step, Then, element};

/// Longest machine type that is believed.
const MAX_MACHINE: u32 = 255;

impl QemuParser {
    pub(super) fn file_header(&mut self, bytes: &[u8], out: &mut Output<'_>) -> Step {
        let wanted = &element::FILE_HEADER[..bytes.len().min(element::FILE_HEADER.len())];
        if !bytes.starts_with(wanted) {
            return self.give_up(LostTrackReason::NotQemu, out);
        }
        if wanted.len() < element::FILE_HEADER.len() {
            return Step::More;
        }
        self.state = State::Configuration;
        self.take(wanted.len(), out)
    }

    pub(super) fn configuration(&mut self, bytes: &[u8], out: &mut Output<'_>) -> Step {
        if bytes[0] != element::CONFIGURATION {
            self.state = State::Element;
            return Step::Took(0);
        }
        let Some(len) = element::be32(bytes, 1) else {
            return Step::More;
        };
        if !(1..=MAX_MACHINE).contains(&len) {
            return self.lose(LostTrackReason::Configuration, out);
        }
        let Some(name) = bytes.get(5..5 + len as usize) else {
            return Step::More;
        };
        let Some(name) = str::from_utf8(name)
            .ok()
            .filter(|name| name.bytes().all(|byte| element::is_printable(&byte)))
        else {
            return self.lose(LostTrackReason::Configuration, out);
        };
        out.events.push(StreamEvent::Machine(name.to_owned()));
        self.state = State::Subsections;
        self.take(5 + name.len(), out)
    }

    pub(super) fn subsection(&mut self, bytes: &[u8], out: &mut Output<'_>) -> Step {
        if bytes[0] != element::SUBSECTION {
            self.state = State::Element;
            return Step::Took(0);
        }
        let Some(&n) = bytes.get(1) else { return Step::More };
        let header = 2 + usize::from(n) + 4;
        if bytes.len() < header {
            return Step::More;
        }
        match &bytes[2..header - 4] {
            b"configuration/target-page-bits" => {
                let Some(bits) = element::be32(bytes, header) else {
                    return Step::More;
                };
                if bits != PAGE_BITS {
                    return self.give_up(LostTrackReason::TargetPageSize, out);
                }
                self.take(header + 4, out)
            }
            b"configuration/capabilities" => {
                let Some(left) = element::be32(bytes, header) else {
                    return Step::More;
                };
                self.state = State::CapabilityNames { left };
                self.take(header + 4, out)
            }
            b"configuration/uuid" => {
                self.state = State::Skip {
                    left: 16,
                    then: Then::Subsections,
                };
                self.take(header, out)
            }
            _ => self.lose(LostTrackReason::Configuration, out),
        }
    }

    pub(super) fn capability_name(&mut self, left: u32, bytes: &[u8], out: &mut Output<'_>) -> Step {
        if left == 0 {
            self.state = State::Subsections;
            return Step::Took(0);
        }
        let len = 1 + usize::from(bytes[0]);
        if bytes.len() < len {
            return Step::More;
        }
        self.state = State::CapabilityNames { left: left - 1 };
        self.take(len, out)
    }
}
