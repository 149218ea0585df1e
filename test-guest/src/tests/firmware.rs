//! What a PVH firmware does: it is started without a command line, finds the devices on the bus, and on the first disk the GUID
//! partition table (UEFI 2.10 §5.3) from whose partitions it would load a kernel.

use super::{at_cpl3, ensure, same};
use crate::map::read;
use crate::outcome::Outcome;
use crate::virtio::Transport;
use crate::virtio::blk::{Blk, IN, OK, Setup};
use crate::virtio::queue::Segment;
use crate::{dma, line};

/// "EFI PART".
const SIGNATURE: u64 = 0x5452_4150_2049_4645;
const SECTOR: u32 = 512;

/// One line a device, and the first and last sector of the first partition.
pub fn firmware() -> Outcome {
    at_cpl3(|| {
        dma::reset();
        for function in Transport::all() {
            line!("VALUE virtio {}", function.ids().1 - 0x1040);
        }
        let mut blk = Blk::open(Setup::FULL)?;
        let header = sector(&mut blk, 1)?;
        same("signature of the table", read(header), SIGNATURE)?;
        same("the header's own sector", read(header + 24), 1)?;
        let entries: u64 = read(header + 72);
        ensure("the table is on the disk", entries < blk.capacity())?;
        let entry = sector(&mut blk, entries)?;
        let [first, last]: [u64; 2] = [read(entry + 32), read(entry + 40)];
        line!("VALUE partition {first} {last}");
        ensure(
            "the partition is on the disk",
            first <= last && last < blk.capacity(),
        )
    })
}

/// Reads one sector, and gives its address.
fn sector(blk: &mut Blk, number: u64) -> Outcome<u64> {
    let at = dma::take(u64::from(SECTOR), 16)?;
    let done = blk.run(0, IN, number, &[Segment::writable(at, SECTOR)])?;
    same("status", u64::from(done.status), u64::from(OK))?;
    Ok(at)
}
