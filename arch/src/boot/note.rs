//! ELF notes (System V ABI, chapter 5, "Note Section"), searched for Xen's PVH entry point
//! (Xen `public/elfnote.h`).

use super::error::ElfError;

const XEN: &[u8] = b"Xen\0";
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const HEADER: usize = 12;

/// The physical entry point that a PVH note among `notes` names, in a descriptor of 4 or 8 bytes. A list that ends
/// within a note has no more notes. `alignment` is that of the segment: notes are padded to 4 bytes, or to 8 where
/// the segment says so.
pub(super) fn pvh_entry(mut notes: &[u8], alignment: u64) -> Result<Option<u64>, ElfError> {
    let alignment = if alignment == 8 { 8 } else { 4 };
    while let Some(note) = Note::first(notes, alignment) {
        if note.name == XEN && note.kind == XEN_ELFNOTE_PHYS32_ENTRY {
            let bytes = note.descriptor;
            let entry = if let Ok(short) = <[u8; 4]>::try_from(bytes) {
                u64::from(u32::from_le_bytes(short))
            } else if let Ok(long) = <[u8; 8]>::try_from(bytes) {
                u64::from_le_bytes(long)
            } else {
                return Err(ElfError::PvhNote(bytes.len() as u32));
            };
            if entry == 0 {
                return Err(ElfError::NoEntry);
            }
            return u32::try_from(entry)
                .map(|entry| Some(entry.into()))
                .map_err(|_| ElfError::EntryOutside(entry));
        }
        notes = note.rest;
    }
    Ok(None)
}

struct Note<'a> {
    kind: u32,
    name: &'a [u8],
    descriptor: &'a [u8],
    rest: &'a [u8],
}

impl<'a> Note<'a> {
    fn first(bytes: &'a [u8], alignment: usize) -> Option<Self> {
        let word = |at: usize| {
            let bytes = bytes.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        let (name_len, len, kind) = (word(0)? as usize, word(4)? as usize, word(8)?);
        let name = bytes.get(HEADER..HEADER.checked_add(name_len)?)?;
        let start = HEADER
            .checked_add(name_len)?
            .checked_next_multiple_of(alignment)?;
        let end = start.checked_add(len)?;
        let descriptor = bytes.get(start..end)?;
        // The last note may lack its padding.
        let next = end.checked_next_multiple_of(alignment)?;
        Some(Self {
            kind,
            name,
            descriptor,
            rest: bytes.get(next..).unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, descriptor: &[u8], alignment: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((name.len() as u32).to_le_bytes());
        bytes.extend((descriptor.len() as u32).to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        for part in [name, descriptor] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(alignment), 0);
        }
        bytes
    }

    #[test]
    fn both_lengths_of_descriptor() {
        let short = note(XEN, 18, &0x12_3456u32.to_le_bytes(), 4);
        let long = note(XEN, 18, &0x12_3456u64.to_le_bytes(), 4);
        assert_eq!(pvh_entry(&short, 4), Ok(Some(0x12_3456)));
        assert_eq!(pvh_entry(&long, 4), Ok(Some(0x12_3456)));
    }

    #[test]
    fn other_notes_come_before_and_after() {
        let mut notes = note(b"GNU\0", 3, &[1; 20], 4);
        notes.extend(note(b"Xen", 18, &[9; 4], 4));
        notes.extend(note(XEN, 6, b"linux\0", 4));
        notes.extend(note(XEN, 18, &[0, 0, 0x10, 0], 4));
        notes.extend(note(XEN, 18, &[9; 4], 4));
        assert_eq!(pvh_entry(&notes, 4), Ok(Some(0x10_0000)));
        assert_eq!(pvh_entry(&notes, 0), Ok(Some(0x10_0000)));
        assert_eq!(pvh_entry(&notes[..36], 4), Ok(None));
    }

    #[test]
    fn notes_padded_to_eight_bytes() {
        let mut notes = note(b"GNU\0", 5, &[1; 12], 8);
        notes.extend(note(XEN, 18, &[0, 0, 0x10, 0], 8));
        assert_eq!(pvh_entry(&notes, 8), Ok(Some(0x10_0000)));
    }

    #[test]
    fn bad_notes() {
        assert_eq!(
            pvh_entry(&note(XEN, 18, &[1; 5], 4), 4),
            Err(ElfError::PvhNote(5))
        );
        assert_eq!(
            pvh_entry(&note(XEN, 18, &[], 4), 4),
            Err(ElfError::PvhNote(0))
        );
        assert_eq!(
            pvh_entry(&note(XEN, 18, &[0; 4], 4), 4),
            Err(ElfError::NoEntry)
        );
        let high = 0x1_0000_0000u64;
        assert_eq!(
            pvh_entry(&note(XEN, 18, &high.to_le_bytes(), 4), 4),
            Err(ElfError::EntryOutside(high))
        );
    }

    #[test]
    fn a_list_cut_anywhere_has_no_entry() {
        let notes = note(XEN, 18, &[0, 0, 0x10, 0], 4);
        for len in 0..notes.len() {
            assert_eq!(pvh_entry(&notes[..len], 4), Ok(None));
        }
        assert_eq!(pvh_entry(&[0xff; 64], 4), Ok(None));
        assert_eq!(pvh_entry(&[0; 64], 4), Ok(None));
    }
}
