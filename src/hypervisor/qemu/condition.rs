//! Whether a virtual machine may be migrated at all, from what this host knows of it. Nothing here leaves the host.

use std::path::Path;

use serde_json::{Value, json};

use super::inventory::{disk_name, memory_devices, qom_text, text};
use super::progress::MigrationProgress;
use super::settings::{Capability, Multifd, query_capabilities, query_multifd};
use super::state::MigrationStatus;
use crate::hypervisor::process::{Process, ProcessError};
use crate::hypervisor::qmp::{QmpClient, QmpError};

/// The state of a machine that decides whether it may be the source of a migration now.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// Disks that the guest may write to, without those whose content travels with memory (flash).
    pub writable_disks: Vec<WritableDisk>,
    /// How it was recognised that libvirt manages this machine, if it does.
    pub libvirt_sign: Option<String>,
    /// Capabilities, as set now.
    pub capabilities: Vec<Capability>,
    /// The connections that its pages would take.
    pub multifd: Option<Multifd>,
    /// Whether it has a virtio-mem device, whose state comes in the midst of memory; only asked with multifd.
    pub has_virtio_mem: bool,
    /// The outgoing migration that is under way or was the last.
    pub migration: MigrationStatus,
    /// Why QEMU itself would refuse to migrate.
    pub blocked_reasons: Vec<String>,
}

/// A disk that the guest may write to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WritableDisk {
    /// Backend name, or path or id of the device.
    pub name: String,
    /// File name as QEMU gives it.
    pub file: String,
}

/// A reason not to migrate: a sentence that names it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Its content would stay behind.
    #[error(
        "The disk {name} ({file}) is writable and not shared between the sites. If both sites reach the same storage under the same \
         name, set disks = \"shared\" for this VM."
    )]
    WritableDisk {
        /// Backend name, or path or id of the device.
        name: String,
        /// File name.
        file: String,
    },
    /// libvirt would not notice, or would act against us.
    #[error(
        "This VM is managed by libvirt ({sign}); migrating it behind libvirt's back would leave libvirt with a wrong idea \
         of it. Only QEMU processes that libvirt does not manage can be migrated."
    )]
    Libvirt {
        /// How it was recognised.
        sign: String,
    },
    /// Somebody has switched on what cannot be used here.
    #[error("The migration capability {name} is on, and {reason}. Switch it off.")]
    Capability {
        /// QEMU's name.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// Pages that nobody can read.
    #[error(
        "The migration capability multifd is on with multifd-compression {method}, which hides the content of pages from the gateway. \
         Set multifd-compression to none: the gateway reduces better itself."
    )]
    MultifdCompression {
        /// QEMU's name of the method.
        method: String,
    },
    /// Channels beside a device that does not go with them.
    #[error(
        "The migration capability multifd is on and the VM has a virtio-mem device, whose state cannot be told from pages then. Switch \
         multifd off."
    )]
    MultifdVirtioMem,
    /// One is under way.
    #[error("Another migration of this VM is under way (status {status}).")]
    MigrationUnderWay {
        /// Its status.
        status: MigrationStatus,
    },
    /// QEMU refuses.
    #[error("QEMU itself refuses to migrate this VM: {reason}")]
    Blocked {
        /// QEMU's words.
        reason: String,
    },
}

impl Condition {
    /// Reads it. The guest is not touched.
    pub(super) async fn collect(qmp: &QmpClient, process: &Process) -> Result<Condition, super::SourceError> {
        let progress = MigrationProgress::query(qmp).await?;
        let capabilities = query_capabilities(qmp).await?;
        let multifd = query_multifd(qmp, &capabilities).await?;
        Ok(Condition {
            writable_disks: writable_disks(qmp).await?,
            libvirt_sign: libvirt_sign_of(qmp.path(), process)?,
            has_virtio_mem: multifd.is_some() && has_virtio_mem(qmp).await?,
            capabilities,
            multifd,
            migration: progress.status,
            blocked_reasons: progress.blocked_reasons,
        })
    }

    /// Everything that speaks against a migration; empty if nothing does. `shared_disks`: the operator says that both
    /// sites see the same storage.
    pub fn refusals(&self, shared_disks: bool) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        if let Some(sign) = &self.libvirt_sign {
            refusals.push(Refusal::Libvirt { sign: sign.clone() });
        }
        if self.migration.is_under_way() {
            refusals.push(Refusal::MigrationUnderWay {
                status: self.migration.clone(),
            });
        }
        let reasons = self.blocked_reasons.iter().cloned();
        refusals.extend(reasons.map(|reason| Refusal::Blocked { reason }));
        let capabilities = self.capabilities.iter().filter(|capability| capability.is_on);
        refusals.extend(capabilities.filter_map(|capability| {
            let reason = capability_obstacle(&capability.name)?;
            Some(Refusal::Capability {
                name: capability.name.clone(),
                reason,
            })
        }));
        if let Some(multifd) = self.multifd.as_ref().filter(|multifd| !multifd.is_plain()) {
            refusals.push(Refusal::MultifdCompression {
                method: multifd.compression.clone(),
            });
        }
        if self.multifd.is_some() && self.has_virtio_mem {
            refusals.push(Refusal::MultifdVirtioMem);
        }
        if !shared_disks {
            let disks = self.writable_disks.iter().cloned();
            refusals.extend(disks.map(|WritableDisk { name, file }| Refusal::WritableDisk { name, file }));
        }
        refusals
    }
}

