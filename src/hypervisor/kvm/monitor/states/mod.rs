//! Where a guest is and how far its migration, by QEMU's names and with the rules of a QEMU whose return path is off.
//!
//! ```text
//! running ⇄ paused            stop, cont
//!    └──┬──────┘
//! finish-migrate ──┬── sent ──────────────→ postmigrate ── cont ──→ running
//!                  └── failed, cancelled ──→ what it was
//! inmigrate ── loaded ──→ paused, or running where somebody has said `cont` meanwhile
//! ```
//!
//! Pure: what happens is told to [`States`], which gives back what to do, in order. Where a [`Effect::Pause`] or a
//! [`Effect::Resume`] fails, the rest of the list is not done, and [`States::pause_failed`] or
//! [`States::resume_failed`] says what to do instead. A list that resumes says so before.

/// Where the guest is, `query-status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RunState {
    /// The vCPUs run.
    Running,
    /// Somebody has stopped it, or it was loaded and nobody has started it.
    Paused,
    /// It is waited for, or being loaded, or could not be loaded.
    InMigrate,
    /// It stands for the last part of its migration.
    FinishMigrate,
    /// It stands, and everything of it was sent.
    PostMigrate,
    /// It has shut itself down.
    Shutdown,
}

impl RunState {
    /// QEMU's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::InMigrate => "inmigrate",
            RunState::FinishMigrate => "finish-migrate",
            RunState::PostMigrate => "postmigrate",
            RunState::Shutdown => "shutdown",
        }
    }
}

/// How far the last migration is, `query-migrate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Status {
    /// There was none.
    None,
    /// It connects, or is waited for.
    Setup,
    /// Memory is on its way.
    Active,
    /// The guest stands, and somebody has to say that the rest may go.
    PreSwitchover,
    /// The rest is on its way.
    Device,
    /// Everything was sent, or loaded.
    Completed,
    /// It will not be.
    Failed,
    /// Somebody has cancelled it, and it has not ended yet.
    Cancelling,
    /// It was cancelled.
    Cancelled,
}

impl Status {
    /// QEMU's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Status::None => "none",
            Status::Setup => "setup",
            Status::Active => "active",
            Status::PreSwitchover => "pre-switchover",
            Status::Device => "device",
            Status::Completed => "completed",
            Status::Failed => "failed",
            Status::Cancelling => "cancelling",
            Status::Cancelled => "cancelled",
        }
    }

    /// Whether it has begun and not ended.
    pub(super) fn is_under_way(self) -> bool {
        use Status as S;
        matches!(
            self,
            S::Setup | S::Active | S::PreSwitchover | S::Device | S::Cancelling
        )
    }
}

/// Something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Make the vCPUs stand.
    Pause,
    /// Let the vCPUs run.
    Resume,
    /// Tell everybody.
    Emit(Event),
}

/// Something to tell everybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The vCPUs stand.
    Stop,
    /// The vCPUs are about to run.
    Resume,
    /// The guest has shut itself down.
    Shutdown,
    /// A migration is so far now.
    Migration(Status),
}

/// Where the guest is, how far its migration is, and what may follow.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct States {
    run: RunState,
    status: Status,
    /// Why the last migration has failed.
    error: Option<String>,
    /// Of a guest in [`RunState::FinishMigrate`]: what it is again if the migration comes to nothing.
    held: RunState,
    /// Where the guest is if the vCPUs cannot be stopped or started now.
    fallback: RunState,
    /// The guest is to run as soon as it is loaded.
    is_armed: bool,
    /// The guest has shut down since the migration began, so it is not to be run elsewhere.
    is_doomed: bool,
}

impl States {
    /// A guest that stands in `run`, which is [`RunState::Paused`] or [`RunState::InMigrate`].
    pub(super) fn new(run: RunState) -> Self {
        Self {
            run,
            status: Status::None,
            error: None,
            held: RunState::Paused,
            fallback: RunState::Paused,
            is_armed: false,
            is_doomed: false,
        }
    }

    pub(super) fn run(&self) -> RunState {
        self.run
    }

    pub(super) fn status(&self) -> Status {
        self.status
    }

    /// Why the last migration has failed.
    pub(super) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Whether the guest stands because somebody wants to be asked before the rest is sent.
    pub(super) fn waits_for_continue(&self) -> bool {
        self.status == Status::PreSwitchover && !self.is_doomed
    }

