//! Room for the packets in flight: one ring of bytes, taken and touched at the start.
//!
//! A page that is first touched under load costs milliseconds on a virtual machine, which the link would show as delay.

/// Longest frame a TUN device hands out: offload header and an IP packet.
pub(super) const MAX_FRAME_BYTES: usize = super::segments::VNET_HEADER_BYTES + 65_535;

/// A ring that gives out one contiguous slot after the other and takes them back in the same order.
#[derive(Debug)]
pub(super) struct Arena {
    bytes: Box<[u8]>,
    /// Where the next slot begins, unless it has to wrap.
    head: usize,
    /// Where the oldest slot begins.
    tail: usize,
    slots: usize,
}

/// A frame in an [`Arena`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Slot {
    start: usize,
    end: usize,
}

impl Arena {
    /// A ring that holds `bytes` of frames whatever their lengths.
    pub(super) fn new(bytes: usize) -> Self {
        // Not zero, so that the allocator cannot hand out untouched pages. One frame's length may lie idle at the end of
        // the ring, another between head and tail.
        let bytes = vec![0xa5; bytes + 2 * (MAX_FRAME_BYTES + 1)].into_boxed_slice();
        Self {
            bytes,
            head: 0,
            tail: 0,
            slots: 0,
        }
    }

    /// [`MAX_FRAME_BYTES`] to write the next frame to, or `None` when the ring is full.
    pub(super) fn vacant(&mut self) -> Option<&mut [u8]> {
        if self.slots == 0 {
            (self.head, self.tail) = (0, 0);
        }
        let wrapped = self.head < self.tail;
        if !wrapped && self.bytes.len() - self.head < MAX_FRAME_BYTES {
            if self.tail <= MAX_FRAME_BYTES {
                return None;
            }
            self.head = 0;
        } else if wrapped && self.tail - self.head <= MAX_FRAME_BYTES {
            return None;
        }
        Some(&mut self.bytes[self.head..self.head + MAX_FRAME_BYTES])
    }

    /// The frame of `length` that was just written to [`Arena::vacant`].
    pub(super) fn written(&self, length: usize) -> &[u8] {
        &self.bytes[self.head..self.head + length]
    }

    /// Keeps that frame.
    pub(super) fn keep(&mut self, length: usize) -> Slot {
        let slot = Slot {
            start: self.head,
            end: self.head + length,
        };
        if self.slots == 0 {
            self.tail = slot.start;
        }
        self.head = slot.end;
        self.slots += 1;
        slot
    }

    /// The frame in `slot`.
    pub(super) fn frame(&self, slot: Slot) -> &[u8] {
        &self.bytes[slot.start..slot.end]
    }

    /// Takes back `slot`, the oldest one kept.
    pub(super) fn release(&mut self, slot: Slot) {
        self.tail = slot.end;
        self.slots -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::wan::random::Random;

    #[test]
    fn frames_come_back_as_they_went_in_whatever_their_lengths() {
        let mut random = Random::new(1, 0);
        let mut arena = Arena::new(300_000);
        let mut kept: VecDeque<(Slot, u8, usize)> = VecDeque::new();
        let mut held = 0;
        for round in 0..5_000_u32 {
            let length = 1 + random.bits() as usize % if round % 3 == 0 { MAX_FRAME_BYTES } else { 1500 };
            match arena.vacant() {
                Some(room) => {
                    room[..length].fill(round as u8);
                    assert!(arena.written(length).iter().all(|byte| *byte == round as u8));
                    kept.push_back((arena.keep(length), round as u8, length));
                    held += length;
                }
                None => assert!(held > 300_000 - MAX_FRAME_BYTES, "refused with {held} bytes held"),
            }
            while held > 300_000 || (!kept.is_empty() && random.bits().is_multiple_of(3)) {
                let (slot, fill, length) = kept.pop_front().expect("something is held");
                let frame = arena.frame(slot);
                assert!(
                    frame.len() == length && frame.iter().all(|byte| *byte == fill),
                    "round {round}"
                );
                arena.release(slot);
                held -= length;
            }
        }
    }

    #[test]
    fn a_full_ring_refuses_and_a_drained_one_takes_again() {
        let mut arena = Arena::new(0);
        let mut slots = VecDeque::new();
        while arena.vacant().is_some() {
            slots.push_back(arena.keep(MAX_FRAME_BYTES));
        }
        assert!(!slots.is_empty());
        for slot in slots {
            arena.release(slot);
        }
        assert!(arena.vacant().is_some());
    }
}
