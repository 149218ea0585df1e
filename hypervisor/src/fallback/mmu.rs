//! The guest's page tables: linear to guest-physical addresses (Intel SDM volume 3, chapter 4).
//!
//! All four modes: no paging, 32-bit, PAE, and 4- or 5-level. Access rights are checked as the
//! processor checks them (U/S, R/W with CR0.WP, XD, SMEP, SMAP, protection keys), accessed and
//! dirty flags are set, and an access is all or nothing: every page of it is translated before the
//! first byte moves.

use crate::memory::{GuestRam, RamError};
use crate::x86::SpecialRegisters;

const PAGE: u64 = 4096;
/// Walks of one address, if its entries change meanwhile.
const WALKS: u32 = 16;

const CR0_PE: u64 = 1;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
/// CR4.PKE: protection keys for user pages are on, and PKRU counts.
pub(crate) const CR4_PKE: u64 = 1 << 22;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const RFLAGS_AC: u64 = 1 << 18;

const ENTRY_PRESENT: u64 = 1;
const ENTRY_WRITE: u64 = 1 << 1;
const ENTRY_USER: u64 = 1 << 2;
const ENTRY_ACCESSED: u64 = 1 << 5;
const ENTRY_DIRTY: u64 = 1 << 6;
const ENTRY_LARGE: u64 = 1 << 7;
const ENTRY_NX: u64 = 1 << 63;

const ERROR_PRESENT: u32 = 1;
const ERROR_WRITE: u32 = 1 << 1;
const ERROR_USER: u32 = 1 << 2;
const ERROR_RESERVED: u32 = 1 << 3;
const ERROR_FETCH: u32 = 1 << 4;
const ERROR_KEY: u32 = 1 << 5;

/// What is done with the memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Access {
    /// Data read.
    Read,
    /// Data write, or read and write.
    Write,
    /// Instruction fetch.
    Execute,
}

/// Why an access cannot be made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum MemoryFault {
    /// #PF.
    Page {
        /// Its error code.
        error_code: u32,
        /// The address for CR2.
        cr2: u64,
    },
    /// Not a canonical address: #GP(0), or #SS(0) for the stack segment.
    NotCanonical,
    /// Another vCPU kept changing the page table.
    Unstable,
    /// Translated, but not to RAM.
    NotRam {
        /// The guest-physical address.
        gpa: u64,
    },
    /// Longer than [`Span::MAX`].
    TooLong,
}

impl From<RamError> for MemoryFault {
    fn from(error: RamError) -> Self {
        Self::NotRam { gpa: error.gpa }
    }
}

/// A stretch of linear memory, translated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// Guest-physical address of the first byte, then of the start of each further page.
    pages: [u64; Self::PAGES],
    offset: usize,
    len: usize,
}

impl Span {
    const PAGES: usize = 5;
    /// The longest span, in bytes.
    pub(crate) const MAX: usize = (Self::PAGES - 1) * PAGE as usize;

    /// Cuts `[at, at + len)` of the span into pieces that each lie in one page; calls `f` with the
    /// guest-physical address and the range of the caller's buffer.
    fn pieces(
        &self,
        at: usize,
        len: usize,
        mut f: impl FnMut(u64, std::ops::Range<usize>) -> Result<(), RamError>,
    ) -> Result<(), MemoryFault> {
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(MemoryFault::TooLong);
        }
        let mut done = 0;
        while done < len {
            let position = self.offset + at + done;
            let in_page = position % PAGE as usize;
            let piece = (len - done).min(PAGE as usize - in_page);
            let page = *self
                .pages
                .get(position / PAGE as usize)
                .ok_or(MemoryFault::TooLong)?;
            f(page + in_page as u64, done..done + piece)?;
            done += piece;
        }
        Ok(())
    }

    /// Copies the bytes from offset `at` on into `buf`.
    pub(crate) fn read(
        &self,
        ram: &dyn GuestRam,
        at: usize,
        buf: &mut [u8],
    ) -> Result<(), MemoryFault> {
        self.pieces(at, buf.len(), |gpa, range| ram.read(gpa, &mut buf[range]))
    }

    /// Copies `buf` to the bytes from offset `at` on.
    pub(crate) fn write(
        &self,
        ram: &dyn GuestRam,
        at: usize,
        buf: &[u8],
    ) -> Result<(), MemoryFault> {
        self.pieces(at, buf.len(), |gpa, range| ram.write(gpa, &buf[range]))
    }

    /// Guest-physical address, where the span lies in one page.
    pub(crate) fn contiguous(&self) -> Option<u64> {
        (self.offset + self.len <= PAGE as usize).then(|| self.pages[0] + self.offset as u64)
    }
}

/// How the vCPU translates addresses now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mmu {
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    physical_bits: u8,
    user: bool,
    /// Supervisor accesses to user pages are allowed in spite of SMAP.
    smap_off: bool,
    pkru: u32,
}

