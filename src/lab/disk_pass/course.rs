//! How far a copy was, and when.

/// Looks at a copy while it lasts.
#[derive(Clone, Debug, Default)]
pub(super) struct Course {
    looks: Vec<Look>,
}

#[derive(Clone, Copy, Debug)]
struct Look {
    seconds: f64,
    bytes: u64,
}

impl Course {
    /// So many bytes are done at this time, from whatever it counts. In order.
    pub(super) fn note(&mut self, seconds: f64, bytes: u64) {
        self.looks.push(Look { seconds, bytes });
    }

    /// Whether there was a look.
    pub(super) fn has_begun(&self) -> bool {
        !self.looks.is_empty()
    }

    /// At the last look.
    pub(super) fn bytes(&self) -> u64 {
        self.looks.last().map_or(0, |look| look.bytes)
    }

    /// From the first look to the last.
    pub(super) fn seconds(&self) -> f64 {
        match (self.looks.first(), self.looks.last()) {
            (Some(first), Some(last)) => last.seconds - first.seconds,
            _ => 0.0,
        }
    }

    /// How it was in the middle: from a fifth to four fifths of all bytes, as whatever starts and ends takes its time whether a disk is small or large.
    pub(super) fn middle_bytes_per_second(&self) -> Option<f64> {
        let all = self.looks.last()?.bytes;
        let first = self.looks.iter().find(|look| look.bytes >= all / 5)?;
        let last = self.looks.iter().rfind(|look| look.bytes <= all / 5 * 4)?;
        let seconds = last.seconds - first.seconds;
        (seconds > 0.0).then(|| last.bytes.saturating_sub(first.bytes) as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn course(looks: &[(f64, u64)]) -> Course {
        let mut course = Course::default();
        for (seconds, bytes) in looks {
            course.note(*seconds, *bytes);
        }
        course
    }

    #[test]
    fn a_slow_start_and_a_slow_end_are_not_in_the_middle() {
        let course = course(&[(1.0, 0), (3.0, 20), (4.0, 40), (6.0, 80), (7.0, 90), (11.0, 100)]);
        assert_eq!(course.middle_bytes_per_second(), Some(20.0));
        assert!((course.seconds() - 10.0).abs() < 1e-9);
    }

    #[test]
    fn what_was_hardly_looked_at_has_no_middle() {
        for looks in [&[][..], &[(1.0, 5)], &[(1.0, 0), (2.0, 100)]] {
            assert_eq!(course(looks).middle_bytes_per_second(), None);
        }
    }
}
