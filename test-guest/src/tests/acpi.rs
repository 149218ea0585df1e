//! ACPI tables and CPUID, held against each other and against `cpus=`.

use super::{Outcome, Reason, ensure, same};
use crate::acpi;
use crate::boot::peek;
use crate::cpu::{
    apic::{self, Reg},
    cpuid,
};
use crate::{line, number};

/// RSDP and all tables: found, checksums right, the set that a hardware-reduced machine needs.
pub fn acpi() -> Outcome {
    let rsdp = acpi::rsdp().ok_or(Reason("no RSDP", 0, 1))?;
    line!("VALUE rsdp {rsdp:#x}");
    ensure(
        "RSDP sums to zero over 20 bytes",
        acpi::sums_to_zero(rsdp, 20),
    )?;
    ensure(
        "RSDP sums to zero",
        acpi::sums_to_zero(rsdp, u64::from(peek::<u32>(rsdp + 20))),
    )?;
    let mut wanted = [
        (*b"XSDT", false),
        (*b"FACP", false),
        (*b"APIC", false),
        (*b"DSDT", false),
    ];
    for table in acpi::tables(rsdp) {
        line!(
            "VALUE table {} {:#x} {}",
            table.name(),
            table.address,
            table.length
        );
        ensure("table sums to zero", table.sums_to_zero())?;
        for w in &mut wanted {
            w.1 |= w.0 == table.signature;
        }
        if &table.signature == b"FACP" {
            same(
                "FADT HW_REDUCED_ACPI",
                u64::from(peek::<u32>(table.address + 112) >> 20 & 1),
                1,
            )?;
        }
    }
    ensure(
        "XSDT, FACP, APIC and DSDT are there",
        wanted.iter().all(|w| w.1),
    )?;
    let count = acpi::processors().count() as u64;
    line!("VALUE processors {count}");
    ensure(
        "the MADT has this processor",
        acpi::processors().any(|id| id == apic::id()),
    )?;
    number("cpus").map_or(Ok(()), |n| same("processors in the MADT", count, n))
}

/// Identity, topology and hypervisor leaves.
pub fn cpuid_leaves() -> Outcome {
    let id = apic::id();
    line!("VALUE lapic_version {:#x}", apic::read(Reg::Version));
    let basic = cpuid(1, 0);
    same(
        "initial APIC id in leaf 1",
        u64::from(basic[1] >> 24),
        u64::from(id & 0xff),
    )?;
    same("hypervisor bit", u64::from(basic[2] >> 31), 1)?;
    line!("VALUE tsc_deadline {}", basic[2] >> 24 & 1);
    line!("VALUE x2apic {}", basic[2] >> 21 & 1);
    let [last, b, c, d] = cpuid(0x4000_0000, 0);
    same("hypervisor signature \"KVMK\"", u64::from(b), 0x4b4d_564b)?;
    same("hypervisor signature \"VMKV\"", u64::from(c), 0x564b_4d56)?;
    same("hypervisor signature \"M\"", u64::from(d), 0x4d)?;
    ensure(
        "hypervisor leaves reach the features",
        last >= 0x4000_0001 || last == 0,
    )?;
    if cpuid(0, 0)[0] >= 0xb {
        for level in 0..2 {
            let leaf = cpuid(0xb, level);
            line!(
                "VALUE leaf_b {level} shift={} count={} type={} id={}",
                leaf[0],
                leaf[1] & 0xffff,
                leaf[2] >> 8 & 0xff,
                leaf[3]
            );
            same("x2APIC id in leaf 0xb", u64::from(leaf[3]), u64::from(id))?;
        }
    }
    Ok(())
}
