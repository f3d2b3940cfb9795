//! The edge towards QEMU against real QEMU processes: SeaBIOS guests of 64 MiB under TCG.
//!
//! The gateway between the two is nothing but two sockets here, so what is tested is what QEMU does and how the agent takes
//! it. Needs qemu-system-x86 (7.2 or later); `LONGHAUL_TEST_QEMU` names another binary.

#[path = "qemu_agent/harness.rs"]
#[expect(
    clippy::unwrap_used,
    reason = "a harness is test code; clippy knows only test functions"
)]
mod harness;

use std::os::fd::AsRawFd;
use std::time::Duration;

use harness::{Handed, LIMIT, SOON, Site, disk_words, has_switchover_bandwidth, qemu_or_return, until};
use longhaul::hypervisor::process::{Process, ProcessError};
use longhaul::hypervisor::qemu::{
    DestinationError, DestinationVm, FreezeError, Frozen, LaunchError, MigrationStatus, OwnerError, PermitConditions,
    Refusal, RunState, Severity, SourceError, SourceVm, SwitchoverBandwidth, Undone, compare,
};
use longhaul::hypervisor::qmp::{QmpClient, QmpError};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn a_running_guest_leaves_one_qemu_and_runs_in_another() {
    let site = Site::new(&qemu_or_return!());
    let (guest, mut source) = site.source(&[]).await;
    let (_guard, mut destination) = site.destination(&[]).await;

    assert!(source.was_running());
    assert_eq!(source.condition().await.unwrap().refusals(false), []);
    let mismatches = compare(
        &source.inventory().await.unwrap(),
        &destination.inventory().await.unwrap(),
    );
    assert!(
        !mismatches.iter().any(|mismatch| mismatch.severity == Severity::Refuse),
        "{mismatches:?}"
    );
    destination.prepare(&site.path("stream")).await.unwrap();
    source.prepare(LIMIT).await.unwrap();

    let stream = site.take_stream(&source).await;
    let progress = source.progress().await.unwrap();
    assert_eq!(
        (progress.status, progress.ram.unwrap().remaining_bytes),
        (MigrationStatus::Completed, 0)
    );
    assert!(progress.downtime.is_some());

    let frozen = source.freeze().await.unwrap();
    assert_eq!(frozen.identity().pid, guest.pid());
    assert!(frozen.is_still_frozen().unwrap());

    let _stream = site.feed(&stream).await;
    let loaded = destination.wait_loaded(SOON).await.unwrap();
    assert_eq!(loaded.run_state(), &RunState::Paused);
    destination.cont(&loaded, SOON).await.unwrap();
    destination.announce_self(5).await.unwrap();
    destination.restore_settings().await.unwrap();
    assert_eq!(destination.run_state().await.unwrap(), RunState::Running);

    frozen.kill(SOON).await.unwrap();
    assert!(
        Process::reattach(source.identity())
            .unwrap()
            .is_none_or(|process| !process.is_alive())
    );
}

#[tokio::test]
async fn the_source_stays_paused_after_everything_is_sent_until_it_is_undone() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, mut source) = site.source(&[]).await;
    let mut events = source.events();
    let before = source.prepare(LIMIT).await.unwrap().clone();
    // The connection is gone when this returns, as if the gateway had been killed.
    site.take_stream(&source).await;
    let mut names = Vec::new();
    while names.last().is_none_or(|last| last != "MIGRATION completed") {
        let event = events.next().await.unwrap();
        names.push(
            format!("{} {}", event.name, event.data["status"].as_str().unwrap_or(""))
                .trim()
                .to_owned(),
        );
    }
    assert!(names.iter().any(|name| name == "STOP"), "{names:?}");
    assert!(!names.iter().any(|name| name == "RESUME"), "{names:?}");
    assert_eq!(source.run_state().await.unwrap(), RunState::PostMigrate);

    assert!(matches!(source.cancel(SOON).await, Err(SourceError::CancelTooLate)));
    assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running);
    assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running);
    source.restore_settings().await.unwrap();
    assert_eq!(source.prepare(LIMIT).await.unwrap(), &before);
}

