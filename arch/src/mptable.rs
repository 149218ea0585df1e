//! MP table (MultiProcessor Specification 1.4 §4): processors, the IOAPIC and its interrupts, for guests without ACPI.
//!
//! ```
//! let bytes = arch::mptable::build(&[0, 1])?;
//! assert_eq!(&bytes[..4], b"_MP_");
//! # Ok::<(), arch::mptable::Error>(())
//! ```

use thiserror::Error;

use crate::acpi::{IOAPIC_ADDRESS, LAPIC_ADDRESS};

/// Guest-physical address of the floating pointer; the table follows it.
pub const MPTABLE_START: u64 = crate::layout::EBDA_START;
/// Bytes from [`MPTABLE_START`] to 640 KiB.
pub const MPTABLE_SIZE: usize = 0x400;

const POINTER_LEN: usize = 16;
const HEADER_LEN: u16 = 44;
const PROCESSOR_LEN: usize = 20;
const SPECIFICATION_1_4: u8 = 4;
/// Version register of a KVM local APIC and of the IOAPIC.
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
/// Interrupts of the ISA bus, wired to the IOAPIC's pins of the same number.
const ISA_IRQS: u8 = 16;
const BUS_ID: u8 = 0;

/// Entry types (§4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Interrupt types (table 4-11).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// Why no table can be written.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// No CPU at all.
    #[error("the MP table needs at least one CPU")]
    NoCpu,
    /// The table would reach past 640 KiB.
    #[error("{cpus} CPUs do not fit into the MP table, which has room for {most}: use ACPI")]
    TooManyCpus {
        /// CPUs that were asked for.
        cpus: usize,
        /// CPUs that fit.
        most: usize,
    },
    /// No 8-bit id is left for the IOAPIC.
    #[error("APIC id {0:#x} leaves none for the IOAPIC in the MP table")]
    ApicId(u8),
    /// Two CPUs share a local APIC id.
    #[error("APIC id {0:#x} is given to two CPUs in the MP table")]
    DuplicateApicId(u8),
}

/// Writes floating pointer and table for CPUs with these local APIC ids, the boot CPU first, to be placed at
/// [`MPTABLE_START`]. The IOAPIC gets the id after the highest of them.
///
/// # Errors
/// See [`enum@Error`].
pub fn build(apic_ids: &[u8]) -> Result<Vec<u8>, Error> {
    let highest = apic_ids.iter().copied().max().ok_or(Error::NoCpu)?;
    // 0xff is the broadcast id.
    let ioapic_id = highest
        .checked_add(1)
        .filter(|id| *id != 0xff)
        .ok_or(Error::ApicId(highest))?;
    for (index, id) in apic_ids.iter().enumerate() {
        if apic_ids.iter().take(index).any(|other| other == id) {
            return Err(Error::DuplicateApicId(*id));
        }
    }

    let mut others = Vec::new();
    let mut count = 0u16;
    let mut push = |entry: &[u8]| {
        others.extend_from_slice(entry);
        count += 1;
    };
    push(&[BUS, BUS_ID, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = IOAPIC_ADDRESS.to_le_bytes();
    push(&[IOAPIC, ioapic_id, IOAPIC_VERSION, 1, a, b, c, d]);
    // Polarity and trigger as the bus has them (flags 0): active high, edge.
    for irq in 0..ISA_IRQS {
        push(&[IO_INTERRUPT, INT, 0, 0, BUS_ID, irq, ioapic_id, irq]);
    }
    push(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, BUS_ID, 0, 0, 0]);
    push(&[LOCAL_INTERRUPT, NMI, 0, 0, BUS_ID, 0, 0xff, 1]);

    let fixed = POINTER_LEN + usize::from(HEADER_LEN) + others.len();
    let most = (MPTABLE_SIZE - fixed) / PROCESSOR_LEN;
    if apic_ids.len() > most {
        return Err(Error::TooManyCpus {
            cpus: apic_ids.len(),
            most,
        });
    }

    let mut entries = Vec::new();
    for (index, id) in apic_ids.iter().enumerate() {
        entries.extend_from_slice(&processor(*id, index == 0));
        count += 1;
    }
    entries.append(&mut others);
    let mut bytes = floating_pointer();
    bytes.append(&mut table(count, &entries));
    Ok(bytes)
}

/// Floating pointer (§4.1), to the table right behind it.
fn floating_pointer() -> Vec<u8> {
    let mut pointer = Vec::with_capacity(POINTER_LEN);
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&(MPTABLE_START as u32 + POINTER_LEN as u32).to_le_bytes());
    // Length in 16-byte units, version, checksum, features: a table is there, no IMCR.
    pointer.extend_from_slice(&[1, SPECIFICATION_1_4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer
}

/// Configuration table (§4.2).
fn table(count: u16, entries: &[u8]) -> Vec<u8> {
    // At most `MPTABLE_SIZE`.
    let length = HEADER_LEN + entries.len() as u16;
    let mut table = Vec::with_capacity(length.into());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&length.to_le_bytes());
    table.extend_from_slice(&[SPECIFICATION_1_4, 0]);
    table.extend_from_slice(b"CLOUDHYP");
    table.extend_from_slice(b"VM          ");
    // No OEM table: address and size.
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&LAPIC_ADDRESS.to_le_bytes());
    // No extended entries: length, checksum; reserved.
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(entries);
    table[7] = checksum(&table);
    table
}

