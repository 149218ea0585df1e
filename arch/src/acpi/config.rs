//! What the ACPI tables are written from: plain data, checked before use.

use thiserror::Error;

use super::registers;

/// CPUs that the DSDT has names for (`C000` to `CFFF`).
pub const MAX_CPUS: usize = 4096;
/// Memory hotplug slots that the DSDT has names for.
pub const MAX_MEMORY_SLOTS: u32 = 256;
/// Slots on each PCI bus.
pub const PCI_SLOTS: usize = 32;
/// Segments that the DSDT has names for (`PCI0` to `PCIF`).
const MAX_SEGMENTS: usize = 16;
/// MMCONFIG bytes a bus: 32 devices of 8 functions of 4 KiB (PCI Express 6.0 §7.2.2).
const MMCONFIG_BYTES_PER_BUS: u64 = 1 << 20;

/// Why no tables can be written.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// No CPU at all.
    #[error("the ACPI tables need at least one CPU")]
    NoCpu,
    /// More than [`MAX_CPUS`].
    #[error("{0} CPUs are more than the {MAX_CPUS} that the ACPI tables can name")]
    TooManyCpus(usize),
    /// Two CPUs share a local APIC id.
    #[error("APIC id {0:#x} is given to two CPUs")]
    DuplicateApicId(u32),
    /// More than [`MAX_MEMORY_SLOTS`], or none.
    #[error("{0} memory hotplug slots are not between 1 and {MAX_MEMORY_SLOTS}")]
    MemorySlots(u32),
    /// Hotplug without the device whose interrupt announces it.
    #[error("{0} hotplug needs the generic event device")]
    HotplugWithoutGed(&'static str),
    /// A PCI host without a segment, or with more than 16.
    #[error("{0} PCI segments are not between 1 and 16")]
    Segments(usize),
    /// Two segments share an id.
    #[error("PCI segment id {0} is given twice")]
    DuplicateSegment(u16),
    /// The first bus comes after the last one.
    #[error("PCI segment {segment}: bus {first} comes after bus {last}")]
    BusRange {
        /// Segment id.
        segment: u16,
        /// First bus.
        first: u8,
        /// Last bus.
        last: u8,
    },
    /// An address range that is empty, wraps or leaves its part of the address space.
    #[error("{object}: {start:#x} to {end:#x} is not a range of {space} addresses")]
    Range {
        /// What the range is for.
        object: String,
        /// First address.
        start: u64,
        /// Last address.
        end: u64,
        /// "32-bit" or "64-bit".
        space: &'static str,
    },
    /// A register block that is not on a 4-byte boundary or wraps.
    #[error(
        "{object} registers cannot be at {address:#x}: not a multiple of 4 that leaves room for them"
    )]
    Registers {
        /// Whose registers.
        object: &'static str,
        /// Guest-physical address that was asked for.
        address: u64,
    },
    /// The tables reach into what follows them.
    #[error("the ACPI tables take {size:#x} bytes, more than the {room:#x} below SMBIOS")]
    TooBig {
        /// Bytes of all tables.
        size: u64,
        /// Bytes there are.
        room: u64,
    },
}

/// Everything that the tables tell the guest. An absent part leaves its device out of the DSDT.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AcpiConfig {
    /// All CPUs the machine may ever have; a CPU's place in the list is its ACPI processor UID.
    pub cpus: Vec<Cpu>,
    /// Guest-physical address of the CPU hotplug registers ([`registers::cpu`]).
    pub cpu_hotplug: Option<u64>,
    /// Memory hotplug.
    pub memory_hotplug: Option<MemoryHotplug>,
    /// The generic event device, which also carries the power button.
    pub ged: Option<Ged>,
    /// COM1.
    pub serial: Option<Serial>,
    /// The PCI buses.
    pub pci: Option<PciHost>,
    /// Virtio devices that are on no bus.
    pub virtio_mmio: Vec<VirtioMmio>,
    /// The virtual IOMMU.
    pub viot: Option<Viot>,
}

