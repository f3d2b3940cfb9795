//! Bytes per second through the wire format: frames (the data path) and control messages (an acknowledgement for each frame).
//!
//! A frame's payload is shared and not copied, so its figure is lane bytes per second of header work alone.

use std::hint::black_box;

use bytes::{Bytes, BytesMut};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use longhaul::proto::page::MigrationId;
use longhaul::proto::wire::message::{Held, decode, encode};
use longhaul::proto::wire::{Frame, FrameHeader, FrameKind, Offer, Request, SessionMessage};

fn frame(payload: usize) -> Frame {
    Frame {
        header: FrameHeader {
            kind: FrameKind::Reduced,
            last: false,
            held: false,
            migration: MigrationId([7; 16]),
            epoch: 1,
            sequence: 1 << 20,
            stream_offset: 1 << 40,
            stream_bytes: 1 << 20,
        },
        payload: vec![0xa5; payload].into(),
    }
}

fn frames(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("wire/frame");
    for payload in [4 << 10, 256 << 10, 1 << 20] {
        let frame = frame(payload);
        let lane: Bytes = [frame.encode_header(), frame.payload.clone()].concat().into();
        group.throughput(Throughput::Bytes(frame.lane_bytes()));
        group.bench_function(format!("encode/{payload}"), |bencher| {
            bencher.iter(|| black_box(&frame).encode_header());
        });
        group.bench_function(format!("decode/{payload}"), |bencher| {
            bencher.iter(|| Frame::decode(black_box(lane.clone())).expect("it was encoded above"));
        });
    }
    group.finish();
}

fn messages(criterion: &mut Criterion) {
    // After a burst of losses: a thousand frames with a gap behind every tenth.
    let beyond = (0..100).map(|gap| (10 * gap + 1001, 10 * gap + 1010)).collect();
    let ack = SessionMessage::Ack {
        held: Held { next: 1000, beyond },
        vmm_bytes: 1 << 40,
        queued_bytes: 1 << 20,
    };
    let offer = Request::Open(Offer {
        migration: MigrationId([7; 16]),
        vm: "db-1".to_owned(),
        inventory: "{\"id\":\"virtio-net\"},".repeat(1000),
        was_running: true,
        reduce: true,
        dictionary_pages: 1 << 20,
        regions: 1 << 10,
    });
    let mut group = criterion.benchmark_group("wire/message");
    let bytes = encode(&ack).expect("it is short");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("encode/ack with 100 gaps", |bencher| {
        bencher.iter(|| encode(black_box(&ack)))
    });
    group.bench_function("decode/ack with 100 gaps", |bencher| {
        let received = || BytesMut::from(&bytes[..]);
        bencher.iter_batched(
            received,
            |mut received| decode::<SessionMessage>(&mut received),
            BatchSize::SmallInput,
        );
    });
    let bytes = encode(&offer).expect("it is within the limit");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("encode/offer", |bencher| bencher.iter(|| encode(black_box(&offer))));
    group.bench_function("decode/offer", |bencher| {
        let received = || BytesMut::from(&bytes[..]);
        bencher.iter_batched(
            received,
            |mut received| decode::<Request>(&mut received),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, frames, messages);
criterion_main!(benches);
