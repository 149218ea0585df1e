//! Instructions that run on the host's processor.

use super::*;

fn host(feature: &str) -> bool {
    let has = match feature {
        "avx2" => is_x86_feature_detected!("avx2"),
        "avx512" => is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw"),
        "bmi" => is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2"),
        "adx" => is_x86_feature_detected!("adx"),
        "aes" => is_x86_feature_detected!("aes") && is_x86_feature_detected!("pclmulqdq"),
        "cx16" => is_x86_feature_detected!("cmpxchg16b"),
        "movbe" => is_x86_feature_detected!("movbe"),
        "sse4.2" => is_x86_feature_detected!("sse4.2") && is_x86_feature_detected!("popcnt"),
        other => panic!("{other}"),
    };
    if !has {
        eprintln!("skipped: this host has no {feature}");
    }
    has
}

#[test]
fn popcnt_counts_and_sets_zf() {
    let mut g = Guest::new();
    if !host("sse4.2") {
        return;
    }
    g.cpu.registers.rbx = 0xf0f0_0000_0000_0001;
    g.cpu.registers.rax = !0;
    g.cpu.registers.rflags |= CF | ZF | SF | OF | AF | PF;
    g.done("popcnt", &[0xf3, 0x48, 0x0f, 0xb8, 0xc3]);
    assert_eq!((g.cpu.registers.rax, g.status()), (9, 0));
    // popcnt eax, [rdi] across two pages; the upper half of rax is cleared.
    g.poke(DATA + 0xffe, &[0xff, 0xff, 0x01, 0x80]);
    g.cpu.registers.rdi = DATA + 0xffe;
    g.cpu.registers.rax = !0;
    g.done("popcnt", &[0xf3, 0x0f, 0xb8, 0x07]);
    assert_eq!(g.cpu.registers.rax, 18);
    g.cpu.registers.rbx = 0;
    g.done("popcnt", &[0xf3, 0x48, 0x0f, 0xb8, 0xc3]);
    assert_eq!((g.cpu.registers.rax, g.status()), (0, ZF));
    assert!(!g.cpu.xsave_written);
}

#[test]
fn popcnt_faults_as_memory_says() {
    let mut g = Guest::new();
    if !host("sse4.2") {
        return;
    }
    let code = [0xf3, 0x48, 0x0f, 0xb8, 0x07];
    g.cpu.registers.rdi = NOWHERE;
    g.raises(&code, 14, Some(0), Some(NOWHERE));
    // Across the end of the mapped pages: CR2 is the first byte of the missing one.
    g.cpu.registers.rdi = DATA + 0x3ffd;
    g.raises(&code, 14, Some(0), Some(DATA + 0x4000));
    g.cpu.registers.rdi = NOT_CANONICAL;
    g.protection(&code);
    // popcnt rax, [rbp]: through SS.
    g.cpu.registers.rbp = NOT_CANONICAL;
    g.raises(&[0xf3, 0x48, 0x0f, 0xb8, 0x45, 0], 12, Some(0), None);
    g.cpu.registers.rdi = DEVICE;
    assert!(g.refused(&code).why.contains("0xe0000000"));
    g.without((1, 0, 2, 23));
    g.undefined(&code);
}

#[test]
fn no_lock_where_none_is_allowed() {
    let mut g = Guest::new();
    g.undefined(&[0xf0, 0xf3, 0x0f, 0xb8, 0x07]);
}

#[test]
fn fs_and_gs_bases_and_address_sizes_count() {
    let mut g = Guest::new();
    if !host("sse4.2") {
        return;
    }
    g.poke(DATA + 0x18, &[7; 8]);
    g.cpu.special.gs.base = DATA;
    g.cpu.registers.rdi = 0x10;
    g.done("popcnt", &[0x65, 0xf3, 0x48, 0x0f, 0xb8, 0x47, 0x08]);
    assert_eq!(g.cpu.registers.rax, 24);
    // popcnt rax, gs:[edi + 8] drops the upper half of rdi.
    g.cpu.registers.rdi = 0xffff_ffff_0000_0010;
    g.done("popcnt", &[0x67, 0x65, 0xf3, 0x48, 0x0f, 0xb8, 0x47, 0x08]);
    // rip-relative: popcnt rax, [rip + 0]
    g.poke(CODE + 9, &[0xff; 8]);
    g.done("popcnt", &[0xf3, 0x48, 0x0f, 0xb8, 0x05, 0, 0, 0, 0]);
    assert_eq!(g.cpu.registers.rax, 64);
}

