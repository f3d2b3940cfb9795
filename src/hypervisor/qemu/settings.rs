//! Migration capabilities and parameters: which we need, how they are set, and how the old ones come back.
//!
//! Every capability that QEMU lists is set to what this project needs, which is *off* for all but a few: return-path,
//! because with it a lost gateway makes QEMU restart the guest; xbzrle and compress, because they hide pages from the
//! parser; the post-copy family, because it needs the return path. multifd stays on where it is at the source, with fewer
//! channels, which are merged to one stream; so the destination has it off. What is changed is remembered first. Capabilities and
//! parameters are looked up by name, never by version, so distributions' backports are served too.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::hypervisor::qmp::{QmpClient, QmpError};

/// Which side a QEMU is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

/// What was set before we changed it. Serialisable, so that a restarted gateway can put it back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RememberedSettings {
    /// Capabilities, by QEMU's name.
    pub capabilities: Vec<(String, bool)>,
    /// Parameters, by QEMU's name.
    pub parameters: Vec<(String, ParameterValue)>,
}

/// The value of a migration parameter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ParameterValue {
    /// A number; the unit is the parameter's.
    Number(u64),
    /// A text or one of an enumeration.
    Text(String),
}

/// One migration capability.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    /// QEMU's name.
    #[serde(rename = "capability")]
    pub name: String,
    /// Whether it is on.
    #[serde(rename = "state")]
    pub is_on: bool,
}

/// A migration over several connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Multifd {
    /// Connections beside the main one, 1 to 255.
    pub channels: u8,
    /// QEMU's name of the method that compresses their pages.
    pub compression: String,
}

/// The capability by which QEMU waits once it has stopped its guest.
pub(super) const PAUSE_BEFORE_SWITCHOVER: &str = "pause-before-switchover";

/// QEMU's name for pages that go as they are.
const NO_COMPRESSION: &str = "none";

/// All capabilities this QEMU knows.
pub(super) async fn query_capabilities(qmp: &QmpClient) -> Result<Vec<Capability>, QmpError> {
    qmp.query("query-migrate-capabilities", json!({})).await
}

/// All parameters this QEMU knows and that have a value.
pub(super) async fn query_parameters(qmp: &QmpClient) -> Result<Map<String, Value>, QmpError> {
    qmp.query("query-migrate-parameters", json!({})).await
}

/// How this QEMU, with these capabilities, spreads a migration over several connections; `None`: it does not.
pub(super) async fn query_multifd(qmp: &QmpClient, capabilities: &[Capability]) -> Result<Option<Multifd>, QmpError> {
    if !capabilities.iter().any(|one| one.name == "multifd" && one.is_on) {
        return Ok(None);
    }
    let parameters = query_parameters(qmp).await?;
    let channels = parameters.get("multifd-channels").and_then(Value::as_u64);
    let compression = parameters.get("multifd-compression").and_then(Value::as_str);
    Ok(Some(Multifd {
        channels: channels
            .and_then(|channels| u8::try_from(channels).ok())
            .ok_or_else(|| QmpError::Answer {
                command: "query-migrate-parameters".into(),
                detail: "multifd is on and there is no number of channels".into(),
            })?,
        compression: compression.unwrap_or(NO_COMPRESSION).to_owned(),
    }))
}

impl Multifd {
    /// Whether the pages of its channels can be seen.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.compression == NO_COMPRESSION
    }
}

impl RememberedSettings {
    /// Reads the settings that a migration changes.
    pub(super) async fn read(qmp: &QmpClient) -> Result<RememberedSettings, QmpError> {
        let capabilities = query_capabilities(qmp)
            .await?
            .into_iter()
            .map(|one| (one.name, one.is_on))
            .collect();
        let all = query_parameters(qmp).await?;
        let value = |name: &&str| Some(((*name).to_owned(), ParameterValue::from_json(all.get(*name)?)?));
        Ok(RememberedSettings {
            capabilities,
            parameters: CHANGED_PARAMETERS.iter().filter_map(value).collect(),
        })
    }

