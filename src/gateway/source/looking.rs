//! What a source's driver looks at by itself, at the vmm and at the clock, while it waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::SourceDriver;
use super::before_switchover::Hold;
use crate::gateway::clock;
use crate::gateway::forecasting::Sample;
use crate::gateway::registry::Entry;
use crate::hypervisor::qemu::{MigrationStatus, PermitConditions, SourceError};
use crate::proto::ownership::{Effect, SourceEvent, SourceState, VmmFact};
use crate::proto::precopy::policy::Settings;

/// How long the peer is waited for once the guest stands still: it is let go on soon, since it could not be handed over.
const LONGEST_PAUSED_SILENCE: Duration = Duration::from_secs(2);

/// The guest stands still, there is contact, and yet nothing goes on: it is let go on after this long. A hypervisor or a disk that
/// is busy for a moment is waited for.
const LONGEST_STANDSTILL: Duration = Duration::from_secs(15);

/// A guest that was handed over stands still without a word from the destination: after this long a person is told. A gateway that is
/// restarted is back by then.
const SILENCE_TO_TELL: Duration = Duration::from_secs(30);

/// Until a vmm that did not answer is asked again to continue its guest.
const RESUME_AGAIN: Duration = Duration::from_secs(1);

impl SourceDriver {
    /// A look at the vmm and at the clock.
    pub(super) async fn look(&mut self) {
        let now = clock::now();
        let is_copying = match self.machine.state() {
            SourceState::Copying(_) => true,
            SourceState::Starting { .. } => false,
            SourceState::Permitted { .. } => return self.look_after_permit(now).await,
            SourceState::Resuming { .. } => return self.resume_again(now),
            _ => return,
        };
        if self.waits_in_vain(now) || !is_copying {
            return;
        }
        if self.waits_too_long() {
            return;
        }
        self.start_late().await;
        if self.look_at_disks().await {
            return;
        }
        let Some(stream) = &self.stream else { return };
        if stream.sum.is_some() {
            return self.look_for_completion().await;
        }
        // Before the vmm is asked, so that it has sent at least these.
        let counted = stream.outbound.counted_pages();
        let answer = match self.vmm.connected().await {
            Ok(vm) => vm.progress().await,
            Err(error) => Err(error),
        };
        let progress = match answer {
            Ok(progress) => progress,
            Err(error) => return self.on_silence(&error.to_string()),
        };
        if matches!(progress.status, MigrationStatus::Failed | MigrationStatus::Cancelled) {
            let why = progress.error.as_deref().unwrap_or("it gave no reason");
            self.fail(format!(
                "the source's hypervisor ended the migration ({}): {why}",
                progress.status
            ));
            self.feed(&SourceEvent::MigrateFailed);
            return;
        }
        if progress.status == MigrationStatus::PreSwitchover {
            self.finish_disks().await;
        }
        if let Err(reason) = self.keep_from_stopping(&progress, counted).await {
            self.fail(reason);
            self.feed(&SourceEvent::Cancel);
            return;
        }
        let (Some(link), Some(stream)) = (self.link.clone(), &self.stream) else {
            return;
        };
        let outbound = Arc::clone(&stream.outbound);
        self.look_at_sample(now).await;
        let disks = self.disks.rounds();
        let Some(copying) = &mut self.copying else { return };
        match copying.look(now, &progress, &outbound, disks, &link, &self.entry) {
            Ok(Some(settings)) => {
                if let Err(error) = self.apply(settings).await {
                    tracing::debug!(migration = %self.entry.migration, "settings were not applied: {error}");
                }
            }
            Ok(None) => {}
            Err(reason) => {
                self.fail(reason);
                self.feed(&SourceEvent::Cancel);
            }
        }
    }

