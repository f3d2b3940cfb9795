//! The demo guest itself: machine code, and the state in which a vCPU enters it.
//!
//! A vCPU keeps in its registers, for as long as it lives:
//!
//! | register | is |
//! |---|---|
//! | `r8`, `r9` | its share of the working set: first page, pages |
//! | `r10` | next page in turn |
//! | `r11` | state of xorshift |
//! | `r12` | its counters |
//! | `r13` | sum of the generations of its pages |
//! | `r14`, `r15` | a second sum under way, over the table: next page, sum so far |
//! | `rbp` | TSC at which the next page is due |
//!
//! So a table of an older time is found even where the pages are of that time as well: the registers are not.

#![expect(unsafe_code, reason = "the payload is machine code between two symbols")]

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::content::{FACTOR, STEP, source};
use super::dials::{Content, Dials};
use super::layout::{
    CODE, COUNTERS, COUNTERS_SIZE, GDT, IDT, PAGE_TABLES, PARAMETERS, SIGN_PORT, STACKS, TABLE, WORKING_SET, counter,
    parameter, share,
};
use crate::hypervisor::kvm::memory::GuestRam;
use crate::proto::page::PAGE_SIZE;

// Read-only data: this process never runs it.
std::arch::global_asm!(
    ".pushsection .rodata.longhaul_demo, \"a\"",
    ".balign 16",
    ".globl longhaul_demo_begin",
    ".hidden longhaul_demo_begin",
    "longhaul_demo_begin:",
    // The local interrupt controller: on, its pins off, its timer periodic at a sixteenth of the 1 GHz that KVM gives
    // it.
    "mov eax, 0xfee00000",
    "mov dword ptr [rax + 0xf0], 0x1ff",
    "mov dword ptr [rax + 0x350], 0x10000",
    "mov dword ptr [rax + 0x360], 0x10000",
    "mov dword ptr [rax + 0x3e0], 3",
    "mov dword ptr [rax + 0x320], 0x20000 + {timer_vector}",
    "mov dword ptr [rax + 0x380], 1000000000 / 16 / {ticks_per_second}",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov rbp, rax",
    "add rax, [{parameters} + {second}]",
    "mov [r12 + {next_beat}], rax",
    "sti",
    //
    // One page after the other. Without a rate the clock is looked at for every sixteenth only.
    "20:",
    "cmp qword ptr [{parameters} + {interval}], 0",
    "jne 21f",
    "test r13d, 15",
    "jnz 30f",
    "21:",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "cmp dword ptr [r12 + {number}], 0",
    "jne 22f",
    // A line is due, or by this TSC will not be for so long that it cannot be the one by which that was said.
    "mov rcx, [{parameters} + {second}]",
    "mov rdx, rax",
    "sub rdx, [r12 + {next_beat}]",
    "jns 50f",
    "lea rdx, [rdx + rcx * 2]",
    "test rdx, rdx",
    "js 50f",
    // The same for a sign of life.
    "mov rcx, [{parameters} + {sign}]",
    "test rcx, rcx",
    "jz 22f",
    "mov rdx, rax",
    "sub rdx, [r12 + {next_sign}]",
    "jns 55f",
    "lea rdx, [rdx + rcx * 2]",
    "test rdx, rdx",
    "js 55f",
    "22:",
    "mov rcx, [{parameters} + {interval}]",
    "test rcx, rcx",
    "jz 30f",
    // More than a second off: the guest stood, or it is another TSC. Nothing is made up for.
    "mov rdx, rax",
    "sub rdx, rbp",
    "mov rsi, [{parameters} + {second}]",
    "lea rdi, [rsi + rsi]",
    "add rsi, rdx",
    "cmp rsi, rdi",
    "jbe 23f",
    "mov rbp, rax",
    "xor edx, edx",
    "23:",
    "test rdx, rdx",
    "jns 24f",
    // Until the next tick at the latest. One that came since `rdtsc` costs a tick, as the timer is periodic.
    "hlt",
    "jmp 21b",
    "24:",
    "add rbp, rcx",
    //
    // Which page: rcx, in its share.
    "30:",
    "mov ecx, [{parameters} + {skew}]",
    "test ecx, ecx",
    "jz 32f",
    "mov rax, r11",
    "shl rax, 13",
    "xor r11, rax",
    "mov rax, r11",
    "shr rax, 7",
    "xor r11, rax",
    "mov rax, r11",
    "shl rax, 17",
    "xor r11, rax",
    "mov rdx, [r12 + {hot}]",
    "movzx eax, r11w",
    "cmp eax, ecx",
    "mov rcx, r11",
    "jae 31f",
    "shr rcx, 32",
    "imul rcx, rdx",
    "shr rcx, 32",
    "jmp 40f",
    "31:",
    "shr rcx, 32",
    "mov rax, r9",
    "sub rax, rdx",
    "imul rcx, rax",
    "shr rcx, 32",
    "add rcx, rdx",
    "jmp 40f",
    "32:",
    "mov rcx, r10",
    "inc r10",
    "cmp r10, r9",
    "jb 40f",
    "xor r10d, r10d",
    //
    // Page rsi, address rdi: the words that must be there from rax on by rdx, the new ones from rbx on.
    "40:",
    "lea rsi, [r8 + rcx]",
    "mov [r12 + {writing}], rsi",
    "mov ecx, [{table} + rsi * 4]",
    "mov rax, rsi",
    "shl rax, 32",
    "lea rbx, [rcx + 1]",
    "or rbx, rax",
    "or rax, rcx",
    "mov rdx, [{parameters} + {seed}]",
    "xor rax, rdx",
    "xor rbx, rdx",
    "mov rdx, {factor}",
    "imul rax, rdx",
    "imul rbx, rdx",
    "mov rdx, rax",
    "shr rdx, 32",
    "xor rax, rdx",
    "mov rdx, rbx",
    "shr rdx, 32",
    "xor rbx, rdx",
    "mov rdi, {step}",
    "mov rdx, rdi",
    "test ecx, ecx",
    "jnz 41f",
    "cmp dword ptr [{parameters} + {is_blank}], 0",
    "je 41f",
    "xor eax, eax",
    "xor edx, edx",
    "41:",
    "push rbp",
    "push rsi",
    "mov rbp, rdi",
    "mov rdi, rsi",
    "shl rdi, 12",
    "add rdi, {working_set}",
    "mov ecx, [{parameters} + {words}]",
    "mov rsi, [{parameters} + {stride}]",
    "42:",
    "cmp [rdi], rax",
    "jne 43f",
    "mov [rdi], rbx",
    "add rax, rdx",
    "add rbx, rbp",
    "add rdi, rsi",
    "dec ecx",
    "jnz 42b",
    "jmp 45f",
    // One error for the page; it is whole again then.
    "43:",
    "inc qword ptr [r12 + {errors}]",
    "44:",
    "mov [rdi], rbx",
    "add rbx, rbp",
    "add rdi, rsi",
    "dec ecx",
    "jnz 44b",
    "45:",
    "pop rsi",
    "pop rbp",
    "inc dword ptr [{table} + rsi * 4]",
    "inc r13",
    "mov [r12 + {sum}], r13",
    "inc qword ptr [r12 + {pages}]",
    // The second sum: what it has of this page is one more now, and it takes in one page further.
    "sub rsi, r8",
    "cmp rsi, r14",
    "adc r15, 0",
    "lea rdx, [r8 + r14]",
    "mov eax, [{table} + rdx * 4]",
    "add r15, rax",
    "inc r14",
    "cmp r14, r9",
    "jb 20b",
    "xor r14d, r14d",
    "xor eax, eax",
    "xchg rax, r15",
    "cmp rax, r13",
    "je 20b",
    "inc qword ptr [r12 + {errors}]",
    "mov r13, rax",
    "jmp 20b",
    //
    // A line. Now is rax, a second rcx.
    "50:",
    "add rax, rcx",
    "mov [r12 + {next_beat}], rax",
    "inc qword ptr [r12 + {beats}]",
    "lea rsi, [rip + 90f]",
    "mov rax, [r12 + {beats}]",
    "call 60f",
    "xor eax, eax",
    "xor ebx, ebx",
    "mov ecx, [{parameters} + {vcpus}]",
    "mov edx, {counters}",
    "51:",
    "add rax, [rdx + {pages}]",
    "add rbx, [rdx + {errors}]",
    "add edx, {counters_size}",
    "dec ecx",
    "jnz 51b",
    "lea rsi, [rip + 91f]",
    "call 60f",
    "lea rsi, [rip + 92f]",
    "mov rax, rbx",
    "call 60f",
    "lea rsi, [rip + 93f]",
    "mov rax, [r12 + {ticks}]",
    "call 60f",
    "mov al, 10",
    "mov dx, 0x3f8",
    "out dx, al",
    "jmp 21b",
    //
    // A sign of life. Now is rax, the time between two of them rcx.
    "55:",
    "add rax, rcx",
    "mov [r12 + {next_sign}], rax",
    "inc qword ptr [r12 + {signs}]",
    "mov dx, {sign_port}",
    "out dx, al",
    "jmp 21b",
    //
    // Writes the text at rsi and the number rax.
    "60:",
    "mov rdi, rax",
    "mov dx, 0x3f8",
    "61:",
    "mov al, [rsi]",
    "test al, al",
    "jz 62f",
    "out dx, al",
    "inc rsi",
    "jmp 61b",
    "62:",
    "mov rax, rdi",
    "xor ecx, ecx",
    "mov esi, 10",
    "63:",
    "xor edx, edx",
    "div rsi",
    "push rdx",
    "inc ecx",
    "test rax, rax",
    "jnz 63b",
    "mov dx, 0x3f8",
    "64:",
    "pop rax",
    "add al, 48",
    "out dx, al",
    "dec ecx",
    "jnz 64b",
    "ret",
    "90:",
    ".asciz \"beat \"",
    "91:",
    ".asciz \" pages \"",
    "92:",
    ".asciz \" errors \"",
    "93:",
    ".asciz \" ticks \"",
    //
    ".balign 16",
    ".globl longhaul_demo_tick",
    ".hidden longhaul_demo_tick",
    "longhaul_demo_tick:",
    "push rax",
    "inc qword ptr [r12 + {ticks}]",
    "mov eax, 0xfee00000",
    "mov dword ptr [rax + 0xb0], 0",
    "pop rax",
    ".globl longhaul_demo_ignore",
    ".hidden longhaul_demo_ignore",
    "longhaul_demo_ignore:",
    "iretq",
    ".globl longhaul_demo_end",
    ".hidden longhaul_demo_end",
    "longhaul_demo_end:",
    ".popsection",
    timer_vector = const TIMER_VECTOR,
    ticks_per_second = const TICKS_PER_SECOND,
    parameters = const PARAMETERS,
    vcpus = const parameter::VCPUS,
    words = const parameter::WORDS,
    stride = const parameter::STRIDE,
    interval = const parameter::INTERVAL,
    second = const parameter::SECOND,
    skew = const parameter::SKEW,
    seed = const parameter::SEED,
    is_blank = const parameter::IS_BLANK,
    sign = const parameter::SIGN,
    counters = const COUNTERS,
    counters_size = const COUNTERS_SIZE,
    pages = const counter::PAGES,
    errors = const counter::ERRORS,
    beats = const counter::BEATS,
    ticks = const counter::TICKS,
    sum = const counter::SUM,
    writing = const counter::WRITING,
    next_beat = const counter::NEXT_BEAT,
    signs = const counter::SIGNS,
    next_sign = const counter::NEXT_SIGN,
    sign_port = const SIGN_PORT,
    hot = const counter::HOT,
    number = const counter::NUMBER,
    table = const TABLE,
    working_set = const WORKING_SET,
    factor = const FACTOR,
    step = const STEP,
);

