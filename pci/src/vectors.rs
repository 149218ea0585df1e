//! What MSI and MSI-X share: vectors that have a message, can be masked, and stay pending while they are.
//!
//! ```text
//!             trigger             trigger
//!   Disabled ---------> lost    ----------> sink.trigger       (enabled, not masked, routed)
//!                               ----------> pending bit        (enabled, masked)
//!                               unmask: pending bit -> sink.trigger
//! ```

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::debug;
use serde::{Deserialize, Serialize};

/// A message signalled interrupt: a write of `data` to `address` (PCI Local Bus 3.0 §6.8).
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MsiMessage {
    /// Where to.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// Who delivers the vectors of a function: with KVM an irqfd a vector, and a GSI from the first route on, so that vectors
/// that no guest uses cost nothing.
///
/// The calls for one vector never overlap. None may call back into the function's vectors.
pub trait MsiSink: Send + Sync {
    /// From now on `vector` is `message`; with `None` it is disabled or masked. Called only when that changes.
    ///
    /// Without a route the function does not call [`trigger`](Self::trigger). A sink whose vectors are signalled by others
    /// too (a vhost-user back end, a physical device) must hold those signals back and tell them by
    /// [`take_pending`](Self::take_pending); any other may leave what it has in place.
    ///
    /// # Errors
    /// The route cannot be made; the vector stays without one and its interrupts stay pending.
    fn set_route(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()>;

    /// Sends the message of `vector`, which has a route.
    ///
    /// # Errors
    /// It cannot be sent.
    fn trigger(&self, vector: u16) -> io::Result<()>;

    /// Whether others signalled `vector` while it had no route; the answer clears it.
    fn take_pending(&self, vector: u16) -> bool {
        let _ = vector;
        false
    }
}

/// What the whole function's control says.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Control {
    /// No message is sent, none is remembered.
    #[default]
    Disabled,
    /// All vectors are masked.
    Masked,
    /// Vectors are masked one by one.
    Enabled,
}

/// One vector.
#[derive(Debug, Default)]
pub(crate) struct Vector {
    pub message: MsiMessage,
    pub masked: bool,
    pub control: Control,
    pub pending: bool,
    /// What the sink has been told.
    route: Option<MsiMessage>,
}

/// All vectors of a function. Each has a lock of its own: queues do not meet here.
pub(crate) struct Vectors {
    sink: Arc<dyn MsiSink>,
    vectors: Box<[Mutex<Vector>]>,
}

impl Vectors {
    pub fn new(count: u16, masked: bool, sink: Arc<dyn MsiSink>) -> Self {
        let vectors = (0..count)
            .map(|_| {
                Mutex::new(Vector {
                    masked,
                    ..Vector::default()
                })
            })
            .collect();
        Self { sink, vectors }
    }

    pub fn len(&self) -> u16 {
        // Made from a u16.
        self.vectors.len() as u16
    }

    fn lock(&self, index: u16) -> Option<MutexGuard<'_, Vector>> {
        let vector = self.vectors.get(usize::from(index))?;
        Some(vector.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What `read` makes of vector `index`, if there is one.
    pub fn with<R>(&self, index: u16, read: impl FnOnce(&Vector) -> R) -> Option<R> {
        self.lock(index).map(|vector| read(&vector))
    }

    /// Changes vector `index`, if there is one, and brings its route in line; delivers what was pending.
    pub fn update(&self, index: u16, change: impl FnOnce(&mut Vector)) {
        if let Some(mut vector) = self.lock(index) {
            change(&mut vector);
            self.settle(index, &mut vector);
        }
    }

    /// Changes every vector, as [`update`](Self::update) does.
    pub fn update_all(&self, mut change: impl FnMut(u16, &mut Vector)) {
        for index in 0..self.len() {
            self.update(index, |vector| change(index, vector));
        }
    }

    fn settle(&self, index: u16, vector: &mut Vector) {
        if vector.control == Control::Disabled {
            vector.pending = false;
        }
        let wanted =
            (vector.control == Control::Enabled && !vector.masked).then_some(vector.message);
        if wanted != vector.route {
            vector.route = match self.sink.set_route(index, wanted) {
                Ok(()) => wanted,
                Err(error) => {
                    debug!("vector {index}: no route for {wanted:x?}: {error}");
                    None
                }
            };
        }
        if vector.route.is_some() {
            vector.pending |= self.sink.take_pending(index);
            if vector.pending {
                match self.sink.trigger(index) {
                    Ok(()) => vector.pending = false,
                    Err(error) => debug!("vector {index}: what was pending stays so: {error}"),
                }
            }
        }
    }

    /// Raises vector `index`: sends it, makes it pending, or loses it where the whole function is disabled.
    pub fn trigger(&self, index: u16) -> io::Result<()> {
        let Some(mut vector) = self.lock(index) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("there is no interrupt vector {index}"),
            ));
        };
        if vector.route.is_some() {
            return self.sink.trigger(index);
        }
        vector.pending = vector.control != Control::Disabled;
        Ok(())
    }

    /// Whether vector `index` waits to be unmasked.
    pub fn pending(&self, index: u16) -> bool {
        let Some(mut vector) = self.lock(index) else {
            return false;
        };
        if vector.route.is_none() && vector.control != Control::Disabled {
            vector.pending |= self.sink.take_pending(index);
        }
        vector.pending
    }
}
