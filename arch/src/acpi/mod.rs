//! ACPI for a hardware-reduced machine (ACPI 6.5 §4.1, §5.2): from a plain description to the bytes of
//! RSDP, XSDT, FADT, MADT, MCFG, VIOT and DSDT, placed below 1 MiB.
//!
//! ```
//! use arch::acpi::{AcpiConfig, Cpu, Serial, build};
//!
//! let tables = build(&AcpiConfig {
//!     cpus: vec![Cpu { apic_id: 0, enabled: true }],
//!     serial: Some(Serial { port: 0x3f8, irq: 4 }),
//!     ..AcpiConfig::default()
//! })?;
//! assert_eq!(tables.rsdp, 0xa_0000);
//! assert_eq!(&tables.bytes[..8], b"RSD PTR ");
//! # Ok::<(), arch::acpi::Error>(())
//! ```

mod config;
mod dsdt;
mod fadt;
mod madt;
pub mod registers;
#[cfg(test)]
mod tests;
mod viot;

use crate::layout;
use acpi_tables::Aml;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
pub use config::{
    AcpiConfig, AddressRange, Cpu, Error, Ged, MAX_CPUS, MAX_MEMORY_SLOTS, MemoryHotplug,
    PCI_SLOTS, PciHost, PciSegment, Serial, Viot, VirtioMmio,
};

/// Guest-physical address of the RSDP; the other tables follow it.
pub const TABLES_START: u64 = layout::ACPI_START;
/// First guest-physical address above the tables: SMBIOS begins here.
pub const TABLES_END: u64 = layout::SMBIOS_START;
/// I/O port that takes both the reset value and the sleep type (ACPI 6.5 §4.8.3.6, §4.8.3.7).
pub const RESET_PORT: u16 = 0x3c0;
/// What a write to [`RESET_PORT`] holds to reset the machine.
pub const RESET_VALUE: u8 = 1;
/// `SLP_TYP` of S5. The guest writes `SLP_TYP << 2 | 1 << 5` = 0x34 to [`RESET_PORT`] to power off.
pub const S5_SLEEP_TYPE: u8 = 5;
/// I/O port of the 32-bit power management timer, 3.579545 MHz (ACPI 6.5 §4.8.3.3).
pub const PM_TIMER_PORT: u16 = 0x608;
/// Guest-physical address of the IOAPIC, whose interrupts start at GSI 0.
pub const IOAPIC_ADDRESS: u32 = layout::IOAPIC_START as u32;
/// Guest-physical address of every local APIC.
pub const LAPIC_ADDRESS: u32 = layout::LAPIC_START as u32;

pub(crate) const OEM_ID: [u8; 6] = *b"CLOUDH";
pub(crate) const OEM_TABLE_ID: [u8; 8] = *b"CHMACHIN";
pub(crate) const OEM_REVISION: u32 = 1;

/// Each table starts at a multiple of this many bytes.
const ALIGNMENT: usize = 16;

/// Where one table lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableRange {
    /// Such as `*b"DSDT"`.
    pub signature: [u8; 4],
    /// Guest-physical address of the table's header.
    pub address: u64,
    /// Bytes, header included.
    pub len: usize,
}

/// The finished tables: `bytes` go to guest memory at `address`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// All tables, RSDP first, with zeroes between them.
    pub bytes: Vec<u8>,
    /// Guest-physical address of the first of `bytes`.
    pub address: u64,
    /// Guest-physical address of the RSDP, for the boot protocol.
    pub rsdp: u64,
    /// Every table but the RSDP, in order of address.
    pub tables: Vec<TableRange>,
}

impl AcpiTables {
    /// The bytes of the table with this signature, header included.
    pub fn table(&self, signature: &[u8; 4]) -> Option<&[u8]> {
        let range = self
            .tables
            .iter()
            .find(|table| &table.signature == signature)?;
        let start = usize::try_from(range.address.checked_sub(self.address)?).ok()?;
        self.bytes.get(start..start.checked_add(range.len)?)
    }
}

/// Writes the tables for the machine that `config` describes, to be placed at [`TABLES_START`].
///
/// # Errors
/// Whatever [`AcpiConfig::validate`] finds, and [`Error::TooBig`] where the tables would reach SMBIOS.
pub fn build(config: &AcpiConfig) -> Result<AcpiTables, Error> {
    config.validate()?;

    let mut area = Area::new();
    let dsdt = area.place(*b"DSDT", &dsdt::build(config));
    let mut listed = vec![
        area.place(*b"FACP", &to_bytes(&fadt::build(dsdt))),
        area.place(*b"APIC", &madt::build(config)),
    ];
    if let Some(pci) = &config.pci {
        listed.push(area.place(*b"MCFG", &mcfg(pci)));
    }
    if let Some(viot) = &config.viot {
        listed.push(area.place(*b"VIOT", &viot::build(viot)));
    }
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for address in listed {
        xsdt.add_entry(address);
    }
    let xsdt = area.place(*b"XSDT", &to_bytes(&xsdt));
    area.finish(&to_bytes(&Rsdp::new(OEM_ID, xsdt)))
}

/// MCFG (PCI Firmware Specification 3.3 §4.1.2): one entry a segment.
fn mcfg(pci: &PciHost) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for segment in &pci.segments {
        mcfg.add_ecam(
            segment.mmconfig,
            segment.id,
            segment.first_bus,
            segment.last_bus,
        );
    }
    to_bytes(&mcfg)
}

fn to_bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The growing image; the RSDP's room at its start is filled last.
struct Area {
    bytes: Vec<u8>,
    tables: Vec<TableRange>,
}

impl Area {
    fn new() -> Self {
        let room = Rsdp::len().next_multiple_of(ALIGNMENT);
        Self {
            bytes: vec![0; room],
            tables: Vec::new(),
        }
    }

    /// Appends a table and tells its guest-physical address.
    fn place(&mut self, signature: [u8; 4], table: &[u8]) -> u64 {
        let offset = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(table);
        let address = TABLES_START + offset as u64;
        self.tables.push(TableRange {
            signature,
            address,
            len: table.len(),
        });
        address
    }

    fn finish(mut self, rsdp: &[u8]) -> Result<AcpiTables, Error> {
        let room = TABLES_END - TABLES_START;
        if self.bytes.len() as u64 > room {
            return Err(Error::TooBig {
                size: self.bytes.len() as u64,
                room,
            });
        }
        self.bytes.splice(..rsdp.len(), rsdp.iter().copied());
        Ok(AcpiTables {
            bytes: self.bytes,
            address: TABLES_START,
            rsdp: TABLES_START,
            tables: self.tables,
        })
    }
}
