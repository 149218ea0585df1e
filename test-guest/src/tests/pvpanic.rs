//! pvpanic as a PCI function ("PVPANIC DEVICE" of QEMU's specifications).

use super::{ensure, same};
use crate::map;
use crate::outcome::{Outcome, Reason};
use crate::pci::{COMMAND_MEMORY, Space, functions};

/// It is there, knows both events, and takes them; what it does not know it ignores.
pub fn pvpanic() -> Outcome {
    let function = functions()
        .find(|f| f.ids() == (0x1b36, 0x0011))
        .ok_or(Reason("no pvpanic device", 0, 1))?;
    same("its class", u64::from(function.read32(8) >> 8), 0x08_80_00)?;
    let bar = function.bar(0).ok_or(Reason("no BAR 0", 0, 1))?;
    ensure("BAR 0 is in memory", bar.space != Space::Io)?;
    function.set_command(function.command() | COMMAND_MEMORY);
    let at = map::device(bar.address, bar.size).ok_or(Reason("BAR 0 is out of reach", 0, 1))?;
    same("the events it knows", u64::from(map::read::<u8>(at)), 3)?;
    map::write(at, 0xfcu8);
    // Twice: the second time it is no news.
    for _ in 0..2 {
        map::write(at, 1u8);
    }
    map::write(at, 2u8);
    same("the events after it", u64::from(map::read::<u8>(at)), 3)
}
