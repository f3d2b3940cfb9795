//! A group of literals: coded together, so that the codec sees what pages have in common.
//!
//! ```text
//! u8 codec      0 stored, 1 lz4 block, 2 zstd from a new frame on, 3 zstd in the frame that the last group of 2 or 3 began or went on with;
//!               16 n is added for zstd of coder n, which has frames of its own
//! varint n      coded length; absent where stored
//! coded[n]
//! ```
//!
//! The length of the content is not in it: all groups of a payload but the last are full. A zstd frame goes on over groups and payloads, each of
//! which ends flushed: what was in the last 4 MiB of literals is known, however short a group is.

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use zstd::zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd::zstd_safe::{
    CCtx, CParameter, DCtx, DParameter, ErrorCode, InBuffer, OutBuffer, ResetDirective, compress_bound,
};

use super::effort::Effort;
use super::varint;
use crate::proto::page::PAGE_SIZE;

/// Bytes of content in a full group.
///
/// lz4 finds matches up to 64 KiB back, and grouping pages gains only about 6 % over single ones; what is left to gain is for
/// stronger codecs, which still gain at this size.
pub(super) const GROUP_BYTES: usize = 128 * 1024;

/// Log2 of how far back zstd looks. Of 150 MB of a Redis guest level 3 makes 58.6 MB with 1 MiB, 57.3 with 4, 54.3 with 128; level 6 57.3, 55.9 and
/// 53.3 (2026-11-27). It takes up to 7 MiB at the source and 4 at the destination: coders after the first have a quarter.
fn window_log(coder: usize) -> u32 {
    if coder == 0 { 22 } else { 20 }
}

/// Threads that may code a session, each with zstd frames of its own.
pub const MAX_CODERS: usize = 4;

const CODEC_STORED: u8 = 0;
const CODEC_LZ4: u8 = 1;
const CODEC_ZSTD: u8 = 2;
const CODEC_ZSTD_ON: u8 = 3;

/// What a zstd codec byte says in its upper half.
const CODER_SHIFT: u32 = 4;

/// Whether coding `len` bytes into `coded` pays for undoing it: a gain of at least 6 %.
fn pays(len: usize, coded: usize) -> bool {
    coded <= len - len * 6 / 100
}

/// Codes groups, with the scratch memory it needs.
pub(super) struct Encoder {
    /// Which of the session's coders this is.
    coder: u8,
    table: CompressTable,
    coded: Vec<u8>,
    zstd: Option<ZstdEncoder>,
}

impl Encoder {
    /// `coder` is below [`MAX_CODERS`], and another one's for each thread of a session.
    pub(super) fn new(coder: u8) -> Self {
        let largest = get_maximum_output_size(GROUP_BYTES).max(compress_bound(GROUP_BYTES) + ZSTD_HEADS);
        Self {
            coder,
            table: CompressTable::large(),
            coded: vec![0; largest],
            zstd: None,
        }
    }

    /// Appends `content` (at most [`GROUP_BYTES`]) to `out`, compressed where that pays. Whether it did.
    pub(super) fn encode(&mut self, effort: Effort, content: &[u8], out: &mut Vec<u8>) -> bool {
        if let Some(level) = effort.zstd_level()
            && let Some((codec, len)) = self.compress_on(level, content)
        {
            // What has gone into the frame must reach the destination, whether it pays or not.
            self.put(codec | self.coder << CODER_SHIFT, len, out);
            return pays(content.len(), len);
        }
        let len = self.compress(content);
        let pays = pays(content.len(), len);
        if pays {
            self.put(CODEC_LZ4, len, out);
        } else {
            out.push(CODEC_STORED);
            out.extend_from_slice(content);
        }
        pays
    }

    fn put(&self, codec: u8, len: usize, out: &mut Vec<u8>) {
        out.push(codec);
        varint::write(len as u64, out);
        out.extend_from_slice(&self.coded[..len]);
    }

    fn compress(&mut self, content: &[u8]) -> usize {
        compress_into_with_table(content, &mut self.coded, &mut self.table)
            .expect("the buffer has the codec's largest output for a full group")
    }

