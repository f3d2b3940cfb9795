//! The link's own random numbers: xoshiro256++ seeded by splitmix64 (Blackman and Vigna, 2019).
//!
//! Own rather than a crate's, because a seed must give the same losses for ever: it is part of every measured result.

use serde::{Deserialize, Serialize};

/// A seeded stream of random numbers. Equal seeds and stream numbers give equal numbers.
#[derive(Clone, Debug)]
pub(super) struct Random {
    state: [u64; 4],
}

impl Random {
    /// Stream number `stream` of `seed`; streams of one seed are independent of each other.
    #[must_use]
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut mix = splitmix(seed).1 ^ stream.wrapping_mul(0xd134_2543_de82_ef95);
        let state = std::array::from_fn(|_| {
            let (next, value) = splitmix(mix);
            mix = next;
            value
        });
        Self { state }
    }

    /// The next 64 random bits.
    pub(super) fn bits(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.state;
        let result = a.wrapping_add(*d).rotate_left(23).wrapping_add(*a);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        result
    }

    /// True with probability `chance`. Takes one number whatever the chance, so that a change of it shifts nothing else.
    pub(super) fn hit(&mut self, chance: Probability) -> bool {
        let bits = self.bits();
        bits < chance.threshold || chance.threshold == u64::MAX
    }

    /// A number from the normal distribution with mean 0 and deviation 1 (Box and Muller).
    pub(super) fn normal(&mut self) -> f64 {
        // In (0, 1], so that the logarithm is finite.
        let radius = (1.0 - self.unit()).ln() * -2.0;
        radius.sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// In [0, 1), with 53 bits.
    fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// A probability from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Probability {
    value: f64,
    /// `value` x 2^64; `u64::MAX` means always.
    threshold: u64,
}

impl Probability {
    /// It never happens.
    pub const NEVER: Self = Self {
        value: 0.0,
        threshold: 0,
    };
    /// It always happens.
    pub const ALWAYS: Self = Self {
        value: 1.0,
        threshold: u64::MAX,
    };

    /// `value` as a probability; `None` outside 0 to 1.
    #[must_use]
    pub fn new(value: f64) -> Option<Self> {
        // A float above 2^64 - 1 saturates to u64::MAX, which is what 1 has to become.
        (0.0..=1.0).contains(&value).then(|| Self {
            value,
            threshold: (value * 2_f64.powi(64)) as u64,
        })
    }

    /// The number, 0 to 1.
    #[must_use]
    pub fn value(self) -> f64 {
        self.value
    }
}

impl TryFrom<f64> for Probability {
    type Error = OutsideZeroToOne;

    fn try_from(value: f64) -> Result<Self, OutsideZeroToOne> {
        Self::new(value).ok_or(OutsideZeroToOne)
    }
}

impl From<Probability> for f64 {
    fn from(probability: Probability) -> Self {
        probability.value
    }
}

/// A number is no probability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a probability is a number from 0 to 1")]
pub struct OutsideZeroToOne;

/// One step of splitmix64: the next state and the output.
fn splitmix(state: u64) -> (u64, u64) {
    let next = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (next ^ (next >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (next, mixed ^ (mixed >> 31))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_gives_the_published_numbers() {
        // First outputs of the reference implementation for seed 0.
        let (state, first) = splitmix(0);
        let (_, second) = splitmix(state);
        assert_eq!([first, second], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
    }

    #[test]
    fn one_seed_gives_one_sequence_and_two_streams_differ() {
        let take = |seed, stream| {
            let mut random = Random::new(seed, stream);
            std::array::from_fn::<u64, 8, _>(|_| random.bits())
        };
        assert_eq!(take(7, 0), take(7, 0));
        assert_ne!(take(7, 0), take(7, 1));
        assert_ne!(take(7, 0), take(8, 0));
    }

    #[test]
    fn never_and_always_are_exact() {
        let mut random = Random::new(1, 0);
        assert!((0..10_000).all(|_| !random.hit(Probability::NEVER) && random.hit(Probability::ALWAYS)));
        assert_eq!(Probability::new(1.0), Some(Probability::ALWAYS));
        assert_eq!(Probability::new(0.0), Some(Probability::NEVER));
        for bad in [-0.1, 1.000_1, f64::NAN, f64::INFINITY] {
            assert_eq!(Probability::new(bad), None, "{bad}");
        }
    }

    #[test]
    fn normal_numbers_have_mean_zero_and_deviation_one() {
        let mut random = Random::new(3, 0);
        let count = 100_000;
        let (sum, squares) = (0..count).fold((0.0, 0.0), |(sum, squares), _| {
            let x = random.normal();
            (sum + x, squares + x * x)
        });
        // Standard errors are 0.003 and 0.0045: five of them.
        assert!((sum / f64::from(count)).abs() < 0.016);
        assert!((squares / f64::from(count) - 1.0).abs() < 0.023);
    }
}
