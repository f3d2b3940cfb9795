//! `query-migrate` as a type.

use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::state::MigrationStatus;
use crate::hypervisor::qmp::{QmpClient, QmpError};

/// How far a migration is, as QEMU tells it. Fields that QEMU does not report in a state are 0 or `None`.
#[derive(Clone, Debug, PartialEq)]
pub struct MigrationProgress {
    /// Where it is.
    pub status: MigrationStatus,
    /// Guest memory, once QEMU reports it.
    pub ram: Option<RamProgress>,
    /// Since it began.
    pub total: Duration,
    /// Downtime QEMU expects now; while it runs.
    pub expected_downtime: Option<Duration>,
    /// Downtime as the source saw it; once completed. It ends with the last byte sent, not with the guest's resume.
    pub downtime: Option<Duration>,
    /// Why it failed.
    pub error: Option<String>,
    /// Why a migration cannot start now; QEMU's own texts.
    pub blocked_reasons: Vec<String>,
}

/// Counters of guest memory. "Bytes" and "pages" are QEMU's, before any reduction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RamProgress {
    /// Bytes sent.
    #[serde(rename = "transferred")]
    pub transferred_bytes: u64,
    /// Bytes still to send in this round, as far as known.
    #[serde(rename = "remaining")]
    pub remaining_bytes: u64,
    /// Bytes of guest memory.
    #[serde(rename = "total")]
    pub total_bytes: u64,
    /// Pages sent in full.
    #[serde(rename = "normal")]
    pub normal_pages: u64,
    /// Zero pages sent; QEMU calls them `duplicate`.
    #[serde(rename = "duplicate")]
    pub zero_pages: u64,
    /// Bytes in a page.
    #[serde(rename = "page-size")]
    pub page_size_bytes: u64,
    /// Pages dirtied per second, over the last round.
    #[serde(rename = "dirty-pages-rate")]
    pub dirty_pages_per_second: u64,
    /// What QEMU measured at the socket lately (`mbps`), in bytes per second: the bandwidth that it believes in, unless it was told one.
    #[serde(rename = "mbps", deserialize_with = "from_megabits")]
    pub bytes_per_second: u64,
    /// Rounds begun: how often the dirty log was read.
    #[serde(rename = "dirty-sync-count")]
    pub rounds: u64,
}

fn from_megabits<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Ok((f64::deserialize(deserializer)? * 125_000.0) as u64)
}

impl MigrationProgress {
    /// Asks QEMU.
    pub(super) async fn query(qmp: &QmpClient) -> Result<MigrationProgress, QmpError> {
        let answer: Answer = qmp.query("query-migrate", serde_json::json!({})).await?;
        Ok(answer.into())
    }
}

#[cfg(test)]
impl MigrationProgress {
    /// Of a migration of which only the status is known.
    pub(super) fn of_status(status: MigrationStatus) -> MigrationProgress {
        MigrationProgress {
            status,
            ..MigrationProgress::from(Answer::default())
        }
    }
}

/// The answer as QEMU's schema has it; times in milliseconds.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Answer {
    status: Option<String>,
    ram: Option<RamProgress>,
    total_time: Option<u64>,
    expected_downtime: Option<u64>,
    downtime: Option<u64>,
    error_desc: Option<String>,
    #[serde(default)]
    blocked_reasons: Vec<String>,
}

impl From<Answer> for MigrationProgress {
    fn from(answer: Answer) -> Self {
        let cut = |text: String| text.chars().take(TEXT_CHARACTERS).collect::<String>();
        MigrationProgress {
            status: MigrationStatus::from_name(answer.status.as_deref()),
            ram: answer.ram,
            total: Duration::from_millis(answer.total_time.unwrap_or(0)),
            expected_downtime: answer.expected_downtime.map(Duration::from_millis),
            downtime: answer.downtime.map(Duration::from_millis),
            error: answer.error_desc.map(cut),
            blocked_reasons: answer
                .blocked_reasons
                .into_iter()
                .take(BLOCKED_REASONS)
                .map(cut)
                .collect(),
        }
    }
}

/// Longest text of QEMU kept, in characters.
const TEXT_CHARACTERS: usize = 1000;
/// Most reasons kept.
const BLOCKED_REASONS: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(answer: serde_json::Value) -> MigrationProgress {
        serde_json::from_value::<Answer>(answer).unwrap().into()
    }

    #[test]
    fn an_active_migration_of_qemu_10_is_read() {
        let progress = parse(json!({
            "expected-downtime": 300, "status": "active", "setup-time": 2, "total-time": 1500,
            "ram": {"total": 84680704, "postcopy-requests": 0, "dirty-sync-count": 3, "multifd-bytes": 0,
                    "pages-per-second": 32710, "downtime-bytes": 0, "page-size": 4096, "remaining": 4096,
                    "postcopy-bytes": 0, "mbps": 94.3, "transferred": 1714571, "dirty-sync-missed-zero-copy": 0,
                    "precopy-bytes": 1714571, "duplicate": 20000, "dirty-pages-rate": 12, "normal-bytes": 1540096,
                    "normal": 376}}));
        assert_eq!(progress.status, MigrationStatus::Active);
        assert_eq!(progress.expected_downtime, Some(Duration::from_millis(300)));
        let ram = progress.ram.unwrap();
        assert_eq!(
            (ram.remaining_bytes, ram.total_bytes, ram.transferred_bytes),
            (4096, 84680704, 1714571)
        );
        assert_eq!(
            (ram.normal_pages, ram.zero_pages, ram.rounds, ram.dirty_pages_per_second),
            (376, 20000, 3, 12)
        );
        assert_eq!(ram.bytes_per_second, 11_787_500);
    }

    #[test]
    fn no_migration_at_all_is_a_state_of_its_own() {
        assert_eq!(parse(json!({})).status, MigrationStatus::None);
        let blocked = parse(json!({"blocked-reasons": ["a", "b"]}));
        assert_eq!(
            (blocked.status, blocked.blocked_reasons),
            (MigrationStatus::None, vec!["a".into(), "b".into()])
        );
    }

    #[test]
    fn a_failure_carries_qemus_words() {
        let failed = parse(json!({"status": "failed", "error-desc": "Unable to write to socket: Broken pipe"}));
        assert_eq!(failed.status, MigrationStatus::Failed);
        assert_eq!(failed.error.as_deref(), Some("Unable to write to socket: Broken pipe"));
    }
}
