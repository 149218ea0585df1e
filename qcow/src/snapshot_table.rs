//! The snapshot table (qcow2 "Snapshots").

use std::time::Duration;

use crate::error::{Error, Result};
use crate::header::{Header, be32, be64};
use crate::storage::Storage;

/// Largest snapshot table that is read, in bytes.
const MAX_TABLE: u64 = 64 << 20;
/// Largest extra data of a snapshot, in bytes.
const MAX_EXTRA: usize = 1024;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique identifier.
    pub id: String,
    /// Name; not necessarily unique.
    pub name: String,
    /// When it was taken, since the Epoch.
    pub taken: Duration,
    /// How long the guest had run.
    pub guest_clock: Duration,
    /// Size of the saved machine state in bytes, 0 without.
    pub vm_state_size: u64,
    /// Size of the virtual disk in bytes when it was taken.
    pub disk_size: u64,
    pub(crate) l1_offset: u64,
    pub(crate) l1_size: u32,
    /// Extra data past what this crate knows.
    pub(crate) more: Vec<u8>,
    /// Bytes of its entry as read.
    pub(crate) on_disk: u64,
}

/// Reads the whole table.
pub(crate) fn read(storage: &dyn Storage, header: &Header) -> Result<Vec<Snapshot>> {
    let malformed =
        |i: u32, why: String| Error::malformed("snapshot table", format!("entry {i}: {why}"));
    let layout = header.layout();
    let mut snapshots = Vec::new();
    let mut at = header.snapshots_offset;
    for i in 0..header.snapshot_count {
        let mut fixed = [0u8; 40];
        storage
            .read_at(&mut fixed, at)
            .map_err(Error::io("reading", "image file", at))?;
        let id_length = usize::from(u16::from_be_bytes([fixed[12], fixed[13]]));
        let name_length = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
        let extra_length = be32(&fixed, 36) as usize;
        if extra_length > MAX_EXTRA {
            return Err(malformed(i, format!("{extra_length} bytes of extra data")));
        }
        let mut rest = vec![0u8; extra_length + id_length + name_length];
        storage
            .read_at(&mut rest, at + 40)
            .map_err(Error::io("reading", "image file", at + 40))?;
        let (extra, names) = rest.split_at(extra_length);
        let (id, name) = names.split_at(id_length);
        let snapshot = Snapshot {
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            taken: Duration::new(
                u64::from(be32(&fixed, 16)),
                be32(&fixed, 20).min(999_999_999),
            ),
            guest_clock: Duration::from_nanos(be64(&fixed, 24)),
            vm_state_size: if extra.len() >= 8 {
                be64(extra, 0)
            } else {
                u64::from(be32(&fixed, 32))
            },
            disk_size: if extra.len() >= 16 {
                be64(extra, 8)
            } else {
                header.size
            },
            l1_offset: be64(&fixed, 0),
            l1_size: be32(&fixed, 8),
            more: extra.get(16..).unwrap_or_default().to_vec(),
            on_disk: (40 + rest.len() as u64).next_multiple_of(8),
        };
        if !layout.aligned(snapshot.l1_offset) || snapshot.l1_offset >= 1 << 63 {
            return Err(malformed(
                i,
                format!("L1 table at {:#x}", snapshot.l1_offset),
            ));
        }
        if u64::from(snapshot.l1_size) * 8 > 32 << 20 {
            return Err(malformed(
                i,
                format!("L1 table of {} entries", snapshot.l1_size),
            ));
        }
        if layout.l1_entries(snapshot.disk_size) > u64::from(snapshot.l1_size) {
            return Err(malformed(i, "its L1 table does not cover its disk".into()));
        }
        snapshots.push(snapshot);
        at += (40 + rest.len() as u64).next_multiple_of(8);
        if at - header.snapshots_offset > MAX_TABLE {
            return Err(malformed(i, "the table is larger than 64 MiB".into()));
        }
    }
    Ok(snapshots)
}

/// The table as bytes.
pub(crate) fn encode(snapshots: &[Snapshot]) -> Result<Vec<u8>> {
    let mut b = Vec::new();
    for s in snapshots {
        let length = |what: &str, n: usize| {
            u16::try_from(n)
                .map_err(|_| Error::Invalid(format!("a snapshot {what} of {n} bytes; 65535 fit")))
        };
        b.extend_from_slice(&s.l1_offset.to_be_bytes());
        b.extend_from_slice(&s.l1_size.to_be_bytes());
        b.extend_from_slice(&length("id", s.id.len())?.to_be_bytes());
        b.extend_from_slice(&length("name", s.name.len())?.to_be_bytes());
        b.extend_from_slice(&(s.taken.as_secs() as u32).to_be_bytes());
        b.extend_from_slice(&s.taken.subsec_nanos().to_be_bytes());
        b.extend_from_slice(&(s.guest_clock.as_nanos() as u64).to_be_bytes());
        b.extend_from_slice(&u32::try_from(s.vm_state_size).unwrap_or(0).to_be_bytes());
        b.extend_from_slice(&(16 + s.more.len() as u32).to_be_bytes());
        b.extend_from_slice(&s.vm_state_size.to_be_bytes());
        b.extend_from_slice(&s.disk_size.to_be_bytes());
        b.extend_from_slice(&s.more);
        b.extend_from_slice(s.id.as_bytes());
        b.extend_from_slice(s.name.as_bytes());
        b.resize(b.len().next_multiple_of(8), 0);
    }
    if b.len() as u64 > MAX_TABLE {
        return Err(Error::Limit(
            "the snapshot table is larger than 64 MiB".into(),
        ));
    }
    Ok(b)
}

/// Bytes that the table takes on disk.
pub(crate) fn table_bytes(snapshots: &[Snapshot]) -> u64 {
    snapshots.iter().map(|s| s.on_disk).sum()
}
