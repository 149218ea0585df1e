//! What a console's driver sends: chains printed in order, in bounded turns, to a writer that may not take it all.

use std::io::{ErrorKind, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::debug;
use vm_memory::GuestMemory;
use vm_virtio::{Chain, Fault};

/// Bytes copied out of guest memory at a time.
const PIECE: usize = 4 << 10;

/// How far a chain was printed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Progress {
    /// To its end.
    Done,
    /// The writer takes no more for now.
    Blocked,
    /// There were as many bytes as a turn may have.
    TurnOver,
}

/// Where a console prints to, and how far it is.
pub(super) struct Output {
    to: Box<dyn Write + Send>,
    /// Bytes of the next chain that were printed already. The chain is in its queue still.
    sent: u32,
    /// There are bytes that the writer may hold back.
    unflushed: bool,
}

/// An output for the device's thread, and the device.
#[derive(Clone)]
pub(super) struct SharedOutput(Arc<Mutex<Output>>);

impl SharedOutput {
    pub fn new(to: Box<dyn Write + Send>) -> Self {
        Self(Arc::new(Mutex::new(Output {
            to,
            sent: 0,
            unflushed: false,
        })))
    }

    pub fn lock(&self) -> MutexGuard<'_, Output> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Output {
    /// Prints `chain` from where it was left on, but no more than `turn` bytes, from which it takes those that it printed.
    pub fn send<M: GuestMemory>(
        &mut self,
        memory: &M,
        chain: &Chain,
        turn: &mut usize,
    ) -> Result<Progress, Fault> {
        let mut reader = chain.reader(memory);
        reader.skip(self.sent.min(chain.readable_len()) as usize)?;
        let mut piece = [0; PIECE];
        while reader.left() > 0 {
            let len = reader.left().min(PIECE).min(*turn);
            if len == 0 {
                return Ok(Progress::TurnOver);
            }
            let (bytes, _) = piece.split_at_mut(len);
            reader.read(bytes)?;
            *turn -= len;
            match self.print(bytes) {
                Ok(()) => {}
                Err(ErrorKind::WouldBlock) => return Ok(Progress::Blocked),
                Err(error) => {
                    debug!("output of a console is dropped: {error}");
                    break;
                }
            }
        }
        self.sent = 0;
        Ok(Progress::Done)
    }

    /// Prints all of `bytes`, and counts those that were taken.
    fn print(&mut self, mut bytes: &[u8]) -> Result<(), ErrorKind> {
        while !bytes.is_empty() {
            match self.to.write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero),
                Ok(count) => {
                    let (taken, left) = bytes.split_at(count.min(bytes.len()));
                    // A chain has less than 4 GiB.
                    self.sent += taken.len() as u32;
                    self.unflushed = true;
                    bytes = left;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.kind()),
            }
        }
        Ok(())
    }

    /// Hands on what the writer holds back. False if it would block.
    pub fn flush(&mut self) -> bool {
        while self.unflushed {
            match self.to.flush() {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                flushed => {
                    if let Err(error) = flushed {
                        debug!("output of a console is dropped: {error}");
                    }
                    self.unflushed = false;
                }
            }
        }
        true
    }

    /// Prints one byte at once, if the writer takes it.
    pub fn emergency(&mut self, byte: u8) {
        let printed = self.to.write(&[byte]).and_then(|_| self.to.flush());
        if let Err(error) = printed {
            debug!("emergency output of a console is dropped: {error}");
        }
    }

    /// Bytes of the next chain that were printed already.
    pub fn sent(&self) -> u32 {
        self.sent
    }

    /// Goes on after so many bytes of the next chain.
    pub fn restore(&mut self, sent: u32) {
        self.sent = sent;
    }

    /// The driver took its chains back.
    pub fn forget_chain(&mut self) {
        self.sent = 0;
    }
}
