//! Names of the features in the words of CPUID.

use kvm_bindings::kvm_cpuid_entry2;

use crate::hypervisor::kvm::monitor::CpuRegister as Register;

/// A word of CPUID of which every bit is a feature.
#[derive(Debug)]
pub(in crate::hypervisor::kvm) struct Word {
    pub(in crate::hypervisor::kvm) function: u32,
    pub(in crate::hypervisor::kvm) index: u32,
    pub(in crate::hypervisor::kvm) register: Register,
    /// Names from bit 0 on; `-` has none, and a bit with `!` in front is no feature of the host: it follows from what
    /// the guest has switched on, from its topology, or KVM emulates it and the VMM decides.
    names: &'static str,
}

impl Word {
    /// Its value in `entry`.
    pub(in crate::hypervisor::kvm) fn of(&self, entry: &kvm_cpuid_entry2) -> u32 {
        match self.register {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        }
    }

    /// Its place in `entry`.
    pub(super) fn of_mut<'a>(&self, entry: &'a mut kvm_cpuid_entry2) -> &'a mut u32 {
        match self.register {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        }
    }

    /// Whether it means something only to a guest that knows the hypervisor by its name, or that has hardware virtualisation.
    pub(in crate::hypervisor::kvm) fn is_conditional(&self) -> bool {
        matches!(self.function, KVM_FEATURES | SVM_FEATURES)
    }

    /// Its bits that are features of a host.
    pub(in crate::hypervisor::kvm) fn features(&self) -> u32 {
        (0..u32::BITS)
            .filter(|&bit| self.name(bit).is_some())
            .fold(0, |bits, bit| bits | 1 << bit)
    }

    /// What bit `bit` is called; `None`: it is no feature of a host.
    pub(super) fn name(&self, bit: u32) -> Option<String> {
        match self.names.split_ascii_whitespace().nth(bit as usize) {
            Some(name) if name.starts_with('!') => None,
            Some("-") | None => {
                let (function, index, register) = (self.function, self.index, self.register.name());
                Some(format!("bit {bit} of {register} of CPUID {function:#x}.{index}"))
            }
            Some(name) => Some(name.to_owned()),
        }
    }
}

const fn word(function: u32, index: u32, register: Register, names: &'static str) -> Word {
    Word {
        function,
        index,
        register,
        names,
    }
}

/// KVM's own features, for guests that know it by its name.
pub(super) const KVM_FEATURES: u32 = 0x4000_0001;
/// What a hypervisor calls itself.
pub(super) const KVM_SIGNATURE: u32 = 0x4000_0000;
/// AMD's virtualisation: only of a guest that has `svm`.
pub(super) const SVM_FEATURES: u32 = 0x8000_000a;
/// Sizes and places of the components of the extended state.
pub(super) const XSTATE: u32 = 0xd;
/// Widths of addresses.
pub(super) const ADDRESSES: u32 = 0x8000_0008;

/// The words that are compared.
pub(in crate::hypervisor::kvm) const WORDS: [Word; 17] = [
    word(
        1,
        0,
        Register::Ecx,
        "sse3 pclmulqdq dtes64 !monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 \
         sse4_2 !x2apic movbe popcnt !tsc_deadline_timer aes xsave !osxsave avx f16c rdrand !hypervisor",
    ),
    word(
        1,
        0,
        Register::Edx,
        "fpu vme de pse tsc msr pae mce cx8 !apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds acpi mmx fxsr \
         sse sse2 ss !ht tm ia64 pbe",
    ),
    word(
        7,
        0,
        Register::Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 !fdp_excptn_only smep bmi2 erms invpcid rtm cqm !zero_fcs_fds mpx \
         rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd \
         sha_ni avx512bw avx512vl",
    ),
    word(
        7,
        0,
        Register::Ecx,
        "prefetchwt1 avx512vbmi umip pku !ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
         avx512_bitalg tme avx512_vpopcntdq - la57 !mawau !mawau !mawau !mawau !mawau rdpid kl bus_lock_detect \
         cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    word(
        7,
        0,
        Register::Edx,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear \
         rtm_always_abort - rtm_force_abort serialize !hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 \
         avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities ssbd",
    ),
    word(
        7,
        1,
        Register::Eax,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred \
         lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist - - - movrs",
    ),
    word(
        7,
        1,
        Register::Edx,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchit user_msr - \
         uiret_uif cet_sss avx10 - apx_f",
    ),
    word(
        7,
        2,
        Register::Edx,
        "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    ),
    word(
        XSTATE,
        0,
        Register::Eax,
        "xstate_x87 xstate_sse xstate_avx xstate_bndregs xstate_bndcsr xstate_opmask xstate_zmm_hi256 \
         xstate_hi16_zmm - xstate_pkru - - - - - - - xstate_amx_tilecfg xstate_amx_tiledata xstate_apx",
    ),
    word(XSTATE, 0, Register::Edx, ""),
    word(XSTATE, 1, Register::Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    word(
        KVM_FEATURES,
        0,
        Register::Eax,
        "kvmclock !kvm_nopiodelay kvm_mmu kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - \
         kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int \
         kvm_msi_ext_dest_id kvm_map_gpa_range kvm_migration_control - - - - - - kvmclock_stable",
    ),
    word(
        0x8000_0001,
        0,
        Register::Ecx,
        "lahf_lm !cmp_legacy svm !extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - \
         lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    word(
        0x8000_0001,
        0,
        Register::Edx,
        "!fpu !vme !de !pse !tsc !msr !pae !mce !cx8 !apic - syscall !mtrr !pge !mca !cmov !pat !pse36 - !mp nx - \
         mmxext !mmx !fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    word(
        ADDRESSES,
        0,
        Register::Ebx,
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - amd_stibp_always_on \
         - amd_ibrs_same_mode no_lmsle - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret",
    ),
    word(
        SVM_FEATURES,
        0,
        Register::Edx,
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - pausefilter - pfthreshold \
         avic - v_vmsave_vmload vgif",
    ),
    word(
        0x8000_0021,
        0,
        Register::Eax,
        "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - auto_ibrs no_smm_ctl_msr - - - - - - - - - - \
         amd_prefetchi - - - - - - sbpb ibpb_brtype srso_no",
    ),
];
