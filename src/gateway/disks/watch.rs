//! The guest while its disks are read for the first time: they are read slower where it suffers.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::task::AbortOnDropHandle;

use super::pull::State;
use crate::gateway::clock;
use crate::hypervisor::qemu::{BlockLayer, GuestDisk};
use crate::proto::page::{ByteRate, MigrationId};
use crate::proto::precopy::{ReadPace, guest_io};
use crate::shaper::Shaper;

/// Looks at the guest, for as long as it is there.
#[derive(Debug)]
pub(super) struct GuestWatch(Option<AbortOnDropHandle<()>>);

/// What is watched, and who is told.
pub(super) struct Watched {
    pub(super) migration: MigrationId,
    pub(super) block: BlockLayer,
    pub(super) disks: Vec<GuestDisk>,
    /// Of reads.
    pub(super) pace: Arc<Shaper>,
    /// It is no faster, whatever the guest bears.
    pub(super) most: Option<ByteRate>,
    pub(super) tell: Arc<watch::Sender<State>>,
}

impl GuestWatch {
    /// Begins before anything is read. A hypervisor that does not say how its guest fares is read as fast as it goes.
    pub(super) async fn begin(watched: Watched) -> Self {
        let before = watched.block.guest_io(&watched.disks).await;
        let before = before.inspect_err(|error| tracing::warn!("how the guest fares is not known: {error}"));
        Self(before.ok().map(|before| {
            let kept = ReadPace::new(before, watched.most);
            AbortOnDropHandle::new(tokio::spawn(watched.look_on(kept)))
        }))
    }

    /// Ends, and says nothing more of the rate.
    pub(super) async fn end(self) {
        if let Some(task) = self.0 {
            task.abort();
            let _ = task.await;
        }
    }
}

impl Watched {
    async fn look_on(self, mut kept: ReadPace) {
        let mut looks = tokio::time::interval(guest_io::LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        looks.tick().await;
        let mut last = self.read_until_now();
        loop {
            looks.tick().await;
            let Ok(io) = self.block.guest_io(&self.disks).await else {
                self.pace.set_rate(self.most);
                continue;
            };
            let now = self.read_until_now();
            let rate = ByteRate::over(now.1 - last.1, now.0.saturating_duration_since(last.0));
            last = now;
            let rate = kept.look(io, rate);
            if rate != self.pace.rate() {
                tracing::debug!(migration = %self.migration, ?rate, "disks are read no faster, for the guest's sake");
            }
            self.pace.set_rate(rate);
            let seen = kept.seen();
            if seen.requests > 0 {
                let each = |nanos: f64| Some(nanos / seen.requests as f64 * 1e-9);
                self.tell.send_modify(|state| {
                    state.figures.guest_io_seconds = each(seen.nanos);
                    state.figures.guest_io_usual_seconds = each(seen.usual_nanos);
                });
            }
        }
    }

    fn read_until_now(&self) -> (Instant, u64) {
        (clock::now(), self.tell.borrow().figures.read_bytes)
    }
}
