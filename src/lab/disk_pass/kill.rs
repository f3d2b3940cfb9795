//! `kill -9` of a gateway while the disk is read for the first time.

use std::time::Duration;

use super::report::{By, Kill, Report};
use super::scene::Scene;
use super::{Bench, rate, say};
use crate::lab::error::LabError;
use crate::lab::random::Random;

pub(super) async fn measure(bench: &Bench<'_>, report: &mut Report) -> Result<(), LabError> {
    if !report.passes.iter().any(|pass| pass.by == By::Gateways) {
        say("a pass that nobody disturbs");
        let pass = rate::pass(bench, 1, false).await?;
        report.passes.push(pass);
    }
    let Some(undisturbed) = report.undisturbed_bytes() else {
        return Ok(());
    };
    let mut random = Random(bench.args.seed);
    let count = 2 * bench.args.kills;
    for number in 0..count {
        let case = Case {
            place: number as usize % 2,
            // Each in its own part of the pass.
            share: (f64::from(number / 2) + random.unit()) / f64::from(bench.args.kills),
            away: random.between(AWAY),
            seed: bench.args.seed.wrapping_add(u64::from(number)),
        };
        let kill = case.run(bench, undisturbed).await?;
        say(&format!("{} of {count}, {kill}", number + 1));
        report.kills.push(kill);
    }
    Ok(())
}

/// One kill that is about to be made.
struct Case {
    /// Index of the site.
    place: usize,
    /// Of the disk that has been read by then.
    share: f64,
    /// Until there is a gateway again.
    away: Duration,
    seed: u64,
}

impl Case {
    /// From an empty stage to an empty stage.
    async fn run(&self, bench: &Bench<'_>, undisturbed: u64) -> Result<Kill, LabError> {
        let mut scene = Scene::set(bench, bench.disks(None), self.seed).await?;
        let before = scene.carried().await?;
        let migration = scene.begin().await?;
        let until = (bench.disk_bytes() as f64 * self.share) as u64;
        let course = scene.first_pass(migration, Some(until)).await?;
        scene.kill_gateway(self.place, self.away).await?;
        let waiting = scene.waiting().await?;
        let after = scene.carried().await?;
        let (report, content) = scene.finish(waiting.migration).await?;
        let [forward_bytes, backward_bytes] = after.since(&before);
        Ok(Kill {
            gateway: ["A", "B"][self.place],
            at_seconds: course.seconds(),
            away_seconds: self.away.as_secs_f64(),
            read_bytes: course.bytes(),
            disk_bytes: bench.disk_bytes(),
            begun_again: waiting.begun_again,
            forward_bytes,
            backward_bytes,
            sent_twice_bytes: forward_bytes.saturating_sub(undisturbed),
            same_bytes: report.disks.unwrap_or_default().same_bytes,
            difference: content.err(),
            link_fault: scene.leave().await?,
        })
    }
}

/// As an init system takes to start it again.
const AWAY: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(2)];
