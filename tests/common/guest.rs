//! Guests that are up in a moment: one that only runs its firmware, and one whose memory is full of random bytes.

use std::path::Path;

/// The hypervisor of the tests: `LONGHAUL_TEST_QEMU`, or the system's.
pub(crate) fn qemu_program() -> String {
    std::env::var("LONGHAUL_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".to_owned())
}

/// A machine, as it is at both sites.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) machine: &'static str,
    pub(crate) memory_mb: u32,
    pub(crate) more: Vec<String>,
    /// Bytes that are rewritten for ever; `None` where the firmware alone runs.
    pub(crate) fill: Option<Fill>,
    /// Words behind `longhaul guest`, where that is the hypervisor.
    pub(crate) native: Option<Vec<String>>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Fill {
    dirty_bytes: u32,
    seed: u32,
}

impl Machine {
    /// Runs its firmware, which finds nothing to boot: almost all of its 64 MiB are zero.
    pub(crate) fn firmware() -> Self {
        Self {
            machine: "pc",
            memory_mb: 64,
            more: Vec::new(),
            fill: None,
            native: None,
        }
    }

    /// Fills its memory with random bytes and stands still.
    pub(crate) fn filled(memory_mb: u32) -> Self {
        Self {
            memory_mb,
            fill: Some(Fill {
                dirty_bytes: 0,
                seed: 0x9e37_79b9,
            }),
            ..Self::firmware()
        }
    }

    /// Fills its memory with random bytes and then changes every page of the first `dirty_kib` over and over.
    pub(crate) fn restless(memory_mb: u32, dirty_kib: u32) -> Self {
        Self {
            fill: Some(Fill {
                dirty_bytes: dirty_kib << 10,
                seed: 0x2545_f491,
            }),
            ..Self::filled(memory_mb)
        }
    }

    /// Under the native engine: `longhaul guest` with these words.
    pub(crate) fn native(memory_mb: u32, words: &[&str]) -> Self {
        Self {
            memory_mb,
            native: Some(words.iter().map(|word| (*word).to_owned()).collect()),
            ..Self::firmware()
        }
    }

    /// The same with more words for `longhaul guest`.
    pub(crate) fn with_native(mut self, more: &[&str]) -> Self {
        if let Some(words) = &mut self.native {
            words.extend(more.iter().map(|word| (*word).to_owned()));
        }
        self
    }

    pub(crate) fn with(mut self, more: &[&str]) -> Self {
        self.more.extend(more.iter().map(|word| (*word).to_owned()));
        self
    }

    /// The command line, with `qmp` and a second monitor `qmp.test`. The kernel, where it has one, is written to `folder`.
    pub(crate) fn command(&self, folder: &Path, qmp: &str) -> Vec<String> {
        if let Some(native) = &self.native {
            return self.native_command(native, qmp);
        }
        // 8 KiB more than whole 256 KiB: otherwise QEMU before 9.0 loses writes of the guest while it moves (`Launch::memory_kb` of the lab).
        let memory = format!("{}k", (self.memory_mb << 10) + 8);
        let mut words: Vec<String> = [
            &qemu_program(),
            "-M",
            self.machine,
            "-accel",
            "tcg",
            "-m",
            &memory,
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ]
        .map(str::to_owned)
        .into();
        words.extend(["-qmp".to_owned(), format!("unix:{qmp},server=on,wait=off")]);
        words.extend(["-qmp".to_owned(), format!("unix:{qmp}.test,server=on,wait=off")]);
        if let Some(fill) = self.fill {
            let kernel = folder.join(format!("kernel-{}-{}", self.memory_mb, fill.dirty_bytes));
            std::fs::write(&kernel, fill.kernel(self.memory_mb)).expect("the rig's folder can be written");
            words.extend(["-kernel".to_owned(), kernel.display().to_string()]);
            words.extend(["-debugcon".to_owned(), format!("file:{qmp}.says")]);
        }
        words.extend(self.more.iter().cloned());
        words
    }

