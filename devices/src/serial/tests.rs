//! The UART as a driver meets it: registers, FIFOs, and that no driver waits for an interrupt that never comes.

use std::sync::Mutex;

use super::register::*;
use super::*;
use crate::test_support::{Counter, Sink, hostile};
use proptest::prelude::*;

const RX: u8 = 1;
const TX: u8 = 2;
const LINE: u8 = 4;
const MODEM: u8 = 8;
const FIFO_ON: u8 = fcr::ENABLE;
const IDLE: u8 = lsr::HOLDING_EMPTY | lsr::TRANSMITTER_EMPTY;

struct Port {
    uart: Serial,
    line: Arc<Counter>,
    room: Arc<Counter>,
    sink: Sink,
}

impl Port {
    fn new(output_room: usize) -> Self {
        let (line, room, sink) = (Counter::new(), Counter::new(), Sink::new(output_room));
        let uart = Serial::new(line.clone(), Box::new(sink.clone()), room.clone());
        Self {
            uart,
            line,
            room,
            sink,
        }
    }

    /// With these interrupts enabled and this value in FIFO control, no interrupt counted yet.
    fn with(enabled: u8, fifo_control: u8) -> Self {
        let mut port = Self::new(usize::MAX);
        port.set(INTERRUPT_IDENTITY, fifo_control);
        port.set(INTERRUPT_ENABLE, enabled);
        port.line.take();
        port
    }

    fn get(&mut self, register: u64) -> u8 {
        crate::test_support::inb(&mut self.uart, register)
    }

    fn set(&mut self, register: u64, value: u8) {
        self.uart.write(register, &[value]);
    }

    fn identity(&mut self) -> u8 {
        self.get(INTERRUPT_IDENTITY)
    }
}

#[test]
fn after_reset_it_is_idle() {
    let mut port = Port::new(0);
    let registers: Vec<u8> = (0..9).map(|register| port.get(register)).collect();
    assert_eq!(registers, [0, 0, iir::NONE, 0, 0, IDLE, 0xb0, 0, 0xff]);
    assert_eq!(port.line.take(), 0);
}

#[test]
fn divisor_hides_data_and_interrupt_enable() {
    let mut port = Port::with(RX, FIFO_ON);
    port.set(LINE_CONTROL, 0x83);
    // One wide access is two narrow ones.
    port.uart.write(DATA, &[0x34, 0x12]);
    assert_eq!((port.get(DATA), port.get(INTERRUPT_ENABLE)), (0x34, 0x12));
    port.set(LINE_CONTROL, 3);
    assert_eq!((port.get(DATA), port.get(INTERRUPT_ENABLE)), (0, RX));
    assert_eq!(port.sink.take(), b"");
}

#[test]
fn what_a_driver_probes_for() {
    let mut port = Port::new(usize::MAX);
    port.set(SCRATCH, 0xa5);
    assert_eq!(port.get(SCRATCH), 0xa5);
    port.set(INTERRUPT_ENABLE, 0xff);
    assert_eq!(port.get(INTERRUPT_ENABLE), 0x0f);
    port.set(INTERRUPT_ENABLE, 0);
    // A 16550A: the FIFO bits of the identity follow the enable bit; nothing of a 16750.
    assert_eq!(port.identity(), iir::NONE);
    port.set(INTERRUPT_IDENTITY, 0x21);
    assert_eq!(port.identity(), iir::FIFO | iir::NONE);
    // Without the enable bit the others are not programmed.
    port.set(INTERRUPT_IDENTITY, 0xc0);
    assert_eq!(port.identity(), iir::NONE);
    port.set(MODEM_CONTROL, 0xff);
    assert_eq!(port.get(MODEM_CONTROL), 0x1f);
    for register in [LINE_STATUS, MODEM_STATUS] {
        let before = port.get(register);
        let before = if register == MODEM_STATUS {
            before & 0xf0
        } else {
            before
        };
        port.set(register, 0x0f);
        assert_eq!(port.get(register), before);
    }
}

#[test]
fn output_goes_out_at_once() {
    let mut port = Port::with(0, FIFO_ON);
    for byte in b"hello" {
        port.set(DATA, *byte);
        assert_eq!(port.get(LINE_STATUS), IDLE);
    }
    assert_eq!(port.sink.take(), b"hello");
}

