//! The register behind the generic event device (ACPI 6.5 §5.6.9). Its layout is this project's own and told by the
//! DSDT: byte 0 holds the kinds of events since its last read, which clears them; the bytes after it are 0.

use std::io;
use std::sync::Arc;

use vm_device::{BusDeviceMut, Trigger};

/// The four-byte register block.
pub struct Ged {
    interrupt: Arc<dyn Trigger>,
    kinds: u8,
}

impl Ged {
    /// `interrupt` is the edge-triggered interrupt that the DSDT tells of.
    #[must_use]
    pub fn new(interrupt: Arc<dyn Trigger>) -> Self {
        Self {
            interrupt,
            kinds: 0,
        }
    }

    /// Tells the guest of `kinds` of events, bits of the register. An error is the interrupt's; the kinds are then
    /// told with the next one.
    pub fn notify(&mut self, kinds: u8) -> io::Result<()> {
        self.kinds |= kinds;
        self.interrupt.trigger()
    }
}

impl BusDeviceMut for Ged {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        crate::read_bytes(offset, data, |register| {
            if register == 0 {
                std::mem::take(&mut self.kinds)
            } else {
                0
            }
        });
    }

    /// Everything is for reading.
    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::test_support::{Counter, hostile, inb};

    #[test]
    fn kinds_gather_until_the_guest_reads_them() {
        let interrupt = Counter::new();
        let mut ged = Ged::new(interrupt.clone());
        assert_eq!(inb(&mut ged, 0), 0);
        ged.notify(1).unwrap();
        ged.notify(8).unwrap();
        assert_eq!(interrupt.take(), 2);
        assert_eq!(inb(&mut ged, 1), 0);
        ged.write(0, &[0xff]);
        let mut data = [0xff; 4];
        ged.read(0, &mut data);
        assert_eq!(data, [9, 0, 0, 0]);
        assert_eq!(inb(&mut ged, 0), 0);
    }

    #[test]
    fn a_kind_survives_an_interrupt_that_failed() {
        let broken = || Err(io::ErrorKind::BrokenPipe.into());
        let mut ged = Ged::new(Arc::new(broken));
        assert!(ged.notify(4).is_err());
        assert_eq!(inb(&mut ged, 0), 4);
    }

    #[test]
    fn survives_any_access() {
        hostile(&Mutex::new(Ged::new(Counter::new())), 4);
    }
}