unsafe extern "C" {
    static longhaul_demo_begin: u8;
    static longhaul_demo_tick: u8;
    static longhaul_demo_ignore: u8;
    static longhaul_demo_end: u8;
}

/// The payload's bytes, and where in them its interrupt handlers begin: that of the timer, and one that ignores.
fn code() -> (&'static [u8], u64, u64) {
    let begin = &raw const longhaul_demo_begin;
    let offset = |symbol: *const u8| symbol as usize - begin as usize;
    // SAFETY: everything between the two symbols is read-only data of this program, in one section.
    let bytes = unsafe { std::slice::from_raw_parts(begin, offset(&raw const longhaul_demo_end)) };
    let tick = offset(&raw const longhaul_demo_tick) as u64;
    (bytes, tick, offset(&raw const longhaul_demo_ignore) as u64)
}

/// Puts a guest into memory that is zero, in generation 0. The dials fit it.
pub(super) fn load(ram: &GuestRam, dials: &Dials, vcpus: usize, tsc_hz: u64) {
    let (code, tick, ignore) = code();
    for (number, part) in code.chunks(PAGE_SIZE).enumerate() {
        let mut page = [0; PAGE_SIZE];
        page[..part.len()].copy_from_slice(part);
        write(ram, CODE + (number * PAGE_SIZE) as u64, &page);
    }
    write(ram, GDT, &words(&[0, CODE_SEGMENT, DATA_SEGMENT]));
    let mut gates = [0; 512];
    for (vector, handler) in [(TIMER_VECTOR, tick), (SPURIOUS_VECTOR, ignore)] {
        // Present, an interrupt gate; no address here has more than 31 bits.
        let address = CODE + handler;
        gates[vector * 2] = address & 0xffff | CODE_SELECTOR << 16 | 0x8e00 << 32 | address >> 16 << 48;
    }
    write(ram, IDT, &words(&gates));
    let level = PAGE_SIZE as u64;
    write(ram, PAGE_TABLES, &words(&[(PAGE_TABLES + level) | 3]));
    let directories = PAGE_TABLES + 2 * level;
    let pointers: [u64; 4] = std::array::from_fn(|number| (directories + number as u64 * level) | 3);
    write(ram, PAGE_TABLES + level, &words(&pointers));
    for directory in 0..4_u64 {
        // Present, writable, 2 MiB.
        let entries: [u64; 512] = std::array::from_fn(|entry| (directory * 512 + entry as u64) << 21 | 0x83);
        write(ram, directories + directory * level, &words(&entries));
    }
    write(ram, PARAMETERS, &dials.parameters(vcpus, tsc_hz));
    let mut counters = [0; PAGE_SIZE / 8];
    for number in 0..vcpus {
        let own = &mut counters[number * COUNTERS_SIZE as usize / 8..];
        let (_, pages) = share(dials.pages(), vcpus, number);
        // One page alone is no tenth.
        own[counter::HOT / 8] = (pages / 10).max(u64::from(pages > 1));
        own[counter::NUMBER / 8] = number as u64;
    }
    write(ram, COUNTERS, &words(&counters));
    // Untouched, zero pages take no memory of the host.
    if dials.content != Content::Zero {
        for page in 0..dials.pages() {
            write(ram, WORKING_SET + page * level, &dials.content_of(page, 0));
        }
    }
}

