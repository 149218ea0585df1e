//! Messages, masks and pending bits of MSI.

use super::*;
use crate::configuration::ConfigurationSpace;
use crate::registers::HEADER_END;
use crate::testing::{NONE, RecordingSink, Rig, message};

const CONTROL: u16 = 2;
const ADDRESS: u16 = 4;
const DATA: u16 = 12;
const MASK: u16 = 16;

/// A rig whose guest set MSI up for `1 << given` vectors, and enabled it.
fn set_up(given: u8) -> Rig {
    let mut rig = Rig::new();
    let at = rig.msi_at;
    write(&mut rig, ADDRESS, &0xfee0_1003u32.to_le_bytes());
    write(&mut rig, ADDRESS + 4, &[1, 0, 0, 0]);
    write(&mut rig, DATA, &0x4143u16.to_le_bytes());
    assert_eq!(rig.msi_sink.route_calls(), 0, "no GSI before it is used");
    assert!(at > HEADER_END);
    write(&mut rig, CONTROL, &[given << 4 | 1, 0xff]);
    rig
}

fn write(rig: &mut Rig, register: u16, data: &[u8]) {
    rig.config.write(rig.msi_at + register, data);
}

fn pending(config: &ConfigurationSpace, at: u16) -> u32 {
    let mut bytes = [0; 4];
    config.read(at, &mut bytes);
    u32::from_le_bytes(bytes)
}

#[test]
fn numbers_of_vectors() {
    for vectors in [0, 3, 5, 33, 64, 128, 255] {
        let sink = Arc::new(RecordingSink::default());
        assert_eq!(Msi::new(vectors, sink).err(), Some(MsiError(vectors)));
    }
    for vectors in [1, 2, 4, 8, 16, 32] {
        let msi = Msi::new(vectors, Arc::new(RecordingSink::default())).unwrap();
        let (body, writable) = msi.body();
        assert_eq!(
            1 << (body[0] >> 1 & 7),
            u16::from(vectors),
            "multiple message capable"
        );
        let masks = u32::from_le_bytes([writable[14], writable[15], writable[16], writable[17]]);
        assert_eq!(masks.count_ones(), u32::from(vectors));
        assert_eq!(u64::from(masks) + 1, 1 << vectors);
    }
}

#[test]
fn messages_differ_in_their_low_bits() {
    let rig = set_up(2);
    let address = 0x1_fee0_1000;
    let expected = (0..4)
        .map(|vector| (vector, Some(message(address, 0x4140 | u32::from(vector)))))
        .collect();
    assert_eq!(rig.msi_sink.routes(), expected);
    for vector in 0..4 {
        rig.msi.trigger(vector).unwrap();
    }
    assert_eq!(rig.msi_sink.take_triggered(), [0, 1, 2, 3]);
    assert!(rig.msi.trigger(4).is_err());
}

#[test]
fn fewer_vectors_are_shared() {
    let rig = set_up(1);
    assert_eq!(rig.msi_sink.routes().len(), 2);
    assert_eq!(
        rig.msi_sink.routes()[&1],
        Some(message(0x1_fee0_1000, 0x4143))
    );
    for vector in 0..4 {
        rig.msi.trigger(vector).unwrap();
    }
    assert_eq!(rig.msi_sink.take_triggered(), [0, 1, 0, 1]);
    // More than there are: as many as there are.
    let rig = set_up(7);
    assert_eq!(rig.msi_sink.routes().len(), 4);
}

#[test]
fn disabled_vectors_are_lost() {
    let mut rig = set_up(2);
    write(&mut rig, CONTROL, &[0x20]);
    rig.msi.trigger(0).unwrap();
    assert!(!rig.msi.enabled());
    assert_eq!(rig.msi.pending(), 0);
    write(&mut rig, CONTROL, &[0x21]);
    assert_eq!(rig.msi_sink.take_triggered(), NONE);
}

#[test]
fn masked_vectors_wait() {
    let mut rig = set_up(2);
    write(&mut rig, MASK, &[0b0110]);
    assert_eq!(rig.msi_sink.routes()[&1], None);
    for vector in 0..4 {
        rig.msi.trigger(vector).unwrap();
    }
    assert_eq!(rig.msi_sink.take_triggered(), [0, 3]);
    let at = rig.msi_at + PENDING as u16;
    assert_eq!(pending(&rig.config, at), 0b0110);
    let mut byte = [0];
    rig.config.read(at, &mut byte);
    assert_eq!(byte, [0b0110], "a part of the register");
    let mut around = [0xee; 8];
    rig.config.read(at - 4, &mut around);
    assert_eq!(around, [0b0110, 0, 0, 0, 0b0110, 0, 0, 0]);
    write(&mut rig, PENDING as u16, &[0; 4]);
    assert_eq!(pending(&rig.config, at), 0b0110, "read-only");
    write(&mut rig, MASK, &[0b0100]);
    assert_eq!(rig.msi_sink.take_triggered(), [1]);
    assert_eq!(pending(&rig.config, at), 0b0100);
    write(&mut rig, CONTROL, &[0]);
    assert_eq!(pending(&rig.config, at), 0);
}