#[test]
fn blocked_output_waits_in_the_fifo_and_what_is_more_is_lost() {
    let mut port = Port::with(TX, FIFO_ON);
    assert_eq!(port.identity(), iir::FIFO | iir::TRANSMITTER_EMPTY);
    port.sink.set_room(0);
    for byte in 0..20 {
        port.set(DATA, byte);
    }
    assert_eq!(port.get(LINE_STATUS), 0);
    assert_eq!(port.identity(), iir::FIFO | iir::NONE);
    assert_eq!(port.line.take(), 0);
    port.sink.set_room(10);
    port.uart.output_ready();
    assert_eq!(port.get(LINE_STATUS), 0, "six bytes are left");
    assert_eq!(port.line.take(), 0);
    port.sink.set_room(10);
    port.uart.output_ready();
    assert_eq!(port.line.take(), 1);
    assert_eq!(port.identity(), iir::FIFO | iir::TRANSMITTER_EMPTY);
    assert_eq!(port.get(LINE_STATUS), IDLE);
    assert_eq!(port.sink.take(), (0..16).collect::<Vec<u8>>());
}

#[test]
fn without_fifo_the_transmitter_holds_one_byte() {
    let mut port = Port::new(0);
    port.set(DATA, 1);
    port.set(DATA, 2);
    assert_eq!(port.get(LINE_STATUS), 0);
    port.sink.set_room(9);
    assert_eq!(
        port.get(LINE_STATUS),
        IDLE,
        "looking at the status tries again"
    );
    assert_eq!(port.sink.take(), [1]);
}

#[test]
fn an_output_that_fails_loses_the_bytes_and_not_the_driver() {
    let mut port = Port::with(TX, FIFO_ON);
    port.identity();
    port.sink.fail(io::ErrorKind::BrokenPipe);
    port.set(DATA, 1);
    assert_eq!(port.line.take(), 1);
    assert_eq!(port.get(LINE_STATUS), IDLE);
    assert_eq!(port.sink.take(), b"");
}

#[test]
fn clearing_the_transmit_fifo_empties_it() {
    for control in [FIFO_ON | fcr::CLEAR_TRANSMIT, 0] {
        let mut port = Port::with(TX, FIFO_ON);
        port.identity();
        port.sink.set_room(0);
        port.set(DATA, 1);
        port.set(INTERRUPT_IDENTITY, control);
        assert_eq!(port.line.take(), 1);
        port.sink.set_room(9);
        assert_eq!(port.get(LINE_STATUS), IDLE);
        assert_eq!(port.sink.take(), b"");
    }
}

#[test]
fn input_fills_the_fifo_and_asks_for_more_once_it_is_empty() {
    let mut port = Port::with(0, FIFO_ON);
    let typed: Vec<u8> = (0..40).collect();
    assert_eq!(port.uart.queue_input(&typed), 16);
    assert_eq!(port.uart.queue_input(&typed[16..]), 0);
    for byte in 0..16 {
        assert_eq!(port.room.take(), 0);
        assert_eq!(port.get(LINE_STATUS), IDLE | lsr::DATA_READY);
        assert_eq!(port.get(DATA), byte);
    }
    assert_eq!(port.room.take(), 1);
    assert_eq!(port.get(LINE_STATUS), IDLE);
    assert_eq!(port.uart.queue_input(&typed[32..]), 8);
    for _ in 0..9 {
        port.get(DATA);
    }
    assert_eq!(port.room.take(), 0, "all of it was taken");
}

#[test]
fn without_fifo_input_comes_by_the_byte() {
    let mut port = Port::new(0);
    assert_eq!(port.uart.queue_input(b"ab"), 1);
    assert_eq!(port.get(DATA), b'a');
    assert_eq!(port.room.take(), 1);
    assert_eq!(port.uart.queue_input(b"b"), 1);
    port.uart.queue_input(b"c");
    // Turning the FIFO on empties the receiver, and so does clearing it.
    port.set(INTERRUPT_IDENTITY, FIFO_ON);
    assert_eq!(port.room.take(), 1);
    assert_eq!(port.get(LINE_STATUS), IDLE);
    port.uart.queue_input(&[0; 17]);
    port.set(INTERRUPT_IDENTITY, FIFO_ON | fcr::CLEAR_RECEIVE);
    assert_eq!(port.room.take(), 1);
    assert_eq!(port.get(LINE_STATUS), IDLE);
}

#[test]
fn below_the_trigger_level_data_times_out_at_once() {
    for (bits, level) in [(0u8, 1usize), (1, 4), (2, 8), (3, 14)] {
        let mut port = Port::with(RX, FIFO_ON | bits << fcr::TRIGGER_SHIFT);
        for count in 1..=16 {
            port.uart.queue_input(b"x");
            let expected = if count < level {
                iir::TIME_OUT
            } else {
                iir::DATA
            };
            assert_eq!(
                port.identity(),
                iir::FIFO | expected,
                "{count} bytes, level {level}"
            );
        }
        assert_eq!(port.line.take(), 1, "one cause");
    }
}

