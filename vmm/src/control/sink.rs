//! Where a console prints: standard output, a file, or a client that comes by a pseudo-terminal or socket.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{ControlError, duplicate, setup};
use crate::config::ConsoleMode;
use crate::console::{Door, InputSlot, Output};
use crate::event::EventSender;

/// The host's end of a console's output.
pub(super) struct Sink {
    option: &'static str,
    sink: Option<File>,
    /// Of `file=`.
    path: Option<PathBuf>,
    /// The file was not there before.
    created: bool,
    /// Of `pty` and `socket=`, until its thread has it.
    door: Option<Door>,
}

impl Sink {
    pub(super) fn open(option: &'static str, mode: &ConsoleMode) -> Result<Self, ControlError> {
        let mut this = Self {
            option,
            sink: None,
            path: None,
            created: false,
            door: None,
        };
        match mode {
            ConsoleMode::Off | ConsoleMode::Null => {}
            ConsoleMode::Tty => {
                let sink = duplicate(libc::STDOUT_FILENO).map_err(setup("standard output"))?;
                this.sink = Some(sink);
            }
            ConsoleMode::File(path) => {
                let mut options = OpenOptions::new();
                options.write(true);
                let opened = match options.clone().create_new(true).open(path) {
                    Ok(file) => {
                        this.created = true;
                        Ok(file)
                    }
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => options.open(path),
                    Err(e) => Err(e),
                };
                this.sink = Some(opened.map_err(|source| ControlError::File {
                    option,
                    path: path.clone(),
                    source,
                })?);
                this.path = Some(path.clone());
            }
            ConsoleMode::Pty(_) => {
                let door = Door::terminal().map_err(setup("pseudo-terminal"))?;
                // Who started the VM has no other way to learn of it, short of the API.
                let _ = writeln!(io::stderr(), "{option} is at {}", door.path().display());
                this.path = Some(door.path().to_owned());
                this.door = Some(door);
            }
            ConsoleMode::Socket(path) => {
                let door = Door::socket(path).map_err(|source| ControlError::Socket {
                    option,
                    path: path.clone(),
                    source,
                })?;
                this.door = Some(door);
            }
        }
        Ok(this)
    }

    /// Starts the thread that writes to it, and hears of what a client types.
    pub(super) fn output(
        &mut self,
        thread: &str,
        events: &EventSender,
    ) -> Result<(Option<Output>, Option<InputSlot>), ControlError> {
        let events = events.try_clone().map_err(setup("eventfd"))?;
        if let Some(door) = self.door.take() {
            let (output, slot) =
                Output::start_clients(thread, door, events).map_err(setup("console thread"))?;
            return Ok((Some(output), Some(slot)));
        }
        let Some(sink) = &self.sink else {
            return Ok((None, None));
        };
        let sink = sink.try_clone().map_err(setup("console output"))?;
        let output = Output::start(thread, sink, events).map_err(setup("output thread"))?;
        Ok((Some(output), None))
    }

    /// Where the pseudo-terminal or file is.
    pub(super) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Empties a regular file for what is to come.
    pub(super) fn begin(&self) -> Result<(), ControlError> {
        if let (Some(file), Some(_)) = (&self.sink, &self.path)
            && file.metadata().is_ok_and(|m| m.is_file())
        {
            file.set_len(0).map_err(|source| ControlError::File {
                option: self.option,
                path: self.path.clone().unwrap_or_default(),
                source,
            })?;
        }
        Ok(())
    }

    /// Takes back a file that was created for nothing.
    pub(super) fn undo(&self) {
        if let (true, Some(path)) = (self.created, &self.path)
            && let Err(e) = std::fs::remove_file(path)
        {
            log::warn!("removing {}: {e}", path.display());
        }
    }
}