#[tokio::test]
async fn a_migration_that_stalls_is_cancelled_and_the_guest_runs_on() {
    let site = Site::new(&qemu_or_return!());
    let (guest, mut source) = site.source(&[]).await;
    let before = source.prepare(LIMIT).await.unwrap().clone();
    // Nobody reads, so the stream stops when the socket is full.
    let stream = site.begin(&source).await;
    assert!(matches!(
        source.permit_conditions().await.unwrap(),
        PermitConditions::NotYet { .. }
    ));
    assert!(matches!(
        source.freeze().await,
        Err(FreezeError::NotReady(PermitConditions::NotYet { .. }))
    ));
    let refusals = source.condition().await.unwrap().refusals(true);
    assert!(
        matches!(refusals[..], [Refusal::MigrationUnderWay { .. }]),
        "{refusals:?}"
    );

    source.cancel(SOON).await.unwrap();
    assert_eq!(source.run_state().await.unwrap(), RunState::Running);
    assert!(matches!(
        source.permit_conditions().await.unwrap(),
        PermitConditions::Failed { .. }
    ));
    drop(stream);
    source.restore_settings().await.unwrap();
    assert_eq!(source.condition().await.unwrap().refusals(true), []);

    // A second attempt finds nothing of the first.
    assert_eq!(source.prepare(LIMIT).await.unwrap(), &before);
    assert!(!site.take_stream(&source).await.is_empty());
    drop(guest);
}

#[tokio::test]
async fn a_gateway_that_vanishes_in_the_middle_leaves_the_guest_running() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, mut source) = site.source(&[]).await;
    source.prepare(LIMIT).await.unwrap();
    let mut stream = site.begin(&source).await;
    let mut some = vec![0; 100_000];
    stream.read_exact(&mut some).await.unwrap();
    drop(stream);
    let PermitConditions::Failed { status, error } = source.wait_for_permit_conditions(SOON).await.unwrap() else {
        panic!("the migration has not failed");
    };
    assert_eq!(status, MigrationStatus::Failed, "{error:?}");
    assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running);
}

#[tokio::test]
async fn a_guest_that_was_paused_arrives_paused_and_stays_so_when_undone() {
    let site = Site::new(&qemu_or_return!());
    let guest = site.start(&site.qemu, "source", &[]).await;
    guest.third_party().await.execute("stop", json!({})).await.unwrap();
    let mut source = SourceVm::connect(&guest.qmp, SOON).await.unwrap();
    assert!(!source.was_running());
    let (_guard, mut destination) = site.destination(&[]).await;
    destination.prepare(&site.path("stream")).await.unwrap();
    source.prepare(LIMIT).await.unwrap();

    let stream = site.take_stream(&source).await;
    let frozen = source.freeze().await.unwrap();
    let _stream = site.feed(&stream).await;
    let loaded = destination.wait_loaded(SOON).await.unwrap();
    assert_eq!(loaded.run_state(), &RunState::Paused);

    destination.kill(SOON).await.unwrap();
    frozen.thaw().await.unwrap();
    assert_eq!(source.undo(SOON).await.unwrap(), Undone::PausedAsBefore);
    assert_ne!(source.run_state().await.unwrap(), RunState::Running);
}

