//! The I/O APIC as a kernel programs it, against a sink that keeps what it hears.

use std::sync::Mutex;

use super::*;
use crate::test_support::hostile;
use proptest::prelude::*;

const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;
const REMOTE_IRR: u32 = 1 << 14;

#[derive(Clone, Debug, Eq, PartialEq)]
enum Heard {
    Sent(Message),
    Route(u8, Option<Message>),
}

#[derive(Default)]
struct Sink {
    heard: Mutex<Vec<Heard>>,
    deaf: bool,
}

impl Sink {
    fn take(&self) -> Vec<Heard> {
        std::mem::take(&mut self.heard.lock().unwrap())
    }
}

impl InterruptSink for Sink {
    fn send(&self, message: &Message) -> io::Result<()> {
        if self.deaf {
            return Err(io::ErrorKind::NotConnected.into());
        }
        self.heard.lock().unwrap().push(Heard::Sent(*message));
        Ok(())
    }

    fn route(&self, pin: u8, message: Option<&Message>) {
        self.heard
            .lock()
            .unwrap()
            .push(Heard::Route(pin, message.copied()));
    }
}

fn ioapic() -> (Arc<Ioapic>, Arc<Sink>) {
    let sink = Arc::new(Sink::default());
    (Arc::new(Ioapic::new(sink.clone())), sink)
}

fn get(ioapic: &Ioapic, index: u8) -> u32 {
    let mut data = [0; 4];
    ioapic.write(0, &u32::from(index).to_le_bytes());
    ioapic.read(0x10, &mut data);
    u32::from_le_bytes(data)
}

fn set(ioapic: &Ioapic, index: u8, value: u32) {
    ioapic.write(0, &u32::from(index).to_le_bytes());
    ioapic.write(0x10, &value.to_le_bytes());
}

fn low(pin: u8) -> u8 {
    0x10 + 2 * pin
}

fn message(destination: u64, data: u32) -> Message {
    Message {
        address: 0xfee0_0000 | destination << 12,
        data: data | 1 << 14,
    }
}

#[test]
fn after_reset_all_is_masked() {
    let (ioapic, sink) = ioapic();
    assert_eq!(get(&ioapic, 1), 0x0017_0020);
    for pin in 0..PINS {
        assert_eq!(
            (get(&ioapic, low(pin)), get(&ioapic, low(pin) + 1)),
            (MASKED, 0)
        );
        ioapic.pulse(pin).unwrap();
        ioapic.set_level(pin, true).unwrap();
    }
    assert_eq!(get(&ioapic, low(PINS)), 0, "past the last entry");
    assert_eq!(sink.take(), []);
    assert!(ioapic.pulse(PINS).is_err());
    assert!(ioapic.line(255).trigger().is_err());
}

#[test]
fn registers_keep_the_bits_that_exist() {
    let (ioapic, sink) = ioapic();
    for (index, kept) in [
        (0, 0x0f00_0000),
        (1, 0x0017_0020),
        (2, 0x0f00_0000),
        (3, 0),
        (low(5), 0x0001_afff),
        (low(5) + 1, 0xff00_0000),
        (255, 0),
    ] {
        set(&ioapic, index, u32::MAX);
        assert_eq!(get(&ioapic, index), kept, "register {index:#x}");
    }
    assert_eq!(sink.take(), [], "masked");
    let mut byte = [0];
    ioapic.write(0, &[low(5)]);
    ioapic.read(0x11, &mut byte);
    assert_eq!(byte, [0xaf], "part of a register");
}

#[test]
fn an_edge_is_one_message() {
    let (ioapic, sink) = ioapic();
    set(&ioapic, low(4) + 1, 0x0300_0000);
    set(&ioapic, low(4), 0x31);
    ioapic.line(4).trigger().unwrap();
    ioapic.pulse(4).unwrap();
    assert_eq!(sink.take(), vec![Heard::Sent(message(3, 0x31)); 2]);
    ioapic.set_level(4, true).unwrap();
    ioapic.set_level(4, true).unwrap();
    assert_eq!(sink.take().len(), 1, "one rise of the line");
    ioapic.set_level(4, false).unwrap();
    ioapic.end_of_interrupt(0x31);
    assert_eq!(sink.take(), []);
}

#[test]
fn an_edge_on_a_masked_pin_is_lost() {
    let (ioapic, sink) = ioapic();
    ioapic.pulse(4).unwrap();
    set(&ioapic, low(4), 0x31);
    assert_eq!(sink.take(), []);
    ioapic.pulse(4).unwrap();
    assert_eq!(sink.take(), [Heard::Sent(message(0, 0x31))]);
}

#[test]
fn entries_become_messages() {
    let (ioapic, sink) = ioapic();
    let sent = |high, low_half| {
        set(&ioapic, low(9) + 1, high);
        set(&ioapic, low(9), low_half);
        ioapic.pulse(9).unwrap();
        sink.take()
    };
    // Logical destination; lowest priority asks to choose; NMI; polarity has no place in a message.
    let logical = Message {
        address: 0xfee0_1004,
        data: 0x4040,
    };
    assert_eq!(sent(0x0100_0000, 0x840), [Heard::Sent(logical)]);
    let lowest = Message {
        address: 0xfeef_f00c,
        data: 0x4141,
    };
    assert_eq!(sent(0xff00_0000, 0x941), [Heard::Sent(lowest)]);
    assert_eq!(sent(0, 0x2400), [Heard::Sent(message(0, 0x400))]);
}

