//! Whatever the bytes and registers: no panic, the host lives, nothing outside RAM is touched.

use super::*;

/// SplitMix64: seeded, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[(self.next() % from.len() as u64) as usize]
    }

    /// An address that is often near the edge of something.
    fn value(&mut self) -> u64 {
        let near = self.next() % 80;
        match self.next() % 8 {
            0 => self.next(),
            1 => near,
            2 => DATA + 0xfd0 + near,
            3 => DATA + 0x3fd0 + near,
            4 => self.pick(&[READ_ONLY, USER, NOWHERE, TABLES, DEVICE, CODE]) + near,
            5 => NOT_CANONICAL.wrapping_sub(near),
            6 => u64::MAX - near,
            _ => DATA + near / 16 * 64,
        }
    }
}

fn scramble(g: &mut Guest, random: &mut Random) {
    let r = &mut g.cpu.registers;
    for register in [
        &mut r.rax, &mut r.rbx, &mut r.rcx, &mut r.rdx, &mut r.rsi, &mut r.rdi, &mut r.rbp,
        &mut r.rsp, &mut r.r8, &mut r.r9, &mut r.r10, &mut r.r11, &mut r.r12, &mut r.r13,
        &mut r.r14, &mut r.r15,
    ] {
        *register = random.value();
    }
    r.rflags = random.next() & 0x3f_7fd5 & !(1 << 17) | 2;
    g.cpu.special.cr0 = 0x8001_0023 ^ random.pick(&[0, 0, 0, 0, 4, 8, 0x20, 0x1_0000]);
    g.cpu.special.cr4 = 0x4_0620 ^ random.pick(&[0, 0, 0, 0x200, 0x4_0000, 3 << 20, 1 << 22]);
    g.cpu.special.fs.base = random.value();
    g.cpu.special.gs.base = random.value();
    let mode = random.next() % 8;
    g.cpu.special.cs.l = u8::from(mode > 1);
    g.cpu.special.cs.db = u8::from(mode == 1);
    let cpl = if random.next().is_multiple_of(8) {
        3
    } else {
        0
    };
    g.cpu.special.ss.dpl = cpl;
    g.cpu.xcr0 = random.pick(&[0x2e7, 0x2e7, 0x2e7, 7, 3, 1]);
    // State that the thunk must neither choke on nor be killed by: any values, any masks, any
    // XSTATE_BV; MXCSR is kept plausible most of the time, or nothing would run.
    for chunk in g.cpu.xsave.chunks_exact_mut(8) {
        if random.next().is_multiple_of(4) {
            chunk.copy_from_slice(&random.next().to_le_bytes());
        }
    }
    let x = &mut g.cpu.xsave;
    x[512..576].fill(0);
    x[512..520].copy_from_slice(&(random.next() & 0x2e7).to_le_bytes());
    if !random.next().is_multiple_of(8) {
        x[24..28].copy_from_slice(&(0x1f80 | random.next() as u32 & 0x607f).to_le_bytes());
    }
    x[28..32].copy_from_slice(&0x2_ffff_u32.to_le_bytes());
    if !random.next().is_multiple_of(4) {
        x[0..4].copy_from_slice(&[0x7f, 3, 0, 0]);
    }
}

/// Opcode bytes that are worth more than their share.
fn code(random: &mut Random) -> [u8; 15] {
    let mut bytes = [0; 15];
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]);
    }
    let modrm = random.next() as u8;
    let opcode = random.next() as u8;
    match random.next() % 10 {
        0 => {}
        // x87
        1 | 2 => bytes[..2].copy_from_slice(&[0xd8 | opcode & 7, modrm]),
        // 0F, 0F 38, 0F 3A behind a prefix
        3 | 4 => {
            let prefix = random.pick(&[0x66, 0xf2, 0xf3, 0x48, 0xf0, 0x2e]);
            bytes[..3].copy_from_slice(&[prefix, 0x0f, opcode]);
        }
        5 => {
            let prefix = random.pick(&[0x66, 0xf2, 0xf3, 0x48]);
            let map = random.pick(&[0x38, 0x3a]);
            bytes[..4].copy_from_slice(&[prefix, 0x0f, map, opcode]);
        }
        // the groups of XSAVE and of system instructions
        6 => {
            let opcode = random.pick(&[0x00, 0x01, 0x02, 0x03, 0xae, 0xc7]);
            bytes[..4].copy_from_slice(&[
                random.pick(&[0x48, 0x66, 0xf3, 0xf0]),
                0x0f,
                opcode,
                modrm,
            ]);
        }
        // VEX in two and three bytes, EVEX
        7 => bytes[0] = 0xc5,
        8 => {
            bytes[0] = 0xc4;
            bytes[1] = bytes[1] & 0xe0 | random.pick(&[1, 2, 3]);
        }
        _ => {
            bytes[0] = 0x62;
            bytes[1] = bytes[1] & 0xf0 | random.pick(&[1, 2, 3]);
            bytes[2] |= 4;
        }
    }
    bytes
}

#[test]
fn random_bytes_do_no_harm() {
    let mut random = Random(0x5eed);
    let mut ran = 0_u32;
    let mut names = std::collections::HashSet::new();
    let mut g = Guest::new();
    let pristine = g.ram.bytes.lock().unwrap().clone();
    for n in 0..200_000_u32 {
        if n.is_multiple_of(16) {
            // Page tables and code may have been written over.
            g = Guest::new();
            scramble(&mut g, &mut random);
        }
        let bytes = code(&mut random);
        let rsp = g.cpu.registers.rsp;
        g.ram.write(0x10000, &bytes).unwrap();
        let entry = Guest::entry(CODE);
        let user = if g.cpu.special.ss.dpl == 3 {
            USER_BIT
        } else {
            0
        };
        g.put64(entry, 0x10000 | PRESENT | user);
        g.cpu.registers.rip = CODE;
        let (bases, efer) = (
            (g.cpu.special.fs.base, g.cpu.special.gs.base),
            g.cpu.special.efer,
        );
        match step(&mut g.cpu, &g.ram) {
            Ok(Outcome::Done(name)) => {
                ran += 1;
                // These are done by hand; none that runs natively may name RSP.
                if !matches!(&*name, "rdpid" | "lar" | "lsl") {
                    assert_eq!(g.cpu.registers.rsp, rsp, "{bytes:x?}");
                }
                names.insert(name);
                let past = g.cpu.registers.rip.wrapping_sub(CODE) & 0xffff;
                assert!((1..=15).contains(&past), "{bytes:x?}");
            }
            Ok(Outcome::Exception { vector, .. }) => {
                assert!(vector < 32 || bytes.contains(&0xcd), "{bytes:x?}");
            }
            Err(refusal) => assert!(refusal.bytes.len() <= 15),
        }
        assert_eq!(
            (
                g.cpu.special.fs.base,
                g.cpu.special.gs.base,
                g.cpu.special.efer
            ),
            (bases.0, bases.1, efer)
        );
        if n % 16 == 15 {
            // Frames that no page maps are as they were.
            let ram = g.ram.bytes.lock().unwrap();
            assert!(ram[0x40000..] == pristine[0x40000..], "{bytes:x?}");
            let protected = g.cpu.special.cr0 & 0x1_0000 != 0;
            assert!(
                !protected || ram[0x30000..0x31000] == pristine[0x30000..0x31000],
                "{bytes:x?}"
            );
        }
    }
    // The test would prove little if next to nothing ran.
    println!("{ran} ran, {} kinds", names.len());
    assert!(ran > 10_000 && names.len() > 300, "{ran} {}", names.len());
}
