//! What the boot protocol handed over: PVH start info (Xen `hvm_start_info`) or the zero page
//! (Linux "The Linux/x86 Boot Protocol", `struct boot_params`).

use core::arch::global_asm;
use core::ffi::CStr;

global_asm!(include_str!("boot.s"), options(att_syntax, raw));

unsafe extern "C" {
    static entry_block: [u64; 9];
    static image_end: u8;
}

/// How the guest was entered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// PVH: 32-bit, paging off, EBX holds the start info.
    Pvh,
    /// 64-bit Linux protocol: RSI holds the zero page.
    Linux64,
}

/// Registers as they were at the first instruction.
pub struct Entry {
    /// Which entry point was taken.
    pub protocol: Protocol,
    /// EBX (PVH) or RSI (64-bit Linux).
    pub pointer: u64,
    /// RFLAGS.
    pub flags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR4.
    pub cr4: u64,
    /// CS selector.
    pub cs: u64,
    /// DS selector.
    pub ds: u64,
    /// SS selector.
    pub ss: u64,
    /// EFER; 0 with PVH, where it isn't read.
    pub efer: u64,
}

/// One range of the memory map; sizes in bytes.
#[derive(Clone, Copy)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// 1 is RAM (E820 numbering, both protocols).
    pub kind: u32,
}

/// Reads a value at a physical address; the map is one to one.
pub fn peek<T: Copy>(address: u64) -> T {
    // SAFETY: the first 16 GiB are mapped, and every caller asks for plain integers.
    unsafe { (address as *const T).read_unaligned() }
}

/// Address past the guest's own image and stacks.
pub fn end_of_image() -> u64 {
    &raw const image_end as u64
}

/// Registers at entry.
pub fn entry() -> Entry {
    // SAFETY: written once by the entry code, before any Rust code ran.
    let e = unsafe { (&raw const entry_block).read_volatile() };
    Entry {
        protocol: if e[0] == 1 {
            Protocol::Pvh
        } else {
            Protocol::Linux64
        },
        pointer: e[1],
        flags: e[2],
        cr0: e[3],
        cr4: e[4],
        cs: e[5],
        ds: e[6],
        ss: e[7],
        efer: e[8],
    }
}

/// The kernel command line; empty where there is none.
pub fn command_line() -> &'static str {
    let e = entry();
    let address = match e.protocol {
        Protocol::Pvh => peek::<u64>(e.pointer + 24),
        Protocol::Linux64 => u64::from(peek::<u32>(e.pointer + 0x228)),
    };
    if address == 0 {
        return "";
    }
    // SAFETY: both protocols promise a NUL-terminated string there, and nothing writes to it.
    unsafe { CStr::from_ptr(address as *const _) }
        .to_str()
        .unwrap_or("")
}

/// Address and size in bytes of the initramfs.
pub fn initramfs() -> Option<(u64, u64)> {
    let e = entry();
    match e.protocol {
        Protocol::Pvh => {
            let modules = peek::<u64>(e.pointer + 16);
            (peek::<u32>(e.pointer + 12) > 0 && modules != 0)
                .then(|| (peek(modules), peek(modules + 8)))
        }
        Protocol::Linux64 => {
            let size = u64::from(peek::<u32>(e.pointer + 0x21c));
            (size > 0).then(|| (u64::from(peek::<u32>(e.pointer + 0x218)), size))
        }
    }
}

/// Address of the RSDP, if the protocol told one.
pub fn rsdp() -> Option<u64> {
    let e = entry();
    let address = match e.protocol {
        Protocol::Pvh => peek::<u64>(e.pointer + 32),
        Protocol::Linux64 => peek::<u64>(e.pointer + 0x70),
    };
    (address != 0).then_some(address)
}

/// How many ranges the memory map has.
pub fn range_count() -> usize {
    let e = entry();
    match e.protocol {
        Protocol::Pvh if peek::<u32>(e.pointer + 4) >= 1 => peek::<u32>(e.pointer + 48) as usize,
        Protocol::Pvh => 0,
        Protocol::Linux64 => usize::from(peek::<u8>(e.pointer + 0x1e8)),
    }
}

/// Range `index` of the memory map.
pub fn range(index: usize) -> Range {
    let e = entry();
    let at = match e.protocol {
        Protocol::Pvh => peek::<u64>(e.pointer + 40) + index as u64 * 24,
        Protocol::Linux64 => e.pointer + 0x2d0 + index as u64 * 20,
    };
    Range {
        start: peek(at),
        size: peek(at + 8),
        kind: peek(at + 16),
    }
}
