//! The other processors: INIT and start-up IPIs, and what they do then (Intel SDM vol. 3, 9.4).

use core::sync::atomic::{AtomicU32, Ordering};

use super::idt::{self, PONG};
use super::{apic, wait_for_interrupt};

const TRAMPOLINE: u64 = 0x1000;
const MAX: usize = 254;

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
}

static ONLINE: AtomicU32 = AtomicU32::new(0);
static IDS: [AtomicU32; MAX] = [const { AtomicU32::new(u32::MAX) }; MAX];
static BOOT_ID: AtomicU32 = AtomicU32::new(0);

/// How many processors came up, this one not counted.
pub fn online() -> usize {
    ONLINE.load(Ordering::Acquire) as usize
}

/// True when a processor with this APIC id came up.
pub fn has_id(id: u32) -> bool {
    IDS.iter().any(|i| i.load(Ordering::Acquire) == id)
}

/// Puts the start-up code where a start-up IPI can reach it.
pub fn prepare() {
    BOOT_ID.store(apic::id(), Ordering::Release);
    let from = &raw const trampoline;
    let length = &raw const trampoline_end as usize - from as usize;
    // SAFETY: the page at 0x1000 is RAM that neither the boot protocol nor the guest uses.
    unsafe { core::ptr::copy_nonoverlapping(from, TRAMPOLINE as *mut u8, length) }
}

/// INIT, then the start-up IPI twice as the manual has it.
pub fn start(id: u32) {
    apic::send(id, 0x4500);
    apic::send(id, 0x4600 | (TRAMPOLINE >> 12) as u32);
    apic::send(id, 0x4600 | (TRAMPOLINE >> 12) as u32);
}

/// Answers a ping, on whichever processor it came to.
pub fn answer() {
    apic::send(BOOT_ID.load(Ordering::Acquire), u32::from(PONG) | 0x4000);
}

#[unsafe(no_mangle)]
extern "C" fn ap_main(number: u32) -> ! {
    idt::load();
    apic::init();
    if let Some(slot) = IDS.get(number as usize) {
        slot.store(apic::id(), Ordering::Release);
    }
    ONLINE.fetch_add(1, Ordering::AcqRel);
    loop {
        wait_for_interrupt();
    }
}
