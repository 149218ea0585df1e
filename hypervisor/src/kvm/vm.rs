//! A KVM virtual machine: memory slots, interrupts, events and the clock.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_MSI_DEVID, KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X2APIC_API, KVM_CAP_XSAVE2, KVM_IRQ_ROUTING_MSI, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY, KVM_MSI_VALID_DEVID, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::vcpu::KvmVcpu;
use super::{syscall_remedy, xsave};
use crate::memory::GuestRam;
use crate::vcpu::Vcpu;
use crate::vm::{
    DirtyBitmap, HypervisorError, IoEventAddress, IrqRoute, IrqTarget, MemorySlot, MsiMessage, Vm,
    VmError,
};
use crate::x86::ClockData;

/// What the vCPUs of a VM share.
pub(super) struct Shared {
    /// Guest RAM, for the instruction fallback.
    pub(super) ram: Arc<dyn GuestRam>,
    /// Bytes of an XSAVE area.
    pub(super) xsave_size: usize,
    /// SYSCALL enters the kernel in ring 3 here.
    pub(super) mend_syscall: bool,
}

/// A VM.
pub(super) struct KvmVm {
    fd: VmFd,
    shared: Arc<Shared>,
    /// KVM wants the requester id in messages.
    msi_device_ids: bool,
}

impl KvmVm {
    pub(super) fn new(
        fd: VmFd,
        ram: Arc<dyn GuestRam>,
        mend_syscall: bool,
    ) -> Result<Self, HypervisorError> {
        if mend_syscall {
            syscall_remedy::watch_msrs(&fd)
                .map_err(super::ioctl("watching the MSRs of SYSCALL"))?;
        }
        if fd.check_extension_raw(KVM_CAP_EXIT_ON_EMULATION_FAILURE.into()) > 0 {
            fd.enable_cap(&capability(KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1))
                .map_err(super::ioctl("enabling KVM_CAP_EXIT_ON_EMULATION_FAILURE"))?;
        }
        let xsave_size = usize::try_from(fd.check_extension_raw(KVM_CAP_XSAVE2.into()))
            .unwrap_or(0)
            .max(xsave::SMALLEST);
        let msi_device_ids = fd.check_extension_raw(KVM_CAP_MSI_DEVID.into()) > 0;
        Ok(Self {
            fd,
            shared: Arc::new(Shared {
                ram,
                xsave_size,
                mend_syscall,
            }),
            msi_device_ids,
        })
    }

    fn device_id(&self, message: &MsiMessage) -> (u32, u32) {
        if self.msi_device_ids {
            (KVM_MSI_VALID_DEVID, message.device_id)
        } else {
            (0, 0)
        }
    }

    fn route(&self, route: &IrqRoute) -> kvm_irq_routing_entry {
        let IrqTarget::Msi(message) = &route.target;
        let (flags, devid) = self.device_id(message);
        let mut entry = kvm_irq_routing_entry {
            gsi: route.gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            flags,
            ..Default::default()
        };
        entry.u.msi.address_lo = message.address_low;
        entry.u.msi.address_hi = message.address_high;
        entry.u.msi.data = message.data;
        entry.u.msi.__bindgen_anon_1.devid = devid;
        entry
    }

    #[allow(unsafe_code)]
    fn set_region(
        &self,
        region: kvm_userspace_memory_region,
        what: impl FnOnce() -> String,
    ) -> Result<(), VmError> {
        // SAFETY: the caller of `set_memory_slot` promised that the host range is its own mapping
        // for the life of the slot; a region of size 0 takes a slot away and names no memory.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(error(what))
    }
}

impl Vm for KvmVm {
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, VmError> {
        let fd = self
            .fd
            .create_vcpu(id.into())
            .map_err(error(|| format!("creating vCPU {id}")))?;
        let vcpu = KvmVcpu::new(fd, id, self.shared.clone()).map_err(|e| VmError::Vcpu(id, e))?;
        Ok(Box::new(vcpu))
    }

    #[allow(unsafe_code)]
    unsafe fn set_memory_slot(&self, slot: &MemorySlot) -> Result<(), VmError> {
        let mut flags = 0;
        if slot.log_dirty {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        if slot.read_only {
            flags |= KVM_MEM_READONLY;
        }
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags,
            guest_phys_addr: slot.guest_address,
            memory_size: slot.size,
            userspace_addr: slot.host_address,
        };
        self.set_region(region, || {
            format!(
                "setting memory slot {} of {:#x} bytes at {:#x}",
                slot.slot, slot.size, slot.guest_address
            )
        })
    }

    fn remove_memory_slot(&self, slot: u32) -> Result<(), VmError> {
        let region = kvm_userspace_memory_region {
            slot,
            ..Default::default()
        };
        self.set_region(region, || format!("removing memory slot {slot}"))
    }