#[tokio::test]
async fn a_frozen_source_survives_the_gateway_and_comes_back_when_it_is_thawed() {
    let site = Site::new(&qemu_or_return!());
    let (guest, mut source) = site.source(&[]).await;
    let remembered = source.prepare(LIMIT).await.unwrap().clone();
    site.take_stream(&source).await;
    let frozen = source.freeze().await.unwrap();
    let identity = frozen.identity().clone();
    drop((frozen, source));

    let error = QmpClient::connect(&guest.qmp, Duration::from_millis(300))
        .await
        .unwrap_err();
    assert!(matches!(error, QmpError::ProcessStopped { .. }), "{error}");
    let frozen = Frozen::reattach(&identity).unwrap().unwrap();
    frozen.thaw().await.unwrap();
    assert!(matches!(
        Frozen::reattach(&identity),
        Err(ProcessError::NotStopped { .. })
    ));

    let refused = SourceVm::connect(&guest.qmp, SOON).await.unwrap_err();
    assert!(refused.to_string().contains("migrated away already"), "{refused}");
    let mut source = SourceVm::reattach(&guest.qmp, &identity, true, Some(remembered), SOON)
        .await
        .unwrap();
    assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running);
    source.restore_settings().await.unwrap();
    source.quit(SOON).await.unwrap();
    assert!(Frozen::reattach(&identity).unwrap().is_none());
}

#[tokio::test]
async fn a_third_party_that_resumes_the_source_prevents_the_freeze() {
    let site = Site::new(&qemu_or_return!());
    let (guest, mut source) = site.source(&[]).await;
    source.prepare(LIMIT).await.unwrap();
    site.take_stream(&source).await;
    guest.third_party().await.execute("cont", json!({})).await.unwrap();
    let error = source.freeze().await.unwrap_err();
    assert!(
        matches!(error, FreezeError::NotReady(PermitConditions::Disturbed { .. })),
        "{error}"
    );
    assert_eq!(source.run_state().await.unwrap(), RunState::Running);
}

#[tokio::test]
async fn a_third_partys_cont_does_not_reach_a_frozen_source_that_is_killed() {
    let site = Site::new(&qemu_or_return!());
    let (guest, mut source) = site.source(&[]).await;
    let third = guest.third_party().await;
    source.prepare(LIMIT).await.unwrap();
    site.take_stream(&source).await;
    let frozen = source.freeze().await.unwrap();
    let error = third
        .execute_within("cont", json!({}), Duration::from_millis(300))
        .await
        .unwrap_err();
    assert!(matches!(error, QmpError::ProcessStopped { .. }), "{error}");
    frozen.kill(SOON).await.unwrap();
    until("the monitor is closed", || third.lost_reason().is_some()).await;
    assert_eq!(third.run_history().resumes, 0);
}

#[tokio::test]
async fn what_cannot_be_migrated_is_refused_by_name() {
    let site = Site::new(&qemu_or_return!());
    let disk = site.path("disk.img");
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let drive = format!("if=none,id=data,format=raw,file={}", disk.display());
    let flash = site.path("flash.img");
    std::fs::write(&flash, vec![0; 128 << 10]).unwrap();
    let flash_drive = format!("if=pflash,unit=1,format=raw,file={}", flash.display());
    let code = site.path("code.img");
    std::fs::write(&code, vec![0; 128 << 10]).unwrap();
    let code_drive = format!("if=pflash,unit=0,readonly=on,format=raw,file={}", code.display());
    let (guest, source) = site
        .source(&[
            "-drive",
            &drive,
            "-device",
            "virtio-blk-pci,drive=data",
            "-drive",
            &code_drive,
            "-drive",
            &flash_drive,
        ])
        .await;
    let third = guest.third_party().await;
    for name in ["return-path", "xbzrle"] {
        let on = json!({ "capabilities": [{ "capability": name, "state": true }] });
        third.execute("migrate-set-capabilities", on).await.unwrap();
    }
    let refusals = source.condition().await.unwrap().refusals(false);
    let texts: Vec<String> = refusals.iter().map(Refusal::to_string).collect();
    // The flash is writable too, and travels with memory.
    assert_eq!(texts.len(), 3, "{texts:?}");
    assert!(
        texts
            .iter()
            .any(|text| text.contains("The disk data (") && text.contains("disk.img")),
        "{texts:?}"
    );
    assert!(
        texts.iter().any(|text| text.contains("capability return-path is on")),
        "{texts:?}"
    );
    assert!(
        texts.iter().any(|text| text.contains("capability xbzrle is on")),
        "{texts:?}"
    );
    assert_eq!(source.condition().await.unwrap().refusals(true).len(), 2);
}

