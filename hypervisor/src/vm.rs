//! A hypervisor and its virtual machines.

use std::sync::Arc;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRam;
use crate::vcpu::{Vcpu, VcpuError};
use crate::x86::{ClockData, CpuidEntry};

/// What can go wrong before there is a VM.
#[derive(Debug, Error)]
pub enum HypervisorError {
    /// The device node cannot be opened.
    #[error("opening {path}")]
    Open {
        /// Path of the device node.
        path: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// KVM speaks another version of its API.
    #[error("KVM has API version {0}; 12 is needed")]
    ApiVersion(i32),
    /// A capability that every VM needs is missing.
    #[error("KVM here lacks {name}, which is needed for {purpose}")]
    Missing {
        /// KVM's name of it, e.g. `KVM_CAP_IRQFD`.
        name: &'static str,
        /// What it is for.
        purpose: &'static str,
    },
    /// An ioctl failed.
    #[error("{what}")]
    Ioctl {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// What can go wrong with a VM.
#[derive(Debug, Error)]
pub enum VmError {
    /// An ioctl failed.
    #[error("{what}")]
    Ioctl {
        /// What was tried, with its numbers.
        what: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A vCPU could not be set up.
    #[error("creating vCPU {0}")]
    Vcpu(u32, #[source] VcpuError),
}

/// A range of guest-physical addresses backed by host memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MemorySlot {
    /// Slot number.
    pub slot: u32,
    /// First guest-physical address, page aligned.
    pub guest_address: u64,
    /// Length in bytes, a multiple of the page size.
    pub size: u64,
    /// Host address of the memory, page aligned. It must stay mapped while the slot exists.
    pub host_address: u64,
    /// Guest writes become MMIO exits.
    pub read_only: bool,
    /// Keep a log of written pages.
    pub log_dirty: bool,
}

/// One bit a page of 4 KiB, lowest page in bit 0 of the first word; set where the guest wrote.
pub type DirtyBitmap = Vec<u64>;

/// Where an ioeventfd listens.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IoEventAddress {
    /// A port.
    Port(u16),
    /// A guest-physical address.
    Mmio(u64),
}

/// A message-signalled interrupt (Intel SDM volume 3, section 11.11).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct MsiMessage {
    /// Message address, low half.
    pub address_low: u32,
    /// Message address, high half.
    pub address_high: u32,
    /// Message data.
    pub data: u32,
    /// PCI requester id (bus, device, function), used where KVM asks for one.
    pub device_id: u32,
}

/// What a global system interrupt leads to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IrqTarget {
    /// A message to a LAPIC.
    Msi(MsiMessage),
}

/// One entry of the routing table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct IrqRoute {
    /// Global system interrupt.
    pub gsi: u32,
    /// Where it goes.
    pub target: IrqTarget,
}

/// The host's virtualisation: what it can do, and new VMs.
pub trait Hypervisor: Send + Sync {
    /// A new VM with no memory and no vCPUs. `ram` is what the instruction fallback reads and
    /// writes; it should follow the memory slots that are added later.
    fn create_vm(&self, ram: Arc<dyn GuestRam>) -> Result<Arc<dyn Vm>, HypervisorError>;
    /// CPUID leaves that KVM can show a guest.
    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, HypervisorError>;
    /// Numbers of the MSRs that make up a vCPU's state here.
    fn msr_indices(&self) -> Result<Vec<u32>, HypervisorError>;
    /// Most vCPUs that a VM can have.
    fn max_vcpus(&self) -> u32;
    /// Most memory slots that a VM can have.
    fn max_memory_slots(&self) -> u32;
    /// Names of optional capabilities that are missing here, each with what does not work then.
    fn missing_optional(&self) -> Vec<(&'static str, &'static str)>;
}

/// A virtual machine.
pub trait Vm: Send + Sync {
    /// Adds a vCPU. It waits for SIPI unless its id is 0.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, VmError>;

    /// Adds or changes a memory slot.
    ///
    /// The caller keeps `slot.host_address..+size` mapped until the slot is removed or the VM and
    /// all its vCPUs are gone: KVM reads and writes there.
    ///
    /// # Safety
    /// The range must be the caller's own mapping, for as long as said above.
    #[allow(unsafe_code)]
    unsafe fn set_memory_slot(&self, slot: &MemorySlot) -> Result<(), VmError>;
    /// Removes a memory slot by its number.
    fn remove_memory_slot(&self, slot: u32) -> Result<(), VmError>;
    /// Takes and clears the log of pages written since the last call. `size` is the slot's.
    fn dirty_log(&self, slot: u32, size: u64) -> Result<DirtyBitmap, VmError>;

    /// LAPICs in the kernel, IOAPIC with `ioapic_pins` pins in user space. Before any vCPU.
    fn enable_split_irqchip(&self, ioapic_pins: u32) -> Result<(), VmError>;
    /// Where KVM may put its three-page TSS (Intel hosts). Before any vCPU.
    fn set_tss_address(&self, address: u64) -> Result<(), VmError>;
    /// x2APIC ids in interrupt messages are 32 bits wide, and 255 is no broadcast.
    fn enable_x2apic_ids(&self) -> Result<(), VmError>;

    /// An interrupt each time `fd` is written.
    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), VmError>;
    /// Ends [`register_irqfd`](Vm::register_irqfd).
    fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), VmError>;
    /// A write of the guest to `address` (with this value, 4 bytes wide, or any) becomes an event.
    fn register_ioeventfd(
        &self,
        fd: &EventFd,
        address: IoEventAddress,
        value: Option<u32>,
    ) -> Result<(), VmError>;
    /// Ends [`register_ioeventfd`](Vm::register_ioeventfd).
    fn unregister_ioeventfd(
        &self,
        fd: &EventFd,
        address: IoEventAddress,
        value: Option<u32>,
    ) -> Result<(), VmError>;
    /// Replaces the whole routing table.
    fn set_irq_routes(&self, routes: &[IrqRoute]) -> Result<(), VmError>;
    /// Delivers a message at once. False where the guest's LAPICs took none.
    fn signal_msi(&self, message: &MsiMessage) -> Result<bool, VmError>;

    /// The VM's kvmclock.
    fn clock(&self) -> Result<ClockData, VmError>;
    /// Sets it; only the nanoseconds are used.
    fn set_clock(&self, clock: &ClockData) -> Result<(), VmError>;
}
