//! How long the guest will stand still for what is left of its disks.

use std::time::Duration;

use crate::proto::page::ByteRate;

/// A round over what the guest has written to its disks. The one that is read while it stands will be like the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskRound {
    /// Bytes that were read: of whole clusters.
    pub read_bytes: u64,
    /// Until all of it was given to the path, which may hold much of it then.
    pub took: Duration,
}

impl DiskRound {
    /// Time for the same once more on a path that takes `goodput`, where each byte becomes `reduced` bytes of frames.
    #[must_use]
    pub fn time_at(&self, goodput: ByteRate, reduced: f64) -> Duration {
        let frame_bytes = self.read_bytes as f64 * reduced.clamp(0.0, 1.0);
        self.took.max(goodput.time_for(frame_bytes as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_takes_as_long_as_reading_it_and_as_long_as_the_path_needs() {
        let round = DiskRound {
            read_bytes: 10_000_000,
            took: Duration::from_millis(60),
        };
        let at = |goodput, reduced| round.time_at(ByteRate(goodput), reduced);
        assert_eq!(at(100_000_000, 1.0), Duration::from_millis(100));
        assert_eq!(at(100_000_000, 0.1), Duration::from_millis(60));
        assert_eq!(at(10_000_000, 0.5), Duration::from_millis(500));
        assert_eq!(DiskRound::default().time_at(ByteRate(1), 1.0), Duration::ZERO);
    }
}