#[test]
fn cmpxchg16b_with_and_without_lock() {
    if !host("cx16") {
        return;
    }
    for code in [
        &[0xf0, 0x48, 0x0f, 0xc7, 0x0f][..],
        &[0x48, 0x0f, 0xc7, 0x0f][..],
    ] {
        let mut g = Guest::new();
        let old = 0x1111_2222_3333_4444_5555_6666_7777_8888_u128;
        let new = 0x9999_aaaa_bbbb_cccc_dddd_eeee_ffff_0000_u128;
        g.poke(DATA, &old.to_le_bytes());
        let r = &mut g.cpu.registers;
        (r.rdx, r.rax) = ((old >> 64) as u64, old as u64);
        (r.rcx, r.rbx) = ((new >> 64) as u64, new as u64);
        r.rdi = DATA;
        g.done("cmpxchg16b", code);
        assert_eq!(g.status(), ZF);
        assert_eq!(u128::from_le_bytes(g.peek(DATA)), new);
        // Now it does not match: RDX:RAX get the memory's value, which stays.
        g.cpu.registers.rflags |= CF | OF;
        g.done("cmpxchg16b", code);
        assert_eq!(g.status(), CF | OF);
        assert_eq!(g.cpu.registers.rdx, (new >> 64) as u64);
        assert_eq!(g.cpu.registers.rax, new as u64);
        assert_eq!(u128::from_le_bytes(g.peek(DATA)), new);

        g.cpu.registers.rdi = DATA + 8;
        g.protection(code);
        // It writes also when it does not match.
        g.cpu.registers.rdi = READ_ONLY;
        g.raises(code, 14, Some(3), Some(READ_ONLY));
        g.cpu.registers.rdi = NOWHERE;
        g.raises(code, 14, Some(2), Some(NOWHERE));
    }
}

#[test]
fn lock_means_one_step() {
    if !host("cx16") {
        return;
    }
    let mut g = Guest::new();
    g.cpu.registers.rdi = DATA;
    g.cpu.registers.rbx = 5;
    g.poke(DATA, &[0; 16]);
    // Another vCPU writes between the read and the exchange: the second attempt sees it.
    let gpa = g.gpa(DATA);
    let entry_is_dirty = g.get64(Guest::entry(DATA)) | 0x60;
    g.put64(Guest::entry(DATA), entry_is_dirty);
    for table in [0x1000, 0x2000, 0x3010] {
        g.put64(table, g.get64(table) | 0x20);
    }
    g.put64(Guest::entry(CODE), g.get64(Guest::entry(CODE)) | 0x20);
    *g.ram.interference.lock().unwrap() = Some((gpa, 7 << 64 | 3));
    g.done("cmpxchg16b", &[0xf0, 0x48, 0x0f, 0xc7, 0x0f]);
    assert_eq!(g.status(), 0);
    assert_eq!((g.cpu.registers.rax, g.cpu.registers.rdx), (3, 7));
    assert_eq!(u128::from_le_bytes(g.peek(DATA)), 7 << 64 | 3);
}

#[test]
fn crc32_of_known_bytes() {
    if !host("sse4.2") {
        return;
    }
    let mut g = Guest::new();
    // CRC-32C of "123456789", byte by byte.
    g.cpu.registers.rax = 0xffff_ffff;
    for byte in b"123456789" {
        g.cpu.registers.rbx = u64::from(*byte);
        g.done("crc32", &[0xf2, 0x0f, 0x38, 0xf0, 0xc3]);
    }
    assert_eq!(g.cpu.registers.rax as u32 ^ !0, 0xe306_9283);
}

#[test]
fn adcx_and_adox_use_a_flag_each() {
    if !host("adx") {
        return;
    }
    let mut g = Guest::new();
    g.cpu.registers.rax = !0;
    g.cpu.registers.rbx = 0;
    g.cpu.registers.rflags |= CF;
    g.done("adcx", &[0x66, 0x48, 0x0f, 0x38, 0xf6, 0xc3]);
    assert_eq!((g.cpu.registers.rax, g.status()), (0, CF));
    g.cpu.registers.rax = !0;
    g.cpu.registers.rbx = 1;
    g.done("adox", &[0xf3, 0x48, 0x0f, 0x38, 0xf6, 0xc3]);
    assert_eq!((g.cpu.registers.rax, g.status()), (0, CF | OF));
}

