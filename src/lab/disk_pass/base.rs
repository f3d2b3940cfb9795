//! What of a disk crosses whose base image the destination has.

use std::os::unix::fs::MetadataExt as _;

use super::content::{self, CLUSTER};
use super::report::OnBase;
use super::scene::Scene;
use super::{Bench, say};
use crate::lab::error::LabError;
use crate::lab::random::Random;

pub(super) async fn measure(bench: &Bench<'_>, found: &mut Vec<OnBase>) -> Result<(), LabError> {
    let [at_a, _] = bench.disks(None);
    let base = bench.stage.directory.join("base.raw");
    content::copy(&at_a.image, &base).await?;
    let mut random = Random(bench.args.seed);
    let clusters = content::clusters_to_change(bench.disk_bytes(), bench.args.changed_percent / 100.0, &mut random);
    // Every block of 4 KiB in them is another one.
    let changed_bytes = clusters.len() as u64 * CLUSTER;
    content::change(&at_a.image, clusters, bench.args.seed.wrapping_add(1)).await?;
    for repetition in 1..=bench.args.repeat {
        let seed = bench.args.seed.wrapping_add(u64::from(repetition));
        let [at_a, at_b] = bench.disks(Some(base.clone()));
        let arrived = at_b.image.clone();
        let scene = Scene::set(bench, [at_a, at_b], seed).await?;
        let before = scene.carried().await?;
        let migration = scene.begin().await?;
        let course = scene.first_pass(migration, None).await?;
        let after = scene.carried().await?;
        let (report, content) = scene.finish(migration).await?;
        let image_bytes = std::fs::metadata(&arrived).map_or(0, |image| image.blocks() * 512);
        let disks = report.disks.unwrap_or_default();
        let [forward_bytes, backward_bytes] = after.since(&before);
        let on_base = OnBase {
            repetition,
            disk_bytes: bench.disk_bytes(),
            changed_bytes,
            seconds: course.seconds(),
            forward_bytes,
            backward_bytes,
            frame_bytes: disks.wire_bytes,
            same_bytes: disks.same_bytes,
            image_bytes,
            difference: content.err(),
            link_fault: scene.leave().await?,
        };
        say(&format!("{repetition} of {}, {on_base}", bench.args.repeat));
        found.push(on_base);
    }
    Ok(())
}
