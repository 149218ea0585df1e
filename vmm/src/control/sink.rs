//! Where a console prints: standard output or a file.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::PathBuf;

use super::{ControlError, duplicate, setup};
use crate::config::ConsoleMode;
use crate::console::Output;
use crate::event::EventSender;

/// The host's end of a console's output.
pub(super) struct Sink {
    option: &'static str,
    sink: Option<File>,
    /// Of `file=`.
    path: Option<PathBuf>,
    /// The file was not there before.
    created: bool,
}

impl Sink {
    pub(super) fn open(option: &'static str, mode: &ConsoleMode) -> Result<Self, ControlError> {
        let mut this = Self {
            option,
            sink: None,
            path: None,
            created: false,
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
        }
        Ok(this)
    }

    /// Starts the thread that writes to it.
    pub(super) fn output(
        &self,
        thread: &str,
        events: &EventSender,
    ) -> Result<Option<Output>, ControlError> {
        let Some(sink) = &self.sink else {
            return Ok(None);
        };
        let sink = sink.try_clone().map_err(setup("console output"))?;
        let events = events.try_clone().map_err(setup("eventfd"))?;
        let output = Output::start(thread, sink, events).map_err(setup("output thread"))?;
        Ok(Some(output))
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
