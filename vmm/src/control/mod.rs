//! The control thread: it owns the VM, and waits for events, requests, signals and typed input.

mod requests;
mod sink;
mod typing;
mod vm;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::path::PathBuf;

use hypervisor::Hypervisor;
use thiserror::Error;
use virtio_devices::VsockError;

use self::vm::Vm;
use crate::api::{Answer, CallReceiver, Reply, Request};
use crate::config::VmConfig;
use crate::console::terminal;
use crate::event::{Event, EventReceiver, EventSender};
use crate::machine::MachineError;
use crate::poll::{poll, watch};
use crate::signals::{Signals, Taken};

/// Why the VMM ended without a failure of its own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended {
    /// The guest powered off.
    GuestShutdown,
    /// SIGTERM or SIGINT.
    Signal,
    /// Ctrl-A x.
    Typed,
    /// An API client asked for it.
    Request,
}

/// What ends the VMM with exit code 1.
#[derive(Debug, Error)]
pub enum ControlError {
    /// A descriptor that the control thread needs.
    #[error("setting up the control thread: {what}")]
    Setup {
        /// Which.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file of `--serial file=` or `--console file=`.
    #[error("{option}: opening {path:?}")]
    File {
        /// Which of them.
        option: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The socket of `--serial socket=` or `--console socket=`.
    #[error("{option}: listening at {path:?}{}", in_the_way(source))]
    Socket {
        /// Which of them.
        option: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The socket of `--vsock`.
    #[error("--vsock")]
    Vsock(#[source] VsockError),
    /// The machine cannot be built or booted.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest is lost.
    #[error(
        "vCPU {cpu} took a triple fault: the guest crashed before it could handle an exception"
    )]
    TripleFault {
        /// vCPU number.
        cpu: u32,
    },
    /// Something that the VM cannot live without failed.
    #[error("{0}")]
    Failed(String),
}

/// What to do about a path that is taken.
fn in_the_way(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => " (remove what is there first)",
        _ => "",
    }
}

fn setup(what: &'static str) -> impl Fn(io::Error) -> ControlError {
    move |source| ControlError::Setup { what, source }
}

/// Serves a VM to its end: that of `config`, which is booted at once, or whatever VM comes by `calls`.
///
/// # Errors
/// A VM that cannot be booted at once, and one that crashes, however it was started.
pub fn run(
    hypervisor: &dyn Hypervisor,
    config: Option<VmConfig>,
    signals: &Signals,
    events: &EventSender,
    receiver: &EventReceiver,
    calls: &CallReceiver,
) -> Result<Ended, ControlError> {
    let mut control = Control {
        hypervisor,
        signals,
        events,
        receiver,
        calls,
        vm: config.map(Vm::new),
    };
    if let Some(vm) = &mut control.vm {
        vm.boot(hypervisor, events)?;
    }
    let result = control.serve();
    // The guest stops, and its last words are written, before anybody hears of the end.
    drop(control.vm.take());
    let reply = match result {
        Ok((ended, reply)) => {
            if let Some(reply) = reply {
                reply.send(Ok(Answer::Done));
            }
            Ok(ended)
        }
        Err(e) => Err(e),
    };
    // Who still waits hears that the VMM ends.
    while calls.try_next().is_some() {}
    reply
}

/// An end, and the client that asked for it.
type End = (Ended, Option<Reply>);

struct Control<'a> {
    hypervisor: &'a dyn Hypervisor,
    signals: &'a Signals,
    events: &'a EventSender,
    receiver: &'a EventReceiver,
    calls: &'a CallReceiver,
    vm: Option<Vm>,
}

impl Control<'_> {
    fn serve(&mut self) -> Result<End, ControlError> {
        loop {
            if let Some(ended) = self.wait()? {
                return Ok((ended, None));
            }
            if let Some(ended) = self.take_events()? {
                return Ok((ended, None));
            }
            while let Some(call) = self.calls.try_next() {
                let (request, reply) = call.split();
                if matches!(request, Request::VmmShutdown) {
                    return Ok((Ended::Request, Some(reply)));
                }
                reply.send(self.answer(request));
            }
        }
    }

    /// Waits for something to do, and sees to signals and typed input. `Some` when the VMM is to end.
    fn wait(&mut self) -> Result<Option<Ended>, ControlError> {
        let running = self.vm.as_mut().and_then(Vm::running_mut);
        let (input, room, links) = running.as_ref().map_or((-1, -1, -1), |running| {
            let devices = running.machine.devices();
            let room = devices.input_room().map_or(-1, AsRawFd::as_raw_fd);
            (running.typing.fd(), room, devices.links().unwrap_or(-1))
        });
        let mut fds = [
            self.receiver.wake_fd().as_raw_fd(),
            self.signals.as_raw_fd(),
            room,
            input,
            links,
        ]
        .map(|fd| watch(fd, libc::POLLIN));
        poll(&mut fds, None).map_err(setup("poll"))?;
        let [events, signal, room, typed, links] = fds.map(|fd| fd.revents != 0);
        if events {
            // Only a wake-up: the channels have the events and requests.
            let _ = self.receiver.wake_fd().read();
        }
        let taken = if signal { self.signals.take() } else { None };
        if taken == Some(Taken::End) {
            return Ok(Some(Ended::Signal));
        }
        let Some(running) = running else {
            return Ok(None);
        };
        if taken == Some(Taken::Resize) {
            let size = terminal::size();
            running.machine.devices().resize_terminal(size);
        }
        if links {
            running.machine.devices().follow_links();
        }
        if typed && running.typing.read() {
            return Ok(Some(Ended::Typed));
        }
        if room && let Some(fd) = running.machine.devices().input_room() {
            let _ = fd.read();
        }
        running.typing.pass_to(&running.machine);
        Ok(None)
    }

    /// Acts on what other threads told. `Some` when the VMM is to end.
    fn take_events(&mut self) -> Result<Option<Ended>, ControlError> {
        let mut reset = false;
        while let Some(event) = self.receiver.try_next() {
            match event {
                Event::GuestShutdown => return Ok(Some(Ended::GuestShutdown)),
                Event::GuestReset => reset = true,
                Event::OutputRoom => {
                    if let Some(running) = self.vm.as_mut().and_then(Vm::running_mut) {
                        running.machine.devices().output_ready();
                    }
                }
                Event::GuestPanicked { crash_kernel } => log::warn!(
                    "the guest panicked{}",
                    if crash_kernel {
                        ", and starts its crash kernel"
                    } else {
                        ""
                    }
                ),
                Event::TripleFault { cpu } => return Err(ControlError::TripleFault { cpu }),
                Event::Failed(why) => return Err(ControlError::Failed(why)),
            }
        }
        if reset && let Some(vm) = &mut self.vm {
            log::info!("the guest asked for a reset: starting it anew");
            vm.reset(self.hypervisor, self.events, self.receiver)?;
        }
        Ok(None)
    }
}

#[allow(unsafe_code)]
fn duplicate(fd: RawFd) -> io::Result<File> {
    // SAFETY: fcntl only makes a new descriptor, which is checked.
    let new = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if new < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is new and has no other owner.
    Ok(unsafe { File::from_raw_fd(new) })
}
