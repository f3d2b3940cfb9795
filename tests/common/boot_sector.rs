//! A guest without files of its own that writes for ever.

/// Real-mode code at 0x7c00 that reports on COM1, then writes to every page from 0x10000 to 0x8ffff for ever.
///
/// It switches A20 in every pass, which changes nothing below 1 MiB but makes TCG flush its TLB: QEMU 7.2 misses writes
/// through entries that were there when it synchronised the dirty bitmap.
pub(crate) fn boot_sector() -> Vec<u8> {
    let code: &[&[u8]] = &[
        &[0xfa],                                     // cli
        &[0xba, 0xf8, 0x03, 0xb0, b'R', 0xee],       // mov dx, 0x3f8; mov al, 'R'; out dx, al
        &[0x31, 0xc9],                               // xor cx, cx
        &[0xe4, 0x92, 0x34, 0x02, 0xe6, 0x92],       // pass: in al, 0x92; xor al, 2; out 0x92, al
        &[0xbb, 0x00, 0x10],                         // mov bx, 0x1000
        &[0x8e, 0xc3],                               // segment: mov es, bx
        &[0x31, 0xff],                               // xor di, di
        &[0x26, 0x89, 0x0d, 0x26, 0xff, 0x45, 0x40], // page: mov es:[di], cx; inc word es:[di + 0x40]
        &[0x81, 0xc7, 0x00, 0x10, 0x75, 0xf3],       // add di, 0x1000; jnz page
        &[0x81, 0xc3, 0x00, 0x10],                   // add bx, 0x1000
        &[0x81, 0xfb, 0x00, 0x90, 0x75, 0xe5],       // cmp bx, 0x9000; jnz segment
        &[0x41, 0xeb, 0xd9],                         // inc cx; jmp pass
    ];
    let mut sector = code.concat();
    sector.resize(1 << 20, 0);
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    sector
}