    /// The codec and length of `content` as zstd. `None` where zstd cannot, for want of memory: lz4 always can.
    fn compress_on(&mut self, level: i32, content: &[u8]) -> Option<(u8, usize)> {
        let goes_on = self.zstd.as_ref().is_some_and(|zstd| zstd.level == level);
        if !goes_on {
            self.zstd = ZstdEncoder::new(level, window_log(self.coder.into())).ok();
        }
        match self.zstd.as_mut()?.encode(content, &mut self.coded) {
            Ok(len) => Some((if goes_on { CODEC_ZSTD_ON } else { CODEC_ZSTD }, len)),
            Err(_) => {
                self.zstd = None;
                None
            }
        }
    }
}

/// Finds out whether a page's length of content is worth compressing.
pub(super) struct Trial {
    table: CompressTable,
    coded: Vec<u8>,
}

impl Trial {
    pub(super) fn new() -> Self {
        Self {
            table: CompressTable::small(),
            coded: vec![0; get_maximum_output_size(PAGE_SIZE)],
        }
    }

    /// Whether compressing `content` (at most a page) pays.
    pub(super) fn pays(&mut self, content: &[u8]) -> bool {
        let len = compress_into_with_table(content, &mut self.coded, &mut self.table)
            .expect("the buffer has the codec's largest output for a page");
        pays(content.len(), len)
    }
}

/// Bytes of a frame's and of blocks' heads beyond what [`compress_bound`] allows for.
const ZSTD_HEADS: usize = 64;

/// A zstd frame without end.
struct ZstdEncoder {
    level: i32,
    context: CCtx<'static>,
}

impl ZstdEncoder {
    fn new(level: i32, window_log: u32) -> Result<Self, ErrorCode> {
        let mut context = CCtx::create();
        for parameter in [
            CParameter::CompressionLevel(level),
            CParameter::WindowLog(window_log),
            CParameter::ChecksumFlag(false),
            CParameter::ContentSizeFlag(false),
        ] {
            context.set_parameter(parameter)?;
        }
        Ok(Self { level, context })
    }

    fn encode(&mut self, content: &[u8], coded: &mut [u8]) -> Result<usize, ErrorCode> {
        let mut input = InBuffer::around(content);
        let mut output = OutBuffer::around(coded);
        loop {
            let before = (input.pos(), output.pos());
            let left = self
                .context
                .compress_stream2(&mut output, &mut input, ZSTD_EndDirective::ZSTD_e_flush)?;
            if left == 0 && input.pos() == content.len() {
                return Ok(output.pos());
            }
            if (input.pos(), output.pos()) == before {
                // Its code for a destination that is too small.
                return Err(0_usize.wrapping_sub(70));
            }
        }
    }
}

/// What is wrong with a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum GroupError {
    #[error("it ends too soon")]
    Truncated,
    #[error("it names codec {0}, which this version does not have")]
    UnknownCodec(u8),
    #[error("it does not decompress to its length")]
    Damaged,
}

/// Decodes groups in the order in which they were coded.
pub(super) struct Decoder {
    /// Of each of the source's coders.
    zstd: [Option<DCtx<'static>>; MAX_CODERS],
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self {
            zstd: [const { None }; MAX_CODERS],
        }
    }

    /// Takes one group off the front of `bytes`; its content fills `content` exactly. Whether compressing it has paid.
    pub(super) fn decode(&mut self, bytes: &mut &[u8], content: &mut [u8]) -> Result<bool, GroupError> {
        let codec = *bytes.split_off_first().ok_or(GroupError::Truncated)?;
        if codec == CODEC_STORED {
            let stored = bytes.split_off(..content.len()).ok_or(GroupError::Truncated)?;
            content.copy_from_slice(stored);
            return Ok(false);
        }
        let coder = usize::from(codec >> CODER_SHIFT);
        let (kind, most) = match codec & ((1 << CODER_SHIFT) - 1) {
            CODEC_LZ4 => (CODEC_LZ4, 1),
            kind @ (CODEC_ZSTD | CODEC_ZSTD_ON) => (kind, MAX_CODERS),
            kind => (kind, 0),
        };
        if coder >= most {
            return Err(GroupError::UnknownCodec(codec));
        }
        let len = varint::read(bytes)
            .and_then(|len| usize::try_from(len).ok())
            .ok_or(GroupError::Truncated)?;
        let coded = bytes.split_off(..len).ok_or(GroupError::Truncated)?;
        let whole = if kind == CODEC_LZ4 {
            decompress_into(coded, content).is_ok_and(|restored| restored == content.len())
        } else {
            decompress_on(
                &mut self.zstd[coder],
                window_log(coder),
                kind == CODEC_ZSTD,
                coded,
                content,
            )
            .is_some()
        };
        if whole {
            Ok(pays(content.len(), len))
        } else {
            Err(GroupError::Damaged)
        }
    }
}