/// The virtual IOMMU on PCI, and the functions behind it. Each function is told as bus << 8 | device << 3 | function, which is
/// the number that the IOMMU has for it too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Viot {
    /// Segment of all of them.
    pub segment: u16,
    /// The IOMMU itself.
    pub iommu: u16,
    /// Those behind it.
    pub endpoints: Vec<u16>,
}

/// One CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Its local APIC id.
    pub apic_id: u32,
    /// Whether it is there when the machine starts. If not, it can come later where CPU hotplug is configured.
    pub enabled: bool,
}

/// Memory hotplug: DIMM-like slots, each taking a multiple of 128 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryHotplug {
    /// Guest-physical address of the registers ([`registers::memory`]).
    pub address: u64,
    /// Number of slots, 1 to [`MAX_MEMORY_SLOTS`].
    pub slots: u32,
}

/// The generic event device (ACPI 6.5 §5.6.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ged {
    /// Guest-physical address of its register ([`registers::ged`]).
    pub address: u64,
    /// The interrupt it raises, edge triggered.
    pub gsi: u32,
}

/// A 16550 serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serial {
    /// First of its eight I/O ports, at most 0xfff8.
    pub port: u16,
    /// Its interrupt, edge triggered, active high.
    pub irq: u8,
}

/// A virtio device on memory-mapped registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmio {
    /// Guest-physical address of its page of registers.
    pub address: u32,
    /// Its interrupt, edge triggered, active high.
    pub gsi: u32,
}

/// The PCI buses of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciHost {
    /// One root a segment; the segment with id 0 also answers at port 0xcf8.
    pub segments: Vec<PciSegment>,
    /// Guest-physical address of the PCI hotplug registers ([`registers::pci`]); absent: nothing can come or go.
    pub hotplug: Option<u64>,
}

/// One PCI segment group with its root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciSegment {
    /// Segment group number.
    pub id: u16,
    /// Bus of the root.
    pub first_bus: u8,
    /// Last bus below it.
    pub last_bus: u8,
    /// Guest-physical address of bus 0's configuration space, 1 MiB a bus.
    pub mmconfig: u64,
    /// Window for 32-bit BARs.
    pub window32: Option<AddressRange>,
    /// Window for 64-bit BARs.
    pub window64: Option<AddressRange>,
    /// GSI of INTA# of each slot; `None`: no INTx at all.
    pub slot_gsis: Option<[u32; PCI_SLOTS]>,
}

/// Addresses from `start` to `end`, both inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressRange {
    /// First address.
    pub start: u64,
    /// Last address.
    pub end: u64,
}

impl PciSegment {
    /// The guest-physical addresses that configuration space takes for this segment's buses.
    ///
    /// # Errors
    /// [`Error::BusRange`] and [`Error::Range`].
    pub fn mmconfig_range(&self) -> Result<AddressRange, Error> {
        let Some(span) = self.last_bus.checked_sub(self.first_bus) else {
            return Err(Error::BusRange {
                segment: self.id,
                first: self.first_bus,
                last: self.last_bus,
            });
        };
        let size = (u64::from(span) + 1) * MMCONFIG_BYTES_PER_BUS;
        let start = u64::from(self.first_bus) * MMCONFIG_BYTES_PER_BUS;
        let range = self.mmconfig.checked_add(start).and_then(|start| {
            let end = start.checked_add(size - 1)?;
            Some(AddressRange { start, end })
        });
        range.ok_or_else(|| Error::Range {
            object: format!("configuration space of PCI segment {}", self.id),
            start: self.mmconfig,
            end: self.mmconfig.wrapping_add(start).wrapping_add(size - 1),
            space: "64-bit",
        })
    }
}

