//! The end of a link test that takes the lanes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;

use crate::gateway::channel::{Channel, ChannelError};
use crate::gateway::{Core, clock};
use crate::proto::page::MigrationId;
use crate::proto::wire::TestMessage;

/// Tests of one peer at a time: more would only measure each other.
const AT_A_TIME: usize = 1;

/// Longest test. A source that goes on longer has been forgotten by whoever began it.
const LONGEST: Duration = Duration::from_secs(700);

const BETWEEN_COUNTS: Duration = Duration::from_millis(100);

/// What has arrived of one test.
#[derive(Debug)]
pub(in crate::gateway) struct Sink {
    began: Instant,
    lanes: AtomicU64,
    lane_bytes: AtomicU64,
}

impl Sink {
    /// A lane arrived whole.
    pub(in crate::gateway) fn take(&self, lane_bytes: u64) {
        self.lanes.fetch_add(1, Ordering::Relaxed);
        self.lane_bytes.fetch_add(lane_bytes, Ordering::Relaxed);
    }

    fn count(&self) -> TestMessage {
        let elapsed = clock::now().saturating_duration_since(self.began);
        TestMessage::Arrived {
            lanes: self.lanes.load(Ordering::Relaxed),
            lane_bytes: self.lane_bytes.load(Ordering::Relaxed),
            micros: u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX),
        }
    }
}

/// Takes the lanes of a test until its source ends the channel.
pub(in crate::gateway) async fn serve(
    core: &Core,
    peer: &str,
    test: MigrationId,
    mut channel: Channel,
) -> Result<(), ChannelError> {
    if core.tests.count_of(peer) >= AT_A_TIME {
        let reason = "a link test from there is running already; wait for its end".to_owned();
        channel.sender.send(&TestMessage::Refused(reason)).await?;
        channel.sender.finish();
        return Ok(());
    }
    let sink = Arc::new(Sink {
        began: clock::now(),
        lanes: AtomicU64::new(0),
        lane_bytes: AtomicU64::new(0),
    });
    core.tests.insert(test, peer, Arc::clone(&sink));
    tracing::info!(peer, %test, "a link test begins");
    let counted = tokio::time::timeout(LONGEST, count(&sink, &mut channel)).await;
    core.tests.remove(test);
    tracing::info!(peer, %test, lane_bytes = sink.lane_bytes.load(Ordering::Relaxed), "a link test ended");
    counted.unwrap_or(Ok(()))?;
    channel.sender.send(&sink.count()).await?;
    channel.sender.finish();
    Ok(())
}

/// Says how much has arrived until the source says that it is done.
async fn count(sink: &Sink, channel: &mut Channel) -> Result<(), ChannelError> {
    let mut ticks = tokio::time::interval(BETWEEN_COUNTS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let Channel { sender, receiver } = channel;
        tokio::select! {
            _ = ticks.tick() => sender.send(&sink.count()).await?,
            said = receiver.receive::<TestMessage>() => return said.map(|_| ()),
        }
    }
}
