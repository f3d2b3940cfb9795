//! What QEMU does, as far as the rules of ownership rest on it, and what the edge towards it reports.
//!
//! These are facts about QEMU, not wishes: where versions differ, each side is stated. Beside `qemu_agent.rs`, which has the
//! facts of a migration that goes well. Needs qemu-system-x86 (7.2 or later); `LONGHAUL_TEST_QEMU` names another binary.

#[path = "common/boot_sector.rs"]
mod boot_sector;
#[path = "qemu_agent/harness.rs"]
#[expect(
    clippy::unwrap_used,
    reason = "a harness is test code; clippy knows only test functions"
)]
#[expect(dead_code, reason = "shared with `qemu_agent.rs`")]
mod harness;
#[path = "qemu_facts/site.rs"]
mod site;
#[path = "qemu_facts/stream.rs"]
#[expect(
    clippy::unwrap_used,
    reason = "a harness is test code; clippy knows only test functions"
)]
mod stream;

use std::time::Duration;

use harness::{LIMIT, SOON, Site, qemu_or_return, until};
use longhaul::hypervisor::process::Process;
use longhaul::hypervisor::qemu::{
    DestinationError, DestinationVm, MigrationStatus, PermitConditions, Refusal, RunState, SourceError, SourceVm,
    Undone,
};
use longhaul::hypervisor::qmp::{QmpClient, QmpError};
use serde_json::json;
use site::{
    Since, assert_refused, counter, eventually, incoming, is_gone, is_locked_for_writing, load, plain_destination,
    quit, recorded, restless, set_capabilities, status,
};
use stream::{Tail, ends_in_a_description};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Less than the guest of [`restless`] leaves to be sent at any time.
const TOO_SHORT: Duration = Duration::from_millis(1);
/// Of a monitor that is alone on its machine this is a hundred times what it needs.
const SILENCE: Duration = Duration::from_millis(500);

/// A migration of which some has been read and of which nobody reads the rest, so that it stays where it is.
async fn first_pass(site: &Site, source: &SourceVm) -> UnixStream {
    let mut stream = site.begin(source).await;
    let read = stream.read_exact(&mut [0; 100_000]).await;
    read.expect("the stream begins");
    stream
}

#[tokio::test]
async fn a_source_whose_socket_dies_before_everything_is_sent_runs_on_with_and_without_a_return_path() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, mut source, third) = restless(&site).await;
    for return_path in [false, true] {
        source.prepare(TOO_SHORT).await.unwrap();
        set_capabilities(&third, &[("return-path", return_path)]).await;
        // So that the guest has the time to write between two looks at what it wrote.
        let bandwidth = json!({ "max-bandwidth": 2 << 20 });
        third.execute("migrate-set-parameters", bandwidth).await.unwrap();
        for phase in ["setup", "first pass", "later rounds"] {
            match phase {
                "setup" => source.migrate(&site.path("nobody")).await.unwrap(),
                "first pass" => {
                    first_pass(&site, &source).await;
                }
                _ => {
                    let mut stream = site.begin(&source).await;
                    let reader = tokio::spawn(async move {
                        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
                    });
                    eventually("there are rounds", async || {
                        let progress = source.progress().await.unwrap();
                        assert!(progress.status.is_under_way(), "{progress:?}");
                        progress.ram.is_some_and(|ram| ram.rounds >= 3)
                    })
                    .await;
                    reader.abort();
                }
            }
            let what = format!("{phase}, return-path {return_path}");
            let conditions = source.wait_for_permit_conditions(SOON).await.unwrap();
            let PermitConditions::Failed { status, error } = conditions else {
                panic!("{what}: {conditions}");
            };
            assert_eq!(status, MigrationStatus::Failed, "{what}");
            assert!(error.is_some(), "{what}");
            assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running, "{what}");
            assert_eq!(third.run_history().stops, 0, "{what}");
        }
    }
}

