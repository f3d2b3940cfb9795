//! How fast the parser marks pages, and how fast what it does not understand passes.
//!
//! Throughput is bytes of the vmm stream. Slices of 256 KiB, as the gateway reads them.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use longhaul::proto::page::PAGE_SIZE;
use longhaul::proto::vmm_stream::qemu::QemuParser;
use longhaul::proto::vmm_stream::{PageKind, Record, StreamEvent, write_page_header};

const SLICE: usize = 256 << 10;
const STREAM: usize = 64 << 20;
const RAM_ID: u32 = 2;

fn parse(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("vmm_stream/parse");
    let streams = [
        ("pages", ram_stream(push_page)),
        ("zero pages", ram_stream(push_zero)),
        (
            "half zero",
            ram_stream(|page, out| {
                if page % 2 == 0 {
                    push_page(page, out)
                } else {
                    push_zero(page, out)
                }
            }),
        ),
        ("device state", opaque_stream(&noise(STREAM))),
        ("device state of zeros", opaque_stream(&vec![0; STREAM])),
        (
            "device state of footers",
            opaque_stream(&[0x7e, 0, 0, 0, 3].repeat(STREAM / 5)),
        ),
        ("lost track", lost_stream(&noise(STREAM))),
        (
            "lost track in baits",
            lost_stream(&[0x7e, 0, 0, 0, 2, 2, 0, 0, 0, 2].repeat(STREAM / 10)),
        ),
        ("not QEMU", noise(STREAM)),
    ];
    for (name, stream) in &streams {
        group.throughput(Throughput::Bytes(stream.len() as u64));
        group.bench_with_input(BenchmarkId::from_parameter(name), stream, |bencher, stream| {
            let (mut records, mut events) = (Vec::new(), Vec::new());
            bencher.iter(|| parse_in_slices(stream, &mut records, &mut events));
        });
    }
    group.finish();
}

fn write_headers(criterion: &mut Criterion) {
    let stream = ram_stream(push_page);
    let (mut all, mut records, mut events) = (Vec::new(), Vec::new(), Vec::new());
    QemuParser::default().parse(&stream, true, &mut records, &mut events);
    all.append(&mut records);
    let mut group = criterion.benchmark_group("vmm_stream/write_page_header");
    group.throughput(Throughput::Elements(all.len() as u64));
    group.bench_function("headers", |bencher| {
        let mut out = Vec::with_capacity(16 * all.len());
        bencher.iter(|| {
            out.clear();
            for record in &all {
                if let Record::Page(page) = record {
                    write_page_header(*page, PageKind::Page, b"pc.ram", &mut out);
                }
            }
            black_box(&out);
        });
    });
    group.finish();
}

fn parse_in_slices(stream: &[u8], records: &mut Vec<Record>, events: &mut Vec<StreamEvent>) {
    let mut parser = QemuParser::default();
    let mut consumed = 0;
    while consumed < stream.len() {
        let end = stream.len().min(consumed + SLICE);
        records.clear();
        events.clear();
        consumed += parser.parse(&stream[consumed..end], end == stream.len(), records, events);
        black_box(&records);
    }
}

/// A stream of one RAM section whose records `push` makes, page by page.
fn ram_stream(push: impl Fn(u64, &mut Vec<u8>)) -> Vec<u8> {
    let mut out = ram_start();
    out.extend_from_slice(&[2, 0, 0, 0, 2]);
    let mut page = 0;
    while out.len() < STREAM {
        push(page, &mut out);
        page += 1;
    }
    out.extend_from_slice(&0x10u64.to_be_bytes());
    out
}

/// RAM is over and a device section has `body`.
fn opaque_stream(body: &[u8]) -> Vec<u8> {
    let mut out = ram_start();
    out.extend_from_slice(&[3, 0, 0, 0, 2]);
    end_ram_section(&mut out);
    out.extend_from_slice(b"\x04\0\0\0\x03\x05timer\0\0\0\0\0\0\0\x02");
    out.extend_from_slice(body);
    out
}

/// A RAM record that cannot be, and `body` behind it.
fn lost_stream(body: &[u8]) -> Vec<u8> {
    let mut out = ram_start();
    out.extend_from_slice(&[2, 0, 0, 0, 2]);
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(body);
    out
}

fn ram_start() -> Vec<u8> {
    const LENGTH: u64 = 1 << 40;
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    out.extend_from_slice(&(LENGTH | 0x04).to_be_bytes());
    out.extend_from_slice(b"\x06pc.ram");
    out.extend_from_slice(&LENGTH.to_be_bytes());
    end_ram_section(&mut out);
    out
}

fn end_ram_section(out: &mut Vec<u8>) {
    out.extend_from_slice(&0x10u64.to_be_bytes());
    out.push(0x7e);
    out.extend_from_slice(&RAM_ID.to_be_bytes());
}

fn push_page(page: u64, out: &mut Vec<u8>) {
    push_header(page, 0x08, out);
    out.extend_from_slice(&[0xa5; PAGE_SIZE]);
}

fn push_zero(page: u64, out: &mut Vec<u8>) {
    push_header(page, 0x02, out);
    out.push(0);
}

fn push_header(page: u64, flag: u64, out: &mut Vec<u8>) {
    if page == 0 {
        out.extend_from_slice(&flag.to_be_bytes());
        out.extend_from_slice(b"\x06pc.ram");
    } else {
        out.extend_from_slice(&(page << 12 | flag | 0x20).to_be_bytes());
    }
}

/// Bytes without a pattern, the same every time (xorshift).
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

criterion_group!(benches, parse, write_headers);
criterion_main!(benches);
