//! A VM that is off: a disk of which a fifth is in use crosses, and becomes another format on the way.

use std::os::unix::fs::MetadataExt as _;

use super::report::Cold;
use super::scene::Scene;
use super::{Bench, content, say};
use crate::lab::error::LabError;
use crate::lab::guest::GuestDisk;
use crate::lab::process::run;

/// The whole of the disk, for each byte that is in use.
const SPARSE: u64 = 5;

/// From, to.
const FORMATS: [[&str; 2]; 2] = [["raw", "qcow2"], ["qcow2", "vmdk"]];

pub(super) async fn measure(bench: &Bench<'_>, found: &mut Vec<Cold>) -> Result<(), LabError> {
    let image = |name: &str, format: &'static str| GuestDisk {
        image: bench.stage.directory.join(format!("{name}.{format}")),
        format,
        is_shared: false,
        base: None,
    };
    let disk = image("cold", "raw");
    let used_bytes = bench.disk_bytes();
    let disk_bytes = used_bytes * SPARSE;
    let seed = bench.args.seed.wrapping_add(1000);
    content::make_sparse(&disk.image, used_bytes, SPARSE, seed).await?;
    for [from, to] in FORMATS {
        let [at_a, at_b] = [image("cold", from), image("cold-arrived", to)];
        if from != disk.format {
            let files = [&disk, &at_a].map(|disk| disk.image.display().to_string());
            run(&["qemu-img", "convert", "-O", from, &files[0], &files[1]]).await?;
        }
        let arrived = at_b.image.clone();
        let scene = Scene::set_without_guest(bench, [at_a, at_b], seed).await?;
        let link_test_bytes_per_second = scene.test_link(bench.args.test).await?;
        let before = scene.carried().await?;
        let watch = scene.watch();
        let (report, content) = scene.move_cold().await?;
        let usage = watch.stop();
        let after = scene.carried().await?;
        let [forward_bytes, backward_bytes] = after.since(&before);
        let cold = Cold {
            from,
            to,
            disk_bytes,
            used_bytes,
            seconds: report.total_seconds,
            bytes_per_second: used_bytes as f64 / report.total_seconds,
            link_test_bytes_per_second,
            forward_bytes,
            backward_bytes,
            image_bytes: std::fs::metadata(&arrived).map_or(0, |image| image.blocks() * 512),
            cpu_seconds: usage.cpu_seconds,
            waited_share: usage.waited_for_others(),
            difference: content.err(),
            link_fault: scene.leave().await?,
        };
        say(&cold.to_string());
        found.push(cold);
        let _ = std::fs::remove_file(arrived);
    }
    Ok(())
}
