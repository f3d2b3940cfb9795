//! What a virtual machine consists of, read over QMP: enough to tell before anything moves whether another QEMU is the
//! same machine. It travels to the peer, so every list and text in it is bounded, and it holds no file names.
//!
//! What is not used, and why: `qom-list-types` and the like load every module of the QEMU installation, and a QEMU whose
//! package was upgraded under it aborts on that (seen with 10.0.2). Only objects that exist are looked at. PCI bus numbers
//! behind bridges are given by the guest's firmware, so they differ at a destination that has not started: a device's place
//! is the name of its bus and its address there.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::hypervisor::qmp::{QemuVersion, QmpClient, QmpError};

/// One virtual machine, as far as it must be equal at both ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInventory {
    /// QEMU's version.
    pub version: QemuVersion,
    /// Machine type with its version, aliases resolved: `pc-i440fx-7.2`.
    pub machine: String,
    /// `kvm`, or `tcg` for anything that is not KVM.
    pub accelerator: String,
    /// `-name`, if given.
    pub name: Option<String>,
    /// `-uuid`, if given.
    pub uuid: Option<String>,
    /// Memory given by `-m`, bytes.
    pub base_memory_bytes: u64,
    /// Memory plugged as devices, bytes.
    pub plugged_memory_bytes: u64,
    /// DIMMs, NVDIMMs, virtio-mem and the like.
    pub memory_devices: Vec<MemoryDevice>,
    /// RAM blocks, by name. Empty if QEMU's list could not be read.
    pub ram_blocks: Vec<RamBlock>,
    /// Number of vCPUs present.
    pub vcpus: u32,
    /// Model of the first vCPU.
    pub cpu: CpuModel,
    /// Devices a user asked for (`-device`, hotplug).
    pub devices: Vec<Device>,
    /// Objects that the machine brings itself: type and how many of it, by type. Empty if they are too many to be walked.
    pub built_in: Vec<(String, u32)>,
    /// Devices on PCI root buses.
    pub pci: Vec<PciDevice>,
    /// Block devices with a medium.
    pub disks: Vec<Disk>,
}

/// A memory device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MemoryDevice {
    /// Its id, empty if none was given.
    pub id: String,
    /// `dimm`, `nvdimm`, `virtio-mem`, …
    pub kind: String,
    /// Bytes.
    pub size_bytes: u64,
}

/// A block of guest memory as the migration stream names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RamBlock {
    /// For example `pc.ram`, `0000:00:02.0/vga.vram`.
    pub name: String,
    /// Bytes in use; what is sent.
    pub used_bytes: u64,
    /// Bytes it can grow to.
    pub max_bytes: u64,
}

/// What a guest sees of its CPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuModel {
    /// QOM type, for example `qemu64-x86_64-cpu`.
    pub type_name: String,
    /// Vendor, family, model, stepping, levels and address width, where the architecture has them.
    pub facts: Vec<(String, String)>,
    /// CPUID words (x86 only).
    pub features: Vec<FeatureWord>,
}

/// One CPUID register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeatureWord {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry; 0 where the leaf has none.
    pub subleaf: u32,
    /// Which register is returned.
    pub register: Register,
    /// Its bits.
    pub bits: u32,
}

/// A CPUID output register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Register {
    /// EAX
    Eax,
    /// EBX
    Ebx,
    /// ECX
    Ecx,
    /// EDX
    Edx,
}

/// A device that a user asked for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Device {
    /// Its id; empty if none was given.
    pub id: String,
    /// QOM type, for example `virtio-net-pci`.
    pub type_name: String,
    /// Name of the bus it sits on, for example `pci.0`; empty if it has none.
    pub bus: String,
    /// Its address there, for example `03.0`; empty if it has none.
    pub address: String,
}

/// A device on a PCI root bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PciDevice {
    /// Root bus number.
    pub bus: u32,
    /// Slot.
    pub slot: u32,
    /// Function.
    pub function: u32,
    /// PCI vendor id.
    pub vendor: u32,
    /// PCI device id.
    pub device: u32,
}

/// A block device with a medium.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Disk {
    /// Backend name (`-drive id=`) or, with `-blockdev`, the QOM path or id of the device.
    pub name: String,
    /// What the guest sees, bytes.
    pub virtual_size_bytes: u64,
    /// Whether the guest may write to it.
    pub is_writable: bool,
}

/// An inventory from a peer that exceeds what this project builds itself.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("The machine description has more {what} than the {limit} allowed.")]
pub struct InventoryTooLarge {
    /// What there is too much of.
    pub what: &'static str,
    /// The limit.
    pub limit: usize,
}

