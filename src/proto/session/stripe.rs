//! Which of a link's connections a frame goes over, where it has several.

use crate::proto::wire::repair::RUN;

/// The connection of the frame `sequence`, from 0 to `connections`, exclusive.
///
/// Frames go in runs as long as those that a repair covers: a repair names lanes by their numbers on the connection that it comes by, so all
/// of them must be there, and its own sequence, that of the first, leads it there too.
#[must_use]
pub fn connection_of(sequence: u64, connections: usize) -> usize {
    let turn = sequence / RUN % connections.max(1) as u64;
    usize::try_from(turn).expect("it is below a usize")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_connection_takes_its_turn_for_a_run_of_frames() {
        let turns: Vec<usize> = (0..4 * RUN).map(|sequence| connection_of(sequence, 3)).collect();
        for (run, turns) in turns.chunks(RUN as usize).enumerate() {
            assert!(turns.iter().all(|turn| *turn == run % 3), "run {run}: {turns:?}");
        }
        assert!((0..100).all(|sequence| connection_of(sequence, 1) == 0));
        assert_eq!(connection_of(u64::MAX, 8), 7);
    }
}
