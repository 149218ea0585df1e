//! What the tests of several devices share: a trigger that counts, and accesses that no driver makes.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vm_device::{BusDevice, BusDeviceMut, Trigger};

/// A trigger that counts.
#[derive(Default)]
pub struct Counter(AtomicUsize);

impl Counter {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// How often it was triggered since the last call.
    pub fn take(&self) -> usize {
        self.0.swap(0, Ordering::Relaxed)
    }
}

impl Trigger for Counter {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// One byte read from `device`.
pub fn inb(device: &mut dyn BusDeviceMut, offset: u64) -> u8 {
    let mut byte = [0xa5];
    device.read(offset, &mut byte);
    byte[0]
}

/// Accesses of every size at every offset near `size` and at the ends of `u64`. The device is to survive them.
pub fn hostile(device: &dyn BusDevice, size: u64) {
    let offsets = (0..size + 16).chain([u64::MAX - 8, u64::MAX - 1, u64::MAX]);
    for offset in offsets {
        for length in [0, 1, 2, 3, 4, 5, 8, 16] {
            for fill in [0, 0xff, 0x80, 0x5a] {
                let mut data = vec![fill; length];
                device.write(offset, &data);
                device.read(offset, &mut data);
            }
        }
    }
}

/// An output that takes as many bytes as it has room for, and then would block.
#[derive(Clone)]
pub struct Sink(Arc<Mutex<SinkState>>);

struct SinkState {
    taken: Vec<u8>,
    room: usize,
    error: Option<io::ErrorKind>,
}

impl Sink {
    pub fn new(room: usize) -> Self {
        Self(Arc::new(Mutex::new(SinkState {
            taken: Vec::new(),
            room,
            error: None,
        })))
    }

    /// From now on there is room for `room` bytes.
    pub fn set_room(&self, room: usize) {
        self.0.lock().unwrap().room = room;
    }

    /// From now on every write fails.
    pub fn fail(&self, error: io::ErrorKind) {
        self.0.lock().unwrap().error = Some(error);
    }

    /// What was written since the last call.
    pub fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap().taken)
    }
}

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock().unwrap();
        if let Some(error) = state.error {
            return Err(error.into());
        }
        let count = bytes.len().min(state.room);
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        state.room -= count;
        state.taken.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
