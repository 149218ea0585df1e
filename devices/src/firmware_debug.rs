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
