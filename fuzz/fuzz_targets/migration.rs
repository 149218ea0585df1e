//! Saved machine state from a file or connection: the envelope, its sections, and state that devices take out of it.
//!
//! Holds to: no panic, memory only as data arrive; what is accepted is written again byte for byte, and a device takes hostile state or
//! refuses it.
//!
//! The input is an envelope. If its first byte is odd, the rest is one that still lacks its checksum.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pci::{ConfigurationState, HostBridge, PciConfigIoState};
use vm_migration::{Schema, Snapshot};
use vm_virtio::RegistersV1;

/// Takes the first section of this kind out.
fn take<S: Schema>(snapshot: &mut Snapshot) -> Option<S> {
    let section = snapshot.sections().iter().find(|s| s.kind == S::KIND)?;
    let id = section.id.clone();
    snapshot.take(&id).ok()
}

fuzz_target!(|data: &[u8]| {
    let Some((how, bytes)) = data.split_first() else {
        return;
    };
    let mut bytes = bytes.to_vec();
    if how % 2 == 1 {
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    }
    let Ok(mut snapshot) = Snapshot::from_bytes(&bytes) else {
        return;
    };
    let mut again = Vec::new();
    snapshot
        .write_to(&mut again)
        .expect("what was read can be written");
    assert!(again == bytes, "written again it is another");

    if let Some(state) = take::<ConfigurationState>(&mut snapshot) {
        let bridge = HostBridge::default();
        if bridge.restore(&state).is_ok() {
            assert!(
                bridge.save().registers == state.registers,
                "accepted, but not as it was"
            );
        }
    }
    let _ = take::<PciConfigIoState>(&mut snapshot);
    let _ = take::<RegistersV1>(&mut snapshot);
    let _ = snapshot.finish();
});
