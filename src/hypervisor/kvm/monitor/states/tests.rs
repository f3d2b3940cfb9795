//! Every state that can be reached, by every input, with every outcome of stopping and starting the vCPUs.

use std::collections::HashSet;

use super::*;

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input {
    Stop,
    Cont,
    ShutDown,
    Migrate,
    Connected,
    SwitchOver { is_asked: bool },
    Continue,
    Cancel,
    Sent { is_ok: bool },
    Expect,
    Accepted,
    Loaded { is_ok: bool },
}

const INPUTS: [Input; 15] = [
    Input::Stop,
    Input::Cont,
    Input::ShutDown,
    Input::Migrate,
    Input::Connected,
    Input::SwitchOver { is_asked: false },
    Input::SwitchOver { is_asked: true },
    Input::Continue,
    Input::Cancel,
    Input::Sent { is_ok: true },
    Input::Sent { is_ok: false },
    Input::Expect,
    Input::Accepted,
    Input::Loaded { is_ok: true },
    Input::Loaded { is_ok: false },
];

/// A guest with its monitor, as far as the rules go.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    states: States,
    vcpus_run: bool,
    /// What the events say.
    told_running: bool,
    /// Everything was sent, and nobody has said `cont` since.
    is_handed_over: bool,
    /// A load has failed.
    is_spoilt: bool,
}

impl World {
    fn new(run: RunState) -> Self {
        Self {
            states: States::new(run),
            vcpus_run: false,
            told_running: false,
            is_handed_over: false,
            is_spoilt: false,
        }
    }

    /// Whether this can happen at all: the engine sends only after it was asked to, and so on.
    fn allows(&self, input: Input) -> bool {
        let (run, status) = (self.states.run(), self.states.status());
        let is_arriving = run == RunState::InMigrate;
        match input {
            Input::Stop | Input::Cont | Input::ShutDown | Input::Migrate | Input::Continue | Input::Cancel => true,
            Input::Connected | Input::SwitchOver { .. } | Input::Sent { .. } => status.is_under_way() && !is_arriving,
            Input::Expect => self.states.check_expects().is_ok(),
            Input::Accepted => is_arriving && status == Status::Setup,
            Input::Loaded { .. } => is_arriving && matches!(status, Status::Setup | Status::Active),
        }
    }

    /// Lets it happen. `works`: whether vCPUs stop and start when they are to.
    fn take(&mut self, input: Input, works: bool) {
        let before = self.clone();
        let outcome = |is_ok: bool| if is_ok { Ok(()) } else { Err("broken".to_owned()) };
        let states = &mut self.states;
        let effects = match input {
            Input::Stop => states.stop(),
            Input::Cont => states.cont().unwrap_or_default(),
            Input::ShutDown => states.shut_down(),
            Input::Migrate => states.migrate().unwrap_or_default(),
            Input::Connected => states.connected().unwrap_or_default(),
            Input::SwitchOver { is_asked } => states.switch_over(is_asked).unwrap_or_default(),
            Input::Continue => states.continue_switchover().unwrap_or_default(),
            Input::Cancel => states.cancel(),
            Input::Sent { is_ok } => states.sent(outcome(is_ok)),
            Input::Expect => states.expect(),
            Input::Accepted => states.accepted(),
            Input::Loaded { is_ok } => states.loaded(outcome(is_ok)),
        };
        if input == Input::Cont {
            self.is_handed_over = false;
        }
        for effect in effects {
            match effect {
                Effect::Pause if works => self.vcpus_run = false,
                Effect::Pause => {
                    self.states.pause_failed();
                    break;
                }
                Effect::Resume => {
                    assert!(self.told_running, "{input:?} runs vCPUs before it is told: {before:?}");
                    assert!(!before.is_handed_over || input == Input::Cont, "{input:?} {before:?}");
                    assert!(!self.is_handed_over, "{input:?} runs what was handed over: {before:?}");
                    assert!(!self.is_spoilt, "{input:?} runs what was not loaded: {before:?}");
                    assert_eq!(self.states.run(), RunState::Running, "{input:?} {before:?}");
                    if works {
                        self.vcpus_run = true;
                    } else {
                        let told = self.states.resume_failed();
                        assert_eq!(told, [Effect::Emit(Event::Stop)]);
                        self.told_running = false;
                        break;
                    }
                }
                Effect::Emit(Event::Stop) => {
                    assert!(!self.vcpus_run, "{input:?} tells STOP while vCPUs run: {before:?}");
                    self.told_running = false;
                }
                Effect::Emit(Event::Resume) => self.told_running = true,
                Effect::Emit(Event::Shutdown | Event::Migration(_)) => {}
            }
        }
        if before.states.status() != Status::Completed
            && self.states.status() == Status::Completed
            && before.states.run() != RunState::InMigrate
        {
            self.is_handed_over = true;
        }
        if before.states.run() == RunState::InMigrate && self.states.status() == Status::Failed {
            self.is_spoilt = true;
        }
        self.check(input, &before);
    }

