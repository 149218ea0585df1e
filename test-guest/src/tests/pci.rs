//! PCI: what is on bus 0, and that both ways to configuration space show the same.
//!
//! `pci_devices=N` is how many functions there are to be.

use super::{Outcome, Reason, at_cpl3, ensure, same};
use crate::cpu::{inl, outl};
use crate::pci::{ADDRESS_PORT, Bar, DATA_PORT, Function, Space, functions};
use crate::{acpi, boot, line, map, number};

/// Lists bus 0; ports and ECAM agree on every byte; absent functions read all ones.
pub fn pci() -> Outcome {
    at_cpl3(|| {
        let ecam = acpi::ecam();
        if let Some((base, first, last)) = ecam {
            line!("VALUE pci_ecam {base:#x} {first} {last}");
        }
        ensure("the MCFG tells a segment", ecam.is_some())?;
        address_port()?;
        let mut count = 0;
        for function in functions() {
            count += 1;
            show(function)?;
            read_only(function)?;
            both_ways(function)?;
        }
        line!("VALUE pci_devices {count}");
        ensure(
            "bus 0 has a host bridge",
            Function::at(0, 0, 0).read16(0xa) == 0x600,
        )?;
        absent()?;
        overlaps()?;
        number("pci_devices").map_or(Ok(()), |n| same("functions on bus 0", count, n))
    })
}

/// The address port keeps what is written to it, and without its enable bit the data port reads all ones.
fn address_port() -> Outcome {
    for value in [0x8000_0000u32, 0x80ff_fffc, 0x0000_0000] {
        outl(ADDRESS_PORT, value);
        same(
            "address port reads back",
            u64::from(inl(ADDRESS_PORT)),
            u64::from(value),
        )?;
    }
    same(
        "data port without enable bit",
        u64::from(inl(DATA_PORT)),
        0xffff_ffff,
    )
}

fn show(f: Function) -> Outcome {
    let (vendor, device) = f.ids();
    line!(
        "VALUE pci {f} {vendor:04x}:{device:04x} class={:06x} rev={:02x} header={:02x} sub={:04x}:{:04x} command={:04x}",
        f.read32(8) >> 8,
        f.read8(8),
        f.read8(0xe),
        f.read16(0x2c),
        f.read16(0x2e),
        f.command()
    );
    let before: [u32; 6] = core::array::from_fn(|i| f.read32(0x10 + i as u16 * 4));
    for bar in f.bars() {
        let space = match bar.space {
            Space::Io => "io",
            Space::Memory32 => "mem32",
            Space::Memory64 => "mem64",
        };
        line!(
            "VALUE pci_bar {f} {} {space} {:#x} {:#x} prefetch={}",
            bar.index,
            bar.address,
            bar.size,
            u8::from(bar.prefetch)
        );
        ensure("a BAR's size is a power of two", bar.size.is_power_of_two())?;
        same(
            "a BAR is aligned to its size",
            bar.address & (bar.size - 1),
            0,
        )?;
        let least = if bar.space == Space::Io { 4 } else { 16 };
        ensure("a BAR has its least size", bar.size >= least)?;
    }
    let after: [u32; 6] = core::array::from_fn(|i| f.read32(0x10 + i as u16 * 4));
    ensure("BARs are as before sizing", before == after)?;
    for (at, id) in f.capabilities() {
        line!(
            "VALUE pci_cap {f} {at:#04x} id={id:#04x} head={:#010x}",
            f.read32(at)
        );
    }
    ensure(
        "the list of capabilities ends",
        f.capabilities().count() < 48,
    )
}

/// Ids, class and header type ignore writes.
fn read_only(f: Function) -> Outcome {
    for at in [0, 8] {
        let before = f.read32(at);
        f.write32(at, !before);
        same(
            "a read-only register",
            u64::from(f.read32(at)),
            u64::from(before),
        )?;
    }
    let header = f.read8(0xe);
    f.write8(0xe, !header);
    same(
        "the header type is read-only",
        u64::from(f.read8(0xe)),
        u64::from(header),
    )
}

