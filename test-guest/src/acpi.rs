//! ACPI tables as a guest finds them (ACPI 6.4 §5.2).

use crate::boot::{self, peek};

/// A table in guest memory.
#[derive(Clone, Copy)]
pub struct Table {
    /// Address of its header.
    pub address: u64,
    /// Four letters.
    pub signature: [u8; 4],
    /// Length in bytes, header included.
    pub length: u32,
}

impl Table {
    fn at(address: u64) -> Self {
        Self {
            address,
            signature: peek(address),
            length: peek(address + 4),
        }
    }

    /// The signature as text.
    pub fn name(&self) -> &str {
        core::str::from_utf8(&self.signature).unwrap_or("????")
    }

    /// True when all bytes add to 0.
    pub fn sums_to_zero(&self) -> bool {
        sums_to_zero(self.address, u64::from(self.length))
    }
}

/// True when the bytes add to 0 modulo 256.
pub fn sums_to_zero(address: u64, length: u64) -> bool {
    if length > 1 << 20 {
        return false;
    }
    let add = |sum: u8, i: u64| sum.wrapping_add(peek::<u8>(address + i));
    (0..length).fold(0u8, add) == 0
}

/// Address of the RSDP: told by the boot protocol, else found by its signature in 0xa0000–0x100000.
pub fn rsdp() -> Option<u64> {
    let is_one = |a: &u64| peek::<[u8; 8]>(*a) == *b"RSD PTR ";
    boot::rsdp()
        .filter(is_one)
        .or_else(|| (0xa0000..0x10_0000).step_by(16).find(is_one))
}

/// The tables that the XSDT lists (with ACPI 1.0, the RSDT), then the DSDT that the FADT names.
pub fn tables(rsdp: u64) -> impl Iterator<Item = Table> {
    let is_old = peek::<u8>(rsdp + 15) < 2;
    let (root, width) = if is_old {
        (u64::from(peek::<u32>(rsdp + 16)), 4)
    } else {
        (peek(rsdp + 24), 8)
    };
    let xsdt = Table::at(root);
    let count = u64::from(xsdt.length.saturating_sub(36)) / width;
    let listed = (0..count.min(64)).map(move |i| {
        let at = xsdt.address + 36 + i * width;
        Table::at(if is_old {
            u64::from(peek::<u32>(at))
        } else {
            peek(at)
        })
    });
    let dsdt = listed
        .clone()
        .find(|t| &t.signature == b"FACP")
        .map(|fadt| {
            let wide: u64 = if is_old { 0 } else { peek(fadt.address + 140) };
            Table::at(if wide != 0 {
                wide
            } else {
                u64::from(peek::<u32>(fadt.address + 40))
            })
        });
    core::iter::once(xsdt).chain(listed).chain(dsdt)
}

/// The first segment of the MCFG: address of bus 0's configuration space, first and last bus (PCI Firmware 3.0 §4.1.2).
pub fn ecam() -> Option<(u64, u8, u8)> {
    let mcfg = tables(rsdp()?).find(|t| &t.signature == b"MCFG" && t.length >= 60)?;
    Some((
        peek(mcfg.address + 44),
        peek(mcfg.address + 54),
        peek(mcfg.address + 55),
    ))
}

/// APIC ids of the enabled processors in the MADT (types 0 and 9).
pub fn processors() -> impl Iterator<Item = u32> {
    let madt = rsdp().and_then(|r| tables(r).find(|t| &t.signature == b"APIC"));
    let (mut at, end) = madt.map_or((0, 0), |t| {
        (t.address + 44, t.address + u64::from(t.length))
    });
    core::iter::from_fn(move || {
        while at + 2 <= end {
            let (entry, kind, length) = (at, peek::<u8>(at), peek::<u8>(at + 1));
            at += u64::from(length.max(2));
            match kind {
                0 if peek::<u32>(entry + 4) & 1 != 0 => {
                    return Some(u32::from(peek::<u8>(entry + 3)));
                }
                9 if peek::<u32>(entry + 8) & 1 != 0 => return Some(peek(entry + 4)),
                _ => {}
            }
        }
        None
    })
}