impl VmInventory {
    /// Reads it. The guest is not touched, running or not.
    ///
    /// # Errors
    /// Those of the monitor.
    pub async fn collect(qmp: &QmpClient) -> Result<VmInventory, QmpError> {
        let machine = qom_text(qmp, "/machine", "type").await?.unwrap_or_default();
        let kvm: Value = qmp.execute("query-kvm", json!({})).await?;
        let memory = qmp.execute("query-memory-size-summary", json!({})).await?;
        let uuid = text(&qmp.execute("query-uuid", json!({})).await?["UUID"]);
        let name = text(&qmp.execute("query-name", json!({})).await?["name"]);
        let (vcpus, cpu) = collect_cpu(qmp).await?;
        let mut inventory = VmInventory {
            version: qmp.version(),
            machine: machine.strip_suffix("-machine").unwrap_or(&machine).to_owned(),
            accelerator: if kvm["enabled"] == true { "kvm" } else { "tcg" }.to_owned(),
            name: Some(name).filter(|name| !name.is_empty()),
            uuid: Some(uuid).filter(|uuid| uuid.bytes().any(|byte| byte != b'0' && byte != b'-')),
            base_memory_bytes: memory["base-memory"].as_u64().unwrap_or(0),
            plugged_memory_bytes: memory["plugged-memory"].as_u64().unwrap_or(0),
            memory_devices: memory_devices(&qmp.execute("query-memory-devices", json!({})).await?),
            ram_blocks: VmInventory::ram_blocks(qmp).await?,
            vcpus,
            cpu,
            devices: collect_devices(qmp).await?,
            built_in: collect_built_in(qmp).await?,
            pci: root_bus_devices(&qmp.execute("query-pci", json!({})).await.unwrap_or(Value::Null)),
            disks: disks(&qmp.execute("query-block", json!({})).await?),
        };
        inventory.memory_devices.sort();
        inventory.ram_blocks.sort();
        inventory.devices.sort();
        inventory.pci.sort();
        inventory.disks.sort();
        Ok(inventory)
    }

    /// The RAM blocks alone.
    pub(super) async fn ram_blocks(qmp: &QmpClient) -> Result<Vec<RamBlock>, QmpError> {
        let list = qmp
            .execute("human-monitor-command", json!({ "command-line": "info ramblock" }))
            .await?;
        Ok(parse_ram_blocks(list.as_str().unwrap_or_default()))
    }

    /// Whether it is within the bounds that [`VmInventory::collect`] keeps. To be called on what a peer sent.
    ///
    /// # Errors
    /// Names the first bound that is exceeded.
    pub fn check_limits(&self) -> Result<(), InventoryTooLarge> {
        let lists = [
            ("memory devices", self.memory_devices.len()),
            ("RAM blocks", self.ram_blocks.len()),
            ("CPU facts", self.cpu.facts.len()),
            ("CPU features", self.cpu.features.len()),
            ("devices", self.devices.len()),
            ("built-in devices", self.built_in.len()),
            ("PCI devices", self.pci.len()),
            ("disks", self.disks.len()),
        ];
        if let Some(&(what, _)) = lists.iter().find(|(_, length)| *length > LIST_LIMIT) {
            return Err(InventoryTooLarge {
                what,
                limit: LIST_LIMIT,
            });
        }
        let own = [
            Some(&self.machine),
            Some(&self.accelerator),
            self.name.as_ref(),
            self.uuid.as_ref(),
        ];
        let texts = own
            .into_iter()
            .flatten()
            .chain([&self.cpu.type_name])
            .chain(self.memory_devices.iter().flat_map(|one| [&one.id, &one.kind]))
            .chain(self.ram_blocks.iter().map(|one| &one.name))
            .chain(self.cpu.facts.iter().flat_map(|(name, value)| [name, value]))
            .chain(
                self.devices
                    .iter()
                    .flat_map(|one| [&one.id, &one.type_name, &one.bus, &one.address]),
            )
            .chain(self.built_in.iter().map(|(name, _)| name))
            .chain(self.disks.iter().map(|one| &one.name));
        for text in texts {
            if text.len() > TEXT_LIMIT {
                return Err(InventoryTooLarge {
                    what: "bytes in a name",
                    limit: TEXT_LIMIT,
                });
            }
        }
        Ok(())
    }
}

async fn collect_cpu(qmp: &QmpClient) -> Result<(u32, CpuModel), QmpError> {
    let cpus = qmp.execute("query-cpus-fast", json!({})).await?;
    let count = cpus.as_array().map_or(0, Vec::len);
    let path = text(&cpus[0]["qom-path"]);
    let mut model = CpuModel {
        type_name: qom_text(qmp, &path, "type").await?.unwrap_or_default(),
        ..CpuModel::default()
    };
    for fact in ["vendor", "family", "model", "stepping", "level", "xlevel", "phys-bits"] {
        if let Some(value) = qom_text(qmp, &path, fact).await? {
            model.facts.push((fact.to_owned(), value));
        }
    }
    if let Some(Value::Array(words)) = qom_value(qmp, &path, "feature-words").await? {
        model.features = words.iter().filter_map(feature_word).take(LIST_LIMIT).collect();
    }
    Ok((u32::try_from(count).unwrap_or(u32::MAX), model))
}

