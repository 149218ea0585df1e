//! The virtual machine monitor: configuration, VM life, device manager, control thread.

pub mod api;
pub mod config;
pub mod console;
pub mod control;
mod cpu_manager;
mod device_manager;
mod disk;
pub mod event;
mod machine;
mod memory_manager;
mod pmem;
mod poll;
pub mod signals;
mod socket_file;
mod tap;
pub mod threads;
mod user_network;

pub use device_manager::{DeviceError, DeviceManager};
pub use machine::{Machine, MachineError};

/// An error and its causes as one line: `a: b: c`.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}
