//! The search for the highest dirty rate at which an engine still converges: doubling until it does not, then halving on a
//! logarithmic scale.

/// One search.
#[derive(Clone, Debug)]
pub(super) struct Search {
    from: u64,
    to: u64,
    factor: f64,
    /// The highest rate that converged.
    converges: Option<u64>,
    /// The lowest rate that did not.
    fails: Option<u64>,
}

impl Search {
    /// Between two rates in pages a second, until the answer is known as well as `factor`.
    pub(super) fn new(from: u64, to: u64, factor: f64) -> Self {
        Self {
            from,
            to,
            factor,
            converges: None,
            fails: None,
        }
    }

    /// The rate to try next. `None`: the answer is known as well as it was asked for.
    pub(super) fn next(&self) -> Option<u64> {
        match (self.converges, self.fails) {
            (None, None) => Some(self.from),
            (None, Some(_)) => None,
            (Some(low), None) => (low < self.to).then(|| low.saturating_mul(2).min(self.to)),
            (Some(low), Some(high)) => {
                let middle = ((low as f64) * (high as f64)).sqrt().round() as u64;
                let is_known = high as f64 / low as f64 <= self.factor;
                (!is_known && middle > low && middle < high).then_some(middle)
            }
        }
    }

    /// What became of `rate`.
    pub(super) fn tell(&mut self, rate: u64, converged: bool) {
        if converged {
            self.converges = Some(self.converges.unwrap_or(0).max(rate));
        } else {
            self.fails = Some(self.fails.unwrap_or(u64::MAX).min(rate));
        }
    }

    pub(super) fn converges(&self) -> Option<u64> {
        self.converges
    }

    pub(super) fn fails(&self) -> Option<u64> {
        self.fails
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Searches for a frontier at `truth`, and counts the moves.
    fn find(search: &mut Search, truth: u64) -> u32 {
        let mut moves = 0;
        while let Some(rate) = search.next() {
            search.tell(rate, rate <= truth);
            moves += 1;
            assert!(moves < 64, "{search:?}");
        }
        moves
    }

    proptest! {
        #[test]
        fn the_frontier_is_known_as_well_as_it_was_asked_for(truth in 1_000_u64..60_000, factor in 1.05_f64..2.0) {
            let mut search = Search::new(1_000, 64_000, factor);
            find(&mut search, truth);
            let (low, high) = (search.converges().unwrap(), search.fails().unwrap());
            prop_assert!(low <= truth && truth < high);
            prop_assert!(high as f64 / low as f64 <= factor * 1.01);
        }
    }

    #[test]
    fn an_engine_that_converges_everywhere_or_nowhere_is_known_by_the_ends_of_the_range() {
        let mut search = Search::new(1_000, 5_000, 1.25);
        find(&mut search, u64::MAX);
        assert_eq!((search.converges(), search.fails()), (Some(5_000), None));
        let mut search = Search::new(1_000, 5_000, 1.25);
        assert_eq!(find(&mut search, 0), 1);
        assert_eq!((search.converges(), search.fails()), (None, Some(1_000)));
    }
}