    fn check(&self, input: Input, before: &Self) {
        let (run, status) = (self.states.run(), self.states.status());
        let at = format!("{input:?} {before:?} → {self:?}");
        assert_eq!(self.vcpus_run, run == RunState::Running, "{at}");
        assert_eq!(self.told_running, self.vcpus_run, "{at}");
        if self.is_handed_over {
            assert_eq!((run, status), (RunState::PostMigrate, Status::Completed), "{at}");
        }
        if (run, status) == (RunState::PostMigrate, Status::Completed) {
            assert!(!self.vcpus_run, "{at}");
        }
        if self.is_spoilt {
            assert_eq!((run, status), (RunState::InMigrate, Status::Failed), "{at}");
        }
        // A guest never stands in the middle of a migration that has ended.
        if run == RunState::FinishMigrate {
            assert!(status.is_under_way() && status != Status::Setup, "{at}");
        }
        // Who was paused before stays so unless somebody says otherwise.
        let has_begun_to_run = self.vcpus_run && !before.vcpus_run;
        let has_held = before.states.run() == RunState::FinishMigrate && before.states.held == RunState::Running;
        if has_begun_to_run {
            let by_load = matches!(input, Input::Loaded { is_ok: true }) && before.states.is_armed;
            let by_failure = matches!(input, Input::Sent { .. }) && has_held;
            assert!(input == Input::Cont || by_load || by_failure, "{at}");
        }
        assert_eq!(
            self.states.error().is_some(),
            status == Status::Failed || before.states.error().is_some() && status == before.states.status(),
            "{at}"
        );
    }
}

/// Everything that can be reached from `run`.
fn explore(run: RunState) -> HashSet<World> {
    let start = World::new(run);
    let mut seen = HashSet::from([start.clone()]);
    let mut open = vec![start];
    while let Some(world) = open.pop() {
        for input in INPUTS.into_iter().filter(|&input| world.allows(input)) {
            for works in [true, false] {
                let mut next = world.clone();
                next.take(input, works);
                if seen.insert(next.clone()) {
                    open.push(next);
                }
            }
        }
    }
    seen
}

#[test]
fn no_order_of_events_runs_a_guest_that_was_handed_over_or_not_loaded() {
    for start in [RunState::Paused, RunState::InMigrate] {
        let worlds = explore(start);
        assert!(worlds.len() > 50, "{}", worlds.len());
        let is_reached = |run, status| {
            worlds
                .iter()
                .any(|world| (world.states.run(), world.states.status()) == (run, status))
        };
        for (run, status) in [
            (RunState::Running, Status::Active),
            (RunState::FinishMigrate, Status::PreSwitchover),
            (RunState::FinishMigrate, Status::Cancelling),
            (RunState::PostMigrate, Status::Completed),
            (RunState::Running, Status::Completed),
            (RunState::Running, Status::Cancelled),
            (RunState::Paused, Status::Failed),
            (RunState::Shutdown, Status::Failed),
        ] {
            assert!(is_reached(run, status), "{start:?} {run:?} {status:?}");
        }
        assert_eq!(
            is_reached(RunState::InMigrate, Status::Failed),
            start == RunState::InMigrate
        );
    }
}

/// A guest that runs.
fn running() -> World {
    let mut world = World::new(RunState::Paused);
    world.take(Input::Cont, true);
    world
}

