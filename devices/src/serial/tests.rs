use super::*;
use crate::testing::{Count, Sink};

struct Port {
    serial: Serial,
    line: Arc<Count>,
    room: Arc<Count>,
    sink: Sink,
}

fn port(output_room: usize) -> Port {
    let (line, room) = (Count::new(), Count::new());
    let sink = Sink::with_room(output_room);
    let serial = Serial::new(line.clone(), Box::new(sink.clone()), room.clone());
    Port {
        serial,
        line,
        room,
        sink,
    }
}

impl Port {
    fn get(&mut self, register: u64) -> u8 {
        let mut data = [0];
        self.serial.read(register, &mut data);
        data[0]
    }

    fn set(&mut self, register: u64, value: u8) {
        self.serial.write(register, &[value]);
    }
}

#[test]
fn registers_after_reset() {
    let mut port = port(0);
    let values: Vec<u8> = (0..8).map(|register| port.get(register)).collect();
    assert_eq!(values, [0, 0, 1, 3, 0, 0x60, 0xb0, 0]);
    assert_eq!(port.line.taken(), 0);
}

#[test]
fn output_goes_straight_through() {
    let mut port = port(100);
    for &byte in b"hello" {
        port.set(DATA, byte);
    }
    assert_eq!(port.sink.taken(), b"hello");
    assert_eq!(port.get(LSR), 0x60);
}

#[test]
fn output_waits_in_the_fifo_and_then_interrupts() {
    let mut port = port(0);
    port.set(IIR_FCR, FCR_ENABLE);
    for byte in 0..20 {
        port.set(DATA, byte);
    }
    assert_eq!(port.get(LSR) & LSR_HOLDING_EMPTY, 0);
    port.set(IER, IER_TRANSMIT_EMPTY);
    assert_eq!(port.line.taken(), 0, "not empty yet");
    port.sink.add_room(10);
    port.serial.output_ready();
    assert_eq!(port.line.taken(), 0);
    port.sink.add_room(100);
    port.serial.output_ready();
    assert_eq!(port.line.taken(), 1);
    assert_eq!(port.get(IIR_FCR), IIR_FIFOS | IIR_TRANSMIT_EMPTY);
    assert_eq!(port.get(IIR_FCR), IIR_FIFOS | IIR_NONE);
    let expected: Vec<u8> = (0..16).collect();
    assert_eq!(port.sink.taken(), expected, "what did not fit is lost");
    assert_eq!(port.get(LSR), 0x60);
}

#[test]
fn a_polling_guest_gets_stuck_output_out_too() {
    let mut port = port(0);
    port.set(DATA, b'x');
    assert_eq!(port.get(LSR) & LSR_HOLDING_EMPTY, 0);
    port.sink.add_room(1);
    assert_eq!(port.get(LSR), 0x60);
    assert_eq!(port.sink.taken(), b"x");
}

#[test]
fn each_byte_sent_interrupts_again() {
    let mut port = port(100);
    port.set(IER, IER_TRANSMIT_EMPTY);
    assert_eq!(port.line.taken(), 1, "the FIFO is empty");
    for _ in 0..3 {
        assert_eq!(port.get(IIR_FCR), IIR_TRANSMIT_EMPTY);
        port.set(DATA, b'x');
        assert_eq!(port.line.taken(), 1);
    }
    // Switching the interrupt off and on raises it again: drivers rely on that.
    assert_eq!(port.get(IIR_FCR), IIR_TRANSMIT_EMPTY);
    port.set(IER, 0);
    port.set(IER, IER_TRANSMIT_EMPTY);
    assert_eq!(port.line.taken(), 1);
}

#[test]
fn input_fills_the_fifo_and_tells_of_room() {
    let mut port = port(0);
    port.set(IIR_FCR, FCR_ENABLE | 0x80);
    port.set(IER, IER_RECEIVED);
    assert_eq!(port.serial.queue_input(b"0123456"), 7);
    assert_eq!(port.line.taken(), 1);
    assert_eq!(
        port.get(IIR_FCR),
        IIR_FIFOS | IIR_TIMEOUT,
        "below the trigger level of 8"
    );
    assert_eq!(port.serial.queue_input(b"789abcdefXYZ"), 9);
    assert_eq!(port.get(IIR_FCR), IIR_FIFOS | IIR_RECEIVED);
    assert_eq!(port.line.taken(), 0, "the reason stood already");
    for &byte in b"0123456789abcdef" {
        assert_eq!(port.room.taken(), 0);
        assert_eq!(port.get(LSR) & LSR_DATA, LSR_DATA);
        assert_eq!(port.get(DATA), byte);
    }
    assert_eq!(port.room.taken(), 1);
    assert_eq!(port.get(LSR) & LSR_DATA, 0);
    assert_eq!(port.get(IIR_FCR), IIR_FIFOS | IIR_NONE);
    assert_eq!(port.serial.queue_input(b"XYZ"), 3);
    assert_eq!(port.line.taken(), 1);
}

