//! A pair of queues on its worker, the control queue with the first of them, and the host's end of the pair.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use block_util::{LimiterTimer, RateLimiter, RateLimiterError};
use log::debug;
use vm_virtio::{
    Context, DeviceMemory, DeviceQueue, EventSet, Fault, QueueError, QueueHandler, Source,
};

use super::control;
use super::receive::{Progress, Receiver};
use super::shared::Shared;
use super::transmit::Transmitter;

/// Place of the queue whose chains take packets, the first of a handler's queues.
const RECEIVE: usize = 0;
/// Place of the queue whose chains are packets.
const TRANSMIT: usize = 1;
/// Place of the control queue, where there is one.
const CONTROL: usize = 2;

/// Token of the host's end.
const END: u32 = 0;
/// Token of the event that pairs come into use, or go out of it.
const CHANGED: u32 = 1;
/// Token of the timer that lets packets come again.
const RECEIVE_LIMIT: u32 = 2;
/// Token of the timer that lets packets go again.
const TRANSMIT_LIMIT: u32 = 3;

/// Serves a pair of queues.
pub(super) struct Pair<M> {
    /// Which.
    number: u16,
    queues: Vec<DeviceQueue>,
    memory: M,
    features: u64,
    shared: Arc<Shared>,
    receiver: Receiver,
    transmitter: Transmitter,
    /// The next packet that comes is to be received.
    receiving: bool,
    /// What the host's end is watched for.
    watched: EventSet,
}

impl<M: DeviceMemory> Pair<M> {
    /// Pair `number`, whose `queues` are for receiving, for transmitting, and perhaps for control. `waiting` are packets that waited
    /// for buffers when the device was stopped.
    pub fn new(
        number: u16,
        queues: Vec<DeviceQueue>,
        memory: M,
        features: u64,
        shared: Arc<Shared>,
        waiting: impl Iterator<Item = Vec<u8>>,
    ) -> Result<Self, RateLimiterError> {
        let timer =
            |limiter: &Option<Arc<RateLimiter>>| limiter.clone().map(LimiterTimer::new).transpose();
        let receive = timer(&shared.limits.receive)?;
        let transmit = timer(&shared.limits.transmit)?;
        Ok(Self {
            number,
            queues,
            memory,
            features,
            receiver: Receiver::new(
                shared.end(number),
                &shared.facts,
                features,
                waiting,
                receive,
            ),
            transmitter: Transmitter::new(shared.end(number), transmit),
            shared,
            receiving: false,
            watched: EventSet::empty(),
        })
    }

    /// The packets that wait for buffers, each with the pair's number.
    pub fn waiting(&self) -> impl Iterator<Item = (u16, &[u8])> {
        self.receiver.waiting().map(|packet| (self.number, packet))
    }

    pub fn into_queues(self) -> Vec<DeviceQueue> {
        self.queues
    }

    /// Receives, and watches for more where more can come.
    fn receive(&mut self, events: EventSet, context: &mut Context<'_>) -> Result<(), QueueError> {
        self.receiving = false;
        let (Some(queue), Some(end)) = (self.queues.get_mut(RECEIVE), self.shared.end(self.number))
        else {
            return Ok(());
        };
        if queue.is_served() && self.shared.is_used(self.number) {
            let memory = self.memory.memory();
            let interrupt = context.interrupt();
            let progress = self.receiver.receive(queue, &*memory, end, interrupt)?;
            self.receiving = match progress {
                // An end that has failed would be ready all the time.
                Progress::Empty => !events.intersects(EventSet::ERROR | EventSet::HANG_UP),
                Progress::TurnOver => {
                    // No event tells of a packet that was read already.
                    if self.receiver.waiting().next().is_some() {
                        context.again(queue.index());
                    }
                    true
                }
                Progress::Starved | Progress::Limited | Progress::Failed => false,
            };
        }
        Ok(())
    }

    fn transmit(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        let (Some(queue), Some(end)) =
            (self.queues.get_mut(TRANSMIT), self.shared.end(self.number))
        else {
            return Ok(());
        };
        let memory = self.memory.memory();
        self.transmitter.transmit(queue, &*memory, end, context)
    }

    fn control(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(CONTROL) else {
            return Ok(());
        };
        let memory = self.memory.memory();
        context.serve(queue, &*memory, |chain| {
            control::answer(&*memory, chain, self.features, &self.shared)
        })
    }

    /// Watches the host's end for what there is to do.
    fn watch(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        let mut events = EventSet::empty();
        if self.receiving {
            events |= EventSet::IN;
        }
        if self.transmitter.blocked {
            events |= EventSet::OUT;
        }
        let Some(end) = self.shared.end(self.number) else {
            return Ok(());
        };
        if events == self.watched {
            return Ok(());
        }
        self.watched = events;
        if events.is_empty() {
            context.unwatch(END);
            return Ok(());
        }
        let source = Source {
            fd: end.as_raw_fd(),
            events,
            token: END,
        };
        context.watch(&source).map_err(|error| {
            debug!("waiting for packets: {error}");
            QueueError {
                queue: 2 * self.number,
                fault: Fault::Request("the host's end cannot be waited for"),
            }
        })
    }
}

impl<M: DeviceMemory> QueueHandler for Pair<M> {
    fn queues(&mut self) -> &mut [DeviceQueue] {
        &mut self.queues
    }

    fn sources(&self) -> Vec<Source> {
        let timer = |limit: Option<&LimiterTimer>, token| {
            limit.map(|timer| Source {
                fd: timer.as_raw_fd(),
                events: EventSet::IN,
                token,
            })
        };
        self.shared
            .change(self.number, CHANGED)
            .into_iter()
            .chain(timer(self.receiver.limit(), RECEIVE_LIMIT))
            .chain(timer(self.transmitter.limit(), TRANSMIT_LIMIT))
            .collect()
    }

    fn on_queue(&mut self, index: u16, context: &mut Context<'_>) -> Result<(), QueueError> {
        let served = match self.queues.iter().position(|queue| queue.index() == index) {
            Some(RECEIVE) => self.receive(EventSet::empty(), context),
            Some(TRANSMIT) => self.transmit(context),
            _ => self.control(context),
        };
        served.and(self.watch(context))
    }

    fn on_source(
        &mut self,
        token: u32,
        events: EventSet,
        context: &mut Context<'_>,
    ) -> Result<(), QueueError> {
        let (receive_timer, transmit_timer) = (token == RECEIVE_LIMIT, token == TRANSMIT_LIMIT);
        match token {
            CHANGED => self.shared.clear_change(self.number),
            RECEIVE_LIMIT => self.receiver.limit_passed(),
            TRANSMIT_LIMIT => self.transmitter.limit_passed(),
            _ => {}
        }
        let failed = events.intersects(EventSet::ERROR | EventSet::HANG_UP);
        let mut served = Ok(());
        if !transmit_timer && (receive_timer || failed || events.contains(EventSet::IN)) {
            let events = if receive_timer {
                EventSet::empty()
            } else {
                events
            };
            served = self.receive(events, context);
        }
        if transmit_timer || failed || events.contains(EventSet::OUT) {
            self.transmitter.blocked &= transmit_timer;
            served = served.and(self.transmit(context));
        }
        if served.is_err() && token == END {
            // The worker watches it no more.
            self.watched = EventSet::empty();
            context.unwatch(END);
            return served;
        }
        served.and(self.watch(context))
    }
}
