//! The thread of a console: both queues (virtio 1.2 §5.3.2), its input and the readiness of its output.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_virtio::{
    Context, DeviceMemory, DeviceQueue, EventSet, Outcome, QueueError, QueueHandler, Source,
};

use super::input::{ConsoleInput, clear};
use super::output::{Progress, SharedOutput};

/// Index of the queue whose chains take input.
const RECEIVE: u16 = 0;
/// Index of the queue whose chains are output.
const TRANSMIT: u16 = 1;
/// The most bytes of output before it is the turn of input, or of a stop.
const TURN: usize = 64 << 10;

/// Token of the event that there is input.
const ARRIVED: u32 = 0;
/// Token of the event that there is room for output.
const READY: u32 = 1;

/// Serves both queues.
pub(super) struct Handler<M> {
    queues: Vec<DeviceQueue>,
    memory: M,
    input: Arc<ConsoleInput>,
    output: SharedOutput,
    /// The output takes nothing until it says otherwise.
    blocked: bool,
}

impl<M> Handler<M> {
    pub fn new(
        queues: Vec<DeviceQueue>,
        memory: M,
        input: Arc<ConsoleInput>,
        output: SharedOutput,
    ) -> Self {
        Self {
            queues,
            memory,
            input,
            output,
            blocked: false,
        }
    }

    pub fn into_queues(self) -> Vec<DeviceQueue> {
        self.queues
    }
}

impl<M: DeviceMemory> Handler<M> {
    fn receive(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(usize::from(RECEIVE)) else {
            return Ok(());
        };
        let memory = self.memory.memory();
        context.serve(queue, &*memory, |chain| self.input.fill(&*memory, chain))
    }

    fn transmit(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(usize::from(TRANSMIT)) else {
            return Ok(());
        };
        if self.blocked {
            return Ok(());
        }
        let memory = self.memory.memory();
        let mut output = self.output.lock();
        let mut turn = TURN;
        let mut progress = Progress::Done;
        let served = context.serve(queue, &*memory, |chain| {
            progress = output.send(&*memory, chain, &mut turn)?;
            Ok(match progress {
                Progress::Done => Outcome::Used(0),
                Progress::Blocked | Progress::TurnOver => Outcome::Later,
            })
        });
        let flushed = output.flush();
        self.blocked = progress == Progress::Blocked || !flushed;
        if progress == Progress::TurnOver {
            context.again(TRANSMIT);
        }
        served
    }
}

impl<M: DeviceMemory> QueueHandler for Handler<M> {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        &mut self.queues
    }

    fn sources(&self) -> Vec<Source> {
        let source = |fd, token| Source {
            fd,
            events: EventSet::IN,
            token,
        };
        vec![
            source(self.input.arrival_event().as_raw_fd(), ARRIVED),
            source(self.input.output_event().as_raw_fd(), READY),
        ]
    }

    fn on_queue(&mut self, index: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        match index {
            RECEIVE => self.receive(context),
            _ => self.transmit(context),
        }
    }

    fn on_source(
        &mut self,
        token: u32,
        _events: EventSet,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        // The event is cleared first: what comes after it shows again.
        if token == ARRIVED {
            clear(self.input.arrival_event());
            self.receive(context)
        } else {
            clear(self.input.output_event());
            self.blocked = false;
            self.transmit(context)
        }
    }
}
