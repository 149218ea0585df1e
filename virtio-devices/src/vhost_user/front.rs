//! The front end of any type of device: what [`vm_virtio::VirtioDevice`] asks, as messages to the back end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_virtio::{Activation, DeviceError, DeviceQueue, VirtioInterrupt, Worker, feature};

use vmm_sys_util::eventfd::EventFd;

use super::connection::{Connection, PROTOCOL_FEATURES, Session};
use super::events::{Ends, Events};
use super::memory::{self, MappedMemory};
use super::{VhostUserConfig, VhostUserError};

/// What a type of device is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    /// The features that it has, of which the back end offers some.
    pub features: u64,
    /// Bytes of its configuration space.
    pub config_len: usize,
    /// Each chain is a request that ends by itself, and no room for what may come.
    pub answers_all: bool,
}

/// What the device and its worker have.
pub(super) struct Shared {
    config: VhostUserConfig,
    kind: Kind,
    /// What the first back end offered, and each after it must.
    features: u64,
    state: Mutex<State>,
}

struct State {
    connection: Arc<Connection>,
    /// The configuration space, as the back end told it last.
    space: Vec<u8>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// That the back end is gone.
    pub fn gone(&self) -> VhostUserError {
        VhostUserError::Gone {
            socket: self.config.socket.clone(),
        }
    }

    /// Reads the configuration space again.
    pub fn refresh(&self, connection: &Connection) -> Result<(), VhostUserError> {
        let space = connection.read_config(self.kind.config_len)?;
        self.state().space = space;
        Ok(())
    }

    /// A connection to a back end that answers: the one there is, or a new one.
    fn living(&self) -> Result<Arc<Connection>, VhostUserError> {
        let connection = self.state().connection.clone();
        let answer = match self.kind.config_len {
            0 => connection.session(|session| {
                session.ask("answer", |frontend| frontend.get_features().map(drop))
            }),
            // Not every back end tells when it changes.
            _ => self.refresh(&connection),
        };
        match answer {
            Ok(()) => return Ok(connection),
            Err(why) => connection.lose(&why),
        }
        let connection = Arc::new(Connection::open(&self.config, self.kind.config_len > 0)?);
        if connection.features() & self.features != self.features {
            return Err(VhostUserError::Changed {
                socket: self.config.socket.clone(),
            });
        }
        if self.kind.config_len > 0 {
            self.refresh(&connection)?;
        }
        self.state().connection = connection.clone();
        Ok(connection)
    }
}

/// A device that works.
struct Running<M> {
    connection: Arc<Connection>,
    worker: Worker<Events>,
    /// All of them; those that are served are with the back end.
    queues: Vec<DeviceQueue>,
    memory: M,
    interrupt: Arc<dyn VirtioInterrupt>,
    /// The back end found a fault in the rings: it may keep requests for good.
    faulty: Arc<AtomicBool>,
}

/// A device that a back end serves, whatever its type.
pub(super) struct Front<M> {
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    running: Option<Running<M>>,
}

impl<M> Front<M> {
    /// Connects to the back end.
    pub fn connect(config: VhostUserConfig, kind: Kind) -> Result<Self, VhostUserError> {
        let (queues, size) = (config.queues, config.queue_size);
        if queues == 0 || !size.is_power_of_two() {
            return Err(VhostUserError::Config { queues, size });
        }
        let connection = Connection::open(&config, kind.config_len > 0)?;
        let space = match kind.config_len {
            0 => Vec::new(),
            len => connection.read_config(len)?,
        };
        let features = connection.features() & kind.features;
        Ok(Self {
            queue_sizes: vec![size; queues.into()],
            shared: Arc::new(Shared {
                config,
                kind,
                features,
                state: Mutex::new(State {
                    connection: Arc::new(connection),
                    space,
                }),
            }),
            running: None,
        })
    }

    /// The features to offer to the driver.
    pub fn features(&self) -> u64 {
        self.shared.features
    }

    /// Entries of each queue, at most.
    pub fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// The configuration space, as the back end told it last.
    pub fn space(&self) -> Vec<u8> {
        self.shared.state().space.clone()
    }

