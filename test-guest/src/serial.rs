//! COM1, a 16550 at port 0x3f8: output by polling, input by polling or by interrupt (PC16550D data sheet).

use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::cpu::{inb, outb};

const BASE: u16 = 0x3f8;
const IER: u16 = BASE + 1;
const IIR: u16 = BASE + 2;
const LCR: u16 = BASE + 3;
const MCR: u16 = BASE + 4;
const LSR: u16 = BASE + 5;

/// Interrupts seen with "transmitter empty" as their cause.
pub static THRE_INTERRUPTS: AtomicU32 = AtomicU32::new(0);
/// Interrupts seen with "data available" or "time-out" as their cause.
pub static DATA_INTERRUPTS: AtomicU32 = AtomicU32::new(0);

static INPUT_HEAD: AtomicU32 = AtomicU32::new(0);
static INPUT_TAIL: AtomicU32 = AtomicU32::new(0);
static INPUT: [AtomicU32; 256] = [const { AtomicU32::new(0) }; 256];

/// The port as a `fmt::Write`.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if byte == b'\n' {
                put(b'\r');
            }
            put(byte);
        }
        Ok(())
    }
}

/// 8n1, FIFOs on, no interrupts, DTR, RTS and OUT2 set.
pub fn init() {
    outb(IER, 0);
    outb(LCR, 0x80);
    outb(BASE, 1);
    outb(IER, 0);
    outb(LCR, 3);
    outb(IIR, 7);
    outb(MCR, 0xb);
}

/// Sends one byte, waiting for room.
pub fn put(byte: u8) {
    while inb(LSR) & 0x20 == 0 {}
    outb(BASE, byte);
}

/// The byte that has come, looked for without an interrupt.
pub fn poll() -> Option<u8> {
    (inb(LSR) & 1 != 0).then(|| inb(BASE))
}

/// Chooses the interrupts: bit 0 data available, bit 1 transmitter empty.
pub fn set_interrupts(mask: u8) {
    outb(IER, mask);
}

/// Serves COM1's interrupt: drains input, notes the causes.
pub fn on_interrupt() {
    for _ in 0..64 {
        match inb(IIR) & 0xf {
            0x2 => {
                THRE_INTERRUPTS.fetch_add(1, Ordering::Relaxed);
            }
            0x4 | 0xc => {
                DATA_INTERRUPTS.fetch_add(1, Ordering::Relaxed);
                while inb(LSR) & 1 != 0 {
                    let head = INPUT_HEAD.load(Ordering::Relaxed);
                    INPUT[(head & 255) as usize].store(u32::from(inb(BASE)), Ordering::Relaxed);
                    INPUT_HEAD.store(head.wrapping_add(1), Ordering::Release);
                }
            }
            0x6 => {
                inb(LSR);
            }
            0x0 => {
                inb(BASE + 6);
            }
            _ => return,
        }
    }
}

/// The next byte that an interrupt brought in.
pub fn received() -> Option<u8> {
    let tail = INPUT_TAIL.load(Ordering::Relaxed);
    if tail == INPUT_HEAD.load(Ordering::Acquire) {
        return None;
    }
    INPUT_TAIL.store(tail.wrapping_add(1), Ordering::Relaxed);
    Some(INPUT[(tail & 255) as usize].load(Ordering::Relaxed) as u8)
}

/// `print!` on COM1.
#[macro_export]
macro_rules! line {
    ($($arg:tt)*) => {{
        use core::fmt::Write as _;
        let _ = writeln!($crate::serial::Serial, $($arg)*);
    }};
}
