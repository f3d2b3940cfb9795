//! Programs of the operator that run when a migration gets somewhere: real gateways, real hypervisors, on loopback.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

mod common;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use common::guest::Machine;
use common::process::processes_of;
use common::{Rig, Site, SitePlan, need, qemu, until, until_some};
use rustix::process::Signal;
use serde_json::json;

/// The program that is each hook of both sites. It writes what it is told before and after; files tell it to fail or to wait for its test.
struct Hooks {
    folder: PathBuf,
}

/// A line of what hooks were told.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Told {
    when: String,
    hook: String,
    role: String,
    site: String,
    peer: String,
    vm: String,
    migration: String,
    outcome: String,
    qmp: String,
}

impl Told {
    fn is(&self, when: &str, hook: &str, role: &str) -> bool {
        (&*self.when, &*self.hook, &*self.role) == (when, hook, role)
    }
}

impl Hooks {
    /// All of them at both sites.
    fn of(a: &mut SitePlan, b: &mut SitePlan) -> Self {
        let hooks = Self {
            folder: a.folder.parent().unwrap().to_owned(),
        };
        let folder = hooks.folder.display();
        let script = format!(
            "#!/bin/sh\n\
             facts=\"$LONGHAUL_HOOK $LONGHAUL_ROLE $LONGHAUL_SITE $LONGHAUL_PEER $LONGHAUL_VM $LONGHAUL_MIGRATION ${{LONGHAUL_OUTCOME:--}} ${{LONGHAUL_QMP:--}}\"\n\
             echo \"began $facts\" >> {folder}/told\n\
             own={folder}/$LONGHAUL_HOOK-$LONGHAUL_ROLE\n\
             if [ -e $own.fails ]; then echo \"no route to the other site\" >&2; exit 1; fi\n\
             if [ -e $own.waits ]; then read line < $own.waits; fi\n\
             echo \"ended $facts\" >> {folder}/told\n"
        );
        std::fs::write(hooks.program(), script).unwrap();
        std::fs::set_permissions(hooks.program(), PermissionsExt::from_mode(0o755)).unwrap();
        for plan in [a, b] {
            plan.settings += "[hooks]\ntime_limit = \"25s\"\n";
            for hook in ["pre_check", "before_switchover", "after_activation", "after_failure"] {
                plan.settings += &format!("{hook} = {}\n", json!(hooks.program()));
            }
        }
        hooks
    }

    fn program(&self) -> PathBuf {
        self.folder.join("hook")
    }

    fn told(&self) -> Vec<Told> {
        let text = std::fs::read_to_string(self.folder.join("told")).unwrap_or_default();
        let line = |line: &str| {
            let mut words = line.split(' ').map(str::to_owned);
            let mut next = || words.next().unwrap();
            Told {
                when: next(),
                hook: next(),
                role: next(),
                site: next(),
                peer: next(),
                vm: next(),
                migration: next(),
                outcome: next(),
                qmp: next(),
            }
        };
        text.lines().map(line).collect()
    }

    fn count(&self, when: &str, hook: &str, role: &str) -> usize {
        self.told().iter().filter(|told| told.is(when, hook, role)).count()
    }

    #[track_caller]
    fn until_told(&self, when: &str, hook: &str, role: &str) -> Told {
        until_some(&format!("{hook} {when} at the {role}"), || {
            self.told().into_iter().find(|told| told.is(when, hook, role))
        })
    }

    fn fails(&self, hook: &str, role: &str) {
        std::fs::write(self.folder.join(format!("{hook}-{role}.fails")), "").unwrap();
    }

    /// From now on such a hook goes on when it is let.
    fn waits(&self, hook: &str, role: &str) {
        let owner = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let path = self.waiting(hook, role);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, owner, 0).unwrap();
    }

    /// Lets one go on, and others not wait.
    fn lets(&self, hook: &str, role: &str) {
        let path = self.waiting(hook, role);
        let mut waiting = std::fs::File::options().write(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        waiting.write_all(b"go\n").unwrap();
    }

    fn waiting(&self, hook: &str, role: &str) -> PathBuf {
        self.folder.join(format!("{hook}-{role}.waits"))
    }

    fn until_none_runs(&self) {
        until("no hook runs", || processes_of(&self.program()).is_empty());
    }
}

fn rig(vms: &[(&str, Machine)]) -> (Rig, Hooks) {
    let mut hooks = None;
    let rig = Rig::planned(vms, |a, b| hooks = Some(Hooks::of(a, b)));
    (rig, hooks.unwrap())
}

/// Where no page is written: through its memory in one pass, which hardly takes any bytes.
fn of_zeroes(memory_mb: u32) -> Machine {
    Machine {
        memory_mb,
        ..Machine::firmware()
    }
}