#[tokio::test]
async fn with_a_return_path_a_source_that_has_sent_everything_restarts_its_guest_beside_the_one_that_arrived() {
    let site = Site::new(&qemu_or_return!());
    let (guest, mut source) = site.source(&[]).await;
    let third = guest.third_party().await;
    source.prepare(LIMIT).await.unwrap();
    set_capabilities(&third, &[("return-path", true)]).await;
    let (_guard, mut destination) = site.destination(&[]).await;
    destination.prepare(&site.path("stream")).await.unwrap();

    let mut outgoing = site.begin(&source).await;
    let mut stream = Vec::new();
    while !ends_in_a_description(&stream) {
        assert_ne!(outgoing.read_buf(&mut stream).await.unwrap(), 0, "an EOF");
    }
    // Everything is here, and the source waits for an answer that only a destination of QEMU's would give.
    let waits_in = match source.version().is_at_least(10, 0) {
        true => MigrationStatus::Device,
        false => MigrationStatus::Active,
    };
    let conditions = source.permit_conditions().await.unwrap();
    let run_state = RunState::FinishMigrate;
    assert_eq!(
        conditions,
        PermitConditions::NotYet {
            status: waits_in,
            run_state
        }
    );
    let early = tokio::time::timeout(SILENCE, outgoing.read_u8()).await;
    assert!(early.is_err(), "{early:?}");

    let _incoming = site.feed(&stream).await;
    let loaded = destination.wait_loaded(SOON).await.unwrap();
    destination.cont(&loaded, SOON).await.unwrap();
    assert_eq!(third.run_history().resumes, 0);
    // Nobody says `cont`: the connection ends, as when a gateway is killed.
    drop(outgoing);
    until("the source's guest is restarted", || third.run_history().resumes == 1).await;
    let conditions = source.permit_conditions().await.unwrap();
    assert!(
        matches!(
            conditions,
            PermitConditions::Failed {
                status: MigrationStatus::Failed,
                ..
            }
        ),
        "{conditions}"
    );
    eventually("both run", async || {
        source.run_state().await.unwrap() == RunState::Running
            && destination.run_state().await.unwrap() == RunState::Running
    })
    .await;
}

#[tokio::test]
async fn a_return_path_is_refused_and_off_while_a_migration_is_prepared() {
    let site = Site::new(&qemu_or_return!());
    let (guest, mut source) = site.source(&[]).await;
    let third = guest.third_party().await;
    set_capabilities(&third, &[("return-path", true)]).await;
    let refusals = source.condition().await.unwrap().refusals(true);
    assert!(
        matches!(&refusals[..], [Refusal::Capability { name, .. }] if name == "return-path"),
        "{refusals:?}"
    );
    let is_on = async || {
        let all = third.execute("query-migrate-capabilities", json!({})).await.unwrap();
        let mut all = all.as_array().unwrap().iter();
        all.find(|one| one["capability"] == "return-path").unwrap()["state"] == true
    };
    source.prepare(LIMIT).await.unwrap();
    assert!(!is_on().await);
    // Nor can it be switched on behind a migration that has begun.
    let outgoing = site.begin(&source).await;
    let on = json!({ "capabilities": [{ "capability": "return-path", "state": true }] });
    let error = third.execute("migrate-set-capabilities", on).await.unwrap_err();
    assert!(error.is_refusal(), "{error}");
    assert!(!is_on().await);
    drop(outgoing);
    assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running);
    source.restore_settings().await.unwrap();
    assert!(is_on().await);
}

#[tokio::test]
async fn a_guest_that_is_continued_after_everything_was_sent_runs_from_where_it_stood() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, mut source, third) = restless(&site).await;
    source.prepare(Duration::from_secs(100)).await.unwrap();
    site.take_stream(&source).await;
    let stood = counter(&third).await;
    assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running);
    eventually("it counts again", async || counter(&third).await != stood).await;
    let history = third.run_history();
    assert_eq!((history.stops, history.resumes), (1, 1));
    // QEMU goes on to say that its migration is complete.
    let conditions = source.permit_conditions().await.unwrap();
    let run_state = RunState::Running;
    assert_eq!(conditions, PermitConditions::Disturbed { run_state });
}

/// Devices whose state, with its description, is more than a socket holds (208 KiB): it cannot be sent without being taken.
fn network_cards() -> Vec<&'static str> {
    ["-device", "e1000,romfile="].repeat(2)
}