/// Why a capability that somebody switched on cannot be used. The others are harmless: they are switched off for the
/// migration and on again afterwards.
fn capability_obstacle(name: &str) -> Option<&'static str> {
    Some(match name {
        "return-path" => {
            "with it QEMU restarts the guest by itself when the gateway is lost, so the VM could run twice"
        }
        "postcopy-ram" | "postcopy-blocktime" | "postcopy-preempt" | "release-ram" => {
            "post-copy lets the guest run before it is complete at the destination, so it could not come back"
        }
        "switchover-ack" => "it needs the return path, with which the VM could run twice",
        "xbzrle" | "compress" => "it hides the content of pages from the gateway, which reduces better itself",
        "x-colo" | "colo" => "it keeps the VM running in two places on purpose",
        "mapped-ram" => "it writes to files only",
        "background-snapshot" => "it writes a snapshot instead of migrating",
        "zero-copy-send" => "it pins guest memory, and the pages only go to a socket on this host",
        "x-ignore-shared" => "it leaves shared memory behind",
        "block" => "it migrates disks inside the memory stream",
        "dirty-bitmaps" => "dirty bitmaps are not carried over yet",
        _ => return None,
    })
}

async fn has_virtio_mem(qmp: &QmpClient) -> Result<bool, QmpError> {
    let devices = memory_devices(&qmp.execute("query-memory-devices", json!({})).await?);
    Ok(devices.iter().any(|device| device.kind == "virtio-mem"))
}

async fn writable_disks(qmp: &QmpClient) -> Result<Vec<WritableDisk>, QmpError> {
    let disk = |entry: &Value| WritableDisk {
        name: disk_name(entry),
        file: text(&entry["inserted"]["file"]),
    };
    Ok(writable_entries(qmp).await?.iter().map(disk).collect())
}

/// Entries of `query-block` whose medium the guest may write to, firmware flash apart.
pub(super) async fn writable_entries(qmp: &QmpClient) -> Result<Vec<Value>, QmpError> {
    let list: Vec<Value> = qmp.query("query-block", json!({})).await?;
    let mut entries = Vec::new();
    for entry in list {
        if entry["inserted"]["ro"] == false && !is_flash(qmp, &text(&entry["qdev"])).await? {
            entries.push(entry);
        }
    }
    Ok(entries)
}

/// Firmware flash is a RAM block and migrates with memory; the destination writes it to its own file after loading.
async fn is_flash(qmp: &QmpClient, device: &str) -> Result<bool, QmpError> {
    let path = if device.starts_with('/') {
        device.to_owned()
    } else {
        format!("/machine/peripheral/{device}")
    };
    let type_name = qom_text(qmp, &path, "type").await?.unwrap_or_default();
    Ok(type_name.starts_with("cfi.pflash"))
}

fn libvirt_sign_of(qmp_path: &Path, process: &Process) -> Result<Option<String>, ProcessError> {
    Ok(libvirt_sign(
        &qmp_path.to_string_lossy(),
        &process.arguments()?,
        &process.control_groups()?,
    ))
}

/// Signs that libvirt started a QEMU. `-name guest=` alone is none: people write that too, and so is a disk under
/// `/var/lib/libvirt/images`.
fn libvirt_sign(qmp_path: &str, arguments: &[String], control_groups: &str) -> Option<String> {
    let has = |wanted: &str| arguments.iter().any(|argument| argument == wanted);
    if qmp_path.contains(LIBVIRT_FOLDER) {
        return Some(format!("its monitor is under libvirt's folder {qmp_path}"));
    }
    let group = control_groups.lines().find(|line| {
        line.contains(".libvirt-qemu") || (line.contains("machine.slice") && line.contains("machine-qemu"))
    });
    if let Some(group) = group {
        let group: String = group.chars().take(200).collect();
        return Some(format!("it runs in the control group {group}"));
    }
    let private = arguments.iter().any(|argument| argument.contains(LIBVIRT_FOLDER));
    (private && has("-no-user-config") && has("-nodefaults"))
        .then(|| "its command line is one that libvirt writes".to_owned())
}

/// Where libvirt keeps what belongs to a running domain: under /var/lib, /run, or a user's configuration.
const LIBVIRT_FOLDER: &str = "/libvirt/qemu/";