/// What `query-migrate` says at a site.
fn migration_status(site: &Site) -> Option<String> {
    let progress = site.qmp("vm", "query-migrate", &json!({}))?;
    progress["status"].as_str().map(str::to_owned)
}

#[track_caller]
fn arrives_with_its_hooks(machine: Machine, in_stream: bool) {
    let (mut rig, hooks) = rig(&[("vm", machine)]);
    rig.a.boot("vm");
    hooks.waits("before_switchover", "source");
    let client = rig.a.begin(&["migrate", "vm", "--to", "b", "--output", "json"]);
    let told = hooks.until_told("began", "before_switchover", "source");
    assert_eq!((&*told.site, &*told.peer, &*told.vm), ("a", "b", "vm"));
    assert!(Path::new(&told.qmp).ends_with("a/vm.qmp"), "{told:?}");
    let status = migration_status(&rig.a);
    assert_eq!(status.as_deref() == Some("active"), in_stream, "{status:?}");
    assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
    assert_eq!(rig.b.state("vm").as_deref(), Some("inmigrate"));
    hooks.lets("before_switchover", "source");
    let moved = client.wait();
    assert_eq!(moved.code, Some(0), "{moved:?}");
    for role in ["source", "destination"] {
        hooks.until_told("ended", "after_activation", role);
    }
    rig.assert_only(&[(&rig.b, "vm")]);
    assert_eq!(rig.b.state("vm").as_deref(), Some("running"));

    let all = hooks.told();
    let ended: Vec<_> = all.iter().filter(|told| told.when == "ended").collect();
    let order: Vec<_> = ended.iter().map(|told| (&*told.hook, &*told.role)).collect();
    assert_eq!(
        order[..3],
        [
            ("pre_check", "source"),
            ("pre_check", "destination"),
            ("before_switchover", "source")
        ],
        "{all:?}"
    );
    assert_eq!(order.len(), 5, "{all:?}");
    for told in &ended {
        assert_eq!(told.migration, ended[0].migration);
        let is_over = told.hook.starts_with("after");
        assert_eq!(told.outcome, if is_over { "completed" } else { "-" }, "{told:?}");
    }
    let arrived = ended
        .iter()
        .find(|told| told.is("ended", "after_activation", "destination"));
    assert!(Path::new(&arrived.unwrap().qmp).ends_with("b/vm.qmp"), "{all:?}");
}

#[test]
fn hooks_run_in_their_order_and_a_small_guest_is_held_before_its_stream() {
    need!(qemu());
    arrives_with_its_hooks(Machine::restless(32, 256), false);
}

#[test]
fn a_guest_that_would_be_through_in_its_first_pass_is_held_within_it() {
    need!(qemu());
    arrives_with_its_hooks(of_zeroes(1024), true);
}

/// What is read of a page at a time is less than a page then, so that some of it is never whole.
#[test]
fn a_guest_full_of_what_cannot_be_compressed_is_held_within_its_first_pass_too() {
    need!(qemu());
    arrives_with_its_hooks(Machine::filled(448), true);
}

#[test]
fn a_paused_guest_is_held_too_and_arrives_paused() {
    need!(qemu());
    let (mut rig, hooks) = rig(&[("vm", of_zeroes(1024))]);
    rig.a.boot("vm");
    rig.a.qmp("vm", "stop", &json!({})).unwrap();
    hooks.waits("before_switchover", "source");
    let client = rig.a.begin(&["migrate", "vm", "--to", "b"]);
    hooks.until_told("began", "before_switchover", "source");
    assert_eq!(migration_status(&rig.a).as_deref(), Some("active"));
    hooks.lets("before_switchover", "source");
    let moved = client.wait();
    assert_eq!(moved.code, Some(0), "{moved:?}");
    assert_eq!(rig.b.state("vm").as_deref(), Some("paused"));
    hooks.until_told("ended", "after_activation", "destination");
}

#[test]
fn a_hook_that_fails_before_the_switchover_leaves_the_vm_running_where_it_is() {
    need!(qemu());
    for machine in [Machine::restless(32, 256), of_zeroes(1024)] {
        let (mut rig, hooks) = rig(&[("vm", machine)]);
        rig.a.boot("vm");
        hooks.fails("before_switchover", "source");
        let failed = rig.a.run(&["migrate", "vm", "--to", "b", "--output", "json"]);
        assert_eq!(failed.code, Some(1), "{failed:?}");
        let reason = failed.json()["reason"].as_str().unwrap().to_owned();
        assert!(
            reason.contains("the hook before_switchover at a") && reason.ends_with("no route to the other site"),
            "{reason}"
        );
        assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
        assert_eq!(hooks.until_told("ended", "after_failure", "source").outcome, "failed");
        hooks.until_told("ended", "after_failure", "destination");
        rig.assert_only(&[(&rig.a, "vm")]);
        assert_eq!(hooks.count("began", "after_activation", "destination"), 0);
    }
}