/// Takes in the stream in small pieces, a question after each, until QEMU has stopped the guest and answers no more.
async fn starve(site: &Site, source: &SourceVm, monitor: &QmpClient) -> UnixStream {
    let mut outgoing = site.begin(source).await;
    loop {
        let asked = monitor.execute_within("query-status", json!({}), SILENCE).await;
        match asked {
            Err(QmpError::Deadline { .. }) if monitor.run_history().stops == 1 => return outgoing,
            Ok(_) | Err(QmpError::Deadline { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        let read = outgoing.read(&mut [0; 4096]).await.expect("the stream goes on");
        assert_ne!(read, 0, "it was never silent");
    }
}

#[tokio::test]
async fn a_source_that_has_stopped_its_guest_answers_nobody_until_its_bytes_are_taken_and_restarts_it_if_they_are_not()
{
    let site = Site::new(&qemu_or_return!());
    let (guest, mut source) = site.source(&network_cards()).await;
    let third = guest.third_party().await;
    source.prepare(LIMIT).await.unwrap();
    let outgoing = starve(&site, &source, &third).await;
    // So a migration is not cancelled then but by ending its connection.
    let cancelled = third.execute_within("migrate_cancel", json!({}), SILENCE).await;
    assert!(matches!(cancelled, Err(QmpError::Deadline { .. })), "{cancelled:?}");
    drop(outgoing);
    until("the guest is restarted", || third.run_history().resumes == 1).await;
    let conditions = source.wait_for_permit_conditions(SOON).await.unwrap();
    assert!(matches!(conditions, PermitConditions::Failed { .. }), "{conditions}");
    assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running);
}

#[tokio::test]
async fn a_source_calls_complete_what_nobody_has_read_and_keeps_its_guest_paused_when_it_is_lost() {
    let site = Site::new(&qemu_or_return!());
    let (guest, mut source) = site.source(&network_cards()).await;
    let third = guest.third_party().await;
    source.prepare(LIMIT).await.unwrap();
    let mut outgoing = starve(&site, &source, &third).await;
    // No more is taken than it needs to say so: only when it is silent, and less at a time than its socket holds.
    loop {
        match third.execute_within("query-migrate", json!({}), SILENCE).await {
            Ok(answer) if answer["status"] == "completed" => break,
            Ok(_) => {}
            Err(QmpError::Deadline { .. }) => {
                let _ = outgoing.read(&mut [0; 32 << 10]).await.unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(
        source.wait_for_permit_conditions(SOON).await.unwrap(),
        PermitConditions::Met
    );
    assert_eq!(outgoing.try_read(&mut [0; 1]).unwrap(), 1, "everything was read");
    drop(outgoing);
    let before = third.run_history();
    assert_eq!((before.stops, before.resumes), (1, 0));
    assert_eq!(source.permit_conditions().await.unwrap(), PermitConditions::Met);
    assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running);
}

#[tokio::test]
async fn a_destination_that_cannot_load_ends_unless_it_knows_and_is_told_to_stay() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, source, stream) = recorded(&site).await;
    let knows = source.version().is_at_least(9, 1);
    for told in [None, Some(true), Some(false)] {
        let name = format!("told-{told:?}");
        let (guest, monitor) = plain_destination(&site, &name, &[]).await;
        let mut arguments = incoming(&site);
        if let Some(exit) = told {
            arguments["exit-on-error"] = json!(exit);
        }
        let answer = monitor.execute("migrate-incoming", arguments).await;
        if told.is_some() && !knows {
            let error = answer.unwrap_err();
            assert!(error.to_string().contains("exit-on-error"), "{error}");
            continue;
        }
        answer.unwrap();
        let process = Process::open(guest.pid()).unwrap();
        drop(site.feed(&stream[..stream.len() / 2]).await);
        if told != Some(false) {
            process.wait_gone(SOON).await.unwrap();
            assert!(
                site.log(&name).contains("load of migration failed"),
                "{}",
                site.log(&name)
            );
            continue;
        }
        eventually("it fails", async || status(&monitor, "query-migrate").await == "failed").await;
        let answer = monitor.execute("query-migrate", json!({})).await.unwrap();
        let reason = answer["error-desc"].as_str().unwrap();
        assert!(reason.starts_with("load of migration failed"), "{reason}");
        // It is of no use any more: it takes no other stream, and nobody can start what it has not got.
        let other = json!({ "uri": format!("unix:{}", site.path("other").display()), "exit-on-error": false });
        let again = monitor.execute("migrate-incoming", other).await.unwrap_err();
        assert!(again.is_refusal(), "{again}");
        monitor.execute("cont", json!({})).await.unwrap();
        assert_eq!(status(&monitor, "query-status").await, "inmigrate");
        assert_eq!(monitor.run_history().resumes, 0);
        drop(monitor);
        let destination = DestinationVm::connect(&guest.other, SOON).await.unwrap();
        let error = destination.check_waits().await.unwrap_err();
        assert!(matches!(error, DestinationError::NotDeferred { .. }), "{error}");
    }
}

#[tokio::test]
async fn damage_near_the_end_is_refused_only_where_it_breaks_the_form_and_the_source_can_still_come_back() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, source, stream) = recorded(&site).await;
    let tail = Tail::of(&stream);
    let last = tail.sections[tail.sections.len() - 1];
    let damaged = |place: usize, bits: u8| {
        let mut bytes = stream.clone();
        bytes[place] ^= bits;
        bytes
    };
    for (what, place, bits) in [
        // Type and id of a section, then its name after a byte for its length.
        ("the last section's name", last + 6, 1),
        ("the last footer's mark", tail.eof - 5, 0xff),
        ("the last footer's id", tail.eof - 1, 0xff),
        ("the EOF byte", tail.eof, 0x55),
    ] {
        let loaded = load(&site, &damaged(place, bits)).await;
        assert_refused(&loaded, source.version(), what);
    }
    // Everything but the form is the digest's business.
    for (what, place) in [("a page", tail.last_page + 2000), ("the description", tail.eof + 1000)] {
        let loaded = load(&site, &damaged(place, 1)).await.unwrap();
        assert_eq!(loaded, RunState::Paused, "{what}");
    }
    assert_eq!(source.permit_conditions().await.unwrap(), PermitConditions::Met);
    assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running);
}

