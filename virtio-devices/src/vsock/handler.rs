//! The thread of a vsock device: its three queues (virtio 1.2 §5.10.2), and the sockets of the host.

use vm_virtio::{
    Context, DeviceMemory, DeviceQueue, EventSet, Next, Outcome, QueueError, QueueHandler, Source,
};

use super::packet::HEADER_LEN;
use super::streams::{LISTENER, Streams};

/// Index of the queue whose chains take packets.
pub const RECEIVE: u16 = 0;
/// Index of the queue whose chains are packets.
pub const TRANSMIT: u16 = 1;
/// Index of the queue whose chains take events.
pub const EVENT: u16 = 2;

/// Bytes in one direction before it is the turn of the other, or of a stop.
const TURN: usize = 1 << 20;
/// The event that all streams are gone, and that the context id may be another (§5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// Serves all queues.
pub struct Handler<M> {
    queues: Vec<DeviceQueue>,
    memory: M,
    streams: Streams,
    /// The driver is to be told that all streams are gone.
    event: bool,
    /// The driver's packets wait until it takes ours.
    held: bool,
}

impl<M> Handler<M> {
    pub fn new(queues: Vec<DeviceQueue>, memory: M, mut streams: Streams, event: bool) -> Self {
        streams.set_watched();
        Self {
            queues,
            memory,
            streams,
            event,
            held: false,
        }
    }

    /// The queues, the streams, and whether the driver is still to be told that they are others.
    pub fn into_parts(self) -> (Vec<DeviceQueue>, Streams, bool) {
        (self.queues, self.streams, self.event)
    }
}

impl<M: DeviceMemory> Handler<M> {
    fn transmit(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(usize::from(TRANSMIT)) else {
            return Ok(());
        };
        let memory = self.memory.memory();
        let streams = &mut self.streams;
        let mut left = TURN;
        let mut held = false;
        let next = queue.serve(&*memory, context.interrupt(), |chain| {
            held = !streams.takes_packets();
            if held || left == 0 {
                return Ok(Outcome::Later);
            }
            streams.take(&*memory, chain, context)?;
            left = left.saturating_sub(chain.readable_len() as usize);
            Ok(Outcome::Used(0))
        })?;
        self.held = held;
        if next == Next::Again || left == 0 && !held {
            context.again(TRANSMIT);
        }
        Ok(())
    }

    fn receive(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(usize::from(RECEIVE)) else {
            return Ok(());
        };
        if !self.streams.has_turns() {
            return Ok(());
        }
        let memory = self.memory.memory();
        let streams = &mut self.streams;
        let mut left = TURN;
        let mut over = false;
        let next = queue.serve(&*memory, context.interrupt(), |chain| {
            over = left == 0;
            if over {
                return Ok(Outcome::Later);
            }
            match streams.give(&*memory, chain, context)? {
                Some(count) => {
                    left = left.saturating_sub((count as usize).max(HEADER_LEN));
                    Ok(Outcome::Used(count))
                }
                None => Ok(Outcome::Later),
            }
        })?;
        if next == Next::Again || over {
            context.again(RECEIVE);
        }
        if self.held && self.streams.takes_packets() {
            self.held = false;
            context.again(TRANSMIT);
        }
        Ok(())
    }

    /// Tells the driver that all streams are gone, if it does not know.
    fn tell(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(usize::from(EVENT)) else {
            return Ok(());
        };
        if !self.event {
            return Ok(());
        }
        let memory = self.memory.memory();
        let pending = &mut self.event;
        let next = queue.serve(&*memory, context.interrupt(), |chain| {
            if !*pending {
                return Ok(Outcome::Later);
            }
            chain
                .writer(&*memory)
                .write(&TRANSPORT_RESET.to_le_bytes())?;
            *pending = false;
            Ok(Outcome::Used(4))
        })?;
        if next == Next::Again {
            context.again(EVENT);
        }
        Ok(())
    }
}

impl<M: DeviceMemory> QueueHandler for Handler<M> {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        &mut self.queues
    }

    fn sources(&self) -> Vec<Source> {
        self.streams.sources()
    }

    fn on_queue(&mut self, index: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        match index {
            TRANSMIT => {
                self.streams.listen_again(context);
                self.transmit(context)?;
                self.receive(context)
            }
            EVENT => self.tell(context),
            _ => self.receive(context),
        }
    }

    fn on_source(
        &mut self,
        token: u32,
        events: EventSet,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        match token {
            LISTENER => self.streams.accept(context),
            _ => self.streams.event(token, events, context),
        }
        self.receive(context)
    }
}
