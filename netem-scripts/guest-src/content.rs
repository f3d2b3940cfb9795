//! What pages and values hold: random words, or text of a fixed vocabulary. The same seed gives the same.

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number in `0..limit`; the bias for limits far below 2^64 does not matter here.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

pub(crate) fn mix(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// The words that text is made of. Such text shrinks 3.0 times by lz4 and 4.6 times by zstd.
pub(crate) struct Vocabulary(Vec<[u8; 16]>);

impl Vocabulary {
    pub(crate) fn new(random: &mut Random) -> Self {
        Self((0..(1 << OCTAVES) - 1).map(|_| word_of_text(random)).collect())
    }

    /// Fills `text` but for its last [`PADDING`] bytes, which are overwritten too.
    pub(crate) fn write(&self, random: &mut Random, text: &mut [u8]) {
        // Each word is copied whole and the next one overwrites its padding: one fixed-size copy a word.
        let (mut length, bytes) = (0, text.len() - PADDING);
        while length < bytes {
            // Zipf's law, as in a language: each octave of ranks is drawn as often as any other.
            let draw = random.next();
            let octave = 1 << (draw % OCTAVES);
            let rank = octave - 1 + (draw >> 32 & (octave - 1));
            let word = self.0[rank as usize];
            text[length..length + PADDING].copy_from_slice(&word);
            length += usize::from(word[15]);
        }
    }
}

/// A word of 4 to 12 letters and a space, padded; the last byte tells the length.
fn word_of_text(random: &mut Random) -> [u8; 16] {
    let mut word = [b' '; 16];
    let letters = 4 + random.below(9) as usize;
    word[..letters].fill_with(|| b"etaoinshrdlucmfwypvb"[random.below(20) as usize]);
    word[15] = letters as u8 + 1;
    word
}

/// Room that [`Vocabulary::write`] needs behind the text.
pub(crate) const PADDING: usize = 16;
/// The words have the ranks below 2^9 - 1.
const OCTAVES: u64 = 9;