#[tokio::test]
async fn a_stream_that_is_cut_anywhere_is_loaded_only_if_its_eof_byte_is_there() {
    let site = Site::new(&qemu_or_return!());
    let (_guest, source, stream) = recorded(&site).await;
    let tail = Tail::of(&stream);
    let devices = tail.sections[0];
    let mut cuts = vec![
        tail.last_page + 2000,
        // The end of memory is a flag of eight bytes and a footer of five.
        devices - 5 - 3,
        devices - 2,
        devices,
        tail.sections[tail.sections.len() - 1],
        tail.eof - 5,
        tail.eof - 1,
        tail.eof,
    ];
    // Some ends and some insides of sections: the same in every run with the same stream.
    for place in [3, 7] {
        cuts.push(tail.sections[tail.sections.len() * place / 10]);
        cuts.push(devices + (tail.eof - devices) * place / 10);
    }
    for cut in cuts {
        let loaded = load(&site, &stream[..cut]).await;
        let what = format!("{cut} bytes, EOF is at {}", tail.eof);
        assert_refused(&loaded, source.version(), &what);
    }
    // Behind it are a type, a length and the description, which nobody misses.
    for cut in [
        tail.eof + 1,
        tail.eof + 2,
        tail.eof + 4,
        tail.eof + 1000,
        stream.len() - 1,
    ] {
        let loaded = load(&site, &stream[..cut]).await.unwrap();
        assert_eq!(loaded, RunState::Paused, "{cut}, EOF is at {}", tail.eof);
    }
}

