//! The tables as bytes.

use super::*;

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

fn cpus(boot: u32, max: u32) -> Vec<Cpu> {
    (0..max)
        .map(|id| Cpu {
            apic_id: id,
            enabled: id < boot,
        })
        .collect()
}

fn segment() -> PciSegment {
    PciSegment {
        id: 0,
        first_bus: 0,
        last_bus: 255,
        mmconfig: 0xe800_0000,
        window32: Some(AddressRange {
            start: 0xc000_0000,
            end: 0xe7ff_ffff,
        }),
        window64: Some(AddressRange {
            start: 0x10_0000_0000,
            end: 0xff_ffff_ffff,
        }),
        slot_gsis: Some([5; PCI_SLOTS]),
    }
}

/// Everything there is.
fn full(boot: u32, max: u32) -> AcpiConfig {
    AcpiConfig {
        cpus: cpus(boot, max),
        cpu_hotplug: Some(0xe000_0010),
        memory_hotplug: Some(MemoryHotplug {
            address: 0xe000_0020,
            slots: 8,
        }),
        ged: Some(Ged {
            address: 0xe000_0000,
            gsi: 6,
        }),
        serial: Some(Serial {
            port: 0x3f8,
            irq: 4,
        }),
        pci: Some(PciHost {
            segments: vec![segment()],
            hotplug: Some(0xe000_0040),
        }),
        virtio_mmio: vec![VirtioMmio {
            address: 0xe001_0000,
            gsi: 17,
        }],
        viot: Some(Viot {
            segment: 0,
            iommu: 0x08,
            endpoints: vec![0x10],
        }),
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack
        .windows(needle.len())
        .any(|window| window == needle)
}

#[test]
fn every_table_has_its_length_and_checksum_and_is_pointed_at() {
    let tables = build(&full(2, 4)).unwrap();
    let at = |address: u64| &tables.bytes[usize::try_from(address - tables.address).unwrap()..];

    assert_eq!((tables.address, tables.rsdp), (TABLES_START, TABLES_START));
    let rsdp = at(tables.rsdp);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!(rsdp[15], 2, "ACPI 2 or later");
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp[..36])), (0, 0));

    for range in &tables.tables {
        let table = tables.table(&range.signature).unwrap();
        assert_eq!(&table[..4], &range.signature);
        assert_eq!(u32_at(table, 4) as usize, range.len);
        assert_eq!(sum(table), 0, "{:?}", range.signature);
        assert_eq!(range.address % 16, 0);
        assert_eq!(&at(range.address)[..range.len], table);
    }

    let xsdt = at(u64_at(rsdp, 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    let entries = (u32_at(xsdt, 4) as usize - 36) / 8;
    let listed: Vec<&[u8]> = (0..entries)
        .map(|n| &at(u64_at(xsdt, 36 + 8 * n))[..4])
        .collect();
    assert_eq!(listed, [b"FACP", b"APIC", b"MCFG", b"VIOT"]);
    let fadt = tables.table(b"FACP").unwrap();
    assert_eq!(&at(u64_at(fadt, 140))[..4], b"DSDT");
}

#[test]
fn fadt_says_where_to_reset_sleep_and_read_the_timer() {
    let tables = build(&full(1, 1)).unwrap();
    let fadt = tables.table(b"FACP").unwrap();
    assert_eq!((fadt[8], fadt.len()), (6, 276));
    let flags = u32_at(fadt, 112);
    // Hardware reduced, reset register, 32-bit timer, no fixed buttons, WBINVD; and nothing else.
    assert_eq!(flags, 1 << 20 | 1 << 10 | 1 << 8 | 1 << 5 | 1 << 4 | 1);
    assert_eq!(
        u32_at(fadt, 109) & 0xffff,
        1 << 4 | 1 << 2,
        "no 8042, no VGA, no ASPM"
    );
    let port = |offset: usize| (fadt[offset], fadt[offset + 1], u64_at(fadt, offset + 4));
    assert_eq!((port(116), fadt[128]), ((1, 8, 0x3c0), 1));
    assert_eq!(port(208), (1, 32, 0x608));
    assert_eq!(fadt[91], 4);
    assert_eq!((port(244), port(256)), ((1, 8, 0x3c0), (1, 8, 0x3c0)));
}

/// The structures of a MADT as (type, bytes).
fn madt_structures(madt: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut rest = &madt[44..];
    let mut structures = Vec::new();
    while let [kind, len, ..] = *rest {
        let (this, next) = rest.split_at(len.into());
        structures.push((kind, this.to_vec()));
        rest = next;
    }
    structures
}

#[test]
fn madt_tells_enabled_and_pluggable_cpus_apart() {
    let tables = build(&full(2, 3)).unwrap();
    let structures = madt_structures(tables.table(b"APIC").unwrap());
    let kinds: Vec<u8> = structures.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [0, 0, 0, 1, 2, 4]);
    assert_eq!(structures[0].1, [0, 8, 0, 0, 1, 0, 0, 0]);
    assert_eq!(structures[1].1, [0, 8, 1, 1, 1, 0, 0, 0]);
    assert_eq!(structures[2].1, [0, 8, 2, 2, 2, 0, 0, 0]);
    assert_eq!(structures[3].1, [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(structures[4].1, [2, 10, 0, 4, 4, 0, 0, 0, 5, 0]);
    assert_eq!(structures[5].1, [4, 6, 0xff, 5, 0, 1]);

    let mut fixed = full(2, 3);
    fixed.cpu_hotplug = None;
    let tables = build(&fixed).unwrap();
    let structures = madt_structures(tables.table(b"APIC").unwrap());
    assert_eq!(
        structures[2].1,
        [0, 8, 2, 2, 0, 0, 0, 0],
        "a CPU that can never come is not online capable"
    );
}

#[test]
fn apic_ids_from_255_on_are_x2apic() {
    let mut config = full(2, 2);
    config.cpus[1].apic_id = 255;
    let structures = madt_structures(build(&config).unwrap().table(b"APIC").unwrap());
    assert_eq!(
        structures[1].1,
        [9, 16, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    );
    let nmi = &structures.last().unwrap().1;
    assert_eq!(nmi[..], [10, 12, 5, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);

    config.cpus[1].apic_id = 254;
    let structures = madt_structures(build(&config).unwrap().table(b"APIC").unwrap());
    assert_eq!(structures[1].1, [0, 8, 1, 254, 1, 0, 0, 0]);
    assert_eq!(structures.last().unwrap().0, 4);
}

#[test]
fn mcfg_is_there_with_pci_alone_and_lists_each_segment() {
    let mut config = full(1, 1);
    let second = PciSegment {
        id: 1,
        last_bus: 0,
        mmconfig: 0xf800_0000,
        ..segment()
    };
    config.pci.as_mut().unwrap().segments.push(second);
    let tables = build(&config).unwrap();
    let mcfg = tables.table(b"MCFG").unwrap();
    assert_eq!(mcfg.len(), 44 + 2 * 16);
    assert_eq!(
        (u64_at(mcfg, 44), u64_at(mcfg, 52)),
        (0xe800_0000, 0xff00_0000)
    );
    assert_eq!((u64_at(mcfg, 60), u64_at(mcfg, 68)), (0xf800_0000, 1));

    config.pci = None;
    assert!(build(&config).unwrap().table(b"MCFG").is_none());
}

#[test]
fn dsdt_holds_what_is_configured_and_no_more() {
    let plain = AcpiConfig {
        cpus: cpus(1, 1),
        ..AcpiConfig::default()
    };
    let plain = build(&plain).unwrap();
    let plain = plain.table(b"DSDT").unwrap();
    let all = build(&full(1, 2)).unwrap();
    let all = all.table(b"DSDT").unwrap();
    for name in [
        "COM1", "GEC0", "PWRB", "MHPC", "PCI0", "PHPR", "CSCN", "MSCN", "PSCN", "MBRD", "V000",
        "LNRO0005",
    ] {
        assert!(contains(all, name.as_bytes()), "{name} is missing");
        assert!(!contains(plain, name.as_bytes()), "{name} is there");
    }
    // Name (\_S5, Package {5, 0, 0, 0})
    assert!(contains(plain, b"\x08\\_S5_\x12\x07\x04\x0a\x05\0\0\0"));
    // I/O 0x3f8, 8 bytes; extended interrupt: consumer, edge, high, exclusive, GSI 4.
    assert!(contains(
        all,
        b"\x47\x01\xf8\x03\xf8\x03\x01\x08\x89\x06\x00\x03\x01\x04\0\0\0"
    ));
    // A page at 0xe0010000, which can be written, and GSI 17.
    assert!(contains(
        all,
        b"\x86\x09\x00\x01\0\0\x01\xe0\0\x10\0\0\x89\x06\x00\x03\x01\x11\0\0\0"
    ));
}

#[test]
fn the_largest_machine_fits_below_smbios() {
    let tables = build(&full(1, 254)).unwrap();
    assert!(tables.bytes.len() as u64 <= TABLES_END - TABLES_START);

    let Err(Error::TooBig { size, room }) = build(&full(1, 4096)) else {
        panic!("4096 pluggable CPUs fit");
    };
    assert!(size > room);
    assert_eq!(room, 0x5_0000);
}

#[test]
fn faults_in_the_configuration_are_named() {
    let refused = |change: &dyn Fn(&mut AcpiConfig)| {
        let mut config = full(1, 2);
        change(&mut config);
        build(&config).unwrap_err().to_string()
    };
    fn seg(config: &mut AcpiConfig) -> &mut PciSegment {
        &mut config.pci.as_mut().unwrap().segments[0]
    }
    assert_eq!(
        refused(&|c| c.cpus.clear()),
        "the ACPI tables need at least one CPU"
    );
    assert!(refused(&|c| c.cpus = cpus(1, 4097)).starts_with("4097 CPUs are more than"));
    assert_eq!(
        refused(&|c| c.cpus[1].apic_id = 0),
        "APIC id 0x0 is given to two CPUs"
    );
    assert_eq!(
        refused(&|c| c.ged = None),
        "CPU hotplug needs the generic event device"
    );
    assert!(refused(&|c| c.memory_hotplug.as_mut().unwrap().slots = 257).starts_with("257 memory"));
    assert!(refused(&|c| c.serial.as_mut().unwrap().port = 0xfff9).contains("I/O addresses"));
    assert!(
        refused(&|c| c.cpu_hotplug = Some(u64::MAX - 3))
            .starts_with("CPU hotplug registers cannot be at")
    );
    assert!(
        refused(&|c| c.ged.as_mut().unwrap().address = 2).starts_with("event device registers")
    );
    assert_eq!(
        refused(&|c| (seg(c).first_bus, seg(c).last_bus) = (2, 1)),
        "PCI segment 0: bus 2 comes after bus 1"
    );
    assert!(
        refused(&|c| seg(c).mmconfig = u64::MAX)
            .starts_with("configuration space of PCI segment 0")
    );
    assert!(refused(&|c| seg(c).window32.as_mut().unwrap().end = 1 << 32).contains("32-bit"));
    assert!(
        refused(&|c| seg(c).window64 = Some(AddressRange {
            start: 0,
            end: u64::MAX
        }))
        .contains("64-bit")
    );
    assert_eq!(
        refused(&|c| c.pci.as_mut().unwrap().segments.push(segment())),
        "PCI segment id 0 is given twice"
    );
    assert!(refused(&|c| c.pci.as_mut().unwrap().segments.clear()).starts_with("0 PCI segments"));
}
