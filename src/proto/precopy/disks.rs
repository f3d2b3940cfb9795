//! How long the guest will stand still for what is left of its disks.

use std::time::Duration;

use crate::proto::page::ByteRate;

/// Disks that are copied beside memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskRounds {
    /// Read in the last round over what the guest wrote; `None`: the first of them, over all that it has written since the beginning, is not over.
    pub last_bytes: Option<u64>,
    /// Read in all rounds, and not there before.
    pub sent_bytes: u64,
    /// Bytes of frames that those became, as far as they have left.
    pub frame_bytes: u64,
}

impl DiskRounds {
    /// Time for one more round like the last one, as soon as that is known, which is read while the guest stands, on a path that takes `goodput`. What the last one took says
    /// less: memory went beside it.
    #[must_use]
    pub fn one_more(&self, goodput: ByteRate) -> Option<Duration> {
        let last_bytes = self.last_bytes?;
        let reduced = (self.frame_bytes as f64 / self.sent_bytes.max(1) as f64).min(1.0);
        Some(goodput.time_for((last_bytes as f64 * reduced) as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_more_round_takes_what_its_bytes_take_once_they_are_reduced_like_the_others() {
        let at = |sent_bytes, frame_bytes| {
            let rounds = DiskRounds {
                last_bytes: Some(10_000_000),
                sent_bytes,
                frame_bytes,
            };
            rounds.one_more(ByteRate(100_000_000))
        };
        assert_eq!(at(1_000, 250), Some(Duration::from_millis(25)));
        assert_eq!(at(1_000, 1_100), Some(Duration::from_millis(100)));
        // Everything was there: nothing is known of how what was not reduces.
        assert_eq!(at(0, 500), Some(Duration::from_millis(100)));
        assert_eq!(DiskRounds::default().one_more(ByteRate(1)), None);
    }
}
