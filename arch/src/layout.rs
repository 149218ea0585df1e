//! The guest's physical address space: where RAM, boot structures, tables and devices lie. Everything else in
//! this crate, and the memory manager and device manager of the VMM, take their addresses from here.
//!
//! ```
//! use arch::layout::{HIGH_RAM_START, ram_regions};
//!
//! let regions = ram_regions(4 << 30);
//! assert_eq!(regions.len(), 2);
//! assert_eq!(regions[0].1 + regions[1].1, 4 << 30);
//! assert_eq!(HIGH_RAM_START, 1 << 20);
//! ```

use vm_memory::GuestAddress;

/// Global descriptor table of the boot CPU, [`crate::gdt::GDT_SIZE`] bytes.
pub const GDT_START: u64 = 0x500;
/// Interrupt descriptor table of the boot CPU: one empty entry, so that any exception is a triple fault.
pub const IDT_START: u64 = 0x520;
/// PVH start info, 56 bytes.
pub const PVH_INFO_START: u64 = 0x6000;
/// PVH module list, 32 bytes a module.
pub const PVH_MODLIST_START: u64 = 0x6040;
/// PVH memory map, 24 bytes an entry, up to the boot stack's page.
pub const PVH_MEMMAP_START: u64 = 0x7000;
/// Bytes that the PVH memory map may take.
pub const PVH_MEMMAP_SIZE: u64 = 0x1000;
/// Zero page (`struct boot_params`) of the Linux boot protocol, 4 KiB. A boot uses this or the PVH memory map.
pub const ZERO_PAGE_START: u64 = 0x7000;
/// First stack pointer; the stack grows down from it to 0x8000.
pub const BOOT_STACK_POINTER: u64 = 0x8ff0;
/// Page map level 5, used with 5-level paging only.
pub const PML5_START: u64 = 0x9000;
/// Page map level 4.
pub const PML4_START: u64 = 0xa000;
/// Page-directory-pointer table.
pub const PDPT_START: u64 = 0xb000;
/// Page directory: 512 pages of 2 MiB.
pub const PD_START: u64 = 0xc000;
/// End (exclusive) of the boot page tables.
pub const PAGE_TABLES_END: u64 = 0xd000;
/// Kernel command line.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Bytes that the command line may take, its terminating NUL included.
pub const CMDLINE_MAX_SIZE: u64 = 0x1_0000;
/// Where usable low memory ends: the extended BIOS data area, which holds the MP table.
pub const EBDA_START: u64 = 0x9_fc00;
/// ACPI tables, the RSDP first; they end at [`SMBIOS_START`].
pub const ACPI_START: u64 = 0xa_0000;
/// SMBIOS entry point and structures, up to 1 MiB.
pub const SMBIOS_START: u64 = 0xf_0000;
/// High RAM: where kernels are loaded.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// End (exclusive) of RAM below 4 GiB.
pub const RAM_32BIT_END: u64 = 0xc000_0000;
/// First address for 32-bit devices.
pub const DEVICES_32BIT_START: u64 = RAM_32BIT_END;
/// Bytes for 32-bit devices: 640 MiB, up to [`MMCONFIG_START`].
pub const DEVICES_32BIT_SIZE: u64 = 640 << 20;
/// PCI Express configuration space of segment 0.
pub const MMCONFIG_START: u64 = DEVICES_32BIT_START + DEVICES_32BIT_SIZE;
/// Bytes of a segment's configuration space: 256 buses of 1 MiB.
pub const MMCONFIG_SIZE: u64 = 256 << 20;
/// Registers of the IOAPIC.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Bytes that the IOAPIC decodes.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Registers of the local APICs.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// Bytes that a local APIC decodes.
pub const LAPIC_SIZE: u64 = 0x1000;
/// Three pages that KVM on Intel takes for itself (KVM_SET_TSS_ADDR).
pub const TSS_START: u64 = 0xfffb_d000;
/// Where RAM goes on past the 32-bit hole; 64-bit devices lie above its end.
pub const RAM_64BIT_START: u64 = 0x1_0000_0000;

/// What the boot protocols and firmware tables occupy below 1 MiB, as `(start, end)` with the end exclusive. No
/// kernel segment may lie there.
pub const LOW_STRUCTURES: [(u64, u64); 3] = [
    (0, PAGE_TABLES_END),
    (CMDLINE_START, CMDLINE_START + CMDLINE_MAX_SIZE),
    (EBDA_START, HIGH_RAM_START),
];

/// Start and length in bytes of the RAM regions of a guest with `size` bytes: up to 3 GiB at 0, the rest from
/// 4 GiB. None for a size of 0; at most what the address space holds above 4 GiB.
pub fn ram_regions(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(RAM_32BIT_END);
    let high = (size - low).min(u64::MAX - RAM_64BIT_START);
    [(0, low), (RAM_64BIT_START, high)]
        .into_iter()
        .filter(|(_, len)| *len > 0)
        .map(|(start, len)| (GuestAddress(start), len))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_fills_the_low_part_first() {
        assert_eq!(ram_regions(0), []);
        assert_eq!(ram_regions(1), [(GuestAddress(0), 1)]);
        assert_eq!(ram_regions(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(
            ram_regions((3 << 30) + 4096),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 4096)]
        );
        assert_eq!(ram_regions(u64::MAX).len(), 2);
    }

    #[test]
    fn places_are_those_of_the_surface() {
        assert_eq!(MMCONFIG_START, 0xe800_0000);
        assert_eq!(MMCONFIG_START + MMCONFIG_SIZE, 0xf800_0000);
        assert_eq!(ACPI_START, crate::acpi::TABLES_START);
        assert_eq!(SMBIOS_START, crate::acpi::TABLES_END);
        assert_eq!(SMBIOS_START, crate::smbios::SMBIOS_START);
        assert_eq!(EBDA_START, crate::mptable::MPTABLE_START);
        assert_eq!(IOAPIC_START, u64::from(crate::acpi::IOAPIC_ADDRESS));
        assert_eq!(LAPIC_START, u64::from(crate::acpi::LAPIC_ADDRESS));
    }

    #[test]
    fn nothing_overlaps() {
        let places = [
            (GDT_START, crate::gdt::GDT_SIZE),
            (IDT_START, 8),
            (PVH_INFO_START, 56),
            (PVH_MODLIST_START, 32),
            (PVH_MEMMAP_START, PVH_MEMMAP_SIZE),
            (0x8000, BOOT_STACK_POINTER - 0x8000),
            (PML5_START, 0x1000),
            (PML4_START, 0x1000),
            (PDPT_START, 0x1000),
            (PD_START, 0x1000),
            (CMDLINE_START, CMDLINE_MAX_SIZE),
            (EBDA_START, 0x400),
            (ACPI_START, SMBIOS_START - ACPI_START),
            (SMBIOS_START, 0x1_0000),
            (HIGH_RAM_START, RAM_32BIT_END - HIGH_RAM_START),
            (DEVICES_32BIT_START, DEVICES_32BIT_SIZE),
            (MMCONFIG_START, MMCONFIG_SIZE),
            (IOAPIC_START, IOAPIC_SIZE),
            (LAPIC_START, LAPIC_SIZE),
            (TSS_START, 0x3000),
            (RAM_64BIT_START, 1),
        ];
        for pair in places.windows(2) {
            let ((start, len), (next, _)) = (pair[0], pair[1]);
            assert!(
                start + len <= next,
                "{start:#x} + {len:#x} runs into {next:#x}"
            );
        }
    }
}