/// The registers with which vCPU `number` enters the payload.
pub(super) fn registers(dials: &Dials, vcpus: usize, number: usize) -> kvm_regs {
    let (first, pages) = share(dials.pages(), vcpus, number);
    kvm_regs {
        rip: CODE,
        rflags: 2,
        rsp: STACKS + (number as u64 + 1) * PAGE_SIZE as u64,
        r8: first,
        r9: pages,
        r11: source(dials.seed, !(number as u64)),
        r12: COUNTERS + number as u64 * COUNTERS_SIZE,
        ..kvm_regs::default()
    }
}

/// 64-bit mode on the tables of [`load`], out of what a vCPU has after its creation.
pub(super) fn enter_long_mode(sregs: &mut kvm_sregs) {
    let data = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: DATA_SELECTOR as u16,
        type_: 3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = kvm_segment {
        selector: CODE_SELECTOR as u16,
        type_: 11,
        db: 0,
        l: 1,
        ..data
    };
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 3 * 8 - 1;
    sregs.idt.base = IDT;
    sregs.idt.limit = PAGE_SIZE as u16 - 1;
    sregs.cr3 = PAGE_TABLES;
    // Physical address extension.
    sregs.cr4 = 1 << 5;
    // Paging, write protection, numeric errors, extension type, protection.
    sregs.cr0 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1;
    // Long mode, enabled and active.
    sregs.efer = 1 << 8 | 1 << 10;
}

fn write(ram: &GuestRam, address: u64, page: &[u8; PAGE_SIZE]) {
    ram.write(0, address / PAGE_SIZE as u64, page);
}

/// A page of these words, zero after them.
fn words(words: &[u64]) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    for (place, word) in page.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    page
}

const TIMER_VECTOR: usize = 0x40;
const SPURIOUS_VECTOR: usize = 0xff;
/// Few enough for a host that emulates the guest's code.
const TICKS_PER_SECOND: u64 = 100;
const CODE_SELECTOR: u64 = 8;
const DATA_SELECTOR: u64 = 16;
const CODE_SEGMENT: u64 = 0x00af_9b00_0000_ffff;
const DATA_SEGMENT: u64 = 0x00cf_9300_0000_ffff;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_fits_before_the_stacks() {
        let (bytes, tick, ignore) = code();
        assert!(!bytes.is_empty() && bytes.len() as u64 <= STACKS - CODE);
        assert!(tick < ignore && ignore < bytes.len() as u64);
    }
}
