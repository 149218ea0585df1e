//! The header of a qcow2 image and its extensions.
//!
//! Holds to: no panic, no allocation beyond what the input could fill; what is accepted keeps the format's limits and says the same when read again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qcow::{Header, MemStorage, is_qcow2};

fuzz_target!(|data: &[u8]| {
    let storage = MemStorage::new(data.to_vec());
    let Ok(header) = Header::read(&storage) else {
        return;
    };
    assert!(is_qcow2(data), "accepted without the magic");
    assert!(
        (2..=3).contains(&header.version),
        "version {}",
        header.version
    );
    assert!(
        (9..=21).contains(&header.cluster_bits),
        "{} cluster bits",
        header.cluster_bits
    );
    assert!(
        header.refcount_order <= 6,
        "refcount order {}",
        header.refcount_order
    );
    let again = Header::read(&storage).expect("what was read can be read again");
    assert_eq!(format!("{header:?}"), format!("{again:?}"));
});
