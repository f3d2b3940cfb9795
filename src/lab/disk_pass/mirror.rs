//! The same disk by QEMU itself: `blockdev-mirror` into the destination QEMU's NBD server, over TCP with tuned hosts.

use std::time::Duration;

use serde_json::{Value, json};

use super::Bench;
use super::course::Course;
use super::report::{By, Pass};
use crate::gateway::clock;
use crate::lab::disks::image;
use crate::lab::engine::proof::boot;
use crate::lab::engine::{Engine, hosts};
use crate::lab::error::LabError;
use crate::lab::guest::Start;
use crate::lab::link::ADDRESS_B;
use crate::lab::monitor::Monitor;
use crate::lab::process::run;
use crate::lab::site::Site;
use crate::lab::usage::Watch;

/// One pass, from an empty stage to an empty stage.
pub(super) async fn pass(bench: &Bench<'_>, repetition: u32) -> Result<Pass, LabError> {
    let stage = &bench.stage;
    let seed = bench.args.seed.wrapping_add(u64::from(repetition));
    stage.link.up(&bench.args.profile, seed).await?;
    let mut sites = stage.sites()?;
    for (site, disk) in sites.iter_mut().zip(bench.disks(None)) {
        site.files.disk = Some(disk);
        hosts::tune(&site.namespace, Engine::QemuTcpBbrTuned).await?;
    }
    let copied = copy(bench, &sites, repetition).await;
    stage.kill_all().await;
    let fault = stage.link.carried().await?.fault;
    stage.link.down().await?;
    stage.remove_sites(&sites);
    bench.remove_arrived();
    let mut pass = copied?;
    pass.link_fault = fault;
    Ok(pass)
}

async fn copy(bench: &Bench<'_>, sites: &[Site; 2], repetition: u32) -> Result<Pass, LabError> {
    let [a, b] = sites;
    if let Some(disk) = &b.files.disk {
        let (file, bytes) = (disk.image.display().to_string(), bench.disk_bytes().to_string());
        run(&["qemu-img", "create", "-q", "-f", disk.format, &file, &bytes]).await?;
    }
    let (source, _heartbeat) = boot(&bench.launch, a).await?;
    let mut destination = b.start_qemu(&bench.launch, Start::ReceivePaused)?;
    let mut at_b = Monitor::connect(&b.files.qmp, QEMU_START).await?;
    let address = json!({ "type": "inet", "data": { "host": ADDRESS_B.to_string(), "port": PORT } });
    at_b.execute("nbd-server-start", json!({ "addr": address })).await?;
    let export = json!({ "type": "nbd", "id": "disk", "node-name": "disk", "name": "disk", "writable": true });
    at_b.execute("block-export-add", export).await?;
    let mut at_a = Monitor::connect(&a.files.qmp, QEMU_START).await?;
    let before = bench.stage.link.carried().await?;
    let watch = Watch::start([a.directory.clone(), b.directory.clone()]);
    let begun = clock::now();
    let server = json!({ "type": "inet", "host": ADDRESS_B.to_string(), "port": PORT });
    let remote = json!({ "driver": "nbd", "node-name": "remote", "server": server, "export": "disk" });
    at_a.execute("blockdev-add", remote).await?;
    let job = json!({ "job-id": JOB, "device": "disk", "target": "remote", "sync": "full" });
    at_a.execute("blockdev-mirror", job).await?;
    let mut course = Course::default();
    course.note(0.0, 0);
    loop {
        let jobs = at_a.execute("query-block-jobs", json!({})).await?;
        let seconds = clock::now().duration_since(begun).as_secs_f64();
        let Some(job) = jobs.as_array().and_then(|jobs| jobs.first()) else {
            return Err(failed("the job ended before it was ready".to_owned()));
        };
        if job["error"].is_string() || job["io-status"] == "failed" {
            return Err(failed(job.to_string()));
        }
        course.note(seconds, job["offset"].as_u64().unwrap_or(0));
        if job["ready"] == Value::Bool(true) {
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    let usage = watch.stop();
    let after = bench.stage.link.carried().await?;
    // The two disks part as they are.
    at_a.execute("block-job-cancel", json!({ "device": JOB })).await?;
    while at_a.execute("query-block-jobs", json!({})).await? != json!([]) {
        tokio::time::sleep(LOOK).await;
    }
    source.kill().await;
    at_b.execute("quit", json!({})).await?;
    destination.wait().await?;
    let content = image::compare_sites(sites).await?;
    Ok(Pass::of(
        By::Mirror,
        repetition,
        bench.disk_bytes(),
        &course,
        [&before, &after],
        &usage,
        content,
    ))
}

fn failed(said: String) -> LabError {
    LabError::NoFigures {
        tool: "QEMU's mirror",
        said,
    }
}

const JOB: &str = "pass";
const PORT: &str = "10809";
const LOOK: Duration = Duration::from_millis(20);
const QEMU_START: Duration = Duration::from_secs(20);