#[tokio::test]
async fn what_a_third_party_tells_a_source_in_the_middle_is_seen() {
    let site = Site::new(&qemu_or_return!());
    let (guest, mut source) = site.source(&[]).await;
    let third = guest.third_party().await;
    source.prepare(LIMIT).await.unwrap();

    // `cont` changes nothing for a guest that runs; `migrate_cancel` leaves it running and ends the stream like success does.
    let mut stream = first_pass(&site, &source).await;
    third.execute("cont", json!({})).await.unwrap();
    assert_eq!(third.run_history().resumes, 0);
    third.execute("migrate_cancel", json!({})).await.unwrap();
    let conditions = source.wait_for_permit_conditions(SOON).await.unwrap();
    let PermitConditions::Failed { status, .. } = conditions else {
        panic!("{conditions}");
    };
    assert_eq!(status, MigrationStatus::Cancelled);
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    assert!(!bytes.is_empty() && !ends_in_a_description(&bytes));
    assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running);

    // A guest that was stopped meanwhile is not restarted where the migration comes to nothing.
    for ending in ["migrate_cancel", "lost"] {
        let stream = first_pass(&site, &source).await;
        third.execute("stop", json!({})).await.unwrap();
        assert_eq!(source.run_state().await.unwrap(), RunState::Paused);
        match ending {
            "lost" => drop(stream),
            command => drop(third.execute(command, json!({})).await.unwrap()),
        }
        let conditions = source.wait_for_permit_conditions(SOON).await.unwrap();
        assert!(matches!(conditions, PermitConditions::Failed { .. }), "{conditions}");
        let undone = source.undo(SOON).await.unwrap();
        assert_eq!(undone, Undone::Stopped(RunState::Paused), "{ending}");
        third.execute("cont", json!({})).await.unwrap();
    }

    let mut stream = first_pass(&site, &source).await;
    quit(&third).await;
    let error = source.wait_for_permit_conditions(SOON).await.unwrap_err();
    assert!(matches!(error, SourceError::Qmp(QmpError::Lost { .. })), "{error}");
    assert!(source.is_lost());
    until("the process is gone", || is_gone(source.identity())).await;
    bytes.clear();
    stream.read_to_end(&mut bytes).await.unwrap();
    assert!(!ends_in_a_description(&bytes));
}

#[tokio::test]
async fn a_guest_that_a_third_party_stops_in_the_middle_looks_in_the_end_as_if_the_migration_had_stopped_it() {
    let site = Site::new(&qemu_or_return!());
    let (guest, mut source) = site.source(&[]).await;
    let third = guest.third_party().await;
    source.prepare(LIMIT).await.unwrap();
    let mut outgoing = site.begin(&source).await;
    third.execute("stop", json!({})).await.unwrap();
    assert_eq!(source.run_state().await.unwrap(), RunState::Paused);
    let mut stream = Vec::new();
    outgoing.read_to_end(&mut stream).await.unwrap();
    let conditions = source.wait_for_permit_conditions(SOON).await.unwrap();
    assert_eq!(conditions, PermitConditions::Met);
    // One STOP, as ever: the migration finds nothing to stop.
    assert_eq!(third.run_history().stops, 1);
    assert_eq!(load(&site, &stream).await.unwrap(), RunState::Paused);
    source.freeze().await.unwrap().thaw().await.unwrap();
    assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running);
}

#[tokio::test]
async fn a_source_that_has_sent_everything_minds_no_third_party_but_one_that_ends_it() {
    let site = Site::new(&qemu_or_return!());
    let (guest, source, _stream) = recorded(&site).await;
    let third = guest.third_party().await;
    for command in ["migrate_cancel", "stop"] {
        third.execute(command, json!({})).await.unwrap();
        let conditions = source.permit_conditions().await.unwrap();
        assert_eq!(conditions, PermitConditions::Met, "{command}");
    }
    quit(&third).await;
    until("the process is gone", || is_gone(source.identity())).await;
    let error = source.freeze().await.unwrap_err();
    assert!(error.to_string().contains("is lost"), "{error}");
}

