//! What becomes of recorded vmm streams, and what that costs on one core.
//!
//! ```text
//! cargo bench --bench streams -- FILE...        streams as a hypervisor wrote them (longhaul lab record)
//! ```
//!
//! A stream is taken in two parts: up to the first page that is sent a second time, and from there on. Time is the thread's processor time. Each
//! line of the table is one way to carry a part: `relay` only digests the stream and copies it, the codecs take each page by itself, `xbzrle` is QEMU's
//! encoding with a cache of all pages, and `longhaul` is the whole of [`Encoder`]: digests, parser, dictionary, deltas, groups. `opaque` is the same of a
//! stream of which nothing is known: chunks instead of pages, and no deltas.
#![expect(clippy::unwrap_used, reason = "a measuring tool fails by panicking")]

use std::collections::HashMap;
use std::hint::black_box;
use std::time::Duration;

use longhaul::proto::page::{PAGE_SIZE, PageAddress};
use longhaul::proto::reduce::{DictionaryLimits, Effort, PageCounts, Reducer};
use longhaul::proto::session::{EncodedFrame, Encoder};
use longhaul::proto::vmm_stream::qemu::QemuParser;
use longhaul::proto::vmm_stream::{Record, StreamEvent};
use rustix::time::{ClockId, clock_gettime};

/// What the gateway reads from a hypervisor at once at most.
const CHUNK: usize = 256 << 10;

fn main() {
    let files: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    if files.is_empty() {
        eprintln!("streams: no recordings named; make some with `longhaul lab record`");
    }
    for file in files {
        let stream = std::fs::read(&file).unwrap();
        let pages = Pages::of(&stream);
        println!("{file}");
        let parts = [("first pass", ..pages.second), ("sent again", ..stream.len())];
        let mut start = 0;
        for (name, part) in parts {
            let count = pages
                .list
                .iter()
                .filter(|page| (start..part.end).contains(&page.at))
                .count();
            let content = count * PAGE_SIZE;
            println!("  {name}: {count} pages that are not zero");
            let table = |way: &str, bytes: usize, time: Duration, more: &str| {
                let rate = content as f64 / time.as_secs_f64() / 1e9;
                let each = bytes as f64 / count.max(1) as f64;
                println!(
                    "    {way:<18} {:>9.2} MB  {each:>7.1} B/page  {rate:>6.2} GB/s{more}",
                    bytes as f64 / 1e6
                );
            };
            let part = start..part.end;
            pages.compare(&stream, part.clone(), table);
            let ways = Effort::ALL.map(|effort| (format!("longhaul {effort}"), encoder(effort)));
            // With the dictionary of a tunnel.
            let limits = DictionaryLimits::new(1 << 16, 0).unwrap();
            let opaque = Encoder::of_opaque(Reducer::new(limits, 0));
            let ways = ways.into_iter().chain([("opaque lz4".to_owned(), opaque)]);
            for (way, mut encoder) in ways {
                let mut frames = Vec::new();
                feed(&mut encoder, &stream[..part.start], &mut frames);
                let before = encoder.pages();
                frames.clear();
                let time = feed(&mut encoder, &stream[part.clone()], &mut frames);
                let bytes: u64 = frames.iter().map(EncodedFrame::lane_bytes).sum();
                let more = format!("  {}", counted(before, encoder.pages()));
                table(&way, bytes as usize, time, &more);
            }
            start = part.end;
        }
    }
}

fn encoder(effort: Effort) -> Encoder {
    let limits = DictionaryLimits::new(1 << 20, 1 << 12).unwrap();
    let mut encoder = Encoder::new(Some(Reducer::new(limits, 1 << 20)));
    encoder.set_effort(effort);
    encoder
}

fn feed(encoder: &mut Encoder, bytes: &[u8], frames: &mut Vec<EncodedFrame>) -> Duration {
    timed(|| bytes.chunks(CHUNK).for_each(|chunk| encoder.feed(chunk, frames)))
}

fn counted(before: PageCounts, after: PageCounts) -> String {
    format!(
        "same {} reference {} delta {} literal {} raw {}",
        after.same - before.same,
        after.reference - before.reference,
        after.delta - before.delta,
        after.literal - before.literal,
        after.raw - before.raw
    )
}

/// Processor time of this thread.
fn timed(work: impl FnOnce()) -> Duration {
    let now = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap();
    let before = now();
    work();
    now() - before
}

