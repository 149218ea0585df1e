//! What can be asked, and what is answered.

use std::collections::BTreeMap;
use std::error::Error;

use serde::{Deserialize, Serialize};

use super::http::{Response, Status};
use crate::config::VmConfig;

/// What a client wants of the VMM.
#[derive(Debug)]
pub enum Request {
    /// Who is there.
    Ping,
    /// End everything.
    VmmShutdown,
    /// The VM's configuration and state.
    VmInfo,
    /// What was counted.
    VmCounters,
    /// This is to be the VM.
    Create(Box<VmConfig>),
    /// Start it.
    Boot,
    /// Forget it.
    Delete,
    /// Hold it.
    Pause,
    /// Let it go on.
    Resume,
    /// End it, but not the VMM.
    Shutdown,
    /// Start it anew.
    Reboot,
    /// Press its power button.
    PowerButton,
    /// Send it a non-maskable interrupt.
    Nmi,
    /// Change its memory or vCPUs.
    Resize(Resize),
    /// Change the size of a disk.
    ResizeDisk(ResizeDisk),
}

/// Body of `vm.resize`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resize {
    /// vCPUs.
    pub desired_vcpus: Option<u8>,
    /// Bytes of RAM.
    pub desired_ram: Option<u64>,
    /// Bytes that the balloon is to take from the guest.
    pub desired_balloon: Option<u64>,
    /// Bytes of RAM that are to be left to the guest; the balloon takes the rest.
    pub desired_ram_w_balloon: Option<u64>,
}

/// Body of `vm.resize-disk`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeDisk {
    /// The disk's id.
    pub id: String,
    /// Bytes.
    pub desired_size: u64,
}

/// Where a VM is in its life.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum VmState {
    /// Configured, and not started yet.
    Created,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs and devices are held.
    Paused,
    /// It ran, and can be started again.
    Shutdown,
}

/// Answer to `vmm.ping`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Ping {
    /// Of the VMM, e.g. `v0.1.0`.
    pub version: String,
    /// The VMM's process.
    pub pid: u32,
    /// Optional parts that it was built with.
    pub features: Vec<String>,
}

impl Ping {
    /// Of this process.
    #[must_use]
    pub fn of_this_process() -> Self {
        let mut features = Vec::new();
        if cfg!(feature = "firmware-debug") {
            features.push("firmware-debug".to_owned());
        }
        Self {
            version: format!("v{}", env!("CARGO_PKG_VERSION")),
            pid: std::process::id(),
            features,
        }
    }
}

/// One device of the VM.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct DeviceNode {
    /// Its name in the API.
    pub id: String,
    /// Where it is on the PCI bus: segment, bus, slot and function.
    pub pci_bdf: String,
}

/// Answer to `vm.info`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct VmInfo {
    /// As given, with the defaults.
    pub config: VmConfig,
    /// Where it is in its life.
    pub state: VmState,
    /// Bytes of memory that the guest has now.
    pub memory_actual_size: u64,
    /// Devices on the PCI bus, by id; none unless the VM runs.
    pub device_tree: BTreeMap<String, DeviceNode>,
}

/// What comes of a request that succeeded.
#[derive(Debug)]
pub enum Answer {
    /// Nothing to read.
    Done,
    /// JSON.
    Json(Vec<u8>),
}

impl Answer {
    /// `value` as JSON.
    ///
    /// # Errors
    /// A value that JSON cannot tell, such as a path that is not UTF-8.
    pub fn json(value: &impl Serialize) -> Result<Self, Failure> {
        let json = serde_json::to_vec(value);
        json.map(Self::Json)
            .map_err(|e| Failure::of(Status::Failed, "writing the answer", &e))
    }

    pub(super) fn response(self) -> Response {
        match self {
            Self::Done => Response {
                status: Status::NoContent,
                body: Vec::new(),
            },
            Self::Json(body) => Response {
                status: Status::Ok,
                body,
            },
        }
    }
}

/// A request that failed: what and why, outermost first.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Failure {
    /// For the status line.
    pub status: Status,
    /// The error and its causes.
    pub chain: Vec<String>,
}

impl Failure {
    /// With nothing behind it.
    pub fn new(status: Status, what: impl Into<String>) -> Self {
        Self {
            status,
            chain: vec![what.into()],
        }
    }

    /// `what` failed because of `error`.
    pub fn of(status: Status, what: impl Into<String>, error: &dyn Error) -> Self {
        let mut this = Self::new(status, what);
        let mut cause = Some(error);
        while let Some(error) = cause {
            this.chain.push(error.to_string());
            cause = error.source();
        }
        this
    }

    /// The answer: a JSON array of sentences.
    pub(super) fn response(&self) -> Response {
        Response {
            status: self.status,
            // Strings always have a JSON form.
            body: serde_json::to_vec(&self.chain).unwrap_or_default(),
        }
    }
}
