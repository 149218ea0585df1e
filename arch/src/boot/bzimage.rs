//! bzImage kernels ("The Linux/x86 Boot Protocol", protocol 2.12 and later) by the 64-bit protocol: the
//! protected-mode part goes to its preferred address, and the entry is 0x200 past its start.

use linux_loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::ByteValued;

use super::Protocol;
use super::error::{BzImageError, KernelError, PlaceError};
use super::image::{Image, Plan, Segment};
use super::place::Ram;
use crate::layout::{CMDLINE_MAX_SIZE, RAM_32BIT_END};
use crate::paging;

/// Where the setup header begins in the file.
const HEADER_OFFSET: usize = 0x1f1;
/// Where its magic number is.
pub(super) const MAGIC_OFFSET: usize = 0x202;
pub(super) const MAGIC: &[u8] = b"HdrS";
/// The header's length past [`MAGIC_OFFSET`] is the byte before it.
const LENGTH_OFFSET: usize = 0x201;
const SECTOR: u64 = 512;
/// The first protocol with `xloadflags`.
const PROTOCOL_2_12: u16 = 0x20c;
const ENTRY_64: u64 = 0x200;

/// Checks the image against guest RAM and says how to boot it.
pub(super) fn plan(image: &Image<'_>, ram: &Ram) -> Result<Plan, KernelError> {
    let header = header(image)?;
    // The structure is packed: fields are copied out before use.
    let (version, xloadflags, init_size) = (header.version, header.xloadflags, header.init_size);
    let (address, alignment) = (header.pref_address, header.kernel_alignment);
    if version < PROTOCOL_2_12 {
        return Err(BzImageError::Protocol(version).into());
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(BzImageError::ZImage.into());
    }
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BzImageError::No64Bit.into());
    }
    if !alignment.is_power_of_two() || !address.is_multiple_of(alignment.into()) {
        return Err(BzImageError::Alignment { address, alignment }.into());
    }

    let setup_sectors = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let offset = (setup_sectors + 1) * SECTOR;
    // `syssize` counts paragraphs; a signature may follow.
    let wanted = (u64::from(header.syssize) * 16).max(ENTRY_64 + 1);
    image.check("protected-mode kernel", offset, wanted)?;
    let file_size = image.len() - offset;
    let memory_size = file_size.max(init_size.into());
    let Some(end) = address.checked_add(memory_size) else {
        return Err(PlaceError::Wraps {
            index: 0,
            start: address,
            size: memory_size,
        }
        .into());
    };
    let whole = Segment {
        offset,
        file_size,
        address,
        memory_size,
    };
    ram.check(&mut [whole])?;
    if end > paging::MAPPED {
        return Err(PlaceError::Unmapped(end).into());
    }

    let initramfs_limit = match u64::from(header.initrd_addr_max) {
        0 => RAM_32BIT_END,
        last => RAM_32BIT_END.min(last + 1),
    };
    Ok(Plan {
        protocol: Protocol::Linux64,
        entry: address + ENTRY_64,
        // The kernel clears what it needs of the rest.
        segments: vec![Segment {
            memory_size: file_size,
            ..whole
        }],
        span: (address, end),
        initramfs_limit,
        cmdline_limit: u64::from(header.cmdline_size).min(CMDLINE_MAX_SIZE - 1),
        setup_header: Some(header),
    })
}

/// The setup header, zero past the length that the image gives it.
fn header(image: &Image<'_>) -> Result<setup_header, KernelError> {
    let start = image.read("setup header", 0, MAGIC_OFFSET)?;
    let length = start.get(LENGTH_OFFSET).copied().unwrap_or_default();
    let mut header = setup_header::default();
    let known = header.as_slice().len();
    let len = (MAGIC_OFFSET - HEADER_OFFSET + usize::from(length)).min(known);
    let bytes = image.read("setup header", HEADER_OFFSET as u64, len)?;
    for (to, from) in header.as_mut_slice().iter_mut().zip(bytes) {
        *to = from;
    }
    Ok(header)
}
