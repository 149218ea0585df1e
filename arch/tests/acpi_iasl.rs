//! The ACPI tables through the reference compiler: each is disassembled, and what comes out must compile again
//! without an error or a warning.

// Helpers of tests fail the way tests do.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use arch::acpi::{
    AcpiConfig, AddressRange, Cpu, Ged, MemoryHotplug, PCI_SLOTS, PciHost, PciSegment, Serial,
    Viot, VirtioMmio, build,
};

fn iasl(directory: &Path, arguments: &[&str]) -> Output {
    Command::new("iasl")
        .args(arguments)
        .current_dir(directory)
        .output()
        .unwrap_or_else(|error| {
            panic!("running iasl: {error}; install it with: apt-get install acpica-tools")
        })
}

fn text(output: &Output) -> String {
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    format!("{stdout}{stderr}")
}

fn check(name: &str, config: &AcpiConfig) {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("acpi-{name}"));
    fs::create_dir_all(&directory).unwrap();
    let tables = build(config).unwrap();
    for range in &tables.tables {
        let signature = String::from_utf8(range.signature.to_vec()).unwrap();
        fs::write(
            directory.join(format!("{signature}.aml")),
            tables.table(&range.signature).unwrap(),
        )
        .unwrap();

        let output = iasl(&directory, &["-d", &format!("{signature}.aml")]);
        let said = text(&output);
        let lower = said.to_lowercase();
        assert!(
            output.status.success() && !lower.contains("error") && !lower.contains("warning"),
            "{name}: disassembling {signature}:\n{said}"
        );

        let output = iasl(&directory, &["-p", "again", &format!("{signature}.dsl")]);
        let said = text(&output);
        assert!(
            output.status.success() && said.contains("0 Errors, 0 Warnings"),
            "{name}: compiling {signature}:\n{said}"
        );
    }
}

fn machine(boot: u32, max: u32) -> AcpiConfig {
    AcpiConfig {
        cpus: (0..max)
            .map(|id| Cpu {
                apic_id: id,
                enabled: id < boot,
            })
            .collect(),
        serial: Some(Serial {
            port: 0x3f8,
            irq: 4,
        }),
        ..AcpiConfig::default()
    }
}

fn with_ged(mut config: AcpiConfig) -> AcpiConfig {
    config.ged = Some(Ged {
        address: 0xe000_0000,
        gsi: 6,
    });
    config
}

fn with_pci(mut config: AcpiConfig, hotplug: Option<u64>) -> AcpiConfig {
    let segment = PciSegment {
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
    };
    config.pci = Some(PciHost {
        segments: vec![segment],
        hotplug,
    });
    config
}

fn with_hotplug(config: AcpiConfig) -> AcpiConfig {
    let mut config = with_pci(with_ged(config), Some(0xe000_0040));
    config.cpu_hotplug = Some(0xe000_0010);
    config.memory_hotplug = Some(MemoryHotplug {
        address: 0xe000_0020,
        slots: 8,
    });
    config
}

#[test]
fn fixed_machines_compile() {
    for count in [1, 2, 254] {
        check(&format!("plain-{count}"), &machine(count, count));
        check(
            &format!("pci-{count}"),
            &with_pci(machine(count, count), None),
        );
        check(&format!("ged-{count}"), &with_ged(machine(count, count)));
    }
}

#[test]
fn machines_with_hotplug_compile() {
    for (boot, max) in [(1, 1), (1, 2), (2, 254)] {
        check(
            &format!("hotplug-{boot}-{max}"),
            &with_hotplug(machine(boot, max)),
        );
    }
}

#[test]
fn devices_on_no_bus_compile() {
    let mut config = with_ged(machine(1, 1));
    config.virtio_mmio = (0..19)
        .map(|number| VirtioMmio {
            address: 0xe7f8_0000 + 0x1000 * number,
            gsi: 5 + number,
        })
        .collect();
    check("virtio-mmio", &config);
}

#[test]
fn x2apic_and_a_second_segment_above_4_gib_compile() {
    let mut config = with_hotplug(machine(2, 300));
    let pci = config.pci.as_mut().unwrap();
    pci.segments.push(PciSegment {
        id: 1,
        last_bus: 0,
        mmconfig: 0x100_0000_0000,
        window32: None,
        ..pci.segments[0].clone()
    });
    check("large", &config);
}

#[test]
fn a_virtual_iommu_disassembles() {
    let mut config = with_pci(machine(1, 1), None);
    config.viot = Some(Viot {
        segment: 0,
        iommu: 0x08,
        endpoints: vec![0x10, 0x18],
    });
    check("viot", &config);
}
