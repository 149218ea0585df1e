//! The XSAVE family.

use super::*;

// All at [rdi].
const XSAVE: [u8; 3] = [0x0f, 0xae, 0x27];
const XSAVE64: [u8; 4] = [0x48, 0x0f, 0xae, 0x27];
const XSAVEOPT64: [u8; 4] = [0x48, 0x0f, 0xae, 0x37];
const XSAVEC64: [u8; 4] = [0x48, 0x0f, 0xc7, 0x27];
const XSAVES64: [u8; 4] = [0x48, 0x0f, 0xc7, 0x2f];
const XRSTOR: [u8; 3] = [0x0f, 0xae, 0x2f];
const XRSTOR64: [u8; 4] = [0x48, 0x0f, 0xae, 0x2f];
const XRSTORS64: [u8; 4] = [0x48, 0x0f, 0xc7, 0x1f];

/// The area crosses a page.
const AREA: u64 = DATA + 0xf80;
const COMPACTED: u64 = 1 << 63;

/// A guest with x87, SSE, AVX, ZMM_Hi256 and PKRU in use, and the operand set.
fn guest() -> Guest {
    let mut g = Guest::new();
    let x = &mut g.cpu.xsave;
    x[0..2].copy_from_slice(&0x27f_u16.to_le_bytes());
    x[4] = 0x81;
    x[6..8].copy_from_slice(&0x123_u16.to_le_bytes());
    x[8..16].copy_from_slice(&0x1111_2222_3333_4444_u64.to_le_bytes());
    x[16..24].copy_from_slice(&0x5555_6666_7777_8888_u64.to_le_bytes());
    x[24..28].copy_from_slice(&0x1fa0_u32.to_le_bytes());
    for st in 0..8 {
        x[32 + 16 * st..42 + 16 * st].fill(0x10 + st as u8);
    }
    x[160..416].fill(0x22);
    x[576..832].fill(0x33);
    x[896..1408].fill(0x66);
    x[2432..2436].fill(0x99);
    x[512..520].copy_from_slice(&0x247_u64.to_le_bytes());
    g.cpu.registers.rdi = AREA;
    ask(&mut g, !0);
    g
}

fn ask(g: &mut Guest, mask: u64) {
    g.cpu.registers.rax = mask & 0xffff_ffff;
    g.cpu.registers.rdx = mask >> 32;
}

fn word(g: &Guest, offset: u64) -> u64 {
    u64::from_le_bytes(g.peek(AREA + offset))
}

#[test]
fn xsave_writes_the_standard_format() {
    let mut g = guest();
    let fill = vec![0xee; 2440];
    g.poke(AREA, &fill);
    // Bits of XSTATE_BV outside the request stay.
    g.poke(AREA + 512, &(1_u64 << 20).to_le_bytes());
    g.done("xsave64", &XSAVE64);
    let image = g.cpu.xsave.clone();
    for (from, to) in [(0, 24), (32, 416), (576, 832), (896, 1408), (2432, 2440)] {
        for (at, byte) in (from..).zip(&image[from..to]) {
            assert_eq!(g.peek(AREA + at as u64), [*byte], "{at}");
        }
    }
    assert_eq!(word(&g, 24), 0xffff_0000_1fa0);
    assert_eq!(word(&g, 512), 0x247 | 1 << 20);
    // Components in their initial state are written too: opmasks and the upper 16 ZMM.
    assert_eq!((word(&g, 832), word(&g, 1408)), (0, 0));
    // Neither XCOMP_BV nor the reserved bytes are.
    assert_eq!(word(&g, 520), 0xeeee_eeee_eeee_eeee);
    assert_eq!(word(&g, 416), 0xeeee_eeee_eeee_eeee);
    assert!(!g.cpu.xsave_written);
}

