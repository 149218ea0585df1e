//! Interrupts by instruction, flags, time, caches, descriptors.

use super::*;

#[test]
fn int3_is_a_trap_past_the_instruction() {
    let mut g = Guest::new();
    let outcome = g.run(&[0xcc]).unwrap();
    let Outcome::Exception {
        name,
        vector,
        error_code,
        cr2,
    } = outcome
    else {
        panic!("{outcome:?}");
    };
    assert_eq!((&*name, vector, error_code, cr2), ("int3", 3, None, None));
    assert_eq!(g.cpu.registers.rip, CODE + 1);
}

#[test]
fn int_n_checks_the_gate_below_cpl_0() {
    let mut g = Guest::new();
    assert!(matches!(
        g.run(&[0xcd, 0x20]),
        Ok(Outcome::Exception {
            vector: 0x20,
            error_code: None,
            ..
        })
    ));
    assert_eq!(g.cpu.registers.rip, CODE + 2);
    // INT1 and, from user code, gates of DPL 0 and 3; the table has 15 gates.
    assert!(matches!(
        g.run(&[0xf1]),
        Ok(Outcome::Exception { vector: 1, .. })
    ));
    g.ring3();
    g.poke(TABLES + 0x100 + 3 * 16 + 5, &[0xee]);
    g.poke(TABLES + 0x100 + 4 * 16 + 5, &[0x8e]);
    assert!(matches!(
        g.run(&[0xcc]),
        Ok(Outcome::Exception { vector: 3, .. })
    ));
    g.raises(&[0xcd, 0x04], 13, Some(4 * 8 + 2), None);
    g.raises(&[0xcd, 0x0f], 13, Some(15 * 8 + 2), None);
    assert!(matches!(
        g.run(&[0xf1]),
        Ok(Outcome::Exception { vector: 1, .. })
    ));
}

#[test]
fn clac_and_stac() {
    let mut g = Guest::new();
    g.done("stac", &[0x0f, 0x01, 0xcb]);
    assert_eq!(g.cpu.registers.rflags, AC | 2);
    g.done("clac", &[0x0f, 0x01, 0xca]);
    assert_eq!(g.cpu.registers.rflags, 2);
    g.ring3();
    g.undefined(&[0x0f, 0x01, 0xcb]);
    let mut g = Guest::new();
    g.without((7, 0, 1, 20));
    g.undefined(&[0x0f, 0x01, 0xca]);
}

#[test]
fn the_resume_flag_is_cleared() {
    let mut g = Guest::new();
    g.cpu.registers.rflags |= 1 << 16;
    g.done("stac", &[0x0f, 0x01, 0xcb]);
    assert_eq!(g.cpu.registers.rflags, AC | 2);
}

#[test]
fn xgetbv_reads_xcr0_and_what_is_in_use() {
    let code = [0x0f, 0x01, 0xd0];
    let mut g = Guest::new();
    g.cpu.registers.rax = !0;
    g.cpu.registers.rdx = !0;
    g.done("xgetbv", &code);
    assert_eq!((g.cpu.registers.rax, g.cpu.registers.rdx), (0x2e7, 0));
    g.cpu.registers.rcx = 1;
    g.done("xgetbv", &code);
    assert_eq!(g.cpu.registers.rax, 3);
    g.cpu.registers.rcx = 2;
    g.protection(&code);
    g.cpu.special.cr4 &= !(1 << 18);
    g.undefined(&code);
}

#[test]
fn rdtscp_and_rdpid() {
    let mut g = Guest::new();
    g.cpu.registers.rax = !0;
    g.done("rdtscp", &[0x0f, 0x01, 0xf9]);
    let r = g.cpu.registers;
    assert_eq!((r.rax, r.rdx, r.rcx), (0x5678_9abc, 0x1234, 0x42));
    g.cpu.registers.rbx = !0;
    g.done("rdpid", &[0xf3, 0x0f, 0xc7, 0xfb]);
    assert_eq!(g.cpu.registers.rbx, 0x42);
    g.cpu.special.cr4 |= 4;
    g.done("rdtscp", &[0x0f, 0x01, 0xf9]);
    g.ring3();
    g.protection(&[0x0f, 0x01, 0xf9]);
    g.cpu.special.cr4 &= !4;
    g.cpu.msrs.clear();
    g.refused(&[0x0f, 0x01, 0xf9]);
    g.without((0x8000_0001, 0, 3, 27));
    g.undefined(&[0x0f, 0x01, 0xf9]);
}

#[test]
fn protection_key_register() {
    let (read, write) = ([0x0f, 0x01, 0xee], [0x0f, 0x01, 0xef]);
    let mut g = Guest::new();
    g.undefined(&read);
    g.cpu.special.cr4 |= 1 << 22;
    g.cpu.registers.rax = 0x5555_5554;
    g.done("wrpkru", &write);
    assert_eq!(g.in_use() & 0x200, 0x200);
    g.cpu.registers.rax = 0;
    g.done("rdpkru", &read);
    assert_eq!((g.cpu.registers.rax, g.cpu.registers.rdx), (0x5555_5554, 0));
    g.cpu.registers.rdx = 1;
    g.protection(&write);
    g.cpu.registers.rdx = 0;
    g.cpu.registers.rcx = 1;
    g.protection(&write);
    g.protection(&read);
}

