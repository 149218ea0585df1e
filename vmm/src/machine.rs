//! One start of a VM: from the config to running vCPUs, and back to nothing when dropped.

mod boot;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use hypervisor::x86::ClockData;
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
    /// What the guest's clock showed when it was paused.
    clock: Option<ClockData>,
    vm: Arc<dyn Vm>,
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
            clock: None,
            vm,
            _memory: memory,
        })
    }

    /// Starts the vCPUs, for the first time or after [`pause`](Self::pause). A second call does nothing.
    ///
    /// # Errors
    /// A device that cannot go on: the machine stays paused. A thread that the host would not start: the others are stopped again,
    /// and the machine is lost.
    pub fn start(&mut self, events: &EventSender) -> Result<(), MachineError> {
        if self.cpus.is_none() {
            self.devices.resume()?;
            if let Some(clock) = self.clock.take() {
                self.vm.set_clock(&clock)?;
                for vcpu in &self.vcpus {
                    // Only a guest with kvmclock has use for it.
                    if let Err(e) = vcpu.notify_paused() {
                        log::debug!("{}", crate::error_chain(&e));
                    }
                }
            }
            let vcpus = std::mem::take(&mut self.vcpus);
            self.cpus = Some(CpuManager::start(vcpus, &self.devices.routes(), events)?);
        }
        Ok(())
    }

    /// Stops the vCPUs, then the devices, whose queues come home. The guest's clock stands still meanwhile.
    pub fn pause(&mut self) {
        if let Some(mut cpus) = self.cpus.take() {
            self.vcpus = cpus.stop();
            self.devices.pause();
            match self.vm.clock() {
                Ok(clock) => self.clock = Some(clock),
                Err(e) => log::warn!("{}", crate::error_chain(&e)),
            }
        }
    }

    /// What was counted for each vCPU.
    pub fn counters(&self) -> BTreeMap<u32, BTreeMap<String, u64>> {
        match &self.cpus {
            Some(cpus) => cpus.ask(|vcpu| vcpu.counters()),
            None => self.vcpus.iter().map(|v| (v.id(), v.counters())).collect(),
        }
    }

    /// Sends every running vCPU a non-maskable interrupt.
    ///
    /// # Errors
    /// The first vCPU that cannot have one.
    pub fn nmi(&self) -> Result<(), MachineError> {
        let sent = self.cpus.as_ref().map(|cpus| cpus.ask(|vcpu| vcpu.nmi()));
        for result in sent.into_iter().flat_map(BTreeMap::into_values) {
            result?;
        }
        Ok(())
    }

    /// The devices.
    pub fn devices(&self) -> &DeviceManager {
        &self.devices
    }
}