    /// The sample for the forecast ends while the first round is on its way.
    async fn look_at_sample(&mut self, now: Instant) {
        let Some(copying) = &mut self.copying else { return };
        let Some(due) = copying.due_sample(now) else { return };
        let answer = match self.vmm.connected().await {
            Ok(vm) => vm.dirty_rate(due).await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(Some(rate)) => copying.take_sample(Sample::of(rate), &self.entry),
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(migration = %self.entry.migration, "no dirty-rate sample: {error}");
                copying.take_sample(Sample::Unknown, &self.entry);
            }
        }
    }

    /// Gives up a pre-copy whose peer has been away for too long, or takes nothing any more while the guest stands still.
    fn waits_in_vain(&mut self, now: Instant) -> bool {
        let reason = if let Some(since) = self.lost_contact {
            let longest = if self.stopped_at.is_some() {
                // Where there is another way to the peer, long enough to take it.
                let another = self.core.links.second_way(&self.entry.peer);
                another.map_or(LONGEST_PAUSED_SILENCE, |patience| patience.max(LONGEST_PAUSED_SILENCE))
            } else {
                self.core.config.migration.longest_cut
            };
            (now.saturating_duration_since(since) > longest).then(|| {
                self.entry.set_cut();
                format!(
                    "the peer {} could not be reached for {} s",
                    self.entry.peer,
                    longest.as_secs()
                )
            })
        } else if let (Some(_), Some(stream), Hold::Open) = (self.stopped_at, &self.stream, &self.hold) {
            let of_disks = self.disks.figures().map_or(0, |figures| figures.wire_bytes);
            let taken = stream.outbound.acknowledged_bytes() + of_disks;
            let since = match self.standstill {
                Some((before, since)) if before == taken => since,
                _ => self.standstill.insert((taken, now)).1,
            };
            (now.saturating_duration_since(since) > LONGEST_STANDSTILL).then(|| {
                format!(
                    "nothing went on for {} s while {} stood still",
                    LONGEST_STANDSTILL.as_secs(),
                    self.entry.vm
                )
            })
        } else {
            self.standstill = None;
            None
        };
        let Some(reason) = reason else { return false };
        self.fail(reason);
        self.feed(&SourceEvent::Cancel);
        true
    }

    /// The VM is ours again, and its vmm was too busy to say whether it goes on: it is asked until it says.
    fn resume_again(&mut self, now: Instant) {
        if let Some(at) = self.asked_to_resume
            && now.saturating_duration_since(at) > RESUME_AGAIN
        {
            self.asked_to_resume = None;
            self.effects.extend([Effect::ThawVmm, Effect::Resume]);
        }
    }

    /// The guest is handed over: its process must stand, and somebody should know if the destination says nothing.
    async fn look_after_permit(&mut self, now: Instant) {
        if self.vmm.was_let_go() {
            let event = match self.vmm.ask_after_let_go().await {
                VmmFact::Dead => SourceEvent::VmmDead,
                VmmFact::Running => SourceEvent::VmmRunning,
                VmmFact::Paused | VmmFact::Unreachable => {
                    // Its guest has not run; it is stopped again before it can.
                    if let Err(reason) = self.vmm.stop_again().await {
                        tracing::warn!(migration = %self.entry.migration, "{reason}");
                    }
                    return;
                }
            };
            return self.feed(&event);
        }
        let silent = |since: Instant| now.saturating_duration_since(since) > SILENCE_TO_TELL;
        if self.lost_contact.is_some_and(silent) && !self.entry.needs_person() {
            let Entry { vm, peer, .. } = &*self.entry;
            let how = if self.vmm.is_off() { "kept off" } else { "paused" };
            self.entry.advise(&format!(
                "{vm} is {how}: it was handed over to {peer}, which has not been heard of for {} s and may run it. This goes on by \
                 itself as soon as {peer} is back. If that site is gone for good, make sure that nothing runs there and say: \
                 longhaul resolve {vm} --peer-is-fenced",
                SILENCE_TO_TELL.as_secs()
            ));
            self.silence_told = true;
        }
    }

    /// Tells the vmm how long it may plan to stop and how fast the rest will be taken.
    async fn apply(&mut self, settings: Settings) -> Result<(), SourceError> {
        let vm = self.vmm.connected().await?;
        // A QEMU that cannot be told (before 8.2) goes by what our socket took lately; its limit accounts for that.
        vm.set_switchover_bandwidth(settings.switchover_bandwidth.0).await?;
        vm.set_downtime_limit(settings.downtime_limit).await
    }

    /// The stream has ended; whether that was success only the vmm can say.
    async fn look_for_completion(&mut self) {
        let answer = match self.vmm.connected().await {
            Ok(vm) => vm.permit_conditions().await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(PermitConditions::Met) => {
                if self.stopped_at.is_none() {
                    self.stopped_at = Some(clock::now());
                }
                self.feed(&SourceEvent::MigrateCompleted);
                self.feed(&SourceEvent::PostMigrate);
            }
            Ok(PermitConditions::NotYet { .. }) => {}
            Ok(conditions @ (PermitConditions::Failed { .. } | PermitConditions::Disturbed { .. })) => {
                self.fail(format!("the source's hypervisor did not finish: {conditions}"));
                self.feed(&SourceEvent::MigrateFailed);
            }
            Err(error) => self.on_silence(&error.to_string()),
        }
    }

    /// The vmm did not answer: dead, or busy.
    fn on_silence(&mut self, error: &str) {
        if self.vmm.is_dead() {
            self.fail("the hypervisor's process at the source died".to_owned());
            self.feed(&SourceEvent::VmmDead);
        } else {
            tracing::debug!(migration = %self.entry.migration, "the hypervisor did not answer: {error}");
        }
    }
}