    fn native_command(&self, words: &[String], qmp: &str) -> Vec<String> {
        let program = std::env::var("LONGHAUL_BIN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_longhaul").to_owned());
        let memory = format!("{}mib", self.memory_mb);
        let test = format!("{qmp}.test");
        let serial = format!("{qmp}.says");
        let own = [
            &program, "guest", "--qmp", qmp, "--qmp", &test, "--serial", &serial, "--memory", &memory,
        ];
        own.into_iter()
            .map(str::to_owned)
            .chain(words.iter().cloned())
            .collect()
    }

    /// Whether the guest says so once its memory is filled.
    pub(crate) fn says_ready(&self) -> bool {
        self.fill.is_some()
    }
}

impl Fill {
    const FIRST_BYTE: u32 = 2 << 20;

    /// A multiboot kernel: fills memory from 2 MiB on, says `R` on the debug console, then rewrites.
    fn kernel(self, memory_mb: u32) -> Vec<u8> {
        // The firmware's tables are in the last 128 KiB.
        let end = (memory_mb << 20) - (256 << 10);
        let mut kernel = KERNEL.to_vec();
        for (at, value) in [(32, end), (36, Self::FIRST_BYTE + self.dirty_bytes), (40, self.seed)] {
            kernel[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        kernel
    }
}

/// Loaded at 1 MiB and entered in 32-bit protected mode.
#[rustfmt::skip]
const KERNEL: [u8; 129] = [
    // Multiboot header with addresses, and three numbers: end of memory, end of what is rewritten, seed.
    0x02, 0xb0, 0xad, 0x1b,  0x00, 0x00, 0x01, 0x00,  0xfe, 0x4f, 0x51, 0xe4,  0x00, 0x00, 0x10, 0x00,
    0x00, 0x00, 0x10, 0x00,  0x00, 0x00, 0x00, 0x00,  0x00, 0x00, 0x00, 0x00,  0x2c, 0x00, 0x10, 0x00,
    0x00, 0x00, 0x00, 0x00,  0x00, 0x00, 0x00, 0x00,  0x00, 0x00, 0x00, 0x00,
    0xfc,                                 // start:  cld
    0xbf, 0x00, 0x00, 0x20, 0x00,         //         mov edi, 2 MiB
    0x8b, 0x2d, 0x20, 0x00, 0x10, 0x00,   //         mov ebp, [end]
    0xa1, 0x28, 0x00, 0x10, 0x00,         //         mov eax, [seed]
    0x39, 0xef,                           // fill:   cmp edi, ebp
    0x73, 0x18,                           //         jae filled
    0x89, 0xc2, 0xc1, 0xe2, 0x0d, 0x31, 0xd0, //     eax ^= eax << 13   (xorshift)
    0x89, 0xc2, 0xc1, 0xea, 0x11, 0x31, 0xd0, //     eax ^= eax >> 17
    0x89, 0xc2, 0xc1, 0xe2, 0x05, 0x31, 0xd0, //     eax ^= eax << 5
    0xab,                                 //         stosd
    0xeb, 0xe4,                           //         jmp fill
    0xb0, 0x52, 0xe6, 0xe9,               // filled: out 0xe9, 'R'
    0x8b, 0x2d, 0x24, 0x00, 0x10, 0x00,   //         mov ebp, [end of what is rewritten]
    0xbf, 0x00, 0x00, 0x20, 0x00,         // again:  mov edi, 2 MiB
    0x39, 0xef,                           // write:  cmp edi, ebp
    0x73, 0x0a,                           //         jae next
    0xff, 0x07,                           //         inc dword [edi]
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00,   //         add edi, 4096
    0xeb, 0xf2,                           //         jmp write
    0x81, 0xfd, 0x00, 0x00, 0x20, 0x00,   // next:   cmp ebp, 2 MiB
    0x77, 0xe5,                           //         ja again
    0xf4,                                 // idle:   hlt
    0xeb, 0xfd,                           //         jmp idle
];