#[test]
fn bmi_and_movbe() {
    let mut g = Guest::new();
    if host("bmi") {
        // andn eax, ebx, ecx
        g.cpu.registers.rbx = 0xf0;
        g.cpu.registers.rcx = 0xff;
        g.done("andn", &[0xc4, 0xe2, 0x60, 0xf2, 0xc1]);
        assert_eq!(g.cpu.registers.rax, 0x0f);
        // mulx rax, rcx, rbx: RDX * RBX
        g.cpu.registers.rdx = 1 << 63;
        g.cpu.registers.rbx = 6;
        g.done("mulx", &[0xc4, 0xe2, 0xf3, 0xf6, 0xc3]);
        assert_eq!((g.cpu.registers.rax, g.cpu.registers.rcx), (3, 0));
        // pdep r12, r13, r14
        g.cpu.registers.r13 = 0b101;
        g.cpu.registers.r14 = 0xf000;
        g.done("pdep", &[0xc4, 0x42, 0x93, 0xf5, 0xe6]);
        assert_eq!(g.cpu.registers.r12, 0x5000);
        // tzcnt of 0 is the operand size, with CF.
        g.cpu.registers.rbx = 0;
        g.done("tzcnt", &[0xf3, 0x48, 0x0f, 0xbc, 0xc3]);
        assert_eq!((g.cpu.registers.rax, g.status() & CF), (64, CF));
        g.without((7, 0, 1, 3));
        g.refused(&[0xf3, 0x48, 0x0f, 0xbc, 0xc3]);
        g.undefined(&[0xc4, 0xe2, 0x60, 0xf2, 0xc1]);
    }
    if host("movbe") {
        g.poke(DATA, &[1, 2, 3, 4]);
        g.cpu.registers.rdi = DATA;
        g.done("movbe", &[0x0f, 0x38, 0xf0, 0x07]);
        assert_eq!(g.cpu.registers.rax, 0x0102_0304);
        g.cpu.registers.rax = 0xaabb_ccdd;
        g.done("movbe", &[0x0f, 0x38, 0xf1, 0x07]);
        assert_eq!(g.peek::<4>(DATA), [0xaa, 0xbb, 0xcc, 0xdd]);
    }
}

#[test]
fn rsp_is_an_address_but_never_an_operand() {
    if !host("sse4.2") {
        return;
    }
    let mut g = Guest::new();
    g.cpu.registers.rsp = DATA;
    g.poke(DATA, &[3]);
    g.done("popcnt", &[0xf3, 0x0f, 0xb8, 0x04, 0x24]);
    assert_eq!(g.cpu.registers.rax, 2);
    g.refused(&[0xf3, 0x48, 0x0f, 0xb8, 0xc4]);
    g.refused(&[0xf3, 0x48, 0x0f, 0xb8, 0xe0]);
}

#[test]
fn sse_computes_and_checks_alignment() {
    let mut g = Guest::new();
    g.set_xmm(1, u128::from_le_bytes([1; 16]));
    g.poke(DATA + 16, &[2; 16]);
    g.cpu.registers.rdi = DATA + 16;
    // paddb xmm1, [rdi]
    g.done("paddb", &[0x66, 0x0f, 0xfc, 0x0f]);
    assert_eq!(g.xmm(1).to_le_bytes(), [3; 16]);
    g.cpu.registers.rdi = DATA + 17;
    g.protection(&[0x66, 0x0f, 0xfc, 0x0f]);
    assert_eq!(g.xmm(1).to_le_bytes(), [3; 16]);
    // movups [rdi], xmm1 need not be aligned, and may cross pages.
    g.cpu.registers.rdi = DATA + 0xff9;
    g.done("movups", &[0x0f, 0x11, 0x0f]);
    assert_eq!(g.peek::<18>(DATA + 0xff8)[1..17], [3; 16]);
    // All or nothing: the second page is missing.
    g.cpu.registers.rdi = DATA + 0x3ff9;
    g.raises(&[0x0f, 0x11, 0x0f], 14, Some(2), Some(DATA + 0x4000));
    assert_eq!(g.peek::<7>(DATA + 0x3ff9), [0; 7]);
}