impl AcpiConfig {
    /// Checks that tables can be written: numbers in range, no id twice, addresses that don't wrap.
    ///
    /// # Errors
    /// The first fault found.
    pub fn validate(&self) -> Result<(), Error> {
        self.validate_cpus()?;
        if self.ged.is_none() {
            let hotplug = [
                ("CPU", self.cpu_hotplug.is_some()),
                ("memory", self.memory_hotplug.is_some()),
                (
                    "PCI",
                    self.pci.as_ref().is_some_and(|pci| pci.hotplug.is_some()),
                ),
            ];
            if let Some((kind, _)) = hotplug.into_iter().find(|(_, configured)| *configured) {
                return Err(Error::HotplugWithoutGed(kind));
            }
        }
        if let Some(memory) = self.memory_hotplug
            && !(1..=MAX_MEMORY_SLOTS).contains(&memory.slots)
        {
            return Err(Error::MemorySlots(memory.slots));
        }
        if let Some(serial) = self.serial
            && serial.port.checked_add(7).is_none()
        {
            return Err(Error::Range {
                object: "serial port".into(),
                start: serial.port.into(),
                end: u64::from(serial.port) + 7,
                space: "I/O",
            });
        }
        for block in self.register_blocks() {
            block?;
        }
        self.pci.as_ref().map_or(Ok(()), validate_pci)
    }

    fn validate_cpus(&self) -> Result<(), Error> {
        if self.cpus.is_empty() {
            return Err(Error::NoCpu);
        }
        if self.cpus.len() > MAX_CPUS {
            return Err(Error::TooManyCpus(self.cpus.len()));
        }
        let mut ids: Vec<u32> = self.cpus.iter().map(|cpu| cpu.apic_id).collect();
        ids.sort_unstable();
        let mut previous = None;
        for id in ids {
            if previous == Some(id) {
                return Err(Error::DuplicateApicId(id));
            }
            previous = Some(id);
        }
        Ok(())
    }

    /// Where the configured register blocks lie, in a fixed order; an address that is no good gives an error.
    pub(super) fn register_blocks(&self) -> Vec<Result<AddressRange, Error>> {
        [
            (
                "event device",
                self.ged.map(|ged| ged.address),
                registers::ged::SIZE,
            ),
            ("CPU hotplug", self.cpu_hotplug, registers::cpu::SIZE),
            (
                "memory hotplug",
                self.memory_hotplug.map(|memory| memory.address),
                registers::memory::SIZE,
            ),
            (
                "PCI hotplug",
                self.pci.as_ref().and_then(|pci| pci.hotplug),
                registers::pci::SIZE,
            ),
        ]
        .into_iter()
        .filter_map(|(object, address, size)| {
            let start = address?;
            let end = start
                .checked_add(size - 1)
                .filter(|_| start.is_multiple_of(4));
            Some(match end {
                Some(end) => Ok(AddressRange { start, end }),
                None => Err(Error::Registers {
                    object,
                    address: start,
                }),
            })
        })
        .collect()
    }
}

fn validate_pci(pci: &PciHost) -> Result<(), Error> {
    if !(1..=MAX_SEGMENTS).contains(&pci.segments.len()) {
        return Err(Error::Segments(pci.segments.len()));
    }
    for (index, segment) in pci.segments.iter().enumerate() {
        if pci
            .segments
            .iter()
            .take(index)
            .any(|other| other.id == segment.id)
        {
            return Err(Error::DuplicateSegment(segment.id));
        }
        segment.mmconfig_range()?;
        let windows = [
            (segment.window32, u64::from(u32::MAX), "32-bit"),
            (segment.window64, u64::MAX, "64-bit"),
        ];
        for (window, limit, space) in windows {
            let Some(AddressRange { start, end }) = window else {
                continue;
            };
            // A window over the whole space has no length that its descriptor could hold.
            if start > end || end > limit || (start == 0 && end == limit) {
                let object = format!("window of PCI segment {}", segment.id);
                return Err(Error::Range {
                    object,
                    start,
                    end,
                    space,
                });
            }
        }
    }
    Ok(())
}
