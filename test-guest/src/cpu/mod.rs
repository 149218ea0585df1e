//! The processor: ports, registers, interrupts, APICs, other processors, CPL 3.

pub mod apic;
pub mod cpl3;
pub mod idt;
pub mod smp;

use core::arch::asm;

/// Reads a byte from a port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: a port read changes no memory of ours.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    }
    value
}

/// Writes a byte to a port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: a port write changes no memory of ours.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    }
}

/// Reads four bytes from a port.
pub fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: a port read changes no memory of ours.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags))
    }
    value
}

/// Writes four bytes to a port.
pub fn outl(port: u16, value: u32) {
    // SAFETY: a port write changes no memory of ours.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags))
    }
}

/// Reads two bytes from a port.
pub fn inw(port: u16) -> u16 {
    let value;
    // SAFETY: a port read changes no memory of ours.
    unsafe {
        asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags))
    }
    value
}

/// Writes two bytes to a port.
pub fn outw(port: u16, value: u16) {
    // SAFETY: a port write changes no memory of ours.
    unsafe {
        asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags))
    }
}

/// Reads an MSR (CPL 0 only).
pub fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading an MSR changes no memory; an unknown one is #GP, which is reported.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags))
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR (CPL 0 only).
pub fn wrmsr(msr: u32, value: u64) {
    // SAFETY: callers write only APIC, clock and SYSCALL registers, with addresses of statics.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags))
    }
}

/// The time stamp counter.
pub fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a counter.
    unsafe {
        asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags))
    }
    u64::from(high) << 32 | u64::from(low)
}

/// CPUID: EAX, EBX, ECX, EDX.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// Lets interrupts in.
pub fn enable_interrupts() {
    // SAFETY: the IDT is loaded before anyone calls this.
    unsafe { asm!("sti", options(nostack)) }
}

/// Keeps interrupts out.
pub fn disable_interrupts() {
    // SAFETY: only clears IF.
    unsafe { asm!("cli", options(nostack)) }
}

/// Waits for one interrupt. Interrupts are off before and after, so a check of the condition can't miss it.
pub fn wait_for_interrupt() {
    // SAFETY: the IDT is loaded; STI's shadow makes the pair atomic.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) }
}

/// Stops this processor for good.
pub fn halt_forever() -> ! {
    loop {
        // SAFETY: nothing follows.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}
