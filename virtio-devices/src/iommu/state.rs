//! What is saved of an IOMMU.

use serde::{Deserialize, Serialize};
use vm_memory::Permissions;
use vm_migration::Schema;

use super::mappings::Mapping;

/// The state of an IOMMU.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct IommuV1 {
    /// Endpoints without a domain see physical memory.
    pub bypass: bool,
    /// All domains.
    pub domains: Vec<DomainV1>,
    /// Endpoints and their domains.
    pub attached: Vec<(u32, u32)>,
}

/// One domain.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DomainV1 {
    /// Its number.
    pub id: u32,
    /// Its mappings; none where it is a bypass domain.
    pub mappings: Option<Vec<MappingV1>>,
}

/// One mapping.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MappingV1 {
    /// First address of the device's.
    pub first: u64,
    /// Last one.
    pub last: u64,
    /// Guest-physical address of the first.
    pub physical: u64,
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

impl From<&Mapping> for MappingV1 {
    fn from(mapping: &Mapping) -> Self {
        Self {
            first: mapping.first,
            last: mapping.last,
            physical: mapping.physical,
            read: mapping.access.allow(Permissions::Read),
            write: mapping.access.allow(Permissions::Write),
        }
    }
}

impl From<&MappingV1> for Mapping {
    fn from(saved: &MappingV1) -> Self {
        Self {
            first: saved.first,
            last: saved.last,
            physical: saved.physical,
            access: access(saved.read, saved.write),
        }
    }
}

/// What a device may do.
pub(super) const fn access(read: bool, write: bool) -> Permissions {
    match (read, write) {
        (false, false) => Permissions::No,
        (true, false) => Permissions::Read,
        (false, true) => Permissions::Write,
        (true, true) => Permissions::ReadWrite,
    }
}

impl Schema for IommuV1 {
    const KIND: &'static str = "virtio-iommu";
    const VERSION: u32 = 1;
}
