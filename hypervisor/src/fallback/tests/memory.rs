//! Page walks and fetches.

use super::*;
use crate::fallback::mmu::{Access, MemoryFault, Mmu};

fn mmu(g: &mut Guest, cpl: u8) -> Mmu {
    Mmu::new(&g.cpu.special, g.cpu.registers.rflags, cpl, 40)
}

fn page_fault(error_code: u32, cr2: u64) -> MemoryFault {
    MemoryFault::Page { error_code, cr2 }
}

#[test]
fn four_levels_and_their_rights() {
    use Access::{Execute, Read, Write};
    let mut g = Guest::new();
    for (cpl, linear, access, wanted) in [
        (0, DATA + 0x1234, Read, Ok(0x23234)),
        (0, DATA, Write, Ok(0x27000)),
        (0, READ_ONLY, Read, Ok(0x30000)),
        (0, READ_ONLY, Write, Err(page_fault(3, READ_ONLY))),
        (3, USER, Write, Ok(0x31000)),
        (3, DATA, Read, Err(page_fault(5, DATA))),
        (3, DATA, Write, Err(page_fault(7, DATA))),
        (3, DATA, Execute, Err(page_fault(0x15, DATA))),
        (3, NOWHERE, Read, Err(page_fault(4, NOWHERE))),
        (0, NOWHERE, Execute, Err(page_fault(0x10, NOWHERE))),
        // Levels above the last that are not present.
        (0, 0x8000_0000, Write, Err(page_fault(2, 0x8000_0000))),
        (0, !0xfff, Read, Err(page_fault(0, !0xfff))),
        (0, NOT_CANONICAL, Read, Err(MemoryFault::NotCanonical)),
        (
            0,
            0xffff_7fff_ffff_ffff,
            Read,
            Err(MemoryFault::NotCanonical),
        ),
    ] {
        let mmu = mmu(&mut g, cpl);
        assert_eq!(
            mmu.translate(&g.ram, linear, access),
            wanted,
            "{cpl} {linear:#x} {access:?}"
        );
    }
    // Without CR0.WP the supervisor may write, user code may not.
    g.cpu.special.cr0 &= !(1 << 16);
    assert_eq!(
        mmu(&mut g, 0).translate(&g.ram, READ_ONLY, Write),
        Ok(0x30000)
    );
    g.map(READ_ONLY, 0x30000, PRESENT | USER_BIT);
    assert_eq!(
        mmu(&mut g, 3).translate(&g.ram, READ_ONLY, Write),
        Err(page_fault(7, READ_ONLY))
    );
}

#[test]
fn smap_smep_and_nx() {
    use Access::{Execute, Read};
    let mut g = Guest::new();
    g.cpu.special.cr4 |= 3 << 20;
    assert_eq!(
        mmu(&mut g, 0).translate(&g.ram, USER, Read),
        Err(page_fault(1, USER))
    );
    assert_eq!(
        mmu(&mut g, 0).translate(&g.ram, USER, Execute),
        Err(page_fault(0x11, USER))
    );
    g.cpu.registers.rflags |= AC;
    assert!(mmu(&mut g, 0).translate(&g.ram, USER, Read).is_ok());
    // The processor's own accesses are not let through by AC, and are the supervisor's at CPL 3.
    assert_eq!(
        mmu(&mut g, 0).system().translate(&g.ram, USER, Read),
        Err(page_fault(1, USER))
    );
    assert!(
        mmu(&mut g, 3)
            .system()
            .translate(&g.ram, TABLES, Read)
            .is_ok()
    );
    g.map(DATA, 0x27000, PRESENT | 1 << 63);
    assert!(mmu(&mut g, 0).translate(&g.ram, DATA, Read).is_ok());
    assert_eq!(
        mmu(&mut g, 0).translate(&g.ram, DATA, Execute),
        Err(page_fault(0x11, DATA))
    );
    // Without EFER.NXE the bit is reserved.
    g.cpu.special.efer &= !(1 << 11);
    assert_eq!(
        mmu(&mut g, 0).translate(&g.ram, DATA, Read),
        Err(page_fault(9, DATA))
    );
}

