//! Whether two machines are the same one, in sentences.

use serde::{Deserialize, Serialize};

use super::inventory::{CpuModel, Device, FeatureWord, Register, VmInventory};

/// One difference between the source and the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// What follows from it.
    pub severity: Severity,
    /// What differs, and what to do: a sentence.
    pub sentence: String,
}

/// What follows from a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Severity {
    /// QEMU would refuse the stream, or the guest would not survive.
    Refuse,
    /// It usually works, and the operator should know.
    Warn,
}

/// Every difference that matters for a migration from `source` to `destination`. Both should have passed
/// [`VmInventory::check_limits`]; what they hold is quoted and cut, so it cannot forge lines of output.
pub fn compare(source: &VmInventory, destination: &VmInventory) -> Vec<Mismatch> {
    let mut found = Findings::default();
    machine(&mut found, source, destination);
    memory(&mut found, source, destination);
    cpu(&mut found, &source.cpu, &destination.cpu);
    devices(&mut found, source, destination);
    disks(&mut found, source, destination);
    found.0
}

#[derive(Default)]
struct Findings(Vec<Mismatch>);

impl Findings {
    fn refuse(&mut self, sentence: String) {
        self.add(Severity::Refuse, sentence);
    }

    fn add(&mut self, severity: Severity, sentence: String) {
        self.0.push(Mismatch { severity, sentence });
    }
}

fn machine(found: &mut Findings, source: &VmInventory, destination: &VmInventory) {
    if source.machine != destination.machine {
        found.refuse(format!(
            "The machine types differ: {} at the source, {} at the destination. Start the destination with -M {}.",
            shown(&source.machine),
            shown(&destination.machine),
            shown(&source.machine)
        ));
    }
    if source.accelerator != destination.accelerator {
        found.refuse(format!(
            "The source runs under {} and the destination under {}.",
            shown(&source.accelerator),
            shown(&destination.accelerator)
        ));
    }
    if (destination.version.major, destination.version.minor) < (source.version.major, source.version.minor) {
        found.add(
            Severity::Warn,
            format!(
                "The destination runs QEMU {}, which is older than the source's {}; QEMU promises migration to the same \
                 or a newer version only.",
                destination.version, source.version
            ),
        );
    }
    match (&source.uuid, &destination.uuid) {
        (Some(a), Some(b)) if a != b => {
            found.refuse(format!(
                "The UUIDs differ: {} at the source, {} at the destination.",
                shown(a),
                shown(b)
            ));
        }
        (Some(a), None) => found.add(
            Severity::Warn,
            format!(
                "The source has the UUID {} and the destination none; give it -uuid, the guest can see it.",
                shown(a)
            ),
        ),
        _ => {}
    }
    if source.vcpus != destination.vcpus {
        found.refuse(format!(
            "The source has {} vCPUs and the destination {}.",
            source.vcpus, destination.vcpus
        ));
    }
}

fn memory(found: &mut Findings, source: &VmInventory, destination: &VmInventory) {
    if source.base_memory_bytes != destination.base_memory_bytes {
        found.refuse(format!(
            "The source has {} of memory and the destination {}.",
            size(source.base_memory_bytes),
            size(destination.base_memory_bytes)
        ));
    }
    if source.memory_devices != destination.memory_devices {
        found.refuse(format!(
            "The memory devices differ: {} ({}) at the source, {} ({}) at the destination.",
            source.memory_devices.len(),
            size(source.plugged_memory_bytes),
            destination.memory_devices.len(),
            size(destination.plugged_memory_bytes)
        ));
    }
    if source.ram_blocks.is_empty() || destination.ram_blocks.is_empty() {
        found.add(
            Severity::Warn,
            "The list of RAM blocks of one side could not be read, so it was not compared.".to_owned(),
        );
        return;
    }
    let is_memory_size = source.base_memory_bytes != destination.base_memory_bytes;
    for block in &source.ram_blocks {
        let Some(other) = destination.ram_blocks.iter().find(|other| other.name == block.name) else {
            found.refuse(format!(
                "The source has a RAM block {} ({}) that the destination lacks.",
                shown(&block.name),
                size(block.used_bytes)
            ));
            continue;
        };
        // Tables that the firmware interface offers are resized on load; every other block must have the same length.
        let fits = match block.name.starts_with("/rom@") {
            true => block.used_bytes <= other.max_bytes,
            false => block.used_bytes == other.used_bytes,
        };
        // Blocks of another length follow from another memory size, which is said above.
        if !fits && !is_memory_size {
            found.refuse(format!(
                "The RAM block {} has {} at the source and {} at the destination; option ROMs of another firmware \
                 package are a usual cause.",
                shown(&block.name),
                size(block.used_bytes),
                size(other.used_bytes)
            ));
        }
    }
}