    /// Whether the rest may be sent.
    pub(super) fn may_send_rest(&self) -> bool {
        self.status == Status::Device && !self.is_doomed
    }

    /// Somebody says `stop`. One for the time of the switchover holds if that comes to nothing.
    pub(super) fn stop(&mut self) -> Vec<Effect> {
        match self.run {
            RunState::Running => {
                self.become_or_stay(RunState::Paused);
                return vec![Effect::Pause, Effect::Emit(Event::Stop)];
            }
            RunState::InMigrate => self.is_armed = false,
            RunState::FinishMigrate if self.held == RunState::Running => self.held = RunState::Paused,
            RunState::FinishMigrate | RunState::Paused | RunState::PostMigrate | RunState::Shutdown => {}
        }
        Vec::new()
    }

    /// Somebody says `cont`. Before the guest is loaded it only is noted.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn cont(&mut self) -> Result<Vec<Effect>, &'static str> {
        match self.run {
            RunState::Running => Ok(Vec::new()),
            RunState::Paused | RunState::PostMigrate => {
                self.become_or_stay(RunState::Running);
                Ok(vec![Effect::Emit(Event::Resume), Effect::Resume])
            }
            RunState::InMigrate if self.status == Status::Failed => {
                Err("The guest could not be loaded, so there is nothing that could run.")
            }
            RunState::InMigrate => {
                self.is_armed = true;
                Ok(Vec::new())
            }
            RunState::FinishMigrate => {
                Err("The migration is about to finish; the guest cannot be started before it has.")
            }
            RunState::Shutdown => Err("The guest has shut down."),
        }
    }

    /// The guest has shut itself down. Then a migration of it comes to nothing.
    pub(super) fn shut_down(&mut self) -> Vec<Effect> {
        let told = Effect::Emit(Event::Shutdown);
        let effects = match self.run {
            RunState::Running => {
                self.become_or_stay(RunState::Shutdown);
                vec![Effect::Pause, told, Effect::Emit(Event::Stop)]
            }
            // It has done so just before it was stopped.
            RunState::Paused => {
                self.run = RunState::Shutdown;
                vec![told]
            }
            RunState::FinishMigrate if self.held != RunState::Shutdown => {
                self.held = RunState::Shutdown;
                vec![told]
            }
            RunState::FinishMigrate | RunState::InMigrate | RunState::PostMigrate | RunState::Shutdown => {
                return Vec::new();
            }
        };
        self.is_doomed = self.status.is_under_way();
        effects
    }

    /// Somebody wants the guest elsewhere.
    ///
    /// # Errors
    /// Why that cannot be.
    pub(super) fn migrate(&mut self) -> Result<Vec<Effect>, &'static str> {
        match self.run {
            RunState::InMigrate => return Err("This guest is waited for or being loaded itself."),
            _ if self.status.is_under_way() => return Err("Another migration is under way."),
            RunState::PostMigrate => {
                return Err("The guest was migrated away; say `cont` first if it is to be here again.");
            }
            RunState::Shutdown => return Err("The guest has shut down."),
            RunState::Running | RunState::Paused | RunState::FinishMigrate => {}
        }
        self.error = None;
        self.is_doomed = false;
        Ok(vec![self.enter(Status::Setup)])
    }

    /// The outgoing connection is there. `None`: nobody wants it any more.
    pub(super) fn connected(&mut self) -> Option<Vec<Effect>> {
        (self.status == Status::Setup && !self.is_doomed).then(|| vec![self.enter(Status::Active)])
    }

    /// The rest is small enough: the guest is to stand. `is_asked`: somebody wants to say when the rest may be sent.
    ///
    /// # Errors
    /// Nobody wants it any more.
    pub(super) fn switch_over(&mut self, is_asked: bool) -> Result<Vec<Effect>, &'static str> {
        if self.status != Status::Active || self.is_doomed || self.run == RunState::InMigrate {
            return Err("The migration was given up.");
        }
        let mut effects = Vec::new();
        self.held = self.run;
        self.become_or_stay(RunState::FinishMigrate);
        if self.held == RunState::Running {
            effects.extend([Effect::Pause, Effect::Emit(Event::Stop)]);
        }
        effects.push(self.enter(if is_asked {
            Status::PreSwitchover
        } else {
            Status::Device
        }));
        Ok(effects)
    }

    /// Somebody says that the rest may be sent.
    ///
    /// # Errors
    /// It is not waited for.
    pub(super) fn continue_switchover(&mut self) -> Result<Vec<Effect>, &'static str> {
        if self.status != Status::PreSwitchover {
            return Err("The migration does not wait in pre-switchover.");
        }
        Ok(vec![self.enter(Status::Device)])
    }

    /// Somebody says `migrate_cancel`. Nothing, unless a migration away from here is under way.
    pub(super) fn cancel(&mut self) -> Vec<Effect> {
        use Status as S;
        let is_leaving = self.run != RunState::InMigrate;
        match self.status {
            S::Setup | S::Active | S::PreSwitchover | S::Device if is_leaving => vec![self.enter(Status::Cancelling)],
            _ => Vec::new(),
        }
    }

    /// The engine has ended sending, and nothing goes into the stream any more.
    pub(super) fn sent(&mut self, outcome: Result<(), String>) -> Vec<Effect> {
        let outcome = if self.is_doomed {
            Err("The guest has shut down.".to_owned())
        } else {
            outcome
        };
        match (self.status, outcome) {
            (Status::Device, Ok(())) => {
                self.run = RunState::PostMigrate;
                vec![self.enter(Status::Completed)]
            }
            // What was sent is worth nothing, even if it was everything: who cancelled relies on the guest to be here.
            (Status::Cancelling, _) => self.stay(Status::Cancelled),
            (_, Ok(())) => {
                self.error = Some("The stream ended before the guest was stopped.".to_owned());
                self.stay(Status::Failed)
            }
            (_, Err(reason)) => {
                self.error = Some(reason);
                self.stay(Status::Failed)
            }
        }
    }

    /// Whether somebody may say from where the guest comes.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn check_expects(&self) -> Result<(), &'static str> {
        match (self.run, self.status) {
            (RunState::InMigrate, Status::None) => Ok(()),
            (RunState::InMigrate, Status::Failed) => {
                Err("The guest could not be loaded; a second one cannot be, start anew.")
            }
            (RunState::InMigrate, _) => Err("It has been said already from where the guest comes."),
            _ => Err("There is a guest here; only a VMM that was started to wait for one takes one in."),
        }
    }

    /// It is listened for the guest.
    pub(super) fn expect(&mut self) -> Vec<Effect> {
        vec![self.enter(Status::Setup)]
    }

    /// The incoming connection is there.
    pub(super) fn accepted(&mut self) -> Vec<Effect> {
        vec![self.enter(Status::Active)]
    }

    /// The incoming stream has ended. After an error there never is a guest here.
    pub(super) fn loaded(&mut self, outcome: Result<(), String>) -> Vec<Effect> {
        let is_armed = std::mem::take(&mut self.is_armed);
        if let Err(reason) = outcome {
            self.error = Some(reason);
            return vec![self.enter(Status::Failed)];
        }
        self.run = RunState::Paused;
        let mut effects = vec![self.enter(Status::Completed)];
        if is_armed {
            self.become_or_stay(RunState::Running);
            effects.extend([Effect::Emit(Event::Resume), Effect::Resume]);
        }
        effects
    }

    /// The vCPUs could not be stopped: the guest runs on.
    pub(super) fn pause_failed(&mut self) {
        self.run = self.fallback;
        // Nobody was told yet that it was to stand for the last part.
        if matches!(self.status, Status::PreSwitchover | Status::Device) {
            self.status = Status::Active;
        }
    }

    /// The vCPUs could not be started, after it was told that they would be.
    pub(super) fn resume_failed(&mut self) -> Vec<Effect> {
        self.run = self.fallback;
        vec![Effect::Emit(Event::Stop)]
    }

    fn become_or_stay(&mut self, run: RunState) {
        self.fallback = self.run;
        self.run = run;
    }

    fn enter(&mut self, status: Status) -> Effect {
        self.status = status;
        Effect::Emit(Event::Migration(status))
    }

    /// The guest is here and remains here.
    fn stay(&mut self, status: Status) -> Vec<Effect> {
        let mut effects = vec![self.enter(status)];
        if self.run == RunState::FinishMigrate {
            self.run = self.held;
            if self.held == RunState::Running {
                self.fallback = RunState::Paused;
                effects.extend([Effect::Emit(Event::Resume), Effect::Resume]);
            }
        }
        self.is_doomed = false;
        effects
    }
}

#[cfg(test)]
mod tests;
