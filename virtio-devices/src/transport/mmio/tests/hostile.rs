//! Accesses that make no sense, wherever a guest can make them.

use proptest::prelude::*;
use vm_device::BusDevice;

use super::driver::Machine;
use crate::transport::pci::tests::Reverser;

#[derive(Clone, Copy, Debug)]
enum Access {
    Read(u64, usize),
    Write(u64, usize, u64),
}

fn accesses() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![
        6 => (0_u64..0x40).prop_map(|register| 4 * register),
        2 => 0_u64..0x120,
        1 => 0_u64..0x1100,
        1 => any::<u64>(),
    ];
    let width = prop_oneof![5 => Just(4_usize), 1 => Just(1), 1 => Just(2), 1 => 0_usize..=8];
    let value = prop_oneof![Just(0_u64), 0_u64..0x100, 0_u64..0x40_0000, any::<u64>()];
    prop_oneof![
        1 => (offset.clone(), width.clone()).prop_map(|(offset, width)| Access::Read(offset, width)),
        3 => (offset, width, value)
            .prop_map(|(offset, width, value)| Access::Write(offset, width, value)),
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
        let device = machine.device.clone();
        for access in accesses {
            let mut data = [0; 8];
            match access {
                Access::Read(offset, width) => device.read(offset, &mut data[..width]),
                Access::Write(offset, width, value) => {
                    device.write(offset, &value.to_le_bytes()[..width]);
                }
            }
        }
        // Its workers are all alive.
        device.pause().unwrap();
        machine.set(0x70, 0);
        prop_assert!(!device.is_active());
        device.save().unwrap();
        machine.start();
        prop_assert_eq!(machine.ask(1, b"still", 5), b"llits");
    }
}