fn feature_word(word: &Value) -> Option<FeatureWord> {
    let number = |name: &str| u32::try_from(word.get(name)?.as_u64()?).ok();
    let register = Register::deserialize(word.get("cpuid-register")?).ok()?;
    Some(FeatureWord {
        leaf: number("cpuid-input-eax")?,
        subleaf: number("cpuid-input-ecx").unwrap_or(0),
        register,
        bits: number("features")?,
    })
}

async fn collect_devices(qmp: &QmpClient) -> Result<Vec<Device>, QmpError> {
    let mut devices = Vec::new();
    for (folder, has_ids) in [("/machine/peripheral", true), ("/machine/peripheral-anon", false)] {
        for (name, type_name) in children(qmp, folder).await? {
            if devices.len() == LIST_LIMIT {
                return Ok(devices);
            }
            let path = format!("{folder}/{name}");
            let bus = qom_text(qmp, &path, "parent_bus").await?.unwrap_or_default();
            let bus = bus.rsplit('/').next().unwrap_or_default().to_owned();
            let address = qom_text(qmp, &path, "legacy-addr").await?.unwrap_or_default();
            devices.push(Device {
                id: if has_ids { name } else { String::new() },
                type_name,
                bus,
                address,
            });
        }
    }
    Ok(devices)
}

/// Walks what the machine itself consists of and counts it by type, without wiring (interrupt lines, memory regions),
/// whose number is an internal matter of a QEMU version.
async fn collect_built_in(qmp: &QmpClient) -> Result<Vec<(String, u32)>, QmpError> {
    let mut counts = std::collections::BTreeMap::new();
    let mut folders = vec![("/machine".to_owned(), 0)];
    let mut visited = 0;
    while let Some((folder, depth)) = folders.pop() {
        visited += 1;
        if visited > LIST_LIMIT {
            tracing::warn!("the machine has too many objects; the built-in ones are not compared");
            return Ok(Vec::new());
        }
        for (name, type_name) in children(qmp, &folder).await? {
            let is_wiring = matches!(type_name.as_str(), "irq" | "container") || type_name.contains("memory-region");
            let path = format!("{folder}/{name}");
            let is_users = path.starts_with("/machine/peripheral");
            if !is_wiring && !is_users && counts.len() < LIST_LIMIT {
                *counts.entry(type_name.clone()).or_insert(0) += 1;
            }
            let is_leaf = type_name == "irq" || type_name.contains("memory-region") || type_name.ends_with("-cpu");
            if !is_leaf && !is_users && depth < TREE_DEPTH {
                folders.push((path, depth + 1));
            }
        }
    }
    Ok(counts.into_iter().collect())
}

