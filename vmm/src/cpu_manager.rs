//! vCPUs and their threads, named `vcpuN`, and the loop that serves their exits.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use hypervisor::{Kick, SystemEvent, Vcpu, VmExit};
use thiserror::Error;
use vm_device::Bus;

use crate::error_chain;
use crate::event::{Event, EventSender};
use crate::threads;

/// What can go wrong with vCPU threads.
#[derive(Debug, Error)]
pub enum CpuError {
    /// The host would not start a thread.
    #[error("starting the thread of vCPU {id}")]
    Spawn {
        /// vCPU number.
        id: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Where the exits of all vCPUs go.
#[derive(Clone)]
pub struct ExitRoutes {
    /// Port bus.
    pub ports: Arc<Bus>,
    /// Memory bus.
    pub memory: Arc<Bus>,
    /// Told of each level-triggered interrupt's end, with its vector.
    pub end_of_interrupt: Arc<dyn Fn(u8) + Send + Sync>,
}

/// Something to be done with a vCPU between two of its runs.
type Job = Box<dyn FnOnce(&dyn Vcpu) + Send>;

struct VcpuThread {
    id: u32,
    kick: Arc<dyn Kick>,
    jobs: Sender<Job>,
    handle: JoinHandle<Option<Box<dyn Vcpu>>>,
}

/// The running vCPUs of one VM. Dropping it stops and joins their threads.
pub struct CpuManager {
    stop: Arc<AtomicBool>,
    threads: Vec<VcpuThread>,
}

impl CpuManager {
    /// Starts a thread for each of `vcpus`; they run at once.
    pub fn start(
        vcpus: Vec<Box<dyn Vcpu>>,
        routes: &ExitRoutes,
        events: &EventSender,
    ) -> Result<Self, CpuError> {
        let mut manager = Self {
            stop: Arc::new(AtomicBool::new(false)),
            threads: Vec::with_capacity(vcpus.len()),
        };
        for vcpu in vcpus {
            let id = vcpu.id();
            let spawn = || -> io::Result<VcpuThread> {
                let kick = vcpu.kick();
                let stop = manager.stop.clone();
                let routes = routes.clone();
                let to_control = events.try_clone()?;
                let (jobs, to_do) = channel();
                let own_kick = kick.clone();
                let handle = threads::spawn(format!("vcpu{id}"), events.try_clone()?, move || {
                    let orders = Orders {
                        kick: own_kick.as_ref(),
                        stop: &stop,
                        jobs: &to_do,
                    };
                    run(vcpu, &orders, &routes, &to_control)
                })?;
                Ok(VcpuThread {
                    id,
                    kick,
                    jobs,
                    handle,
                })
            };
            let thread = spawn().map_err(|source| CpuError::Spawn { id, source })?;
            manager.threads.push(thread);
        }
        Ok(manager)
    }

    /// What `ask` learns of each vCPU, with its number; the guest goes on. A vCPU that has ended is left out.
    pub fn ask<T: Send + 'static>(
        &self,
        ask: impl Fn(&dyn Vcpu) -> T + Clone + Send + 'static,
    ) -> BTreeMap<u32, T> {
        let (sender, answers) = channel();
        for thread in &self.threads {
            let (sender, ask) = (sender.clone(), ask.clone());
            let job = move |vcpu: &dyn Vcpu| {
                // The other end waits until all senders are gone.
                let _ = sender.send((vcpu.id(), ask(vcpu)));
            };
            if thread.jobs.send(Box::new(job)).is_ok() {
                thread.kick.set();
                kick(&thread.handle);
            }
        }
        drop(sender);
        answers.into_iter().collect()
    }

    /// Stops all vCPUs and takes them back, in order of their numbers. No access of theirs is left half done.
    pub fn stop(&mut self) -> Vec<Box<dyn Vcpu>> {
        self.stop.store(true, Ordering::SeqCst);
        for thread in &self.threads {
            thread.kick.set();
            kick(&thread.handle);
        }
        let mut vcpus = Vec::with_capacity(self.threads.len());
        for thread in self.threads.drain(..) {
            match thread.handle.join() {
                Ok(Some(vcpu)) => {
                    let counters = vcpu.counters();
                    if !counters.is_empty() {
                        log::info!("vCPU {}: served in user space: {counters:?}", thread.id);
                    }
                    vcpus.push(vcpu);
                }
                Ok(None) | Err(_) => log::error!("vCPU {} was lost in a panic", thread.id),
            }
            thread.kick.clear();
        }
        vcpus
    }
}

impl Drop for CpuManager {
    fn drop(&mut self) {
        drop(self.stop());
    }
}

/// Sends the kick signal to a thread that has not been joined.
#[allow(unsafe_code)]
fn kick<T>(handle: &JoinHandle<T>) {
    // SAFETY: the thread is not joined yet (we hold its handle), so its pthread_t is valid.
    unsafe {
        libc::pthread_kill(handle.as_pthread_t(), threads::kick_signal());
    }
}

/// What a vCPU's thread is told from outside. Each order is given first, and then the thread is kicked.
struct Orders<'a> {
    kick: &'a dyn Kick,
    stop: &'a AtomicBool,
    jobs: &'a Receiver<Job>,
}

/// Runs one vCPU until it is told to stop or the machine ends, and gives it back.
fn run(
    mut vcpu: Box<dyn Vcpu>,
    orders: &Orders<'_>,
    routes: &ExitRoutes,
    events: &EventSender,
) -> Box<dyn Vcpu> {
    let id = vcpu.id();
    loop {
        let last = match vcpu.run() {
            // The run before has been completed: now is the time to look for orders. The kick is cleared first, so that one which
            // comes meanwhile ends the next run.
            Ok(VmExit::Interrupted) => {
                orders.kick.clear();
                while let Ok(job) = orders.jobs.try_recv() {
                    job(vcpu.as_ref());
                }
                if orders.stop.load(Ordering::SeqCst) {
                    break;
                }
                continue;
            }
            Ok(exit) => match serve(id, exit, routes) {
                None => continue,
                Some(event) => event,
            },
            Err(e) => Event::Failed(error_chain(&e)),
        };
        events.send(last);
        break;
    }
    vcpu
}

/// Serves one exit. An event means that this vCPU runs no more.
fn serve(id: u32, exit: VmExit<'_>, routes: &ExitRoutes) -> Option<Event> {
    match exit {
        VmExit::IoIn { port, size, data } => {
            for element in data.chunks_mut(size.max(1)) {
                // What answers nowhere reads as all ones, like an undriven bus.
                element.fill(0xff);
                routes.ports.read(u64::from(port), element);
            }
        }
        VmExit::IoOut { port, size, data } => {
            for element in data.chunks(size.max(1)) {
                routes.ports.write(u64::from(port), element);
            }
        }
        VmExit::MmioRead { address, data } => {
            data.fill(0xff);
            routes.memory.read(address, data);
        }
        VmExit::MmioWrite { address, data } => {
            routes.memory.write(address, data);
        }
        VmExit::IoapicEoi(vector) => (routes.end_of_interrupt)(vector),
        VmExit::Interrupted | VmExit::Hlt | VmExit::Debug { .. } => {}
        VmExit::TripleFault => return Some(Event::TripleFault { cpu: id }),
        VmExit::SystemEvent(SystemEvent::Shutdown) => return Some(Event::GuestShutdown),
        VmExit::SystemEvent(SystemEvent::Reset) => return Some(Event::GuestReset),
        VmExit::SystemEvent(event) => {
            return Some(Event::Failed(format!("the guest reported {event:?}")));
        }
    }
    None
}
