//! In which order a plan's moves are made: engines take turns, so that what the machine does meanwhile meets all of them.

use super::file::{Plan, PlannedLink};
use crate::lab::engine::Engine;
use crate::lab::guest::GuestDials;

/// One move of the matrix.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    pub(super) link: PlannedLink,
    pub(super) guest: String,
    /// The guest's dials, with the seed of this cell.
    pub(super) dials: GuestDials,
    /// As the plan names it.
    pub(super) qemu: String,
    pub(super) engine: Engine,
    pub(super) seed: u64,
    /// From 1.
    pub(super) repetition: u32,
}

/// Every move of the plan. Within a repetition all engines move the same guest over the same link one after the other; who is first
/// changes with the repetition.
pub(super) fn cells(plan: &Plan) -> Vec<Cell> {
    let mut cells = Vec::with_capacity(plan.moves());
    for repetition in 1..=plan.repetitions {
        for &seed in &plan.seeds {
            for link in &plan.links {
                for (guest, dials) in &plan.guests {
                    for qemu in &plan.qemus {
                        let mut engines = plan.engines.clone();
                        let first = (repetition as usize - 1) % engines.len();
                        engines.rotate_left(first);
                        cells.extend(engines.into_iter().map(|engine| Cell {
                            link: link.clone(),
                            guest: plan.guest_on(guest, qemu),
                            dials: GuestDials { seed, ..dials.clone() },
                            qemu: qemu.clone(),
                            engine,
                            seed,
                            repetition,
                        }));
                    }
                }
            }
        }
    }
    cells
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::wan::Profile;

    #[test]
    fn engines_take_turns_and_nothing_is_left_out() {
        let profiles = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/lab/profiles");
        let plan = Plan {
            title: String::new(),
            links: vec![PlannedLink {
                file: profiles.join("lan.toml"),
                profile: Profile::find(&profiles, "lan").unwrap(),
            }],
            guests: BTreeMap::from([("small".to_owned(), GuestDials::small())]),
            engines: vec![Engine::Longhaul, Engine::QemuTcpBbrTuned, Engine::QemuTls],
            qemus: vec!["stable".to_owned()],
            seeds: vec![1, 2],
            repetitions: 3,
            time_limit: Duration::from_secs(1),
            frontier: None,
        };
        let cells = cells(&plan);
        assert_eq!(cells.len(), plan.moves());
        let first: Vec<Engine> = cells.chunks(3).map(|turn| turn[0].engine).collect();
        let (a, b, c) = (Engine::Longhaul, Engine::QemuTcpBbrTuned, Engine::QemuTls);
        assert_eq!(first, [a, a, b, b, c, c]);
        assert!(cells.iter().all(|cell| cell.dials.seed == cell.seed));
    }
}
