//! Where values go, and which of them are written at an axis.

/// A range of values, laid onto a line of 0..=1.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    low: f64,
    high: f64,
    /// Each step of the same length is the same factor.
    pub(super) logarithmic: bool,
    /// Values to be marked, in order.
    pub(super) ticks: Vec<f64>,
}

impl Axis {
    /// From zero to `most` or a little more, with about `count` ticks.
    pub(super) fn linear(most: f64, count: usize) -> Self {
        let most = if most > 0.0 { tame(most) } else { 1.0 };
        let step = round_step(most / count.max(1) as f64);
        // Almost a whole step is no reason for another one.
        let steps = (most / step - 0.02).ceil().max(1.0);
        Self {
            low: 0.0,
            high: (steps * step).max(most),
            logarithmic: false,
            ticks: (0..=steps as u32).map(|index| f64::from(index) * step).collect(),
        }
    }

    /// As [`Self::linear`], but the axis ends at `most`.
    pub(super) fn up_to(most: f64, count: usize) -> Self {
        let mut axis = Self::linear(most, count);
        if most > 0.0 {
            axis.high = tame(most);
            axis.ticks.retain(|tick| *tick <= axis.high * 1.000_001);
        }
        axis
    }

    /// For values that are all above zero: linear where they are close to each other, else logarithmic.
    pub(super) fn of_magnitudes(values: impl IntoIterator<Item = f64>) -> Self {
        let (mut least, mut most) = (f64::INFINITY, 0.0f64);
        for value in values.into_iter().filter(|value| *value > 0.0).map(tame) {
            least = least.min(value);
            most = most.max(value);
        }
        if most <= least * WIDE {
            return Self::linear(most, 5);
        }
        // From the next mark below to the next above.
        let least = least.max(most * 1e-9);
        let marks: Vec<f64> = (least.log10().floor() as i32..=most.log10().ceil() as i32)
            .flat_map(|decade| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(decade)))
            .collect();
        let low = marks
            .iter()
            .rev()
            .copied()
            .find(|mark| *mark <= least * 0.95)
            .unwrap_or(least * 0.5);
        let high = marks
            .iter()
            .copied()
            .find(|mark| *mark >= most * 1.05)
            .unwrap_or(most * 2.0);
        let within = |digits: &[f64], every: i32| -> Vec<f64> {
            (low.log10().floor() as i32..=high.log10().ceil() as i32)
                .filter(|decade| decade.rem_euclid(every) == 0)
                .flat_map(|decade| digits.iter().map(move |digit| digit * 10f64.powi(decade)))
                .filter(|mark| (low * 0.999..=high * 1.001).contains(mark))
                .collect()
        };
        let ticks = [within(&[1.0, 2.0, 5.0], 1), within(&[1.0, 3.0], 1), within(&[1.0], 1)]
            .into_iter()
            .find(|ticks| ticks.len() <= MOST_TICKS)
            .unwrap_or_else(|| within(&[1.0], 3));
        Self {
            low,
            high,
            logarithmic: true,
            ticks,
        }
    }

    /// Where a value is; what is beyond an end is at it.
    pub(super) fn at(&self, value: f64) -> f64 {
        let share = if self.logarithmic {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 }
    }
}

/// No axis goes beyond these; what a file says is not always of this world.
fn tame(value: f64) -> f64 {
    value.clamp(1e-12, 1e18)
}

/// The next of 1, 2, 5, 10, 20, …
fn round_step(step: f64) -> f64 {
    let power = 10f64.powi(step.log10().floor() as i32);
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|digit| digit * power)
        .find(|round| *round >= step * 0.999)
        .unwrap_or(step)
}

/// Values a factor of this apart cannot both be read on a linear axis.
const WIDE: f64 = 6.0;

const MOST_TICKS: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_axis_begins_at_zero_and_ends_at_a_round_number() {
        let axis = Axis::linear(9.3, 5);
        assert_eq!(axis.ticks, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!((axis.at(0.0), axis.at(5.0), axis.at(99.0)), (0.0, 0.5, 1.0));
    }

    #[test]
    fn magnitudes_that_are_far_apart_get_a_logarithmic_axis() {
        assert!(!Axis::of_magnitudes([1.0, 5.9]).logarithmic);
        let axis = Axis::of_magnitudes([0.2, 150.0]);
        assert!(axis.logarithmic && axis.ticks.len() <= MOST_TICKS, "{axis:?}");
        assert!(axis.at(0.2) > 0.0 && axis.at(150.0) < 1.0 && axis.at(0.2) < axis.at(150.0));
    }

    #[test]
    fn absurd_values_end() {
        for values in [
            [1e-300, 1e12],
            [0.0, 0.0],
            [f64::MIN_POSITIVE, f64::MAX],
            [1e-12, 1e-12],
        ] {
            let axis = Axis::of_magnitudes(values);
            assert!(axis.ticks.len() < 20, "{values:?}: {axis:?}");
            assert!((0.0..=1.0).contains(&axis.at(values[0])));
        }
        assert!(Axis::linear(f64::NAN, 5).ticks.len() < 20);
        assert!(Axis::linear(f64::MAX, 5).ticks.len() < 20);
        assert!(Axis::up_to(0.0, 5).ticks.len() < 20);
    }
}