fn cpu(found: &mut Findings, source: &CpuModel, destination: &CpuModel) {
    if source.type_name != destination.type_name {
        found.refuse(format!(
            "The CPU models differ: {} at the source, {} at the destination.",
            shown(&source.type_name),
            shown(&destination.type_name)
        ));
        return;
    }
    for (name, value) in &source.facts {
        let other = destination.facts.iter().find(|(other, _)| other == name);
        if let Some((_, other)) = other.filter(|(_, other)| other != value) {
            found.refuse(format!(
                "The CPU's {} is {} at the source and {} at the destination.",
                shown(name),
                shown(value),
                shown(other)
            ));
        }
    }
    let bits_of = |words: &[FeatureWord], key: &FeatureWord| {
        let same =
            |word: &&FeatureWord| (word.leaf, word.subleaf, word.register) == (key.leaf, key.subleaf, key.register);
        words.iter().find(same).map_or(0, |word| word.bits) & !topology_bits(key)
    };
    for word in &source.features {
        let missing = bits_of(&source.features, word) & !bits_of(&destination.features, word);
        if missing != 0 {
            found.refuse(format!(
                "The guest may use CPU features that the destination lacks: CPUID leaf {:#x} subleaf {:#x} {:?}, bits {:#x}.",
                word.leaf, word.subleaf, word.register, missing
            ));
        }
    }
    for word in &destination.features {
        let added = bits_of(&destination.features, word) & !bits_of(&source.features, word);
        if added != 0 {
            found.add(
                Severity::Warn,
                format!(
                    "The destination's CPU has features that the source's lacks: CPUID leaf {:#x} subleaf {:#x} {:?}, \
                     bits {:#x}. Name the CPU model and its features on both sides.",
                    word.leaf, word.subleaf, word.register, added
                ),
            );
        }
    }
}

/// Bits that follow from the number of cores and threads. QEMU 7.2 sets them when the guest asks, 10.0 in the model, and
/// the guest sees the same.
fn topology_bits(word: &FeatureWord) -> u32 {
    match (word.leaf, word.register) {
        (1, Register::Edx) => 1 << 28,          // HTT
        (0x8000_0001, Register::Ecx) => 1 << 1, // CmpLegacy
        _ => 0,
    }
}