#[test]
fn causes_are_told_by_priority() {
    let mut port = Port::with(0, FIFO_ON);
    port.set(INTERRUPT_ENABLE, TX);
    port.set(MODEM_CONTROL, mcr::LOOPBACK | mcr::RTS | mcr::DTR);
    for byte in 0..17 {
        port.set(DATA, byte);
    }
    port.set(INTERRUPT_ENABLE, RX | TX | LINE | MODEM);
    assert_eq!(port.identity(), iir::FIFO | iir::LINE_STATUS);
    assert_eq!(port.get(LINE_STATUS), IDLE | lsr::DATA_READY | lsr::OVERRUN);
    for byte in 0..16 {
        assert_eq!(port.identity(), iir::FIFO | iir::DATA);
        assert_eq!(
            port.get(DATA),
            byte,
            "with the FIFO the newest byte is lost"
        );
    }
    assert_eq!(port.identity(), iir::FIFO | iir::TRANSMITTER_EMPTY);
    assert_eq!(
        port.identity(),
        iir::FIFO | iir::MODEM_STATUS,
        "telling acknowledged it"
    );
    assert_eq!(port.get(MODEM_STATUS) & 0xf, 0x8, "carrier went away");
    assert_eq!(port.identity(), iir::FIFO | iir::NONE);
    assert_eq!(
        port.get(LINE_STATUS) & lsr::OVERRUN,
        0,
        "reading cleared it"
    );
}

#[test]
fn loopback_connects_the_outputs_to_the_inputs() {
    let mut port = Port::with(0, 0);
    assert_eq!(port.get(MODEM_STATUS), msr::CTS | msr::DSR | msr::DCD);
    // Linux looks for a UART in this way.
    port.set(MODEM_CONTROL, mcr::LOOPBACK | mcr::OUT2 | mcr::RTS);
    assert_eq!(port.get(MODEM_STATUS), msr::CTS | msr::DCD | 2);
    port.set(MODEM_CONTROL, mcr::LOOPBACK | mcr::OUT1 | mcr::DTR);
    assert_eq!(port.get(MODEM_STATUS), msr::DSR | msr::RI | 0xb);
    // Of the ring indicator the end counts, not the start.
    port.set(MODEM_CONTROL, mcr::LOOPBACK | mcr::DTR);
    assert_eq!(port.get(MODEM_STATUS), msr::DSR | 4);

    port.set(DATA, 1);
    assert_eq!(
        port.uart.queue_input(b"typed"),
        0,
        "the line is not connected"
    );
    port.set(DATA, 2);
    assert_eq!(port.get(LINE_STATUS), IDLE | lsr::DATA_READY | lsr::OVERRUN);
    assert_eq!(
        port.get(DATA),
        2,
        "without the FIFO the oldest byte is lost"
    );
    assert_eq!(port.room.take(), 0);
    port.set(MODEM_CONTROL, 0);
    assert_eq!(port.room.take(), 1);
    assert_eq!(port.sink.take(), b"", "nothing looped went out");
}

#[test]
fn enabling_the_interrupt_of_an_idle_transmitter_raises_it_each_time() {
    // Linux: serial8250_THRE_test.
    let mut port = Port::with(0, FIFO_ON);
    for _ in 0..2 {
        port.set(INTERRUPT_ENABLE, TX);
        assert_eq!(port.line.take(), 1);
        assert_eq!(port.identity(), iir::FIFO | iir::TRANSMITTER_EMPTY);
        assert_eq!(port.identity(), iir::FIFO | iir::NONE);
        port.set(INTERRUPT_ENABLE, TX);
        assert_eq!(port.line.take(), 0, "it was enabled");
        port.set(INTERRUPT_ENABLE, 0);
    }
    // An edge that nobody saw, for the pin was masked.
    port.set(INTERRUPT_ENABLE, TX);
    port.set(INTERRUPT_ENABLE, 0);
    port.line.take();
    port.set(INTERRUPT_ENABLE, TX);
    assert_eq!(port.line.take(), 1);
}