fn processor(id: u8, boot: bool) -> [u8; PROCESSOR_LEN] {
    const ENABLED: u8 = 1;
    const BOOT: u8 = 2;
    /// Family 6; the guest asks CPUID for the rest.
    const SIGNATURE: u32 = 0x600;
    /// FPU and APIC on the chip.
    const FEATURES: u32 = 1 << 9 | 1;
    let flags = if boot { ENABLED | BOOT } else { ENABLED };
    let mut entry = [0; PROCESSOR_LEN];
    entry[..4].copy_from_slice(&[PROCESSOR, id, LAPIC_VERSION, flags]);
    entry[4..8].copy_from_slice(&SIGNATURE.to_le_bytes());
    entry[8..12].copy_from_slice(&FEATURES.to_le_bytes());
    entry
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(count: u8) -> Vec<u8> {
        (0..count).collect()
    }

    #[test]
    fn pointer_and_table_are_consistent() {
        let bytes = build(&ids(2)).unwrap();
        let (pointer, table) = bytes.split_at(16);
        assert_eq!(&pointer[..4], b"_MP_");
        assert_eq!(
            u32::from_le_bytes(pointer[4..8].try_into().unwrap()),
            0x9_fc10
        );
        assert_eq!((checksum(pointer), checksum(table)), (0, 0));
        assert_eq!(&table[..4], b"PCMP");
        assert_eq!(
            usize::from(u16::from_le_bytes([table[4], table[5]])),
            table.len()
        );

        let mut kinds = Vec::new();
        let mut rest = &table[44..];
        while let Some(kind) = rest.first() {
            kinds.push(*kind);
            rest = &rest[if *kind == 0 { 20 } else { 8 }..];
        }
        assert_eq!(
            usize::from(u16::from_le_bytes([table[34], table[35]])),
            kinds.len()
        );
        let of = |kind: u8| kinds.iter().filter(|other| **other == kind).count();
        assert_eq!([of(0), of(1), of(2), of(3), of(4)], [2, 1, 1, 16, 2]);

        let (boot, second) = (&table[44..64], &table[64..84]);
        assert_eq!((boot[1], boot[3], second[1], second[3]), (0, 3, 1, 1));
        // Bus, then the IOAPIC with the first id that no CPU has.
        assert_eq!(table[84..92], *b"\x01\0ISA   ");
        assert_eq!(table[92..100], [2, 2, 0x11, 1, 0, 0, 0xc0, 0xfe]);
    }

    #[test]
    fn too_many_cpus_are_refused_by_number() {
        let most = 40;
        assert!(build(&ids(most)).unwrap().len() <= MPTABLE_SIZE);
        assert_eq!(
            build(&ids(most + 1)),
            Err(Error::TooManyCpus { cpus: 41, most: 40 })
        );
        assert_eq!(
            build(&ids(41)).unwrap_err().to_string(),
            "41 CPUs do not fit into the MP table, which has room for 40: use ACPI"
        );
    }

    #[test]
    fn ids_that_cannot_be_are_refused() {
        assert_eq!(build(&[]), Err(Error::NoCpu));
        assert_eq!(build(&[3, 3]), Err(Error::DuplicateApicId(3)));
        assert_eq!(build(&[0xfe]), Err(Error::ApicId(0xfe)));
        assert!(build(&[0xfd]).is_ok());
    }
}
