//! The console device (virtio 1.2 §5.3) with one port: what the driver sends goes to any writer, what it receives comes from a
//! buffer that any thread fills.
//!
//! ```text
//!   ConsoleInput::push ──> buffer ──> receiveq (0) ──> driver
//!                 driver ──> transmitq (1) ──> output.write
//! ```
//!
//! Neither side waits for the other: a full buffer takes no more input until there is [`room`](ConsoleInput::room), and an
//! output that would block leaves the driver's chains in their queue until
//! [`output_ready`](ConsoleInput::output_ready).
//!
//! A guest that prints a line and reads one:
//!
//! ```
//! use std::io::Write;
//! use std::sync::{Arc, Mutex};
//!
//! use virtio_devices::{Console, ConsoleInput};
//! use vm_virtio::testing::{Guest, Request};
//!
//! #[derive(Clone, Default)]
//! struct Screen(Arc<Mutex<Vec<u8>>>);
//!
//! impl Write for Screen {
//!     fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
//!         self.0.lock().unwrap().write(bytes)
//!     }
//!     fn flush(&mut self) -> std::io::Result<()> {
//!         Ok(())
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let screen = Screen::default();
//! let keyboard = ConsoleInput::new()?;
//! let console = Console::new("_console", Box::new(screen.clone()), keyboard.clone(), (80, 25))?;
//! let mut guest = Guest::running(Box::new(console));
//!
//! guest.ask(1, &Request { readable: b"login: ".to_vec(), writable: 0 });
//! assert_eq!(*screen.0.lock().unwrap(), b"login: ");
//!
//! assert_eq!(keyboard.push(b"root\n"), 5);
//! assert_eq!(guest.ask(0, &Request { readable: Vec::new(), writable: 64 }), b"root\n");
//! # Ok(()) }
//! ```

mod handler;
mod input;
mod output;
mod state;
mod terminal;
#[cfg(test)]
mod tests;

use std::io::Write;
use std::sync::Arc;

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_migration::{MigrationError, Section};
use vm_virtio::feature::RING_FEATURES;
use vm_virtio::{
    Activation, DeviceError, DeviceMemory, DeviceQueue, VirtioDevice, Worker, read_config_bytes,
};

pub use input::ConsoleInput;
pub use state::ConsoleV1;
pub use terminal::ConsoleHandle;

use handler::Handler;
use output::SharedOutput;
use terminal::Terminal;

/// Entries of either queue.
const QUEUE_SIZE: u16 = 256;
/// The configuration space has the size of the terminal (§5.3.3).
const SIZE: u64 = 1 << 0;
/// The configuration space has a field that takes a byte of output at any time (§5.3.3).
const EMERG_WRITE: u64 = 1 << 2;
/// Bytes of the configuration space (§5.3.4): le16 columns, le16 rows, le32 ports, le32 emergency output.
const CONFIG_LEN: usize = 12;
/// Offset of the emergency output.
const EMERG_WR: usize = 8;

/// Why there is no console.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// Two consoles would take bytes from each other.
    #[error("console {0:?} cannot have an input that another console has")]
    InputTaken(String),
}

/// A console device.
pub struct Console<M> {
    id: String,
    worker: Option<Worker<Handler<M>>>,
    input: Arc<ConsoleInput>,
    output: SharedOutput,
    terminal: Arc<Terminal>,
}

impl<M> Console<M> {
    /// A console that prints to `output` and reads `input`, on a terminal of `size`: columns and rows, zeros if it has none.
    /// `id` names the device's thread.
    ///
    /// `output` should not block, for a pause waits for the device. It may say
    /// [`WouldBlock`](std::io::ErrorKind::WouldBlock); the device then tries again after
    /// [`output_ready`](ConsoleInput::output_ready). After any other error the rest of what the driver sends with that chain is
    /// dropped, and what comes next is tried again.
    ///
    /// # Errors
    /// [`ConsoleError::InputTaken`].
    pub fn new(
        id: &str,
        output: Box<dyn Write + Send>,
        input: Arc<ConsoleInput>,
        size: (u16, u16),
    ) -> Result<Self, ConsoleError> {
        if !input.claim() {
            return Err(ConsoleError::InputTaken(id.to_owned()));
        }
        Ok(Self {
            id: id.to_owned(),
            worker: None,
            input,
            output: SharedOutput::new(output),
            terminal: Arc::new(Terminal::new(size)),
        })
    }

    /// To change the console with, once the device is behind a transport.
    #[must_use]
    pub fn handle(&self) -> ConsoleHandle {
        ConsoleHandle::new(self.terminal.clone())
    }
}

impl<M> Drop for Console<M> {
    fn drop(&mut self) {
        // It uses the input for as long as it runs.
        self.worker = None;
        self.input.release();
    }
}

impl<M: DeviceMemory> VirtioDevice<M> for Console<M> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        RING_FEATURES | SIZE | EMERG_WRITE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn config_len(&self) -> usize {
        CONFIG_LEN
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let (columns, rows) = self.terminal.size();
        let [c0, c1] = columns.to_le_bytes();
        let [r0, r1] = rows.to_le_bytes();
        // One port.
        read_config_bytes(&[c0, c1, r0, r1, 1, 0, 0, 0], offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // Its lowest byte is the output; works before the driver has set anything up (§5.3.4, §5.3.5).
        if let (EMERG_WR, [byte, ..]) = (offset, data) {
            self.output.lock().emergency(*byte);
        }
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        let Activation {
            memory,
            queues,
            features,
            interrupt,
            spawn,
        } = activation;
        let handler = Handler::new(queues, memory, self.input.clone(), self.output.clone());
        let worker = Worker::start(&self.id, vec![handler], interrupt.clone(), &spawn)?;
        self.worker = Some(worker);
        if features & SIZE != 0 {
            self.terminal.attach(interrupt);
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Result<Vec<DeviceQueue>, DeviceError> {
        self.terminal.detach();
        let handlers = Worker::stop_any(&mut self.worker)?;
        Ok(handlers
            .into_iter()
            .flat_map(Handler::into_queues)
            .collect())
    }

    fn reset(&mut self) {
        self.output.lock().forget_chain();
        self.terminal.reset();
    }

    fn save(&self, id: &str) -> Result<Section, MigrationError> {
        let (columns, rows) = self.terminal.told();
        let state = ConsoleV1 {
            columns,
            rows,
            input: self.input.pending(),
            sent: self.output.lock().sent(),
        };
        Section::encode(id, &state)
    }

    fn restore(&mut self, section: &Section) -> Result<(), MigrationError> {
        let state: ConsoleV1 = section.decode()?;
        self.input.restore(&state.input)?;
        self.output.lock().restore(state.sent);
        self.terminal.restore((state.columns, state.rows));
        Ok(())
    }
}
