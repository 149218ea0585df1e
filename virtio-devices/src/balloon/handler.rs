//! The thread of a balloon: all of its queues (virtio 1.2 §5.5.2, §5.5.6).

use std::os::fd::AsRawFd;
use std::sync::Arc;

use log::debug;
use vm_memory::{GuestAddress, GuestMemory};
use vm_virtio::{
    Chain, Context, DeviceMemory, DeviceQueue, EventSet, Fault, Outcome, QueueError, QueueHandler,
    Reader, Source,
};

use super::control::Shared;
use super::{BalloonStatistics, MAX_QUEUES, PAGE, REPORTING, STATS_VQ};
use crate::discard::{DiscardError, DiscardRam};

/// Page numbers that are read, sorted and given back together.
const BATCH: usize = 1024;
/// The most page numbers in one request: 4 GiB.
const MOST_PAGES: usize = 1 << 20;
/// Page numbers, or buffers, before it is the turn of other queues, or of a stop.
const TURN: usize = 1 << 16;
/// Bytes of a page number.
const PFN: usize = 4;

/// What a queue is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
    None,
}

/// What queue `index` is for. The standard gives each a fixed place, but drivers leave out those without their feature, and the next
/// ones move up; Linux does. Reporting is served at either.
fn role(index: u16, features: u64) -> Role {
    let statistics = features & STATS_VQ != 0;
    match index {
        0 => Role::Inflate,
        1 => Role::Deflate,
        2 if statistics => Role::Statistics,
        _ if features & REPORTING == 0 => Role::None,
        _ if index == 2 + u16::from(statistics) || index == MAX_QUEUES - 1 => Role::Reporting,
        _ => Role::None,
    }
}

/// Serves all queues.
pub(super) struct Handler<M> {
    queues: Vec<DeviceQueue>,
    memory: M,
    features: u64,
    ram: Arc<dyn DiscardRam>,
    shared: Arc<Shared>,
    pfns: Vec<u32>,
}

impl<M> Handler<M> {
    pub fn new(
        queues: Vec<DeviceQueue>,
        memory: M,
        features: u64,
        ram: Arc<dyn DiscardRam>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            queues,
            memory,
            features,
            ram,
            shared,
            pfns: Vec::with_capacity(BATCH),
        }
    }

    pub fn into_queues(self) -> Vec<DeviceQueue> {
        self.queues
    }
}

impl<M: DeviceMemory> Handler<M> {
    /// Takes pages, or lets the driver have them back, or is told of free ones.
    fn pages(
        &mut self,
        role: Role,
        index: u16,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(usize::from(index)) else {
            return Ok(());
        };
        let memory = self.memory.memory();
        let (ram, pfns) = (&*self.ram, &mut self.pfns);
        let mut turn = TURN;
        context.serve(queue, &*memory, |chain| {
            if turn == 0 {
                return Ok(Outcome::Later);
            }
            let done = match role {
                Role::Inflate => inflate(ram, chain.reader(&*memory), pfns)?,
                Role::Reporting => report(ram, chain)?,
                // Pages are there again as soon as the guest touches them. A queue of no feature that was agreed has no meaning.
                Role::Deflate | Role::Statistics | Role::None => 1,
            };
            turn = turn.saturating_sub(done);
            Ok(Outcome::Used(0))
        })?;
        if turn == 0 {
            context.again(index);
        }
        Ok(())
    }

    /// Reads the statistics that the driver has put into its queue, where they stay until new ones are wanted: then the driver gets its
    /// buffer back, and fills it anew.
    fn statistics(
        &mut self,
        mut give_back: bool,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        let found = self
            .queues
            .iter_mut()
            .find(|queue| role(queue.index(), self.features) == Role::Statistics);
        let Some(queue) = found else {
            return Ok(());
        };
        let memory = self.memory.memory();
        context.serve(queue, &*memory, |chain| {
            let statistics = BalloonStatistics::read(&*memory, chain)?;
            self.shared.set_statistics(statistics);
            Ok(if std::mem::take(&mut give_back) {
                Outcome::Used(0)
            } else {
                Outcome::Later
            })
        })
    }
}

impl<M: DeviceMemory> QueueHandler for Handler<M> {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        &mut self.queues
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.shared.ask_event().as_raw_fd(),
            events: EventSet::IN,
            token: 0,
        }]
    }

    fn on_queue(&mut self, index: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        match role(index, self.features) {
            Role::Statistics => self.statistics(false, context),
            role => self.pages(role, index, context),
        }
    }

    fn on_source(
        &mut self,
        _token: u32,
        _events: EventSet,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        // Only a wake-up.
        let _ = self.shared.ask_event().read();
        self.statistics(true, context)
    }
}

/// Gives the pages of a request back to the host, neighbours together. How many there were.
fn inflate<M: GuestMemory>(
    ram: &dyn DiscardRam,
    mut reader: Reader<'_, M>,
    pfns: &mut Vec<u32>,
) -> Result<usize, Fault> {
    let all = reader.left();
    if !all.is_multiple_of(PFN) || all / PFN > MOST_PAGES {
        return Err(Fault::Request(
            "the page numbers are no whole ones, or too many for one request",
        ));
    }
    while reader.left() > 0 {
        let mut bytes = [[0; PFN]; BATCH];
        let count = (reader.left() / PFN).min(BATCH);
        let bytes = bytes.get_mut(..count).unwrap_or_default();
        reader.read(bytes.as_flattened_mut())?;
        pfns.clear();
        pfns.extend(bytes.iter().map(|pfn| u32::from_le_bytes(*pfn)));
        pfns.sort_unstable();
        pfns.dedup();
        for run in pfns.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            if let Some(first) = run.first() {
                discard(ram, u64::from(*first) * PAGE, run.len() as u64 * PAGE)?;
            }
        }
    }
    // An empty request counts too, so that a turn ends.
    Ok((all / PFN).max(1))
}

/// Gives the pages in the buffers of `chain`, which are free in the guest, back to the host. How many buffers there were.
fn report(ram: &dyn DiscardRam, chain: &Chain) -> Result<usize, Fault> {
    for buffer in chain.writable() {
        discard(ram, buffer.address.0, buffer.len.into())?;
    }
    Ok(chain.writable().len().max(1))
}

fn discard(ram: &dyn DiscardRam, start: u64, len: u64) -> Result<(), Fault> {
    match ram.discard(GuestAddress(start), len) {
        Ok(()) => Ok(()),
        Err(DiscardError::NotRam { .. }) => {
            Err(Fault::Request("the driver gives up pages that are no RAM"))
        }
        // The host keeps them in memory, and the guest does not notice.
        Err(error @ DiscardError::Host { .. }) => {
            debug!("{error}");
            Ok(())
        }
    }
}
