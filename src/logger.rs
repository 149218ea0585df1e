//! Log lines with the time since start, the thread and the level, to standard error or a file.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use log::{LevelFilter, Log, Metadata, Record};

struct Logger {
    start: Instant,
    to: Mutex<Box<dyn Write + Send>>,
}

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let thread = std::thread::current();
        let mut to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        // A log that cannot be written must not take the VM down.
        let _ = writeln!(
            to,
            "{:.6} {} {} {}: {}",
            self.start.elapsed().as_secs_f64(),
            thread.name().unwrap_or("-"),
            record.level(),
            record.target(),
            record.args()
        );
    }

    fn flush(&self) {
        let _ = self
            .to
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .flush();
    }
}

/// Logs go to `file`, or standard error; errors only, and with each `-v` one level more.
pub fn install(file: Option<&str>, verbosity: u32) -> Result<()> {
    let level = match verbosity {
        0 => LevelFilter::Error,
        1 => LevelFilter::Warn,
        2 => LevelFilter::Info,
        3 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    let to: Box<dyn Write + Send> = match file {
        None => Box::new(io::stderr()),
        Some(path) => Box::new(
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(Path::new(path))
                .with_context(|| format!("opening the log file {path:?}"))?,
        ),
    };
    let logger = Logger {
        start: Instant::now(),
        to: Mutex::new(to),
    };
    log::set_boxed_logger(Box::new(logger)).context("installing the logger")?;
    log::set_max_level(level);
    Ok(())
}