#[test]
fn invpcid_checks_its_operands() {
    // invpcid rax, [rdi]
    let code = [0x66, 0x0f, 0x38, 0x82, 0x07];
    let mut g = Guest::new();
    g.cpu.registers.rdi = DATA + 0xff8;
    g.cpu.registers.rax = 2;
    g.done("invpcid", &code);
    g.cpu.registers.rax = 4;
    g.protection(&code);
    g.cpu.registers.rax = 1 << 32;
    g.protection(&code);
    // A PCID without CR4.PCIDE, and with it.
    g.poke(DATA + 0xff8, &[5]);
    g.cpu.registers.rax = 1;
    g.protection(&code);
    g.cpu.special.cr4 |= 1 << 17;
    g.done("invpcid", &code);
    // Reserved bits, and an address that is not canonical.
    g.poke(DATA + 0xff9, &[0x10]);
    g.protection(&code);
    g.poke(DATA + 0xff9, &[0]);
    g.poke(DATA + 0x1000, &NOT_CANONICAL.to_le_bytes());
    g.done("invpcid", &code);
    g.cpu.registers.rax = 0;
    g.protection(&code);
    g.cpu.registers.rdi = NOWHERE;
    g.raises(&code, 14, Some(0), Some(NOWHERE));
    g.ring3();
    g.protection(&code);
}

#[test]
fn cache_line_instructions_translate_one_byte() {
    let mut g = Guest::new();
    for (name, code) in [
        ("clwb", [0x66, 0x0f, 0xae, 0x37]),
        ("clflushopt", [0x66, 0x0f, 0xae, 0x3f]),
    ] {
        g.cpu.registers.rdi = DATA + 0x3fff;
        g.done(name, &code);
        g.cpu.registers.rdi = READ_ONLY;
        g.done(name, &code);
        g.cpu.registers.rdi = NOWHERE + 5;
        g.raises(&code, 14, Some(0), Some(NOWHERE + 5));
    }
    g.without((7, 0, 1, 24));
    g.undefined(&[0x66, 0x0f, 0xae, 0x37]);
}

#[test]
fn clzero_clears_the_line_of_rax() {
    let code = [0x0f, 0x01, 0xfc];
    let mut g = Guest::new();
    g.poke(DATA, &[0xff; 192]);
    g.cpu.registers.rax = DATA + 64 + 17;
    g.done("clzero", &code);
    assert_eq!(g.peek::<64>(DATA), [0xff; 64]);
    assert_eq!(g.peek::<64>(DATA + 64), [0; 64]);
    assert_eq!(g.peek::<64>(DATA + 128), [0xff; 64]);
    g.cpu.registers.rax = READ_ONLY;
    g.raises(&code, 14, Some(3), Some(READ_ONLY));
    g.cpu.registers.rax = NOT_CANONICAL;
    g.protection(&code);
}

#[test]
fn monitor_and_mwait_do_not_wait() {
    let mut g = Guest::new();
    g.cpu.registers.rax = DATA;
    g.done("monitor", &[0x0f, 0x01, 0xc8]);
    g.done("mwait", &[0x0f, 0x01, 0xc9]);
    g.cpu.registers.rcx = 2;
    g.protection(&[0x0f, 0x01, 0xc8]);
    g.protection(&[0x0f, 0x01, 0xc9]);
    g.cpu.registers.rcx = 0;
    g.cpu.registers.rax = NOWHERE;
    g.raises(&[0x0f, 0x01, 0xc8], 14, Some(0), Some(NOWHERE));
    g.ring3();
    g.undefined(&[0x0f, 0x01, 0xc9]);
}

/// Descriptor `n` of the GDT: type byte (with DPL and present) and the limit.
fn describe(g: &Guest, n: u64, access: u8, limit: u32, granular: bool) {
    let flags = if granular { 0x80 } else { 0 } | 0x40 | ((limit >> 16) & 15) as u8;
    let limit = limit.to_le_bytes();
    g.poke(
        TABLES + 8 * n,
        &[limit[0], limit[1], 0, 0, 0, access, flags, 0],
    );
}

/// Code and data segments of both levels, a TSS, a call gate, a 16-bit TSS.
fn described() -> Guest {
    let g = Guest::new();
    describe(&g, 1, 0x9b, 0xf_ffff, true); // code, readable
    describe(&g, 2, 0x93, 0x1234, false); // data, writable
    describe(&g, 3, 0x99, 0xf_ffff, true); // code, execute only
    describe(&g, 4, 0x91, 0xf_ffff, true); // data, read only
    describe(&g, 5, 0xf3, 0xf_ffff, true); // data of DPL 3
    describe(&g, 6, 0x9f, 0xf_ffff, true); // conforming code of DPL 0
    describe(&g, 7, 0x8b, 0x67, false); // busy TSS
    describe(&g, 8, 0x8c, 0, false); // call gate
    describe(&g, 9, 0x81, 0x2b, false); // 16-bit TSS
    g
}

