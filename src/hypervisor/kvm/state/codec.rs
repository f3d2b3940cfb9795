//! The saved state as bytes: a head, and sections that say what they are.
//!
//! ```text
//! head:     "LHKVM-1\n", number of sections (u32)
//! section:  name (8 bytes, padded with zeros), version (u16), length of the body (u32), body
//! ```
//!
//! `machine` comes first; `vcpu` begins a vCPU, and what follows is of that one. Numbers are little-endian, and every
//! structure is written by fields, so no layout of a compiler is in it. A section that is not known would be lost on
//! the guest: it is refused.

use std::time::Duration;

use kvm_bindings::{kvm_clock_data, kvm_cpuid_entry2, kvm_pit_state2, kvm_xcrs};

use super::fields::{self, Fields, Reader, Writer};
use super::machine::{Chip, VmState};
use super::vcpu::{LAPIC_BYTES, NestedState, VcpuState};
use super::{MachineState, StateError};

const MAGIC: [u8; 8] = *b"LHKVM-1\n";
const NAME_BYTES: usize = 8;
const VERSION: u16 = 1;

/// Most vCPUs of a machine.
pub(super) const VCPUS: usize = 1024;
const MSRS: usize = 4096;
const CPUID_ENTRIES: usize = 256;
const MSR_BYTES: usize = 12;
const CPUID_BYTES: usize = 28;
/// Bytes that KVM's extended state has at least.
pub(super) const XSAVE_MIN: usize = 4096;
const XSAVE_MAX: usize = 64 << 10;

/// Sections of a vCPU. The first [`NEEDED`] are always there.
const VCPU_SECTIONS: [&str; 11] = [
    "cpuid", "regs", "sregs", "fpu", "xsave", "debug", "events", "msrs", "xcrs", "lapic", "nested",
];
const NEEDED: usize = 8;

pub(super) fn encode(state: &MachineState) -> Vec<u8> {
    let mut sections = Sections::default();
    sections.add("machine", |f| {
        f.u32(&mut (state.vcpus.len() as u32));
        f.u64(&mut state.saved_at.as_secs());
        f.u32(&mut state.saved_at.subsec_nanos());
        f.bytes(&mut { state.vendor });
    });
    for chip in &state.vm.chips {
        sections.add("irqchip", |f| {
            f.u32(&mut { chip.id });
            f.0.extend_from_slice(&*chip.bytes);
        });
    }
    if let Some(mut pit) = state.vm.pit {
        sections.add("pit", |f| fields::pit(f, &mut pit));
    }
    if let Some(mut clock) = state.vm.clock {
        sections.add("clock", |f| fields::clock(f, &mut clock));
    }
    for (number, vcpu) in state.vcpus.iter().enumerate() {
        self::vcpu(&mut sections, number as u32, vcpu.clone());
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&sections.count.to_le_bytes());
    bytes.append(&mut sections.bytes);
    bytes
}

fn vcpu(sections: &mut Sections, mut number: u32, mut vcpu: VcpuState) {
    sections.add("vcpu", |f| {
        f.u32(&mut number);
        head(f, &mut vcpu);
    });
    sections.add("cpuid", |f| {
        vcpu.cpuid.iter_mut().for_each(|entry| fields::cpuid(f, entry))
    });
    sections.add("regs", |f| fields::regs(f, &mut vcpu.regs));
    sections.add("sregs", |f| fields::sregs(f, &mut vcpu.sregs));
    sections.add("fpu", |f| fields::fpu(f, &mut vcpu.fpu));
    sections.add("xsave", |f| f.bytes(&mut vcpu.xsave));
    sections.add("debug", |f| fields::debugregs(f, &mut vcpu.debugregs));
    sections.add("events", |f| fields::events(f, &mut vcpu.events));
    sections.add("msrs", |f| {
        for (index, value) in &mut vcpu.msrs {
            f.u32(index);
            f.u64(value);
        }
    });
    if let Some(xcrs) = &mut vcpu.xcrs {
        sections.add("xcrs", |f| fields::xcrs(f, xcrs));
    }
    if let Some(lapic) = &mut vcpu.lapic {
        sections.add("lapic", |f| f.bytes(&mut **lapic));
    }
    if let Some(NestedState(bytes)) = &mut vcpu.nested {
        sections.add("nested", |f| f.bytes(bytes));
    }
}

fn head(f: &mut impl Fields, vcpu: &mut VcpuState) {
    f.u32(&mut vcpu.tsc_khz);
    f.u32(&mut vcpu.mp_state.mp_state);
    let mut is_known = u8::from(vcpu.tsc_offset.is_some());
    let mut offset = vcpu.tsc_offset.unwrap_or(0);
    f.u8(&mut is_known);
    f.u64(&mut offset);
    vcpu.tsc_offset = (is_known != 0).then_some(offset);
}

#[derive(Default)]
struct Sections {
    count: u32,
    bytes: Vec<u8>,
}

