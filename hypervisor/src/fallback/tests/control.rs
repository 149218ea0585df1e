//! x87 and SSE control instructions.

use super::*;

fn fcw(g: &Guest) -> u16 {
    u16::from_le_bytes([g.cpu.xsave[0], g.cpu.xsave[1]])
}

fn fsw(g: &Guest) -> u16 {
    u16::from_le_bytes([g.cpu.xsave[2], g.cpu.xsave[3]])
}

fn set_fsw(g: &mut Guest, value: u16) {
    g.cpu.xsave[2..4].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn fwait_looks_at_mp_and_ts_together() {
    let mut g = Guest::new();
    g.done("wait", &[0x9b]);
    assert!(!g.cpu.xsave_written);
    g.cpu.special.cr0 |= 8;
    g.raises(&[0x9b], 7, None, None);
    g.cpu.special.cr0 &= !2;
    g.done("wait", &[0x9b]);
}

/// Found by fuzzing: RIP lost its upper half.
#[test]
fn sixteen_bit_code_goes_on_past_64_kib_where_its_segment_does() {
    let mut g = Guest::new();
    g.cpu.special.cs.l = 0;
    g.cpu.special.cs.db = 0;
    g.done("wait", &[0x9b]);
    g.cpu.special.cs.limit = CODE as u32 - 1;
    g.protection(&[0x9b]);
}

#[test]
fn fnclex_clears_exceptions_and_keeps_the_rest() {
    let mut g = Guest::new();
    set_fsw(&mut g, 0xfbff);
    g.done("fnclex", &[0xdb, 0xe2]);
    assert_eq!(fsw(&g), 0x7b00);
}

#[test]
fn fninit_resets_control_and_tags() {
    let mut g = Guest::new();
    g.cpu.xsave[0..24].fill(0xff);
    g.cpu.xsave[32..42].fill(7);
    g.done("fninit", &[0xdb, 0xe3]);
    assert_eq!((fcw(&g), fsw(&g)), (0x37f, 0));
    assert_eq!(g.cpu.xsave[4..24], [0; 20]);
    assert_eq!(g.cpu.xsave[32..42], [7; 10]);
    assert_eq!(g.cpu.xsave[24..28], 0x1f80_u32.to_le_bytes());
}

#[test]
fn control_word_in_and_out() {
    let mut g = Guest::new();
    g.cpu.registers.rdi = DATA + 0xfff;
    g.poke(DATA + 0xfff, &0xfa7b_u16.to_le_bytes());
    // fldcw [rdi] with ZE flagged: unmasking makes it pending.
    set_fsw(&mut g, 4);
    g.done("fldcw", &[0xd9, 0x2f]);
    assert_eq!((fcw(&g), fsw(&g)), (0x1a7b, 0x8084));
    g.raises(&[0xd9, 0x2f], 16, None, None);
    // fnstcw does not mind.
    g.done("fnstcw", &[0xd9, 0x3f]);
    assert_eq!(g.peek::<2>(DATA + 0xfff), 0x1a7b_u16.to_le_bytes());
    g.cpu.registers.rdi = READ_ONLY;
    g.raises(&[0xd9, 0x3f], 14, Some(3), Some(READ_ONLY));
}

#[test]
fn status_word_to_ax_and_memory() {
    let mut g = Guest::new();
    set_fsw(&mut g, 0x3804);
    g.cpu.registers.rax = !0;
    g.done("fnstsw", &[0xdf, 0xe0]);
    assert_eq!(g.cpu.registers.rax, 0xffff_ffff_ffff_3804);
    g.cpu.registers.rdi = DATA;
    g.done("fnstsw", &[0xdd, 0x3f]);
    assert_eq!(g.peek::<3>(DATA), [0x04, 0x38, 0]);
    // In the initial state the image's bytes do not count.
    g.cpu.xsave[512] &= !1;
    g.cpu.xsave[0] = 0;
    g.done("fnstsw", &[0xdf, 0xe0]);
    assert_eq!(g.cpu.registers.rax, 0xffff_ffff_ffff_0000);
    g.done("fnstcw", &[0xd9, 0x3f]);
    assert_eq!(g.peek::<2>(DATA), [0x7f, 0x03]);
    for bit in [4, 8] {
        g.cpu.special.cr0 = 0x8001_0023 | bit;
        g.raises(&[0xdf, 0xe0], 7, None, None);
    }
}

#[test]
fn mxcsr_in_and_out() {
    let (ldmxcsr, stmxcsr) = ([0x0f, 0xae, 0x17], [0x0f, 0xae, 0x1f]);
    let mut g = Guest::new();
    g.cpu.xsave[512] = 0;
    g.cpu.registers.rdi = DATA + 0xffe;
    g.poke(DATA + 0xffe, &0x5fc0_u32.to_le_bytes());
    g.done("ldmxcsr", &ldmxcsr);
    assert_eq!(g.cpu.xsave[24..28], 0x5fc0_u32.to_le_bytes());
    assert_eq!(g.in_use(), 2);
    g.cpu.registers.rdi = DATA + 0x10;
    g.done("stmxcsr", &stmxcsr);
    assert_eq!(g.peek::<4>(DATA + 0x10), 0x5fc0_u32.to_le_bytes());
    // Reserved bits, also where the image has no mask: DAZ (bit 6) is then reserved.
    g.poke(DATA + 0x10, &0x1_1f80_u32.to_le_bytes());
    g.protection(&ldmxcsr);
    g.cpu.xsave[28..32].fill(0);
    g.poke(DATA + 0x10, &0x1fc0_u32.to_le_bytes());
    g.protection(&ldmxcsr);
    g.cpu.registers.rdi = NOWHERE;
    g.raises(&ldmxcsr, 14, Some(0), Some(NOWHERE));
    g.raises(&stmxcsr, 14, Some(2), Some(NOWHERE));
    // vstmxcsr [rdi] needs AVX in XCR0.
    g.cpu.registers.rdi = DATA;
    g.done("vstmxcsr", &[0xc5, 0xf8, 0xae, 0x1f]);
    g.cpu.xcr0 = 3;
    g.undefined(&[0xc5, 0xf8, 0xae, 0x1f]);
    g.cpu.special.cr0 |= 8;
    g.raises(&ldmxcsr, 7, None, None);
    g.cpu.special.cr4 &= !(1 << 9);
    g.undefined(&ldmxcsr);
}

#[test]
fn fwait_before_another_is_an_instruction_of_its_own() {
    let mut g = Guest::new();
    // fninit behind it, which only the next step reaches.
    g.cpu.xsave[0] = 0x7e;
    assert_eq!(g.run(&[0x9b, 0xdb, 0xe3]), Ok(Outcome::Done("wait".into())));
    assert_eq!((g.cpu.registers.rip, fcw(&g)), (CODE + 1, 0x37e));
}
