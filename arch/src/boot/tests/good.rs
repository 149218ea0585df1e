//! What lies where after a good payload was loaded.

use super::images::{BzImage, Elf, Part};
use super::*;
use crate::boot::Protocol;
use crate::{gdt, paging};

const MIB: u64 = 1 << 20;

#[test]
fn elf_by_pvh() {
    let memory = memory(64 * MIB);
    // What was there before goes where the image says zero, and stays elsewhere.
    memory
        .write_slice(&[0xff; 0x2000], GuestAddress(0x10_0000))
        .unwrap();
    let loaded = boot(&memory, &Elf::pvh().bytes(), Some(b"initramfs"), "a=b c").unwrap();
    assert_eq!((loaded.protocol, loaded.entry), (Protocol::Pvh, 0x10_0020));
    assert_eq!(loaded.initramfs, Some((64 * MIB - 0x1000, 9)));
    assert_eq!((loaded.cmdline_address, loaded.cmdline_size), (0x2_0000, 5));
    assert!(loaded.setup_header.is_none());
    assert_eq!(bytes(&memory, 0x10_0000, 0x1234), [0x90; 0x1234]);
    assert_eq!(bytes(&memory, 0x10_1234, 0x100), [0; 0x100]);
    assert_eq!(bytes(&memory, 0x10_1334, 0x100), [0xff; 0x100]);
    assert_eq!(bytes(&memory, 64 * MIB - 0x1000, 10), *b"initramfs\0");
    assert_eq!(bytes(&memory, 0x2_0000, 6), *b"a=b c\0");

    loaded.write_boot_data(&memory, Some(0xa_0000)).unwrap();
    let info: Vec<u64> = (0..7).map(|n| word(&memory, 0x6000 + n * 8)).collect();
    let wanted = [
        0x1_336e_c578,
        0x1_0000_0000,
        0x6040,
        0x2_0000,
        0xa_0000,
        0x7000,
        4,
    ];
    assert_eq!(info, wanted);
    assert_eq!(word(&memory, 0x6040), 64 * MIB - 0x1000);
    assert_eq!(word(&memory, 0x6048), 9);
    let map: Vec<u64> = (0..12).map(|n| word(&memory, 0x7000 + n * 8)).collect();
    let wanted = [
        0,
        0x9_fc00,
        1,
        0x9_fc00,
        0x6_0400,
        2,
        MIB,
        63 * MIB,
        1,
        0xe800_0000,
        256 * MIB,
        2,
    ];
    assert_eq!(map, wanted);
    assert_eq!(bytes(&memory, 0x500, 32), gdt::gdt());
    assert_eq!(bytes(&memory, 0x9000, 0x4000), [0; 0x4000]);
}

#[test]
fn elf_by_linux64() {
    let memory = memory(64 * MIB);
    let loaded = boot(&memory, &Elf::linux().bytes(), None, "").unwrap();
    assert_eq!((loaded.protocol, loaded.entry), (Protocol::Linux64, MIB));
    assert_eq!(loaded.initramfs, None);
    loaded.write_boot_data(&memory, None).unwrap();
    assert_eq!(bytes(&memory, 0x1fe + 0x7000, 8), *b"\x55\xaa\0\0HdrS");
    assert_eq!(word(&memory, 0x7070), 0);
    assert_eq!(bytes(&memory, 0x71e8, 1), [4]);
    assert_eq!(bytes(&memory, 0x7218, 8), [0; 8]);
    assert_eq!(bytes(&memory, 0x7228, 4), [0, 0, 2, 0]);
    assert_eq!(bytes(&memory, 0x500, 32), gdt::gdt());
    assert_eq!(bytes(&memory, 0x9000, 0x4000), paging::page_tables());
    assert_eq!(bytes(&memory, 0x6000, 0x1000), [0; 0x1000]);
}

#[test]
fn pvh_note_of_eight_bytes() {
    let mut image = Elf::linux();
    image.parts.push(Part::pvh(&0x10_0020u64.to_le_bytes()));
    let loaded = boot(&memory(2 * MIB), &image.bytes(), None, "").unwrap();
    assert_eq!((loaded.protocol, loaded.entry), (Protocol::Pvh, 0x10_0020));
}

