//! Seeded random numbers: what a run draws it draws again.

use std::time::Duration;

/// A small seeded generator (splitmix64, Vigna 2015): the moments of a seed never change.
#[derive(Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// In [0, 1).
    pub(super) fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// In [shortest, longest).
    pub(super) fn between(&mut self, [shortest, longest]: [Duration; 2]) -> Duration {
        shortest + (longest - shortest).mul_f64(self.unit())
    }
}
