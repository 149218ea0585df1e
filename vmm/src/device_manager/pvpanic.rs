//! `--pvpanic`: the guest tells the VMM that it panicked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::pvpanic::Pvpanic;
use vm_device::Trigger;

use super::DeviceError;
use super::pci::Pci;
use crate::config::VmConfig;
use crate::event::{Event, EventSender};

/// Makes the device, if it is wanted.
pub(super) fn add(pci: &Pci, config: &VmConfig, events: &EventSender) -> Result<(), DeviceError> {
    if !config.pvpanic {
        return Ok(());
    }
    let name = "pvpanic device";
    let trigger = |crash_kernel| -> Result<Arc<dyn Trigger>, DeviceError> {
        let events = events
            .try_clone()
            .map_err(|source| DeviceError::Event { name, source })?;
        // A guest may tell it without end; it is news only once.
        let told = AtomicBool::new(false);
        Ok(Arc::new(move || {
            if !told.swap(true, Ordering::Relaxed) {
                events.send(Event::GuestPanicked { crash_kernel });
            }
            Ok(())
        }))
    };
    let device =
        Pvpanic::new(trigger(false)?, trigger(true)?).map_err(DeviceError::option("--pvpanic"))?;
    pci.add(name, None, Arc::new(device)).map(drop)
}
