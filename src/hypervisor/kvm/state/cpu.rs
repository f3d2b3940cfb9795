//! What this host's KVM can do, and what of that a guest needs.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::features::{ADDRESSES, KVM_FEATURES, KVM_SIGNATURE, SVM_FEATURES, WORDS, Word, XSTATE};
use super::vcpu::VcpuState;
use super::{StateError, msrs, tsc};

/// Names of a kind in a sentence.
const NAMED: usize = 12;
/// How far the frequencies of two counters may be apart that count as one: what KVM tolerates as well.
const TSC_PPM: u64 = 250;

/// What KVM can do here.
#[derive(Debug)]
pub(super) struct Host {
    cpuid: Vec<kvm_cpuid_entry2>,
    msrs: Vec<u32>,
    can_scale_tsc: bool,
    has_deadline: bool,
    /// See [`tsc::fixed`].
    fixed_tsc: Option<u64>,
}

/// What a guest needs and a host has not. Each thing once.
#[derive(Debug, Default)]
pub(super) struct Lacks {
    features: Vec<String>,
    msrs: Vec<u32>,
    /// Clauses.
    others: Vec<String>,
}

impl Lacks {
    pub(super) fn add(&mut self, clause: String) {
        push(&mut self.others, clause);
    }

    /// As clauses of one sentence; `None` if nothing is lacking.
    pub(super) fn sentence(self) -> Option<String> {
        let mut clauses = Vec::new();
        if !self.features.is_empty() {
            let names = listed(&self.features);
            clauses.push(format!("it was given CPU features that this host lacks ({names})"));
        }
        if !self.msrs.is_empty() {
            let numbers: Vec<_> = self.msrs.iter().map(|index| format!("{index:#x}")).collect();
            let numbers = listed(&numbers);
            clauses.push(format!(
                "it uses model-specific registers that this host lacks ({numbers})"
            ));
        }
        let more = self.others.len().saturating_sub(NAMED);
        clauses.extend(self.others.into_iter().take(NAMED));
        if more > 0 {
            clauses.push(format!("and {more} more"));
        }
        (!clauses.is_empty()).then(|| clauses.join("; "))
    }
}

fn push<T: PartialEq>(list: &mut Vec<T>, item: T) {
    if !list.contains(&item) {
        list.push(item);
    }
}

