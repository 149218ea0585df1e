//! The global descriptor table that the boot CPU starts with, and its segments as register values (Intel SDM
//! volume 3, sections 3.4.5 and 3.5).

use hypervisor::x86::Segment;

/// Selector of the 32-bit code segment (PVH).
pub const CODE32_SELECTOR: u16 = 0x08;
/// Selector of the 64-bit code segment; Linux calls it `__BOOT_CS`.
pub const CODE64_SELECTOR: u16 = 0x10;
/// Selector of the flat data segment; Linux calls it `__BOOT_DS`.
pub const DATA_SELECTOR: u16 = 0x18;
/// Bytes of the table.
pub const GDT_SIZE: u64 = 32;

/// Accessed bits are set, so that the CPU has no need to write to the table.
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_BUSY_TSS: u8 = 0xb;

/// The table: null, 32-bit code, 64-bit code, data; all flat, ring 0.
pub fn gdt() -> [u8; GDT_SIZE as usize] {
    let mut bytes = [0; GDT_SIZE as usize];
    let segments = [code32(), code64(), data()];
    // The null descriptor stays zero.
    for (slot, segment) in bytes.chunks_exact_mut(8).skip(1).zip(&segments) {
        slot.copy_from_slice(&descriptor(segment).to_le_bytes());
    }
    bytes
}

/// Flat 32-bit code.
pub fn code32() -> Segment {
    Segment {
        selector: CODE32_SELECTOR,
        type_: TYPE_CODE,
        db: 1,
        ..flat()
    }
}

/// 64-bit code.
pub fn code64() -> Segment {
    Segment {
        selector: CODE64_SELECTOR,
        type_: TYPE_CODE,
        l: 1,
        ..flat()
    }
}

/// Flat data, for all of DS, ES, FS, GS and SS.
pub fn data() -> Segment {
    Segment {
        selector: DATA_SELECTOR,
        type_: TYPE_DATA,
        db: 1,
        ..flat()
    }
}

/// A busy TSS at address 0 with the least limit that PVH asks for. It has no descriptor in the table: the task
/// register only needs a valid hidden part.
pub fn task_state() -> Segment {
    Segment {
        limit: 0x67,
        type_: TYPE_BUSY_TSS,
        s: 0,
        g: 0,
        ..flat()
    }
}

fn flat() -> Segment {
    Segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        ..Segment::default()
    }
}

/// A segment as its 8-byte descriptor (figure 3-8).
fn descriptor(segment: &Segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let flag = |value: u8, bit: u32| u64::from(value & 1) << bit;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | u64::from(segment.type_ & 0xf) << 40
        | flag(segment.s, 44)
        | u64::from(segment.dpl & 3) << 45
        | flag(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | flag(segment.avl, 52)
        | flag(segment.l, 53)
        | flag(segment.db, 54)
        | flag(segment.g, 55)
        | (segment.base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_well_known_one() {
        let words: Vec<u64> = gdt()
            .chunks_exact(8)
            .map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        assert_eq!(
            words,
            [
                0,
                0x00cf_9b00_0000_ffff,
                0x00af_9b00_0000_ffff,
                0x00cf_9300_0000_ffff
            ]
        );
    }

    #[test]
    fn descriptors_spread_base_and_limit() {
        let segment = Segment {
            base: 0x1234_5678,
            limit: 0xa_bcde,
            type_: 0xb,
            present: 1,
            dpl: 3,
            avl: 1,
            ..Segment::default()
        };
        assert_eq!(descriptor(&segment), 0x121a_eb34_5678_bcde);
    }

    #[test]
    fn selectors_name_their_descriptors() {
        for segment in [code32(), code64(), data()] {
            let at = usize::from(segment.selector);
            assert_eq!(gdt()[at..at + 8], descriptor(&segment).to_le_bytes());
        }
    }
}