/// Ports and ECAM, at widths of 1, 2 and 4 bytes.
fn both_ways(f: Function) -> Outcome {
    let Some(ecam) = f.ecam() else {
        return Err(Reason(
            "no ECAM for a function of bus 0",
            u64::from(f.device),
            0,
        ));
    };
    for at in (0..256u16).step_by(4) {
        let word: u32 = map::read(ecam + u64::from(at));
        let place = |got: u32| u64::from(at) << 32 | u64::from(got);
        same("ports and ECAM agree", place(f.read32(at)), place(word))?;
        let (mut halves, mut bytes) = (0, 0);
        for i in 0..4u16 {
            let byte: u8 = map::read(ecam + u64::from(at + i));
            same(
                "a byte by ports and ECAM",
                place(u32::from(f.read8(at + i))),
                place(u32::from(byte)),
            )?;
            bytes |= u32::from(byte) << (i * 8);
            if i % 2 == 0 {
                let half: u16 = map::read(ecam + u64::from(at + i));
                same(
                    "two bytes by ports and ECAM",
                    place(u32::from(f.read16(at + i))),
                    place(u32::from(half)),
                )?;
                halves |= u32::from(half) << (i * 8);
            }
        }
        same("four bytes, byte by byte", place(bytes), place(word))?;
        same("four bytes, two by two", place(halves), place(word))?;
    }
    // A write by one way shows by the other: the interrupt line register is only memory.
    let line = f.read8(0x3c);
    map::write(ecam + 0x3c, 0x5au8);
    let by_ports = f.read8(0x3c);
    f.write8(0x3c, line);
    let by_ecam: u8 = map::read(ecam + 0x3c);
    same("ECAM's write by ports", u64::from(by_ports), 0x5a)?;
    same(
        "the ports' write by ECAM",
        u64::from(by_ecam),
        u64::from(line),
    )
}

/// Nobody: all ones by both ways, and writes that go nowhere.
fn absent() -> Outcome {
    let mut seen = 0;
    for device in 0..32 {
        let first = Function::at(0, device, 0);
        let more = first.exists() && first.is_multifunction();
        for function in 0..8 {
            let f = Function::at(0, device, function);
            if more || (function == 0 && first.exists()) {
                continue;
            }
            seen += 1;
            nobody(
                f,
                if function < 2 {
                    &[0, 4, 0x10, 0x3c, 0xfc]
                } else {
                    &[0]
                },
            )?;
        }
    }
    line!("VALUE pci_absent {seen}");
    if functions().all(|f| f.read8(0xe) & 0x7f == 0) {
        for bus in [1, 2, 0x7f, 0xff] {
            nobody(Function::at(bus, 0, 0), &[0, 0x10, 0xfc])?;
            nobody(Function::at(bus, 31, 7), &[0])?;
        }
    }
    Ok(())
}

fn nobody(f: Function, offsets: &[u16]) -> Outcome {
    for &at in offsets {
        let ones = u64::from(u32::MAX);
        same("an absent function by ports", u64::from(f.read32(at)), ones)?;
        f.write32(at, 0);
        same(
            "an absent function after a write",
            u64::from(f.read32(at)),
            ones,
        )?;
        same("its byte", u64::from(f.read8(at + 3)), 0xff)?;
        if let Some(ecam) = f.ecam() {
            let at = ecam + u64::from(at);
            map::write(at, 0u32);
            same(
                "an absent function by ECAM",
                u64::from(map::read::<u32>(at)),
                ones,
            )?;
            same(
                "its two bytes by ECAM",
                u64::from(map::read::<u16>(at + 2)),
                0xffff,
            )?;
            same(
                "its extended space",
                u64::from(map::read::<u32>(ecam + 0xffc)),
                ones,
            )?;
        }
    }
    Ok(())
}

/// No two BARs overlap, and none lies in RAM or in ECAM. Registers that hold 0 are not in use.
fn overlaps() -> Outcome {
    let mut all: [Option<Bar>; 64] = [None; 64];
    let mut used = 0;
    for bar in functions()
        .flat_map(Function::bars)
        .filter(|b| b.address != 0)
    {
        if let Some(slot) = all.get_mut(used) {
            *slot = Some(bar);
            used += 1;
        }
    }
    for (i, bar) in all.iter().flatten().enumerate() {
        for other in all[i + 1..].iter().flatten() {
            if bar.overlaps(other) {
                return Err(Reason("two BARs overlap", bar.address, other.address));
            }
        }
        if bar.space == Space::Io {
            continue;
        }
        for range in (0..boot::range_count()).map(boot::range) {
            if range.kind == 1
                && bar.address < range.start + range.size
                && range.start < bar.address + bar.size
            {
                return Err(Reason("a BAR lies in RAM", bar.address, range.start));
            }
        }
    }
    Ok(())
}
