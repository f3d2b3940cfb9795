//! What the machine consists of, as QEMU's monitor tells it.

use serde_json::{Value, json};

use super::super::memory::{Block, GuestRam};
use super::settings::shown;

/// A register of CPUID as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuFeature {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry; 0 where the leaf has none.
    pub subleaf: u32,
    /// Which register is returned.
    pub register: CpuRegister,
    /// Its bits, of which each is something that the guest may use.
    pub bits: u32,
}

/// A register that CPUID returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuRegister {
    /// EAX
    Eax,
    /// EBX
    Ebx,
    /// ECX
    Ecx,
    /// EDX
    Edx,
}

impl CpuRegister {
    pub(in crate::hypervisor::kvm) fn name(self) -> &'static str {
        match self {
            CpuRegister::Eax => "EAX",
            CpuRegister::Ebx => "EBX",
            CpuRegister::Ecx => "ECX",
            CpuRegister::Edx => "EDX",
        }
    }
}

/// What does not change while the VMM lives.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    pub(super) name: String,
    pub(super) uuid: Option<String>,
    pub(super) cpu_features: Vec<CpuFeature>,
    blocks: Vec<Block>,
}

impl Machine {
    pub(super) fn new(name: String, uuid: Option<String>, cpu_features: Vec<CpuFeature>, ram: &GuestRam) -> Self {
        Self {
            name,
            uuid,
            cpu_features,
            blocks: ram.blocks().to_vec(),
        }
    }

    /// Bytes of the guest's memory.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.len).sum()
    }

    pub(super) fn uuid(&self) -> &str {
        self.uuid.as_deref().unwrap_or("00000000-0000-0000-0000-000000000000")
    }

    /// `info ramblock`: name, size of a page, offset, bytes in use, bytes at most.
    pub(super) fn ram_blocks(&self) -> String {
        let mut text = format!(
            "{:>24} {:>8}  {:>18} {:>18} {:>18}\r\n",
            "Block Name", "PSize", "Offset", "Used", "Total"
        );
        let mut offset = 0u64;
        for block in &self.blocks {
            text += &format!(
                "{:>24}    4 KiB  {offset:#018x} {:#018x} {:#018x}\r\n",
                block.name, block.len, block.len
            );
            offset = offset.saturating_add(block.len);
        }
        text
    }

    /// Properties and children of an object. `None`: there is no such object.
    pub(super) fn list(&self, path: &str, vcpus: usize) -> Option<Value> {
        let property = json!({ "name": "type", "type": "string" });
        match path {
            MACHINE => {
                let cpu = |number| json!({ "name": format!("cpu[{number}]"), "type": format!("child<{CPU_TYPE}>") });
                Some(std::iter::once(property).chain((0..vcpus).map(cpu)).collect())
            }
            // What a user has plugged in: nothing here can be.
            "/machine/peripheral" | "/machine/peripheral-anon" => Some(json!([])),
            _ if is_cpu(path, vcpus) => Some(json!([property, { "name": FEATURES, "type": "list" }])),
            _ => None,
        }
    }

    /// A property of an object.
    ///
    /// # Errors
    /// What there is not.
    pub(super) fn property(&self, path: &str, name: &str, vcpus: usize) -> Result<Value, String> {
        let is_cpu = is_cpu(path, vcpus);
        match name {
            _ if path != MACHINE && !is_cpu => Err(format!("There is no object {:?}.", shown(path))),
            "type" if is_cpu => Ok(json!(CPU_TYPE)),
            "type" => Ok(json!(MACHINE_TYPE)),
            FEATURES if is_cpu => Ok(self.features()),
            _ => Err(format!("The object {path} has no property {:?}.", shown(name))),
        }
    }

    fn features(&self) -> Value {
        let word = |feature: &CpuFeature| {
            json!({
                "cpuid-input-eax": feature.leaf,
                "cpuid-input-ecx": feature.subleaf,
                "cpuid-register": feature.register.name(),
                "features": feature.bits,
            })
        };
        self.cpu_features.iter().map(word).collect()
    }
}

/// `query-version`. The numbers are those of the QEMU whose monitor this one is like: by them a client knows what it
/// may say.
pub(super) fn version() -> Value {
    json!({
        "qemu": { "major": 10, "minor": 0, "micro": 0 },
        "package": concat!("longhaul-kvm ", env!("CARGO_PKG_VERSION")),
    })
}

/// `query-cpus-fast`, from the threads that run the vCPUs.
pub(super) fn cpus(threads: &[u32]) -> Value {
    let cpu = |(number, thread): (usize, &u32)| {
        json!({
            "cpu-index": number,
            "thread-id": thread,
            "qom-path": format!("{MACHINE}/cpu[{number}]"),
            "target": "x86_64",
        })
    };
    threads.iter().enumerate().map(cpu).collect()
}

fn is_cpu(path: &str, vcpus: usize) -> bool {
    let number = path
        .strip_prefix("/machine/cpu[")
        .and_then(|rest| rest.strip_suffix(']'));
    number.is_some_and(|number| number.parse().is_ok_and(|number: usize| number < vcpus))
}

const MACHINE: &str = "/machine";
const MACHINE_TYPE: &str = "longhaul-kvm-machine";
const CPU_TYPE: &str = "longhaul-kvm-x86_64-cpu";
const FEATURES: &str = "feature-words";
