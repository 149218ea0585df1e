//! x86-64 as tables and registers: memory map, page tables, boot protocols, CPUID, MP tables, ACPI, SMBIOS.
//!
//! All functions are pure, to bytes or to structures of the KVM user API, but for those of [`boot`], which copy files
//! into guest memory.

// Where things are.
pub mod layout;
pub mod memory_map;

// What is loaded, and what the boot protocol hands over.
pub mod boot;
pub mod pvh;
pub mod zero_page;

// How a CPU starts.
pub mod cpuid;
pub mod gdt;
pub mod lapic;
pub mod msrs;
pub mod paging;
pub mod registers;

// Tables that firmware would leave.
pub mod acpi;
pub mod mptable;
pub mod smbios;
