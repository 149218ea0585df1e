//! VIOT (ACPI 6.5 §5.2.34): which PCI functions are behind the virtual IOMMU, and where that is.

use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, Viot};

const REVISION: u8 = 0;
const HEADER_LEN: u32 = 36;
/// Offset of the first node: behind count, offset and reserved bytes.
const FIRST_NODE: u16 = 48;

/// Node: endpoints on PCI.
const PCI_RANGE: u8 = 1;
const PCI_RANGE_LEN: u16 = 24;
/// Node: a virtio-iommu on PCI.
const IOMMU_PCI: u8 = 3;
const IOMMU_PCI_LEN: u16 = 16;

pub(super) fn build(viot: &Viot) -> Vec<u8> {
    let mut body = Vec::new();
    let count = viot.endpoints.len() + 1;
    body.extend_from_slice(&u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes());
    body.extend_from_slice(&FIRST_NODE.to_le_bytes());
    body.extend_from_slice(&[0; 8]);

    body.extend_from_slice(&[IOMMU_PCI, 0]);
    body.extend_from_slice(&IOMMU_PCI_LEN.to_le_bytes());
    body.extend_from_slice(&viot.segment.to_le_bytes());
    body.extend_from_slice(&viot.iommu.to_le_bytes());
    body.extend_from_slice(&[0; 8]);

    for function in &viot.endpoints {
        body.extend_from_slice(&[PCI_RANGE, 0]);
        body.extend_from_slice(&PCI_RANGE_LEN.to_le_bytes());
        // The IOMMU knows them by the same number.
        body.extend_from_slice(&u32::from(*function).to_le_bytes());
        for segment in [viot.segment; 2] {
            body.extend_from_slice(&segment.to_le_bytes());
        }
        for function in [function; 2] {
            body.extend_from_slice(&function.to_le_bytes());
        }
        body.extend_from_slice(&FIRST_NODE.to_le_bytes());
        body.extend_from_slice(&[0; 6]);
    }

    let mut table = Sdt::new(
        *b"VIOT",
        HEADER_LEN,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(&body);
    table.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_where_the_header_says() {
        let viot = Viot {
            segment: 0,
            iommu: 0x08,
            endpoints: vec![0x10, 0x28],
        };
        let table = build(&viot);
        assert_eq!(&table[..4], b"VIOT");
        let word = |at: usize| u16::from_le_bytes([table[at], table[at + 1]]);
        assert_eq!(table.len(), 48 + 16 + 2 * 24);
        assert_eq!(usize::from(word(4)), table.len());
        assert_eq!(
            table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        assert_eq!((word(36), word(38)), (3, 48));
        let mut nodes = Vec::new();
        let mut at = usize::from(word(38));
        while at < table.len() {
            nodes.push((table[at], at));
            at += usize::from(word(at + 2));
        }
        assert_eq!(at, table.len());
        assert_eq!(nodes, [(3, 48), (1, 64), (1, 88)]);
        assert_eq!((word(52), word(54)), (0, 0x08));
        for ((_, at), function) in nodes[1..].iter().zip([0x10, 0x28]) {
            assert_eq!((word(at + 4), word(at + 6)), (function, 0));
            assert_eq!((word(at + 8), word(at + 10)), (0, 0));
            assert_eq!((word(at + 12), word(at + 14)), (function, function));
            assert_eq!(word(at + 16), 48);
        }
    }
}
