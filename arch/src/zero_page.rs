//! The zero page, `struct boot_params` (Linux "Zero Page" and "The Linux/x86 Boot Protocol").

use linux_loader::bootparam::{
    CAN_USE_HEAP, E820_MAX_ENTRIES_ZEROPAGE, LOADED_HIGH, boot_e820_entry, boot_params,
    setup_header,
};
use vm_memory::ByteValued;

use crate::memory_map::MemoryMapEntry;

/// `HdrS`.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// A loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// Protocol that an ELF kernel is entered by; an image with a header names its own.
const PROTOCOL: u16 = 0x20f;
const ELF_ALIGNMENT: u32 = 0x100_0000;

/// What the zero page is made from. Addresses are guest-physical, sizes in bytes.
#[derive(Clone, Copy, Debug)]
pub struct ZeroPage<'a> {
    /// The setup header of the image; `None` for an ELF kernel.
    pub setup_header: Option<setup_header>,
    /// Address of the NUL-terminated command line.
    pub cmdline: u64,
    /// Length of the command line without its NUL.
    pub cmdline_size: u32,
    /// Address and size of the initramfs.
    pub initramfs: Option<(u64, u64)>,
    /// Address of the RSDP.
    pub rsdp: Option<u64>,
    /// The memory map; entries past the 128 that fit are left out.
    pub memory_map: &'a [MemoryMapEntry],
}

/// The page's 4096 bytes, to be placed at [`crate::layout::ZERO_PAGE_START`].
pub fn zero_page(from: &ZeroPage<'_>) -> Vec<u8> {
    let mut header = from.setup_header.unwrap_or(setup_header {
        version: PROTOCOL,
        loadflags: LOADED_HIGH,
        kernel_alignment: ELF_ALIGNMENT,
        cmdline_size: from.cmdline_size,
        ..setup_header::default()
    });
    header.boot_flag = BOOT_FLAG;
    header.header = HEADER_MAGIC;
    header.type_of_loader = LOADER_UNDEFINED;
    // There is no real-mode heap.
    header.loadflags &= !CAN_USE_HEAP;
    header.cmd_line_ptr = from.cmdline as u32;
    // No list of `setup_data` is passed on, whatever the image says.
    header.setup_data = 0;
    let (image, size) = from.initramfs.unwrap_or((0, 0));
    header.ramdisk_image = image as u32;
    header.ramdisk_size = size as u32;

    let mut page = boot_params {
        hdr: header,
        acpi_rsdp_addr: from.rsdp.unwrap_or(0),
        ext_ramdisk_image: (image >> 32) as u32,
        ext_ramdisk_size: (size >> 32) as u32,
        ext_cmd_line_ptr: (from.cmdline >> 32) as u32,
        ..boot_params::default()
    };
    let mut table = [boot_e820_entry::default(); E820_MAX_ENTRIES_ZEROPAGE];
    let mut count = 0;
    for (slot, entry) in table.iter_mut().zip(from.memory_map) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.size,
            r#type: entry.kind as u32,
        };
        count += 1;
    }
    page.e820_table = table;
    page.e820_entries = count;
    page.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::ram_regions;
    use crate::memory_map::{Kind, memory_map};

    fn page(header: Option<setup_header>, initramfs: Option<(u64, u64)>) -> Vec<u8> {
        zero_page(&ZeroPage {
            setup_header: header,
            cmdline: 0x2_0000,
            cmdline_size: 7,
            initramfs,
            rsdp: Some(0xa_0000),
            memory_map: &memory_map(&ram_regions(128 << 20)),
        })
    }

    fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
        let mut value = [0; 8];
        value[..len].copy_from_slice(&bytes[at..at + len]);
        u64::from_le_bytes(value)
    }

    #[test]
    fn fields_are_where_the_protocol_has_them() {
        let bytes = page(None, Some((0x1_2345_6000, 0x2_0000_0010)));
        assert_eq!(bytes.len(), 4096);
        for (at, len, wanted) in [
            (0x070, 8, 0xa_0000),
            (0x0c0, 4, 1),
            (0x0c4, 4, 2),
            (0x0c8, 4, 0),
            (0x1e8, 1, 4),
            (0x1ef, 1, 0),
            (0x1fe, 2, 0xaa55),
            (0x202, 4, 0x5372_6448),
            (0x206, 2, 0x20f),
            (0x210, 1, 0xff),
            (0x211, 1, 1),
            (0x218, 4, 0x2345_6000),
            (0x21c, 4, 0x10),
            (0x228, 4, 0x2_0000),
            (0x230, 4, 0x100_0000),
            (0x238, 4, 7),
            (0x250, 8, 0),
            (0x2d0, 8, 0),
            (0x2d8, 8, 0x9_fc00),
            (0x2e0, 4, 1),
            (0x2e4, 8, 0x9_fc00),
            (0x2ec, 8, 0x6_0400),
            (0x2f4, 4, 2),
            (0x2f8, 8, 0x10_0000),
            (0x300, 8, 127 << 20),
        ] {
            assert_eq!(number(&bytes, at, len), wanted, "at {at:#x}");
        }
        // All else is zero.
        let set: Vec<usize> = (0..4096).filter(|at| bytes[*at] != 0).collect();
        assert!(set.iter().all(|at| (0x070..0x320).contains(at)), "{set:x?}");
    }

    #[test]
    fn header_of_the_image_is_kept_but_for_what_the_loader_fills_in() {
        let header = setup_header {
            setup_sects: 31,
            version: 0x20c,
            loadflags: 0x81,
            type_of_loader: 0,
            init_size: 0x123_4000,
            setup_data: 0xdead_beef,
            cmdline_size: 2047,
            xloadflags: 1,
            ..setup_header::default()
        };
        let bytes = page(Some(header), None);
        for (at, len, wanted) in [
            (0x1f1, 1, 31),
            (0x206, 2, 0x20c),
            (0x210, 1, 0xff),
            (0x211, 1, 1),
            (0x218, 8, 0),
            (0x236, 2, 1),
            (0x238, 4, 2047),
            (0x250, 8, 0),
            (0x260, 4, 0x123_4000),
        ] {
            assert_eq!(number(&bytes, at, len), wanted, "at {at:#x}");
        }
    }

    #[test]
    fn a_map_too_long_is_cut() {
        let entry = MemoryMapEntry {
            start: 0,
            size: 1,
            kind: Kind::Ram,
        };
        let bytes = zero_page(&ZeroPage {
            setup_header: None,
            cmdline: 0,
            cmdline_size: 0,
            initramfs: None,
            rsdp: None,
            memory_map: &[entry; 200],
        });
        assert_eq!(bytes[0x1e8], 128);
        assert_eq!(bytes[0xcd0..], [0; 4096 - 0xcd0]);
    }
}
