//! A bare-metal guest that checks a virtual machine from the inside and reports over COM1.
//!
//! The command line chooses: `test=a,b,c` (default `boot`; `firmware` where there is no command line), `end=shutdown|reset|i8042|triple|halt`, and
//! words that single tests read (`memory=BYTES`, `cpus=N`, `initramfs=SUM`; those of device tests are told in their files).
//! Lines: `BEGIN name`, `OK name detail`, `FAIL name why`, `VALUE key value`, at last `DONE failed=N`.
//!
//! Start in `tests/mod.rs` to add a test; drivers of devices get a module of their own beside `serial`.

#![no_std]
#![no_main]

mod acpi;
mod bench;
mod boot;
mod clock;
mod cpu;
mod dma;
mod ipv4;
mod map;
mod mem;
mod outcome;
mod pci;
mod power;
mod serial;
mod tests;
mod virtio;

use core::panic::PanicInfo;

/// The value of `key=value` on the command line.
pub fn option(key: &str) -> Option<&'static str> {
    boot::command_line()
        .split(' ')
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

/// The value of `key=number` on the command line, decimal or with `0x` in front.
pub fn number(key: &str) -> Option<u64> {
    parse(option(key)?)
}

/// A decimal number, or a hexadecimal one after `0x`.
pub fn parse(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[unsafe(no_mangle)]
extern "C" fn guest_main() -> ! {
    serial::init();
    line!("HELLO test-guest");
    cpu::idt::init();
    cpu::apic::mask_legacy();
    cpu::apic::init();
    cpu::cpl3::init();
    let default = if boot::command_line().is_empty() {
        "firmware"
    } else {
        "boot"
    };
    let failed = tests::run(option("test").unwrap_or(default));
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
