//! What a person types, on its way to the guest.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};

use super::{ControlError, duplicate, setup};
use crate::config::{ConsoleMode, VmConfig};
use crate::console::{Escape, terminal};
use crate::machine::Machine;

/// Standard input on its way to the console that has the terminal.
pub(super) struct Typing {
    input: Option<File>,
    escape: Option<Escape>,
    /// Read, and not yet taken by the console.
    waiting: Vec<u8>,
    _raw: Option<terminal::RawMode>,
}

impl Typing {
    pub(super) fn start(config: &VmConfig) -> Result<Self, ControlError> {
        let mut typing = Self {
            input: None,
            escape: None,
            waiting: Vec::new(),
            _raw: None,
        };
        let modes = [&config.serial.mode, config.console_mode()];
        if modes.contains(&&ConsoleMode::Tty) {
            // A process may be started without standard input; it then simply has none.
            typing.input = duplicate(libc::STDIN_FILENO).ok();
            if terminal::is_terminal(libc::STDIN_FILENO) {
                typing.escape = Some(Escape::default());
                typing._raw = Some(terminal::RawMode::enter().map_err(setup("terminal"))?);
            }
        }
        Ok(typing)
    }

    /// Reads once. True when the person wants to leave.
    pub(super) fn read(&mut self) -> bool {
        let Some(input) = &mut self.input else {
            return false;
        };
        let mut buffer = [0; 256];
        match input.read(&mut buffer) {
            Ok(0) => self.input = None,
            Ok(n) => {
                let bytes = buffer.get(..n).unwrap_or_default();
                match &mut self.escape {
                    None => self.waiting.extend_from_slice(bytes),
                    Some(escape) => {
                        let typed = escape.feed(bytes);
                        self.waiting.extend_from_slice(&typed.to_guest);
                        return typed.leave;
                    }
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => {
                log::warn!("reading standard input: {e}");
                self.input = None;
            }
        }
        false
    }

    /// Gives the guest what it takes of what waits.
    pub(super) fn pass_to(&mut self, machine: &Machine) {
        if self.waiting.is_empty() {
            return;
        }
        let taken = machine.devices().type_in(&self.waiting);
        self.waiting.drain(..taken.min(self.waiting.len()));
    }

    /// To be polled: standard input while there is room for what it says; else -1.
    pub(super) fn fd(&self) -> RawFd {
        match &self.input {
            Some(input) if self.waiting.is_empty() => input.as_raw_fd(),
            _ => -1,
        }
    }
}