#[tokio::test]
async fn a_qemu_that_waits_for_a_migration_is_no_source_and_a_running_one_no_destination() {
    let site = Site::new(&qemu_or_return!());
    let waiting = site.start(&site.qemu, "waiting", &["-S", "-incoming", "defer"]).await;
    let error = SourceVm::connect(&waiting.qmp, SOON).await.unwrap_err();
    assert!(
        matches!(
            error,
            SourceError::NotMigratable {
                state: RunState::InMigrate,
                ..
            }
        ),
        "{error}"
    );
    let running = site.start(&site.qemu, "running", &[]).await;
    let mut destination = DestinationVm::connect(&running.qmp, SOON).await.unwrap();
    let error = destination.prepare(&site.path("stream")).await.unwrap_err();
    assert!(
        matches!(
            error,
            DestinationError::NotIncoming {
                state: RunState::Running,
                ..
            }
        ),
        "{error}"
    );
    let uri = format!("unix:{}", site.path("elsewhere").display());
    let listening = site.start(&site.qemu, "listening", &["-S", "-incoming", &uri]).await;
    let mut destination = DestinationVm::connect(&listening.qmp, SOON).await.unwrap();
    let error = destination.prepare(&site.path("stream")).await.unwrap_err();
    assert!(matches!(error, DestinationError::NotDeferred { .. }), "{error}");
}

#[tokio::test]
async fn machines_that_differ_are_told_apart_before_anything_moves() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, source) = site
        .source(&["-smp", "2", "-device", "virtio-rng-pci,id=rng0", "-vga", "std"])
        .await;
    let here = source.inventory().await.unwrap();
    assert_eq!(
        (here.machine.as_str(), here.vcpus, here.base_memory_bytes),
        ("pc-i440fx-7.2", 2, 64 << 20)
    );
    assert!(
        here.ram_blocks
            .iter()
            .any(|block| block.name == "pc.ram" && block.used_bytes == 64 << 20),
        "{here:?}"
    );
    assert!(
        here.devices
            .iter()
            .any(|one| one.id == "rng0" && one.bus == "pci.0" && !one.address.is_empty()),
        "{here:?}"
    );
    assert!(!here.cpu.features.is_empty() && !here.pci.is_empty() && !here.built_in.is_empty());
    assert_eq!(here.check_limits(), Ok(()));
    let travelled: longhaul::hypervisor::qemu::VmInventory =
        postcard::from_bytes(&postcard::to_stdvec(&here).unwrap()).unwrap();
    assert_eq!(travelled, here);

    let other = site
        .start(
            &site.qemu,
            "other",
            &[
                "-m",
                "128",
                "-smp",
                "1",
                "-vga",
                "none",
                "-incoming",
                "defer",
                "-cpu",
                "max",
            ],
        )
        .await;
    let destination = DestinationVm::connect(&other.qmp, SOON).await.unwrap();
    let sentences: Vec<String> = compare(&here, &destination.inventory().await.unwrap())
        .into_iter()
        .filter(|mismatch| mismatch.severity == Severity::Refuse)
        .map(|mismatch| mismatch.sentence)
        .collect();
    for part in [
        "64 MiB of memory and the destination 128 MiB",
        "2 vCPUs",
        "device virtio-rng-pci with the id rng0",
        "CPU models",
    ] {
        assert!(
            sentences.iter().any(|sentence| sentence.contains(part)),
            "{part}: {sentences:#?}"
        );
    }
}

#[tokio::test]
async fn an_alias_of_a_machine_type_is_resolved() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, source) = site.source(&["-M", "q35"]).await;
    let machine = source.inventory().await.unwrap().machine;
    assert!(machine.starts_with("pc-q35-"), "{machine}");
}

