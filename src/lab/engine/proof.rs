//! The guest at work before a move, and its own proof after it.

use std::time::Duration;

use crate::lab::error::LabError;
use crate::lab::guest::{Launch, Start};
use crate::lab::heartbeat::{Beat, Crossing, Heartbeat};
use crate::lab::process::Process;
use crate::lab::site::Site;

/// What the guest has said of its own memory.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub(in crate::lab) struct Proof {
    /// Every check of every page was good, and its signs of life never showed a second copy.
    pub(in crate::lab) intact: bool,
    /// Pages that were checked on demand.
    pub(in crate::lab) pages_checked: u64,
}

/// Boots the guest at `site` and waits until its working set is filled and it has run for a while.
pub(in crate::lab) async fn boot(launch: &Launch, site: &Site) -> Result<(Process, Heartbeat), LabError> {
    let mut qemu = site.start_qemu(launch, Start::Boot)?;
    let mut heartbeat = match Heartbeat::connect(&site.files.heartbeat, SOON).await {
        Ok(heartbeat) => heartbeat,
        // A QEMU that ended at once says why; that is worth more than that nobody answers.
        Err(error) => {
            qemu.check()?;
            return Err(error.into());
        }
    };
    let settled = launch.dials.pages_per_second;
    let is_settled = |beat: Option<Beat>| beat.is_some_and(|beat| beat.writes >= settled);
    heartbeat
        .wait_for("the first second of work", BOOT, |heard| is_settled(heard.last))
        .await?;
    Ok((qemu, heartbeat))
}

/// Has the guest read every page; notes what it found.
///
/// # Errors
/// [`LabError::Damaged`] where a page is not as it must be.
pub(in crate::lab) async fn prove(heartbeat: &mut Heartbeat, proof: &mut Proof) -> Result<(), LabError> {
    let verified = heartbeat.verify(VERIFY).await?;
    let heard = heartbeat.heard();
    let bad = verified.bad.max(heard.last.map_or(0, |beat| beat.bad));
    proof.pages_checked += verified.pages;
    if bad > 0 || !verified.is_intact() {
        return Err(LabError::Damaged {
            bad,
            pages: verified.pages,
        });
    }
    if heard.out_of_order > 0 {
        return Err(LabError::OutOfOrder {
            jumps: heard.out_of_order,
        });
    }
    Ok(())
}

/// What lies between the last sign of life at the source and the first at the destination.
///
/// # Errors
/// [`LabError::RanTwice`] where the guest did not go on where it was stopped.
pub(super) fn crossing(direction: &'static str, last: Beat, first: Beat) -> Result<Crossing, LabError> {
    let ran_twice = LabError::RanTwice {
        direction,
        last: last.sequence,
        first: first.sequence,
    };
    Crossing::between(last, first)
        .filter(Crossing::is_seamless)
        .ok_or(ran_twice)
}

/// From the start of QEMU to a guest at work; some seconds under TCG, more on a machine that does other things too.
const BOOT: Duration = Duration::from_secs(180);
/// What should follow at once.
pub(super) const SOON: Duration = Duration::from_secs(30);
/// A check of 200 MiB takes about a second under TCG.
const VERIFY: Duration = Duration::from_secs(120);
