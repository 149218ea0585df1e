//! Headers that are right, wrong and cut off.

use super::*;
use crate::error::{Error, Result};
use crate::storage::MemStorage;

fn sample() -> Header {
    Header {
        version: 3,
        cluster_bits: 16,
        size: 1 << 30,
        l1_size: 2,
        l1_offset: 0x30000,
        refcount_table_offset: 0x10000,
        refcount_table_clusters: 1,
        snapshot_count: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        refcount_order: 4,
        compression: Compression::Zlib,
        backing_name: Some(b"base.img".to_vec()),
        backing_format: Some("raw".into()),
        data_name: None,
        bitmaps: None,
        unknown_extensions: vec![],
    }
}

fn read(bytes: Vec<u8>) -> Result<Header> {
    Header::read(&MemStorage::new(bytes))
}

#[test]
fn round_trip() {
    for version in [2, 3] {
        let h = Header {
            version,
            ..sample()
        };
        assert_eq!(read(h.encode().unwrap()).unwrap(), h);
    }
}

#[test]
fn encryption_is_refused_by_name() {
    for (method, name) in [(1, "AES"), (2, "LUKS"), (7, "method 7")] {
        let mut b = sample().encode().unwrap();
        b[35] = method;
        let e = read(b).unwrap_err();
        assert!(
            matches!(&e, Error::Unsupported(s) if s.contains(name)),
            "{e}"
        );
    }
    let mut b = sample().encode().unwrap();
    b[112..116].copy_from_slice(&extension::ENCRYPTION.to_be_bytes());
    assert!(matches!(read(b), Err(Error::Unsupported(s)) if s.contains("LUKS")));
}

#[test]
fn unknown_incompatible_features_are_named() {
    let h = Header {
        backing_name: None,
        backing_format: None,
        incompatible: (1 << 40) | (1 << 9),
        ..sample()
    };
    let mut b = h.encode().unwrap();
    b.truncate(112);
    let mut table = vec![0u8, 40];
    table.extend_from_slice(b"time travel");
    table.resize(48, 0);
    b.extend_from_slice(&extension::FEATURE_NAMES.to_be_bytes());
    b.extend_from_slice(&48u32.to_be_bytes());
    b.extend_from_slice(&table);
    let e = read(b).unwrap_err().to_string();
    assert_eq!(e, "unsupported: incompatible features 9, 40 (time travel)");
}

#[test]
fn every_truncation_and_bit_flip_is_an_error_or_a_header() {
    let whole = sample().encode().unwrap();
    for n in 0..whole.len() {
        let _ = read(whole[..n].to_vec());
        for bit in 0..8 {
            let mut b = whole.clone();
            b[n] ^= 1 << bit;
            if let Ok(h) = read(b) {
                assert!(h.cluster_bits <= 21 && u64::from(h.l1_size) * 8 <= MAX_L1_BYTES);
            }
        }
    }
}

#[test]
fn mutable_fields_are_where_encode_puts_them() {
    let h = sample();
    let (whole, part) = (h.encode().unwrap(), h.mutable_fields());
    assert_eq!(whole[24..24 + part.len()], part[..]);
    assert_eq!(part.len(), 72);
}
