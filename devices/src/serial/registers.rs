//! Registers of the 16550A and their bits (PC16550D data sheet, table II).

/// Offsets of the registers.
pub(super) mod register {
    /// Receiver buffer (read), transmitter holding (write); low divisor byte with DLAB.
    pub const DATA: u64 = 0;
    /// Interrupt enable; high divisor byte with DLAB.
    pub const INTERRUPT_ENABLE: u64 = 1;
    /// Interrupt identification (read), FIFO control (write).
    pub const INTERRUPT_IDENTITY: u64 = 2;
    pub const LINE_CONTROL: u64 = 3;
    pub const MODEM_CONTROL: u64 = 4;
    pub const LINE_STATUS: u64 = 5;
    pub const MODEM_STATUS: u64 = 6;
    pub const SCRATCH: u64 = 7;
}

/// FIFO control.
pub(super) mod fcr {
    pub const ENABLE: u8 = 1;
    pub const CLEAR_RECEIVE: u8 = 1 << 1;
    pub const CLEAR_TRANSMIT: u8 = 1 << 2;
    /// Receiver trigger level: 1, 4, 8 or 14 bytes.
    pub const TRIGGER: u8 = 3 << 6;
    pub const TRIGGER_SHIFT: u8 = 6;
}

/// Interrupt identification.
pub(super) mod iir {
    pub const MODEM_STATUS: u8 = 0;
    pub const NONE: u8 = 1;
    pub const TRANSMITTER_EMPTY: u8 = 2;
    pub const DATA: u8 = 4;
    pub const LINE_STATUS: u8 = 6;
    pub const TIME_OUT: u8 = 12;
    /// The FIFOs are on.
    pub const FIFO: u8 = 3 << 6;
}

/// Line control.
pub(super) mod lcr {
    pub const DIVISOR_LATCH: u8 = 1 << 7;
}

/// Modem control.
pub(super) mod mcr {
    pub const DTR: u8 = 1;
    pub const RTS: u8 = 1 << 1;
    pub const OUT1: u8 = 1 << 2;
    pub const OUT2: u8 = 1 << 3;
    pub const LOOPBACK: u8 = 1 << 4;
    /// Bits that exist.
    pub const MASK: u8 = 0x1f;
}

/// Line status.
pub(super) mod lsr {
    pub const DATA_READY: u8 = 1;
    pub const OVERRUN: u8 = 1 << 1;
    pub const HOLDING_EMPTY: u8 = 1 << 5;
    pub const TRANSMITTER_EMPTY: u8 = 1 << 6;
}

/// Modem status.
pub(super) mod msr {
    pub const CTS: u8 = 1 << 4;
    pub const DSR: u8 = 1 << 5;
    pub const RI: u8 = 1 << 6;
    pub const DCD: u8 = 1 << 7;
    /// From a line's bit to the bit that says that it changed.
    pub const CHANGE_SHIFT: u8 = 4;
}
