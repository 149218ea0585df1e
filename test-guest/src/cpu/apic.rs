//! Local APIC, in x2APIC mode where CPUID has it, and the I/O APIC (Intel SDM vol. 3, chapter 10; 82093AA data sheet).

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::idt::SPURIOUS;
use super::{cpuid, outb, rdmsr, wrmsr};

const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;
static X2APIC: AtomicBool = AtomicBool::new(false);
static FIRST: AtomicU32 = AtomicU32::new(u32::MAX);

/// Register of the local APIC by its xAPIC offset.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Reg {
    /// Identity.
    Id = 0x20,
    /// Version.
    Version = 0x30,
    /// End of interrupt.
    Eoi = 0xb0,
    /// Spurious vector and enable bit.
    Spurious = 0xf0,
    /// LVT entry of the timer.
    LvtTimer = 0x320,
    /// Initial count.
    InitialCount = 0x380,
    /// Current count.
    CurrentCount = 0x390,
    /// Divider.
    Divide = 0x3e0,
}

/// Switches this processor's APIC on, in x2APIC mode where there is one.
pub fn init() {
    if cpuid(1, 0)[2] & 1 << 21 != 0 {
        wrmsr(0x1b, rdmsr(0x1b) | 0xc00);
        X2APIC.store(true, Ordering::Relaxed);
    }
    write(Reg::Spurious, 0x100 | u32::from(SPURIOUS));
    let _ = FIRST.compare_exchange(u32::MAX, id(), Ordering::AcqRel, Ordering::Relaxed);
}

/// APIC id of the boot processor, which was the first here; at any CPL.
pub fn boot_id() -> u32 {
    FIRST.load(Ordering::Acquire)
}

/// Silences the two 8259s, which firmware may have left ticking.
pub fn mask_legacy() {
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
}

/// True in x2APIC mode.
pub fn is_x2apic() -> bool {
    X2APIC.load(Ordering::Relaxed)
}

/// Reads a register.
pub fn read(reg: Reg) -> u32 {
    if is_x2apic() {
        return rdmsr(0x800 + (reg as u32 >> 4)) as u32;
    }
    // SAFETY: the APIC's page is mapped one to one.
    unsafe { ((LAPIC + reg as u64) as *const u32).read_volatile() }
}

/// Writes a register.
pub fn write(reg: Reg, value: u32) {
    if is_x2apic() {
        return wrmsr(0x800 + (reg as u32 >> 4), u64::from(value));
    }
    // SAFETY: the APIC's page is mapped one to one.
    unsafe { ((LAPIC + reg as u64) as *mut u32).write_volatile(value) }
}

/// This processor's APIC id.
pub fn id() -> u32 {
    let id = read(Reg::Id);
    if is_x2apic() { id } else { id >> 24 }
}

/// Ends the interrupt in service.
pub fn end_of_interrupt() {
    write(Reg::Eoi, 0);
}

/// Sends an inter-processor interrupt; `command` is the low half of the ICR.
pub fn send(target: u32, command: u32) {
    if is_x2apic() {
        return wrmsr(0x830, u64::from(target) << 32 | u64::from(command));
    }
    // SAFETY: the APIC's page is mapped one to one.
    unsafe {
        ((LAPIC + 0x310) as *mut u32).write_volatile(target << 24);
        ((LAPIC + 0x300) as *mut u32).write_volatile(command);
        while ((LAPIC + 0x300) as *const u32).read_volatile() & 1 << 12 != 0 {}
    }
}

/// Reads an I/O APIC register.
pub fn ioapic_read(index: u32) -> u32 {
    // SAFETY: the I/O APIC's page is mapped one to one.
    unsafe {
        (IOAPIC as *mut u32).write_volatile(index);
        ((IOAPIC + 0x10) as *const u32).read_volatile()
    }
}

/// Writes an I/O APIC register.
pub fn ioapic_write(index: u32, value: u32) {
    // SAFETY: the I/O APIC's page is mapped one to one.
    unsafe {
        (IOAPIC as *mut u32).write_volatile(index);
        ((IOAPIC + 0x10) as *mut u32).write_volatile(value);
    }
}

/// Routes an edge-triggered line to a vector of this processor.
pub fn route(line: u32, vector: u8) {
    ioapic_write(0x11 + line * 2, id() << 24);
    ioapic_write(0x10 + line * 2, u32::from(vector));
}

/// Masks a line.
pub fn mask(line: u32) {
    ioapic_write(0x10 + line * 2, 1 << 16);
}
