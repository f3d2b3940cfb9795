//! Bytes of vmm stream per second through each stage of reduction, on one core.
//!
//! Time is the thread's processor time: other work on the machine and waiting for a disk do not count.
//!
//! `mixed` is a quarter incompressible, half pages of this program's own file, an eighth pages seen before, and an eighth zero
//! pages sent as pages; `noise` is incompressible. `again` sends every page of `mixed` a second time, unchanged.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use longhaul::proto::page::{PAGE_SIZE, PageAddress, PageDigest};
use longhaul::proto::reduce::{Batch, DictionaryLimits, Reducer, Restorer, batches, digest_many};
use longhaul::proto::vmm_stream::{PageRecord, Record};
use longhaul::store::spill::SpillShelf;
use rustix::time::{ClockId, clock_gettime};

const PAGES: usize = 8192;

struct Stream {
    bytes: Vec<u8>,
    records: Vec<Record>,
    names: Vec<Vec<u8>>,
}

impl Stream {
    fn of(pages: &[[u8; PAGE_SIZE]]) -> Self {
        let mut stream = Self {
            bytes: Vec::new(),
            records: Vec::new(),
            names: vec![b"pc.ram".to_vec()],
        };
        for (page, content) in (0_u64..).zip(pages) {
            stream
                .bytes
                .extend_from_slice(&((page * PAGE_SIZE as u64) | 0x28).to_be_bytes());
            stream.bytes.extend_from_slice(content);
            let record = PageRecord {
                at: PageAddress { block: 0, page },
                continues: true,
            };
            stream.records.push(Record::Page(record));
        }
        stream
    }

    fn batches(&self) -> Vec<(Batch<'_>, Vec<PageDigest>)> {
        batches(&self.bytes, &self.records, &self.names)
            .map(|batch| {
                let mut digests = Vec::new();
                batch.digest_pages(&mut digests);
                (batch, digests)
            })
            .collect()
    }
}

fn noise(seed: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut page);
    page
}

fn mixed() -> Vec<[u8; PAGE_SIZE]> {
    let program = std::fs::read(std::env::current_exe().expect("a program knows its file")).expect("and can read it");
    let mut program = program.as_chunks::<PAGE_SIZE>().0.iter().cycle();
    let mut pages: Vec<[u8; PAGE_SIZE]> = Vec::with_capacity(PAGES);
    for number in 0..PAGES {
        // Runs of 16, as memory has them.
        pages.push(match number / 16 % 8 {
            0 | 4 => noise(number as u64),
            2 if number > 1024 => pages[number - 1024],
            6 => [0; PAGE_SIZE],
            _ => *program.next().expect("a cycle has no end"),
        });
    }
    pages
}

fn limits() -> DictionaryLimits {
    DictionaryLimits::new(2 * PAGES as u32, 64).expect("the limits are small")
}

