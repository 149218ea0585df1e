//! `--console`: the virtio console.

use std::io;
use std::sync::Arc;

use virtio_devices::{Console, ConsoleHandle, ConsoleInput};

use super::{DeviceError, VirtioHost};
use crate::config::{ConsoleMode, VmConfig};
use crate::console::{Output, terminal};

/// The host's ends of the console.
pub(in crate::device_manager) struct ConsoleEnds {
    pub(in crate::device_manager) input: Arc<ConsoleInput>,
    pub(in crate::device_manager) handle: ConsoleHandle,
}

/// Makes the console, unless it is off. `output` is the host's end of what it prints.
pub(super) fn add(
    host: &VirtioHost<'_>,
    config: &VmConfig,
    output: Option<Output>,
) -> Result<Option<ConsoleEnds>, DeviceError> {
    let size = match config.console_mode() {
        ConsoleMode::Off => return Ok(None),
        ConsoleMode::Tty => terminal::size(),
        _ => (0, 0),
    };
    let input = ConsoleInput::new().map_err(|source| DeviceError::Event {
        name: "console",
        source,
    })?;
    let output: Box<dyn io::Write + Send> = match output {
        Some(output) => Box::new(output),
        None => Box::new(io::sink()),
    };
    let id = "_console";
    let console =
        Console::new(id, output, input.clone(), size).map_err(DeviceError::option("--console"))?;
    let handle = console.handle();
    let iommu = config.console.as_ref().is_some_and(|c| c.iommu);
    host.add_behind(id, Box::new(console), iommu)?;
    Ok(Some(ConsoleEnds { input, handle }))
}
