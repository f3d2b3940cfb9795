//! Capabilities and parameters of migration, by QEMU's names.

use serde::Deserialize;
use serde_json::{Map, Value, json};

/// What was set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    capabilities: [bool; CAPABILITIES.len()],
    /// Milliseconds that the transfer of the rest may take.
    pub(super) downtime_limit_ms: u64,
    /// Stream bytes per second with which the rest will be taken; 0: nobody knows.
    pub(super) switchover_bandwidth: u64,
    /// How often a guest that has arrived announces itself when it runs.
    pub(super) announce_rounds: u64,
}

/// One capability as somebody wants it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Capability {
    capability: String,
    state: bool,
}

/// Why a setting was not changed. Then none was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SettingError {
    #[error("There is no migration capability {0:?} here.")]
    NoCapability(String),
    #[error("The migration capability return-path cannot be switched on: this engine has no return path.")]
    ReturnPath,
    #[error("There is no migration parameter {0:?} here.")]
    NoParameter(String),
    #[error("The migration parameter {name} must be a whole number from 0 to {most}.")]
    OutOfRange { name: &'static str, most: u64 },
    #[error(
        "The migration parameter max-bandwidth must be 0: this engine has no limit, it sends what the socket takes."
    )]
    MaxBandwidth,
}

/// Capabilities, in the order in which they are listed.
const CAPABILITIES: [&str; 4] = [
    "events",
    "pause-before-switchover",
    "late-block-activate",
    "return-path",
];
const EVENTS: usize = 0;
const PAUSE_BEFORE_SWITCHOVER: usize = 1;
const RETURN_PATH: usize = 3;

/// QEMU's own bound.
const LONGEST_DOWNTIME_MS: u64 = 2_000_000;
/// QEMU's own bound.
pub(super) const MOST_ANNOUNCE_ROUNDS: u64 = 1000;

impl Default for Settings {
    fn default() -> Self {
        Self {
            capabilities: [false; CAPABILITIES.len()],
            downtime_limit_ms: 300,
            switchover_bandwidth: 0,
            announce_rounds: 5,
        }
    }
}

impl Settings {
    /// Whether the event `MIGRATION` is wanted.
    pub(super) fn tells_migration(&self) -> bool {
        self.capabilities[EVENTS]
    }

    /// Whether somebody wants to say when the rest may be sent.
    pub(super) fn waits_before_switchover(&self) -> bool {
        self.capabilities[PAUSE_BEFORE_SWITCHOVER]
    }

    /// All capabilities.
    pub(super) fn capabilities(&self) -> Value {
        let pairs = CAPABILITIES.iter().zip(self.capabilities);
        pairs
            .map(|(name, is_on)| json!({ "capability": name, "state": is_on }))
            .collect()
    }

    /// All parameters.
    pub(super) fn parameters(&self) -> Value {
        json!({
            "downtime-limit": self.downtime_limit_ms,
            "avail-switchover-bandwidth": self.switchover_bandwidth,
            "max-bandwidth": 0,
            "announce-rounds": self.announce_rounds,
        })
    }

    /// With other capabilities.
    pub(super) fn with_capabilities(&self, wanted: &[Capability]) -> Result<Self, SettingError> {
        let mut settings = self.clone();
        for one in wanted {
            let place = CAPABILITIES.iter().position(|name| *name == one.capability);
            let place = place.ok_or_else(|| SettingError::NoCapability(shown(&one.capability)))?;
            if place == RETURN_PATH && one.state {
                return Err(SettingError::ReturnPath);
            }
            settings.capabilities[place] = one.state;
        }
        Ok(settings)
    }

    /// With other parameters.
    pub(super) fn with_parameters(&self, wanted: &Map<String, Value>) -> Result<Self, SettingError> {
        let mut settings = self.clone();
        for (name, value) in wanted {
            let number = |name, most| {
                let number = value.as_u64().filter(|number| *number <= most);
                number.ok_or(SettingError::OutOfRange { name, most })
            };
            match name.as_str() {
                "downtime-limit" => settings.downtime_limit_ms = number("downtime-limit", LONGEST_DOWNTIME_MS)?,
                "avail-switchover-bandwidth" => {
                    settings.switchover_bandwidth = number("avail-switchover-bandwidth", u64::MAX)?;
                }
                "announce-rounds" => settings.announce_rounds = number("announce-rounds", MOST_ANNOUNCE_ROUNDS)?,
                "max-bandwidth" if value.as_u64() == Some(0) => {}
                "max-bandwidth" => return Err(SettingError::MaxBandwidth),
                other => return Err(SettingError::NoParameter(shown(other))),
            }
        }
        Ok(settings)
    }
}

/// A name that somebody gave, cut to a length that fits a sentence.
pub(super) fn shown(name: &str) -> String {
    name.chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capability(name: &str, state: bool) -> Capability {
        Capability {
            capability: name.to_owned(),
            state,
        }
    }

    #[test]
    fn a_wrong_capability_changes_none() {
        let settings = Settings::default();
        let on = settings.with_capabilities(&[capability("events", true)]).unwrap();
        assert!(on.tells_migration() && !on.waits_before_switchover());
        for (name, error) in [
            ("xbzrle", SettingError::NoCapability("xbzrle".to_owned())),
            ("return-path", SettingError::ReturnPath),
        ] {
            let wanted = [capability("pause-before-switchover", true), capability(name, true)];
            assert_eq!(settings.with_capabilities(&wanted), Err(error));
        }
        assert!(settings.with_capabilities(&[capability("return-path", false)]).is_ok());
    }

    #[test]
    fn parameters_are_checked_and_come_back_as_they_are_listed() {
        let settings = Settings::default();
        let with = |name: &str, value: Value| settings.with_parameters(&Map::from_iter([(name.to_owned(), value)]));
        assert_eq!(
            with("downtime-limit", json!(20)).unwrap().parameters()["downtime-limit"],
            20
        );
        let listed = settings.parameters();
        assert_eq!(
            settings.with_parameters(listed.as_object().unwrap()),
            Ok(settings.clone())
        );
        for (name, value) in [
            ("downtime-limit", json!(2_000_001)),
            ("downtime-limit", json!(-1)),
            ("downtime-limit", json!("20")),
            ("max-bandwidth", json!(1)),
            ("announce-rounds", json!(1001)),
            ("tls-creds", json!("")),
        ] {
            let error = with(name, value).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