fn encode_all(reducer: &mut Reducer, batches: &[(Batch<'_>, Vec<PageDigest>)], payload: &mut Vec<u8>) -> u64 {
    batches
        .iter()
        .map(|(batch, digests)| {
            payload.clear();
            reducer.encode(batch, digests, payload).bytes_out
        })
        .sum()
}

fn payloads(reducer: &mut Reducer, batches: &[(Batch<'_>, Vec<PageDigest>)]) -> Vec<Vec<u8>> {
    batches
        .iter()
        .map(|(batch, digests)| {
            let mut payload = Vec::new();
            reducer.encode(batch, digests, &mut payload);
            payload
        })
        .collect()
}

fn restore_all(restorer: &mut Restorer<SpillShelf>, payloads: &[Vec<u8>], out: &mut Vec<u8>) {
    for payload in payloads {
        out.clear();
        restorer.restore(payload, out).expect("the reducer made the payload");
    }
}

fn shelf(pages_in_memory: u32) -> SpillShelf {
    SpillShelf::new(&std::env::temp_dir(), limits().slots(), pages_in_memory).expect("there is room for a spill file")
}

fn digests(group: &mut BenchmarkGroup<'_, CpuTime>, stream: &Stream) {
    let pages: Vec<&[u8; PAGE_SIZE]> = stream
        .bytes
        .chunks_exact(8 + PAGE_SIZE)
        .map(|record| record[8..].first_chunk().expect("a record is a header and a page"))
        .collect();
    group.bench_function("digest, one page at a time", |bencher| {
        bencher.iter(|| pages.iter().fold(0, |sum, page| sum ^ PageDigest::of(*page).0[0]));
    });
    group.bench_function("digest, many pages at once", |bencher| {
        let mut digests = Vec::new();
        bencher.iter(|| {
            digests.clear();
            digest_many(&pages, &mut digests);
            black_box(digests.last().copied())
        });
    });
    group.bench_function("cut into batches", |bencher| {
        bencher.iter(|| {
            batches(&stream.bytes, &stream.records, &stream.names)
                .map(|batch| batch.bytes().len())
                .sum::<usize>()
        });
    });
}

fn reduce(criterion: &mut Criterion<CpuTime>) {
    let (mixed, noise) = (
        Stream::of(&mixed()),
        Stream::of(&(0..PAGES as u64).map(noise).collect::<Vec<_>>()),
    );
    let mut group = criterion.benchmark_group("reduce");
    group
        .throughput(Throughput::Bytes(mixed.bytes.len() as u64))
        .sample_size(20);
    digests(&mut group, &noise);
    let mut payload = Vec::new();
    let mut out = Vec::new();
    for (name, stream) in [("mixed", &mixed), ("noise", &noise)] {
        let batches = stream.batches();
        let sent = encode_all(&mut Reducer::new(limits(), limits().slots()), &batches, &mut payload);
        eprintln!("{name}: {} bytes become {sent}", stream.bytes.len());
        group.bench_function(format!("encode {name}"), |bencher| {
            let fresh = || Reducer::new(limits(), limits().slots());
            bencher.iter_batched_ref(
                fresh,
                |reducer| encode_all(reducer, &batches, &mut payload),
                BatchSize::PerIteration,
            );
        });
        let first = payloads(&mut Reducer::new(limits(), limits().slots()), &batches);
        for (place, pages_in_memory) in [("memory", limits().slots()), ("spill file", 256)] {
            group.bench_function(format!("restore {name}, {place}"), |bencher| {
                let fresh = || Restorer::new(limits(), shelf(pages_in_memory));
                bencher.iter_batched_ref(
                    fresh,
                    |restorer| restore_all(restorer, &first, &mut out),
                    BatchSize::PerIteration,
                );
            });
        }
    }
    let batches = mixed.batches();
    let mut reducer = Reducer::new(limits(), limits().slots());
    let first = payloads(&mut reducer, &batches);
    group.bench_function("encode again", |bencher| {
        bencher.iter(|| encode_all(&mut reducer, &batches, &mut payload))
    });
    let mut reducer = Reducer::new(limits(), limits().slots());
    encode_all(&mut reducer, &batches, &mut payload);
    let second = payloads(&mut reducer, &batches);
    for (place, pages_in_memory) in [("memory", limits().slots()), ("spill file", 256)] {
        group.bench_function(format!("restore again, {place}"), |bencher| {
            let fresh = || {
                let mut restorer = Restorer::new(limits(), shelf(pages_in_memory));
                restore_all(&mut restorer, &first, &mut Vec::new());
                restorer
            };
            bencher.iter_batched_ref(
                fresh,
                |restorer| restore_all(restorer, &second, &mut out),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

/// Processor time of this thread.
struct CpuTime;

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        Duration::try_from(now).expect("a thread's time is positive")
    }

    fn end(&self, start: Duration) -> Duration {
        self.start() - start
    }

    fn add(&self, left: &Duration, right: &Duration) -> Duration {
        *left + *right
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

criterion_group!(name = benches; config = Criterion::default().with_measurement(CpuTime); targets = reduce);
criterion_main!(benches);