/// Children of an object: name and type.
async fn children(qmp: &QmpClient, path: &str) -> Result<Vec<(String, String)>, QmpError> {
    let list = match qmp.execute("qom-list", json!({ "path": path })).await {
        Ok(list) => list,
        // An object may be unplugged between being listed and being looked into.
        Err(error) if error.is_refusal() => Value::Null,
        Err(error) => return Err(error),
    };
    let child = |entry: &Value| {
        let type_name = entry["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
        Some((text(&entry["name"]), type_name.chars().take(TEXT_LIMIT).collect()))
    };
    Ok(list
        .as_array()
        .map(|list| list.iter().filter_map(child).collect())
        .unwrap_or_default())
}

/// A property, or `None` where the object or the property does not exist.
pub(super) async fn qom_value(qmp: &QmpClient, path: &str, property: &str) -> Result<Option<Value>, QmpError> {
    match qmp
        .execute("qom-get", json!({ "path": path, "property": property }))
        .await
    {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_refusal() => Ok(None),
        Err(error) => Err(error),
    }
}

/// A property as text.
pub(super) async fn qom_text(qmp: &QmpClient, path: &str, property: &str) -> Result<Option<String>, QmpError> {
    Ok(qom_value(qmp, path, property).await?.and_then(|value| match value {
        Value::String(_) => Some(text(&value)),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }))
}

/// `info ramblock`, the only place where QEMU lists them. A line is: name, page size and its unit, then offset, used and
/// total length in hexadecimal; newer versions append more columns.
fn parse_ram_blocks(list: &str) -> Vec<RamBlock> {
    let block = |line: &str| {
        let name = line.split_ascii_whitespace().next()?;
        let mut numbers = line
            .split_ascii_whitespace()
            .filter_map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
        let (_offset, used_bytes, max_bytes) = (numbers.next()?, numbers.next()?, numbers.next()?);
        Some(RamBlock {
            name: name.chars().take(TEXT_LIMIT).collect(),
            used_bytes,
            max_bytes,
        })
    };
    list.lines().filter_map(block).take(LIST_LIMIT).collect()
}

pub(super) fn memory_devices(list: &Value) -> Vec<MemoryDevice> {
    let device = |entry: &Value| MemoryDevice {
        id: text(&entry["data"]["id"]),
        kind: text(&entry["type"]),
        size_bytes: entry["data"]["size"].as_u64().unwrap_or(0),
    };
    list.as_array()
        .map(|list| list.iter().take(LIST_LIMIT).map(device).collect())
        .unwrap_or_default()
}

fn root_bus_devices(buses: &Value) -> Vec<PciDevice> {
    let number = |value: &Value| {
        value
            .as_u64()
            .and_then(|number| u32::try_from(number).ok())
            .unwrap_or(u32::MAX)
    };
    let device = |entry: &Value| PciDevice {
        bus: number(&entry["bus"]),
        slot: number(&entry["slot"]),
        function: number(&entry["function"]),
        vendor: number(&entry["id"]["vendor"]),
        device: number(&entry["id"]["device"]),
    };
    let buses = buses.as_array().map(Vec::as_slice).unwrap_or_default();
    let devices = buses.iter().filter_map(|bus| bus["devices"].as_array()).flatten();
    devices.take(LIST_LIMIT).map(device).collect()
}

fn disks(list: &Value) -> Vec<Disk> {
    let disk = |entry: &Value| {
        let inserted = entry.get("inserted")?;
        Some(Disk {
            name: disk_name(entry),
            virtual_size_bytes: inserted["image"]["virtual-size"].as_u64().unwrap_or(0),
            is_writable: inserted["ro"] == false,
        })
    };
    list.as_array()
        .map(|list| list.iter().filter_map(disk).take(LIST_LIMIT).collect())
        .unwrap_or_default()
}

/// How a user knows an entry of `query-block`.
pub(super) fn disk_name(entry: &Value) -> String {
    match text(&entry["device"]) {
        name if name.is_empty() => text(&entry["qdev"]),
        name => name,
    }
}

/// A JSON string cut to the limit; empty for anything else.
pub(super) fn text(value: &Value) -> String {
    let text = value.as_str().unwrap_or_default();
    let mut end = text.len().min(TEXT_LIMIT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

/// Most entries of a list.
const LIST_LIMIT: usize = 4096;
/// Longest name, in bytes.
const TEXT_LIMIT: usize = 256;
/// How deep the object tree is walked; QEMU's own is 5 deep.
const TREE_DEPTH: u32 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_blocks_are_read_from_both_layouts_of_the_list() {
        let old = "              Block Name    PSize              Offset               Used              Total\r\n\
                                 pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\r\n\
                   /rom@etc/acpi/tables    4 KiB  0x00000000050c0000 0x0000000000020000 0x0000000000200000\r\n";
        let new = "              Block Name    PSize              Offset               Used              Total                HVA  RO\r\n\
                                 pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007fb41fe00000  rw\r\n\
                   /rom@etc/acpi/tables    4 KiB  0x00000000050c0000 0x0000000000020000 0x0000000000200000 0x00007fb41e800000  ro\r\n";
        let blocks = parse_ram_blocks(old);
        assert_eq!(blocks, parse_ram_blocks(new));
        assert_eq!(blocks[1].name, "/rom@etc/acpi/tables");
        assert_eq!((blocks[1].used_bytes, blocks[1].max_bytes), (0x20000, 0x200000));
        assert!(parse_ram_blocks("unknown command: 'info ramblock'").is_empty());
    }

    #[test]
    fn texts_are_cut_at_a_character_and_other_kinds_are_empty() {
        assert_eq!(text(&json!("ä".repeat(200))).len(), 256);
        assert_eq!(text(&json!(format!("x{}", "ä".repeat(200)))).len(), 255);
        assert_eq!(text(&json!(7)), "");
    }

    #[test]
    fn a_medium_that_is_not_there_is_no_disk() {
        let list = json!([
            {"device": "d0", "inserted": {"ro": false, "image": {"virtual-size": 1024}}},
            {"device": "", "qdev": "/machine/x", "inserted": {"ro": true, "image": {"virtual-size": 2048}}},
            {"device": "cd0", "removable": true}]);
        let disks = disks(&list);
        assert_eq!(disks.len(), 2);
        assert!(disks[0].is_writable && !disks[1].is_writable);
        assert_eq!(disks[1].name, "/machine/x");
    }
}
