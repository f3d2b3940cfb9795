//! Two machines, and everything in which they can differ.

use super::super::inventory::{Disk, PciDevice, RamBlock};
use super::*;
use crate::hypervisor::qmp::QemuVersion;

fn block(name: &str, used_bytes: u64, max_bytes: u64) -> RamBlock {
    RamBlock {
        name: name.into(),
        used_bytes,
        max_bytes,
    }
}

fn vm() -> VmInventory {
    VmInventory {
        version: QemuVersion {
            major: 7,
            minor: 2,
            micro: 22,
        },
        machine: "pc-i440fx-7.2".into(),
        accelerator: "kvm".into(),
        name: None,
        uuid: None,
        base_memory_bytes: 64 << 20,
        plugged_memory_bytes: 0,
        memory_devices: Vec::new(),
        ram_blocks: vec![
            block("pc.ram", 64 << 20, 64 << 20),
            block("/rom@etc/acpi/tables", 0x20000, 0x200000),
        ],
        vcpus: 2,
        cpu: CpuModel {
            type_name: "qemu64-x86_64-cpu".into(),
            facts: vec![("family".into(), "15".into())],
            features: vec![FeatureWord {
                leaf: 1,
                subleaf: 0,
                register: Register::Edx,
                bits: 0b101,
            }],
        },
        devices: vec![Device {
            id: "n0".into(),
            type_name: "virtio-net-pci".into(),
            bus: "pci.0".into(),
            address: "03.0".into(),
        }],
        built_in: vec![("isa-serial".into(), 1)],
        pci: vec![PciDevice {
            bus: 0,
            slot: 2,
            function: 0,
            vendor: 0x1234,
            device: 0x1111,
        }],
        disks: vec![Disk {
            name: "d0".into(),
            virtual_size_bytes: 1 << 20,
            is_writable: true,
        }],
    }
}

/// Changes the destination and expects exactly one finding of that severity with these words.
#[track_caller]
fn one(severity: Severity, words: &str, change: impl FnOnce(&mut VmInventory)) {
    let mut destination = vm();
    change(&mut destination);
    let found = compare(&vm(), &destination);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].severity, severity, "{found:?}");
    assert!(found[0].sentence.contains(words), "{found:?}");
}

#[test]
fn equal_machines_have_no_mismatch() {
    assert_eq!(compare(&vm(), &vm()), []);
}

#[test]
fn every_kind_of_difference_is_named_once() {
    use Severity::{Refuse, Warn};
    one(
        Refuse,
        "pc-i440fx-7.2 at the source, pc-q35-7.2 at the destination",
        |vm| vm.machine = "pc-q35-7.2".into(),
    );
    one(Refuse, "64 MiB of memory and the destination 128 MiB", |vm| {
        vm.base_memory_bytes = 128 << 20;
        vm.ram_blocks[0] = block("pc.ram", 128 << 20, 128 << 20);
    });
    one(Refuse, "RAM block pc.ram has 64 MiB", |vm| {
        vm.ram_blocks[0] = block("pc.ram", 32 << 20, 64 << 20)
    });
    one(
        Refuse,
        "RAM block /rom@etc/acpi/tables (128 KiB) that the destination lacks",
        |vm| {
            vm.ram_blocks.truncate(1);
        },
    );
    one(Refuse, "2 vCPUs and the destination 4", |vm| vm.vcpus = 4);
    one(Refuse, "under kvm and the destination under tcg", |vm| {
        vm.accelerator = "tcg".into()
    });
    one(Refuse, "CPU models differ", |vm| {
        vm.cpu.type_name = "max-x86_64-cpu".into()
    });
    one(Refuse, "The CPU's family is 15 at the source and 6", |vm| {
        vm.cpu.facts[0].1 = "6".into()
    });
    one(Refuse, "leaf 0x1 subleaf 0x0 Edx, bits 0x4", |vm| {
        vm.cpu.features[0].bits = 0b001
    });
    one(Warn, "leaf 0x1 subleaf 0x0 Edx, bits 0x2", |vm| {
        vm.cpu.features[0].bits = 0b111
    });
    one(
        Refuse,
        "source has a device virtio-net-pci with the id n0 on the bus pci.0 at 03.0",
        |vm| vm.devices.clear(),
    );
    one(Refuse, "destination has a device virtio-net-pci", |vm| {
        vm.devices.push(vm.devices[0].clone())
    });
    one(Refuse, "Only the source has a PCI device 1234:1111 at 00:02.0", |vm| {
        vm.pci.clear()
    });
    one(Refuse, "1 isa-serial built in and the destination's 0", |vm| {
        vm.built_in[0].1 = 0
    });
    one(Refuse, "1 disks with a medium and the destination 0", |vm| {
        vm.disks.clear()
    });
    one(Refuse, "disk d0 has 1 MiB at the source and 2 MiB", |vm| {
        vm.disks[0].virtual_size_bytes = 2 << 20
    });
    one(Refuse, "disk d0 is writable at the source only", |vm| {
        vm.disks[0].is_writable = false
    });
    one(Warn, "older than the source's", |vm| vm.version.minor = 1);
    one(Warn, "could not be read", |vm| vm.ram_blocks.clear());
}

#[test]
fn a_table_of_the_firmware_interface_may_differ_within_its_maximum() {
    let mut destination = vm();
    destination.ram_blocks[1].used_bytes = 0x40000;
    assert_eq!(compare(&vm(), &destination), []);
    destination.ram_blocks[1] = block("/rom@etc/acpi/tables", 0x10000, 0x10000);
    assert_eq!(compare(&vm(), &destination).len(), 1);
}

#[test]
fn topology_bits_are_no_difference_and_newer_versions_may_build_the_machine_differently() {
    let mut destination = vm();
    destination.cpu.features[0].bits |= 1 << 28;
    destination.version.major = 10;
    destination.built_in.push(("new-part".into(), 1));
    let found = compare(&vm(), &destination);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].severity, Severity::Warn);
}

#[test]
fn uuids_are_compared_only_where_both_are_given() {
    let with = |uuid: Option<&str>| VmInventory {
        uuid: uuid.map(str::to_owned),
        ..vm()
    };
    assert_eq!(
        compare(&with(Some("a")), &with(Some("b")))[0].severity,
        Severity::Refuse
    );
    assert_eq!(compare(&with(Some("a")), &with(None))[0].severity, Severity::Warn);
    assert_eq!(compare(&with(None), &with(Some("b"))), []);
}

#[test]
fn a_foreign_name_cannot_forge_a_line_of_output() {
    one(Severity::Refuse, "x\\n\\u{1b}[31m", |vm| {
        vm.machine = "x\n\u{1b}[31m".into()
    });
    let mut destination = vm();
    destination.machine = "y".repeat(100_000);
    assert!(compare(&vm(), &destination)[0].sentence.len() < 500);
}

#[test]
fn an_inventory_beyond_the_limits_is_refused() {
    assert_eq!(vm().check_limits(), Ok(()));
    let mut big = vm();
    big.disks = vec![big.disks[0].clone(); 5000];
    assert!(big.check_limits().unwrap_err().to_string().contains("more disks than"));
    let mut long = vm();
    long.devices[0].bus = "x".repeat(257);
    assert!(long.check_limits().is_err());
}