#[tokio::test]
async fn a_guest_is_not_started_by_loading_whatever_armed_it_before() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, mut source) = site.source(&[]).await;
    source.prepare(LIMIT).await.unwrap();
    let stream = site.take_stream(&source).await;
    let program = harness::destination_qemu(&site.qemu);
    for (name, arguments) in [
        ("without-s", &["-incoming", "defer"][..]),
        ("with-s", &["-S", "-incoming", "defer"]),
    ] {
        let guest = site.start(&program, name, arguments).await;
        // Arms the start even with -S.
        guest.third_party().await.execute("cont", json!({})).await.unwrap();
        let mut destination = DestinationVm::connect(&guest.qmp, SOON).await.unwrap();
        let mut events = destination.events();
        destination.prepare(&site.path("stream")).await.unwrap();
        let _stream = site.feed(&stream).await;
        let loaded = destination.wait_loaded(SOON).await.unwrap();
        assert_eq!(loaded.run_state(), &RunState::Paused, "{name}");
        destination.kill(SOON).await.unwrap();
        while let Ok(event) = events.next().await {
            assert_ne!(event.name, "RESUME", "{name}");
        }
    }
}

#[tokio::test]
async fn a_cont_during_loading_is_noticed() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, mut source) = site.source(&[]).await;
    source.prepare(LIMIT).await.unwrap();
    let stream = site.take_stream(&source).await;
    let guest = site
        .start(
            &harness::destination_qemu(&site.qemu),
            "armed",
            &["-S", "-incoming", "defer"],
        )
        .await;
    let mut destination = DestinationVm::connect(&guest.qmp, SOON).await.unwrap();
    destination.prepare(&site.path("stream")).await.unwrap();
    guest.third_party().await.execute("cont", json!({})).await.unwrap();
    let _stream = site.feed(&stream).await;
    let error = destination.wait_loaded(SOON).await.unwrap_err();
    assert!(matches!(error, DestinationError::StartedByItself), "{error}");
    destination.kill(SOON).await.unwrap();
    assert!(
        Process::reattach(destination.identity())
            .unwrap()
            .is_none_or(|process| !process.is_alive())
    );
}

#[tokio::test]
async fn nothing_is_loaded_while_the_end_is_held_back() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, mut source) = site.source(&[]).await;
    source.prepare(LIMIT).await.unwrap();
    let stream = site.take_stream(&source).await;
    // The description of the device state is JSON at the end: type 6, length, text. The byte before it is EOF, 0.
    let start = (0..stream.len() - 5).rev().find(|&place| {
        let length = u32::from_be_bytes(stream[place + 1..place + 5].try_into().unwrap()) as usize;
        stream[place] == 6 && place + 5 + length == stream.len() && stream[place + 5] == b'{'
    });
    let end_mark = start.expect("the stream ends in a description") - 1;
    assert_eq!(stream[end_mark], 0);

    let (_guard, mut destination) = site.destination(&[]).await;
    destination.prepare(&site.path("stream")).await.unwrap();
    let mut connection = site.feed(&stream[..end_mark]).await;
    let early = destination.wait_loaded(Duration::from_millis(500)).await;
    assert!(
        matches!(early, Err(DestinationError::NotLoadedInTime { .. })),
        "{early:?}"
    );
    // Cut inside the description it is complete all the same: that is why the end has to be held back before this byte.
    connection
        .write_all(&stream[end_mark..stream.len() - 1000])
        .await
        .unwrap();
    drop(connection);
    let loaded = destination.wait_loaded(SOON).await.unwrap();
    assert_eq!(loaded.run_state(), &RunState::Paused);
    destination.kill(SOON).await.unwrap();
}

#[tokio::test]
async fn a_truncated_stream_is_a_failure_with_a_reason() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, mut source) = site.source(&[]).await;
    source.prepare(LIMIT).await.unwrap();
    let stream = site.take_stream(&source).await;
    let (_guard, mut destination) = site.destination(&[]).await;
    destination.prepare(&site.path("stream")).await.unwrap();
    drop(site.feed(&stream[..stream.len() / 2]).await);
    match destination.wait_loaded(SOON).await.unwrap_err() {
        DestinationError::LoadFailed { reason } => assert!(!reason.is_empty()),
        DestinationError::Ended { ending } => assert!(ending.contains("exit status: 1; its last output:"), "{ending}"),
        other => panic!("{other}"),
    }
    destination.kill(SOON).await.unwrap();
}