#[test]
fn xsave_writes_only_what_is_asked_for() {
    let mut g = guest();
    g.poke(AREA, &vec![0xee; 2440]);
    g.poke(AREA + 512, &0x243_u64.to_le_bytes());
    // AVX alone: its component, MXCSR, the header.
    ask(&mut g, 4);
    g.done("xsave64", &XSAVE64);
    assert_eq!(word(&g, 0), 0xeeee_eeee_eeee_eeee);
    assert_eq!(word(&g, 160), 0xeeee_eeee_eeee_eeee);
    assert_eq!(word(&g, 24), 0xffff_0000_1fa0);
    assert_eq!(word(&g, 576), 0x3333_3333_3333_3333);
    assert_eq!(word(&g, 896), 0xeeee_eeee_eeee_eeee);
    assert_eq!(word(&g, 512), 0x247);
    // What XCR0 has not enabled is not saved.
    g.cpu.xcr0 = 3;
    ask(&mut g, !0);
    g.poke(AREA + 576, &[0xee; 8]);
    g.done("xsave64", &XSAVE64);
    assert_eq!(word(&g, 576), 0xeeee_eeee_eeee_eeee);
    assert_eq!(
        word(&g, 0),
        u64::from_le_bytes(g.cpu.xsave[..8].try_into().unwrap())
    );
}

#[test]
fn the_narrow_form_saves_short_pointers() {
    let mut g = guest();
    ask(&mut g, 1);
    g.done("xsave", &XSAVE);
    assert_eq!((word(&g, 8), word(&g, 16)), (0x3333_4444, 0x7777_8888));
    g.poke(AREA + 8, &[0x77; 16]);
    g.done("xrstor", &XRSTOR);
    assert_eq!(g.cpu.xsave[8..16], 0x7777_7777_u64.to_le_bytes());
    assert_eq!(g.cpu.xsave[16..24], 0x7777_7777_u64.to_le_bytes());
}

#[test]
fn xsaveopt_skips_what_is_initial() {
    let mut g = guest();
    g.poke(AREA, &vec![0xee; 2440]);
    g.poke(AREA + 512, &0xff_u64.to_le_bytes());
    g.done("xsaveopt64", &XSAVEOPT64);
    assert_eq!(word(&g, 832), 0xeeee_eeee_eeee_eeee);
    assert_eq!(word(&g, 576), 0x3333_3333_3333_3333);
    assert_eq!(word(&g, 512), 0x25f);
}

#[test]
fn xsavec_compacts() {
    let mut g = guest();
    // Opmasks (initial) and ZMM_Hi256, not AVX; SSE initial but for MXCSR.
    ask(&mut g, 0x62);
    g.cpu.xsave[512] &= !2;
    g.poke(AREA, &vec![0xee; 1200]);
    g.done("xsavec64", &XSAVEC64);
    assert_eq!((word(&g, 512), word(&g, 520)), (0x42, 0x62 | COMPACTED));
    assert_eq!(word(&g, 24), 0xffff_0000_1fa0);
    assert_eq!(word(&g, 160), 0);
    // The opmasks' place is kept free although they are not written.
    assert_eq!(word(&g, 576), 0xeeee_eeee_eeee_eeee);
    assert_eq!(word(&g, 640), 0x6666_6666_6666_6666);
    assert_eq!(word(&g, 640 + 512), 0xeeee_eeee_eeee_eeee);
}

#[test]
fn compacted_components_are_aligned_where_cpuid_says() {
    let mut g = guest();
    let entry = g
        .cpu
        .cpuid
        .iter_mut()
        .find(|e| (e.function, e.index) == (0xd, 6));
    entry.unwrap().ecx = 2;
    let entry = g
        .cpu
        .cpuid
        .iter_mut()
        .find(|e| (e.function, e.index) == (0xd, 5));
    entry.unwrap().eax = 8;
    ask(&mut g, 0x60);
    g.done("xsavec64", &XSAVEC64);
    assert_eq!(word(&g, 640), 0x6666_6666_6666_6666);
}

