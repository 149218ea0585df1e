//! What a device on the PCI bus is, and where.

use std::fmt;
use std::io;
use std::sync::Arc;

use vm_device::BusDevice;

use crate::bar::Bars;

/// A device with one function, called from any vCPU's thread. It says where its BARs would like to be, and answers
/// there; giving out addresses and moving BARs is the bus's job.
pub trait PciDevice: Send + Sync {
    /// The guest reads 1 to 4 bytes at `offset` of configuration space, within one aligned dword below 4096.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// The guest writes 1 to 4 bytes at `offset` of configuration space, within one aligned dword below 4096. The bus
    /// does one such write at a time, so it must not be called from here.
    fn write_config(&self, offset: u16, data: &[u8]);

    /// The BARs as the registers have them now.
    fn bars(&self) -> Bars;

    /// The guest reads at `offset` of BAR `bar`.
    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// The guest writes at `offset` of BAR `bar`.
    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]);

    /// BAR `bar` now answers at `address`: the place for what hangs on the address, such as ioeventfds and mapped memory.
    ///
    /// # Errors
    /// It cannot be there; the BAR then answers nowhere.
    fn bar_mapped(&self, bar: usize, address: u64) -> io::Result<()> {
        let _ = (bar, address);
        Ok(())
    }

    /// BAR `bar` no longer answers at `address`. Also called when the device is taken off its bus.
    fn bar_unmapped(&self, bar: usize, address: u64) {
        let _ = (bar, address);
    }
}

/// One BAR of a device, as a device on the memory or port bus.
pub struct BarRegion {
    device: Arc<dyn PciDevice>,
    bar: usize,
}

impl BarRegion {
    /// BAR `bar` of `device`.
    #[must_use]
    pub fn new(device: Arc<dyn PciDevice>, bar: usize) -> Self {
        Self { device, bar }
    }
}

impl BusDevice for BarRegion {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.device.read_bar(self.bar, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.device.write_bar(self.bar, offset, data);
    }
}

/// Segment, bus, device and function; shown as `0000:00:01.0`.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Bdf {
    /// Segment group.
    pub segment: u16,
    /// Bus.
    pub bus: u8,
    /// Device, the slot: 0 to 31.
    pub device: u8,
    /// Function: 0 to 7.
    pub function: u8,
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            segment,
            bus,
            device,
            function,
        } = self;
        write!(f, "{segment:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}