#[test]
fn reserved_bits_and_large_pages() {
    let mut g = Guest::new();
    // Beyond MAXPHYADDR (40).
    g.map(DATA, 0x27000 | 1 << 40, PRESENT);
    assert_eq!(
        mmu(&mut g, 0).translate(&g.ram, DATA, Access::Read),
        Err(page_fault(9, DATA))
    );
    // 2 MiB at 0x600000 and 1 GiB at 0x40000000.
    g.put64(0x3000 + 3 * 8, 0x1020_0000 | 0x83);
    g.put64(0x2000 + 8, 0x8000_0000 | 0x83);
    let walker = mmu(&mut g, 0);
    assert_eq!(
        walker.translate(&g.ram, 0x61_2345, Access::Read),
        Ok(0x1021_2345)
    );
    assert_eq!(
        walker.translate(&g.ram, 0x4123_4567, Access::Read),
        Ok(0x8123_4567)
    );
    // An address bit below the page's size; PS in the PML4.
    g.put64(0x3000 + 3 * 8, 0x1020_0000 | 0x2083);
    assert_eq!(
        walker.translate(&g.ram, 0x61_2345, Access::Read),
        Err(page_fault(9, 0x61_2345))
    );
    g.put64(0x1000, 0x2000 | 0x83);
    assert_eq!(
        walker.translate(&g.ram, DATA, Access::Read),
        Err(page_fault(9, DATA))
    );
}

#[test]
fn five_levels() {
    let mut g = Guest::new();
    g.put64(0x5000, 0x1000 | 3);
    g.cpu.special.cr3 = 0x5000;
    g.cpu.special.cr4 |= 1 << 12;
    let walker = mmu(&mut g, 0);
    assert_eq!(walker.translate(&g.ram, DATA, Access::Read), Ok(0x27000));
    assert_eq!(
        walker.translate(&g.ram, NOT_CANONICAL, Access::Read),
        Err(page_fault(0, NOT_CANONICAL))
    );
    assert_eq!(
        walker.translate(&g.ram, 1 << 56, Access::Read),
        Err(MemoryFault::NotCanonical)
    );
}

#[test]
fn legacy_modes() {
    let mut g = Guest::new();
    g.cpu.special.efer = 0;
    g.cpu.special.cr4 = 0x10;
    g.cpu.special.cr3 = 0x6000;
    // 32-bit: a table, and a 4 MiB page with PSE-36.
    g.put64(0x6000, 0x7003);
    g.put64(0x6008, 0);
    g.ram.write(0x6008, &0x0080_2083_u32.to_le_bytes()).unwrap();
    g.ram.write(0x7004, &0x9003_u32.to_le_bytes()).unwrap();
    let walker = mmu(&mut g, 0);
    assert_eq!(walker.translate(&g.ram, 0x1abc, Access::Write), Ok(0x9abc));
    assert_eq!(
        walker.translate(&g.ram, 0x80_1234, Access::Read),
        Ok(0x1_0080_1234)
    );
    assert_eq!(
        walker.translate(&g.ram, 0x2000, Access::Write),
        Err(page_fault(2, 0x2000))
    );
    // PAE: a root of four entries, a 2 MiB page in the last.
    g.cpu.special.cr4 = 0x20;
    g.cpu.special.cr3 = 0x8020;
    g.put64(0x8020 + 3 * 8, 0xa001);
    g.put64(0xa000 + 8, 0x60_0083);
    let walker = mmu(&mut g, 0);
    assert_eq!(
        walker.translate(&g.ram, 0xc020_1234, Access::Write),
        Ok(0x60_1234)
    );
    // No paging.
    g.cpu.special.cr0 = 1;
    assert_eq!(
        mmu(&mut g, 0).translate(&g.ram, 0x1_0000_1234, Access::Write),
        Ok(0x1234)
    );
}

#[test]
fn accessed_and_dirty_are_set_when_used() {
    let mut g = Guest::new();
    let entry = Guest::entry(DATA);
    let (a, d) = (1 << 5, 1 << 6);
    let walker = mmu(&mut g, 0);
    assert_eq!(g.get64(entry) & (a | d), 0);
    walker.translate(&g.ram, DATA, Access::Read).unwrap();
    assert_eq!(g.get64(entry) & (a | d), a);
    assert_eq!(g.get64(0x1000) & (a | d), a);
    assert_eq!(g.get64(0x3000 + 16) & (a | d), a);
    walker.translate(&g.ram, DATA, Access::Write).unwrap();
    assert_eq!(g.get64(entry) & (a | d), a | d);
    assert_eq!(g.get64(0x3000 + 16) & (a | d), a);
    // Not by an access that faults.
    walker
        .translate(&g.ram, READ_ONLY, Access::Write)
        .unwrap_err();
    assert_eq!(g.get64(Guest::entry(READ_ONLY)) & (a | d), 0);
}