    fn dirty_log(&self, slot: u32, size: u64) -> Result<DirtyBitmap, VmError> {
        let what = || format!("reading the dirty log of memory slot {slot}");
        let size =
            usize::try_from(size).map_err(|_| error(what)(kvm_ioctls::Error::new(libc::EINVAL)))?;
        self.fd.get_dirty_log(slot, size).map_err(error(what))
    }

    fn enable_split_irqchip(&self, ioapic_pins: u32) -> Result<(), VmError> {
        self.fd
            .enable_cap(&capability(KVM_CAP_SPLIT_IRQCHIP, ioapic_pins.into()))
            .map_err(error(|| {
                format!("putting the local APICs in the kernel, beside {ioapic_pins} IOAPIC pins")
            }))
    }

    fn set_tss_address(&self, address: u64) -> Result<(), VmError> {
        let what = || format!("placing the TSS at {address:#x}");
        let address = usize::try_from(address)
            .map_err(|_| error(what)(kvm_ioctls::Error::new(libc::EINVAL)))?;
        self.fd.set_tss_address(address).map_err(error(what))
    }

    fn enable_x2apic_ids(&self) -> Result<(), VmError> {
        let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        self.fd
            .enable_cap(&capability(KVM_CAP_X2APIC_API, flags.into()))
            .map_err(error(|| "enabling 32-bit APIC ids".into()))
    }

    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd
            .register_irqfd(fd, gsi)
            .map_err(error(|| format!("connecting an event to interrupt {gsi}")))
    }

    fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd
            .unregister_irqfd(fd, gsi)
            .map_err(error(|| format!("taking an event off interrupt {gsi}")))
    }

    fn register_ioeventfd(
        &self,
        fd: &EventFd,
        address: IoEventAddress,
        value: Option<u32>,
    ) -> Result<(), VmError> {
        let kvm_address = io_event_address(address);
        match value {
            Some(value) => self.fd.register_ioevent(fd, &kvm_address, value),
            None => self.fd.register_ioevent(fd, &kvm_address, NoDatamatch),
        }
        .map_err(error(|| format!("making writes to {address:x?} an event")))
    }

    fn unregister_ioeventfd(
        &self,
        fd: &EventFd,
        address: IoEventAddress,
        value: Option<u32>,
    ) -> Result<(), VmError> {
        let kvm_address = io_event_address(address);
        match value {
            Some(value) => self.fd.unregister_ioevent(fd, &kvm_address, value),
            None => self.fd.unregister_ioevent(fd, &kvm_address, NoDatamatch),
        }
        .map_err(error(|| {
            format!("ending the event of writes to {address:x?}")
        }))
    }

    fn set_irq_routes(&self, routes: &[IrqRoute]) -> Result<(), VmError> {
        let what = || format!("setting {} interrupt routes", routes.len());
        let entries: Vec<_> = routes.iter().map(|route| self.route(route)).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| error(what)(kvm_ioctls::Error::new(libc::E2BIG)))?;
        self.fd.set_gsi_routing(&table).map_err(error(what))
    }

    fn signal_msi(&self, message: &MsiMessage) -> Result<bool, VmError> {
        let (flags, devid) = self.device_id(message);
        let delivered = self.fd.signal_msi(kvm_msi {
            address_lo: message.address_low,
            address_hi: message.address_high,
            data: message.data,
            flags,
            devid,
            ..Default::default()
        });
        match delivered {
            Ok(count) => Ok(count > 0),
            // KVM answers -1, which reads as this errno, when no LAPIC is addressed.
            Err(e) if e.errno() == libc::EPERM => Ok(false),
            Err(e) => Err(error(|| format!("delivering the message {message:x?}"))(e)),
        }
    }

    fn clock(&self) -> Result<ClockData, VmError> {
        self.fd
            .get_clock()
            .map_err(error(|| "reading the VM's clock".into()))
    }

    fn set_clock(&self, clock: &ClockData) -> Result<(), VmError> {
        let nanoseconds = ClockData {
            clock: clock.clock,
            ..Default::default()
        };
        self.fd
            .set_clock(&nanoseconds)
            .map_err(error(|| "setting the VM's clock".into()))
    }
}

fn capability(number: u32, argument: u64) -> kvm_enable_cap {
    kvm_enable_cap {
        cap: number,
        args: [argument, 0, 0, 0],
        ..Default::default()
    }
}

fn io_event_address(address: IoEventAddress) -> kvm_ioctls::IoEventAddress {
    match address {
        IoEventAddress::Port(port) => kvm_ioctls::IoEventAddress::Pio(port.into()),
        IoEventAddress::Mmio(address) => kvm_ioctls::IoEventAddress::Mmio(address),
    }
}

fn error(what: impl FnOnce() -> String) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Ioctl {
        what: what(),
        source: source.into(),
    }
}