fn after(mut world: World, inputs: &[Input]) -> (RunState, Status) {
    for &input in inputs {
        assert!(world.allows(input), "{input:?} {world:?}");
        world.take(input, true);
    }
    (world.states.run(), world.states.status())
}

const SWITCH: Input = Input::SwitchOver { is_asked: false };
const ASK: Input = Input::SwitchOver { is_asked: true };
const SENT: Input = Input::Sent { is_ok: true };
const BROKEN: Input = Input::Sent { is_ok: false };

#[test]
fn a_guest_that_ran_runs_again_after_a_migration_that_came_to_nothing_and_a_paused_one_does_not() {
    use Input as I;
    for (inputs, status) in [
        (&[I::Migrate, I::Connected, SWITCH, BROKEN][..], Status::Failed),
        (&[I::Migrate, I::Connected, BROKEN], Status::Failed),
        (&[I::Migrate, I::Connected, ASK, I::Cancel, BROKEN], Status::Cancelled),
        (&[I::Migrate, I::Connected, SWITCH, I::Cancel, SENT], Status::Cancelled),
        (&[I::Migrate, I::Cancel, I::Connected, BROKEN], Status::Cancelled),
    ] {
        assert_eq!(after(running(), inputs), (RunState::Running, status), "{inputs:?}");
        assert_eq!(after(World::new(RunState::Paused), inputs), (RunState::Paused, status));
    }
}

#[test]
fn a_stop_during_the_switchover_holds_afterwards() {
    use Input as I;
    let inputs = [I::Migrate, I::Connected, SWITCH, I::Stop, BROKEN];
    assert_eq!(after(running(), &inputs), (RunState::Paused, Status::Failed));
}

#[test]
fn what_was_sent_stands_until_somebody_says_cont() {
    use Input as I;
    let sent = [
        I::Migrate,
        I::Connected,
        ASK,
        I::Continue,
        SENT,
        I::Stop,
        I::Cancel,
        I::Migrate,
        I::ShutDown,
    ];
    assert_eq!(after(running(), &sent), (RunState::PostMigrate, Status::Completed));
    let inputs: Vec<_> = sent.into_iter().chain([I::Cont]).collect();
    assert_eq!(after(running(), &inputs), (RunState::Running, Status::Completed));
}

#[test]
fn a_guest_that_shuts_down_is_not_handed_over() {
    use Input as I;
    for inputs in [
        &[I::Migrate, I::ShutDown, I::Connected, BROKEN][..],
        &[I::Migrate, I::Connected, I::ShutDown, SWITCH, SENT],
        &[I::Migrate, I::Connected, SWITCH, I::ShutDown, SENT],
    ] {
        assert_eq!(
            after(running(), inputs),
            (RunState::Shutdown, Status::Failed),
            "{inputs:?}"
        );
    }
}

#[test]
fn a_start_that_was_said_too_early_is_armed_and_a_stop_clears_it() {
    use Input as I;
    let waiting = || World::new(RunState::InMigrate);
    let loaded = I::Loaded { is_ok: true };
    let armed = [I::Cont, I::Expect, I::Accepted, loaded];
    assert_eq!(after(waiting(), &armed), (RunState::Running, Status::Completed));
    let cleared = [I::Cont, I::Stop, I::Expect, I::Accepted, loaded];
    assert_eq!(after(waiting(), &cleared), (RunState::Paused, Status::Completed));
    let failed = [I::Expect, I::Cont, I::Accepted, I::Loaded { is_ok: false }, I::Cont];
    assert_eq!(after(waiting(), &failed), (RunState::InMigrate, Status::Failed));
}

#[test]
fn vcpus_that_do_not_stop_or_start_leave_the_guest_where_it_is() {
    let mut world = running();
    world.take(Input::Stop, false);
    assert_eq!(world.states.run(), RunState::Running);
    for input in [Input::Migrate, Input::Connected] {
        world.take(input, true);
    }
    world.take(SWITCH, false);
    assert_eq!(
        (world.states.run(), world.states.status()),
        (RunState::Running, Status::Active)
    );
    world.take(SWITCH, true);
    world.take(BROKEN, false);
    assert_eq!(
        (world.states.run(), world.states.status()),
        (RunState::Paused, Status::Failed)
    );
}