    /// What a worker would wait for, with one queue.
    #[cfg(test)]
    pub fn events(&self) -> (Events, Ends) {
        let connection = self.shared.state().connection.clone();
        Events::new(self.shared.clone(), connection, std::iter::once(0)).unwrap()
    }

    /// Writes to the configuration space. What goes wrong ends the connection.
    pub fn write_config(&self, offset: usize, data: &[u8]) {
        let connection = self.shared.state().connection.clone();
        let written = connection
            .write_config(offset, data)
            .and_then(|()| self.shared.refresh(&connection));
        if let Err(why) = written {
            // A worker that watches it tells the driver; without one, the next start does.
            connection.lose(&why);
        }
    }
}

impl<M: MappedMemory> Front<M> {
    /// Hands memory and queues to the back end.
    pub fn activate(&mut self, activation: Activation<M>) -> Result<(), DeviceError> {
        self.start(activation)
            .map_err(|e| DeviceError::Device("its back end", Box::new(e)))
    }

    fn start(&mut self, activation: Activation<M>) -> Result<(), VhostUserError> {
        let Activation {
            memory,
            queues,
            features,
            interrupt,
            spawn,
        } = activation;
        let prepare = |source| VhostUserError::Prepare {
            socket: self.shared.config.socket.clone(),
            source,
        };
        // It holds the descriptors that the back end gets.
        let held = memory.memory();
        let physical = memory::physical::<M>(&held)?;
        let regions = memory::regions(physical)?;
        let event_idx = features & feature::EVENT_IDX != 0;
        let served = || queues.iter().filter(|queue| queue.is_served());
        let rings = served()
            .map(|queue| memory::rings(physical, queue.index(), &queue.state(), event_idx))
            .collect::<Result<Vec<_>, _>>()?;

        let connection = self.shared.living()?;
        let indexes = served().map(DeviceQueue::index);
        let (events, ends) =
            Events::new(self.shared.clone(), connection.clone(), indexes).map_err(prepare)?;
        let negotiated = features & self.shared.features;
        let queues_with_rings: Vec<_> = served().zip(&rings).zip(&ends.calls).collect();
        let handed = connection.session(|session| {
            hand_over(session, &connection, negotiated, &regions, &ends)?;
            for ((queue, rings), call) in &queues_with_rings {
                start_ring(session, queue, rings, call, &ends)?;
            }
            Ok(())
        });
        // By then the back end has signalled nothing that would be lost.
        let started = handed.and_then(|()| {
            Worker::start(
                &self.shared.config.id,
                vec![events],
                interrupt.clone(),
                &spawn,
            )
            .map_err(|e| prepare(std::io::Error::other(e)))
        });
        let worker = started.inspect_err(|why| {
            // It may have a part of the rings, and must not use them.
            connection.lose(why);
        })?;
        for queue in served() {
            // There may be chains in it from before.
            queue.kick().write(1).map_err(prepare)?;
        }
        drop(held);
        self.running = Some(Running {
            connection,
            worker,
            queues,
            memory,
            interrupt,
            faulty: ends.faulty,
        });
        Ok(())
    }

