//! The encoder's threads.
//!
//! ```text
//! chunks → drafter: parse, digest, classify, deltas ─┬→ coder 0: lz4, zstd ─┬→ in order → session
//!     ▲                                              └→ coder n             ┤
//!     └────────────── what coding has shown ────────────────────────────────┘
//! ```
//!
//! One thread cannot do all of it where zstd is to fill a fast link. What depends on the batches before is the drafter's; a coder has its own zstd
//! frames, and takes the next draft when it is free.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Scope};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::super::clock;
use super::super::leftover::Leftover;
use super::Shared;
use crate::proto::page::ByteRate;
use crate::proto::precopy::EncoderMeter;
use crate::proto::reduce::{Coded, Coder, Effort, EffortControl};
use crate::proto::session::{EncodedFrame, Encoder, FrameDraft, StreamSummary};
use crate::proto::wire::hello;

/// Coders of a stream over a link of this rate, for a peer that speaks this version of the wire format: at most half of the CPUs, since QEMU, QUIC
/// and the drafter want some too.
pub(crate) fn coders(version: u16, rate: Option<ByteRate>) -> usize {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let most = if version < hello::CODERS { 1 } else { cpus / 2 };
    Effort::coders_for_link(rate).min(most).max(1)
}

/// A draft on its way to a coder.
struct Work {
    sequence: u64,
    draft: FrameDraft,
    last: bool,
}

/// What a coder tells the drafter.
struct Finding {
    coded: Option<Coded>,
    stream_bytes: u32,
    took: Duration,
}

/// Where coders take their work from. It is theirs alone, so that the drafter does not wait for a queue that nobody serves.
type Queue = Arc<Mutex<Receiver<Work>>>;

/// What the threads of one stream share.
struct Line<'a> {
    shared: &'a Shared,
    findings: Mutex<Vec<Finding>>,
    in_order: Mutex<InOrder>,
}

/// Frames that are ready before one that precedes them: no more than the backlog lets the reader take.
#[derive(Default)]
struct InOrder {
    next: u64,
    early: BTreeMap<u64, (EncodedFrame, bool)>,
}

/// The drafter's thread, until the reader has ended and all frames are in the session.
pub(super) fn encode(
    shared: &Shared,
    mut chunks: mpsc::Receiver<Bytes>,
    mut encoder: Encoder,
    effort: Effort,
    coders: usize,
) -> StreamSummary {
    let _guard = StopOnPanic(shared);
    // Each coder has one to go on with.
    let (to_code, queue) = sync_channel(coders);
    let line = Line {
        shared,
        findings: Mutex::default(),
        in_order: Mutex::default(),
    };
    let mut drafter = Drafter::new(&line, effort, coders);
    encoder.set_effort(effort);
    let summary = thread::scope(|scope| {
        let queue = Arc::new(Mutex::new(queue));
        let started = (0..coders)
            .filter(|&number| line.start(scope, Arc::clone(&queue), number))
            .count();
        assert!(
            started > 0,
            "the system has no thread for a migration that it has begun"
        );
        drafter.coders = started as u32;
        drop(queue);
        let (mut drafts, mut sequence) = (Vec::new(), 0);
        let mut send = |drafts: &mut Vec<FrameDraft>, end: bool| {
            let count = drafts.len();
            for (at, draft) in drafts.drain(..).enumerate() {
                let last = end && at + 1 == count;
                // Refused only where every coder has panicked, which the scope tells.
                let _ = to_code.send(Work { sequence, draft, last });
                sequence += 1;
            }
        };
        while let Some(chunk) = chunks.blocking_recv() {
            drafter.learn(&mut encoder);
            let began = clock::now();
            encoder.draft(&chunk, &mut drafts);
            if chunks.is_empty() {
                encoder.flush(&mut drafts);
            }
            drafter.drafted(&mut encoder, chunk.len(), clock::now().saturating_duration_since(began));
            send(&mut drafts, false);
        }
        let summary = encoder.end(&mut drafts);
        send(&mut drafts, true);
        drop(to_code);
        summary
    });
    drafter.learn(&mut encoder);
    if let Some(reducer) = encoder.into_reducer() {
        shared.leftover.put(Leftover::of_reducer(reducer));
    }
    summary
}

/// What the drafter knows of the pace.
struct Drafter<'a> {
    line: &'a Line<'a>,
    coders: u32,
    control: EffortControl,
    effort: Effort,
    drafting: EncoderMeter,
    coding: EncoderMeter,
    /// Vmm bytes a second that all coders take.
    coding_rate: Option<ByteRate>,
    /// Of each coder, since the effort was last chosen.
    coded_for: Duration,
}