    /// The settings of a migration, as far as this QEMU has them.
    pub(super) fn for_migration(&self, side: Side, downtime_limit_ms: u64) -> RememberedSettings {
        let capabilities = self
            .capabilities
            .iter()
            .map(|(name, is_on)| (name.clone(), wanted_capability(name, *is_on, side)));
        let wanted = |name: &str, now: &ParameterValue| match (name, side) {
            // 0 switches QEMU's own limit off; its default is 128 MiB/s. The gateway limits by reading slowly.
            ("max-bandwidth", Side::Source) => Some(ParameterValue::Number(0)),
            ("downtime-limit", Side::Source) => Some(ParameterValue::Number(downtime_limit_ms)),
            ("avail-switchover-bandwidth", Side::Source) => Some(ParameterValue::Number(0)),
            // QEMU would announce the guest when it is loaded, while it still may be refused. We announce it once it runs.
            ("announce-rounds", Side::Destination) => Some(ParameterValue::Number(0)),
            ("tls-creds" | "tls-hostname", _) => Some(ParameterValue::Text(String::new())),
            ("mode", Side::Source) => Some(ParameterValue::Text("normal".into())),
            ("multifd-channels", Side::Source) => now.at_most(MOST_CHANNELS),
            _ => None,
        };
        let parameters = self
            .parameters
            .iter()
            .filter_map(|(name, value)| Some((name.clone(), wanted(name, value)?)));
        RememberedSettings {
            capabilities: capabilities.collect(),
            parameters: parameters.collect(),
        }
    }

    /// What of these settings a migration changes: the little that a restarted gateway has to put back.
    #[must_use]
    pub(super) fn changed_by_migration(&self, side: Side) -> RememberedSettings {
        let wanted = self.for_migration(side, 0);
        let is_kept = |pair: &&(String, ParameterValue)| {
            side == Side::Source && SET_DURING_MIGRATION.contains(&pair.0.as_str())
                || wanted
                    .parameters
                    .iter()
                    .any(|(name, value)| *name == pair.0 && *value != pair.1)
        };
        RememberedSettings {
            capabilities: self
                .capabilities
                .iter()
                // Where disks are copied it is on, whatever it was.
                .filter(|pair| {
                    !wanted.capabilities.contains(pair) || side == Side::Source && pair.0 == PAUSE_BEFORE_SWITCHOVER
                })
                .cloned()
                .collect(),
            parameters: self.parameters.iter().filter(is_kept).cloned().collect(),
        }
    }

    /// Makes QEMU have these settings; sends only what differs from `now`.
    pub(super) async fn apply(&self, qmp: &QmpClient, now: &RememberedSettings) -> Result<(), QmpError> {
        let capabilities: Vec<Value> = self
            .capabilities
            .iter()
            .filter(|pair| !now.capabilities.contains(pair))
            .map(|(name, is_on)| json!({ "capability": name, "state": is_on }))
            .collect();
        if !capabilities.is_empty() {
            qmp.execute("migrate-set-capabilities", json!({ "capabilities": capabilities }))
                .await?;
        }
        let parameters: Map<String, Value> = self
            .parameters
            .iter()
            .filter(|pair| !now.parameters.contains(pair))
            .map(|(name, value)| (name.clone(), value.to_json()))
            .collect();
        if !parameters.is_empty() {
            qmp.execute("migrate-set-parameters", Value::Object(parameters)).await?;
        }
        Ok(())
    }
}

impl ParameterValue {
    fn at_most(&self, most: u64) -> Option<ParameterValue> {
        match self {
            ParameterValue::Number(number) => Some(ParameterValue::Number(most.min(*number))),
            ParameterValue::Text(_) => None,
        }
    }

    fn from_json(value: &Value) -> Option<ParameterValue> {
        match value {
            Value::Number(number) => number.as_u64().map(ParameterValue::Number),
            Value::String(text) => Some(ParameterValue::Text(text.clone())),
            _ => None,
        }
    }

    fn to_json(&self) -> Value {
        match self {
            ParameterValue::Number(number) => json!(number),
            ParameterValue::Text(text) => json!(text),
        }
    }
}