#[test]
fn every_cause_has_an_edge_of_its_own() {
    let mut port = Port::with(RX | TX, FIFO_ON);
    port.uart.queue_input(b"x");
    assert_eq!(port.line.take(), 1, "though the transmitter's is pending");
    assert_eq!(port.identity(), iir::FIFO | iir::DATA);
    port.get(DATA);
    assert_eq!(port.line.take(), 1, "what is left is told again");
    assert_eq!(port.identity(), iir::FIFO | iir::TRANSMITTER_EMPTY);
    assert_eq!(port.line.take(), 0);
    port.set(DATA, b'y');
    assert_eq!(port.line.take(), 1, "empty again");
    port.set(DATA, b'z');
    assert_eq!(port.line.take(), 1, "gone and back within one access");
    port.set(INTERRUPT_ENABLE, RX);
    port.uart.queue_input(b"ab");
    assert_eq!(port.line.take(), 1);
    port.uart.queue_input(b"c");
    assert_eq!(port.line.take(), 0, "the same cause");
}

#[test]
fn survives_any_access() {
    let port = Port::new(3);
    hostile(&Mutex::new(port.uart), 8);
}

/// How a driver reacts to one interrupt.
#[derive(Clone, Copy, Debug)]
enum Handler {
    /// Until the identity says that there is none (Linux).
    Loop,
    /// The cause that the first identity tells.
    One,
    /// Never looks at the identity: all data, then one byte to send.
    Blind,
}

#[derive(Clone, Debug)]
enum Step {
    Type(usize),
    Room(usize),
    Serve,
}

proptest! {
    /// A driver that does nothing but serve interrupts sends all it has and receives all that was typed,
    /// whatever the order of events, when it serves as often as the line was pulsed.
    #[test]
    fn no_driver_waits_for_an_interrupt_that_never_comes(
        handler in prop_oneof![Just(Handler::Loop), Just(Handler::One), Just(Handler::Blind)],
        level in 0..4u8,
        text in prop::collection::vec(any::<u8>(), 0..60),
        steps in prop::collection::vec(
            prop_oneof![
                (1..20usize).prop_map(Step::Type),
                (0..30usize).prop_map(Step::Room),
                Just(Step::Serve),
            ],
            0..40,
        ),
    ) {
        let mut port = Port::new(0);
        port.set(INTERRUPT_IDENTITY, FIFO_ON | level << fcr::TRIGGER_SHIFT);
        port.set(INTERRUPT_ENABLE, RX | TX);
        let mut to_send = text.clone();
        to_send.reverse();
        let (mut typed, mut waiting, mut received, mut sent) = (0u8, Vec::new(), Vec::new(), Vec::new());
        let end = [Step::Room(usize::MAX), Step::Serve];
        for step in steps.into_iter().chain(end.into_iter().cycle().take(400)) {
            match step {
                Step::Type(count) => waiting.extend((0..count).map(|_| {
                    typed = typed.wrapping_add(1);
                    typed
                })),
                Step::Room(room) => {
                    port.sink.set_room(room);
                    port.uart.output_ready();
                }
                // Edges merge while they wait, as in a local APIC.
                Step::Serve if port.line.take() > 0 => serve(&mut port, handler, &mut to_send, &mut received),
                Step::Serve => {}
            }
            sent.extend(port.sink.take());
            // The host gives all it can, whenever it was told of room or has something new.
            port.room.take();
            let count = port.uart.queue_input(&waiting);
            waiting.drain(..count);
        }
        prop_assert_eq!(sent, text);
        prop_assert!(waiting.is_empty());
        let all: Vec<u8> = (0..received.len()).map(|i| (i as u8).wrapping_add(1)).collect();
        prop_assert_eq!(received.last().copied().unwrap_or(0), typed);
        prop_assert_eq!(received, all);
    }
}

fn serve(port: &mut Port, handler: Handler, to_send: &mut Vec<u8>, received: &mut Vec<u8>) {
    let receive = |port: &mut Port, received: &mut Vec<u8>| {
        while port.get(LINE_STATUS) & lsr::DATA_READY != 0 {
            received.push(port.get(DATA));
        }
    };
    let send = |port: &mut Port, to_send: &mut Vec<u8>, most: usize| {
        if port.get(LINE_STATUS) & lsr::HOLDING_EMPTY != 0 {
            for byte in to_send
                .split_off(to_send.len().saturating_sub(most))
                .into_iter()
                .rev()
            {
                port.set(DATA, byte);
            }
        }
    };
    if let Handler::Blind = handler {
        receive(port, received);
        send(port, to_send, 1);
        return;
    }
    loop {
        match port.identity() & 0xf {
            iir::NONE => return,
            iir::DATA | iir::TIME_OUT => receive(port, received),
            iir::TRANSMITTER_EMPTY => send(port, to_send, FIFO_SIZE),
            other => panic!("nobody enabled {other:#x}"),
        }
        if let Handler::One = handler {
            return;
        }
    }
}
