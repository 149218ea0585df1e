//! A bare-metal guest that checks a virtual machine from the inside and reports over COM1.
//!
//! The command line chooses: `test=a,b,c` (default `boot`), `end=shutdown|reset|i8042|triple|halt`, and
//! words that single tests read (`memory=BYTES`, `cpus=N`, `initramfs=SUM`).
//! Lines: `BEGIN name`, `OK name detail`, `FAIL name why`, `VALUE key value`, at last `DONE failed=N`.
//!
//! Start in `tests/mod.rs` to add a test; drivers of devices get a module of their own beside `serial`.

#![no_std]
#![no_main]

mod acpi;
mod boot;
mod cpu;
mod mem;
mod power;
mod serial;
mod tests;

use core::panic::PanicInfo;

/// The value of `key=value` on the command line.
pub fn option(key: &str) -> Option<&'static str> {
    boot::command_line()
        .split(' ')
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

/// The value of `key=number` on the command line.
pub fn number(key: &str) -> Option<u64> {
    option(key)?.parse().ok()
}

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    serial::init();
    line!("HELLO test-guest");
    cpu::idt::init();
    cpu::apic::init();
    cpu::cpl3::init();
    let failed = tests::run(option("test").unwrap_or("boot"));
    line!("DONE failed={failed}");
    match option("end").unwrap_or("shutdown") {
        "reset" => power::reset(),
        "i8042" => power::reset_i8042(),
        "triple" => power::triple_fault(),
        "halt" => cpu::halt_forever(),
        _ => power::shutdown(),
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    line!("FAIL panic {}", info.message());
    line!("DONE failed=1");
    power::shutdown()
}
