//! The middle of several runs, and how far they lie apart.

use super::quantity::Quantity;

/// A median with its spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    /// Lower and upper end of what [`Extent`] says.
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) count: usize,
}

/// What the ends of a spread are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// One value has none.
    Single,
    /// The least and the greatest, of two or three.
    Range,
    /// The first and the third quartile, of four and more.
    Quartiles,
}

impl Extent {
    /// Of so many values.
    pub(super) fn of(count: usize) -> Self {
        match count {
            0 | 1 => Self::Single,
            // A quartile of three values is made up for the most part.
            2 | 3 => Self::Range,
            _ => Self::Quartiles,
        }
    }
}

impl Spread {
    /// Of nothing there is none.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let count = values.len();
        let (low, high) = match Extent::of(count) {
            Extent::Quartiles => (quantile(&values, 0.25)?, quantile(&values, 0.75)?),
            Extent::Single | Extent::Range => (*values.first()?, *values.last()?),
        };
        Some(Self {
            median: quantile(&values, 0.5)?,
            low,
            high,
            count,
        })
    }

    /// The ends as text; nothing for a single value.
    pub(super) fn ends(&self, quantity: Quantity) -> Option<String> {
        (self.count > 1).then(|| quantity.show_range(self.low, self.high))
    }
}

/// Between the two nearest values in proportion (type 7 of Hyndman and Fan 1996, what R and NumPy do unasked).
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let place = share * sorted.len().checked_sub(1)? as f64;
    let below = *sorted.get(place.floor() as usize)?;
    let above = *sorted.get(place.ceil() as usize)?;
    Some(below + (above - below) * place.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_values_have_a_range_and_four_have_quartiles() {
        let three = Spread::of([3.0, 1.0, 2.0]).unwrap();
        assert_eq!((three.low, three.median, three.high), (1.0, 2.0, 3.0));
        let four = Spread::of([1.0, 2.0, 3.0, 4.0]).unwrap();
        assert_eq!((four.low, four.median, four.high), (1.75, 2.5, 3.25));
    }

    #[test]
    fn one_value_has_no_ends_and_none_has_no_spread() {
        assert_eq!(Spread::of([5.0]).unwrap().ends(Quantity::Seconds), None);
        assert_eq!(Spread::of([]), None);
    }
}
