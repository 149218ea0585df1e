//! A loaded payload, and the structures that its boot protocol hands over.

use linux_loader::bootparam::setup_header;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::error::BootError;
use crate::layout::{
    CMDLINE_START, GDT_START, IDT_START, PML5_START, PVH_INFO_START, PVH_MEMMAP_SIZE,
    PVH_MEMMAP_START, PVH_MODLIST_START, ZERO_PAGE_START,
};
use crate::memory_map::memory_map;
use crate::pvh::{self, PvhInfo};
use crate::zero_page::{ZeroPage, zero_page};
use crate::{gdt, paging};

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// 32-bit protected mode with a start info structure (Xen `docs/misc/pvh`).
    Pvh,
    /// Long mode with a zero page ("The Linux/x86 Boot Protocol", 64-bit boot protocol).
    Linux64,
}

/// A payload in guest memory. Addresses are guest-physical, sizes in bytes.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// How the kernel is entered.
    pub protocol: Protocol,
    /// Its first instruction.
    pub entry: u64,
    /// Address and size of the initramfs.
    pub initramfs: Option<(u64, u64)>,
    /// Address of the command line.
    pub cmdline_address: u64,
    /// Length of the command line without its terminating NUL.
    pub cmdline_size: u32,
    /// The setup header of a bzImage.
    pub setup_header: Option<setup_header>,
}

impl Loaded {
    /// Writes GDT, IDT and what the protocol hands over: start info, module list and memory map (PVH), or zero page
    /// and page tables (Linux). `rsdp` is the address of the ACPI tables' root, if there are any. All of `memory`
    /// is told to the guest as RAM.
    ///
    /// # Errors
    /// [`BootError::Memory`] if `memory` has no RAM at a structure's place.
    pub fn write_boot_data<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        rsdp: Option<u64>,
    ) -> Result<(), BootError> {
        let regions: Vec<_> = memory
            .iter()
            .map(|region| (region.start_addr(), region.len()))
            .collect();
        let map = memory_map(&regions);
        write(memory, "GDT", GDT_START, &gdt::gdt())?;
        write(memory, "IDT", IDT_START, &[0; 8])?;
        match self.protocol {
            Protocol::Pvh => {
                let fits = PVH_MEMMAP_SIZE as usize / pvh::MEMORY_MAP_ENTRY_SIZE;
                let info = PvhInfo {
                    cmdline: self.cmdline_address,
                    initramfs: self.initramfs,
                    rsdp,
                    memory_map: map.get(..fits).unwrap_or(&map),
                };
                let map = pvh::memory_map(&info);
                write(memory, "PVH memory map", PVH_MEMMAP_START, &map)?;
                let modules = pvh::modules(&info);
                write(memory, "PVH module list", PVH_MODLIST_START, &modules)?;
                let info = pvh::start_info(&info);
                write(memory, "PVH start info", PVH_INFO_START, &info)
            }
            Protocol::Linux64 => {
                let page = zero_page(&ZeroPage {
                    setup_header: self.setup_header,
                    cmdline: self.cmdline_address,
                    cmdline_size: self.cmdline_size,
                    initramfs: self.initramfs,
                    rsdp,
                    memory_map: &map,
                });
                write(memory, "zero page", ZERO_PAGE_START, &page)?;
                write(memory, "page tables", PML5_START, &paging::page_tables())
            }
        }
    }
}

/// Writes a command line and its NUL.
pub(super) fn write_cmdline<M: GuestMemoryBackend>(
    memory: &M,
    cmdline: &str,
) -> Result<(), BootError> {
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    write(memory, "command line", CMDLINE_START, &bytes)
}

fn write<M: GuestMemoryBackend>(
    memory: &M,
    what: &'static str,
    address: u64,
    bytes: &[u8],
) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|_| BootError::Memory { what, address })
}