#[test]
fn sse_checks_control_registers_and_mxcsr() {
    let paddb = [0x66, 0x0f, 0xfc, 0xca];
    let mut g = Guest::new();
    g.cpu.special.cr0 |= 4;
    g.undefined(&paddb);
    let mut g = Guest::new();
    g.cpu.special.cr0 |= 8;
    g.raises(&paddb, 7, None, None);
    let mut g = Guest::new();
    g.cpu.special.cr4 &= !(1 << 9);
    g.undefined(&paddb);
    let mut g = Guest::new();
    g.cpu.xsave[24..28].copy_from_slice(&0x1d80_u32.to_le_bytes());
    assert!(g.refused(&paddb).why.contains("MXCSR"));
    assert!(!g.cpu.xsave_written);
}

#[test]
fn sse_sets_mxcsr_flags_and_leaves_the_host_alone() {
    let mut g = Guest::new();
    // divss xmm0, xmm1 with 1.0 / 0.0: ZE.
    g.set_xmm(0, u128::from(1.0_f32.to_bits()));
    g.done("divss", &[0xf3, 0x0f, 0x5e, 0xc1]);
    assert_eq!(g.xmm(0), u128::from(f32::INFINITY.to_bits()));
    assert_eq!(g.cpu.xsave[24..28], 0x1f84_u32.to_le_bytes());
    // Rounding mode of the guest (towards zero) does not reach the host.
    g.cpu.xsave[24..28].copy_from_slice(&0x7f80_u32.to_le_bytes());
    g.set_xmm(0, u128::from(2.0_f32.to_bits()));
    g.set_xmm(1, u128::from(3.0_f32.to_bits()));
    g.done("divss", &[0xf3, 0x0f, 0x5e, 0xc1]);
    assert_eq!(g.xmm(0) as u32, 0x3f2a_aaaa);
    let (two, three) = std::hint::black_box((2.0_f32, 3.0_f32));
    assert_eq!((two / three).to_bits(), 0x3f2a_aaab);
}

#[test]
fn aes_and_pclmul() {
    if !host("aes") {
        return;
    }
    let mut g = Guest::new();
    g.set_xmm(1, 3);
    g.set_xmm(2, 5);
    // pclmulqdq xmm1, xmm2, 0: (x + 1)(x^2 + 1) = x^3 + x^2 + x + 1
    g.done("pclmulqdq", &[0x66, 0x0f, 0x3a, 0x44, 0xca, 0x00]);
    assert_eq!(g.xmm(1), 15);
    // aesenc of zeros with a zero key: every byte is S(0) = 0x63.
    g.set_xmm(1, 0);
    g.set_xmm(2, 0);
    g.done("aesenc", &[0x66, 0x0f, 0x38, 0xdc, 0xca]);
    assert_eq!(g.xmm(1).to_le_bytes(), [0x63; 16]);
}

#[test]
fn avx_changes_upper_halves() {
    if !host("avx2") {
        return;
    }
    let mut g = Guest::new();
    g.poke(DATA + 0xff0, &[9; 32]);
    g.cpu.registers.rdi = DATA + 0xff0;
    // vmovdqu ymm3, [rdi]
    g.done("vmovdqu", &[0xc5, 0xfe, 0x6f, 0x1f]);
    assert_eq!(g.xmm(3).to_le_bytes(), [9; 16]);
    assert_eq!(g.cpu.xsave[576 + 48..576 + 64], [9; 16]);
    assert_eq!(g.in_use() & 4, 4);
    // vpaddb ymm4, ymm3, ymm3
    g.done("vpaddb", &[0xc5, 0xe5, 0xfc, 0xe3]);
    assert_eq!(g.cpu.xsave[576 + 64..576 + 80], [18; 16]);
    // vmovdqa ymm3, [rdi] must be aligned to 32.
    g.protection(&[0xc5, 0xfd, 0x6f, 0x1f]);
    g.done("vzeroupper", &[0xc5, 0xf8, 0x77]);
    assert_eq!(g.in_use() & 4, 0);
    assert_eq!(g.cpu.xsave[576..832], [0; 256]);

    g.cpu.xcr0 = 3;
    g.undefined(&[0xc5, 0xe5, 0xfc, 0xe3]);
    g.cpu.xcr0 = 7;
    g.done("vpaddb", &[0xc5, 0xe5, 0xfc, 0xe3]);
    g.cpu.special.cr4 &= !(1 << 18);
    g.undefined(&[0xc5, 0xe5, 0xfc, 0xe3]);
}