#[tokio::test]
async fn a_loaded_and_paused_destination_leaves_a_shared_disk_to_the_source() {
    let site = Site::new(&qemu_or_return!());
    let disk = site.path("shared.img");
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let drive = format!("if=none,id=data,format=raw,cache=none,file={}", disk.display());
    let disk = ["-drive", drive.as_str(), "-device", "virtio-blk-pci,drive=data"];
    let (_guest, mut source) = site.source(&disk).await;
    let (_guard, mut destination) = site.destination(&disk).await;
    destination.prepare(&site.path("stream")).await.unwrap();
    source.prepare(LIMIT).await.unwrap();
    let stream = site.take_stream(&source).await;
    let _stream = site.feed(&stream).await;
    let _loaded = destination.wait_loaded(SOON).await.unwrap();
    // Needs the lock on the image back.
    assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running);
    destination.kill(SOON).await.unwrap();
}

#[tokio::test]
async fn a_guest_whose_disk_another_vm_holds_is_refused_with_the_name_of_that_vm() {
    let site = Site::new(&qemu_or_return!());
    let handed = Handed::over(&site).await;
    let words = disk_words(&site.path("shared.img"));
    let words = [
        &words.each_ref().map(String::as_str)[..],
        &["-name", "guest=leftover,debug-threads=on"],
    ]
    .concat();
    let holder = site.start(&site.qemu, "holder", &words).await;
    // Once it answers it has opened its disk.
    drop(holder.third_party().await);
    let told = format!("(process {}, VM leftover)", holder.pid());
    let text = handed.refusal().await;
    assert!(text.contains("Failed to get \"write\" lock"), "{text}");
    assert!(
        text.contains(&format!("The lock of {} is held on the same host by ", handed.disk)),
        "{text}"
    );
    assert!(text.contains(&told), "{text}");
    // The source is in the same position.
    let refused = handed.source.1.resume(SOON).await.unwrap_err();
    assert!(matches!(refused, SourceError::ContRefused(_)), "{refused}");
    assert!(refused.to_string().contains(&told), "{refused}");
    drop(holder);
    handed.destination.cont(&handed.loaded, SOON).await.unwrap();
}