#[test]
fn verr_and_verw() {
    let (verr, verw) = ([0x0f, 0x00, 0xe0], [0x0f, 0x00, 0xe8]);
    let mut g = described();
    for (selector, readable, writable) in [
        (0, false, false),
        (3, false, false),
        (1 << 3, true, false),
        (2 << 3, true, true),
        ((2 << 3) | 3, false, false),
        (3 << 3, false, false),
        (4 << 3, true, false),
        ((5 << 3) | 3, true, true),
        ((6 << 3) | 3, true, false),
        (7 << 3, false, false),
        (0x100, false, false),
        // The LDT is not there.
        ((2 << 3) | 4, false, false),
    ] {
        // Only 16 bits count.
        g.cpu.registers.rax = 0xffff_0000 | selector;
        for (code, name, wanted) in [(verr, "verr", readable), (verw, "verw", writable)] {
            g.cpu.registers.rflags = 2 | CF | if wanted { 0 } else { ZF };
            g.done(name, &code);
            let zf = if wanted { ZF } else { 0 };
            assert_eq!(g.status(), CF | zf, "{name} {selector:#x}");
        }
    }
    // From memory: verw [rdi]
    g.poke(DATA + 0xfff, &[0x10, 0]);
    g.cpu.registers.rdi = DATA + 0xfff;
    g.done("verw", &[0x0f, 0x00, 0x2f]);
    assert_eq!(g.status() & ZF, ZF);
    // Tables are read with supervisor rights, but selectors judged by CPL.
    g.ring3();
    g.cpu.registers.rax = 2 << 3;
    g.done("verr", &verr);
    assert_eq!(g.status() & ZF, 0);
    g.cpu.registers.rax = 5 << 3;
    g.done("verr", &verr);
    assert_eq!(g.status() & ZF, ZF);
    // Virtual-8086 mode.
    g.cpu.registers.rflags |= 1 << 17;
    g.undefined(&verr);
}

#[test]
fn lar_and_lsl() {
    // lar ecx, eax; lsl ecx, eax
    let (lar, lsl) = ([0x0f, 0x02, 0xc8], [0x0f, 0x03, 0xc8]);
    let mut g = described();
    for (n, rights, limit) in [
        (1, Some(0xc0_9b00), Some(0xffff_ffff)),
        (2, Some(0x40_9300), Some(0x1234)),
        (3, Some(0xc0_9900), Some(0xffff_ffff)),
        (7, Some(0x40_8b00), Some(0x67)),
        (8, Some(0x40_8c00), None),
        (9, None, None),
        (10, None, None),
        (0, None, None),
    ] {
        g.cpu.registers.rax = n << 3;
        for (code, name, wanted) in [(lar, "lar", rights), (lsl, "lsl", limit)] {
            g.cpu.registers.rcx = 0x1111_2222_3333_4444;
            g.done(name, &code);
            assert_eq!(
                (g.cpu.registers.rcx, g.status() & ZF != 0),
                (wanted.unwrap_or(0x1111_2222_3333_4444), wanted.is_some()),
                "{name} {n}"
            );
        }
    }
    // Outside long mode the 16-bit TSS has a limit.
    g.cpu.special.efer = 0;
    g.cpu.special.cr0 &= !(1 << 31);
    g.cpu.special.cs.l = 0;
    g.cpu.special.cs.db = 1;
    g.cpu.special.gdt.base = g.gpa(TABLES);
    g.ram.write(0x10000, &lsl).unwrap();
    g.cpu.registers.rip = 0x10000;
    g.cpu.registers.rax = 9 << 3;
    assert_eq!(step(&mut g.cpu, &g.ram), Ok(Outcome::Done("lsl".into())));
    assert_eq!(g.cpu.registers.rcx, 0x2b);
}

#[test]
fn descriptors_in_the_ldt() {
    let mut g = described();
    g.cpu.special.ldt = Segment {
        base: TABLES + 8,
        limit: 7,
        present: 1,
        ..Default::default()
    };
    g.cpu.registers.rax = 4;
    g.done("verr", &[0x0f, 0x00, 0xe0]);
    assert_eq!(g.status() & ZF, ZF);
    g.cpu.registers.rax = 8 | 4;
    g.done("verr", &[0x0f, 0x00, 0xe0]);
    assert_eq!(g.status() & ZF, 0);
    // A table that is not mapped is a page fault.
    g.cpu.special.ldt.base = NOWHERE;
    g.cpu.registers.rax = 4;
    g.raises(&[0x0f, 0x00, 0xe0], 14, Some(0), Some(NOWHERE));
}
