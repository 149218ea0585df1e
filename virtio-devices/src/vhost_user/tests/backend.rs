//! A back end: our own block device, with the rings and the memory that it is given. It can be told to misbehave.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use block_util::{DiskFile, Engine, RawDisk, RawOptions};
use vhost::vhost_user::message::*;
use vhost::vhost_user::{
    Backend, BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
    VhostUserFrontendReqHandler,
};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};
use vm_virtio::testing::{TestMemory, spawn};
use vm_virtio::{Activation, DeviceQueue, QueueV1, VirtioDevice, VirtioInterrupt};
use vmm_sys_util::eventfd::EventFd;

use crate::vhost_user::connection::PROTOCOL_FEATURES;
use crate::{Block, BlockConfig};

/// How a back end is.
#[derive(Clone)]
pub struct Manner {
    pub queues: u16,
    pub read_only: bool,
    /// What it offers besides.
    pub protocol: VhostUserProtocolFeatures,
    /// What it hides of virtio's features.
    pub hidden: u64,
    /// It tells its configuration in so many bytes too few.
    pub short_config: usize,
    /// What it says when it is asked how far it is with a ring, instead of the truth.
    pub base: Option<u32>,
    /// It refuses guest memory.
    pub refuses_memory: bool,
    /// It says something that nobody understands when a ring starts.
    pub talks: bool,
    /// Sectors by which its disk seems to have grown.
    pub grown: Arc<AtomicU64>,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            queues: 1,
            read_only: false,
            protocol: VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::BACKEND_REQ,
            hidden: 0,
            short_config: 0,
            base: None,
            refuses_memory: false,
            talks: false,
            grown: Arc::default(),
        }
    }
}

/// A process that listens, but for its being a thread.
pub struct Server {
    _dir: tempfile::TempDir,
    pub socket: PathBuf,
    image: PathBuf,
    shared: Arc<Shared>,
}

struct Shared {
    manner: Mutex<Manner>,
    streams: Mutex<Vec<UnixStream>>,
    ended: AtomicBool,
}