fn devices(found: &mut Findings, source: &VmInventory, destination: &VmInventory) {
    for (here, there, sides) in [
        (
            source,
            destination,
            "The source has a device {} that the destination lacks.",
        ),
        (
            destination,
            source,
            "The destination has a device {} that the source lacks.",
        ),
    ] {
        let mut others = there.devices.clone();
        for device in &here.devices {
            match others.iter().position(|other| other == device) {
                Some(place) => drop(others.swap_remove(place)),
                None => found.refuse(sides.replace("{}", &described(device))),
            }
        }
    }
    // Devices of users are on the list of PCI devices too, and were named above.
    if source.devices == destination.devices {
        for (here, there, sides) in [(source, destination, "source"), (destination, source, "destination")] {
            for device in here.pci.iter().filter(|device| !there.pci.contains(device)) {
                found.refuse(format!(
                    "Only the {sides} has a PCI device {:04x}:{:04x} at {:02x}:{:02x}.{}.",
                    device.vendor, device.device, device.bus, device.slot, device.function
                ));
            }
        }
    }
    if source.machine != destination.machine || source.built_in.is_empty() || destination.built_in.is_empty() {
        return;
    }
    // Inside one version the machine's own objects are the same; another version may build the same machine differently.
    let same_version =
        (source.version.major, source.version.minor) == (destination.version.major, destination.version.minor);
    let severity = if same_version { Severity::Refuse } else { Severity::Warn };
    let count_in =
        |list: &[(String, u32)], name: &str| list.iter().find(|(other, _)| other == name).map_or(0, |one| one.1);
    let is_cpu_related =
        |name: &str| name == source.cpu.type_name || name == destination.cpu.type_name || name == "apic";
    let names = source
        .built_in
        .iter()
        .chain(&destination.built_in)
        .map(|(name, _)| name.as_str());
    let names: std::collections::BTreeSet<&str> = names.filter(|name| !is_cpu_related(name)).collect();
    for name in names {
        let (here, there) = (count_in(&source.built_in, name), count_in(&destination.built_in, name));
        if here != there {
            found.add(
                severity,
                format!(
                    "The source's machine has {here} {} built in and the destination's {there}.",
                    shown(name)
                ),
            );
        }
    }
}

fn disks(found: &mut Findings, source: &VmInventory, destination: &VmInventory) {
    if source.disks.len() != destination.disks.len() {
        found.refuse(format!(
            "The source has {} disks with a medium and the destination {}.",
            source.disks.len(),
            destination.disks.len()
        ));
        return;
    }
    for disk in &source.disks {
        // A path under `unattached` is numbered by QEMU's version: such disks are matched by what they are.
        let by_name = destination.disks.iter().find(|other| other.name == disk.name);
        let Some(other) = by_name else {
            let alike = |other: &&super::inventory::Disk| {
                (other.virtual_size_bytes, other.is_writable) == (disk.virtual_size_bytes, disk.is_writable)
            };
            if !destination.disks.iter().any(|other| alike(&other)) {
                found.refuse(format!(
                    "The source's disk {} ({}) has no counterpart at the destination.",
                    shown(&disk.name),
                    size(disk.virtual_size_bytes)
                ));
            }
            continue;
        };
        if other.virtual_size_bytes != disk.virtual_size_bytes {
            found.refuse(format!(
                "The disk {} has {} at the source and {} at the destination.",
                shown(&disk.name),
                size(disk.virtual_size_bytes),
                size(other.virtual_size_bytes)
            ));
        }
        if other.is_writable != disk.is_writable {
            let side = if disk.is_writable { "source" } else { "destination" };
            found.refuse(format!(
                "The disk {} is writable at the {side} only.",
                shown(&disk.name)
            ));
        }
    }
}

fn described(device: &Device) -> String {
    let mut text = shown(&device.type_name);
    if !device.id.is_empty() {
        text += &format!(" with the id {}", shown(&device.id));
    }
    if !device.bus.is_empty() {
        text += &format!(" on the bus {}", shown(&device.bus));
    }
    if !device.address.is_empty() {
        text += &format!(" at {}", shown(&device.address));
    }
    text
}

/// A foreign text, safe to print.
fn shown(text: &str) -> String {
    text.chars()
        .take(SHOWN_CHARACTERS)
        .flat_map(char::escape_debug)
        .collect()
}

/// Bytes as an operator writes them; exact whenever the two sides differ.
fn size(bytes: u64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} bytes")
}

/// Longest piece of a foreign text in a sentence, in characters.
const SHOWN_CHARACTERS: usize = 120;

#[cfg(test)]
mod tests;
