//! How the user-space IOAPIC reaches the local APICs in KVM, and how their EOIs come back.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use devices::ioapic::{InterruptSink, Message};
use hypervisor::{IrqRoute, IrqTarget, MsiMessage, Vm};

/// Sends the IOAPIC's messages to KVM.
///
/// KVM reports the end of an interrupt only where a route of the pin's number says that it is
/// level-triggered, so those routes are kept in KVM's table; edges need none.
pub(super) struct KvmInterrupts {
    vm: Arc<dyn Vm>,
    routes: Mutex<BTreeMap<u8, Message>>,
}

impl KvmInterrupts {
    pub(super) fn new(vm: Arc<dyn Vm>) -> Self {
        Self {
            vm,
            routes: Mutex::new(BTreeMap::new()),
        }
    }
}

fn msi(message: &Message) -> MsiMessage {
    let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
    MsiMessage {
        address_low: u32::from_le_bytes([a, b, c, d]),
        address_high: u32::from_le_bytes([e, f, g, h]),
        data: message.data,
        device_id: 0,
    }
}

impl InterruptSink for KvmInterrupts {
    fn send(&self, message: &Message) -> io::Result<()> {
        match self.vm.signal_msi(&msi(message)) {
            Ok(true) => Ok(()),
            Ok(false) => {
                log::debug!("no local APIC took the interrupt {message:?}");
                Ok(())
            }
            Err(e) => Err(io::Error::other(e)),
        }
    }

    fn route(&self, pin: u8, message: Option<&Message>) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        match message {
            Some(message) => routes.insert(pin, *message),
            None => routes.remove(&pin),
        };
        let table: Vec<IrqRoute> = routes
            .iter()
            .map(|(&pin, message)| IrqRoute {
                gsi: pin.into(),
                target: IrqTarget::Msi(msi(message)),
            })
            .collect();
        if let Err(e) = self.vm.set_irq_routes(&table) {
            log::warn!("IOAPIC pin {pin}: {}", crate::error_chain(&e));
        }
    }
}
