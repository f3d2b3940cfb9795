//! A guest on a disk that it writes and checks for ever.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::guest::Machine;
use super::site::VmPlan;
use super::{noise, until};

/// Real-mode code, for the first sector of the disk. It writes sectors 2048 to 18431 in turn through the BIOS, each full of the number of the write,
/// and reads another one after each: that has the newest number that belongs there, or the guest says `B` on the debug console. After 128 good ones
/// it says `k`.
#[rustfmt::skip]
const CODE: [u8; 182] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0,       // cli; ds = es = ss = 0
    0xbc, 0x00, 0x7c, 0xfb, 0xfc,                               // mov sp, 0x7c00; sti; cld
    0x88, 0x16, 0xf0, 0x7d,                                     // mov [0x7df0], dl         the disk
    0x66, 0xff, 0x06, 0xf4, 0x7d,                               // again: inc dword [0x7df4]     the number
    0x66, 0xa1, 0xf4, 0x7d,                                     // mov eax, [0x7df4]
    0xbf, 0x00, 0x80, 0xb9, 0x80, 0x00, 0x66, 0xf3, 0xab,       // mov di, 0x8000; mov cx, 128; rep stosd
    0xb6, 0x43, 0x66, 0xa1, 0xf4, 0x7d, 0xe8, 0x47, 0x00,       // mov dh, 0x43 (write); mov eax, [0x7df4]; call disk
    0x66, 0xa1, 0xf4, 0x7d, 0x66, 0x6b, 0xc0, 0x05,             // mov eax, [0x7df4]; imul eax, 5
    0xb6, 0x42, 0xe8, 0x3a, 0x00,                               // mov dh, 0x42 (read); call disk
    0x66, 0xa1, 0xf4, 0x7d, 0x66, 0x89, 0xc2, 0x66, 0x29, 0xda, // mov eax, [0x7df4]; mov edx, eax; sub edx, ebx
    0x66, 0x81, 0xe2, 0xff, 0x3f, 0x00, 0x00,                   // and edx, 0x3fff
    0x66, 0x29, 0xd0, 0x7f, 0x03, 0x66, 0x31, 0xc0,             // sub eax, edx; jg +3; xor eax, eax
    0x66, 0x39, 0x06, 0x00, 0x80, 0x75, 0x14,                   // cmp [0x8000], eax; jne bad
    0x66, 0x39, 0x06, 0xfc, 0x81, 0x75, 0x0d,                   // cmp [0x81fc], eax; jne bad
    0xf6, 0x06, 0xf4, 0x7d, 0x7f, 0x75, 0xaa,                   // test byte [0x7df4], 0x7f; jnz again
    0xb0, 0x6b, 0xe6, 0xe9, 0xeb, 0xa4,                         // mov al, 'k'; out 0xe9, al; jmp again
    0xb0, 0x42, 0xe6, 0xe9, 0xeb, 0x9e,                         // bad: mov al, 'B'; out 0xe9, al; jmp again
    0x66, 0x25, 0xff, 0x3f, 0x00, 0x00, 0x66, 0x89, 0xc3,       // disk: and eax, 0x3fff; mov ebx, eax
    0x66, 0x05, 0x00, 0x08, 0x00, 0x00,                         // add eax, 2048
    0x66, 0xc7, 0x06, 0xe0, 0x7d, 0x10, 0x00, 0x01, 0x00,       // one sector …
    0x66, 0xc7, 0x06, 0xe4, 0x7d, 0x00, 0x80, 0x00, 0x00,       // … at 0000:8000 …
    0x66, 0xa3, 0xe8, 0x7d,                                     // … of this number
    0x66, 0xc7, 0x06, 0xec, 0x7d, 0x00, 0x00, 0x00, 0x00,
    0x88, 0xf4, 0x30, 0xc0, 0x8a, 0x16, 0xf0, 0x7d,             // mov ah, dh; xor al, al; mov dl, [0x7df0]
    0xbe, 0xe0, 0x7d, 0x66, 0x53, 0xcd, 0x13, 0x66, 0x5b,       // mov si, 0x7de0; push ebx; int 0x13; pop ebx
    0x72, 0xb9, 0xc3,                                           // jc bad; ret
];

/// Bytes of the disk.
pub(crate) const SIZE: u64 = 64 << 20;

/// The first byte that the guest does not touch.
pub(crate) const UNTOUCHED: u64 = 18432 * 512;

/// The machine whose disk `vda` is the image `file` of this format.
pub(crate) fn machine(file: &Path, format: &str) -> Machine {
    machine_on(
        file,
        format,
        &json!({ "driver": "file", "filename": file, "discard": "unmap" }),
    )
}

