//! The entropy device under load: `depth=N` (8) requests of `size=BYTES` (4096) in flight. Operations are bytes.

use super::{Count, measure};
use crate::cpu::rdtsc;
use crate::outcome::{Outcome, Reason, ensure};
use crate::tests::at_cpl3;
use crate::virtio::Transport;
use crate::virtio::queue::Segment;
use crate::{dma, number};

const TYPE: u16 = 4;

/// Draws bytes.
pub fn run() -> Outcome {
    at_cpl3(|| {
        dma::reset();
        let depth = number("depth").unwrap_or(8);
        let size = number("size").unwrap_or(4096);
        let transport = Transport::find(TYPE, 0)?;
        let features = transport.negotiate(u64::MAX >> 34)?;
        transport.interrupts()?;
        let mut queue = transport.queue(0, 64, features)?;
        queue.ask_for_interrupt(false);
        transport.go()?;
        ensure(
            "a depth that fits",
            (1..=u64::from(queue.size)).contains(&depth),
        )?;
        let buffers = dma::take(u64::from(queue.size) * size, 4096)?;
        measure(|limit| {
            let mut count = Count {
                operations: 0,
                ticks: 0,
                kicks: 0,
            };
            let start = rdtsc();
            let mut in_flight = 0;
            loop {
                let before = in_flight;
                while let Some(used) = queue.take()? {
                    ensure("bytes came", used.length > 0)?;
                    in_flight -= 1;
                    count.operations += u64::from(used.length);
                }
                count.ticks = rdtsc().wrapping_sub(start);
                if limit.reached(count.operations, count.ticks) {
                    return Ok(count);
                }
                while in_flight < depth {
                    let head = queue.next_head();
                    let head = head.ok_or(Reason("the queue is full", in_flight, depth))?;
                    let at = buffers + u64::from(head) * size;
                    queue.add(&[Segment::writable(at, size as u32)], false);
                    in_flight += 1;
                }
                if in_flight != before || before == 0 {
                    queue.ask_for_interrupt(false);
                }
                count.kicks += u64::from(queue.kick());
            }
        })
    })
}
