//! Labels that want to be at the same height.

/// Moves places apart until neighbours are `gap` from each other, within `top..=bottom`, each as near to where it wanted to be as
/// the others allow; their order is kept. Where the room is too small, the lowest stay within and the gap shrinks.
pub(super) fn spread(places: &mut [f64], gap: f64, top: f64, bottom: f64) {
    let mut order: Vec<usize> = (0..places.len()).collect();
    order.sort_by(|&one, &other| places[one].total_cmp(&places[other]));
    let room = (bottom - top).max(0.0);
    let gap = gap.min(room / places.len().saturating_sub(1).max(1) as f64);
    // Blocks of labels that touch, each centred on the middle of what its members want.
    let mut blocks: Vec<Block> = Vec::new();
    for &index in &order {
        let mut block = Block {
            wanted: places[index],
            count: 1,
        };
        block.keep_within(gap, top, bottom);
        while let Some(above) = blocks.pop() {
            if above.end(gap) + gap <= block.start(gap) {
                blocks.push(above);
                break;
            }
            block = above.joined(block);
            block.keep_within(gap, top, bottom);
        }
        blocks.push(block);
    }
    let heights = blocks
        .iter()
        .flat_map(|block| (0..block.count).map(move |index| block.start(gap) + index as f64 * gap));
    for (index, height) in order.into_iter().zip(heights) {
        places[index] = height;
    }
}

#[derive(Clone, Copy)]
struct Block {
    /// Of its middle.
    wanted: f64,
    count: usize,
}

impl Block {
    fn start(self, gap: f64) -> f64 {
        self.wanted - self.half(gap)
    }

    fn end(self, gap: f64) -> f64 {
        self.wanted + self.half(gap)
    }

    fn half(self, gap: f64) -> f64 {
        (self.count - 1) as f64 * gap / 2.0
    }

    fn joined(self, other: Self) -> Self {
        let count = self.count + other.count;
        let sum = self.wanted * self.count as f64 + other.wanted * other.count as f64;
        Self {
            wanted: sum / count as f64,
            count,
        }
    }

    fn keep_within(&mut self, gap: f64, top: f64, bottom: f64) {
        let half = self.half(gap);
        self.wanted = self.wanted.min(bottom - half).max(top + half);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_do_not_overlap_and_keep_their_order() {
        let mut places = [50.0, 10.0, 51.0, 52.0];
        spread(&mut places, 14.0, 0.0, 100.0);
        assert_eq!(places, [37.0, 10.0, 51.0, 65.0]);
    }

    #[test]
    fn labels_stay_within_the_picture() {
        let mut places = [99.0, 100.0, 1.0];
        spread(&mut places, 14.0, 5.0, 95.0);
        assert_eq!(places, [81.0, 95.0, 5.0]);
    }

    #[test]
    fn too_many_labels_share_the_room() {
        let mut places = [10.0; 11];
        spread(&mut places, 14.0, 0.0, 100.0);
        assert_eq!((places[0], places[1], places[10]), (0.0, 10.0, 100.0));
        spread(&mut [], 14.0, 0.0, 100.0);
    }
}