#[test]
fn avx512_masks() {
    if !host("avx512") {
        return;
    }
    let mut g = Guest::new();
    // kmovw k1, eax
    g.cpu.registers.rax = 0b101;
    g.done("kmovw", &[0xc5, 0xf8, 0x92, 0xc8]);
    // vmovdqu32 [rdi]{k1}, zmm0 writes elements 0 and 2 only.
    g.set_xmm(0, !0);
    g.poke(DATA, &[0x11; 64]);
    g.cpu.registers.rdi = DATA;
    g.done("vmovdqu32", &[0x62, 0xf1, 0x7e, 0x49, 0x7f, 0x07]);
    let mut wanted = [0x11; 64];
    wanted[0..4].fill(0xff);
    wanted[8..12].fill(0xff);
    assert_eq!(g.peek::<64>(DATA), wanted);
    // One that reaches an unmapped page might not fault; it is left alone.
    g.cpu.registers.rdi = DATA + 0x3ff0;
    g.refused(&[0x62, 0xf1, 0x7e, 0x49, 0x7f, 0x07]);
    g.cpu.xcr0 = 7;
    g.undefined(&[0xc5, 0xf8, 0x92, 0xc8]);
}

#[test]
fn what_names_memory_in_other_ways_is_refused() {
    let mut g = Guest::new();
    // maskmovdqu, gathers, mov, jumps, string instructions, port I/O, system instructions.
    for code in [
        &[0x66, 0x0f, 0xf7, 0xc1][..],
        &[0xc4, 0xe2, 0x75, 0x90, 0x04, 0x17],
        &[0x48, 0x89, 0xd8],
        &[0xeb, 0xfe],
        &[0xff, 0xe0],
        &[0xa4],
        &[0xec],
        &[0xf4],
        &[0x0f, 0x01, 0x17],
        &[0x0f, 0x05],
        &[0x0f, 0x22, 0xd8],
        &[0x8e, 0xd8],
        &[0x50],
        &[0xc3],
        &[0x48, 0xf7, 0xf1],
    ] {
        let refusal = g.refused(code);
        assert_eq!(refusal.bytes, code);
        assert_ne!(refusal.instruction, "?");
    }
}

#[test]
fn x87_loads_computes_and_stores() {
    let mut g = Guest::new();
    g.poke(DATA, &(-7_i32).to_le_bytes());
    g.cpu.registers.rdi = DATA;
    // fild dword [rdi]; fmul st, st; fistp qword [rdi + 8]
    g.done("fild", &[0xdb, 0x07]);
    let x = &g.cpu.xsave;
    assert_eq!(x[6..8], 0x0307_u16.to_le_bytes());
    assert_eq!(x[8..16], CODE.to_le_bytes());
    assert_eq!(x[16..24], DATA.to_le_bytes());
    g.done("fmul", &[0xd8, 0xc8]);
    g.done("fistp", &[0xdf, 0x7f, 0x08]);
    assert_eq!(i64::from_le_bytes(g.peek(DATA + 8)), 49);
    // fld tbyte [rdi]; fstp tbyte [rdi + 0x20]
    g.poke(DATA, &[1, 2, 3, 4, 5, 6, 7, 0x88, 0xff, 0x3f]);
    g.done("fld", &[0xdb, 0x2f]);
    g.done("fstp", &[0xdb, 0x7f, 0x20]);
    assert_eq!(g.peek::<10>(DATA + 0x20), g.peek::<10>(DATA));
    assert_eq!(g.peek::<2>(DATA + 0x2a), [0, 0]);
    // fucomi sets flags: 1.0 against 0.0
    g.done("fldz", &[0xd9, 0xee]);
    g.done("fld1", &[0xd9, 0xe8]);
    g.cpu.registers.rflags |= CF | ZF | PF;
    g.done("fucomi", &[0xdb, 0xe9]);
    assert_eq!(g.status() & (CF | ZF | PF), 0);
}

