//! FADT (ACPI 6.5 §5.2.9): a hardware-reduced machine with a reset register, sleep registers and a timer.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, PM_TIMER_PORT, RESET_PORT, RESET_VALUE};

/// `IAPC_BOOT_ARCH` (§5.2.9.3): neither an i8042 with a keyboard behind it nor VGA nor ASPM; CMOS is there.
const VGA_NOT_PRESENT: u16 = 1 << 2;
const NO_ASPM: u16 = 1 << 4;

pub(super) fn build(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        .flag(Flags::TmrValExt)
        // Set: the buttons, if any, are devices in the DSDT.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (VGA_NOT_PRESENT | NO_ASPM).into();
    fadt.reset_reg = io_port(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = io_port(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.sleep_status_reg = io_port(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = io_port(PM_TIMER_PORT, 32, AccessSize::DwordAccess);
    fadt.finalize()
}

fn io_port(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}
