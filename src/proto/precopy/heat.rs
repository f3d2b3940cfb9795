//! Which pages a guest writes again and again: sending them again before it stands is of no use.
//!
//! For an engine that chooses what it sends. A page is hot while it was dirty at each of the last few looks; hot pages are held back to the end as long as
//! they fit into what may be sent there. Each was sent before that, so that its last version is a difference.

/// A page that was dirty at so many looks in a row is hot: the least of them for which what is hot fits is used.
const LOOKS_IN_A_ROW: [u32; 3] = [3, 5, 8];

/// What is held back may take so much of what may be left: the rest is for what the guest writes meanwhile.
const SHARE: f64 = 0.5;

/// Looks at which each page was dirty, the last eight of them.
#[derive(Clone, Debug)]
pub struct Heat {
    /// By block and page; the lowest bit is the last look.
    looks: Vec<Vec<u8>>,
}

/// What is held back for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Looks in a row; `None`: nothing is held back.
    looks: Option<u32>,
    /// How many pages that were dirty at the last look.
    pub pages: u64,
}

impl Heat {
    /// Of blocks of so many pages, none of which was ever dirty.
    #[must_use]
    pub fn new(pages: impl IntoIterator<Item = u64>) -> Self {
        let cold = |pages: u64| vec![0; pages as usize];
        Self {
            looks: pages.into_iter().map(cold).collect(),
        }
    }

    /// Takes in a look at 64 pages of a block, of which these were dirty; fewer at a block's end. Every page is to be looked at equally often.
    ///
    /// # Panics
    /// Where there is no such block, or no such pages in it.
    pub fn look(&mut self, block: usize, word: usize, dirty: u64) {
        let pages = &mut self.looks[block][word * 64..];
        for (bit, looks) in pages.iter_mut().take(64).enumerate() {
            *looks = *looks << 1 | (dirty >> bit & 1) as u8;
        }
    }

    /// What to hold back where `allowed` pages may be left when the guest is stopped.
    #[must_use]
    pub fn held(&self, allowed: u64) -> Held {
        let most = (allowed as f64 * SHARE) as u64;
        let mut hot = [0_u64; LOOKS_IN_A_ROW.len()];
        for looks in self.looks.iter().flatten().filter(|looks| **looks & 1 == 1) {
            let row = looks.trailing_ones();
            for (hot, least) in hot.iter_mut().zip(LOOKS_IN_A_ROW) {
                *hot += u64::from(row >= least);
            }
        }
        let fits = LOOKS_IN_A_ROW
            .into_iter()
            .zip(hot)
            .find(|&(_, pages)| pages > 0 && pages <= most);
        Held {
            looks: fits.map(|(looks, _)| looks),
            pages: fits.map_or(0, |(_, pages)| pages),
        }
    }

    /// Those of 64 pages that are held back.
    ///
    /// # Panics
    /// Where there is no such block, or no such pages in it.
    #[must_use]
    pub fn held_of(&self, held: Held, block: usize, word: usize) -> u64 {
        let Some(least) = held.looks else { return 0 };
        let pages = &self.looks[block][word * 64..];
        let bits = pages.iter().take(64).enumerate();
        bits.fold(0, |bits, (bit, looks)| {
            bits | u64::from(looks.trailing_ones() >= least) << bit
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 100 pages, of which the first `hot` are dirty at each look.
    fn after(looks: usize, hot: u64) -> Heat {
        let mut heat = Heat::new([100]);
        for _ in 0..looks {
            heat.look(0, 0, (1 << hot) - 1);
            heat.look(0, 1, 0);
        }
        heat
    }

    #[test]
    fn a_page_is_hot_once_it_was_dirty_three_times_in_a_row() {
        assert_eq!(after(2, 4).held(100).pages, 0);
        let mut heat = after(3, 4);
        let held = heat.held(100);
        assert_eq!(
            (held.pages, heat.held_of(held, 0, 0), heat.held_of(held, 0, 1)),
            (4, 0b1111, 0)
        );
        heat.look(0, 0, 0b0101);
        heat.look(0, 1, 0);
        let held = heat.held(100);
        assert_eq!((held.pages, heat.held_of(held, 0, 0)), (2, 0b0101));
    }

    #[test]
    fn what_does_not_fit_is_not_held_back() {
        let heat = after(8, 40);
        assert_eq!(heat.held(80).pages, 40);
        let held = heat.held(79);
        assert_eq!((held.pages, heat.held_of(held, 0, 0)), (0, 0));
    }

    #[test]
    fn where_too_much_is_hot_only_the_hottest_is_held_back() {
        let mut heat = after(5, 2);
        for _ in 0..3 {
            heat.look(0, 0, u64::MAX);
            heat.look(0, 1, u64::MAX >> 28);
        }
        let held = heat.held(20);
        assert_eq!(
            (held.pages, heat.held_of(held, 0, 0), heat.held_of(held, 0, 1)),
            (2, 0b11, 0)
        );
        assert_eq!(heat.held(200).pages, 100);
    }
}
