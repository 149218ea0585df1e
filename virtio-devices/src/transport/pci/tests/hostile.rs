//! Accesses that make no sense, wherever a guest can make them.

use std::sync::atomic::Ordering;

use pci::{PciDevice, registers};
use proptest::prelude::*;

use super::Reverser;
use super::driver::{Machine, WINDOW};

#[derive(Clone, Copy, Debug)]
enum Access {
    ReadBar(usize, u64, usize),
    WriteBar(usize, u64, usize, u64),
    ReadConfig(u16, usize),
    WriteConfig(u16, usize, u64),
}

fn accesses() -> impl Strategy<Value = Access> {
    let bar = prop_oneof![9 => Just(0_usize), 1 => 0_usize..7];
    let offset = prop_oneof![
        4 => 0_u64..0x40,
        2 => 0_u64..0x1_0100,
        1 => any::<u64>(),
    ];
    let width = prop_oneof![Just(1_usize), Just(2), Just(4), Just(8), 0_usize..=8];
    let value = prop_oneof![Just(0_u64), 0_u64..0x100, 0_u64..0x40_0000, any::<u64>()];
    let config = (0_u16..0x110).prop_flat_map(|offset| {
        let room = 4 - usize::from(offset % 4);
        (Just(offset), 1..=room)
    });
    prop_oneof![
        1 => (bar.clone(), offset.clone(), width.clone())
            .prop_map(|(bar, offset, width)| Access::ReadBar(bar, offset, width)),
        3 => (bar, offset, width, value.clone())
            .prop_map(|(bar, offset, width, value)| Access::WriteBar(bar, offset, width, value)),
        1 => config.clone().prop_map(|(offset, width)| Access::ReadConfig(offset, width)),
        1 => (config, value)
            .prop_map(|((offset, width), value)| Access::WriteConfig(offset, width, value)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn nothing_breaks_it(accesses in prop::collection::vec(accesses(), 0..200), running in any::<bool>()) {
        let mut machine = Machine::new(Reverser::boxed(2, 10));
        if running {
            machine.start();
        }
        // The driver may have messages sent to wherever it likes.
        machine.messages.lax.store(true, Ordering::SeqCst);
        let device = machine.device.clone();
        for access in accesses {
            let mut data = [0; 8];
            match access {
                Access::ReadBar(bar, offset, width) => {
                    device.read_bar(bar, offset, &mut data[..width]);
                }
                Access::WriteBar(bar, offset, width, value) => {
                    device.write_bar(bar, offset, &value.to_le_bytes()[..width]);
                }
                // Not by the bus, which would move the BAR.
                Access::ReadConfig(offset, width) => device.read_config(offset, &mut data[..width]),
                Access::WriteConfig(offset, width, value) => {
                    device.write_config(offset, &value.to_le_bytes()[..width]);
                }
            }
        }
        // Its workers are all alive.
        device.pause().unwrap();
        device.write_bar(0, 0x14, &[0]);
        prop_assert!(!device.is_active());
        device.save().unwrap();
        // It works again, for a driver that knows its place.
        machine.write_config(registers::BAR0, &(WINDOW as u32).to_le_bytes());
        machine.write_config(registers::BAR0 + 4, &((WINDOW >> 32) as u32).to_le_bytes());
        machine.write_config(registers::COMMAND, &6_u16.to_le_bytes());
        machine.messages.take();
        machine.start();
        prop_assert_eq!(machine.ask(1, b"still", 5), b"llits");
    }
}