impl Mmu {
    /// For accesses at privilege level `cpl` with these control registers and RFLAGS.
    /// `physical_bits` is MAXPHYADDR (CPUID 0x80000008, EAX bits 7:0).
    pub(crate) fn new(special: &SpecialRegisters, rflags: u64, cpl: u8, physical_bits: u8) -> Self {
        Self {
            cr0: special.cr0,
            cr3: special.cr3,
            cr4: special.cr4,
            efer: special.efer,
            physical_bits: physical_bits.clamp(32, 52),
            user: cpl == 3,
            smap_off: rflags & RFLAGS_AC != 0,
            pkru: 0,
        }
    }

    /// The same with protection keys from PKRU (they count when CR4.PKE is set).
    pub(crate) fn with_pkru(self, pkru: u32) -> Self {
        Self { pkru, ..self }
    }

    /// The same for the processor's own accesses to descriptor tables and the TSS, which are
    /// supervisor accesses at every privilege level.
    pub(crate) fn system(self) -> Self {
        Self {
            user: false,
            smap_off: false,
            ..self
        }
    }

    fn long_mode(&self) -> bool {
        self.efer & EFER_LMA != 0
    }

    /// Is the linear address canonical? Always, outside long mode.
    pub(crate) fn is_canonical(&self, linear: u64) -> bool {
        let unused = if self.cr4 & CR4_LA57 != 0 { 7 } else { 16 };
        !self.long_mode() || ((linear << unused) as i64 >> unused) as u64 == linear
    }

    /// Translates the address of one byte.
    pub(crate) fn translate(
        &self,
        ram: &dyn GuestRam,
        linear: u64,
        access: Access,
    ) -> Result<u64, MemoryFault> {
        if !self.is_canonical(linear) {
            return Err(MemoryFault::NotCanonical);
        }
        let linear = if self.long_mode() {
            linear
        } else {
            linear & 0xffff_ffff
        };
        if self.cr0 & (CR0_PG | CR0_PE) != CR0_PG | CR0_PE {
            return Ok(linear);
        }
        for _ in 0..WALKS {
            if let Some(gpa) = self.walk(ram, linear, access)? {
                return Ok(gpa);
            }
        }
        Err(MemoryFault::Unstable)
    }

    /// One walk; `None` if an entry changed before its accessed or dirty flag was set.
    fn walk(
        &self,
        ram: &dyn GuestRam,
        linear: u64,
        access: Access,
    ) -> Result<Option<u64>, MemoryFault> {
        let pae = self.cr4 & CR4_PAE != 0;
        let nx_on = pae && self.efer & EFER_NXE != 0;
        let mut code = 0;
        if access == Access::Write {
            code |= ERROR_WRITE;
        }
        if self.user {
            code |= ERROR_USER;
        }
        if access == Access::Execute && (nx_on || self.cr4 & CR4_SMEP != 0) {
            code |= ERROR_FETCH;
        }
        let fault = |bits: u32| MemoryFault::Page {
            error_code: code | bits,
            cr2: linear,
        };

        let (levels, entry_size, index_bits) = match (self.long_mode(), pae) {
            (true, _) if self.cr4 & CR4_LA57 != 0 => (5, 8, 9),
            (true, _) => (4, 8, 9),
            (false, true) => (3, 8, 9),
            (false, false) => (2, 4, 10),
        };
        let mut table = match (self.long_mode(), pae) {
            (true, _) => self.cr3 & 0x000f_ffff_ffff_f000,
            (false, true) => self.cr3 & 0xffff_ffe0,
            (false, false) => self.cr3 & 0xffff_f000,
        };
        let above_physical = 0x000f_ffff_ffff_ffff & !((1_u64 << self.physical_bits) - 1);
        let (mut writable, mut user_page, mut nx) = (true, true, false);
        let mut path = [(0_u64, 0_u64); 5];

        for level in (1..=levels).rev() {
            let shift = 12 + index_bits * (level - 1);
            let index = (linear >> shift) & ((1 << index_bits) - 1);
            let at = table + index * entry_size;
            let mut bytes = [0; 8];
            ram.read(at, &mut bytes[..entry_size as usize])?;
            let entry = u64::from_le_bytes(bytes);
            if entry & ENTRY_PRESENT == 0 {
                return Err(fault(0));
            }
            let root_of_pae = level == 3 && !self.long_mode();
            let large = entry & ENTRY_LARGE != 0
                && match (level, pae) {
                    (2, true) => true,
                    (2, false) => self.cr4 & CR4_PSE != 0,
                    (3, _) => self.long_mode(),
                    _ => false,
                };
            if self.has_reserved_bits(entry, level, large, above_physical) {
                return Err(fault(ERROR_PRESENT | ERROR_RESERVED));
            }
            if !root_of_pae {
                writable &= entry & ENTRY_WRITE != 0;
                user_page &= entry & ENTRY_USER != 0;
                nx |= pae && entry & ENTRY_NX != 0;
                if let Some(step) = path.get_mut(level as usize - 1) {
                    *step = (at, entry);
                }
            }
            if level > 1 && !large {
                table = entry
                    & if pae {
                        0x000f_ffff_ffff_f000
                    } else {
                        0xffff_f000
                    };
                continue;
            }

            let key = if self.long_mode() && self.cr4 & CR4_PKE != 0 && user_page {
                (self.pkru >> (2 * ((entry >> 59) & 15))) & 3
            } else {
                0
            };
            let denied = match access {
                Access::Execute => {
                    nx || (self.user && !user_page)
                        || (!self.user && user_page && self.cr4 & CR4_SMEP != 0)
                }
                Access::Read | Access::Write => {
                    (self.user && !user_page)
                        || (!self.user && user_page && self.cr4 & CR4_SMAP != 0 && !self.smap_off)
                }
            };
            let read_only =
                access == Access::Write && !writable && (self.user || self.cr0 & CR0_WP != 0);
            if denied || read_only {
                return Err(fault(ERROR_PRESENT));
            }
            let key_denies = access != Access::Execute
                && (key & 1 != 0
                    || (access == Access::Write
                        && key & 2 != 0
                        && (self.user || self.cr0 & CR0_WP != 0)));
            if key_denies {
                return Err(fault(ERROR_PRESENT | ERROR_KEY));
            }

            let steps = path.get(level as usize - 1..).unwrap_or_default();
            if !set_flags(ram, steps, entry_size as usize, access)? {
                return Ok(None);
            }
            let offset = linear & ((1 << shift) - 1);
            let frame = match (large, pae) {
                // PSE-36: bits 20:13 of the entry are address bits 39:32.
                (true, false) => (entry & 0xffc0_0000) | ((entry & 0x001f_e000) << 19),
                (_, true) => entry & 0x000f_ffff_ffff_f000 & !((1 << shift) - 1),
                (false, false) => entry & 0xffff_f000,
            };
            return Ok(Some(frame + offset));
        }
        Err(fault(0))
    }