#[test]
fn segments_come_in_any_order_and_low_ones_where_nothing_else_is() {
    let mut image = Elf::pvh();
    image.parts.insert(0, Part::load(0x80_0000, b"second"));
    image.parts.push(Part::load(0x3_0000, b"low"));
    image.parts.push(Part::load(0xd000, b"lower"));
    let memory = memory(16 * MIB);
    let loaded = boot(&memory, &image.bytes(), Some(&[7; 0x60_0000]), "").unwrap();
    assert_eq!(bytes(&memory, 0x80_0000, 6), *b"second");
    assert_eq!(bytes(&memory, 0x3_0000, 3), *b"low");
    assert_eq!(bytes(&memory, 0xd000, 5), *b"lower");
    // Above the highest segment, although there is as much room between the two.
    assert_eq!(loaded.initramfs, Some((0xa0_0000, 0x60_0000)));
}

#[test]
fn bzimage() {
    let memory = memory(64 * MIB);
    let image = BzImage::sound();
    let initramfs = [5; 0x1800];
    let loaded = boot(&memory, &image.bytes(), Some(&initramfs), "quiet").unwrap();
    assert_eq!(loaded.protocol, Protocol::Linux64);
    assert_eq!(loaded.entry, 0x100_0200);
    assert_eq!(bytes(&memory, 0x100_0000, 0x3000), image.kernel);
    assert_eq!(loaded.initramfs, Some((64 * MIB - 0x2000, 0x1800)));
    loaded.write_boot_data(&memory, Some(0xa_0000)).unwrap();

    let page = bytes(&memory, 0x7000, 0x1000);
    let file = image.bytes();
    // The header as it is in the file, but for what a loader fills in.
    let mut wanted = file[0x1f1..0x26c].to_vec();
    for (at, field) in [
        (0x210, &[0xffu8][..]),
        (0x218, &0x3ff_e000u32.to_le_bytes()),
        (0x21c, &0x1800u32.to_le_bytes()),
        (0x228, &0x2_0000u32.to_le_bytes()),
    ] {
        wanted[at - 0x1f1..][..field.len()].copy_from_slice(field);
    }
    assert_eq!(page[0x1f1..0x26c], wanted);
    assert_eq!(page[0x26c..0x2d0], [0; 0x64]);
    assert_eq!(page[0x70..0x78], 0xa_0000u64.to_le_bytes());
    assert_eq!(page[0x1e8], 4);
}

#[test]
fn bzimage_of_old_tools_has_four_setup_sectors_and_no_size() {
    let mut image = BzImage::sound();
    image.setup_sectors = 0;
    image.system_size = Some(0);
    let memory = memory(64 * MIB);
    boot(&memory, &image.bytes(), None, "").unwrap();
    assert_eq!(bytes(&memory, 0x100_0000, 0x3000), image.kernel);
}

#[test]
fn initramfs_keeps_clear_of_what_a_bzimage_unpacks_to() {
    let image = BzImage::sound().bytes();
    // 16 MiB to 18 MiB are the kernel's, and RAM ends there.
    let memory = memory(18 * MIB);
    let loaded = boot(&memory, &image, Some(&[1; 0x1001]), "").unwrap();
    assert_eq!(loaded.initramfs, Some((16 * MIB - 0x2000, 0x1001)));
}

#[test]
fn initramfs_keeps_below_the_limits_of_kernel_and_layout() {
    // Neither memory of this size nor the hole is ever touched, so it costs nothing.
    let memory = memory(5 << 30);
    let place = |kernel: &[u8]| {
        let loaded = boot(&memory, kernel, Some(&[1; 0x1000]), "").unwrap();
        loaded.initramfs.unwrap().0
    };
    assert_eq!(place(&Elf::pvh().bytes()), (3 << 30) - 0x1000);
    assert_eq!(place(&BzImage::sound().bytes()), 0x7fff_f000);
    let mut low = BzImage::sound();
    low.initrd_addr_max = 0x37ff_ffff;
    assert_eq!(place(&low.bytes()), 0x37ff_f000);
    low.initrd_addr_max = u32::MAX;
    assert_eq!(place(&low.bytes()), (3 << 30) - 0x1000);
}

#[test]
fn the_longest_command_line() {
    let memory = memory(64 * MIB);
    let long = "x".repeat(0xffff);
    let loaded = boot(&memory, &Elf::pvh().bytes(), None, &long).unwrap();
    assert_eq!(loaded.cmdline_size, 0xffff);
    assert_eq!(bytes(&memory, 0x2_fffe, 2), *b"x\0");
    boot(&memory, &BzImage::sound().bytes(), None, &long[..2047]).unwrap();
}
