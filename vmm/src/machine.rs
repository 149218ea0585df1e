//! One start of a VM: from the config to running vCPUs, and back to nothing when dropped.

mod boot;

use std::io;
use std::sync::Arc;

use hypervisor::{Hypervisor, HypervisorError, Vcpu, Vm, VmError};
use thiserror::Error;

use crate::config::VmConfig;
use crate::console::Outputs;
use crate::cpu_manager::{CpuError, CpuManager};
use crate::device_manager::{DeviceError, DeviceManager};
use crate::event::EventSender;
use crate::memory_manager::{HighWindows, MemoryError, MemoryManager};

/// Why a machine cannot be.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The payload's file cannot be opened.
    #[error("{option}: opening {path:?}")]
    Open {
        /// `--kernel` or `--initramfs`.
        option: &'static str,
        /// The file.
        path: std::path::PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No payload: only an API client could bring one.
    #[error("there is no kernel to boot")]
    NoPayload,
    /// The payload cannot be booted.
    #[error(transparent)]
    Boot(#[from] arch::boot::BootError),
    /// The firmware tables cannot be written.
    #[error("writing the guest's {what} table")]
    Table {
        /// Which.
        what: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The host's virtualisation.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// The VM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A vCPU's registers.
    #[error(transparent)]
    Vcpu(#[from] hypervisor::VcpuError),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Devices.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// vCPU threads.
    #[error(transparent)]
    Cpu(#[from] CpuError),
}

/// A running machine. The fields are dropped in this order: first whatever runs guest code, then
/// what it may reach, and the memory last.
pub struct Machine {
    cpus: Option<CpuManager>,
    /// Made, and not started yet.
    vcpus: Vec<Box<dyn Vcpu>>,
    devices: DeviceManager,
    _vm: Arc<dyn Vm>,
    _memory: MemoryManager,
}

impl Machine {
    /// Builds the machine that `config` describes, up to the guest's first instruction. `outputs`
    /// are the host's ends of its consoles.
    ///
    /// # Errors
    /// Whatever the host refuses, and payloads that are none. Nothing is left behind.
    pub fn new(
        hypervisor: &dyn Hypervisor,
        config: &VmConfig,
        outputs: &Outputs,
        events: &EventSender,
    ) -> Result<Self, MachineError> {
        let memory = MemoryManager::new(&config.memory)?;
        let vm = hypervisor.create_vm(Arc::new(memory.memory().clone()))?;
        vm.set_tss_address(arch::layout::TSS_START)?;
        vm.enable_split_irqchip(devices::ioapic::PINS.into())?;
        if let Err(e) = vm.enable_x2apic_ids() {
            // Ids up to 253 need no more than an APIC has without it.
            log::info!("{}", crate::error_chain(&e));
        }
        let supported = hypervisor.supported_cpuid()?;
        let address_bits = arch::cpuid::address_bits(&supported);
        let windows = HighWindows::new(config.memory.size, address_bits);
        let slots = memory.map_into(&vm, hypervisor.max_memory_slots(), windows.memory.as_ref())?;
        let mut devices =
            DeviceManager::new(&vm, config, &memory, &slots, windows.pci, outputs, events)?;
        let vcpus = boot::prepare(vm.as_ref(), &supported, config, memory.ram(), &devices)?;
        devices.keep_files();
        Ok(Self {
            cpus: None,
            vcpus,
            devices,
            _vm: vm,
            _memory: memory,
        })
    }

    /// Starts the vCPUs. A second call does nothing.
    ///
    /// # Errors
    /// A thread that the host would not start; the others are stopped again.
    pub fn start(&mut self, events: &EventSender) -> Result<(), MachineError> {
        if self.cpus.is_none() {
            let vcpus = std::mem::take(&mut self.vcpus);
            self.cpus = Some(CpuManager::start(vcpus, &self.devices.routes(), events)?);
        }
        Ok(())
    }

    /// The devices.
    pub fn devices(&self) -> &DeviceManager {
        &self.devices
    }
}
