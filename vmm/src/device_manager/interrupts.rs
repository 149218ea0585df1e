//! How interrupts of devices reach the local APICs in KVM: messages of the user-space IOAPIC, and MSI
//! vectors by irqfd. Both share KVM's one table of routes.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::ioapic::{InterruptSink, Message, PINS};
use hypervisor::{IrqRoute, IrqTarget, MsiMessage, Vm};
use pci::MsiSink;
use vm_allocator::IrqAllocator;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// One more than the highest GSI that KVM's table takes (KVM_MAX_IRQ_ROUTES).
const GSIS: u32 = 4096;

/// KVM's table of routes. The GSIs of the IOAPIC's pins come first, those of MSI vectors after them.
pub(super) struct Routing {
    vm: Arc<dyn Vm>,
    state: Mutex<State>,
}

struct State {
    routes: BTreeMap<u32, MsiMessage>,
    free: IrqAllocator,
}

impl Routing {
    pub(super) fn new(vm: Arc<dyn Vm>) -> Arc<Self> {
        Arc::new(Self {
            vm,
            state: Mutex::new(State {
                routes: BTreeMap::new(),
                free: IrqAllocator::new(PINS.into(), GSIS - 1),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives `gsi` a message, or none.
    fn set(&self, gsi: u32, message: Option<MsiMessage>) -> io::Result<()> {
        let mut state = self.lock();
        let before = match message {
            Some(message) => state.routes.insert(gsi, message),
            None => state.routes.remove(&gsi),
        };
        if before == message {
            return Ok(());
        }
        let table: Vec<IrqRoute> = state
            .routes
            .iter()
            .map(|(&gsi, &message)| IrqRoute {
                gsi,
                target: IrqTarget::Msi(message),
            })
            .collect();
        self.vm.set_irq_routes(&table).map_err(io::Error::other)
    }

    fn allocate(&self) -> io::Result<u32> {
        self.lock().free.allocate().map_err(io::Error::other)
    }

    fn free(&self, gsi: u32) {
        if let Err(e) = self.set(gsi, None) {
            log::debug!("GSI {gsi}: {e}");
        }
        if let Err(e) = self.lock().free.free(gsi) {
            log::debug!("{e}");
        }
    }
}

fn message(address: u64, data: u32) -> MsiMessage {
    let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
    MsiMessage {
        address_low: u32::from_le_bytes([a, b, c, d]),
        address_high: u32::from_le_bytes([e, f, g, h]),
        data,
        device_id: 0,
    }
}

/// The IOAPIC's messages.
///
/// KVM reports the end of an interrupt only where a route of the pin's number says that it is
/// level-triggered, so those routes are kept in KVM's table; edges need none.
pub(super) struct IoapicInterrupts(pub(super) Arc<Routing>);

impl InterruptSink for IoapicInterrupts {
    fn send(&self, to_send: &Message) -> io::Result<()> {
        let delivered = self
            .0
            .vm
            .signal_msi(&message(to_send.address, to_send.data))
            .map_err(io::Error::other)?;
        if !delivered {
            log::debug!("no local APIC took the interrupt {to_send:?}");
        }
        Ok(())
    }

    fn route(&self, pin: u8, wanted: Option<&Message>) {
        let wanted = wanted.map(|m| message(m.address, m.data));
        if let Err(e) = self.0.set(pin.into(), wanted) {
            log::warn!("IOAPIC pin {pin}: {e}");
        }
    }
}

/// The MSI vectors of one device: an irqfd each, and a GSI from the first use on.
pub(super) struct MsiVectors {
    routing: Arc<Routing>,
    vectors: Vec<Vector>,
}

struct Vector {
    event: EventFd,
    gsi: Mutex<Option<u32>>,
}

impl MsiVectors {
    /// `count` vectors, none in use yet.
    pub(super) fn new(routing: Arc<Routing>, count: u16) -> io::Result<Self> {
        let vectors = (0..count)
            .map(|_| {
                Ok(Vector {
                    event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
                    gsi: Mutex::new(None),
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { routing, vectors })
    }

    fn vector(&self, index: u16) -> io::Result<&Vector> {
        self.vectors
            .get(usize::from(index))
            .ok_or_else(|| io::Error::other(format!("the device has no MSI vector {index}")))
    }
}

impl MsiSink for MsiVectors {
    fn set_route(&self, vector: u16, wanted: Option<pci::MsiMessage>) -> io::Result<()> {
        // What is masked is not triggered: its route may stay.
        let Some(wanted) = wanted else {
            return Ok(());
        };
        let vector = self.vector(vector)?;
        let mut gsi = vector.gsi.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = message(wanted.address, wanted.data);
        if let Some(gsi) = *gsi {
            return self.routing.set(gsi, Some(wanted));
        }
        let new = self.routing.allocate()?;
        let connect = || {
            self.routing.set(new, Some(wanted))?;
            self.routing
                .vm
                .register_irqfd(&vector.event, new)
                .map_err(io::Error::other)
        };
        if let Err(e) = connect() {
            self.routing.free(new);
            return Err(e);
        }
        *gsi = Some(new);
        Ok(())
    }

    fn trigger(&self, vector: u16) -> io::Result<()> {
        self.vector(vector)?.event.write(1)
    }
}

impl Drop for MsiVectors {
    fn drop(&mut self) {
        for vector in &self.vectors {
            let gsi = vector
                .gsi
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(gsi) = gsi {
                if let Err(e) = self.routing.vm.unregister_irqfd(&vector.event, gsi) {
                    log::debug!("{}", crate::error_chain(&e));
                }
                self.routing.free(gsi);
            }
        }
    }
}