#[tokio::test]
async fn a_third_party_cannot_keep_a_destination_from_loading_but_by_ending_it() {
    let site = Site::new(&qemu_or_return!());
    let (_source_guest, _source, stream) = recorded(&site).await;
    let (first, rest) = stream.split_at(stream.len() / 2);
    for (name, commands) in [
        ("stop", &["stop"][..]),
        ("cancel", &["migrate_cancel"]),
        // The second takes back what the first has armed.
        ("cont-stop", &["cont", "stop"]),
        ("quit", &["quit"]),
    ] {
        let program = harness::destination_qemu(&site.qemu);
        let guest = site.start(&program, name, &["-S", "-incoming", "defer"]).await;
        let third = guest.third_party().await;
        let mut destination = DestinationVm::connect(&guest.qmp, SOON).await.unwrap();
        destination.prepare(&site.path("stream")).await.unwrap();
        let mut incoming = site.feed(first).await;
        eventually("it loads", async || {
            destination.progress().await.unwrap().status == MigrationStatus::Active
        })
        .await;
        if name == "quit" {
            quit(&third).await;
            let error = destination.wait_loaded(SOON).await.unwrap_err();
            assert!(matches!(error, DestinationError::Ended { .. }), "{error}");
            assert!(is_gone(destination.identity()));
            continue;
        }
        for command in commands {
            third.execute(command, json!({})).await.unwrap();
        }
        incoming.write_all(rest).await.unwrap();
        let loaded = destination.wait_loaded(SOON).await.unwrap();
        assert_eq!(loaded.run_state(), &RunState::Paused, "{name}");
        assert_eq!(third.run_history().resumes, 0, "{name}");
        // Once it is loaded the same holds.
        for command in ["migrate_cancel", "stop"] {
            third.execute(command, json!({})).await.unwrap();
            assert_eq!(destination.run_state().await.unwrap(), RunState::Paused, "{name}");
        }
        if name == "stop" {
            quit(&third).await;
            let error = destination.cont(&loaded, SOON).await.unwrap_err();
            assert!(matches!(error, DestinationError::ContUncertain(_)), "{error}");
        } else {
            // Somebody was faster: it runs, and that is what is reported.
            third.execute("cont", json!({})).await.unwrap();
            destination.cont(&loaded, SOON).await.unwrap();
            assert_eq!(third.run_history().resumes, 1, "{name}");
        }
    }
}

#[tokio::test]
async fn before_qemu_10_a_loaded_destination_locks_its_disks_unless_they_are_to_be_activated_late() {
    let site = Site::new(&qemu_or_return!());
    let image = site.path("shared.img");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let drive = format!("if=none,id=data,format=raw,cache=none,file={}", image.display());
    let disk = ["-drive", drive.as_str(), "-device", "virtio-blk-pci,drive=data"];
    let (_guest, mut source) = site.source(&disk).await;
    source.prepare(LIMIT).await.unwrap();
    assert!(is_locked_for_writing(&image));
    for late in [false, true] {
        let stream = site.take_stream(&source).await;
        assert!(!is_locked_for_writing(&image), "by a source that has sent everything");
        let (guest, monitor) = plain_destination(&site, &format!("late-{late}"), &disk).await;
        set_capabilities(&monitor, &[("late-block-activate", late)]).await;
        monitor.execute("migrate-incoming", incoming(&site)).await.unwrap();
        drop(site.feed(&stream).await);
        eventually("it is loaded", async || {
            status(&monitor, "query-status").await == "paused"
        })
        .await;

        let is_held = !late && !source.version().is_at_least(10, 0);
        assert_eq!(is_locked_for_writing(&image), is_held, "late-block-activate {late}");
        if is_held {
            // Then the source cannot come back before the destination is dead.
            let error = source.undo(SOON).await.unwrap_err();
            assert!(matches!(error, SourceError::ContRefused(_)), "{error}");
            let holder = format!("(process {})", guest.pid());
            assert!(error.to_string().contains(&holder), "{error}");
            assert_eq!(source.run_state().await.unwrap(), RunState::PostMigrate);
            drop(guest);
            assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running);
            continue;
        }
        assert_eq!(source.undo(SOON).await.unwrap(), Undone::Running);
        // And QEMU's own lock is the last line: the copy cannot be started beside a source that runs.
        let error = monitor.execute("cont", json!({})).await.unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains("lock"), "{error}");
        assert_eq!(status(&monitor, "query-status").await, "paused");
        assert_eq!(monitor.run_history().resumes, 0);
    }
}
