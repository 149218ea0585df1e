//! A redirection table entry (82093AA §3.2.4) and the message that it stands for (Intel SDM volume 3, §11.11).

use super::Message;

const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 7 << 8;
const LOWEST_PRIORITY: u64 = 1 << 8;
const LOGICAL_DESTINATION: u64 = 1 << 11;
const ACTIVE_LOW: u64 = 1 << 13;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const DESTINATION: u64 = 0xff << 56;
/// What the guest can set. Delivery status reads as idle; bits 48–55, an extended destination on some machines, are
/// reserved here.
const WRITABLE: u64 =
    VECTOR | DELIVERY_MODE | LOGICAL_DESTINATION | ACTIVE_LOW | LEVEL | MASKED | DESTINATION;
const LOW: u64 = 0xffff_ffff;

/// Address of a message to a local APIC.
const MESSAGE_ADDRESS: u64 = 0xfee0_0000;
/// Address: choose among the destinations.
const REDIRECTION_HINT: u64 = 1 << 3;
/// Address: the destination is logical.
const LOGICAL: u64 = 1 << 2;
/// Data: the line is asserted.
const ASSERT: u64 = 1 << 14;

/// One entry.
#[derive(Clone, Copy)]
pub(super) struct Entry(u64);

impl Default for Entry {
    /// Masked, and all else 0.
    fn default() -> Self {
        Self(MASKED)
    }
}

impl Entry {
    pub(super) fn low(self) -> u32 {
        (self.0 & LOW) as u32
    }

    pub(super) fn high(self) -> u32 {
        (self.0 >> 32) as u32
    }

    pub(super) fn write_low(&mut self, value: u32) {
        let kept = self.0 & (!LOW | REMOTE_IRR);
        self.0 = kept | u64::from(value) & WRITABLE;
        // Remote IRR has no meaning for an edge; drivers that know no EOI register clear it in this way.
        if !self.level_triggered() {
            self.set_remote_irr(false);
        }
    }

    pub(super) fn write_high(&mut self, value: u32) {
        self.0 = self.0 & LOW | (u64::from(value) << 32) & WRITABLE;
    }

    pub(super) fn vector(self) -> u8 {
        (self.0 & VECTOR) as u8
    }

    pub(super) fn masked(self) -> bool {
        self.0 & MASKED != 0
    }

    pub(super) fn level_triggered(self) -> bool {
        self.0 & LEVEL != 0
    }

    pub(super) fn remote_irr(self) -> bool {
        self.0 & REMOTE_IRR != 0
    }

    pub(super) fn set_remote_irr(&mut self, set: bool) {
        self.0 = if set {
            self.0 | REMOTE_IRR
        } else {
            self.0 & !REMOTE_IRR
        };
    }

    /// The same interrupt as a message. Vector, delivery mode and trigger mode have the same places in both.
    pub(super) fn message(self) -> Message {
        let mut address = MESSAGE_ADDRESS | (self.0 >> 56) << 12;
        if self.0 & LOGICAL_DESTINATION != 0 {
            address |= LOGICAL;
        }
        if self.0 & DELIVERY_MODE == LOWEST_PRIORITY {
            address |= REDIRECTION_HINT;
        }
        let data = self.0 & (VECTOR | DELIVERY_MODE | LEVEL) | ASSERT;
        Message {
            address,
            data: (data & LOW) as u32,
        }
    }
}