#[test]
fn a_level_comes_again_until_it_ends() {
    let (ioapic, sink) = ioapic();
    let routed = message(1, 0x50 | LEVEL);
    set(&ioapic, low(11) + 1, 0x0100_0000);
    set(&ioapic, low(11), 0x50 | LEVEL);
    assert_eq!(sink.take(), [Heard::Route(11, Some(routed))]);
    ioapic.set_level(11, true).unwrap();
    ioapic.set_level(11, true).unwrap();
    assert_eq!(sink.take(), [Heard::Sent(routed)], "once until it ended");
    assert_eq!(get(&ioapic, low(11)), 0x50 | LEVEL | REMOTE_IRR);
    ioapic.end_of_interrupt(0x51);
    assert_eq!(sink.take(), [], "another's end");
    ioapic.end_of_interrupt(0x50);
    assert_eq!(sink.take(), [Heard::Sent(routed)], "still asserted");
    ioapic.set_level(11, false).unwrap();
    // The EOI register of version 0x20.
    ioapic.write(0x40, &0x50u32.to_le_bytes());
    assert_eq!(sink.take(), []);
    assert_eq!(get(&ioapic, low(11)), 0x50 | LEVEL);
    ioapic.pulse(11).unwrap();
    ioapic.end_of_interrupt(0x50);
    assert_eq!(
        sink.take(),
        [Heard::Sent(routed)],
        "a pulse leaves nothing asserted"
    );
}

#[test]
fn a_level_on_a_masked_pin_waits() {
    let (ioapic, sink) = ioapic();
    let routed = message(0, 0x50 | LEVEL);
    set(&ioapic, low(11), 0x50 | LEVEL | MASKED);
    ioapic.set_level(11, true).unwrap();
    assert_eq!(sink.take(), []);
    set(&ioapic, low(11), 0x50 | LEVEL);
    // The route first, or nobody would tell of the end.
    assert_eq!(
        sink.take(),
        [Heard::Route(11, Some(routed)), Heard::Sent(routed)]
    );
}

#[test]
fn masking_in_service_keeps_the_route_until_the_end() {
    let (ioapic, sink) = ioapic();
    let routed = message(0, 0x50 | LEVEL);
    set(&ioapic, low(11), 0x50 | LEVEL);
    ioapic.set_level(11, true).unwrap();
    sink.take();
    set(&ioapic, low(11), 0x50 | LEVEL | MASKED);
    assert_eq!(sink.take(), []);
    ioapic.end_of_interrupt(0x50);
    assert_eq!(sink.take(), [Heard::Route(11, None)]);
    set(&ioapic, low(11), 0x50 | LEVEL);
    assert_eq!(
        sink.take(),
        [Heard::Route(11, Some(routed)), Heard::Sent(routed)]
    );
}

#[test]
fn made_edge_triggered_an_entry_forgets_its_interrupt() {
    let (ioapic, sink) = ioapic();
    set(&ioapic, low(11), 0x50 | LEVEL);
    ioapic.set_level(11, true).unwrap();
    set(&ioapic, low(11), 0x50 | MASKED);
    assert_eq!(get(&ioapic, low(11)), 0x50 | MASKED);
    assert_eq!(sink.take().last(), Some(&Heard::Route(11, None)));
}

#[test]
fn the_sinks_error_goes_to_the_device() {
    let deaf = Arc::new(Ioapic::new(Arc::new(Sink {
        deaf: true,
        ..Sink::default()
    })));
    set(&deaf, low(4), 0x31);
    let error = deaf.line(4).trigger().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);
}

#[test]
fn survives_any_access() {
    let (ioapic, _) = ioapic();
    hostile(&*ioapic, 0x50);
}

proptest! {
    /// Whatever a guest writes: the sink's routes are those of the level-triggered pins that are unmasked or in
    /// service, and at the end of everything no asserted unmasked pin is left without an interrupt.
    #[test]
    fn routes_follow_the_entries_and_no_level_is_forgotten(
        steps in prop::collection::vec((0..4u8, 0..4u8, any::<bool>(), any::<bool>(), 0x40..0x43u8), 0..80),
    ) {
        let (ioapic, sink) = ioapic();
        let mut routes = [None; 4];
        let mut asserted = [false; 4];
        for (kind, pin, a, b, vector) in steps {
            let old = get(&ioapic, low(pin));
            match kind {
                0 => {
                    let flags = if a { LEVEL } else { 0 } | if b { MASKED } else { 0 };
                    set(&ioapic, low(pin), u32::from(vector) | flags);
                }
                1 => set(&ioapic, low(pin) + 1, u32::from(vector) << 24),
                2 => {
                    ioapic.set_level(pin, a).unwrap();
                    asserted[usize::from(pin)] = a;
                }
                _ => ioapic.end_of_interrupt(vector),
            }
            for heard in sink.take() {
                match heard {
                    Heard::Route(pin, route) => {
                        prop_assert_ne!(routes[usize::from(pin)], route, "told twice");
                        routes[usize::from(pin)] = route;
                    }
                    Heard::Sent(sent) if sent.data & LEVEL != 0 => {
                        prop_assert!(routes.contains(&Some(sent)), "sent before it was routed");
                    }
                    Heard::Sent(_) => prop_assert!(kind == 2 && old & MASKED == 0),
                }
            }
            for (pin, (route, asserted)) in (0..).zip(routes.iter().zip(asserted)) {
                let (entry, high) = (get(&ioapic, low(pin)), get(&ioapic, low(pin) + 1));
                let level = entry & LEVEL != 0;
                let unmasked = entry & MASKED == 0;
                let in_service = entry & REMOTE_IRR != 0;
                let wanted = (level && (unmasked || in_service))
                    .then(|| message(u64::from(high >> 24), entry & 0xff | LEVEL));
                prop_assert_eq!(*route, wanted);
                if level && unmasked && asserted {
                    prop_assert!(in_service);
                }
            }
        }
    }
}