#[test]
fn a_cancellation_does_not_wait_for_the_hook_before_the_switchover() {
    need!(qemu());
    for machine in [Machine::restless(32, 256), of_zeroes(1024)] {
        let (mut rig, hooks) = rig(&[("vm", machine)]);
        rig.a.boot("vm");
        hooks.waits("before_switchover", "source");
        let client = rig.a.begin(&["migrate", "vm", "--to", "b"]);
        let told = hooks.until_told("began", "before_switchover", "source");
        let cancelled = rig.a.run(&["cancel", &told.migration]);
        assert_eq!(cancelled.code, Some(0), "{cancelled:?}");
        assert_eq!(client.wait().code, Some(1));
        hooks.until_told("ended", "after_failure", "source");
        hooks.until_told("ended", "after_failure", "destination");
        hooks.until_none_runs();
        assert_eq!(hooks.count("ended", "before_switchover", "source"), 0);
        assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
        rig.assert_only(&[(&rig.a, "vm")]);
    }
}

#[test]
fn a_check_that_fails_at_either_site_refuses_and_touches_nothing() {
    need!(qemu());
    for (role, site) in [("destination", "b"), ("source", "a")] {
        let (mut rig, hooks) = rig(&[("vm", Machine::firmware())]);
        rig.a.boot("vm");
        hooks.fails("pre_check", role);
        for command in [
            &["migrate", "vm", "--to", "b", "--dry-run"][..],
            &["migrate", "vm", "--to", "b"],
        ] {
            let refused = rig.a.run(command);
            assert_eq!(refused.code, Some(2), "{refused:?}");
            let said = format!("{}{}", refused.stdout, refused.stderr);
            let hook = format!("the hook pre_check at {site} ");
            assert!(
                said.contains(&hook) && said.contains("no route to the other site"),
                "{refused:?}"
            );
        }
        assert_eq!(rig.a.state("vm").as_deref(), Some("running"));
        rig.assert_only(&[(&rig.a, "vm")]);
        assert!(
            hooks.told().iter().all(|told| told.hook == "pre_check"),
            "{:?}",
            hooks.told()
        );
    }
}

#[test]
fn a_hook_that_fails_after_activation_is_told_of_and_the_vm_stays_where_it_is() {
    need!(qemu());
    let (mut rig, hooks) = rig(&[("vm", Machine::firmware())]);
    rig.a.boot("vm");
    hooks.fails("after_activation", "destination");
    let moved = rig.a.run(&["migrate", "vm", "--to", "b"]);
    assert_eq!(moved.code, Some(0), "{moved:?}");
    let id = hooks.until_told("began", "after_activation", "destination").migration;
    until("the failure is told", || {
        let status = rig.b.run(&["status", &id]).stdout;
        status.contains("the hook after_activation at b") && status.contains("no route to the other site")
    });
    assert_eq!(rig.b.state("vm").as_deref(), Some("running"));
    rig.assert_only(&[(&rig.b, "vm")]);
}

#[test]
fn a_hook_that_a_crash_has_ended_runs_again_after_the_restart() {
    need!(qemu());
    for role in ["source", "destination"] {
        let (mut rig, hooks) = rig(&[("vm", Machine::firmware())]);
        rig.a.boot("vm");
        hooks.waits("after_activation", role);
        let moved = rig.a.run(&["migrate", "vm", "--to", "b"]);
        assert_eq!(moved.code, Some(0), "{moved:?}");
        hooks.until_told("began", "after_activation", role);
        let site = if role == "source" { &mut rig.a } else { &mut rig.b };
        site.gateway().signal(Signal::KILL);
        until("the gateway is dead", || site.gateway().has_ended());
        hooks.until_none_runs();
        std::fs::remove_file(hooks.waiting("after_activation", role)).unwrap();
        site.start();
        let told = hooks.until_told("ended", "after_activation", role);
        assert_eq!(told.outcome, "completed");
        rig.assert_only(&[(&rig.b, "vm")]);
    }
}

#[test]
fn a_gateway_that_is_stopped_waits_for_hooks_that_run() {
    need!(qemu());
    let (mut rig, hooks) = rig(&[("vm", Machine::firmware())]);
    rig.a.boot("vm");
    hooks.waits("after_activation", "source");
    let moved = rig.a.run(&["migrate", "vm", "--to", "b"]);
    assert_eq!(moved.code, Some(0), "{moved:?}");
    hooks.until_told("began", "after_activation", "source");
    let gateway = rig.a.take_gateway();
    gateway.signal(Signal::TERM);
    until("it drains", || gateway.stderr().contains("waiting for hooks"));
    hooks.lets("after_activation", "source");
    assert_eq!(gateway.wait().code, Some(0));
    assert_eq!(hooks.count("ended", "after_activation", "source"), 1);
}
