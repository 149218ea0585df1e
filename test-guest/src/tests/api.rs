//! What the host does to a running machine by its API: a disk that grows, a non-maskable interrupt. `READY` says that the host may.
//!
//! Words: `blk_wanted=SECTORS` that the disk is to have in the end.

use super::{at_cpl3, ensure, same};
use crate::cpu::idt;
use crate::outcome::{Outcome, Reason};
use crate::virtio::Transport;
use crate::virtio::blk::{Blk, IN, OK, Setup};
use crate::virtio::queue::Segment;
use crate::{dma, line, number};

/// Vector of the non-maskable interrupt.
const NMI: u8 = 2;

/// The disk's new size comes with an interrupt of the configuration, and its last sector can be read.
pub fn resize() -> Outcome {
    // Where interrupts are on.
    at_cpl3(|| {
        let wanted = number("blk_wanted").ok_or(Reason("blk_wanted= is missing", 0, 1))?;
        dma::reset();
        let mut blk = Blk::open(Setup::FULL)?;
        let before = blk.capacity();
        line!("VALUE blk_sectors {before}");
        ensure("another size than before", before != wanted)?;
        let seen = idt::count(Transport::config_vector());
        line!("READY");
        while idt::count(Transport::config_vector()) == seen {
            core::hint::spin_loop();
        }
        same("sectors", blk.capacity(), wanted)?;
        let buffer = dma::take(512, 512)?;
        let done = blk.run(0, IN, wanted - 1, &[Segment::writable(buffer, 512)])?;
        same("a read of the last sector", done.status.into(), OK.into())?;
        let done = blk.run(0, IN, wanted, &[Segment::writable(buffer, 512)])?;
        ensure("a read behind it is refused", done.status != OK)
    })
}

/// A non-maskable interrupt comes, though interrupts are off.
pub fn nmi() -> Outcome {
    line!("READY");
    idt::expecting(0, || {
        while idt::count(NMI) == 0 {
            core::hint::spin_loop();
        }
    });
    Ok(())
}