fn wanted_capability(name: &str, is_on: bool, side: Side) -> bool {
    match name {
        "multifd" => is_on && side == Side::Source,
        "events" | "validate-uuid" => true,
        // Without it a loaded but paused 7.2 holds the disk locks already, which the source still needs.
        "late-block-activate" => side == Side::Destination,
        _ => false,
    }
}

/// Parameters that a migration changes, or that callers change while it runs.
const CHANGED_PARAMETERS: [&str; 8] = [
    "max-bandwidth",
    "downtime-limit",
    "avail-switchover-bandwidth",
    "announce-rounds",
    "tls-creds",
    "tls-hostname",
    "mode",
    "multifd-channels",
];

/// QEMU takes for sent what waits in a channel's socket (208 KiB, Linux's `net.core.wmem_default`), which the gateway can do nothing about, and which a
/// stop has ahead of it. Over a WAN more channels gain nothing.
const MOST_CHANNELS: u64 = 2;

/// Parameters that are set again and again while a migration runs, whatever they were.
const SET_DURING_MIGRATION: [&str; 2] = ["downtime-limit", "avail-switchover-bandwidth"];

#[cfg(test)]
mod tests {
    use super::*;

    fn before() -> RememberedSettings {
        let number = |name: &str, value| (name.to_owned(), ParameterValue::Number(value));
        RememberedSettings {
            capabilities: ["events", "return-path", "late-block-activate", "never-heard-of"]
                .map(|name| (name.to_owned(), name == "never-heard-of"))
                .to_vec(),
            parameters: vec![number("max-bandwidth", 134217728), number("downtime-limit", 300)],
        }
    }

    #[test]
    fn what_this_qemu_does_not_have_is_not_set() {
        let wanted = before().for_migration(Side::Source, 250);
        assert_eq!(wanted.parameters.len(), 2);
        assert_eq!(wanted.parameters[1].1, ParameterValue::Number(250));
        assert!(!wanted.capabilities.iter().any(|(name, _)| name == "validate-uuid"));
    }

    #[test]
    fn everything_unknown_is_switched_off_and_the_sides_differ_in_block_activation() {
        let on = |side| -> Vec<String> {
            let settings = before().for_migration(side, 250).capabilities;
            settings
                .into_iter()
                .filter(|(_, is_on)| *is_on)
                .map(|(name, _)| name)
                .collect()
        };
        assert_eq!(on(Side::Source), ["events"]);
        assert_eq!(on(Side::Destination), ["events", "late-block-activate"]);
    }

    #[test]
    fn multifd_stays_on_with_few_channels_at_the_source_and_is_off_at_the_destination() {
        for was_on in [false, true] {
            let before = RememberedSettings {
                capabilities: vec![("multifd".to_owned(), was_on)],
                parameters: vec![("multifd-channels".to_owned(), ParameterValue::Number(8))],
            };
            let at = |side| before.for_migration(side, 250);
            let is_on = |side| at(side).capabilities[0].1;
            assert_eq!((is_on(Side::Source), is_on(Side::Destination)), (was_on, false));
            let channels = ParameterValue::Number(MOST_CHANNELS);
            assert_eq!(at(Side::Source).parameters[0].1, channels);
            assert_eq!(at(Side::Destination).parameters, []);
            assert_eq!(before.changed_by_migration(Side::Source).parameters, before.parameters);
        }
    }

    #[test]
    fn only_what_a_migration_changes_is_put_back_by_a_restarted_gateway() {
        let mut all = before();
        all.capabilities.push(("events".to_owned(), true));
        all.parameters
            .push(("announce-rounds".to_owned(), ParameterValue::Number(5)));
        let changed = all.changed_by_migration(Side::Source);
        // `events` is off in the first pair and on in the last, which is as a migration wants it.
        let names: Vec<_> = changed
            .capabilities
            .iter()
            .map(|(name, is_on)| (name.as_str(), *is_on))
            .collect();
        assert_eq!(names, [("events", false), ("never-heard-of", true)]);
        let names: Vec<_> = changed.parameters.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["max-bandwidth", "downtime-limit"]);
    }
}
