//! Base address registers that move: within the window of the bus, and where they have no business.
//!
//! `pci_window=START` and `pci_window_end=END` are the addresses below 4 GiB that BARs may have; default 3 GiB and 640 MiB on;
//! `pci_window64=START` is a free address above 4 GiB, default past all BARs.

use super::{at_cpl3, ensure, same};
use crate::outcome::{Outcome, Reason};
use crate::pci::msix::Msix;
use crate::pci::{Bar, COMMAND_MEMORY, Function, Space, functions};
use crate::virtio::{ACKNOWLEDGE, DRIVER, Transport, common};
use crate::{dma, line, map, number};

/// What nobody answers: all ones here, zero elsewhere.
const NOBODY: [u32; 2] = [u32::MAX, 0];
const MARK: u32 = 0x1234_5678;

/// Each memory BAR of each virtio device moves to a free place, works there and not at the old one, and moves back.
pub fn moves() -> Outcome {
    at_cpl3(|| {
        let mut moved = 0;
        for function in Transport::all() {
            for bar in function.bars().filter(|b| b.space != Space::Io) {
                let target = free_place(&bar)?;
                line!(
                    "VALUE pci_bar_move {function} {} {:#x} {target:#x}",
                    bar.index,
                    bar.address
                );
                there_and_back(function, &bar, target)?;
                moved += 1;
            }
        }
        line!("VALUE pci_bars_moved {moved}");
        ensure("there is a BAR to move", moved > 0)
    })
}

fn there_and_back(function: Function, bar: &Bar, target: u64) -> Outcome {
    let before = config_words(function);
    works(function)?;
    function.move_bar(bar, target);
    let now = function.bar(bar.index).map_or(0, |b| b.address);
    same("the BAR holds its new address", now, target)?;
    works(function)?;
    let old = map::device(bar.address, 4096).ok_or(Reason("no room to map", bar.address, 0))?;
    let word: u32 = map::read(old);
    ensure("nobody at the old address", NOBODY.contains(&word))?;
    map::write(old, 0u32);
    works(function)?;

    // With decoding off nobody is there; on again, everything is as it was.
    let command = function.command();
    let new = map::device(target, 4096).ok_or(Reason("no room to map", target, 0))?;
    function.set_command(command & !COMMAND_MEMORY);
    let word: u32 = map::read(new);
    function.set_command(command);
    ensure("nobody answers with decoding off", NOBODY.contains(&word))?;
    works(function)?;

    function.move_bar(bar, bar.address);
    works(function)?;
    let word: u32 = map::read(new);
    ensure(
        "nobody at the address that was left",
        NOBODY.contains(&word),
    )?;
    ensure("the BARs are as before", before == config_words(function))
}

/// The device answers at the address that its BARs hold: status, and the MSI-X table.
fn works(function: Function) -> Outcome {
    let transport = Transport::open(function)?;
    transport.set_status(ACKNOWLEDGE);
    transport.set_status(ACKNOWLEDGE | DRIVER);
    same("status", u64::from(transport.status()), 3)?;
    ensure(
        "the device has queues",
        transport.get::<u16>(common::NUM_QUEUES) > 0,
    )?;
    transport.reset()?;
    let msix = Msix::open(function).ok_or(Reason("no MSI-X", 0, 1))?;
    msix.write_data(0, MARK);
    same(
        "data of MSI-X entry 0",
        u64::from(msix.read(0).1),
        u64::from(MARK),
    )
}

/// An address for the BAR that no other BAR covers: below 4 GiB within the window, else past the others.
fn free_place(bar: &Bar) -> Outcome<u64> {
    let start = number("pci_window").unwrap_or(0xc000_0000);
    let end = number("pci_window_end").unwrap_or(0xe800_0000);
    let is_free = |address: u64| {
        let place = Bar { address, ..*bar };
        !functions()
            .flat_map(Function::bars)
            .any(|b| place.overlaps(&b))
    };
    if bar.address >> 32 != 0 {
        let bars = functions().flat_map(Function::bars);
        let past = bars.map(|b| b.address + b.size).max().unwrap_or(0);
        let place = number("pci_window64").unwrap_or(past);
        return Ok(place.next_multiple_of(bar.size));
    }
    let step = bar.size.max(4096);
    let first = start.next_multiple_of(step);
    let mut places = (first..end - bar.size).step_by(step as usize).take(4096);
    places
        .find(|&a| is_free(a))
        .ok_or(Reason("no free place for a BAR", start, end))
}

fn config_words(function: Function) -> [u32; 6] {
    core::array::from_fn(|i| function.read32(0x10 + i as u16 * 4))
}

/// BARs over RAM, the interrupt controllers, each other and the end of memory: RAM keeps what it holds, and with the
/// old address back the device works.
pub fn hostile() -> Outcome {
    at_cpl3(|| {
        dma::reset();
        let ram = dma::take(4 << 20, 4096)?.next_multiple_of(1 << 20);
        map::write(ram, MARK);
        for function in Transport::all() {
            let others = functions()
                .flat_map(Function::bars)
                .filter(|b| b.space != Space::Io);
            let neighbour = others.map(|b| b.address).max().unwrap_or(0);
            for bar in function.bars().filter(|b| b.space != Space::Io) {
                let wide = bar.space == Space::Memory64;
                let targets = [
                    ram,
                    neighbour,
                    0,
                    0xfee0_0000,
                    0xfec0_0000,
                    0xffff_f000,
                    0xe800_0000,
                    if wide { u64::MAX } else { 0xf000_0000 },
                    if wide { 1 << 52 } else { 0x8000_0000 },
                ];
                for target in targets {
                    function.move_bar(&bar, target & !(bar.size - 1));
                    let kept = map::read::<u32>(ram);
                    function.move_bar(&bar, bar.address);
                    same("RAM under a BAR", u64::from(kept), u64::from(MARK))?;
                }
                // Half a move: the low register only, with decoding on, all ones among them.
                let at = 0x10 + u16::from(bar.index) * 4;
                for value in [u32::MAX, 0, 0xc000_0000, 0xffff_0000] {
                    function.write32(at, value);
                }
                function.move_bar(&bar, bar.address);
                works(function)?;
            }
            line!("VALUE pci_bar_hostile {function}");
        }
        same(
            "RAM at the end",
            u64::from(map::read::<u32>(ram)),
            u64::from(MARK),
        )
    })
}