/// The pages of a stream.
struct Pages {
    list: Vec<Page>,
    /// Where the first page that is sent a second time begins.
    second: usize,
}

struct Page {
    /// Offset of its content.
    at: usize,
    /// Offset of the content with which it was sent before.
    previous: Option<usize>,
}

impl Pages {
    fn of(stream: &[u8]) -> Self {
        let (mut parser, mut records, mut events) = (QemuParser::default(), Vec::new(), Vec::new());
        let taken = parser.parse(stream, true, &mut records, &mut events);
        assert_eq!(taken, stream.len());
        let names = events.into_iter().find_map(|event| match event {
            StreamEvent::RamBlocks(blocks) => Some(blocks),
            _ => None,
        });
        let names = names.expect("the stream has a list of its blocks");
        let mut last: HashMap<PageAddress, usize> = HashMap::new();
        let (mut list, mut offset, mut second) = (Vec::new(), 0, stream.len());
        for record in records {
            let header = |page: longhaul::proto::vmm_stream::PageRecord| {
                8 + if page.continues {
                    0
                } else {
                    1 + names[usize::from(page.at.block)].name.len()
                }
            };
            offset += match record {
                Record::Bytes { len } | Record::Chunk { len } => len,
                Record::Zero(page) => header(page) + 1,
                Record::Page(page) => {
                    let at = offset + header(page);
                    let previous = last.insert(page.at, at);
                    if previous.is_some() {
                        second = second.min(offset);
                    }
                    list.push(Page { at, previous });
                    header(page) + PAGE_SIZE
                }
            };
        }
        Self { list, second }
    }

    fn compare(&self, stream: &[u8], part: std::ops::Range<usize>, table: impl Fn(&str, usize, Duration, &str)) {
        let pages: Vec<&Page> = self.list.iter().filter(|page| part.contains(&page.at)).collect();
        let content = |at: usize| &stream[at..at + PAGE_SIZE];
        let sum = |way: &str, mut size: Box<dyn FnMut(&Page) -> usize + '_>| {
            let mut bytes = 0;
            let time = timed(|| bytes = pages.iter().map(|page| size(page)).sum());
            table(way, bytes, time, "");
        };
        let mut copy = vec![0; PAGE_SIZE];
        sum(
            "memcpy",
            Box::new(|page| {
                copy.copy_from_slice(content(page.at));
                black_box(&copy).len()
            }),
        );
        let mut hasher = blake3::Hasher::new();
        sum(
            "relay",
            Box::new(|page| {
                hasher.update(content(page.at));
                PAGE_SIZE + 8
            }),
        );
        let mut coded = vec![0; 2 * PAGE_SIZE];
        let mut lz4 = lz4_flex::block::CompressTable::small();
        sum(
            "lz4",
            Box::new(|page| lz4_flex::block::compress_into_with_table(content(page.at), &mut coded, &mut lz4).unwrap()),
        );
        for level in [1, 3] {
            let mut zstd = zstd::bulk::Compressor::new(level).unwrap();
            let mut coded = vec![0; 2 * PAGE_SIZE];
            sum(
                &format!("zstd level {level}"),
                Box::new(move |page| zstd.compress_to_buffer(content(page.at), &mut coded).unwrap()),
            );
        }
        sum(
            "xbzrle",
            Box::new(|page| {
                page.previous
                    .map_or(8 + PAGE_SIZE, |previous| xbzrle(content(previous), content(page.at)))
            }),
        );
    }
}

/// Bytes of a page record of QEMU: header, then either `u8, u16` and runs that stay and change in turn, or the page.
fn xbzrle(previous: &[u8], page: &[u8]) -> usize {
    let uleb = |value: usize| 1 + usize::from(value > 0x7f);
    let (mut at, mut len) = (0, 0);
    while at < PAGE_SIZE {
        let same = (at..PAGE_SIZE).take_while(|&at| previous[at] == page[at]).count();
        if at + same == PAGE_SIZE {
            break;
        }
        let changed = (at + same..PAGE_SIZE)
            .take_while(|&at| previous[at] != page[at])
            .count();
        len += uleb(same) + uleb(changed) + changed;
        at += same + changed;
    }
    8 + if len >= PAGE_SIZE { PAGE_SIZE } else { 3 + len }
}