#[test]
fn every_form_restores_what_it_saved() {
    for (save, name, restore, restore_name) in [
        (XSAVE64, "xsave64", XRSTOR64, "xrstor64"),
        (XSAVEOPT64, "xsaveopt64", XRSTOR64, "xrstor64"),
        (XSAVEC64, "xsavec64", XRSTOR64, "xrstor64"),
        (XSAVES64, "xsaves64", XRSTORS64, "xrstors64"),
    ] {
        let mut g = guest();
        let before = g.cpu.xsave.clone();
        g.done(name, &save);
        for byte in &mut g.cpu.xsave[32..] {
            *byte ^= 0x5a;
        }
        g.cpu.xsave[0] ^= 0xff;
        g.cpu.xsave[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        g.cpu.xsave[512..576].fill(0);
        g.cpu.xsave[512..520].copy_from_slice(&0x2e7_u64.to_le_bytes());
        g.done(restore_name, &restore);
        assert_eq!(g.in_use(), 0x247, "{name}");
        for (from, to) in [(0, 32), (160, 416), (576, 832), (832, 2432), (2432, 2440)] {
            assert_eq!(g.cpu.xsave[from..to], before[from..to], "{name} {from}");
        }
        for st in (32..160).step_by(16) {
            assert_eq!(g.cpu.xsave[st..st + 10], before[st..st + 10]);
        }
    }
}

#[test]
fn xrstor_initialises_what_the_area_lacks() {
    let mut g = guest();
    g.poke(AREA, &[0; 576]);
    g.poke(AREA + 24, &0x1f80_u32.to_le_bytes());
    // x87, SSE, AVX; ZMM_Hi256 and PKRU are not asked for.
    ask(&mut g, 7);
    g.done("xrstor64", &XRSTOR64);
    assert_eq!(g.in_use() & !2, 0x240);
    let x = &g.cpu.xsave;
    assert_eq!(x[0..2], 0x37f_u16.to_le_bytes());
    assert_eq!((&x[2..24], &x[32..416]), (&[0; 22][..], &[0; 384][..]));
    assert_eq!(x[24..28], 0x1f80_u32.to_le_bytes());
    assert_eq!(x[576..832], [0; 256]);
    assert_eq!(x[896], 0x66);
}

#[test]
fn mxcsr_follows_the_format() {
    // Standard: loaded with SSE or AVX, whatever XSTATE_BV says.
    let mut g = guest();
    g.poke(AREA, &[0; 576]);
    g.poke(AREA + 24, &0x1fbf_u32.to_le_bytes());
    ask(&mut g, 4);
    g.done("xrstor64", &XRSTOR64);
    assert_eq!(g.cpu.xsave[24..28], 0x1fbf_u32.to_le_bytes());
    assert_eq!(g.in_use() & 2, 2);
    assert_eq!(g.cpu.xsave[160], 0x22);
    // A reserved bit faults, and changes nothing.
    g.poke(AREA + 24, &0x1_1f80_u32.to_le_bytes());
    let before = g.cpu.xsave.clone();
    g.protection(&XRSTOR64);
    assert_eq!(g.cpu.xsave, before);
    // Not looked at for x87 alone.
    ask(&mut g, 1);
    g.done("xrstor64", &XRSTOR64);
    // Compacted: part of SSE, so initial if that is.
    g.poke(AREA + 520, &(7 | COMPACTED).to_le_bytes());
    ask(&mut g, 4);
    g.done("xrstor64", &XRSTOR64);
    assert_eq!(g.cpu.xsave[24..28], 0x1fbf_u32.to_le_bytes());
    ask(&mut g, 2);
    g.done("xrstor64", &XRSTOR64);
    assert_eq!(g.cpu.xsave[24..28], 0x1f80_u32.to_le_bytes());
    assert_eq!(g.xmm(0), 0);
}

#[test]
fn bad_headers_are_protection_faults() {
    let standard = |g: &Guest| {
        g.poke(AREA, &[0; 576]);
        g.poke(AREA + 24, &0x1f80_u32.to_le_bytes());
    };
    let compacted = |g: &Guest| {
        standard(g);
        g.poke(AREA + 520, &(7 | COMPACTED).to_le_bytes());
    };
    let mut g = guest();
    for (offset, value) in [
        (512, 1 << 8), // a component that XCR0 lacks
        (512, COMPACTED),
        (520, 1), // XCOMP_BV without the format bit
        (528, 1),
    ] {
        standard(&g);
        g.poke(AREA + offset, &u64::to_le_bytes(value));
        g.protection(&XRSTOR64);
    }
    // Bytes 63:24 are not checked in the standard format.
    standard(&g);
    g.poke(AREA + 536, &[1]);
    g.done("xrstor64", &XRSTOR64);
    for (offset, value) in [
        (512, 8 << 4),             // in XSTATE_BV, not in XCOMP_BV
        (520, COMPACTED | 1 << 8), // not in XCR0
        (528, 1),
        (536, 1),
        (568, 1),
    ] {
        compacted(&g);
        g.poke(AREA + offset, &u64::to_le_bytes(value));
        g.protection(&XRSTOR64);
    }
    compacted(&g);
    g.done("xrstors64", &XRSTORS64);
    // XRSTORS takes the compacted format only; without XSAVEC, XRSTOR the standard only.
    standard(&g);
    g.protection(&XRSTORS64);
    compacted(&g);
    g.without((0xd, 1, 0, 1));
    g.protection(&XRSTOR64);
}

#[test]
fn faults_come_in_order() {
    let mut g = guest();
    g.cpu.registers.rdi = AREA + 16;
    for code in [XSAVE64, XSAVEC64, XSAVES64, XRSTOR64, XRSTORS64] {
        g.protection(&code);
    }
    g.cpu.registers.rdi = DATA + 0x3f00;
    g.raises(&XSAVE64, 14, Some(2), Some(DATA + 0x4000));
    assert_eq!(g.peek::<256>(DATA + 0x3f00), [0; 256]);
    g.raises(&XRSTOR64, 14, Some(0), Some(DATA + 0x4000));
    g.cpu.registers.rdi = READ_ONLY;
    g.raises(&XSAVEOPT64, 14, Some(3), Some(READ_ONLY));
    g.cpu.registers.rdi = NOT_CANONICAL;
    g.protection(&XSAVE64);
    g.cpu.special.cr0 |= 8;
    g.raises(&XSAVE64, 7, None, None);
    g.cpu.special.cr4 &= !(1 << 18);
    g.undefined(&XSAVE64);
    let mut g = guest();
    g.ring3();
    g.protection(&XSAVES64);
    g.protection(&XRSTORS64);
    g.without((1, 0, 2, 26));
    g.undefined(&XRSTOR64);
    let mut g = guest();
    g.without((0xd, 1, 0, 3));
    g.undefined(&XSAVES64);
}

#[test]
fn supervisor_components_are_msrs() {
    let mut g = guest();
    g.cpu.msrs.insert(0xda0, 1 << 11);
    g.cpu.msrs.insert(0x6a7, 0xabcd);
    ask(&mut g, 1 << 11 | 3);
    g.done("xsaves64", &XSAVES64);
    assert_eq!(word(&g, 512), 3 | 1 << 11);
    assert_eq!(word(&g, 520), 3 | 1 << 11 | COMPACTED);
    assert_eq!((word(&g, 576), word(&g, 584)), (0, 0xabcd));
    g.cpu.msrs.insert(0x6a0, 7);
    g.cpu.msrs.insert(0x6a7, 7);
    g.done("xrstors64", &XRSTORS64);
    assert_eq!((g.cpu.msrs[&0x6a0], g.cpu.msrs[&0x6a7]), (0, 0xabcd));
    // In its initial state it is not written, and is restored as zeros.
    g.cpu.msrs.insert(0x6a7, 0);
    g.done("xsaves64", &XSAVES64);
    assert_eq!(word(&g, 512), 3);
    g.cpu.msrs.insert(0x6a7, 9);
    g.done("xrstors64", &XRSTORS64);
    assert_eq!(g.cpu.msrs[&0x6a7], 0);
    // XSAVEC leaves supervisor components alone.
    g.done("xsavec64", &XSAVEC64);
    assert_eq!(word(&g, 520), 3 | COMPACTED);
}

#[test]
fn components_that_nobody_describes_are_refused() {
    let mut g = guest();
    g.cpu.xcr0 |= 1 << 18;
    let refusal = g.refused(&XSAVE64);
    assert!(refusal.why.contains("component 18"), "{}", refusal.why);
    g.cpu.msrs.insert(0xda0, 1 << 15);
    g.cpu.xcr0 = 7;
    assert!(g.refused(&XSAVES64).why.contains("15"));
}
