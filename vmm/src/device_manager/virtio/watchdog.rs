//! `--watchdog`: the VM starts anew when the guest hangs.

use std::sync::Arc;
use std::time::Duration;

use virtio_devices::Watchdog;

use super::{DeviceError, VirtioHost};
use crate::config::VmConfig;
use crate::event::Event;

/// As long as the drivers that there are expect.
const TIMEOUT: Duration = Duration::from_secs(15);

pub(super) fn add(host: &VirtioHost<'_>, config: &VmConfig) -> Result<(), DeviceError> {
    if !config.watchdog {
        return Ok(());
    }
    let id = "_watchdog";
    let events = host
        .events
        .try_clone()
        .map_err(|source| DeviceError::Event {
            name: "watchdog",
            source,
        })?;
    let expired = move || {
        log::warn!("the guest gave its watchdog no sign for {TIMEOUT:?}");
        events.send(Event::GuestReset);
    };
    host.add(id, Box::new(Watchdog::new(id, TIMEOUT, Arc::new(expired))))
}
