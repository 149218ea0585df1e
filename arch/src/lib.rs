//! x86-64 as tables and registers: memory map, page tables, boot protocols, CPUID, MP tables, ACPI, SMBIOS.

pub mod acpi;
pub mod mptable;
pub mod smbios;