impl Sections {
    fn add(&mut self, name: &str, write: impl FnOnce(&mut Writer)) {
        let mut body = Writer::default();
        write(&mut body);
        let mut padded = [0; NAME_BYTES];
        padded[..name.len()].copy_from_slice(name.as_bytes());
        self.bytes.extend_from_slice(&padded);
        self.bytes.extend_from_slice(&VERSION.to_le_bytes());
        self.bytes.extend_from_slice(&(body.0.len() as u32).to_le_bytes());
        self.bytes.append(&mut body.0);
        self.count += 1;
    }
}

pub(super) fn decode(bytes: &[u8]) -> Result<MachineState, StateError> {
    let rest = bytes.strip_prefix(&MAGIC).ok_or(StateError::NotAState)?;
    let (count, mut rest) = rest.split_first_chunk().ok_or(StateError::Cut)?;
    let mut decoder = Decoder::default();
    for _ in 0..u32::from_le_bytes(*count) {
        let section = Section::take(&mut rest)?;
        decoder.take(&section)?;
    }
    if !rest.is_empty() {
        return Err(StateError::Trailing { bytes: rest.len() });
    }
    decoder.finish()
}

struct Section<'a> {
    name: &'a str,
    body: &'a [u8],
}

impl<'a> Section<'a> {
    /// Takes one off the front of `rest`.
    fn take(rest: &mut &'a [u8]) -> Result<Self, StateError> {
        let (name, after) = rest.split_first_chunk::<NAME_BYTES>().ok_or(StateError::Cut)?;
        let (version, after) = after.split_first_chunk().ok_or(StateError::Cut)?;
        let (len, after) = after.split_first_chunk().ok_or(StateError::Cut)?;
        let version = u16::from_le_bytes(*version);
        let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
        let name = std::str::from_utf8(name).map_err(|_| StateError::UnknownSection {
            name: name.escape_ascii().to_string(),
        })?;
        if !VCPU_SECTIONS.contains(&name) && !["machine", "irqchip", "pit", "clock", "vcpu"].contains(&name) {
            return Err(StateError::UnknownSection {
                name: name.escape_default().to_string(),
            });
        }
        if version != VERSION {
            return Err(StateError::Version {
                section: name.to_owned(),
                version,
            });
        }
        let (body, after) = after
            .split_at_checked(u32::from_le_bytes(*len) as usize)
            .ok_or(StateError::Cut)?;
        *rest = after;
        Ok(Self { name, body })
    }

    fn malformed(&self) -> StateError {
        StateError::Malformed {
            section: self.name.to_owned(),
        }
    }

    /// All of the body, by fields.
    fn read(&self, fill: impl FnOnce(&mut Reader<'_>)) -> Result<(), StateError> {
        let mut reader = Reader::new(self.body);
        fill(&mut reader);
        match reader.is_exact() {
            true => Ok(()),
            false => Err(self.malformed()),
        }
    }

    /// How many entries of `size` bytes there are: at most `most`.
    fn entries(&self, size: usize, most: usize) -> Result<usize, StateError> {
        let count = self.body.len() / size;
        if count > most {
            return Err(StateError::TooMany {
                section: self.name.to_owned(),
                count,
                most,
            });
        }
        Ok(count)
    }

    /// The body as it is, if it has a length that this section may have.
    fn raw(&self, lengths: std::ops::RangeInclusive<usize>) -> Result<Vec<u8>, StateError> {
        match lengths.contains(&self.body.len()) {
            true => Ok(self.body.to_vec()),
            false => Err(self.malformed()),
        }
    }
}

#[derive(Default)]
struct Decoder {
    machine: Option<Machine>,
    vm: VmState,
    vcpus: Vec<VcpuState>,
    /// Sections of the last vCPU that were seen: a bit for each of [`VCPU_SECTIONS`].
    seen: u32,
}

struct Machine {
    vcpus: usize,
    saved_at: Duration,
    vendor: [u8; 12],
}

impl Decoder {
    fn take(&mut self, section: &Section<'_>) -> Result<(), StateError> {
        let Some(machine) = &self.machine else {
            self.machine = Some(machine(section)?);
            return Ok(());
        };
        match section.name {
            "irqchip" => {
                let mut chip = Chip::default();
                section.read(|f| {
                    f.u32(&mut chip.id);
                    f.bytes(&mut *chip.bytes);
                })?;
                let is_known = self.vm.chips.iter().any(|other| other.id == chip.id);
                if chip.id >= Chip::COUNT || is_known {
                    return Err(section.malformed());
                }
                self.vm.chips.push(chip);
            }
            "pit" if self.vm.pit.is_none() => {
                let mut pit = kvm_pit_state2::default();
                section.read(|f| fields::pit(f, &mut pit))?;
                self.vm.pit = Some(pit);
            }
            "clock" if self.vm.clock.is_none() => {
                let mut clock = kvm_clock_data::default();
                section.read(|f| fields::clock(f, &mut clock))?;
                self.vm.clock = Some(clock);
            }
            "vcpu" => {
                self.check_last()?;
                let (mut number, mut vcpu) = (0, VcpuState::default());
                section.read(|f| {
                    f.u32(&mut number);
                    head(f, &mut vcpu);
                })?;
                if number as usize != self.vcpus.len() || self.vcpus.len() >= machine.vcpus {
                    return Err(section.malformed());
                }
                self.vcpus.push(vcpu);
                self.seen = 0;
            }
            name => {
                let bit = VCPU_SECTIONS.iter().position(|&known| known == name).map(|at| 1 << at);
                let (Some(bit), Some(vcpu)) = (bit, self.vcpus.last_mut()) else {
                    return Err(section.malformed());
                };
                if self.seen & bit != 0 {
                    return Err(section.malformed());
                }
                self.seen |= bit;
                part(section, vcpu)?;
            }
        }
        Ok(())
    }

