//! The commands of a monitor, by QEMU's names: the part of QMP that a gateway uses.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::super::vmm::VmmError;
use super::control::Control;
use super::inventory::{cpus, version};
use super::settings::{Capability, MOST_ANNOUNCE_ROUNDS, SettingError, shown};

/// Why a command was not carried out: QMP's error object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    class: &'static str,
    description: String,
}

impl Refusal {
    /// The class that says nothing.
    pub(super) fn generic(description: &str) -> Self {
        Self {
            class: "GenericError",
            description: description.to_owned(),
        }
    }

    /// There is no such command, or not now.
    pub(super) fn no_command(description: &str) -> Self {
        Self {
            class: "CommandNotFound",
            description: description.to_owned(),
        }
    }

    /// As a message.
    pub(super) fn answer(&self) -> Value {
        json!({ "error": { "class": self.class, "desc": self.description } })
    }
}

impl From<VmmError> for Refusal {
    fn from(error: VmmError) -> Self {
        Self::generic(&error.0)
    }
}

impl From<SettingError> for Refusal {
    fn from(error: SettingError) -> Self {
        Self::generic(&error.to_string())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Away {
    uri: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Incoming {
    uri: String,
    /// Whatever it is: a VMM that embeds the engine is not ended by it.
    #[serde(default, rename = "exit-on-error")]
    _exit_on_error: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Continue {
    state: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Capabilities {
    capabilities: Vec<Capability>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct HumanCommand {
    command_line: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct DirtyRate {
    calc_time: u64,
}

/// Times in milliseconds.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Announce {
    initial: u64,
    max: u64,
    rounds: u64,
    step: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    path: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Property {
    path: String,
    property: String,
}

/// Carries a command out and gives back what it returns.
pub(super) fn execute(control: &Arc<Control>, name: &str, arguments: Map<String, Value>) -> Result<Value, Refusal> {
    let done = |()| json!({});
    let machine = &control.machine;
    let vcpus = || control.vcpu_threads();
    // Those with arguments first.
    match name {
        "migrate-set-parameters" => return control.set_parameters(&arguments).map(done),
        "migrate-set-capabilities" => {
            let wanted: Capabilities = parse(arguments)?;
            return control.set_capabilities(&wanted.capabilities).map(done);
        }
        "migrate" => {
            let away: Away = parse(arguments)?;
            return control.migrate(&socket_path(&away.uri)?).map(done);
        }
        "migrate-incoming" => {
            let incoming: Incoming = parse(arguments)?;
            return control.migrate_incoming(&socket_path(&incoming.uri)?).map(done);
        }
        "migrate-continue" => {
            let from: Continue = parse(arguments)?;
            return match from.state.as_str() {
                "pre-switchover" => control.continue_switchover().map(done),
                other => Err(Refusal::generic(&format!(
                    "A migration never waits in {:?} here.",
                    shown(other)
                ))),
            };
        }
        "calc-dirty-rate" => {
            let sample: DirtyRate = parse(arguments)?;
            return match sample.calc_time {
                seconds @ 1..=60 => control.begin_sample(seconds).map(done),
                _ => Err(Refusal::generic("`calc-time` must be from 1 to 60 seconds.")),
            };
        }
        "announce-self" => {
            let how: Announce = parse(arguments)?;
            let is_short = |milliseconds: &u64| *milliseconds <= LONGEST_ANNOUNCE_MS;
            if how.rounds > MOST_ANNOUNCE_ROUNDS || ![how.initial, how.max, how.step].iter().all(is_short) {
                let bounds = "An announcement has at most 1000 rounds, and at most 100000 ms between them.";
                return Err(Refusal::generic(bounds));
            }
            let [initial, most, step] = [how.initial, how.max, how.step].map(Duration::from_millis);
            control.announce(how.rounds, initial, step, most);
            return Ok(json!({}));
        }
        "human-monitor-command" => {
            let line: HumanCommand = parse(arguments)?;
            return Ok(match line.command_line.trim() {
                "info ramblock" => json!(machine.ram_blocks()),
                other => json!(format!("unknown command: '{}'\r\n", shown(other))),
            });
        }
        "qom-list" => {
            let List { path } = parse(arguments)?;
            let list = machine.list(&path, vcpus().len());
            return list.ok_or_else(|| Refusal {
                class: "DeviceNotFound",
                description: format!("There is no object {:?}.", shown(&path)),
            });
        }
        "qom-get" => {
            let Property { path, property } = parse(arguments)?;
            let value = machine.property(&path, &property, vcpus().len());
            return value.map_err(|reason| Refusal::generic(&reason));
        }
        _ => {}
    }
    let query: fn(&Arc<Control>) -> Result<Value, Refusal> = match name {
        "stop" => |control| control.stop().map(|()| json!({})),
        "cont" => |control| control.cont().map(|()| json!({})),
        "migrate_cancel" => |control| control.cancel().map(|()| json!({})),
        "quit" => |control| {
            control.quit();
            Ok(json!({}))
        },
        "query-status" => |control| Ok(control.status()),
        "query-migrate" => |control| Ok(control.progress()),
        "query-migrate-capabilities" => |control| Ok(control.capabilities()),
        "query-migrate-parameters" => |control| Ok(control.parameters()),
        "query-dirty-rate" => |control| Ok(control.sample()),
        "query-version" => |_| Ok(version()),
        "query-name" => |control| {
            Ok(match control.machine.name.as_str() {
                "" => json!({}),
                name => json!({ "name": name }),
            })
        },
        "query-uuid" => |control| Ok(json!({ "UUID": control.machine.uuid() })),
        "query-kvm" => |_| Ok(json!({ "enabled": true, "present": true })),
        "query-memory-size-summary" => {
            |control| Ok(json!({ "base-memory": control.machine.memory_bytes(), "plugged-memory": 0 }))
        }
        "query-cpus-fast" => |control| Ok(cpus(&control.vcpu_threads())),
        // There is nothing of these.
        "query-memory-devices"
        | "query-pci"
        | "query-block"
        | "query-blockstats"
        | "query-block-exports"
        | "query-jobs" => |_| Ok(json!([])),
        _ => {
            let description = format!("There is no command {:?} here.", shown(name));
            return Err(Refusal::no_command(&description));
        }
    };
    let Nothing {} = parse(arguments)?;
    query(control)
}

fn parse<T: DeserializeOwned>(arguments: Map<String, Value>) -> Result<T, Refusal> {
    let parsed = serde_json::from_value(Value::Object(arguments));
    parsed.map_err(|error| Refusal::generic(&format!("The arguments are not what the command takes: {error}.")))
}

/// The path in `unix:PATH`.
fn socket_path(uri: &str) -> Result<PathBuf, Refusal> {
    let path = uri.strip_prefix("unix:").map(Path::new);
    let path = path.filter(|path| path.is_absolute() && path.as_os_str().len() <= LONGEST_PATH);
    path.filter(|path| !path.as_os_str().as_encoded_bytes().contains(&0))
        .map(Path::to_owned)
        .ok_or_else(|| {
            let bounds = format!("`uri` must be unix:PATH with an absolute path of at most {LONGEST_PATH} bytes");
            Refusal::generic(&format!("{bounds}, not {:?}.", shown(uri)))
        })
}

/// Bytes in the path of a unix socket (`sun_path` without its final zero, unix(7)).
const LONGEST_PATH: usize = 107;
/// QEMU's own bound.
const LONGEST_ANNOUNCE_MS: u64 = 100_000;
