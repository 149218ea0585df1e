//! MADT (ACPI 6.5 §5.2.12): local APICs, the IOAPIC, the serial port's interrupt, NMI.

use acpi_tables::sdt::Sdt;

use super::{AcpiConfig, Cpu, IOAPIC_ADDRESS, LAPIC_ADDRESS, OEM_ID, OEM_REVISION, OEM_TABLE_ID};

/// The first revision with the online-capable flag (ACPI 6.3).
const REVISION: u8 = 5;
const HEADER_LEN: u32 = 36;

const LOCAL_APIC: u8 = 0;
const IOAPIC: u8 = 1;
const INTERRUPT_SOURCE_OVERRIDE: u8 = 2;
const LOCAL_APIC_NMI: u8 = 4;
const LOCAL_X2APIC: u8 = 9;
const LOCAL_X2APIC_NMI: u8 = 10;

const ENABLED: u32 = 1;
const ONLINE_CAPABLE: u32 = 2;

/// MPS INTI flags: active high, edge triggered (§5.2.12.5).
const EDGE_HIGH: u16 = 0b0101;
/// The pin of the local APIC that NMI comes on.
const NMI_LINT: u8 = 1;
/// First id that a local APIC structure, and UID that its NMI structure, cannot hold.
const FIRST_X2APIC: u32 = 255;

pub(super) fn build(config: &AcpiConfig) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend_from_slice(&LAPIC_ADDRESS.to_le_bytes());
    // Flags: no 8259 pair.
    body.extend_from_slice(&0u32.to_le_bytes());

    let mut x2apic = false;
    for (uid, cpu) in (0u32..).zip(&config.cpus) {
        let flags = match (cpu.enabled, config.cpu_hotplug) {
            (true, _) => ENABLED,
            (false, Some(_)) => ONLINE_CAPABLE,
            (false, None) => 0,
        };
        x2apic |= needs_x2apic(uid, cpu);
        body.extend(local_apic(uid, cpu, flags));
    }

    body.extend_from_slice(&[IOAPIC, 12, 0, 0]);
    body.extend_from_slice(&IOAPIC_ADDRESS.to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());

    if let Some(serial) = config.serial {
        body.extend_from_slice(&[INTERRUPT_SOURCE_OVERRIDE, 10, 0, serial.irq]);
        body.extend_from_slice(&u32::from(serial.irq).to_le_bytes());
        body.extend_from_slice(&EDGE_HIGH.to_le_bytes());
    }

    let [flags_low, flags_high] = EDGE_HIGH.to_le_bytes();
    body.extend_from_slice(&[LOCAL_APIC_NMI, 6, 0xff, flags_low, flags_high, NMI_LINT]);
    if x2apic {
        body.extend_from_slice(&[LOCAL_X2APIC_NMI, 12, flags_low, flags_high]);
        body.extend_from_slice(&u32::MAX.to_le_bytes());
        body.extend_from_slice(&[NMI_LINT, 0, 0, 0]);
    }

    let mut madt = Sdt::new(
        *b"APIC",
        HEADER_LEN,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    madt.append_slice(&body);
    madt.as_slice().to_vec()
}

/// The structure that describes one CPU, in the MADT and as what `_MAT` gives.
pub(super) fn local_apic(uid: u32, cpu: &Cpu, flags: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16);
    match (u8::try_from(uid), u8::try_from(cpu.apic_id)) {
        (Ok(uid8), Ok(id8)) if !needs_x2apic(uid, cpu) => {
            bytes.extend_from_slice(&[LOCAL_APIC, 8, uid8, id8]);
            bytes.extend_from_slice(&flags.to_le_bytes());
        }
        _ => {
            bytes.extend_from_slice(&[LOCAL_X2APIC, 16, 0, 0]);
            bytes.extend_from_slice(&cpu.apic_id.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
            bytes.extend_from_slice(&uid.to_le_bytes());
        }
    }
    bytes
}

/// As [`local_apic`], for a CPU that is there.
pub(super) fn present_local_apic(uid: u32, cpu: &Cpu) -> Vec<u8> {
    local_apic(uid, cpu, ENABLED)
}

fn needs_x2apic(uid: u32, cpu: &Cpu) -> bool {
    uid >= FIRST_X2APIC || cpu.apic_id >= FIRST_X2APIC
}