#[tokio::test]
async fn a_guest_whose_disk_another_program_has_locked_is_refused_with_the_process_of_that_program() {
    let site = Site::new(&qemu_or_return!());
    let handed = Handed::over(&site).await;
    let disk = std::fs::File::options().write(true).open(&handed.disk).unwrap();
    rustix::fs::fcntl_lock(&disk, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let text = handed.refusal().await;
    assert!(text.contains("Failed to lock byte"), "{text}");
    assert!(text.contains(&format!("(process {})", std::process::id())), "{text}");
}

#[tokio::test]
async fn a_command_whose_image_is_locked_is_refused_with_the_name_of_the_vm_that_holds_it() {
    let site = Site::new(&qemu_or_return!());
    let disk = site.path("shared.img");
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let words = disk_words(&disk);
    let words = words.each_ref().map(String::as_str);
    let holder = site
        .start(&site.qemu, "holder", &[&words[..], &["-name", "leftover"]].concat())
        .await;
    drop(holder.third_party().await);
    // One that waits for a migration takes no lock before it is continued; what its command runs before may.
    let first = format!(
        "exec {} {} {} -S",
        site.qemu.display(),
        harness::MACHINE.join(" "),
        words.join(" ")
    );
    let launch = site.launch_command(["sh", "-c", &first, "{qmp}"].map(str::to_owned).to_vec());
    let refused = DestinationVm::launch(&launch).await.unwrap_err();
    assert!(
        matches!(refused, DestinationError::Launch(LaunchError::Ended { .. })),
        "{refused}"
    );
    let text = refused.to_string();
    assert!(
        text.contains(&format!("The lock of {} is held", disk.display())),
        "{text}"
    );
    assert!(
        text.contains(&format!("(process {}, VM leftover)", holder.pid())),
        "{text}"
    );
}

#[tokio::test]
async fn the_network_hears_of_the_guest_only_once_it_runs() {
    let site = Site::new(&qemu_or_return!());
    let capture = site.path("capture.pcap");
    let dump = format!("filter-dump,id=dump,netdev=net,file={}", capture.display());
    let card = [
        "-netdev",
        "hubport,id=net,hubid=0",
        "-device",
        "e1000,netdev=net,romfile=",
    ];
    let (_guest, mut source) = site.source(&card).await;
    let (_guard, mut destination) = site
        .destination(&[&card[..], &["-object", dump.as_str()]].concat())
        .await;
    destination.prepare(&site.path("stream")).await.unwrap();
    source.prepare(LIMIT).await.unwrap();
    let stream = site.take_stream(&source).await;
    let _stream = site.feed(&stream).await;
    let loaded = destination.wait_loaded(SOON).await.unwrap();
    // A capture file without packets has a header of 24 bytes.
    let captured = || std::fs::metadata(&capture).unwrap().len();
    assert_eq!(captured(), 24);
    destination.cont(&loaded, SOON).await.unwrap();
    destination.announce_self(5).await.unwrap();
    until("an announcement is sent", || captured() > 24).await;
}

#[tokio::test]
async fn a_destination_survives_the_gateway_and_is_found_again() {
    let site = Site::new(&qemu_or_return!());
    let (_guard, destination) = site.destination(&[]).await;
    let identity = destination.identity().clone();
    drop(destination);
    let log = Some(site.path("destination.log"));
    let destination = DestinationVm::reattach(&site.path("destination"), &identity, None, log.clone(), SOON)
        .await
        .unwrap();
    assert_eq!(destination.run_state().await.unwrap(), RunState::InMigrate);
    destination.kill(SOON).await.unwrap();
    destination.kill(SOON).await.unwrap();
    assert!(!site.path("destination").exists());
    let error = DestinationVm::reattach(&site.path("destination"), &identity, None, log, SOON)
        .await
        .unwrap_err();
    assert!(matches!(error, DestinationError::RecordedProcessGone { .. }), "{error}");
}

#[tokio::test]
async fn a_destination_command_that_fails_says_why() {
    let site = Site::new(&qemu_or_return!());
    let ending = |error: DestinationError| match error {
        DestinationError::Launch(LaunchError::Ended { ending, .. }) => ending,
        other => panic!("{other}"),
    };
    let error = DestinationVm::launch(&site.launch(&["-device", "no-such-device"]))
        .await
        .unwrap_err();
    let text = ending(error);
    assert!(
        text.contains("exit status: 1") && text.contains("no-such-device"),
        "{text}"
    );

    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    let error = DestinationVm::launch(&site.launch_command(words(&["false", "{qmp}"])))
        .await
        .unwrap_err();
    assert!(ending(error).contains("exit status: 1; it printed nothing"));
    let error = DestinationVm::launch(&site.launch_command(words(&["/no/such/program", "{qmp}"])))
        .await
        .unwrap_err();
    assert!(ending(error).contains("/no/such/program"));
}

#[tokio::test]
async fn a_destination_command_that_never_answers_is_ended() {
    let site = Site::new(&qemu_or_return!());
    // The sleeping process writes its pid first, so that the test can see it go.
    let command = ["sh", "-c", "echo $$; exec sleep 1000", "{qmp}"]
        .map(str::to_owned)
        .to_vec();
    let mut launch = site.launch_command(command);
    launch.ready_within = Duration::from_millis(500);
    let error = DestinationVm::launch(&launch).await.unwrap_err();
    assert!(
        matches!(error, DestinationError::Launch(LaunchError::NotReady { .. })),
        "{error}"
    );
    let pid: u32 = site.log("destination").trim().parse().unwrap();
    until("the command is gone", || Process::open(pid).is_err()).await;
}

#[tokio::test]
async fn a_monitor_that_is_in_use_is_recognised() {
    let site = Site::new(&qemu_or_return!());
    let (guest, _source) = site.source(&[]).await;
    let error = SourceVm::connect(&guest.qmp, Duration::from_millis(300))
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::Qmp(QmpError::Busy { .. })), "{error}");
    let mut launch = site.launch(&[]);
    launch.values = longhaul::hypervisor::qemu::LaunchValues::new("vm", &guest.qmp, &site.path("stream")).unwrap();
    let error = DestinationVm::launch(&launch).await.unwrap_err();
    assert!(
        matches!(error, DestinationError::Launch(LaunchError::SocketInUse { .. })),
        "{error}"
    );
}