    /// Takes the queues back from the back end.
    pub fn deactivate(&mut self) -> Result<Vec<DeviceQueue>, DeviceError> {
        let Some(running) = self.running.take() else {
            return Ok(Vec::new());
        };
        let Running {
            connection,
            worker,
            mut queues,
            memory,
            interrupt,
            faulty,
        } = running;
        let memory = memory.memory();
        let hopeless = || connection.is_lost() || faulty.load(Ordering::Acquire);
        if self.shared.kind.answers_all {
            // While it works as ever: not every back end ends well what is in flight when it is told to stop.
            let offered: Vec<_> = queues
                .iter()
                .filter(|queue| queue.is_served())
                .map(|queue| queue.available_index(&*memory).map_or(u32::MAX, u32::from))
                .collect();
            for queue in queues.iter().filter(|queue| queue.is_served()) {
                // The driver may not have come to it. Where it fails there is a kick already.
                let _ = queue.kick().write(1);
            }
            self.wait_for_requests(&queues, &offered, &*memory, hopeless);
        }
        let served = queues.iter().filter(|queue| queue.is_served());
        let stopped = connection.session(|session| {
            served
                .map(|queue| {
                    let index = usize::from(queue.index());
                    session.ask("stop", |frontend| frontend.get_vring_base(index))
                })
                .collect::<Result<Vec<_>, _>>()
        });
        if let Err(why) = &stopped {
            connection.lose(why);
            interrupt.needs_reset();
        }
        let bases = stopped.unwrap_or_default();
        self.wait_for_requests(&queues, &bases, &*memory, hopeless);
        // By now it signalled all that it used.
        let joined = worker.stop();
        let mut bases = bases.into_iter();
        for queue in queues.iter_mut().filter(|queue| queue.is_served()) {
            // None where the back end is lost; a number that is none of a split ring is as wrong as one that does not fit.
            let base = bases.next().map(u16::try_from);
            let known = base.and_then(Result::ok);
            let home = queue.take_back(&*memory, known);
            if known.is_some() != base.is_some() || home.is_err() || queue.in_flight() > 0 {
                queue.set_broken();
                connection.lose(&VhostUserError::Unfinished {
                    socket: self.shared.config.socket.clone(),
                    queue: queue.index(),
                });
                interrupt.needs_reset();
            }
        }
        joined?;
        Ok(queues)
    }

    /// Some back ends answer that they stopped while requests are in flight, which still end. Waits for that, as long as the back end may
    /// take for anything, or until they are `hopeless`. `bases` are the chains of each queue that it serves which it is to
    /// end.
    fn wait_for_requests(
        &self,
        queues: &[DeviceQueue],
        bases: &[u32],
        memory: &M::M,
        hopeless: impl Fn() -> bool,
    ) {
        let deadline = Instant::now() + self.shared.config.patience;
        let served = || queues.iter().filter(|queue| queue.is_served());
        let in_flight = |(queue, base): (&DeviceQueue, &u32)| {
            // What can be no answer at all is not waited for.
            let base = u16::try_from(*base).ok();
            let count = base.zip(queue.used_index(memory).ok());
            count.is_some_and(|(base, used)| (1..=queue.size()).contains(&base.wrapping_sub(used)))
        };
        while served().zip(bases).any(in_flight) && !hopeless() && Instant::now() < deadline {
            // Nothing tells: a driver that polls wants no signals.
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// What is told before the rings.
fn hand_over(
    session: &Session<'_>,
    connection: &Connection,
    features: u64,
    regions: &[VhostUserMemoryRegionInfo],
    ends: &Ends,
) -> Result<(), VhostUserError> {
    let features = features | connection.features() & PROTOCOL_FEATURES;
    session.ask("take the features of the driver", |frontend| {
        frontend.set_features(features)
    })?;
    if let Some(channel) = &ends.channel {
        session.ask("take a channel to speak on", |frontend| {
            frontend.set_backend_request_fd(channel)
        })?;
    }
    session.ask("take guest memory", |frontend| {
        frontend.set_mem_table(regions).map(drop)
    })
}

/// Hands one queue over.
fn start_ring(
    session: &Session<'_>,
    queue: &DeviceQueue,
    rings: &VringConfigData,
    call: &EventFd,
    ends: &Ends,
) -> Result<(), VhostUserError> {
    let index = usize::from(queue.index());
    let next = queue.state().next_available;
    session.ask("take the rings", |frontend| {
        frontend.set_vring_num(index, queue.size())?;
        frontend.set_vring_base(index, next)?;
        frontend.set_vring_addr(index, rings)?;
        frontend.set_vring_call(index, call)?;
        frontend.set_vring_err(index, &ends.fault)?;
        frontend.set_vring_kick(index, queue.kick())
    })?;
    if session.enables_rings() {
        session.ask("start the rings", |frontend| {
            frontend.set_vring_enable(index, true)
        })?;
    }
    Ok(())
}