impl Server {
    /// Serves a disk of `sectors`, sector `n` of which is full of `n + 1`.
    pub fn new(sectors: u32, manner: Manner) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (socket, image) = (dir.path().join("s"), dir.path().join("disk"));
        let bytes: Vec<u8> = (0..sectors).flat_map(|n| [n as u8 + 1; 512]).collect();
        std::fs::write(&image, bytes).unwrap();
        let server = Self {
            _dir: dir,
            socket,
            image,
            shared: Arc::new(Shared {
                manner: Mutex::new(manner),
                streams: Mutex::default(),
                ended: AtomicBool::new(false),
            }),
        };
        server.listen();
        server
    }

    fn listen(&self) {
        let listener = UnixListener::bind(&self.socket).unwrap();
        let (shared, image) = (self.shared.clone(), self.image.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.ended.load(Ordering::SeqCst) {
                    break;
                }
                let stream = stream.unwrap();
                let ours = stream.try_clone().unwrap();
                shared.streams.lock().unwrap().push(ours);
                let manner = shared.manner.lock().unwrap().clone();
                let served = Served::new(&image, manner);
                std::thread::spawn(move || {
                    let served = Arc::new(Mutex::new(served));
                    let end = stream.try_clone().unwrap();
                    let mut handler = BackendReqHandler::from_stream(stream, served);
                    while handler.handle_request().is_ok() {}
                    let _ = end.shutdown(Shutdown::Both);
                });
            }
        });
    }

    /// From the next connection on.
    pub fn change(&self, change: impl FnOnce(&mut Manner)) {
        change(&mut self.shared.manner.lock().unwrap());
    }

    /// Closes all connections.
    pub fn hang_up(&self) {
        for stream in self.shared.streams.lock().unwrap().drain(..) {
            // It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Connections so far that were not closed.
    pub fn connections(&self) -> usize {
        self.shared.streams.lock().unwrap().len()
    }

    /// Nobody listens any more.
    pub fn end(&self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // It is looked at before the next connection.
        drop(UnixStream::connect(&self.socket));
        let _ = std::fs::remove_file(&self.socket);
    }

    pub fn image(&self) -> Vec<u8> {
        std::fs::read(&self.image).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the driver's side hears of the block device of one ring.
struct Calls {
    index: u16,
    call: EventFd,
    err: EventFd,
}

impl VirtioInterrupt for Calls {
    fn queue(&self, _: u16) {
        self.call.write(1).unwrap();
    }

    fn config_changed(&self) {}

    fn needs_reset(&self) {
        assert!(self.index < 256);
        self.err.write(1).unwrap();
    }
}

#[derive(Default)]
struct Ring {
    state: QueueV1,
    kick: Option<EventFd>,
    call: Option<EventFd>,
    err: Option<EventFd>,
}

/// One connection.
struct Served {
    manner: Manner,
    devices: Vec<Block<TestMemory>>,
    memory: Option<TestMemory>,
    /// First address of the other side, length, first address of the guest.
    regions: Vec<(u64, u64, u64)>,
    features: u64,
    rings: Vec<Ring>,
    channel: Option<Backend>,
}

impl Served {
    fn new(image: &Path, manner: Manner) -> Self {
        let options = RawOptions {
            read_only: manner.read_only,
            ..RawOptions::default()
        };
        let disk: Arc<dyn DiskFile> = Arc::new(RawDisk::open(image, &options).unwrap());
        let device = |index| {
            let config = BlockConfig {
                id: format!("served{index}"),
                queues: manner.queues,
                queue_size: 256,
                serial: "served".into(),
                engine: Engine::Sync,
                affinity: Vec::new(),
                poll: false,
            };
            Block::new(config, disk.clone()).unwrap()
        };
        Self {
            devices: (0..manner.queues).map(device).collect(),
            memory: None,
            regions: Vec::new(),
            features: 0,
            rings: (0..manner.queues).map(|_| Ring::default()).collect(),
            manner,
            channel: None,
        }
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        self.rings
            .get_mut(index as usize)
            .ok_or(Error::InvalidParam)
    }

    fn guest_address(&self, theirs: u64) -> Result<u64> {
        let found = self
            .regions
            .iter()
            .find(|(start, len, _)| (*start..start + len).contains(&theirs));
        found
            .map(|(start, _, guest)| theirs - start + guest)
            .ok_or(Error::InvalidParam)
    }

    fn start(&mut self, index: u32) -> Result<()> {
        let memory = self.memory.clone().ok_or(Error::InvalidParam)?;
        let features = self.features;
        let ring = self.ring(index)?;
        let (Some(kick), Some(call), Some(err)) = (&ring.kick, &ring.call, &ring.err) else {
            return Err(Error::InvalidParam);
        };
        let kick = Arc::new(kick.try_clone().unwrap());
        ring.state.ready = true;
        let queue = DeviceQueue::new(index as u16, 256, &ring.state, features, &*memory, kick)
            .map_err(|_| Error::InvalidParam)?;
        // It goes on where the used ring is.
        let mut queue = queue;
        queue
            .take_back(&*memory, Some(ring.state.next_available))
            .map_err(|_| Error::InvalidParam)?;
        let interrupt = Calls {
            index: index as u16,
            call: call.try_clone().unwrap(),
            err: err.try_clone().unwrap(),
        };
        let activation = Activation {
            memory,
            queues: vec![queue],
            features,
            interrupt: Arc::new(interrupt),
            spawn: spawn(),
        };
        self.devices[index as usize]
            .activate(activation)
            .map_err(|_| Error::BackendInternalError)
    }

    fn stop(&mut self, index: u32) -> u16 {
        let device = &mut self.devices[index as usize];
        let queues = device.deactivate().unwrap();
        let ring = &mut self.rings[index as usize];
        if let Some(queue) = queues.first() {
            ring.state.next_available = queue.state().next_available;
        }
        ring.state.next_available
    }
}

fn event(fd: Option<File>) -> Result<Option<EventFd>> {
    let fd = fd.ok_or(Error::InvalidParam)?.into_raw_fd();
    // SAFETY: it was the file's, and is an eventfd: the tests see to that.
    Ok(Some(unsafe { EventFd::from_raw_fd(fd) }))
}

impl VhostUserBackendReqHandlerMut for Served {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        let features = VirtioDevice::<TestMemory>::features(&self.devices[0]);
        Ok((features | PROTOCOL_FEATURES) & !self.manner.hidden)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features & !PROTOCOL_FEATURES;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        if self.manner.refuses_memory {
            return Err(Error::InvalidParam);
        }
        let map = |(region, file): (&VhostUserMemoryRegion, File)| {
            let file = FileOffset::new(file, region.mmap_offset);
            let mapping = MmapRegion::from_file(file, region.memory_size as usize).unwrap();
            GuestRegionMmap::new(mapping, GuestAddress(region.guest_phys_addr)).unwrap()
        };
        let mapped: Vec<_> = regions.iter().zip(files).map(map).collect();
        let memory = GuestMemoryMmap::from_regions(mapped).unwrap();
        assert!(memory.iter().all(|region| region.len() > 0));
        self.memory = Some(Arc::new(memory));
        self.regions = regions
            .iter()
            .map(|r| (r.user_addr, r.memory_size, r.guest_phys_addr))
            .collect();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.ring(index)?.state.size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _: u64,
    ) -> Result<()> {
        let places = [descriptor, used, available].map(|theirs| self.guest_address(theirs));
        let [descriptors, used, available] = places;
        let (descriptors, used, available) = (descriptors?, used?, available?);
        let ring = self.ring(index)?;
        ring.state.descriptors = descriptors;
        ring.state.used = used;
        ring.state.available = available;
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = base as u16;
        let ring = self.ring(index)?;
        ring.state.next_available = base;
        ring.state.next_used = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = u32::from(self.stop(index));
        let told = self.manner.base.unwrap_or(base);
        Ok(VhostUserVringState::new(index, told))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(index.into())?.kick = event(fd)?;
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(index.into())?.call = event(fd)?;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(index.into())?.err = event(fd)?;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(self.manner.protocol)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let has = self.manner.protocol | VhostUserProtocolFeatures::REPLY_ACK;
        if features & !has.bits() != 0 {
            return Err(Error::InvalidParam);
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.manner.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if !enable {
            self.stop(index);
            return Ok(());
        }
        if let (true, Some(channel)) = (self.manner.talks, &self.channel) {
            channel.set_shared_object_flag(true);
            // No answer comes, or the other side has closed it.
            let _ = channel.shared_object_add(&VhostUserSharedMsg::default());
        }
        self.start(index)
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let mut bytes = vec![0; size as usize];
        let device: &dyn VirtioDevice<TestMemory> = &self.devices[0];
        device.read_config(offset as usize, &mut bytes);
        if let Some(capacity) = bytes.first_mut() {
            *capacity += self.manner.grown.load(Ordering::SeqCst) as u8;
        }
        bytes.truncate(bytes.len() - self.manner.short_config);
        Ok(bytes)
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        for device in &mut self.devices {
            let device: &mut dyn VirtioDevice<TestMemory> = device;
            device.write_config(offset as usize, bytes);
        }
        Ok(())
    }

    fn set_backend_req_fd(&mut self, channel: Backend) {
        self.channel = Some(channel);
    }

    // What the front end never asks.

    fn reset_owner(&mut self) -> Result<()> {
        unasked()
    }

    fn reset_device(&mut self) -> Result<()> {
        unasked()
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        unasked()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        unasked()
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unasked()
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        unasked()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        unasked()
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        unasked()
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        unasked()
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        unasked()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unasked()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unasked()
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        unasked()
    }
}

fn unasked<T>() -> Result<T> {
    Err(Error::ReqHandlerError(io::ErrorKind::Unsupported.into()))
}
