//! Links of network devices: a guest sees the one of its tap, or of whatever interface packets go through.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use net_util::{Interface, LinkMonitor};
use virtio_devices::NetControl;

/// Network devices whose links follow interfaces of the host.
#[derive(Default)]
pub(super) struct Links {
    monitor: Option<LinkMonitor>,
    /// It can say nothing any more.
    broken: AtomicBool,
    devices: Vec<(Interface, NetControl)>,
}

impl Links {
    /// Listens for changes, from before the first interface is there.
    pub(super) fn new() -> Self {
        let monitor = LinkMonitor::new()
            .inspect_err(|e| log::warn!("guests are not told of links that go down: {e}"));
        Self {
            monitor: monitor.ok(),
            ..Self::default()
        }
    }

    /// The device of `control` sends and receives through `interface`.
    pub(super) fn add(&mut self, interface: Interface, control: NetControl) {
        self.devices.push((interface, control));
    }

    /// Readable when something has changed.
    pub(super) fn fd(&self) -> Option<RawFd> {
        let monitor = self.monitor.as_ref()?;
        (!self.broken.load(Ordering::Relaxed)).then(|| monitor.as_raw_fd())
    }

    /// Tells the drivers.
    pub(super) fn follow(&self) {
        match self.monitor.as_ref().map(LinkMonitor::take_changes) {
            Some(Ok(true)) => {}
            Some(Ok(false)) | None => return,
            Some(Err(e)) => {
                log::warn!("guests are not told of links that go down any more: {e}");
                self.broken.store(true, Ordering::Relaxed);
                return;
            }
        }
        for (interface, control) in &self.devices {
            // Of an interface that was renamed or is gone nothing is known.
            if let Ok(up) = interface.has_link() {
                control.set_link(up);
            }
        }
    }
}