impl<'a> Drafter<'a> {
    fn new(line: &'a Line<'a>, effort: Effort, coders: usize) -> Self {
        Self {
            line,
            coders: coders as u32,
            control: EffortControl::new(clock::now(), effort),
            effort,
            drafting: EncoderMeter::default(),
            coding: EncoderMeter::default(),
            coding_rate: None,
            coded_for: Duration::ZERO,
        }
    }

    fn learn(&mut self, encoder: &mut Encoder) {
        let findings = std::mem::take(&mut *self.line.findings.lock().unwrap_or_else(PoisonError::into_inner));
        for finding in findings {
            self.coding_rate = self.coding.observe(finding.stream_bytes.into(), finding.took);
            self.coded_for += finding.took / self.coders;
            if let Some(coded) = finding.coded {
                encoder.learn(coded);
            }
        }
        *self.line.shared.pages() = encoder.pages();
    }

    fn drafted(&mut self, encoder: &mut Encoder, bytes: usize, took: Duration) {
        let shared = self.line.shared;
        let all_coders = |rate: ByteRate| ByteRate(rate.0.saturating_mul(self.coders.into()));
        let coding = self.coding_rate.map(all_coders);
        let rates = self.drafting.observe(bytes as u64, took).into_iter().chain(coding);
        if let Some(rate) = rates.min() {
            shared.encoder_rate.store(rate.0, Ordering::Relaxed);
        }
        let starved = shared.starved.swap(false, Ordering::Relaxed);
        let coded_for = std::mem::take(&mut self.coded_for);
        let effort = self.control.observe(clock::now(), coded_for, starved);
        if effort != self.effort {
            tracing::debug!(%effort, before = %self.effort, "compression");
            self.effort = effort;
            encoder.set_effort(effort);
        }
    }
}

impl Line<'_> {
    fn start<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, queue: Queue, number: usize) -> bool {
        thread::Builder::new()
            .name(format!("coder {number}"))
            .spawn_scoped(scope, move || {
                let _guard = StopOnPanic(self.shared);
                self.code(&queue, &mut Coder::new(number));
            })
            .is_ok()
    }

    fn code(&self, queue: &Queue, coder: &mut Coder) {
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(Work { sequence, draft, last }) = next else {
                return;
            };
            let began = clock::now();
            let (frame, coded) = draft.code(coder);
            let pages = coded.as_ref().map_or(0, |coded| coded.stats().pages.sum());
            self.shared.counted_pages.fetch_add(pages, Ordering::AcqRel);
            let finding = Finding {
                coded,
                stream_bytes: frame.stream_bytes,
                took: clock::now().saturating_duration_since(began),
            };
            // Held until they are in the session, or those that follow might overtake them.
            let mut in_order = self.in_order.lock().unwrap_or_else(PoisonError::into_inner);
            in_order.put(sequence, frame, last, |frame, last| self.shared.push(frame, last));
            drop(in_order);
            self.findings
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(finding);
        }
    }
}

impl InOrder {
    /// Gives `next` the frame and those that have waited for it, or keeps it.
    fn put(&mut self, sequence: u64, frame: EncodedFrame, last: bool, mut next: impl FnMut(EncodedFrame, bool)) {
        self.early.insert(sequence, (frame, last));
        while let Some((frame, last)) = self.early.remove(&self.next) {
            self.next += 1;
            next(frame, last);
        }
    }
}

/// Without one of its threads a stream would wait for ever.
struct StopOnPanic<'a>(&'a Shared);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::reduce::MAX_CODERS;
    use crate::proto::wire::FrameKind;

    #[test]
    fn frames_leave_in_the_order_of_their_drafts_whichever_coder_is_first() {
        let mut in_order = InOrder::default();
        let mut left = Vec::new();
        for sequence in [2_u64, 0, 3, 1, 5, 4] {
            let frame = EncodedFrame {
                kind: FrameKind::Plain,
                payload: Bytes::new(),
                stream_bytes: sequence as u32,
                held: false,
            };
            in_order.put(sequence, frame, sequence == 5, |frame, last| {
                left.push((frame.stream_bytes, last));
            });
        }
        let expected: Vec<(u32, bool)> = (0..6).map(|sequence| (sequence, sequence == 5)).collect();
        assert_eq!(left, expected);
    }

    #[test]
    fn an_older_peer_gets_the_frames_of_one_coder() {
        assert_eq!(coders(hello::CODERS - 1, None), 1);
        assert!((1..=MAX_CODERS).contains(&coders(hello::VERSION, None)));
    }
}