#[tokio::test]
async fn a_socket_that_was_handed_to_qemu_is_qemus() {
    let site = Site::new(&qemu_or_return!());
    let listener = std::os::unix::net::UnixListener::bind(site.path("inherited")).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let chardev = format!("socket,id=monitor,fd={},server=on,wait=off", listener.as_raw_fd());
    let monitor = ["-chardev", &chardev, "-mon", "chardev=monitor,mode=control"];
    let guest = site.start(&site.qemu, "running", &monitor).await;
    let source = SourceVm::connect(&site.path("inherited"), SOON).await.unwrap();
    assert_eq!(source.identity().pid, guest.pid());
}

#[tokio::test]
async fn a_relay_in_front_of_a_monitor_is_not_taken_for_the_guest() {
    let site = Site::new(&qemu_or_return!());
    let guest = site.start(&site.qemu, "running", &[]).await;
    let listener = tokio::net::UnixListener::bind(site.path("relay")).unwrap();
    let relay = tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut monitor = tokio::net::UnixStream::connect(&guest.qmp).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut client, &mut monitor).await;
        }
    });
    let own = std::process::id();
    let error = SourceVm::connect(&site.path("relay"), SOON).await.unwrap_err();
    assert!(
        matches!(error, SourceError::Owner(OwnerError::Foreign { pid, .. }) if pid == own),
        "{error}"
    );
    let error = DestinationVm::connect(&site.path("relay"), SOON).await.unwrap_err();
    assert!(
        matches!(error, DestinationError::Owner(OwnerError::Foreign { pid, .. }) if pid == own),
        "{error}"
    );
    relay.abort();
}

#[tokio::test]
async fn budgets_are_changed_while_a_migration_runs() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, mut source) = site.source(&[]).await;
    source.prepare(LIMIT).await.unwrap();
    let _stream = site.begin(&source).await;
    source.set_downtime_limit(Duration::from_millis(120)).await.unwrap();
    assert!(matches!(
        source.set_downtime_limit(Duration::ZERO).await,
        Err(SourceError::OutOfRange { .. })
    ));
    assert!(matches!(
        source.set_downtime_limit(Duration::from_secs(2001)).await,
        Err(SourceError::OutOfRange { .. })
    ));
    let expected = match has_switchover_bandwidth(source.version()) {
        true => SwitchoverBandwidth::Set,
        false => SwitchoverBandwidth::NotSupported,
    };
    assert_eq!(source.set_switchover_bandwidth(12_500_000).await.unwrap(), expected);
    source.cancel(SOON).await.unwrap();
}

#[tokio::test]
async fn the_dirty_rate_is_sampled_and_says_how_much_memory_it_covers() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, source) = site.source(&["-m", "128"]).await;
    let rate = source.dirty_rate_sample(Duration::from_secs(1)).await.unwrap();
    assert_eq!(rate.sampled_bytes, 128 << 20);
    let (_guest, small) = {
        let other = Site::new(&site.qemu);
        other.source(&[]).await
    };
    assert_eq!(
        small
            .dirty_rate_sample(Duration::from_millis(1))
            .await
            .unwrap()
            .sampled_bytes,
        0
    );
}