fn listed(names: &[String]) -> String {
    let shown = names[..names.len().min(NAMED)].join(", ");
    match names.len().saturating_sub(NAMED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

impl Host {
    pub(super) fn of(kvm: &Kvm) -> Result<Self, StateError> {
        let (cpuid, fixed_tsc) = supported(kvm).map_err(|errno| StateError::Host {
            doing: "say what CPU it offers",
            errno,
        })?;
        Ok(Self {
            fixed_tsc,
            cpuid,
            msrs: msrs::known(kvm)?,
            can_scale_tsc: kvm.check_extension(Cap::TscControl),
            has_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
        })
    }

    /// Who has made its CPUs.
    pub(super) fn vendor(&self) -> [u8; 12] {
        maker(&self.cpuid)
    }

    /// Adds what `vcpu` needs and this host has not.
    pub(super) fn compare(&self, vcpu: &VcpuState, lacks: &mut Lacks) {
        for word in &WORDS {
            self.compare_word(&vcpu.cpuid, word, lacks);
        }
        // KVM supports it in a way of its own.
        let leaf = entry(&vcpu.cpuid, 1, 0);
        if !self.has_deadline && leaf.is_some_and(|leaf| leaf.ecx & 1 << 24 != 0) {
            push(&mut lacks.features, "tsc_deadline_timer".to_owned());
        }
        self.compare_xstate(&vcpu.cpuid, lacks);
        self.compare_addresses(&vcpu.cpuid, lacks);
        // A register that is 0 is no different from none: a newer kernel lists more of them.
        for &(index, value) in &vcpu.msrs {
            if value != 0 && self.msrs.binary_search(&index).is_err() {
                push(&mut lacks.msrs, index);
            }
        }
    }

    fn compare_word(&self, guest: &[kvm_cpuid_entry2], word: &Word, lacks: &mut Lacks) {
        let is_used = match word.function {
            // "KVMKVMKVM": another hypervisor's leaves mean something else.
            KVM_FEATURES => {
                entry(guest, KVM_SIGNATURE, 0).is_some_and(|leaf| [leaf.ebx, leaf.ecx, leaf.edx] == KVM_NAME)
            }
            SVM_FEATURES => entry(guest, 0x8000_0001, 0).is_some_and(|leaf| leaf.ecx & 1 << 2 != 0),
            _ => true,
        };
        let Some(given) = entry(guest, word.function, word.index).filter(|_| is_used) else {
            return;
        };
        let here = entry(&self.cpuid, word.function, word.index).map_or(0, |entry| word.of(entry));
        let missing = word.of(given) & !here;
        for bit in (0..u32::BITS).filter(|bit| missing & 1 << bit != 0) {
            if let Some(name) = word.name(bit) {
                push(&mut lacks.features, name);
            }
        }
    }

    /// Where the components of the extended state lie is the CPU's, and is what the guest's own XSAVE areas, and the
    /// saved one, go by.
    fn compare_xstate(&self, guest: &[kvm_cpuid_entry2], lacks: &mut Lacks) {
        let Some(given) = entry(guest, XSTATE, 0) else { return };
        for component in (2..u32::BITS).filter(|bit| given.eax & 1 << bit != 0) {
            let (Some(there), Some(here)) = (entry(guest, XSTATE, component), entry(&self.cpuid, XSTATE, component))
            else {
                continue;
            };
            if (there.eax, there.ebx) != (here.eax, here.ebx) {
                lacks.add(format!(
                    "component {component} of its extended state has {} bytes at {}, and here {} at {}",
                    there.eax, there.ebx, here.eax, here.ebx
                ));
            }
        }
    }

    fn compare_addresses(&self, guest: &[kvm_cpuid_entry2], lacks: &mut Lacks) {
        let (Some(there), Some(here)) = (entry(guest, ADDRESSES, 0), entry(&self.cpuid, ADDRESSES, 0)) else {
            return;
        };
        for (kind, shift) in [("physical", 0), ("linear", 8)] {
            let (there, here) = (there.eax >> shift & 0xff, here.eax >> shift & 0xff);
            if there > here {
                lacks.add(format!("its {kind} addresses have {there} bits, and here {here}"));
            }
        }
    }

    /// Adds that a counter which would show `tsc` now cannot be set here, if it is off by more than a second.
    pub(super) fn compare_fixed_tsc(&self, tsc: u64, khz: u32, lacks: &mut Lacks) {
        let Some(fixed) = self.fixed_tsc else { return };
        if fixed.abs_diff(tsc) > u64::from(khz) * 1000 {
            lacks.add(format!(
                "its TSC is at {tsc} and this host's at {fixed}, which KVM cannot set here"
            ));
        }
    }

    /// Adds that a counter of `khz` cannot be had from one of `here`. 0: nobody knows.
    pub(super) fn compare_tsc(&self, khz: u32, here: u32, lacks: &mut Lacks) {
        let apart = u64::from(khz.abs_diff(here)) * 1_000_000;
        if khz != 0 && here != 0 && !self.can_scale_tsc && apart > TSC_PPM * u64::from(khz) {
            lacks.add(format!(
                "its TSC runs at {khz} kHz and this host's at {here} kHz, which KVM cannot scale here"
            ));
        }
    }
}

/// What KVM says that it supports, and what a vCPU has that was given just that: a KVM that cannot hide a feature (one
/// without hardware virtualisation) does not list it, and gives it to every guest. Also [`tsc::fixed`] of that vCPU.
fn supported(kvm: &Kvm) -> Result<(Vec<kvm_cpuid_entry2>, Option<u64>), kvm_ioctls::Error> {
    let listed = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let vm = kvm.create_vm()?;
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&listed)?;
    let given = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES)?;
    let mut supported = listed.as_slice().to_vec();
    for leaf in &mut supported {
        let Some(given) = entry(given.as_slice(), leaf.function, leaf.index) else {
            continue;
        };
        for word in &WORDS {
            if (word.function, word.index) == (leaf.function, leaf.index) {
                *word.of_mut(leaf) |= word.of(given);
            }
        }
    }
    Ok((supported, tsc::fixed(&vcpu)))
}

/// Who has made the CPUs of this host: without [`Host::of`], which takes the time to make a VM.
pub(super) fn vendor(kvm: &Kvm) -> Result<[u8; 12], StateError> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|errno| StateError::Host {
            doing: "say what CPU it offers",
            errno,
        })?;
    Ok(maker(cpuid.as_slice()))
}

fn maker(cpuid: &[kvm_cpuid_entry2]) -> [u8; 12] {
    let mut vendor = [0; 12];
    if let Some(leaf) = entry(cpuid, 0, 0) {
        for (to, word) in vendor.chunks_exact_mut(4).zip([leaf.ebx, leaf.edx, leaf.ecx]) {
            to.copy_from_slice(&word.to_le_bytes());
        }
    }
    vendor
}

/// "KVMKVMKVM" and zeros.
const KVM_NAME: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];