    /// Whether nothing of the vCPU is missing that came last.
    fn check_last(&self) -> Result<(), StateError> {
        if self.vcpus.is_empty() {
            return Ok(());
        }
        match (0..NEEDED).find(|at| self.seen & (1 << at) == 0) {
            None => Ok(()),
            Some(missing) => Err(StateError::Missing {
                section: VCPU_SECTIONS[missing],
            }),
        }
    }

    fn finish(self) -> Result<MachineState, StateError> {
        self.check_last()?;
        let machine = self.machine.ok_or(StateError::Missing { section: "machine" })?;
        if self.vcpus.len() != machine.vcpus {
            return Err(StateError::Missing { section: "vcpu" });
        }
        Ok(MachineState {
            saved_at: machine.saved_at,
            vendor: machine.vendor,
            vm: self.vm,
            vcpus: self.vcpus,
        })
    }
}

fn machine(section: &Section<'_>) -> Result<Machine, StateError> {
    if section.name != "machine" {
        return Err(StateError::Missing { section: "machine" });
    }
    let (mut vcpus, mut seconds, mut nanos, mut vendor) = (0, 0, 0, [0; 12]);
    section.read(|f| {
        f.u32(&mut vcpus);
        f.u64(&mut seconds);
        f.u32(&mut nanos);
        f.bytes(&mut vendor);
    })?;
    if vcpus as usize > VCPUS {
        return Err(StateError::TooMany {
            section: section.name.to_owned(),
            count: vcpus as usize,
            most: VCPUS,
        });
    }
    if vcpus == 0 || nanos >= 1_000_000_000 {
        return Err(section.malformed());
    }
    Ok(Machine {
        vcpus: vcpus as usize,
        saved_at: Duration::new(seconds, nanos),
        vendor,
    })
}

/// One of [`VCPU_SECTIONS`].
fn part(section: &Section<'_>, vcpu: &mut VcpuState) -> Result<(), StateError> {
    match section.name {
        "cpuid" => {
            let count = section.entries(CPUID_BYTES, CPUID_ENTRIES)?;
            vcpu.cpuid = vec![kvm_cpuid_entry2::default(); count];
            section.read(|f| vcpu.cpuid.iter_mut().for_each(|entry| fields::cpuid(f, entry)))?;
        }
        "regs" => section.read(|f| fields::regs(f, &mut vcpu.regs))?,
        "sregs" => section.read(|f| fields::sregs(f, &mut vcpu.sregs))?,
        "fpu" => section.read(|f| fields::fpu(f, &mut vcpu.fpu))?,
        "xsave" => {
            vcpu.xsave = section.raw(XSAVE_MIN..=XSAVE_MAX)?;
            if !vcpu.xsave.len().is_multiple_of(4) {
                return Err(section.malformed());
            }
        }
        "debug" => section.read(|f| fields::debugregs(f, &mut vcpu.debugregs))?,
        "events" => section.read(|f| fields::events(f, &mut vcpu.events))?,
        "msrs" => {
            let count = section.entries(MSR_BYTES, MSRS)?;
            vcpu.msrs = vec![(0, 0); count];
            section.read(|f| {
                for (index, value) in &mut vcpu.msrs {
                    f.u32(index);
                    f.u64(value);
                }
            })?;
            if !vcpu.msrs.is_sorted_by(|(before, _), (after, _)| before < after) {
                return Err(section.malformed());
            }
        }
        "xcrs" => {
            let mut xcrs = kvm_xcrs::default();
            section.read(|f| fields::xcrs(f, &mut xcrs))?;
            if xcrs.nr_xcrs as usize > xcrs.xcrs.len() {
                return Err(section.malformed());
            }
            vcpu.xcrs = Some(xcrs);
        }
        "lapic" => {
            let mut lapic = Box::new([0; LAPIC_BYTES]);
            section.read(|f| f.bytes(&mut *lapic))?;
            vcpu.lapic = Some(lapic);
        }
        "nested" => vcpu.nested = Some(NestedState(section.raw(NestedState::LENGTHS)?)),
        _ => return Err(section.malformed()),
    }
    Ok(())
}