#[cfg(test)]
mod tests {
    use super::*;

    fn condition() -> Condition {
        Condition {
            writable_disks: Vec::new(),
            libvirt_sign: None,
            capabilities: Vec::new(),
            multifd: None,
            has_virtio_mem: false,
            migration: MigrationStatus::None,
            blocked_reasons: Vec::new(),
        }
    }

    fn arguments(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn a_writable_disk_is_refused_by_name_unless_it_is_shared() {
        let disk = WritableDisk {
            name: "d0".into(),
            file: "/srv/d0.img".into(),
        };
        let condition = Condition {
            writable_disks: vec![disk],
            ..condition()
        };
        let refusals = condition.refusals(false);
        assert_eq!(refusals.len(), 1);
        assert!(
            refusals[0]
                .to_string()
                .starts_with("The disk d0 (/srv/d0.img) is writable")
        );
        assert_eq!(condition.refusals(true), []);
    }

    #[test]
    fn capabilities_that_break_the_rules_are_refused_and_harmless_ones_are_not() {
        let names = [
            "return-path",
            "postcopy-ram",
            "xbzrle",
            "compress",
            "x-colo",
            "mapped-ram",
            "background-snapshot",
            "zero-copy-send",
            "switchover-ack",
            "x-ignore-shared",
            "release-ram",
        ];
        for name in names {
            let on = |is_on| Condition {
                capabilities: vec![Capability {
                    name: name.into(),
                    is_on,
                }],
                ..condition()
            };
            assert!(on(true).refusals(true)[0].to_string().contains(name));
            assert_eq!(on(false).refusals(true), []);
        }
        for name in [
            "events",
            "auto-converge",
            "multifd",
            "validate-uuid",
            "pause-before-switchover",
            "late-block-activate",
        ] {
            let on = Condition {
                capabilities: vec![Capability {
                    name: name.into(),
                    is_on: true,
                }],
                ..condition()
            };
            assert_eq!(on.refusals(true), []);
        }
    }

    #[test]
    fn multifd_is_refused_where_it_compresses_or_beside_virtio_mem_and_only_there() {
        let with = |compression: &str| Condition {
            multifd: Some(Multifd {
                channels: 4,
                compression: compression.to_owned(),
            }),
            ..condition()
        };
        assert_eq!(with("none").refusals(true), []);
        let refusals = with("zstd").refusals(true);
        assert_eq!(
            refusals,
            [Refusal::MultifdCompression {
                method: "zstd".to_owned()
            }]
        );
        let beside = Condition {
            has_virtio_mem: true,
            ..with("none")
        };
        assert_eq!(beside.refusals(true), [Refusal::MultifdVirtioMem]);
    }

    #[test]
    fn a_migration_under_way_and_qemus_own_blockers_are_refused() {
        for status in [
            "setup",
            "active",
            "device",
            "pre-switchover",
            "cancelling",
            "postcopy-active",
        ] {
            let migration = MigrationStatus::from_name(Some(status));
            assert_eq!(
                Condition {
                    migration,
                    ..condition()
                }
                .refusals(true)
                .len(),
                1,
                "{status}"
            );
        }
        let earlier = Condition {
            migration: MigrationStatus::Cancelled,
            ..condition()
        };
        assert_eq!(earlier.refusals(true), []);
        let blocked = Condition {
            blocked_reasons: vec!["vfio".into()],
            ..condition()
        };
        assert!(blocked.refusals(true)[0].to_string().ends_with("vfio"));
    }

    #[test]
    fn libvirt_is_recognised_by_each_of_its_signs() {
        let plain = arguments("qemu -m 64");
        let ours = "0::/system.slice/ssh.service\n";
        assert!(libvirt_sign("/var/lib/libvirt/qemu/domain-1-x/monitor.sock", &plain, ours).is_some());
        let group = "0::/machine.slice/machine-qemu\\x2d1\\x2dx.scope/libvirt/emulator\n";
        assert!(libvirt_sign("/run/x", &plain, group).is_some());
        assert!(libvirt_sign("/run/x", &plain, "4:cpu:/machine/qemu-1-x.libvirt-qemu/emulator\n").is_some());
        let session = arguments(
            "qemu -name guest=x -object secret,file=/home/u/.config/libvirt/qemu/lib/domain-1-x/k -no-user-config -nodefaults",
        );
        assert!(libvirt_sign("/run/x", &session, ours).is_some());
    }

    #[test]
    fn what_only_looks_a_little_like_libvirt_is_not() {
        let line =
            arguments("qemu -name guest=x -no-user-config -nodefaults -drive file=/var/lib/libvirt/images/x.img");
        assert_eq!(
            libvirt_sign("/run/x", &line, "0::/machine.slice/machine-container.scope\n"),
            None
        );
    }
}
