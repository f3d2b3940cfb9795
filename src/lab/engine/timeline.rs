//! The course of a move, sampled while it lasts.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::api::{Client, Event, Progress};
use crate::gateway::clock;
use crate::lab::record::Moment;

/// Between two samples. Fine enough for rounds of a second, and next to no work.
pub(super) const SAMPLE: Duration = Duration::from_millis(100);

/// Samples of one move.
#[derive(Debug)]
pub(super) struct Timeline {
    begun: Instant,
    /// A process in the source's namespace, whose devices are read.
    process: Option<u32>,
    carried: Option<(Instant, u64)>,
    moments: Vec<Moment>,
}

impl Timeline {
    /// Of a move that is asked for now, whose source has the devices that `process` sees.
    pub(super) fn begin(process: Option<u32>) -> Self {
        let begun = clock::now();
        Self {
            begun,
            process,
            carried: process.and_then(sent_by).map(|bytes| (begun, bytes)),
            moments: Vec::new(),
        }
    }

    /// When the move was asked for.
    pub(super) fn begun(&self) -> Instant {
        self.begun
    }

    /// The samples.
    pub(super) fn finish(self) -> Vec<Moment> {
        self.moments
    }

    /// What `query-migrate` of the source says.
    pub(super) fn add_query(&mut self, status: &Value) {
        let ram = |key: &str| status["ram"][key].as_u64().unwrap_or(0);
        let moment = Moment {
            at_seconds: clock::now().duration_since(self.begun).as_secs_f64(),
            phase: status["status"].as_str().unwrap_or("none").to_owned(),
            round: ram("dirty-sync-count"),
            remaining_bytes: ram("remaining"),
            dirty_bytes_per_second: (ram("dirty-pages-rate") * ram("page-size")) as f64,
            wire_bytes_per_second: self.wire_rate(),
            backlog_bytes: None,
        };
        self.moments.push(moment);
    }

    fn add_progress(&mut self, progress: &Progress) {
        let moment = Moment {
            at_seconds: clock::now().duration_since(self.begun).as_secs_f64(),
            phase: progress.phase.to_string(),
            round: u64::from(progress.round),
            remaining_bytes: progress.remaining_bytes,
            dirty_bytes_per_second: progress.dirty_bytes_per_second,
            wire_bytes_per_second: self.wire_rate(),
            backlog_bytes: Some(progress.backlog_bytes),
        };
        self.moments.push(moment);
    }

    /// Takes in what a gateway says of the migration that it runs, until the caller stops waiting.
    pub(super) async fn follow(&mut self, gateway: &Client) {
        let migration = loop {
            let listed = gateway.list().await.unwrap_or_default();
            match listed.iter().find(|migration| migration.outcome.is_none()) {
                Some(found) => break found.migration,
                None => tokio::time::sleep(SAMPLE).await,
            }
        };
        if let Ok(mut following) = gateway.follow(migration).await {
            while let Ok(Some(event)) = following.next().await {
                if let Event::Progress(progress) = event {
                    self.add_progress(&progress);
                }
            }
        }
        std::future::pending().await
    }

    /// Bytes a second since the sample before.
    fn wire_rate(&mut self) -> f64 {
        let now = clock::now();
        let (Some(bytes), Some((before, carried))) = (self.process.and_then(sent_by), self.carried) else {
            return 0.0;
        };
        self.carried = Some((now, bytes));
        bytes.saturating_sub(carried) as f64 / now.duration_since(before).as_secs_f64().max(1e-3)
    }
}

/// Bytes that the namespace of `process` has sent over the link.
fn sent_by(process: u32) -> Option<u64> {
    sent(&std::fs::read_to_string(format!("/proc/{process}/net/dev")).ok()?)
}

/// The bytes sent by the link's device, in the text of `/proc/PID/net/dev` (proc(5)).
fn sent(devices: &str) -> Option<u64> {
    let device = devices
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("wan0:"))?;
    device.split_ascii_whitespace().nth(8)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ninth_figure_of_the_links_device_is_what_it_sent() {
        let devices = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  wan0: 1176020    4711    0    0    0     0          0         0   987654    3333    0    0    0     0       0          0
";
        assert_eq!(sent(devices), Some(987_654));
        assert_eq!(sent("    lo: 1 2 3"), None);
    }
}
