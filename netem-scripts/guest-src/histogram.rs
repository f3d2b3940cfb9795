//! How long operations took, counted in classes of length. Shared by the guest, which counts, and the lab, which reads.
//!
//! Lengths are microseconds. Below 16 each has a class of its own; above, each octave is cut into 16 classes of equal width, so that the end of a
//! class is at most 1/16 above its beginning:
//!
//! ```text
//! class  0 … 15   16 … 31   32 … 47        48 …
//! µs     0 … 15   16 … 31   32 … 63 by 2   64 … 127 by 4
//! ```

/// Counts of operations by class of length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Histogram(std::collections::BTreeMap<u32, u64>);

impl Histogram {
    /// Counts one operation that took so many microseconds.
    #[allow(dead_code, reason = "only the guest counts")]
    pub(crate) fn count(&mut self, microseconds: u64) {
        *self.0.entry(class(microseconds)).or_default() += 1;
    }

    /// Adds what another one has counted.
    #[allow(dead_code, reason = "only the lab adds")]
    pub(crate) fn add(&mut self, other: &Self) {
        for (class, count) in &other.0 {
            let sum = self.0.entry(*class).or_default();
            *sum = sum.saturating_add(*count);
        }
    }

    /// Operations that were counted.
    #[allow(dead_code, reason = "only the lab asks")]
    pub(crate) fn operations(&self) -> u64 {
        self.0.values().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// The microseconds within which `percent` of 100 operations were done: the end of the class of the last of them. `None` where nothing
    /// was counted.
    #[allow(dead_code, reason = "only the lab asks")]
    pub(crate) fn percentile(&self, percent: u64) -> Option<u64> {
        let wanted = u128::from(self.operations()) * u128::from(percent);
        let mut counted = 0_u128;
        for (class, count) in &self.0 {
            counted += u128::from(*count);
            if counted * 100 >= wanted {
                return Some(end(*class));
            }
        }
        None
    }

    /// As `CLASS:COUNT` words.
    #[allow(dead_code, reason = "only the guest writes")]
    pub(crate) fn to_words(&self) -> String {
        let words: Vec<String> = self.0.iter().map(|(class, count)| format!("{class}:{count}")).collect();
        words.join(" ")
    }

    /// What [`Histogram::to_words`] wrote; `None` where it is anything else.
    #[allow(dead_code, reason = "only the lab reads")]
    pub(crate) fn from_words<'a>(words: impl Iterator<Item = &'a str>) -> Option<Self> {
        let mut histogram = Self::default();
        for word in words {
            let (class, count) = word.split_once(':')?;
            let class = class.parse().ok().filter(|class| *class < CLASSES)?;
            histogram.0.insert(class, count.parse().ok()?);
        }
        Some(histogram)
    }
}

/// The class of a length.
#[allow(dead_code, reason = "only the guest counts")]
fn class(microseconds: u64) -> u32 {
    if microseconds < 16 {
        return microseconds as u32;
    }
    let octave = microseconds.ilog2();
    (octave - 3) * 16 + (microseconds >> (octave - 4) & 15) as u32
}

/// The longest length of a class.
#[allow(dead_code, reason = "only the lab asks")]
fn end(class: u32) -> u64 {
    if class < 16 {
        return u64::from(class);
    }
    let (octave, place) = (class / 16 + 3, u64::from(class % 16));
    // The last class ends with the largest number: nothing overflows.
    (((16 + place) << (octave - 4)) - 1) + (1 << (octave - 4))
}

/// Of every length that 64 bits can say.
#[allow(dead_code, reason = "only the lab reads")]
const CLASSES: u32 = 61 * 16;
