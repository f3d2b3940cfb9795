//! How fast the first pass is, by the gateways and by QEMU's mirror in turn.

use super::report::{By, Pass};
use super::scene::Scene;
use super::{Bench, mirror, say};
use crate::lab::error::LabError;

pub(super) async fn measure(bench: &Bench<'_>, passes: &mut Vec<Pass>) -> Result<(), LabError> {
    for repetition in 1..=bench.args.repeat {
        // Who is first changes, so that neither always has what the machine does then.
        let turns = match repetition % 2 {
            1 => [By::Gateways, By::Mirror],
            _ => [By::Mirror, By::Gateways],
        };
        for by in turns {
            let pass = match by {
                By::Gateways => pass(bench, repetition, true).await?,
                By::Mirror => mirror::pass(bench, repetition).await?,
            };
            say(&format!("{repetition} of {}, {pass}", bench.args.repeat));
            passes.push(pass);
        }
    }
    Ok(())
}

/// One pass by the gateways, from an empty stage to an empty stage.
pub(super) async fn pass(bench: &Bench<'_>, repetition: u32, with_test: bool) -> Result<Pass, LabError> {
    let seed = bench.args.seed.wrapping_add(u64::from(repetition));
    let scene = Scene::set(bench, bench.disks(None), seed).await?;
    let tested = match with_test {
        true => Some(scene.test_link(bench.args.test).await?),
        false => None,
    };
    let before = scene.carried().await?;
    let watch = scene.watch();
    let migration = scene.begin().await?;
    let course = scene.first_pass(migration, None).await?;
    let usage = watch.stop();
    let after = scene.carried().await?;
    let (_, content) = scene.finish(migration).await?;
    let mut pass = Pass::of(
        By::Gateways,
        repetition,
        bench.disk_bytes(),
        &course,
        [&before, &after],
        &usage,
        content,
    );
    pass.link_test_bytes_per_second = tested;
    pass.link_fault = scene.leave().await?;
    Ok(pass)
}