#[test]
fn x87_environment_has_no_address_of_the_host() {
    let mut g = Guest::new();
    g.cpu.registers.rdi = DATA;
    g.done("fldz", &[0xd9, 0xee]);
    // fnstenv [rdi]
    g.done("fnstenv", &[0xd9, 0x37]);
    assert_eq!(g.peek::<4>(DATA + 12), (CODE as u32).to_le_bytes());
    assert_eq!(g.peek::<4>(DATA + 20), [0; 4]);
    // fldenv [rdi] brings the pointers back.
    g.poke(DATA + 12, &0x1234_5678_u32.to_le_bytes());
    g.done("fldenv", &[0xd9, 0x27]);
    assert_eq!(g.cpu.xsave[8..16], 0x1234_5678_u64.to_le_bytes());
}

#[test]
fn pending_x87_exceptions_are_the_guests() {
    let mut g = Guest::new();
    // ZM unmasked and ZE set.
    g.cpu.xsave[0..2].copy_from_slice(&0x37b_u16.to_le_bytes());
    g.cpu.xsave[2..4].copy_from_slice(&0x8084_u16.to_le_bytes());
    for code in [
        &[0xd9, 0xe8][..],
        &[0x9b],
        &[0x0f, 0x6f, 0xc1],
        &[0x0f, 0x77],
    ] {
        g.raises(code, 16, None, None);
    }
    g.cpu.special.cr0 &= !0x20;
    g.refused(&[0xd9, 0xe8]);
    // The unmasked exception of the instruction itself is pending afterwards.
    let mut g = Guest::new();
    g.cpu.xsave[0..2].copy_from_slice(&0x37b_u16.to_le_bytes());
    g.done("fldz", &[0xd9, 0xee]);
    g.done("fld1", &[0xd9, 0xe8]);
    g.done("fdivrp", &[0xde, 0xf1]);
    assert_eq!(g.cpu.xsave[2] & 0x84, 0x84);
    g.raises(&[0x9b], 16, None, None);
    // An unmasked exception suppresses a store: IM unmasked, the register is empty.
    let mut g = Guest::new();
    g.cpu.xsave[0..2].copy_from_slice(&0x37e_u16.to_le_bytes());
    g.cpu.registers.rdi = DATA;
    g.poke(DATA, &[0x77; 8]);
    g.done("fstp", &[0xdd, 0x1f]);
    assert_eq!(g.peek::<8>(DATA), [0x77; 8]);
    g.raises(&[0x9b], 16, None, None);
    let mut g = Guest::new();
    g.cpu.xsave[0..2].copy_from_slice(&0x37e_u16.to_le_bytes());
    g.cpu.registers.rdi = DATA;
    g.done("fld1", &[0xd9, 0xe8]);
    g.done("fstp", &[0xdd, 0x1f]);
    assert_eq!(f64::from_le_bytes(g.peek(DATA)).to_bits(), 1_f64.to_bits());
}

#[test]
fn mmx() {
    let mut g = Guest::new();
    g.poke(DATA, &[5; 8]);
    g.cpu.registers.rdi = DATA;
    // movq mm2, [rdi]; paddb mm2, mm2; movq [rdi + 8], mm2; emms
    g.done("movq", &[0x0f, 0x6f, 0x17]);
    g.done("paddb", &[0x0f, 0xfc, 0xd2]);
    g.done("movq", &[0x0f, 0x7f, 0x57, 0x08]);
    assert_eq!(g.peek::<8>(DATA + 8), [10; 8]);
    assert_eq!(g.cpu.xsave[4], 0xff);
    g.done("emms", &[0x0f, 0x77]);
    assert_eq!(g.cpu.xsave[4], 0);
    g.cpu.special.cr0 |= 4;
    g.undefined(&[0x0f, 0x77]);
}

#[test]
fn thirty_two_bit_code() {
    if !host("sse4.2") {
        return;
    }
    let mut g = Guest::new();
    g.cpu.special.cs.l = 0;
    g.cpu.special.cs.db = 1;
    g.cpu.registers.rdi = 0xdead_0000_0000_0000 | DATA;
    g.poke(DATA, &[1]);
    g.done("popcnt", &[0xf3, 0x0f, 0xb8, 0x07]);
    assert_eq!(g.cpu.registers.rax, 1);
    g.cpu.special.ds.limit = DATA as u32 + 2;
    g.protection(&[0xf3, 0x0f, 0xb8, 0x07]);
}
