//! `--disk`: block devices.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use block_util::{Engine, RateLimiter, RateLimiterError};
use virtio_devices::vhost_user::{VhostUserBlock, VhostUserConfig, VhostUserError};
use virtio_devices::{Block, BlockConfig, BlockControl, SERIAL_LEN};
use vm_virtio::Spawn;

use super::{DeviceError, Memory, VirtioHost};
use crate::config::{DiskConfig, RateLimitConfig, VmConfig};
use crate::disk;

const OPTION: &str = "--disk";
/// How long a back end may take to start a disk or to stop it, with what is in flight.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often the log says that a disk's back end is lost.
const MOST_LOSSES: u64 = 32;

/// Makes the disks, and gives what changes them, by id.
pub(super) fn add(
    host: &VirtioHost<'_>,
    config: &VmConfig,
) -> Result<BTreeMap<String, BlockControl>, DeviceError> {
    let groups = groups(config)?;
    let mut controls = BTreeMap::new();
    for (index, disk) in config.disks.iter().enumerate() {
        let id = disk.id.clone().unwrap_or_else(|| format!("_disk{index}"));
        if let Some(socket) = disk.vhost_socket.as_ref().filter(|_| disk.vhost_user) {
            let device = vhost_user(&id, disk, socket, &host.spawn)?;
            host.add(&id, Box::new(device))?;
            continue;
        }
        let mut block = block(&id, disk, &host.spawn)?;
        if let Some(limiter) = limiter(disk, &groups)? {
            block.limit(limiter).map_err(DeviceError::option(OPTION))?;
        }
        let control = block.control();
        host.add_behind(&id, Box::new(block), disk.iommu)?;
        controls.insert(id, control);
    }
    Ok(controls)
}

/// A disk that the process at `socket` serves.
fn vhost_user(
    id: &str,
    config: &DiskConfig,
    socket: &Path,
    spawn: &Spawn,
) -> Result<VhostUserBlock<Memory>, DeviceError> {
    let name = id.to_owned();
    let losses = AtomicU64::new(0);
    let lost = move |why: &VhostUserError| {
        // A guest can have the back end close its connection as often as it likes.
        let level = match losses.fetch_add(1, Ordering::Relaxed) {
            0..MOST_LOSSES => log::Level::Error,
            _ => log::Level::Debug,
        };
        log::log!(level, "disk {name:?}: {}", crate::error_chain(why));
    };
    let back_end = VhostUserConfig {
        id: id.to_owned(),
        socket: socket.to_owned(),
        queues: config.num_queues,
        queue_size: config.queue_size,
        patience: PATIENCE,
        spawn: spawn.clone(),
        lost: Arc::new(lost),
    };
    VhostUserBlock::new(back_end, config.readonly).map_err(DeviceError::option(OPTION))
}

/// The limiters that disks share, by the id of their group.
fn groups(config: &VmConfig) -> Result<BTreeMap<&str, Arc<RateLimiter>>, DeviceError> {
    let limiter = |limits: &RateLimitConfig| RateLimiter::new(&limits.limiter()).map(Arc::new);
    let all: Result<_, RateLimiterError> = config
        .rate_limit_groups
        .iter()
        .map(|group| Ok((group.id.as_str(), limiter(&group.rate_limiter_config)?)))
        .collect();
    all.map_err(DeviceError::option("--rate-limit-group"))
}

/// What limits a disk. That its group is there was checked with the config.
fn limiter(
    disk: &DiskConfig,
    groups: &BTreeMap<&str, Arc<RateLimiter>>,
) -> Result<Option<Arc<RateLimiter>>, DeviceError> {
    if let Some(limits) = &disk.rate_limiter_config {
        let own = RateLimiter::new(&limits.limiter()).map_err(DeviceError::option(OPTION))?;
        return Ok(Some(Arc::new(own)));
    }
    let group = disk.rate_limit_group.as_deref();
    Ok(group.and_then(|id| groups.get(id)).cloned())
}

/// A block device on the disk of `config`, which is opened and locked.
fn block(id: &str, config: &DiskConfig, spawn: &Spawn) -> Result<Block<Memory>, DeviceError> {
    let disk = disk::open(config, id, spawn).map_err(DeviceError::option(OPTION))?;
    let block = BlockConfig {
        id: id.to_owned(),
        queues: config.num_queues,
        queue_size: config.queue_size,
        // Without one of its own a disk is known by its name.
        serial: config.serial.clone().unwrap_or_else(|| {
            id.bytes()
                .filter(u8::is_ascii_graphic)
                .take(SERIAL_LEN)
                .map(char::from)
                .collect()
        }),
        engine: Engine::Auto,
        affinity: config.cpus_of_queues(),
        poll: config.poll_queue,
    };
    Block::new(block, disk).map_err(DeviceError::option(OPTION))
}