#[test]
fn without_fifos_one_byte_fits() {
    let mut port = port(0);
    assert_eq!(port.serial.queue_input(b"ab"), 1);
    assert_eq!(port.get(DATA), b'a');
    assert_eq!(port.room.taken(), 1);
}

#[test]
fn clearing_the_receive_fifo_makes_room() {
    let mut port = port(0);
    port.set(IIR_FCR, FCR_ENABLE);
    assert_eq!(port.serial.queue_input(&[7; 20]), 16);
    port.set(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE);
    assert_eq!(port.room.taken(), 1);
    assert_eq!(port.get(LSR), 0x60);
}

#[test]
fn loopback_connects_the_port_to_itself() {
    let mut port = port(100);
    port.set(MCR, MCR_LOOP | MCR_RTS | MCR_OUT2);
    assert_eq!(port.get(MSR) & 0xf0, MSR_CTS | MSR_CARRIER);
    port.set(IER, IER_RECEIVED | IER_LINE_STATUS);
    port.set(DATA, 0xa5);
    assert_eq!(port.line.taken(), 1);
    port.set(DATA, 0x5a);
    assert_eq!(port.get(IIR_FCR), IIR_LINE_STATUS);
    assert_eq!(
        port.get(LSR) & (LSR_OVERRUN | LSR_DATA),
        LSR_OVERRUN | LSR_DATA
    );
    assert_eq!(port.get(LSR) & LSR_OVERRUN, 0, "reading clears it");
    assert_eq!(port.get(DATA), 0xa5);
    assert_eq!(port.sink.taken(), b"");
    assert_eq!(port.serial.queue_input(b"lost"), 4);
    assert_eq!(port.get(LSR) & LSR_DATA, 0);
}

#[test]
fn modem_lines_that_change_interrupt() {
    let mut port = port(0);
    port.set(IER, IER_MODEM_STATUS);
    port.set(MCR, MCR_LOOP);
    assert_eq!(port.line.taken(), 1);
    assert_eq!(port.get(IIR_FCR), IIR_MODEM_STATUS);
    assert_eq!(port.get(MSR), 0xb, "CTS, DSR and carrier fell");
    assert_eq!(port.get(MSR), 0);
    assert_eq!(port.get(IIR_FCR), IIR_NONE);
}

#[test]
fn the_divisor_hides_data_and_ier() {
    let mut port = port(100);
    port.set(LCR, LCR_DIVISOR | 3);
    port.set(DATA, 0x34);
    port.set(IER, 0x12);
    assert_eq!((port.get(DATA), port.get(IER)), (0x34, 0x12));
    port.set(LCR, 3);
    assert_eq!(port.get(IER), 0);
    assert_eq!(port.sink.taken(), b"");
}

#[test]
fn scratch_keeps_what_is_written() {
    let mut port = port(0);
    port.set(SCRATCH, 0x99);
    assert_eq!(port.get(SCRATCH), 0x99);
}

#[test]
fn output_that_fails_for_good_is_dropped() {
    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut serial = Serial::new(Count::new(), Box::new(Broken), Count::new());
    serial.write(DATA, b"x");
    let mut status = [0];
    serial.read(LSR, &mut status);
    assert_eq!(status, [0x60]);
}

#[test]
fn no_access_is_too_strange() {
    let mut port = port(7);
    for offset in (0..16).chain([u64::MAX - 2]) {
        for length in 0..9 {
            for value in [0, 0x55, 0xff] {
                port.serial.write(offset, &vec![value; length]);
                port.serial.read(offset, &mut vec![0; length]);
                port.serial.queue_input(&[value; 40]);
            }
        }
    }
    assert!(port.serial.received.len() <= FIFO_SIZE && port.serial.to_send.len() <= FIFO_SIZE);
}