/// `None` where `coded` is not exactly `content`.
fn decompress_on(
    zstd: &mut Option<DCtx<'static>>,
    window_log: u32,
    begins: bool,
    coded: &[u8],
    content: &mut [u8],
) -> Option<()> {
    if begins {
        let context = zstd.get_or_insert_with(DCtx::create);
        context.reset(ResetDirective::SessionOnly).ok()?;
        // A frame that wants more memory than this is refused before it gets any.
        context.set_parameter(DParameter::WindowLogMax(window_log)).ok()?;
    }
    let context = zstd.as_mut()?;
    let len = content.len();
    let mut input = InBuffer::around(coded);
    let mut output = OutBuffer::around(content);
    while input.pos() < coded.len() || output.pos() < len {
        let before = (input.pos(), output.pos());
        context.decompress_stream(&mut output, &mut input).ok()?;
        if (input.pos(), output.pos()) == before {
            return None;
        }
    }
    // More content than is due would come out with the next group.
    let mut spare = [0];
    let mut output = OutBuffer::around(&mut spare[..]);
    context
        .decompress_stream(&mut output, &mut InBuffer::around(&[]))
        .ok()?;
    (output.pos() == 0).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1_u64;
        std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .take(len)
        .collect()
    }

    #[test]
    fn a_group_survives_and_shrinks_only_where_that_pays() {
        let text: Vec<u8> = b"a line of text that repeats\n"
            .iter()
            .copied()
            .cycle()
            .take(GROUP_BYTES)
            .collect();
        for (content, shrinks) in [(text, true), (noise(GROUP_BYTES), false), (noise(1), false)] {
            let mut coded = Vec::new();
            assert_eq!(Encoder::new(0).encode(Effort::LEAST, &content, &mut coded), shrinks);
            assert!(coded.len() <= content.len() + 1);
            let mut restored = vec![0; content.len()];
            let mut rest = coded.as_slice();
            assert_eq!(Decoder::new().decode(&mut rest, &mut restored), Ok(shrinks));
            assert!(rest.is_empty());
            assert_eq!(restored, content);
        }
    }

    #[test]
    fn groups_survive_whatever_the_effort_and_however_it_changes() {
        let (mut encoder, mut decoder) = (Encoder::new(0), Decoder::new());
        let half = noise(GROUP_BYTES / 2);
        let ladder = Effort::ALL;
        for turn in 0..40_usize {
            let effort = ladder[turn / 3 % ladder.len()];
            let content = match turn % 4 {
                0 => vec![turn as u8; 1 + turn],
                1 => noise(GROUP_BYTES),
                2 => [half.as_slice(), &half].concat(),
                _ => format!("line {turn}\n").repeat(5000).into_bytes(),
            };
            let mut coded = Vec::new();
            let shrank = encoder.encode(effort, &content, &mut coded);
            assert!(coded.len() <= content.len() + 40, "{turn}: {}", coded.len());
            let mut restored = vec![0; content.len()];
            let mut rest = coded.as_slice();
            assert_eq!(decoder.decode(&mut rest, &mut restored), Ok(shrank), "{turn}");
            assert!(rest.is_empty() && restored == content, "{turn}");
        }
    }

    #[test]
    fn what_an_earlier_group_held_costs_next_to_nothing() {
        let mut encoder = Encoder::new(0);
        let content = noise(GROUP_BYTES);
        let mut coded = Vec::new();
        assert!(!encoder.encode(Effort::MOST, &content, &mut coded));
        let first = coded.len();
        assert!(encoder.encode(Effort::MOST, &content[..4096], &mut coded));
        assert!(coded.len() - first < 100, "{}", coded.len() - first);
    }

    #[test]
    fn every_coder_has_a_frame_of_its_own() {
        let mut coders: Vec<Encoder> = (0..MAX_CODERS as u8).map(Encoder::new).collect();
        let mut decoder = Decoder::new();
        let contents: Vec<Vec<u8>> = (0..MAX_CODERS).map(|coder| noise(4096 + coder)).collect();
        for (turn, coder) in [0, 2, 1, 3, 3, 1, 0, 2, 0].into_iter().enumerate() {
            let content = &contents[coder];
            let mut coded = Vec::new();
            let knew = coders[coder].encode(Effort::MOST, content, &mut coded);
            assert_eq!(knew, turn >= MAX_CODERS, "{turn}");
            let mut restored = vec![0; content.len()];
            assert_eq!(decoder.decode(&mut coded.as_slice(), &mut restored), Ok(knew), "{turn}");
            assert_eq!(&restored, content, "{turn}");
        }
    }

    #[test]
    fn a_frame_that_goes_on_where_none_began_or_wants_more_memory_is_refused() {
        let mut encoder = Encoder::new(0);
        let mut coded = Vec::new();
        encoder.encode(Effort::MOST, &[7; 1000], &mut coded);
        coded[0] = CODEC_ZSTD_ON;
        let refused = Decoder::new().decode(&mut coded.as_slice(), &mut [0; 1000]);
        assert_eq!(refused, Err(GroupError::Damaged));

        let mut context = CCtx::create();
        context.set_parameter(CParameter::WindowLog(window_log(0) + 1)).unwrap();
        context.set_parameter(CParameter::ContentSizeFlag(false)).unwrap();
        let mut frame = vec![0; 1000];
        let mut output = OutBuffer::around(&mut frame[..]);
        let mut input = InBuffer::around(&[7; 100]);
        context
            .compress_stream2(&mut output, &mut input, ZSTD_EndDirective::ZSTD_e_flush)
            .unwrap();
        let len = output.pos();
        let mut coded = vec![CODEC_ZSTD];
        varint::write(len as u64, &mut coded);
        coded.extend_from_slice(&frame[..len]);
        let refused = Decoder::new().decode(&mut coded.as_slice(), &mut [0; 100]);
        assert_eq!(refused, Err(GroupError::Damaged));

        let mut of_coder_0 = Vec::new();
        Encoder::new(0).encode(Effort::MOST, &[7; 1000], &mut of_coder_0);
        of_coder_0[0] |= 1 << CODER_SHIFT;
        let refused = Decoder::new().decode(&mut of_coder_0.as_slice(), &mut [0; 1000]);
        assert_eq!(refused, Err(GroupError::Damaged), "another coder's window is smaller");
    }

    #[test]
    fn a_gain_of_six_per_cent_pays_and_less_does_not() {
        assert!(pays(1000, 940));
        assert!(!pays(1000, 941));
    }

    #[test]
    fn a_group_of_another_length_or_an_unknown_codec_is_refused() {
        for effort in [Effort::LEAST, Effort::MOST] {
            let mut encoder = Encoder::new(0);
            let mut coded = Vec::new();
            encoder.encode(effort, &[7; 1000], &mut coded);
            for len in [0, 999, 1001] {
                let refused = Decoder::new().decode(&mut coded.as_slice(), &mut vec![0; len]);
                assert_eq!(refused, Err(GroupError::Damaged), "{len}");
            }
            for len in 0..coded.len() {
                let refused = Decoder::new().decode(&mut &coded[..len], &mut [0; 1000]);
                assert_eq!(refused, Err(GroupError::Truncated), "{len}");
            }
        }
        for codec in [4, 15, 0x10, 0x11, 0x14, 0x42, 0xf3] {
            let refused = Decoder::new().decode(&mut [codec, 0].as_slice(), &mut [0; 1]);
            assert_eq!(refused, Err(GroupError::UnknownCodec(codec)));
        }
    }
}
