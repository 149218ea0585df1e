//! Port 0x402, the Bochs debug console that firmware prints to (OVMF, SeaBIOS): reading 0xe9 tells that it is there,
//! what is written appears in the output line by line.

use std::io::Write;

use vm_device::BusDeviceMut;

/// What a read tells.
const PRESENT: u8 = 0xe9;
/// A line that is longer appears in pieces of this many bytes.
const LINE: usize = 512;

/// The one-byte port 0x402.
pub struct FirmwareDebug {
    output: Box<dyn Write + Send>,
    line: Vec<u8>,
}

impl FirmwareDebug {
    /// Prints to `output`, which gets whole lines as far as they are not over-long. What it does not take is lost.
    #[must_use]
    pub fn new(output: Box<dyn Write + Send>) -> Self {
        Self {
            output,
            line: Vec::with_capacity(LINE),
        }
    }

    fn byte(&mut self, byte: u8) {
        self.line.push(byte);
        if byte == b'\n' || self.line.len() >= LINE {
            self.print();
        }
    }

    fn print(&mut self) {
        let printed = self
            .output
            .write_all(&self.line)
            .and_then(|()| self.output.flush());
        if let Err(e) = printed {
            log::debug!("firmware debug port: output lost: {e}");
        }
        self.line.clear();
    }
}

/// A last line without its end appears too.
impl Drop for FirmwareDebug {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.print();
        }
    }
}

impl BusDeviceMut for FirmwareDebug {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        crate::read_bytes(offset, data, |port| if port == 0 { PRESENT } else { 0xff });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        crate::write_bytes(offset, data, |port, value| {
            if port == 0 {
                self.byte(value);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex;

    use super::*;
    use crate::test_support::{Sink, hostile, inb};

    fn print(port: &mut FirmwareDebug, text: &[u8]) {
        for byte in text {
            port.write(0, &[*byte]);
        }
    }

    #[test]
    fn lines_come_whole_and_a_last_one_at_the_end() {
        let sink = Sink::new(usize::MAX);
        let mut port = FirmwareDebug::new(Box::new(sink.clone()));
        assert_eq!(inb(&mut port, 0), PRESENT);
        print(&mut port, b"SEC: start");
        assert_eq!(sink.take(), b"");
        print(&mut port, b"\nPEI");
        assert_eq!(sink.take(), b"SEC: start\n");
        drop(port);
        assert_eq!(sink.take(), b"PEI");
    }

    #[test]
    fn an_endless_line_comes_in_pieces() {
        let sink = Sink::new(usize::MAX);
        let mut port = FirmwareDebug::new(Box::new(sink.clone()));
        print(&mut port, &[b'x'; 3 * LINE - 1]);
        assert_eq!(sink.take().len(), 2 * LINE);
        assert!(port.line.len() < LINE);
    }

    #[test]
    fn an_output_that_fails_is_no_concern_of_the_guest() {
        let sink = Sink::new(0);
        let mut port = FirmwareDebug::new(Box::new(sink.clone()));
        print(&mut port, b"lost\n");
        sink.fail(io::ErrorKind::BrokenPipe);
        print(&mut port, b"lost\n");
        assert!(port.line.is_empty());
        assert_eq!(sink.take(), b"");
    }

    #[test]
    fn survives_any_access() {
        hostile(&Mutex::new(FirmwareDebug::new(Box::new(Sink::new(9)))), 1);
    }
}