/// The same, where the file fails.
pub(crate) fn failing_machine(file: &Path, format: &str, failure: &Value) -> Machine {
    let node =
        json!({ "driver": "blkdebug", "image": { "driver": "file", "filename": file }, "inject-error": [failure] });
    machine_on(file, format, &node)
}

/// The same, where the file takes so many bytes a second, of whoever reads or writes it.
pub(crate) fn slow_machine(file: &Path, format: &str, bytes_per_second: u64) -> Machine {
    let node =
        json!({ "driver": "throttle", "throttle-group": "slow", "file": { "driver": "file", "filename": file } });
    let group = format!("throttle-group,id=slow,x-bps-total={bytes_per_second}");
    // Before whoever is in the group.
    let Machine { more, .. } = machine_on(file, format, &node);
    let words: Vec<&str> = ["-object", group.as_str()]
        .into_iter()
        .chain(more.iter().map(String::as_str))
        .collect();
    Machine::firmware().with(&words)
}

fn machine_on(file: &Path, format: &str, protocol: &Value) -> Machine {
    let says = file.with_extension("says");
    let node = json!({ "driver": format, "node-name": "disk", "discard": "unmap", "file": protocol });
    Machine::firmware().with(&[
        "-blockdev",
        &node.to_string(),
        "-device",
        "virtio-blk-pci,id=vda,drive=disk,bootindex=0",
        "-debugcon",
        &format!("file:{}", says.display()),
    ])
}

/// What a site knows of the VM: its disk is made as `file`, in this format.
pub(crate) fn plan(plan: &mut VmPlan, folder: &Path, file: &Path, format: &str) {
    plan_with(plan, folder, file, format, machine(file, format));
}

/// The same with another machine.
pub(crate) fn plan_with(plan: &mut VmPlan, folder: &Path, file: &Path, format: &str, machine: Machine) {
    plan.machine = machine;
    let mut command = plan.machine.command(folder, "{qmp}");
    command.extend(["-incoming", "defer", "-S"].map(str::to_owned));
    plan.command = Some(command);
    plan.settings = "disks = \"copied\"".to_owned();
    plan.tables = format!(
        "[[vm.image]]\ndisk = \"vda\"\npath = {}\nformat = \"{format}\"\n",
        json!(file)
    );
}

/// Makes an image from which the guest boots, with bytes behind what it writes.
pub(crate) fn make(file: &Path, format: &str) {
    let mut sector = CODE.to_vec();
    sector.resize(512, 0);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let raw = file.with_extension("made");
    std::fs::write(&raw, sector).unwrap();
    let disk = std::fs::OpenOptions::new().write(true).open(&raw).unwrap();
    disk.set_len(SIZE).unwrap();
    let content = noise(8 << 20, 1);
    std::os::unix::fs::FileExt::write_all_at(&disk, &content, UNTOUCHED).unwrap();
    convert(&raw, "raw", file, format);
    std::fs::remove_file(raw).unwrap();
}

/// Changes a raw image.
pub(crate) fn write_at(file: &Path, offset: u64, bytes: &[u8]) {
    let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, offset).unwrap();
}

/// Makes another image of one that nobody writes.
pub(crate) fn convert(from: &Path, format: &str, to: &Path, to_format: &str) {
    run(
        "qemu-img",
        &["convert", "-U", "-f", format, "-O", to_format, path(from), path(to)],
    );
}

/// The whole of what a guest would see of an image that nobody uses.
pub(crate) fn content(file: &Path, format: &str) -> Vec<u8> {
    let raw = file.with_extension("content");
    convert(file, format, &raw, "raw");
    let content = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    content
}

/// The number of the newest write that is on the disk.
pub(crate) fn newest(content: &[u8]) -> u32 {
    let sectors = content[2048 * 512..UNTOUCHED as usize].chunks_exact(512);
    let numbers = sectors.map(|sector| u32::from_le_bytes(sector[..4].try_into().unwrap()));
    numbers.max().unwrap()
}

/// Waits until the guest has checked some more of its disk, and found all of it as it was written.
#[track_caller]
pub(crate) fn assert_checks(file: &Path) {
    let says = file.with_extension("says");
    let said = || std::fs::read(&says).unwrap_or_default();
    let before = said().len();
    until("the guest has checked its disk", || said().len() > before + 8);
    let bad = said().iter().filter(|byte| **byte == b'B').count();
    assert_eq!(bad, 0, "sectors are not what was written there");
}

fn path(file: &Path) -> &str {
    file.to_str().unwrap()
}

#[track_caller]
fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}