#[test]
fn an_entry_that_changes_is_walked_again() {
    let mut g = Guest::new();
    let walker = mmu(&mut g, 0);
    // Another vCPU takes the page away between the read of its entry and the accessed flag.
    let entry = Guest::entry(DATA);
    walker
        .translate(&g.ram, DATA + 0x1000, Access::Read)
        .unwrap();
    let neighbour = g.get64(entry + 8);
    *g.ram.interference.lock().unwrap() = Some((entry, u128::from(neighbour) << 64));
    assert_eq!(
        walker.translate(&g.ram, DATA, Access::Read),
        Err(page_fault(0, DATA))
    );
    assert_eq!((g.get64(entry), g.get64(entry + 8)), (0, neighbour));
}

#[test]
fn protection_keys() {
    use Access::{Execute, Read, Write};
    let mut g = Guest::new();
    g.cpu.special.cr4 |= 1 << 22;
    g.map(USER, 0x31000, PRESENT | WRITE | USER_BIT | 2 << 59);
    let no_write = mmu(&mut g, 3).with_pkru(2 << 4);
    assert!(no_write.translate(&g.ram, USER, Read).is_ok());
    assert_eq!(
        no_write.translate(&g.ram, USER, Write),
        Err(page_fault(0x27, USER))
    );
    let no_access = mmu(&mut g, 3).with_pkru(1 << 4);
    assert_eq!(
        no_access.translate(&g.ram, USER, Read),
        Err(page_fault(0x25, USER))
    );
    assert!(no_access.translate(&g.ram, USER, Execute).is_ok());
}

#[test]
fn spans_are_whole_or_nothing() {
    let mut g = Guest::new();
    let walker = mmu(&mut g, 0);
    let bytes: Vec<u8> = (0..4096).map(|n| (n % 251) as u8).collect();
    walker
        .span(&g.ram, DATA + 0x777, 4096, Access::Write)
        .unwrap()
        .write(&g.ram, 0, &bytes)
        .unwrap();
    let mut back = vec![0; 4096];
    walker.read(&g.ram, DATA + 0x777, &mut back).unwrap();
    assert_eq!(back, bytes);
    assert_eq!(g.peek::<1>(DATA + 0x777 + 4095), [(4095 % 251) as u8]);
    assert_eq!(
        walker
            .span(&g.ram, DATA + 0x3ff0, 17, Access::Write)
            .unwrap_err(),
        page_fault(2, DATA + 0x4000)
    );
    let span = walker.span(&g.ram, DATA, 8, Access::Write).unwrap();
    assert_eq!(span.write(&g.ram, 1, &[1; 8]), Err(MemoryFault::TooLong));
    assert_eq!(g.peek::<9>(DATA), [0; 9]);
    assert_eq!(
        walker.read(&g.ram, DATA, &mut vec![0; 16385]),
        Err(MemoryFault::TooLong)
    );
    assert_eq!(
        walker.read(&g.ram, u64::MAX - 3, &mut [0; 8]),
        Err(page_fault(0, u64::MAX - 3))
    );
    assert_eq!(
        walker.read(&g.ram, DEVICE, &mut [0; 8]),
        Err(MemoryFault::NotRam { gpa: 0xe000_0000 })
    );
}

#[test]
fn instructions_at_the_edge_of_a_page() {
    let mut g = Guest::new();
    // CLAC in the last three bytes before an unmapped page.
    let end = CODE + 0x2000;
    g.poke(end - 3, &[0x0f, 0x01, 0xca]);
    g.cpu.registers.rip = end - 3;
    assert_eq!(step(&mut g.cpu, &g.ram), Ok(Outcome::Done("clac".into())));
    assert_eq!(g.cpu.registers.rip, end);
    // One byte later it is cut off: a fetch fault at the next page.
    g.poke(end - 2, &[0x0f, 0x01]);
    g.cpu.registers.rip = end - 2;
    assert!(matches!(
        step(&mut g.cpu, &g.ram),
        Ok(Outcome::Exception { vector: 14, error_code: Some(0x10), cr2, .. }) if cr2 == Some(end)
    ));
    // Across two pages that are not neighbours in RAM.
    g.poke(CODE + 0xfff, &[0x0f, 0x01, 0xcb]);
    g.cpu.registers.rip = CODE + 0xfff;
    assert_eq!(step(&mut g.cpu, &g.ram), Ok(Outcome::Done("stac".into())));
    // Too long: 15 prefixes and more.
    g.protection(&[0x66; 16]);
    g.cpu.registers.rip = NOT_CANONICAL;
    assert!(matches!(
        step(&mut g.cpu, &g.ram),
        Ok(Outcome::Exception {
            vector: 13,
            error_code: Some(0),
            ..
        })
    ));
}