fn entry(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    entries
        .iter()
        .find(|entry| entry.function == function && entry.index == index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        Host {
            cpuid: vec![
                kvm_cpuid_entry2 {
                    function: 0x8000_0008,
                    eax: 0x3030,
                    ..Default::default()
                },
                kvm_cpuid_entry2 {
                    function: 0xd,
                    index: 9,
                    eax: 8,
                    ebx: 832,
                    ..Default::default()
                },
            ],
            msrs: vec![0x10, 0x277],
            can_scale_tsc: false,
            has_deadline: false,
            fixed_tsc: Some(5_000_000_000),
        }
    }

    fn lacks(vcpu: &VcpuState) -> String {
        let mut lacks = Lacks::default();
        host().compare(vcpu, &mut lacks);
        lacks.sentence().unwrap_or_default()
    }

    #[test]
    fn bits_that_follow_from_what_the_guest_does_are_not_asked_of_the_host() {
        let leaf = kvm_cpuid_entry2 {
            function: 1,
            ecx: 1 << 27 | 1 << 31 | 1 << 21,
            ..Default::default()
        };
        let vcpu = VcpuState {
            cpuid: vec![leaf],
            ..Default::default()
        };
        assert_eq!(lacks(&vcpu), "");
    }

    #[test]
    fn a_component_that_lies_elsewhere_and_wider_addresses_are_refused() {
        let entry = |function, index, eax, ebx| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ..Default::default()
        };
        let vcpu = VcpuState {
            cpuid: vec![
                entry(0xd, 0, 1 << 9, 0),
                entry(0xd, 9, 8, 2688),
                entry(0x8000_0008, 0, 0x3034, 0),
            ],
            ..Default::default()
        };
        let lacks = lacks(&vcpu);
        assert!(lacks.contains("xstate_pkru"), "{lacks}");
        assert!(lacks.contains("component 9 of its extended state has 8 bytes at 2688, and here 8 at 832"));
        assert!(lacks.contains("its physical addresses have 52 bits, and here 48"));
    }

    #[test]
    fn a_register_that_holds_nothing_may_be_missing() {
        let vcpu = VcpuState {
            msrs: vec![(0x10, 5), (0x122, 0), (0x123, 1)],
            ..Default::default()
        };
        let lacks = lacks(&vcpu);
        assert!(lacks.contains("(0x123)"), "{lacks}");
    }

    #[test]
    fn a_frequency_that_differs_by_more_than_250_ppm_is_refused_where_it_cannot_be_scaled() {
        for (here, is_refused) in [(1_000_250, false), (1_000_251, true), (0, false), (999_749, true)] {
            let mut lacks = Lacks::default();
            host().compare_tsc(1_000_000, here, &mut lacks);
            assert_eq!(lacks.sentence().is_some(), is_refused, "{here}");
        }
    }

    #[test]
    fn a_counter_that_cannot_be_set_may_be_off_by_a_second() {
        for (tsc, is_refused) in [(4_000_000_000, false), (6_000_000_001, true), (1, true)] {
            let mut lacks = Lacks::default();
            host().compare_fixed_tsc(tsc, 1_000_000, &mut lacks);
            assert_eq!(lacks.sentence().is_some(), is_refused, "{tsc}");
        }
    }

    #[test]
    fn a_long_list_is_cut() {
        let mut lacks = Lacks::default();
        lacks.msrs.extend(0..100);
        let sentence = lacks.sentence().expect("there are some");
        assert!(sentence.ends_with("0xb and 88 more)"), "{sentence}");
    }

    #[test]
    fn names_stand_at_their_bits() {
        use crate::hypervisor::kvm::monitor::CpuRegister::{Eax, Ebx, Ecx, Edx};
        for (function, index, register, bit, name) in [
            (1, 0, Ecx, 30, "rdrand"),
            (1, 0, Edx, 31, "pbe"),
            (7, 0, Ebx, 16, "avx512f"),
            (7, 0, Ebx, 31, "avx512vl"),
            (7, 0, Ecx, 22, "rdpid"),
            (7, 0, Ecx, 31, "pks"),
            (7, 0, Edx, 31, "ssbd"),
            (7, 1, Eax, 26, "lam"),
            (7, 1, Edx, 21, "apx_f"),
            (0xd, 0, Eax, 18, "xstate_amx_tiledata"),
            (0xd, 1, Eax, 3, "xsaves"),
            (0x4000_0001, 0, Eax, 24, "kvmclock_stable"),
            (0x8000_0001, 0, Ecx, 29, "mwaitx"),
            (0x8000_0001, 0, Edx, 27, "rdtscp"),
            (0x8000_0008, 0, Ebx, 30, "ibpb_ret"),
            (0x8000_000a, 0, Edx, 16, "vgif"),
            (0x8000_0021, 0, Eax, 29, "srso_no"),
        ] {
            let is_that = |word: &&Word| (word.function, word.index, word.register) == (function, index, register);
            let word = WORDS.iter().find(is_that).expect("a word of the list");
            assert_eq!(word.name(bit).as_deref(), Some(name));
        }
    }

    #[test]
    fn no_word_has_more_names_than_bits() {
        for word in &WORDS {
            assert!(word.name(32).is_some_and(|name| name.starts_with("bit 32")), "{word:?}");
        }
    }
}
