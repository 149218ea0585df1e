//! ELF-64 kernels (System V ABI, chapters 4 and 5): by PVH where a Xen note names a 32-bit entry
//! (`XEN_ELFNOTE_PHYS32_ENTRY`), else by the 64-bit Linux protocol at the image's entry point. Segments go to their
//! physical addresses.

use linux_loader::elf::{
    ELFCLASS64, ELFDATA2LSB, EM_X86_64, ET_DYN, ET_EXEC, Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE,
};
use vm_memory::ByteValued;

use super::Protocol;
use super::error::{ElfError, KernelError, PlaceError};
use super::image::{Image, Plan, Segment};
use super::note::pvh_entry;
use super::place::Ram;
use crate::layout::{CMDLINE_MAX_SIZE, HIGH_RAM_START, RAM_32BIT_END};
use crate::paging;

pub(super) const MAGIC: &[u8] = b"\x7fELF";
const HEADER_SIZE: usize = size_of::<Elf64_Ehdr>();
const PROGRAM_HEADER_SIZE: usize = size_of::<Elf64_Phdr>();
/// Kernels have a few hundred bytes of notes.
const NOTES_MAX: u64 = 1 << 20;

/// Checks the whole image against guest RAM and says how to boot it.
pub(super) fn plan(image: &Image<'_>, ram: &Ram) -> Result<Plan, KernelError> {
    let header = header(image)?;
    let program_headers = program_headers(image, &header)?;
    let mut segments = segments(image, &program_headers)?;
    if segments.is_empty() {
        return Err(ElfError::NoSegment.into());
    }
    ram.check(&mut segments)?;

    let high = || segments.iter().filter(|s| s.end() > HIGH_RAM_START);
    let span = (
        high().map(|s| s.address).min().unwrap_or(HIGH_RAM_START),
        high().map(Segment::end).max().unwrap_or(HIGH_RAM_START),
    );
    let (protocol, entry) = match notes(image, &program_headers)? {
        Some(entry) => (Protocol::Pvh, entry),
        None if header.e_entry == 0 => return Err(ElfError::NoEntry.into()),
        None => (Protocol::Linux64, header.e_entry),
    };
    let loaded = |s: &Segment| (s.address..s.address.saturating_add(s.file_size)).contains(&entry);
    if !segments.iter().any(loaded) {
        return Err(ElfError::EntryOutside(entry).into());
    }
    if protocol == Protocol::Linux64 && span.1 > paging::MAPPED {
        return Err(PlaceError::Unmapped(span.1).into());
    }
    Ok(Plan {
        protocol,
        entry,
        segments,
        span,
        initramfs_limit: RAM_32BIT_END,
        cmdline_limit: CMDLINE_MAX_SIZE - 1,
        setup_header: None,
    })
}

fn header(image: &Image<'_>) -> Result<Elf64_Ehdr, KernelError> {
    let bytes = image.read("ELF header", 0, HEADER_SIZE)?;
    let mut header = Elf64_Ehdr::default();
    header.as_mut_slice().copy_from_slice(&bytes);
    let [_, _, _, _, class, encoding, ..] = header.e_ident;
    if class != ELFCLASS64 {
        return Err(ElfError::Class(class).into());
    }
    if encoding != ELFDATA2LSB {
        return Err(ElfError::Encoding(encoding).into());
    }
    if header.e_machine != EM_X86_64 {
        return Err(ElfError::Machine(header.e_machine).into());
    }
    if ![ET_EXEC, ET_DYN].contains(&header.e_type) {
        return Err(ElfError::Type(header.e_type).into());
    }
    Ok(header)
}

fn program_headers(image: &Image<'_>, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, KernelError> {
    if header.e_phnum == 0 {
        return Err(ElfError::NoSegment.into());
    }
    if usize::from(header.e_phentsize) != PROGRAM_HEADER_SIZE {
        return Err(ElfError::ProgramHeaderSize(header.e_phentsize).into());
    }
    let len = usize::from(header.e_phnum) * PROGRAM_HEADER_SIZE;
    let bytes = image.read("table of program headers", header.e_phoff, len)?;
    let parse = |bytes: &[u8]| {
        let mut header = Elf64_Phdr::default();
        header.as_mut_slice().copy_from_slice(bytes);
        header
    };
    Ok(bytes.chunks_exact(PROGRAM_HEADER_SIZE).map(parse).collect())
}

fn segments(image: &Image<'_>, headers: &[Elf64_Phdr]) -> Result<Vec<Segment>, KernelError> {
    let mut segments = Vec::new();
    for (index, header) in headers.iter().enumerate() {
        let (file, memory) = (header.p_filesz, header.p_memsz);
        if header.p_type != PT_LOAD || (file == 0 && memory == 0) {
            continue;
        }
        if file > memory {
            return Err(ElfError::SegmentSize {
                index,
                file,
                memory,
            }
            .into());
        }
        image.check("segment", header.p_offset, file)?;
        if header.p_paddr.checked_add(memory).is_none() {
            return Err(PlaceError::Wraps {
                index,
                start: header.p_paddr,
                size: memory,
            }
            .into());
        }
        segments.push(Segment {
            offset: header.p_offset,
            file_size: file,
            address: header.p_paddr,
            memory_size: memory,
        });
    }
    Ok(segments)
}

/// The PVH entry point, from the first note that names one.
fn notes(image: &Image<'_>, headers: &[Elf64_Phdr]) -> Result<Option<u64>, KernelError> {
    let mut total = 0u64;
    for header in headers.iter().filter(|header| header.p_type == PT_NOTE) {
        total = total.saturating_add(header.p_filesz);
        if total > NOTES_MAX {
            return Err(ElfError::NotesTooBig(total).into());
        }
        let bytes = image.read("note segment", header.p_offset, header.p_filesz as usize)?;
        if let Some(entry) = pvh_entry(&bytes, header.p_align)? {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}