    fn has_reserved_bits(&self, entry: u64, level: u32, large: bool, above_physical: u64) -> bool {
        if self.cr4 & CR4_PAE == 0 {
            return false;
        }
        let mut reserved = above_physical;
        if self.efer & EFER_NXE == 0 {
            reserved |= ENTRY_NX;
        }
        if !self.long_mode() {
            reserved |= 0x7ff0_0000_0000_0000;
        }
        if level >= 4 {
            reserved |= ENTRY_LARGE;
        }
        if large {
            // From bit 13 (bit 12 is PAT) to the page's size.
            reserved |= (1 << (12 + 9 * (level - 1))) - (1 << 13);
        }
        entry & reserved != 0
    }

    /// Translates `len` bytes, which may cross pages.
    pub(crate) fn span(
        &self,
        ram: &dyn GuestRam,
        linear: u64,
        len: usize,
        access: Access,
    ) -> Result<Span, MemoryFault> {
        if len > Span::MAX {
            return Err(MemoryFault::TooLong);
        }
        let offset = (linear % PAGE) as usize;
        let mut span = Span {
            pages: [0; Span::PAGES],
            offset,
            len,
        };
        let count = (offset + len).div_ceil(PAGE as usize).max(1);
        for (n, page) in span.pages.iter_mut().enumerate().take(count) {
            // The first byte in each page that is accessed is what CR2 names.
            let at = if n == 0 {
                linear
            } else {
                (linear - offset as u64)
                    .checked_add(n as u64 * PAGE)
                    .ok_or(MemoryFault::NotCanonical)?
            };
            let gpa = self.translate(ram, at, access)?;
            *page = gpa - gpa % PAGE;
        }
        Ok(span)
    }

    /// Reads linear memory.
    pub(crate) fn read(
        &self,
        ram: &dyn GuestRam,
        linear: u64,
        buf: &mut [u8],
    ) -> Result<(), MemoryFault> {
        self.span(ram, linear, buf.len(), Access::Read)?
            .read(ram, 0, buf)
    }
}

/// Sets the accessed flag in every entry of the walk, and the dirty flag in the last. `steps` holds
/// addresses and values, the last entry first. Gives false if an entry is not what it was.
fn set_flags(
    ram: &dyn GuestRam,
    steps: &[(u64, u64)],
    entry_size: usize,
    access: Access,
) -> Result<bool, MemoryFault> {
    for (n, &(at, entry)) in steps.iter().enumerate() {
        let mut wanted = entry | ENTRY_ACCESSED;
        if n == 0 && access == Access::Write {
            wanted |= ENTRY_DIRTY;
        }
        // Levels that the walk did not have hold a zero: not present.
        if entry & ENTRY_PRESENT == 0 || wanted == entry {
            continue;
        }
        let block = at & !15;
        let shift = 8 * (at - block);
        let mask = if entry_size == 8 {
            u128::from(u64::MAX)
        } else {
            u128::from(u32::MAX)
        } << shift;
        let mut bytes = [0; 16];
        ram.read(block, &mut bytes)?;
        let current = u128::from_le_bytes(bytes);
        let unchanged = current & mask == u128::from(entry) << shift;
        let new = current & !mask | u128::from(wanted) << shift;
        if !unchanged || !ram.compare_exchange(block, current, new)? {
            return Ok(false);
        }
    }
    Ok(true)
}
