//! What the guest finds when it starts: kernel, tables in memory, registers.

use std::fs::File;
use std::path::Path;

use arch::acpi::{AcpiConfig, Cpu};
use arch::boot::{Loaded, Payload};
use arch::cpuid::{CpuIdentity, Topology};
use arch::mptable;
use arch::smbios::{self, SmbiosConfig};
use hypervisor::x86::{CpuidEntry, MsrEntry};
use hypervisor::{Vcpu, Vm};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::MachineError;
use crate::config::{CpusConfig, VmConfig};
use crate::device_manager::DeviceManager;

/// Loads the payload, writes the tables, and makes the vCPUs that will run it.
pub(super) fn prepare(
    vm: &dyn Vm,
    supported: &[CpuidEntry],
    config: &VmConfig,
    memory: &GuestMemoryMmap,
    devices: &DeviceManager,
) -> Result<Vec<Box<dyn Vcpu>>, MachineError> {
    let loaded = load(config, memory)?;
    let rsdp = write_tables(&config.cpus, memory, devices)?;
    loaded.write_boot_data(memory, Some(rsdp))?;

    let mut vcpus = Vec::with_capacity(config.cpus.boot.into());
    for id in 0..u32::from(config.cpus.boot) {
        let vcpu = vm.create_vcpu(id)?;
        set_up(vcpu.as_ref(), supported, &config.cpus, &loaded)?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

fn open(option: &'static str, path: &Path) -> Result<File, MachineError> {
    File::open(path).map_err(|source| MachineError::Open {
        option,
        path: path.into(),
        source,
    })
}

fn load(config: &VmConfig, memory: &GuestMemoryMmap) -> Result<Loaded, MachineError> {
    let payload = config.payload.as_ref().ok_or(MachineError::NoPayload)?;
    let mut kernel = open("--kernel", &payload.kernel)?;
    let mut initramfs = match &payload.initramfs {
        Some(path) => Some((open("--initramfs", path)?, path)),
        None => None,
    };
    let loaded = arch::boot::load(
        memory,
        Payload {
            kernel: &mut kernel,
            kernel_name: &payload.kernel,
            initramfs: initramfs
                .as_mut()
                .map(|(file, path)| (file, path.as_path())),
            cmdline: &payload.cmdline,
        },
    )?;
    log::debug!(
        "{}: {:?}, entry {:#x}",
        payload.kernel.display(),
        loaded.protocol,
        loaded.entry
    );
    Ok(loaded)
}

/// ACPI, SMBIOS and MP tables; gives the address of the RSDP.
fn write_tables(
    cpus: &CpusConfig,
    memory: &GuestMemoryMmap,
    devices: &DeviceManager,
) -> Result<u64, MachineError> {
    let mut acpi = AcpiConfig {
        cpus: (0..cpus.max)
            .map(|id| Cpu {
                apic_id: id.into(),
                enabled: id < cpus.boot,
            })
            .collect(),
        ..AcpiConfig::default()
    };
    devices.describe(&mut acpi);
    let tables = arch::acpi::build(&acpi).map_err(|e| table("ACPI", e))?;
    put(memory, "ACPI", tables.address, &tables.bytes)?;

    let smbios = smbios::build(&SmbiosConfig::default()).map_err(|e| table("SMBIOS", e))?;
    put(memory, "SMBIOS", smbios::SMBIOS_START, &smbios)?;

    // For guests that are told to leave ACPI alone; it has room for fewer CPUs.
    let ids: Vec<u8> = (0..cpus.boot).collect();
    match mptable::build(&ids) {
        Ok(bytes) => put(memory, "MP", mptable::MPTABLE_START, &bytes)?,
        Err(e) => log::debug!("no MP table: {e}"),
    }
    Ok(tables.rsdp)
}

fn put(
    memory: &GuestMemoryMmap,
    what: &'static str,
    address: u64,
    bytes: &[u8],
) -> Result<(), MachineError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|e| table(what, e))
}

fn table(
    what: &'static str,
    source: impl std::error::Error + Send + Sync + 'static,
) -> MachineError {
    MachineError::Table {
        what,
        source: Box::new(source),
    }
}

fn set_up(
    vcpu: &dyn Vcpu,
    supported: &[CpuidEntry],
    cpus: &CpusConfig,
    loaded: &Loaded,
) -> Result<(), MachineError> {
    let identity = CpuIdentity {
        id: vcpu.id(),
        count: cpus.max.into(),
        topology: cpus.topology.map(|t| Topology {
            threads: t.threads_per_core.into(),
            cores: t.cores_per_die.into(),
            dies: t.dies_per_package.into(),
            packages: t.packages.into(),
        }),
        tsc_khz: vcpu.tsc_khz().ok(),
        five_level: true,
    };
    vcpu.set_cpuid(&arch::cpuid::build(supported, &identity))?;
    vcpu.set_msrs(&arch::msrs::required())?;
    for msr in arch::msrs::optional() {
        set_optional(vcpu, msr);
    }
    let mut lapic = vcpu.lapic()?;
    arch::lapic::set_lint(&mut lapic);
    vcpu.set_lapic(&lapic)?;
    // The others wait for the first one's INIT and SIPI.
    if vcpu.id() == 0 {
        let mut special = vcpu.special_registers()?;
        // Four levels map all RAM that the config allows (64 TiB). A kernel built without five
        // cannot start in them; one that wants them turns them on.
        arch::registers::set_boot_special(loaded.protocol, false, &mut special);
        vcpu.set_special_registers(&special)?;
        vcpu.set_registers(&arch::registers::boot_general(
            loaded.protocol,
            loaded.entry,
        ))?;
    }
    Ok(())
}

fn set_optional(vcpu: &dyn Vcpu, msr: MsrEntry) {
    if let Err(e) = vcpu.set_msrs(&[msr]) {
        log::debug!("{}", crate::error_chain(&e));
    }
}
