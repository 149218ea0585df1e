//! Interrupt descriptors and the one handler behind them (Intel SDM vol. 3, chapter 6).

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::{apic, cpl3, smp};
use crate::{line, power, serial};

global_asm!(include_str!("entry.s"), options(att_syntax, raw));

/// Vector of COM1.
pub const SERIAL: u8 = 0x24;
/// Vector of the LAPIC timer.
pub const TIMER: u8 = 0x30;
/// Vector of the IPI that asks for an answer.
pub const PING: u8 = 0x31;
/// Vector of the answer.
pub const PONG: u8 = 0x32;
/// First vector of devices.
pub const DEVICE: u8 = 0x33;
/// How many vectors devices have.
pub const DEVICE_COUNT: u8 = 12;
/// Vector of spurious APIC interrupts.
pub const SPURIOUS: u8 = 0x3f;

/// Registers and the hardware's frame, as the stub left them.
#[repr(C)]
pub struct Frame {
    registers: [u64; 15],
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    flags: u64,
    rsp: u64,
    ss: u64,
}

unsafe extern "C" {
    static vector_stubs: u8;
}

static mut TABLE: [[u64; 2]; 64] = [[0; 2]; 64];
static COUNTS: [AtomicU32; 64] = [const { AtomicU32::new(0) }; 64];
static EXPECT: AtomicBool = AtomicBool::new(false);
static SKIP: AtomicU64 = AtomicU64::new(0);

/// How often `vector` was taken, exceptions that were expected included.
pub fn count(vector: u8) -> u32 {
    COUNTS[usize::from(vector & 63)].load(Ordering::Acquire)
}

/// Runs `body`, in which an exception is counted and returned from, `skip` bytes on.
pub fn expecting(skip: u64, body: impl FnOnce()) {
    SKIP.store(skip, Ordering::Relaxed);
    EXPECT.store(true, Ordering::Release);
    body();
    EXPECT.store(false, Ordering::Release);
}

/// Fills the table: 64 vectors, all interrupt gates.
pub fn init() {
    let stubs = &raw const vector_stubs as u64;
    for vector in 0..64u64 {
        let stub = stubs + vector * 16;
        // int3 may come from CPL 3, nothing else.
        let kind: u64 = if vector == 3 { 0xee00 } else { 0x8e00 };
        let low = (stub & 0xffff) | 0x08 << 16 | kind << 32 | (stub >> 16 & 0xffff) << 48;
        // SAFETY: only the boot processor runs yet, and interrupts are off.
        unsafe {
            (&raw mut TABLE)
                .cast::<[u64; 2]>()
                .add(vector as usize)
                .write([low, stub >> 32])
        }
    }
    load();
}

/// Loads the table on this processor.
pub fn load() {
    #[repr(C, packed)]
    struct Pointer(u16, u64);
    let pointer = Pointer(64 * 16 - 1, &raw const TABLE as u64);
    // SAFETY: the table is static and complete.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(readonly, nostack)) }
}

#[unsafe(no_mangle)]
extern "C" fn on_vector(frame: &mut Frame) {
    let vector = frame.vector as u8;
    if vector == 6 && frame.cs & 3 == 3 && frame.rip == cpl3::done_address() {
        cpl3::leave(frame.registers[14]);
    }
    COUNTS[usize::from(vector & 63)].fetch_add(1, Ordering::AcqRel);
    match vector {
        0..32 if EXPECT.load(Ordering::Acquire) => frame.rip += SKIP.load(Ordering::Relaxed),
        0..32 => {
            let cr2: u64;
            // SAFETY: reads a register.
            unsafe { asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack)) }
            line!(
                "FAIL exception vector={vector} error={:#x} rip={:#x} cs={:#x} cr2={cr2:#x}",
                frame.error,
                frame.rip,
                frame.cs
            );
            line!("DONE failed=1");
            power::shutdown();
        }
        SERIAL => {
            serial::on_interrupt();
            apic::end_of_interrupt();
        }
        PING => {
            smp::answer();
            apic::end_of_interrupt();
        }
        SPURIOUS => {}
        _ => apic::end_of_interrupt(),
    }
}
